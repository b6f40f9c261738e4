"""draft"""

from astrolabe_jax.config import get_config as base_config


def get_config(variant: str = ""):
    config = base_config()
    config.name = "moving_shapes_long"
    config.model.window = 9
    config.model.positions = "relative"
    config.model.remat = False
    config.scenes.transition = "recache"
    config.video.frames = 249
    config.streaming.window = 9
    config.streaming.selection = "choices"
    config.streaming.starts = (0, 9, 18, 27, 36, 45, 54)
    config.streaming.prompts_per_device = 6
    config.prompts.train = "world:moving_shapes/long_train"
    config.prompts.test = "world:moving_shapes/long_test"
    config.rewards.shapes_vq = 1.0
    config.rewards.bounce_mq = 1.0
    config.rewards.bounce_ta = 1.0
    config.optimiser.inner_epochs = 2
    config.optimiser.steps_per_pass = 2
    config.optimiser.microbatch = 12
    config.eval.videos = 48
    return config
