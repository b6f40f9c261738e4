"""Stage 1: prompts -> text embeddings [G, S, E] (spec/vae_and_text.md B4, spec/checkpoints.md 4).

A prompt is cleaned, tokenised to S ids with its end token, encoded by UMT5, and its rows beyond the last token are
zero. An embedding depends on nothing but its prompt, the tokenizer and the encoder, so sets of prompts are kept on
disk under a hash of exactly these.
"""

import dataclasses
import functools
import hashlib
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from astrolabe_jax.convert.files import write_atomic
from astrolabe_jax.models import layers
from astrolabe_jax.models.umt5 import UMT5Config

try:
    import ftfy
except ImportError:
    ftfy = None

PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2
_BATCH = 8  # prompts per call; the last call is filled up, so that one shape is compiled and one rounding exists


def encode_prompts(
    graphdef: Any,
    params: dict,
    tokenizer: Any,
    prompts: Sequence[str],
    config: UMT5Config,
    cache_dir: Path | str | None = None,
) -> np.ndarray:
    """Text embeddings [G, S, E] float32 of G prompts, zero beyond each prompt's end token; S is config.text_len.

    With `cache_dir` the result is read from, or written to, a file named after the content hash. Raises ValueError
    for a prompt of more than S tokens (the published code truncates it silently).
    """
    ids, mask = tokenize(tokenizer, prompts, config.text_len)
    path = None
    if cache_dir is not None:
        path = Path(cache_dir) / f"text_{_content_hash(config, params, ids, mask)}.npz"
        if path.exists():
            return _read_cache(path, mask)
    chunks = []
    for start in range(0, len(ids), _BATCH):
        part = [array[start : start + _BATCH] for array in (ids, mask)]
        fill = _BATCH - len(part[0])
        part = [np.concatenate([array, np.repeat(array[:1], fill, axis=0)]) for array in part]
        chunks.append(np.asarray(_encode(graphdef, params, *part), np.float32)[: _BATCH - fill])
    embeddings = np.concatenate(chunks) if chunks else np.zeros((0, config.text_len, config.dim), np.float32)
    if path is not None:
        _write_cache(path, embeddings, mask)
    return embeddings


def clean(text: str) -> str:
    """The cleaning mode `whitespace` of the published tokenizer: case and punctuation stay.

    ftfy repairs mis-decoded characters and straightens curly quotes first; it changes token ids, and where it is not
    installed such prompts get ids that differ from the published ones. Plain text is unaffected.
    """
    if ftfy is not None:
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


def tokenize(tokenizer: Any, prompts: Sequence[str], text_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cleaned prompts -> (ids, mask), both [G, text_len] int32: padded on the right, mask 1 up to the end token.

    Raises ValueError naming every prompt that does not fit.
    """
    rows = [tokenizer(clean(prompt), add_special_tokens=True)["input_ids"] for prompt in prompts]
    sizes = [(i, len(row)) for i, row in enumerate(rows) if len(row) > text_len]
    if sizes:
        culprits = "; ".join(f"prompt {i} has {size}: {prompts[i][:60]!r}" for i, size in sizes)
        raise ValueError(f"over-long prompts, {text_len} tokens with the end token are the most; shorten {culprits}")
    ids = np.full((len(rows), text_len), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), text_len), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def load_tokenizer(directory: Path | str) -> Any:
    """The tokenizer of a directory that holds tokenizer.json or, failing that, spiece.model; pad id 0, end id 1.

    AutoTokenizer is not used: for UMT5 it refuses a bare spiece.model with a misleading message.
    """
    import transformers  # seconds to import, and only this function needs it

    directory = Path(directory)
    special = {"pad_token": PAD_TOKEN, "eos_token": END_TOKEN, "unk_token": UNKNOWN_TOKEN}
    if (directory / "tokenizer.json").exists():
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **special)
    elif (directory / "spiece.model").exists():
        tokenizer = transformers.T5Tokenizer.from_pretrained(str(directory), **special)
    else:
        raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor spiece.model")
    ending = tokenizer("", add_special_tokens=True)["input_ids"]
    if tokenizer.pad_token_id != 0 or ending != [1]:
        found = f"pad id {tokenizer.pad_token_id}, empty text {ending}"
        raise ValueError(f"{directory}: {found}; expected pad id 0 and [1] (the end token), as in UMT5")
    return tokenizer


def word_tokenizer(words: Sequence[str]) -> str:
    """tokenizer.json of a closed vocabulary: one id per word, from 3 on in the given order; <pad> 0, </s> 1, <unk> 2.

    Words are split at white space and punctuation, and </s> ends every text, as in UMT5; so worlds with a small
    vocabulary use the same code path as the published tokenizer.
    """
    vocabulary = [PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN, *words]
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError(f"words occur twice: {sorted({word for word in vocabulary if vocabulary.count(word) > 1})}")
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END_TOKEN}", special_tokens=[(END_TOKEN, ids[END_TOKEN])]
    )
    tokenizer.add_special_tokens([PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN])
    return tokenizer.to_str(pretty=True)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, ids, mask):
    return layers.merge(graphdef, params).embed(ids, mask)


def _content_hash(config: UMT5Config, params: dict, ids: np.ndarray, mask: np.ndarray) -> str:
    """Hash of the tokens, the architecture and a sample of every weight: any retraining moves some of the sample."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(config), ids.shape]).encode())
    for array in (ids, mask):
        digest.update(array.tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(leaf.reshape(-1)[:: max(1, leaf.size // 4096)]).tobytes())
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
