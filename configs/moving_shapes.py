"""Aligns the shipped moving-shapes model with its three pixel rewards: the demo, on a laptop CPU.

    python -m astrolabe_jax.main --config=configs/moving_shapes.py --workdir=runs/demo

Measured on two CPU cores, seed 0: 282 s, held-out total 1.683 +- 0.132 -> 2.221 +- 0.039, gain 0.538 +- 0.128, 47 % of
the way to the ceiling of 2.826 (real videos through the VAE); each of the three rewards rises.

`:reference` sets the published behaviour of every switch, `:reference,context` that of one
(astrolabe_jax.config.REFERENCE_SWITCHES).
"""

from astrolabe_jax.config import get_config as base_config
from astrolabe_jax.config import with_reference


def get_config(variant: str = ""):
    config = base_config()
    config.name = "moving_shapes"
    config.model.remat = False  # the model is small: memory is cheaper than recomputation
    config.rewards.shapes_vq = 1.0
    config.rewards.shapes_mq = 1.0
    config.rewards.shapes_ta = 1.0
    config.optimiser.inner_epochs = 2
    config.optimiser.steps_per_pass = 4
    config.eval.videos = 144  # every held-out prompt once
    if variant:
        name, *switches = variant.split(",")
        if name != "reference":
            raise ValueError(f"unknown variant {variant!r} of configs/moving_shapes.py; expected reference[,SWITCH...]")
        with_reference(config, *switches)
    return config
