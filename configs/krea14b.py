"""Align Krea Realtime 14B (Wan 2.1 14B, blocks of three latent frames, global attention) as
published.

    python -m astrolabe_jax.main --config=configs/krea14b.py --config.mesh.fsdp=8 --workdir=runs/kr
    python -m astrolabe_jax.plan --config=configs/krea14b.py:paper,devices=48

Reproduces: 6 published configurations, and the default run of the paper (paper). The argument is
    VARIANT,devices=N; without it, hpsv3,devices=8. configs/published.py lists all words.

    variant         devices
    hpsv3           8, 16, 24, 48
    multi_reward    8, 24
    paper           8, 16, 24, 48

Needs: wan_models/Wan2.1-T2V-1.3B/ (VAE, text encoder, tokenizer),
    checkpoints/krea-realtime-video-14b.safetensors, dataset/vidprom/{train,test}.txt, and the
    reward directories rewards/hpsv3 and rewards/videoalign (docs/rewards.md, Conversion), as far as
    the variant uses them.
Hardware: the batches of 8 to 48 GPUs, on any number of devices that divides them; plan prints what
    each has to hold, without any file. config.mesh.fsdp splits the frozen base over devices.
Time: not published, not measured.
Expect: no number; the paper shows pictures only.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("krea14b", variant)
