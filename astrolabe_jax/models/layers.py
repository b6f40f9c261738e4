"""Layers shared by the nets, and the border between NNX modules and plain parameter dicts.

NNX objects never cross a jit border. Outside, a net is a graph definition, which is hashable and
static, and a nested dict of arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from astrolabe_jax.sharding import by_sample, gathered, on_mesh

M = TypeVar("M", bound=nnx.Module)


def split(module: M) -> tuple[nnx.GraphDef[M], dict]:
    """Return a module's graph definition (static, hashable) and its parameters (a nested dict of
    arrays).
    """
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef[M], params: dict) -> M:
    """Rebuild the module that `split` took apart.

    This is cheap. Call it inside the jitted function that uses the module.
    """
    return nnx.merge(graphdef, params)


def graphdef_of(make: Callable[[], M]) -> tuple[nnx.GraphDef[M], dict]:
    """Return what `split(make())` would, with ShapeDtypeStructs as parameters: none is
    allocated.
    """
    return split(nnx.eval_shape(make))


@functools.partial(jax.jit, static_argnames=("function", "graphdef", "mesh"))
def run(
    function: Callable, graphdef: nnx.GraphDef, params: dict, *inputs: jax.Array, mesh: Mesh
) -> Any:
    """Return `function(net, *inputs)` of a frozen net, for inputs that are split over a mesh by
    sample.
    """

    def on_net(params, *inputs):
        return function(merge(graphdef, params), *map(by_sample, inputs))

    return on_mesh(mesh, on_net)(params, *inputs)


def stacked(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """Return `count` modules as one, with their parameters on a leading axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def scanned(blocks: nnx.Module, x: jax.Array, *args: Any) -> jax.Array:
    """Return x after `block(x, *args)` of every module of a stack."""
    blockdef, params = nnx.split(blocks)

    def layer(x, params):
        return nnx.merge(blockdef, params)(x, *args), None

    return jax.lax.scan(layer, x, params)[0]


XAVIER = nnx.initializers.xavier_uniform()


class Linear(nnx.Module):
    """A linear map y = x kernel + bias, with a low-rank term (x a) b where a LoRA pair is given.

    It computes in the dtype of x.
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
        """Return y [..., out] for x [..., in].

        Args:
          x: the input.
          lora: {'a': [in, R], 'b': [R, out]}, already scaled by alpha / R, or None.
        """
        y = x @ gathered(self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + row(self.bias, x)
        if lora is not None:
            a, b = (gathered(lora[half].astype(x.dtype)) for half in ("a", "b"))
            y = y + (x @ a) @ b
        return y


class Embedding(nnx.Module):
    """A table [rows, width] whose rows are looked up by index, in the compute dtype."""

    def __init__(
        self,
        rows: int,
        width: int,
        std: float,
        *,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        table = std * jax.random.normal(rngs.params(), (rows, width))
        self.embedding = nnx.Param(table.astype(param_dtype))
        self.dtype = dtype

    def __call__(self, index: jax.Array) -> jax.Array:
        """Return the rows [..., width] at the integers `index` [...]."""
        return self.embedding[...][index].astype(self.dtype)


class RMSNorm(nnx.Module):
    """The norm x / rms(x) * scale over the last axis.

    It normalises in float32, rounds, and scales in the dtype of x.
    """

    def __init__(self, features: int, *, eps: float, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x [..., features], normalised and scaled, in its dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return normed.astype(x.dtype) * row(self.scale, x)


class LayerNorm(nnx.Module):
    """An affine LayerNorm over the last axis, in float32, rounded once to the dtype of x."""

    def __init__(self, features: int, *, eps: float, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x [..., features], standardised, scaled and shifted, in its dtype."""
        x32 = x.astype(jnp.float32)
        y = _standardise(x32, self.eps) * row(self.scale, x32) + row(self.bias, x32)
        return y.astype(x.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Return x [..., features] after a LayerNorm without parameters over the last axis.

    It computes in float32 with the biased variance, and rounds to the dtype of x.
    """
    return _standardise(x.astype(jnp.float32), eps).astype(x.dtype)


def _standardise(x32: jax.Array, eps: float) -> jax.Array:
    """Return x with mean 0 and variance 1 over the last axis."""
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


def row(vector: nnx.Param | jax.Array, x: jax.Array) -> jax.Array:
    """Return a vector with axes of size 1 before its own, as many as x has axes, in the dtype of x.

    Written out, as the tests allow no silent promotion of rank.
    """
    return jnp.expand_dims(vector[...].astype(x.dtype), tuple(range(x.ndim - 1)))
