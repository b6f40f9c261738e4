"""Strict JAX for every test: eight CPU devices, and silent rank promotion is an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (the flags above must be set before the first import)

jax.config.update("jax_numpy_rank_promotion", "raise")
