"""Meshes over the eight CPU devices of conftest.py."""

import jax

from astrolabe_jax import sharding
from astrolabe_jax.config import get_config


def mesh_of(data: int = -1, fsdp: int = 1, devices=None) -> jax.sharding.Mesh:
    """Return the mesh of a config with these sizes, over `devices`, by default all of them."""
    config = get_config().mesh
    config.data = data
    config.fsdp = fsdp
    return sharding.make_mesh(config, devices)


ONE = mesh_of(devices=jax.devices()[:1])
