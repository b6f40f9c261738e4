"""Align LongLive (Wan 2.1 1.3B, blocks of three latent frames, a window of 12 with a sink of 3) as
published.

    python -m astrolabe_jax.main --config=configs/longlive.py:gardo,devices=24 --workdir=runs/ll
    python -m astrolabe_jax.plan --config=configs/longlive.py:hpsv3,lora_init

Reproduces: 18 published configurations, and the default run of the paper (paper). The argument is
    VARIANT,devices=N; without it, hpsv3,devices=8. lora_init starts from the published adapter;
    gardo has the selective KL term, long has videos of 60 latent frames, streaming trains windows
    of 21 latent frames in videos of 240. configs/published.py lists all words.

    variant                   devices
    hpsv3                     8, 16, 24, 48
    hpsv3,lora_init           8, 24, 48
    multi_reward              8, 16, 48
    multi_reward,lora_init    8
    mq                        8, 16
    long                      8
    gardo                     8, 24, 48
    streaming,lora_init       8
    paper                     8, 16, 24, 48

Needs: wan_models/Wan2.1-T2V-1.3B/, checkpoints/longlive_models/models/longlive_base.pt (and lora.pt
    beside it for lora_init), dataset/vidprom/{train,test}.txt, and the reward directories
    rewards/hpsv3 and rewards/videoalign (docs/rewards.md, Conversion), as far as the variant uses
    them.
Hardware: the batches of 8 to 48 GPUs, on any number of devices that divides them; plan prints what
    each has to hold, without any file.
Time: not published, not measured.
Expect: of the paper's full run on 48 H200 (its Table 1), HPSv3 9.38 -> 11.03 and motion quality
    1.51 -> 1.64. Not reproduced here.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("longlive", variant)
