"""Aligns the shipped moving-shapes model on windows of long videos: 63 latent frames, seven times what it was made for.

    python -m astrolabe_jax.main --config=configs/moving_shapes_long.py --workdir=runs/long

An epoch trains on 27 latent frames that begin at frame 0, or at 36 behind a past that the eight videos of a prompt
share: three times of four at 0, where videos differ most. Shapes bounce off the border; a window is scored in clips of
9, as long as rewards know a bounce. Held-out videos are judged in the same clips; a third of their prompts stay, the
others change in mid-stream.
"""

from astrolabe_jax.config import get_config as base_config


def get_config(variant: str = ""):
    if variant:
        raise ValueError(f"configs/moving_shapes_long.py has no variants, got {variant!r}")
    config = base_config()
    config.name = "moving_shapes_long"
    config.model.window = 9  # the base was made for 9 latent frames
    config.model.positions = "relative"
    config.model.remat = False  # the model is small: memory is cheaper than recomputation
    config.scenes.transition = "recache"  # each prompt changes where it likes
    config.video.frames = 249
    config.streaming.window = 27
    config.streaming.clip = 9
    config.streaming.selection = "choices"
    config.streaming.starts = (0, 0, 0, 36)
    config.streaming.prompts_per_device = 6
    config.prompts.train = "world:moving_shapes/train"
    config.prompts.test = "world:moving_shapes/long_test"
    config.rewards.shapes_vq = 1.0
    config.rewards.bounce_mq = 1.0
    config.rewards.bounce_ta = 1.0
    config.advantages.std = "prompt"
    config.advantages.min_std = 0.1  # behind one past videos differ by 0.03 to 0.1, most of which is chance
    config.optimiser.inner_epochs = 2
    config.optimiser.steps_per_pass = 4
    config.eval.videos = 48
    return config
