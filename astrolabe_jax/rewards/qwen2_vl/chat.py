"""What language-model rewards are asked: the chat string of Qwen2-VL as token ids.

A turn of the user holds the pictures, as one placeholder for each of their tokens, and the template
with the prompt in it. The template ends its questions with tokens of its own, at which the scores
are read. See docs/rewards.md, Templates.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from astrolabe_jax.models.tokenizer import check_file

TOKENIZER = "tokenizer.json"  # files of a reward directory
TEMPLATE = "template.txt"
PLACE = "{text_prompt}"  # of the prompt in a template
IMAGE = "<|image_pad|>"
VIDEO = "<|video_pad|>"
# The tokens at which the scores are read.
HPSV3_TOKENS = ("<|Reward|>",)
VIDEOALIGN_ASPECTS = ("VQ", "MQ", "TA")
# Facts of its reward directory: what its scores are z-scores of.
VIDEOALIGN_SCALES = [
    f"{aspect}_{scale}" for aspect in VIDEOALIGN_ASPECTS for scale in ("mean", "std")
]
VIDEOALIGN_TOKENS = tuple(f"<|{aspect}_reward|>" for aspect in VIDEOALIGN_ASPECTS)
_BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
_BETWEEN = "<|vision_end|>"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_PADDING = "<|endoftext|>"
_SPECIAL = re.compile(r"<\|\w+\|>")  # how all tokens that are no text are written
_BUCKET = 64  # lengths are rounded up to multiples, so that few are compiled


class Chat(NamedTuple):
    """What `load` makes of the files of a reward directory."""

    tokenizer: tokenizers.Tokenizer
    template: str
    placeholder: str  # IMAGE or VIDEO
    rewards: tuple[int, ...]  # ids of the tokens at which scores are read, in their order


class Question(NamedTuple):
    """A prompt as the net takes it."""

    ids: np.ndarray  # [L] int32, padded on the right; L is a multiple of 64
    where: np.ndarray  # [n] int32, places of the reward tokens


def check_prompt(prompt: str) -> None:
    """Raise ValueError for a prompt that holds a string which stands for a special token."""
    if found := _SPECIAL.search(prompt):
        raise ValueError(
            f"the prompt holds {found[0]!r}, which stands for a special token and would change the "
            f"question: take it out of {prompt[:60]!r}"
        )


def read_tokenizer(path: Path, tokens: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json of Qwen2-VL.

    Args:
      path: the file.
      tokens: special tokens that are added where it does not have them yet.

    Raises:
      ValueError: naming the file, if it cannot be read, has not all special tokens of the chat, or
        has one that is not written <|NAME|>.
      FileNotFoundError: if it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; expected the {TOKENIZER} of Qwen2-VL")
    check_file(path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()  # what a training left in the file
    tokenizer.no_truncation()
    needed = dict.fromkeys(_SPECIAL.findall(_BEFORE + _BETWEEN + _AFTER + IMAGE + VIDEO + _PADDING))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if missing := [token for token in needed if token not in special]:
        raise ValueError(
            f"{path} has no special token {', '.join(missing)}; expected the tokenizer of Qwen2-VL"
        )
    if odd := [token for token in sorted(special) if not _SPECIAL.fullmatch(token)]:
        raise ValueError(
            f"{path} has the added tokens {', '.join(odd)}; expected only such as <|NAME|>"
        )
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def ids_of(
    tokenizer: tokenizers.Tokenizer, tokens: Sequence[str], rows: int, path: Path
) -> tuple[int, ...]:
    """Return the ids of reward tokens.

    Args:
      tokenizer: of the file `path`.
      tokens: the reward's own.
      rows: embeddings of the net.
      path: named in the error.

    Raises:
      ValueError: unless the ids are the last ones of the embeddings.
    """
    ids = tuple(map(tokenizer.token_to_id, tokens))
    expected = tuple(range(rows - len(tokens), rows))
    if ids != expected:
        raise ValueError(
            f"{path} gives {', '.join(tokens)} the ids {', '.join(map(str, ids))}; expected "
            f"{', '.join(map(str, expected))}, the last embeddings of the weights: take the "
            "tokenizer of these"
        )
    return expected


def check_template(template: str, tokens: Sequence[str], path: Path) -> None:
    """Check that a template has one place for the prompt, and these tokens alone, in order.

    Raises ValueError naming the file `path`.
    """
    special = _SPECIAL.findall(template)
    places = template.count(PLACE)
    if places != 1 or special != list(tokens):
        raise ValueError(
            f"{path} has {places} places {PLACE} and the tokens {', '.join(special) or 'none'}; "
            f"expected one place and {', '.join(tokens)}, in this order"
        )


def load(directory: Path, tokens: Sequence[str], placeholder: str, rows: int) -> Chat:
    """Return the tokenizer and the template of a reward directory.

    Args:
      directory: the reward directory.
      tokens: the reward's own.
      placeholder: IMAGE or VIDEO.
      rows: embeddings of the net.

    Raises:
      ValueError: naming the file that does not fit.
      FileNotFoundError: for a file that is not there.
    """
    path = directory / TOKENIZER
    tokenizer = read_tokenizer(path)
    rewards = ids_of(tokenizer, tokens, rows, path)
    template = (directory / TEMPLATE).read_bytes().decode()  # read_text would change line endings
    check_template(template, tokens, directory / TEMPLATE)
    return Chat(tokenizer, template, placeholder, rewards)


def ask(chat: Chat, prompt: str, grid: tuple[int, int, int]) -> Question:
    """Return the question that a prompt makes about pictures of a grid (patches.grid_of).

    Raises ValueError for a prompt with special tokens.
    """
    check_prompt(prompt)
    pictures = chat.placeholder * (grid[0] * grid[1] * grid[2] // 4)
    text = _BEFORE + pictures + _BETWEEN + chat.template.replace(PLACE, prompt) + _AFTER
    ids = np.array(chat.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    where = np.flatnonzero(np.isin(ids, chat.rewards)).astype(np.int32)
    padding = np.full(-len(ids) % _BUCKET, chat.tokenizer.token_to_id(_PADDING), np.int32)
    return Question(np.concatenate([ids, padding]), where)
