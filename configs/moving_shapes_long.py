"""Aligns the shipped moving-shapes model on windows of long videos: 63 latent frames, seven times what it was made for.

    python -m astrolabe_jax.main --config=configs/moving_shapes_long.py --workdir=runs/long

An epoch trains on 9 latent frames that begin at frame 0, 9, 18 or 27, behind a past that the eight videos of a prompt
share. Shapes bounce off the border and a third of the prompts stay, the others change in mid-stream.

Measured on seeds 0, 1 and 2, 48 held-out videos each: the total of the three rewards over all windows 1.34, 1.33, 1.31
-> 1.56, 1.62, 1.67, over the second half of a video (`late`) 0.79, 0.79, 0.76 -> 1.25, 1.25, 1.32, gains 0.45, 0.46,
0.56 (+- 0.2), of a ceiling of 2.73 (real videos through the VAE). Training on short videos (configs/moving_shapes.py)
gains as much there: experiments/late_windows. 40 epochs take 12 to 20 minutes on one busy core.
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
    config.streaming.window = 9
    config.streaming.selection = "choices"
    config.streaming.starts = (0, 9, 18, 27)
    config.streaming.prompts_per_device = 6
    config.prompts.train = "world:moving_shapes/long_train"
    config.prompts.test = "world:moving_shapes/long_test"
    config.rewards.shapes_vq = 1.0
    config.rewards.bounce_mq = 1.0
    config.rewards.bounce_ta = 1.0
    config.advantages.std = "prompt"  # behind one past videos differ little, from prompt to prompt much
    config.optimiser.inner_epochs = 2
    config.optimiser.steps_per_pass = 4
    config.eval.videos = 48
    return config
