"""Text to token ids, as the text encoder of Wan 2.1 takes them (docs/checkpoints.md, Tokenizer)."""

import html
import math
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np

from astrolabe_jax.runtime.files import stand_in

PAD_TOKEN = "<pad>"  # id 0
END_TOKEN = "</s>"  # id 1
UNKNOWN_TOKEN = "<unk>"  # id 2
# File of a tokenizer -> the library that reads it.
_LIBRARIES = {"tokenizer.json": "tokenizers", "spiece.model": "sentencepiece"}
_TRIAL_SECONDS = 60
_TRIAL_BYTES = 8 << 30
# A program that reads and uses the file of its argument, with so much memory at most.
_TRIAL = """
import resource, sys
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    if sys.argv[1].endswith(".json"):
        import tokenizers
        tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    else:
        import sentencepiece
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
    tokenizer.encode("a red circle, \\ufb01")
    tokenizer.encode("")
except BaseException as error:
    sys.exit((str(error).splitlines() or [type(error).__name__])[0][:200])
"""


def clean(text: str) -> str:
    """Return the text cleaned as the published tokenizer's mode `whitespace` does it.

    Case and punctuation stay. ftfy first repairs mis-decoded characters and straightens curly
    quotes, which changes token ids.
    """
    # a short cut for lists of millions, which all of this leaves as they are
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return " ".join(text.split())


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each prompt, cleaned, with its end token."""
    if not prompts:
        return []
    return tokenizer([clean(prompt) for prompt in prompts], add_special_tokens=True)["input_ids"]


def tokenize(
    tokenizer: Any, prompts: Sequence[str], text_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask) of G prompts, both [G, text_len] int32, padded on the right.

    The mask is 1 up to the end token and 0 beyond.

    Raises:
      ValueError: a prompt has more than `text_len` tokens; the message names every such prompt.
    """
    rows = token_ids(tokenizer, prompts)
    over_long = [
        f"prompt {i} has {len(row)}: {prompts[i][:60]!r}"
        for i, row in enumerate(rows)
        if len(row) > text_len
    ]
    if over_long:
        raise ValueError(
            f"over-long prompts, {text_len} tokens with the end token are the most; shorten "
            f"{'; '.join(over_long)}"
        )
    ids = np.full((len(rows), text_len), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), text_len), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def load_tokenizer(directory: Path | str) -> Any:
    """Read the tokenizer of a directory: its tokenizer.json or, failing that, its spiece.model.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: the file cannot be read, or its pad id is not 0 or its end id not 1.
    """
    files = [Path(directory) / name for name in _LIBRARIES]
    path = next((path for path in files if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{directory} holds neither {' nor '.join(_LIBRARIES)}")
    check_file(path)
    try:
        tokenizer = _read(path)
        empty_ids = tokenizer("", add_special_tokens=True)["input_ids"]
    except Exception as error:  # the tokenizers library has no class of its own
        if isinstance(error, MemoryError) or (_limit() < _TRIAL_BYTES and _is_shortage(str(error))):
            raise _short_of_memory(path) from None
        raise _unreadable(path, str(error)) from None
    if tokenizer.pad_token_id != 0 or empty_ids != [1]:
        raise ValueError(
            f"{path}: pad id {tokenizer.pad_token_id}, empty text {empty_ids[:8]}; expected pad id "
            "0 and [1] (the end token), as in UMT5"
        )
    return tokenizer


def check_file(path: Path) -> None:
    """Raise ValueError, in one line, for a tokenizer.json or spiece.model that cannot be read.

    A damaged file may make its library end the process, or take all memory: another process tries.
    Raises MemoryError where a limit of this process, `ulimit -v`, is too low for a file.
    """
    if what := stand_in(path):
        raise ValueError(f"{path} is {what}")
    limit = _limit()
    command = [sys.executable, "-c", _TRIAL, str(path), str(min(limit, _TRIAL_BYTES))]
    try:
        trial = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise _unreadable(path, f"it takes more than {_TRIAL_SECONDS} s") from None
    told = trial.stderr.strip().rpartition("\n")[2]
    if trial.returncode and limit < _TRIAL_BYTES and _is_shortage(told):
        raise _short_of_memory(path)
    if trial.returncode < 0:
        name = signal.Signals(-trial.returncode).name
        raise _unreadable(path, f"its library ends in {name}")
    if trial.returncode:
        raise _unreadable(path, told)


def _limit() -> float:
    """Return the bytes that this process may have, infinity where it is not limited."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _is_shortage(told: str) -> bool:
    """Return whether the words of a library are of too little memory."""
    return any(words in told.lower() for words in ("memory", "failed to map"))


def _short_of_memory(path: Path) -> MemoryError:
    limit = _limit()
    may = "" if limit == math.inf else f" in the {limit / 2**20:,.0f} MiB of ulimit -v"
    return MemoryError(f"{path} could not be read{may}")


def _unreadable(path: Path, reason: str) -> ValueError:
    """Return the error of a file that its library refuses."""
    library = _LIBRARIES["spiece.model" if path.suffix == ".model" else "tokenizer.json"]
    return ValueError(
        f"{path} cannot be read: {reason[:200]}; expected a whole {path.name} of the library "
        f"{library}: copy it again"
    )


def _read(path: Path) -> Any:
    """Read one file with the tokenizer class of its format.

    AutoTokenizer is not used: for UMT5 it refuses a bare spiece.model with a misleading message.
    """
    import transformers  # seconds to import, and only this function needs it

    special_tokens: dict[str, Any] = {
        "pad_token": PAD_TOKEN,
        "eos_token": END_TOKEN,
        "unk_token": UNKNOWN_TOKEN,
    }
    if path.suffix == ".json":
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **special_tokens)
    # Read from a directory of its own: added_tokens.json and more beside it would change ids.
    with tempfile.TemporaryDirectory() as alone:
        shutil.copy(path, alone)
        return transformers.T5Tokenizer.from_pretrained(alone, **special_tokens)
