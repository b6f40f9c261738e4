"""Low-rank adapters of the causal DiT: plain trees over one frozen base (spec/checkpoints.md 5).

An adapter is {name: {'a': [layers, in, R], 'b': [layers, R, out]}} for the ten linears of a block;
the layer computes y = x W + bias + scale (x a) b with scale = alpha / R. A policy is an adapter;
None is the base.
"""

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.wan.config import WanConfig

# Adapter name (the published module name) -> path of the Linear under params['blocks'].
TARGETS = {
    **{
        f"{attn}.{p}": (attn, p)
        for attn in ("self_attn", "cross_attn")
        for p in ("q", "k", "v", "o")
    },
    "ffn.0": ("ffn", "fc1"),
    "ffn.2": ("ffn", "fc2"),
}


def linear_sizes(config: WanConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each adapted linear."""
    sizes = dict.fromkeys(TARGETS, (config.dim, config.dim))
    return sizes | {"ffn.0": (config.dim, config.ffn_dim), "ffn.2": (config.ffn_dim, config.dim)}


def init_adapter(config: WanConfig, rank: int, key: jax.Array, dtype=jnp.float32) -> dict:
    """A fresh adapter: a uniform in +-1/sqrt(in), b zero, so that it starts as the base. dtype:
    float32 or bfloat16.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}; it must be at least 1")
    adapter = {}
    for i, (name, (n_in, n_out)) in enumerate(linear_sizes(config).items()):
        bound = n_in**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, i), (config.num_layers, n_in, rank), minval=-bound, maxval=bound
        )
        adapter[name] = {
            "a": a.astype(dtype),
            "b": jnp.zeros((config.num_layers, rank, n_out), dtype),
        }
    return adapter


def adapter_shapes(config: WanConfig, rank: int, dtype=jnp.float32) -> dict:
    """The adapter's tree with ShapeDtypeStructs as leaves; nothing is allocated."""
    return jax.eval_shape(lambda: init_adapter(config, rank, jax.random.key(0), dtype))


def parameter_count(tree) -> int:
    """Number of scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def scaled(adapter: dict | None, scale) -> dict | None:
    """The adapter with scale = alpha / R folded into b, in float32: the form the layers take. None
    stays None.
    """
    if adapter is None:
        return None
    return {
        name: {"a": pair["a"], "b": pair["b"].astype(jnp.float32) * scale}
        for name, pair in adapter.items()
    }


def merge_adapter(params: dict, adapter: dict, scale: float = 1.0) -> dict:
    """Params with W + scale a b in place of each adapted kernel: product and sum in float32,
    rounded once.

    Raises ValueError when the adapter's names or shapes are not those of `params`.
    """
    unknown, missing = sorted(set(adapter) - set(TARGETS)), sorted(set(TARGETS) - set(adapter))
    if unknown or missing:
        raise ValueError(
            f"adapter does not fit: unknown modules {unknown}, missing modules {missing}"
        )
    blocks = jax.tree.map(lambda leaf: leaf, params["blocks"])  # new dicts, same arrays
    for name, (part, linear) in TARGETS.items():
        kernel, a, b = blocks[part][linear]["kernel"], adapter[name]["a"], adapter[name]["b"]
        if (a.shape[0], a.shape[1], b.shape[2]) != kernel.shape or a.shape[2] != b.shape[1]:
            raise ValueError(
                f"adapter module {name}: a {a.shape} and b {b.shape} do not fit the kernel "
                f"{kernel.shape}"
            )
        # One layer at a time: the float32 products of all layers of a 14B model would take 11 GB.
        blocks[part][linear]["kernel"] = jax.lax.map(
            lambda layer: _merged(*layer, scale), (kernel, a, b)
        )
    return params | {"blocks": blocks}


def _merged(kernel, a, b, scale):
    """One layer's kernel [in, out] with a [in, R] and b [R, out] merged in."""
    delta = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
