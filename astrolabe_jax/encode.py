"""Stage encode: prompts -> text embeddings [G, S, E] (spec/vae_and_text.md B4, spec/checkpoints.md
4).

A prompt is cleaned, tokenised to S ids with its end token, encoded by UMT5, and its rows beyond the
last token are zero. An embedding depends on nothing but its prompt, the tokenizer and the encoder.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import tokenize
from astrolabe_jax.models.umt5 import UMT5Config

# prompts per call, or the next multiple of the devices; the last call is filled up: one shape, one
# rounding
_BATCH = 8


def encode_prompts(
    graphdef: Any,
    params: dict,
    tokenizer: Any,
    prompts: Sequence[str],
    config: UMT5Config,
    mesh: Mesh,
) -> np.ndarray:
    """Text embeddings [G, S, E] float32 of G prompts, zero beyond each prompt's end token; S is
    config.text_len.

    The prompts of a call are split over all devices of the mesh; `params` may be split over its
    `fsdp` axis. Raises ValueError for a prompt of more than S tokens (the published code truncates
    it silently).
    """
    ids, mask = tokenize(tokenizer, prompts, config.text_len)
    chunks, size = [], call_size(mesh)
    for start in range(0, len(ids), size):
        part = [array[start : start + size] for array in (ids, mask)]
        fill = size - len(part[0])
        part = [np.concatenate([array, np.repeat(array[:1], fill, axis=0)]) for array in part]
        encoded = embed(graphdef, params, *sharding.shard_batch(mesh, part), mesh=mesh)
        chunks.append(sharding.to_host(encoded).astype(np.float32)[: size - fill])
    return (
        np.concatenate(chunks) if chunks else np.zeros((0, config.text_len, config.dim), np.float32)
    )


def call_size(mesh: Mesh) -> int:
    """Prompts of one call of `embed`."""
    return -(-_BATCH // mesh.size) * mesh.size


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def embed(graphdef: Any, params: dict, ids: jax.Array, mask: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Token ids and mask [B, S] -> embeddings [B, S, E], in the encoder's dtype, samples split over
    all devices.
    """

    def of_samples(params, ids, mask):
        return sharding.by_sample(layers.merge(graphdef, params).embed(ids, mask))

    return sharding.on_mesh(mesh, of_samples)(params, ids, mask)
