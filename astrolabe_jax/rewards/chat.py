"""What language-model rewards are asked: the chat string of Qwen2-VL as token ids (spec/rewards.md
3.3, 4.2, 6).

A turn of the user holds the pictures, as one placeholder for each of their tokens, and the template
with the prompt in it. The template ends its questions with tokens of its own, at which the scores
are read.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

TOKENIZER, TEMPLATE = "tokenizer.json", "template.txt"  # files of a reward directory
PLACE = "{text_prompt}"  # of the prompt in a template
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
_BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
_BETWEEN, _AFTER = "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
_PADDING = "<|endoftext|>"
_SPECIAL = re.compile(r"<\|\w+\|>")  # how all tokens that are no text are written
_BUCKET = 64  # lengths are rounded up to multiples, so that few are compiled


class Chat(NamedTuple):
    """What `load` made of the files of a reward directory."""

    tokenizer: tokenizers.Tokenizer
    template: str
    placeholder: str  # IMAGE or VIDEO
    rewards: tuple[int, ...]  # ids of the tokens at which scores are read, in their order


class Question(NamedTuple):
    """A prompt as the net takes it."""

    ids: np.ndarray  # [L] int32, padded on the right; L is a multiple of 64
    where: np.ndarray  # [n] int32, places of the reward tokens


def check(prompt: str) -> None:
    """ValueError for a prompt that holds one of the strings that stand for special tokens."""
    if found := _SPECIAL.search(prompt):
        raise ValueError(
            f"the prompt holds {found[0]!r}, which stands for a special token and would change the "
            f"question: take it out of {prompt[:60]!r}"
        )


def read_tokenizer(path: Path, tokens: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A tokenizer from a tokenizer.json of Qwen2-VL, with `tokens` added that it does not have yet.

    Raises ValueError naming the file if it cannot be read, has not all special tokens of the chat,
    or has one that is not written <|NAME|>; or FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; expected the {TOKENIZER} of Qwen2-VL")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own
        raise ValueError(
            f"{path} cannot be read: {error}; expected a whole {TOKENIZER}: copy it again"
        ) from None
    tokenizer.no_padding()  # what a training left in the file
    tokenizer.no_truncation()
    needed = dict.fromkeys(_SPECIAL.findall(_BEFORE + _BETWEEN + _AFTER) + [IMAGE, VIDEO, _PADDING])
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if missing := [token for token in needed if token not in added]:
        raise ValueError(
            f"{path} has no special token {', '.join(missing)}; expected the tokenizer of Qwen2-VL"
        )
    if odd := [token for token in sorted(added) if not _SPECIAL.fullmatch(token)]:
        raise ValueError(
            f"{path} has the added tokens {', '.join(odd)}; expected only such as <|NAME|>"
        )
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def ids_of(
    tokenizer: tokenizers.Tokenizer, tokens: Sequence[str], rows: int, path: Path
) -> tuple[int, ...]:
    """The ids of reward tokens; ValueError naming the file unless they are the last ones of `rows`
    embeddings.
    """
    found, expected = (
        tuple(map(tokenizer.token_to_id, tokens)),
        tuple(range(rows - len(tokens), rows)),
    )
    if found != expected:
        raise ValueError(
            f"{path} gives {', '.join(tokens)} the ids {', '.join(map(str, found))}; expected "
            f"{', '.join(map(str, expected))}, the last embeddings of the weights: take the "
            "tokenizer of these"
        )
    return found


def check_template(template: str, tokens: Sequence[str], path: Path) -> None:
    """ValueError naming the file unless the prompt has one place in it, and the tokens, in order,
    are its only ones.
    """
    found = _SPECIAL.findall(template)
    if template.count(PLACE) != 1 or found != list(tokens):
        raise ValueError(
            f"{path} has {template.count(PLACE)} places {PLACE} and the tokens "
            f"{', '.join(found) or 'none'}; expected one place and {', '.join(tokens)}, in this "
            "order"
        )


def load(directory: Path, tokens: Sequence[str], placeholder: str, rows: int) -> Chat:
    """The tokenizer and the template of a reward directory, whose net has `rows` embeddings.

    tokens: the reward's own. Raises ValueError naming the file that does not fit, or
    FileNotFoundError.
    """
    path = directory / TOKENIZER
    tokenizer = read_tokenizer(path)
    rewards = ids_of(tokenizer, tokens, rows, path)
    template = (directory / TEMPLATE).read_bytes().decode()  # read_text would change line endings
    check_template(template, tokens, directory / TEMPLATE)
    return Chat(tokenizer, template, placeholder, rewards)


def ask(chat: Chat, prompt: str, grid: tuple[int, int, int]) -> Question:
    """The question about pictures of a grid (images.grid_of) that a prompt makes.

    Raises ValueError for a prompt with special tokens.
    """
    check(prompt)
    pictures = chat.placeholder * (grid[0] * grid[1] * grid[2] // 4)
    text = _BEFORE + pictures + _BETWEEN + chat.template.replace(PLACE, prompt) + _AFTER
    ids = np.array(chat.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    where = np.flatnonzero(np.isin(ids, chat.rewards)).astype(np.int32)
    padding = np.full(-len(ids) % _BUCKET, chat.tokenizer.token_to_id(_PADDING), np.int32)
    return Question(np.concatenate([ids, padding]), where)


def tokens_of(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The fields of Qwen2VLConfig that a tokenizer tells: the ids of the placeholders."""
    return {
        "image_token": tokenizer.token_to_id(IMAGE),
        "video_token": tokenizer.token_to_id(VIDEO),
    }
