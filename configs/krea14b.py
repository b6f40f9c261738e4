"""Aligns Krea Realtime 14B (Wan 2.1 14B, blocks of three latent frames, global attention) as
published.

    python -m astrolabe_jax.main --config=configs/krea14b.py:multi_reward --workdir=runs/krea14b
    --config.mesh.fsdp=8
    python -m astrolabe_jax.plan --config=configs/krea14b.py:paper,devices=48    # shapes and
                                                                                 memory, without
                                                                                 files

Reproduces the 6 published configurations: hpsv3 (default) with devices=8 (default), 16, 24 or 48;
multi_reward with 8 or 24. `paper` is the paper's default run. The words of an argument:
astrolabe_jax/published.py. The rewards hpsv3, videoalign_mq and videoalign_ta are still to come;
until then the word rewards=NAME[+NAME...] puts others in their place.

Needs wan_models/Wan2.1-T2V-1.3B/ (VAE, text encoder, tokenizer),
checkpoints/krea-realtime-video-14b.safetensors and dataset/vidprom/{train,test}.txt. Hardware: the
batches are those of 8 to 48 GPUs; `plan` says what each has to hold, mesh.fsdp splits the frozen
base. Time: not measured. Expected, of the paper: pictures only, no numbers.
"""

from configs.published import recipe


def get_config(variant: str = ""):
    return recipe("krea14b", variant)
