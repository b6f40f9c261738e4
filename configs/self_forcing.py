"""Aligns Self-Forcing (Wan 2.1 1.3B, blocks of three latent frames, global attention) as published.

    python -m astrolabe_jax.main --config=configs/self_forcing.py:multi_reward
    --workdir=runs/self_forcing
    python -m astrolabe_jax.plan --config=configs/self_forcing.py:paper,devices=48    # shapes and
                                                                                      memory,
                                                                                      without files

Reproduces the 8 published configurations: hpsv3 (default) and multi_reward, each with devices=8
(default), 16, 24 or
48. `paper` is the paper's default run. The words of an argument: astrolabe_jax/published.py. The
rewards hpsv3, videoalign_mq and videoalign_ta are still to come; until then the word
rewards=NAME[+NAME...] puts others in their place.

Needs wan_models/Wan2.1-T2V-1.3B/, checkpoints/self_forcing_dmd.pt and
dataset/vidprom/{train,test}.txt. Hardware: the batches are those of 8 to 48 GPUs; `plan` says what
each has to hold. Time: not measured. Expected, of the paper's full run (Table 1, 48 H200): HPSv3
9.36 -> 10.72, motion quality 1.65 -> 1.71; not measured here.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("self_forcing", variant)
