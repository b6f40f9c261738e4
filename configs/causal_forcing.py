"""Aligns Causal-Forcing (Wan 2.1 1.3B, blocks of three latent frames, global attention) as
published.

    python -m astrolabe_jax.main --config=configs/causal_forcing.py:multi_reward
    --workdir=runs/causal_forcing
    python -m astrolabe_jax.plan --config=configs/causal_forcing.py:ta,devices=48    # shapes and
                                                                                     memory, without
                                                                                     files

Reproduces the 10 published configurations: hpsv3 (default) with devices=8 (default), 16, 24 or 48;
multi_reward with 8, 16 or 48; hpsv3_mq_ta, hpsv3_ta and ta with 48. `paper` is the paper's default
run, and `framewise` takes the model with blocks of one frame. The words of an argument:
astrolabe_jax/published.py. The rewards hpsv3, videoalign_mq and videoalign_ta are still to come;
until then the word rewards=NAME[+NAME...] puts others in their place.

Needs wan_models/Wan2.1-T2V-1.3B/, checkpoints/casualforcing/{chunkwise,framewise}/causal_forcing.pt
and dataset/vidprom/{train,test}.txt. Hardware: the batches are those of 8 to 48 GPUs; `plan` says
what each has to hold. Time: not measured. Expected, of the paper's full run (Table 1, 48 H200):
HPSv3 9.48 -> 10.84, motion quality 1.69 -> 1.80; not measured here.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("causal_forcing", variant)
