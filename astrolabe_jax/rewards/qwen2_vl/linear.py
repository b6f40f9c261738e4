"""Linears of Qwen2-VL, in the dtype of its config or as int8."""

from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import Linear
from astrolabe_jax.rewards.qwen2_vl.config import Qwen2VLConfig
from astrolabe_jax.sharding import gathered

INT8_MAX = 127  # of a kernel, whose range is symmetric
INIT = nnx.initializers.normal(0.02)


class Int8Linear(nnx.Module):
    """y = (x kernel) scale + bias with an int8 kernel [in, out] and a float32 scale [out].

    See `quantise`. The kernel's whole numbers are exact in 16 bits, and the scale is applied to the
    sums, in float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        kernel, scale = quantise(INIT(rngs.params(), (in_features, out_features), jnp.float32))
        self.kernel = nnx.Param(kernel)
        self.scale = nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., out] in the dtype of x [..., in]."""
        kernel = gathered(self.kernel[...]).astype(x.dtype)
        ones = (1,) * (x.ndim - 1)
        scale = self.scale[...].reshape(*ones, -1)
        y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32) * scale
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape(*ones, -1)
        return y.astype(x.dtype)


def quantise(kernel, xp: ModuleType = jnp) -> tuple:
    """Return (int8 kernel, float32 scale [..., out]) of a kernel [..., in, out].

    Their product is the kernel up to rounding; the largest number of each output becomes 127. `xp`
    is jax.numpy or numpy.
    """
    kernel = xp.asarray(kernel, xp.float32)
    scale = xp.max(xp.abs(kernel), axis=-2) / INT8_MAX
    safe = xp.where(scale == 0, 1, scale)[..., None, :]  # an output of zeros
    return xp.round(kernel / safe).astype(xp.int8), scale


def linear(
    in_features: int,
    out_features: int,
    config: Qwen2VLConfig,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = True,
) -> Linear | Int8Linear:
    """Return a linear with parameters as the config says."""
    if config.quantised:
        return Int8Linear(
            in_features, out_features, use_bias=use_bias, param_dtype=config.param_dtype, rngs=rngs
        )
    return Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        param_dtype=config.param_dtype,
        kernel_init=INIT,
        rngs=rngs,
    )
