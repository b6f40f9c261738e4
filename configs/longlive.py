"""Aligns LongLive (Wan 2.1 1.3B, blocks of three latent frames, a window of 12 with 3 sink frames)
as published.

    python -m astrolabe_jax.main --config=configs/longlive.py:gardo,devices=24
    --workdir=runs/longlive
    python -m astrolabe_jax.plan --config=configs/longlive.py:hpsv3,lora_init    # shapes and
                                                                                 memory, without
                                                                                 files

Reproduces the 18 published configurations: hpsv3 (default) with devices=8 (default), 16, 24 or 48;
hpsv3,lora_init with 8, 24 or 48; multi_reward with 8, 16 or 48; multi_reward,lora_init with 8; mq
with 8 or 16; gardo (selective KL) with 8,
24 or 48; long (60 latent frames) with 8; streaming (windows of 21 latent frames in videos of 240)
with 8. `paper` is the paper's default run. The words of an argument: astrolabe_jax/published.py.
The rewards hpsv3, videoalign_mq and videoalign_ta are still to come; until then the word
rewards=NAME[+NAME...] puts others in their place.

Needs wan_models/Wan2.1-T2V-1.3B/, checkpoints/longlive_models/models/longlive_base.pt (and lora.pt
for lora_init) and dataset/vidprom/{train,test}.txt. Hardware: the batches are those of 8 to 48
GPUs; `plan` says what each has to hold. Time: not measured. Expected, of the paper's full run
(Table 1, 48 H200): HPSv3 9.38 -> 11.03, motion quality 1.51 -> 1.64; not measured here.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("longlive", variant)
