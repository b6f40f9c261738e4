"""Align Self-Forcing (Wan 2.1 1.3B, blocks of three latent frames, global attention) as published.

    python -m astrolabe_jax.main --config=configs/self_forcing.py:multi_reward --workdir=runs/sf
    python -m astrolabe_jax.plan --config=configs/self_forcing.py:paper,devices=48

Reproduces: 8 published configurations, and the default run of the paper (paper). The argument is
    VARIANT,devices=N; without it, hpsv3,devices=8. configs/published.py lists all words.

    variant         devices
    hpsv3           8, 16, 24, 48
    multi_reward    8, 16, 24, 48
    paper           8, 16, 24, 48

Needs: wan_models/Wan2.1-T2V-1.3B/, checkpoints/self_forcing_dmd.pt,
    dataset/vidprom/{train,test}.txt, and the reward directories rewards/hpsv3 and
    rewards/videoalign (docs/rewards.md, Conversion), as far as the variant uses them.
Hardware: the batches of 8 to 48 GPUs, on any number of devices that divides them; plan prints what
    each has to hold, without any file.
Time: not published, not measured.
Expect: of the paper's full run on 48 H200 (its Table 1), HPSv3 9.36 -> 10.72 and motion quality
    1.65 -> 1.71. Not reproduced here.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("self_forcing", variant)
