"""The tiny DiT of a golden folder, built from a file's config and the folder's weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import schedule
from astrolabe_jax.convert.base import load_net
from astrolabe_jax.models import layers
from astrolabe_jax.models.lora import scaled
from astrolabe_jax.models.wan.config import Layout, WanConfig
from astrolabe_jax.schedule import Schedule
from tests.golden.files import GoldenFile


class Dit:
    """Graph definition and params, with the two functions that the stored outputs need."""

    def __init__(self, file: GoldenFile):
        self.graphdef, self.params, self.config = load_net(
            "transformer", file.dit_weights(), wan_config(file.config)
        )

    def forward(
        self, x, t, prompts, layout: Layout, adapter: Any = None, scale: float = 1.0, params=None
    ):
        """Velocity [B, F, C, H, W] of the uncached block-causal forward; prompts [B, S, E], t [B,
        F].
        """
        params = self.params if params is None else params
        return _forward(
            self.graphdef, params, x, jnp.asarray(t, jnp.float32), prompts, adapter, scale, layout
        )


@functools.partial(jax.jit, static_argnames=("graphdef", "layout"))
def _forward(graphdef, params, x, t, prompts, adapter, scale, layout):
    model = layers.merge(graphdef, params)
    lora = scaled(adapter, scale)
    return model(x, t, model.encode_text(prompts, lora), lora, layout=layout)


def to_x0(x, velocity, t, shift: float):
    """The reference's conversion: sigma is that of the nearest table entry, also for timesteps off
    the table.
    """
    return schedule.velocity_to_x0(x, velocity, schedule.sigma_of(t, Schedule(shift), "lookup"))


def training_layout(block: int, local: int, frames: int) -> Layout:
    """The training mask: the window counts from the end of the query's block, global has no limit,
    no sink.
    """
    # the last block may be cut short
    return Layout(block=block, window=local, max_global=frames + block)


def frame_mask(layout: Layout, frames: int) -> np.ndarray:
    """[F, F] bool: whether the first token of frame q sees the first token of frame k; each token
    sees itself.
    """
    mask = np.eye(frames, dtype=bool)
    for block in layout.blocks(frames):
        for lo, hi in block.ranges:
            mask[block.start : block.stop, lo:hi] = True
    return mask


def wan_config(stored: dict) -> WanConfig:
    """The stored sizes, in float32."""
    config = WanConfig(
        dim=stored["dim"],
        ffn_dim=stored["ffn_dim"],
        num_layers=stored["num_layers"],
        num_heads=stored["num_heads"],
        freq_dim=stored["freq_dim"],
        text_dim=stored["text_dim"],
        text_len=stored["text_len"],
        in_channels=stored["in_dim"],
        dtype="float32",
        param_dtype="float32",
    )
    rows, columns = config.grid((stored["lat_h"], stored["lat_w"]))
    if (config.head_dim, rows * columns) != (stored["head_dim"], stored["fsl"]):
        raise ValueError(
            f"config is inconsistent: head_dim {stored['head_dim']}, fsl {stored['fsl']}"
        )
    return config
