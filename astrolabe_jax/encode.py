"""Stage encode: prompts -> text embeddings [G, S, E] (docs/models.md, Prompt embeddings).

A prompt is cleaned, tokenised to S ids with its end token, encoded by UMT5, and its rows beyond the
last token are zero. An embedding depends on nothing but its prompt, the tokenizer and the encoder.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from astrolabe_jax import sharding
from astrolabe_jax.convert.parts import Net
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import tokenize
from astrolabe_jax.types import Array, Embeddings

# Prompts of a call, or the next multiple of the devices: one shape, so one rounding.
_BATCH = 8


def encode_prompts(
    net: Net, tokenizer: Any, prompts: Sequence[str], mesh: sharding.AnyMesh
) -> Float[np.ndarray, "G S E"]:
    """Return the embeddings [G, S, E] float32 of G prompts, zero beyond each one's end token.

    The prompts of a call are split over all devices of the mesh; the parameters of the text encoder
    may be split over its `fsdp` axis, and are on the devices only meanwhile where they lie on the
    host.

    Raises:
      ValueError: for a prompt of more than S tokens (the published code truncates it silently).
    """
    ids, mask = tokenize(tokenizer, prompts, net.config.text_len)
    size = call_size(mesh)
    embeddings = [np.zeros((0, net.config.text_len, net.config.dim), np.float32)]
    with sharding.on_devices(net.params) as params:
        for start in range(0, len(ids), size):
            rows = np.arange(start, start + size)
            rows = np.where(rows < len(ids), rows, start)  # the last call is filled up
            batch = sharding.shard_batch(mesh, (ids[rows], mask[rows]))
            encoded = sharding.to_host(embed(net.graphdef, params, *batch))
            embeddings.append(encoded.astype(np.float32)[: len(ids) - start])
    return np.concatenate(embeddings)


def call_size(mesh: sharding.AnyMesh) -> int:
    """Return the number of prompts of one call of `embed`."""
    return -(-_BATCH // mesh.size) * mesh.size


@functools.partial(jax.jit, static_argnames="graphdef")
def embed(
    graphdef: Any, params: dict, ids: Int[Array, "B S"], mask: Shaped[Array, "B S"]
) -> Embeddings:
    """Return embeddings [B, S, E], in the encoder's dtype, of token ids and mask [B, S]."""
    return sharding.by_sample(layers.merge(graphdef, params).embed(ids, mask))
