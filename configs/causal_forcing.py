"""Align Causal Forcing (Wan 2.1 1.3B, blocks of three latent frames, global attention) as
published.

    python -m astrolabe_jax.main --config=configs/causal_forcing.py:multi_reward --workdir=runs/cf
    python -m astrolabe_jax.plan --config=configs/causal_forcing.py:ta,devices=48

Reproduces: 10 published configurations, and the default run of the paper (paper). The argument is
    VARIANT,devices=N; without it, hpsv3,devices=8. The word framewise takes the model with blocks
    of one frame. configs/published.py lists all words.

    variant         devices
    hpsv3           8, 16, 24, 48
    hpsv3_mq_ta     48
    hpsv3_ta        48
    multi_reward    8, 16, 48
    ta              48
    paper           8, 16, 24, 48

Needs: wan_models/Wan2.1-T2V-1.3B/, checkpoints/casualforcing/{chunkwise,framewise}/
    causal_forcing.pt, dataset/vidprom/{train,test}.txt, and the reward directories rewards/hpsv3
    and rewards/videoalign (docs/rewards.md, Conversion), as far as the variant uses them.
Hardware: the batches of 8 to 48 GPUs, on any number of devices that divides them; plan prints what
    each has to hold, without any file.
Time: not published, not measured.
Expect: of the paper's full run on 48 H200 (its Table 1), HPSv3 9.48 -> 10.84 and motion quality
    1.69 -> 1.80. Not reproduced here.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("causal_forcing", variant)
