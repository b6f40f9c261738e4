"""Stage 1: prompts -> text embeddings [G, S, E] (spec/vae_and_text.md B4, spec/checkpoints.md 4).

A prompt is cleaned, tokenised to S ids with its end token, encoded by UMT5, and its rows beyond the last token are
zero. An embedding depends on nothing but its prompt, the tokenizer and the encoder, so sets of prompts are kept on
disk under a hash of exactly these.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.convert.files import write_atomic
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import tokenize
from astrolabe_jax.models.umt5 import UMT5Config

_BATCH = 8  # prompts per call, or the next multiple of the devices; the last call is filled up: one shape, one rounding


def encode_prompts(
    graphdef: Any,
    params: dict,
    tokenizer: Any,
    prompts: Sequence[str],
    config: UMT5Config,
    mesh: Mesh,
    cache_dir: Path | str | None = None,
) -> np.ndarray:
    """Text embeddings [G, S, E] float32 of G prompts, zero beyond each prompt's end token; S is config.text_len.

    The prompts of a call are split over all devices of the mesh; `params` may be split over its `fsdp` axis. With
    `cache_dir` the result is read from, or written to, a file named after the content hash. Raises ValueError for a
    prompt of more than S tokens (the published code truncates it silently).
    """
    ids, mask = tokenize(tokenizer, prompts, config.text_len)
    path = None
    if cache_dir is not None:
        path = Path(cache_dir) / f"text_{_content_hash(config, params, ids, mask)}.npz"
        if path.exists():
            return _read_cache(path, mask)
    chunks, size = [], -(-_BATCH // mesh.size) * mesh.size
    for start in range(0, len(ids), size):
        part = [array[start : start + size] for array in (ids, mask)]
        fill = size - len(part[0])
        part = [np.concatenate([array, np.repeat(array[:1], fill, axis=0)]) for array in part]
        encoded = _encode(graphdef, params, *sharding.shard_batch(mesh, part), mesh=mesh)
        chunks.append(sharding.to_host(encoded).astype(np.float32)[: size - fill])
    embeddings = np.concatenate(chunks) if chunks else np.zeros((0, config.text_len, config.dim), np.float32)
    if path is not None:
        _write_cache(path, embeddings, mask)
    return embeddings


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _encode(graphdef, params, ids, mask, *, mesh):
    def embed(params, ids, mask):
        return sharding.by_sample(layers.merge(graphdef, params).embed(ids, mask))

    return sharding.on_mesh(mesh, embed)(params, ids, mask)


def _content_hash(config: UMT5Config, params: dict, ids: np.ndarray, mask: np.ndarray) -> str:
    """Hash of the tokens, the architecture and a sample of every weight: any retraining moves some of the sample."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(config), ids.shape]).encode())
    for array in (ids, mask):
        digest.update(array.tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(sharding.to_host(leaf.reshape(-1)[:: max(1, leaf.size // 4096)]).tobytes())
    return digest.hexdigest()[:32]


def _write_cache(path: Path, embeddings: np.ndarray, mask: np.ndarray) -> None:
    """Only the rows that are not zero, one prompt after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, rows=embeddings[mask == 1])
    write_atomic(path, buffer.getvalue())


def _read_cache(path: Path, mask: np.ndarray) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        rows = archive["rows"]
    embeddings = np.zeros((*mask.shape, rows.shape[-1]), np.float32)
    embeddings[mask == 1] = rows
    return embeddings
