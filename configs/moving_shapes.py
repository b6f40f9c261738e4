"""Aligns the shipped moving-shapes model with its three pixel rewards: the demo, on a laptop CPU.

    python -m astrolabe_jax.main --config=configs/moving_shapes.py --workdir=runs/demo

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
    if variant:
        name, *switches = variant.split(",")
        if name != "reference":
            raise ValueError(f"unknown variant {variant!r} of configs/moving_shapes.py; expected reference[,SWITCH...]")
        with_reference(config, *switches)
    return config
