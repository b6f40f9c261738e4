"""Layers shared by the nets, and the border between NNX modules and plain parameter dicts.

NNX objects never cross a jit border: outside, a net is a hashable graph definition and a nested
dict of arrays.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.sharding import gathered


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Take a module apart into its graph definition (static, hashable) and a nested dict of
    arrays.
    """
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: dict) -> nnx.Module:
    """Rebuild the module of `split`; cheap, meant to be called inside the jitted function that uses
    it.
    """
    return nnx.merge(graphdef, params)


def graphdef_of(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """Graph definition of make() and its parameters as ShapeDtypeStructs, without allocating any of
    them.
    """
    graphdefs = []

    def params():
        graphdef, arrays = split(make())
        graphdefs.append(graphdef)
        return arrays

    shapes = jax.eval_shape(params)
    return graphdefs[0], shapes


XAVIER = nnx.initializers.xavier_uniform()


class Linear(nnx.Module):
    """y = x kernel + bias, plus the low-rank term (x a) b when a LoRA pair is given; computes in
    the dtype of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        param_dtype=jnp.float32,
        kernel_init=XAVIER,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None

    def __call__(self, x: jax.Array, lora: dict | None = None) -> jax.Array:
        """x [..., in] -> [..., out]. lora: {'a': [in, R], 'b': [R, out]}, already scaled by alpha /
        R, or None.
        """
        y = x @ gathered(self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + _last(self.bias, x)
        if lora is not None:
            y = y + (x @ lora["a"].astype(x.dtype)) @ lora["b"].astype(x.dtype)
        return y


class Embedding(nnx.Module):
    """Rows of a table [rows, width] by integer index, in the compute dtype."""

    def __init__(self, rows: int, width: int, std: float, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            (std * jax.random.normal(rngs.params(), (rows, width))).astype(param_dtype)
        )
        self.dtype = dtype

    def __call__(self, index: jax.Array) -> jax.Array:
        return self.embedding[...][index].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis: normalised in float32, rounded, then scaled in the
    dtype of x.
    """

    def __init__(self, features: int, *, eps: float, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * _last(self.scale, x)


class LayerNorm(nnx.Module):
    """Affine LayerNorm over the last axis, in float32, rounded once to the dtype of x."""

    def __init__(self, features: int, *, eps: float, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        return (
            _standardise(x32, self.eps) * _last(self.scale, x32) + _last(self.bias, x32)
        ).astype(x.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm without parameters over the last axis, in float32 with biased variance, in the
    dtype of x.
    """
    return _standardise(x.astype(jnp.float32), eps).astype(x.dtype)


def _standardise(x32, eps):
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


def _last(param, x):
    """A vector over the last axis of x, in its dtype, with the leading axes written out (no silent
    rank promotion).
    """
    return param[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
