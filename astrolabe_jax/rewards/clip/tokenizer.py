"""Text to token ids as CLIP takes them: lower case, byte-level BPE, a start and an end token."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from astrolabe_jax.models.tokenizer import check_file, clean

FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # the first alone, or the other two
# of OpenAI, of OpenCLIP
_SPECIAL = re.compile(r"<\|(start|end)oftext\|>|<(start|end)_of_text>", re.IGNORECASE)


def check_prompt(prompt: str) -> None:
    """Raise ValueError for a prompt that spells a start or end token: the text would end there."""
    if found := _SPECIAL.search(prompt):
        raise ValueError(f"the prompt holds {found[0]!r}, a special token of CLIP; take it out")


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a file tokenizer.json, or of a folder.

    The folder holds tokenizer.json or, failing that, vocab.json and merges.txt.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: naming the file that is not CLIP's.
    """
    files = files_of(path)
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"no {missing[0]}; expected tokenizer.json, or vocab.json and merges.txt, of CLIP"
        )
    if len(files) == 1:
        check_file(files[0])
    try:
        tokenizer = _read(files)
        empty = tokenizer.encode("").ids
    except Exception as error:  # the tokenizers library has no class of its own
        raise ValueError(
            f"{' and '.join(map(str, files))} cannot be read: {error}; copy them again"
        ) from None
    largest = max(tokenizer.get_vocab().values())
    if len(empty) != 2 or empty[1] != largest or empty[0] == largest:
        raise ValueError(
            f"{files[0]} makes {empty} of an empty text; expected a start token and an end token, "
            f"whose id {largest} is the largest, as in CLIP"
        )
    return tokenizer


def files_of(path: Path) -> list[Path]:
    """Return the files that `load_tokenizer` reads, whether they are there or not."""
    if path.is_file():
        return [path]
    whole, *parts = (path / name for name in FILES)
    return [whole] if whole.is_file() else parts


def token_ids(tokenizer: tokenizers.Tokenizer, prompts: Sequence[str], text_len: int) -> np.ndarray:
    """Return ids [B, text_len] int32, zeros behind the end token, as OpenCLIP gives them.

    Longer prompts are cut, and end with the end token all the same. White space, quotation marks
    and mis-decoded characters are put right first. Raises ValueError for a prompt that
    `check_prompt` refuses.
    """
    ids = np.zeros((len(prompts), text_len), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        check_prompt(prompt)
        tokens = tokenizer.encode(clean(prompt)).ids
        if len(tokens) > text_len:
            tokens = [*tokens[: text_len - 1], tokens[-1]]
        row[: len(tokens)] = tokens
    return ids


def _read(files: Sequence[Path]) -> tokenizers.Tokenizer:
    if len(files) == 1:
        tokenizer = tokenizers.Tokenizer.from_file(str(files[0]))
    else:
        # seconds to import, and only this branch needs it
        from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

        vocabulary, merges = map(str, files)
        tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=merges).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
