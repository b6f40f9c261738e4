"""Low-rank adapters of the causal DiT: plain trees over one frozen base.

An adapter is {name: {'a': [layers, in, R], 'b': [layers, R, out]}} for the ten linears of a block.
A layer computes y = x W + bias + scale (x a) b with scale = alpha / R. A policy is an adapter; None
is the base. How adapters are stored: docs/checkpoints.md, LoRA layers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.wan.config import WanConfig

# Adapter name (the published module name) -> path of the Linear under params['blocks'].
TARGETS = {
    "self_attn.q": ("self_attn", "q"),
    "self_attn.k": ("self_attn", "k"),
    "self_attn.v": ("self_attn", "v"),
    "self_attn.o": ("self_attn", "o"),
    "cross_attn.q": ("cross_attn", "q"),
    "cross_attn.k": ("cross_attn", "k"),
    "cross_attn.v": ("cross_attn", "v"),
    "cross_attn.o": ("cross_attn", "o"),
    "ffn.0": ("ffn", "fc1"),
    "ffn.2": ("ffn", "fc2"),
}


def linear_sizes(config: WanConfig) -> dict[str, tuple[int, int]]:
    """Return the (in, out) features of each adapted linear, by adapter name."""
    return dict.fromkeys(TARGETS, (config.dim, config.dim)) | {
        "ffn.0": (config.dim, config.ffn_dim),
        "ffn.2": (config.ffn_dim, config.dim),
    }


def init_adapter(config: WanConfig, rank: int, key: jax.Array, dtype=jnp.float32) -> dict:
    """Return a fresh adapter, which computes what the base does: a is uniform in +-1/sqrt(in), b is
    zero.

    Args:
      config: sizes of the base.
      rank: R, at least 1.
      key: what `a` is drawn with.
      dtype: float32 or bfloat16.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}; it must be at least 1")
    adapter = {}
    for i, (name, (n_in, n_out)) in enumerate(linear_sizes(config).items()):
        bound = n_in**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, i),
            (config.num_layers, n_in, rank),
            minval=-bound,
            maxval=bound,
        )
        adapter[name] = {
            "a": a.astype(dtype),
            "b": jnp.zeros((config.num_layers, rank, n_out), dtype),
        }
    return adapter


def adapter_shapes(config: WanConfig, rank: int, dtype=jnp.float32) -> dict:
    """Return the tree of `init_adapter` with ShapeDtypeStructs as leaves; nothing is allocated."""
    return jax.eval_shape(lambda: init_adapter(config, rank, jax.random.key(0), dtype))


def parameter_count(tree) -> int:
    """Return the number of scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def scaled(adapter: dict | None, scale) -> dict | None:
    """Return the adapter in the form that layers take: scale = alpha / R folded into b, in float32.

    None, the base, stays None.
    """
    if adapter is None:
        return None
    return {
        name: {
            "a": pair["a"],
            "b": pair["b"].astype(jnp.float32) * scale,
        }
        for name, pair in adapter.items()
    }
