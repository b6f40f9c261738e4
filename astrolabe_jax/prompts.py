"""Stage prompts: lists of prompts, and which videos an epoch asks for.

`load` reads a list for training, evaluation and sampling alike (docs/sampling.md, Prompt files).
Everything is derived from (seed, epoch), so a resumed run draws what the uninterrupted one draws,
and no position in the list has to be stored.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from astrolabe_jax.models.tokenizer import token_ids
from astrolabe_jax.runtime.files import local_directory, parse_json, stand_in
from astrolabe_jax.runtime.progress import warn
from astrolabe_jax.types import PromptBatch, RngStream
from astrolabe_jax.worlds import WORLDS, World

WORLD_PREFIX = "world:"
_AT_ONCE = 10_000  # prompts that are cut into tokens together
LOOKED_UP = 2000  # prompts of a list, spread over it, whose words are looked up
_COLUMNS = {"prompt", "prompts", "caption", "captions"}  # of a table of prompts


def load(source: str, switch_frames: Sequence[int] = ()) -> tuple[str, ...]:
    r"""Return the prompts of a file or of `world:NAME/SPLIT`, in order, as they are written.

    A file is UTF-8: one prompt a line, or, named .jsonl, one JSON object a line; lines end in \n,
    \r\n or \r. Of an object that has a `prompt` that comes back, of one that has `prompts` the
    object itself, with its switch frames (streaming/scenes.py reads it).

    Args:
      source: the file or the list of a world.
      switch_frames: latent frames at which `prompts` change, where a line has none.

    Raises:
      ValueError, OSError: naming the file and the line at fault.
    """
    if world := world_of(source):
        return tuple(world.prompts(source.partition("/")[2]))
    lines = [line.strip() for line in _lines(local_directory(source))]
    if not all(lines):
        raise ValueError(
            f"{place(source, lines.index('') + 1)} is empty; write a prompt there or delete the "
            "line"
        )
    if not source.endswith(".jsonl"):
        return tuple(lines)
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(_from_json(line, switch_frames))
            prompts[-1].encode()  # JSON can hold half a character
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(
                f"{place(source, number)}: {half} is half of a character; write it whole"
            ) from None
        except ValueError as error:
            raise ValueError(f"{place(source, number)}: {error}") from None
    return tuple(prompts)


def check(
    source: str,
    prompts: Sequence[str],
    texts_of: Callable[[str], Sequence[str]],
    tokenizer: Any,
    limit: int,
    judge: Callable[[str], None],
) -> None:
    """Refuse prompts that cannot be encoded or scored, and warn of those that may be mistakes.

    A text of a list that is too short to have `limit` tokens is not cut into tokens, unless its
    words are looked up; equal prompts and unknown words are warned of.

    Args:
      source: where the prompts are from: a file, the list of a world, or a --flag.
      texts_of: gives the texts of the scenes of a prompt; ValueError for one that has none.
      tokenizer: of the text encoder.
      limit: tokens that a text may have.
      judge: raises ValueError for a text whose videos the rewards cannot score.

    Raises:
      ValueError: naming the line at fault.
    """
    step = len(prompts) // LOOKED_UP + 1
    looked_up = 0
    unknown = []
    for first in range(0, len(prompts), _AT_ONCE):
        texts: list[tuple[int, str]] = []
        number = first
        try:
            for number, prompt in enumerate(prompts[first : first + _AT_ONCE], start=first + 1):
                texts += [(number, text) for text in texts_of(prompt)]
            chosen = [pair for pair in texts if not pair[0] % step or _may_be_long(pair[1], limit)]
            rows = token_ids(tokenizer, [text for _, text in chosen])
            looked_up += len(rows)
            for (number, text), ids in zip(chosen, rows, strict=True):
                if len(ids) > limit:
                    raise ValueError(
                        f"{text[:60]!r}... has {len(ids)} tokens, the text encoder takes {limit} "
                        "with the end token; shorten it"
                    )
                if 2 * ids.count(tokenizer.unk_token_id) > len(ids) - 1:
                    unknown.append((number, text))
            for pair in texts:
                number = pair[0]
                judge(pair[1])
        except ValueError as error:
            raise ValueError(f"{place(source, number)}: {error}") from None
    if unknown:
        number, text = unknown[0]
        warn(
            f"{place(source, number)}: the tokenizer of this base does not know most "
            f"words of {text[:60]!r}; so it is with {len(unknown)} of {looked_up} texts looked at"
        )
    if len(set(prompts)) < len(prompts):
        _warn_of_equal(source, prompts)


def place(source: str, number: int) -> str:
    """Return the name of a prompt in messages: its file and line, or its flag."""
    return source if source.startswith("--") else f"{source}, line {number}"


def _may_be_long(text: str, limit: int) -> bool:
    """Return whether a text may have more than `limit` tokens.

    A token has a character at least, beside the end token and a mark where a text begins. Only
    outside of ASCII, and where entities of HTML are, may cleaning make a text longer.
    """
    return len(text) + 2 > limit or not text.isascii() or "&" in text


def _warn_of_equal(source: str, prompts: Sequence[str]) -> None:
    first: dict[str, int] = {}
    equal = [
        (number, prompt)
        for number, prompt in enumerate(prompts, start=1)
        if first.setdefault(prompt, number) != number
    ]
    number, prompt = equal[0]
    warn(
        f"{source}: {len(equal)} of {len(prompts)} prompts stand there more than once, "
        f"line {number} that of line {first[prompt]}: {prompt[:60]!r}"
    )


def _from_json(line: str, switch_frames: Sequence[int]) -> str:
    """Return the prompt of a line of a .jsonl, see `load`; ValueError if it has none."""
    try:
        content = parse_json(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    known = isinstance(content, dict)
    prompt = content.get("prompt", "") if known else None
    texts = content.get("prompts") if known else None
    others = [name for name in content if "switch" in name] if known else []
    if texts is None and isinstance(prompt, str) and prompt.strip():
        return prompt.strip()
    if not isinstance(texts, list) or prompt or others not in ([], ["switch_frames"]):
        raise ValueError(
            'expected {"prompt": "..."} or {"prompts": ["...", ...], "switch_frames": [40, ...]}'
        )
    switches = content.get("switch_frames", list(switch_frames[: len(texts) - 1]))
    return json.dumps({"prompts": texts, "switch_frames": switches}, ensure_ascii=False)


def world_of(source: str) -> World | None:
    """Return the world of a prompt list `world:NAME/SPLIT`, or None for a text file.

    Raises ValueError for an unknown name.
    """
    if not source.startswith(WORLD_PREFIX):
        return None
    name = source.removeprefix(WORLD_PREFIX).partition("/")[0]
    if name not in WORLDS:
        raise ValueError(
            f"unknown world in {source!r}; expected {WORLD_PREFIX}NAME/SPLIT, NAME one of "
            f"{', '.join(WORLDS)}"
        )
    return WORLDS[name]


def draw(
    prompts: Sequence[str],
    seed: int,
    epoch: int,
    prompts_per_epoch: int,
    samples_per_prompt: int,
    repeated: int,
) -> PromptBatch:
    """Return the prompts_per_epoch x samples_per_prompt videos of an epoch.

    Prompts are taken without replacement: the list is gone through in a random order, and then
    again in another one, across epochs; no epoch has a prompt twice. `repeated` > 1 is the
    published behaviour (docs/published.md, Objective): each run of `repeated` sampling batches asks
    for the same prompts, so that the epoch has prompts_per_epoch / repeated prompts with repeated x
    samples_per_prompt videos each.
    """
    if prompts_per_epoch % repeated:
        raise ValueError(
            f"{prompts_per_epoch} groups cannot be drawn {repeated} times each; give a divisor of "
            f"{prompts_per_epoch}"
        )
    distinct = prompts_per_epoch // repeated
    size = len(prompts)
    if distinct > size:
        raise ValueError(f"{distinct} distinct prompts asked for in an epoch, the list has {size}")
    turn, start = divmod(epoch * distinct, size)
    order = _order(size, seed, turn, distinct)
    if start + distinct > size:
        order = np.concatenate([order, _order(size, seed, turn + 1, distinct)])
    videos = repeated * samples_per_prompt
    return _batch(
        prompts,
        np.repeat(order[start : start + distinct], videos),
        np.tile(np.arange(videos), distinct),
    )


def held_out(prompts: Sequence[str], seed: int, videos: int) -> PromptBatch:
    """Return the videos of every evaluation of a run.

    They are all prompts once in a random order, then their second samples, and so on.
    """
    sample, place = np.divmod(np.arange(videos), len(prompts))
    return _batch(prompts, _permutation(len(prompts), seed, RngStream.HELD_OUT, 0)[place], sample)


def sample_keys(batch: PromptBatch, seed: int, stream: RngStream, epoch: int) -> jax.Array:
    """Return one key [B] per video, from (seed, stream, epoch, prompt, sample of the prompt)."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    key = jax.random.fold_in(key, epoch)
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
    return jax.vmap(jax.random.fold_in)(prompt_keys, batch.candidate)


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file; raise ValueError or OSError, naming it."""
    if not path.is_file():
        fault = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"prompt file {path} {fault}; give a text file or {WORLD_PREFIX}NAME/SPLIT"
        )
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"prompt file {path} is empty; write one prompt a line")
    if what := stand_in(path):
        raise ValueError(f"prompt file {path} is {what}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r*\n|\r", content[: error.start])) + 1
        raise ValueError(
            f"prompt file {path} is not UTF-8: byte {error.start} (line {line}) is "
            f"{content[error.start]:#04x}; save the file as UTF-8"
        ) from None
    if "\r" in text:
        text = re.sub("\r*\n|\r", "\n", text)
    if fault := _fault_of_form(text, path):
        raise ValueError(f"prompt file {path} {fault}")
    # Not splitlines: it also splits at characters that may stand inside a prompt, and line numbers
    # would be off.
    return text.removeprefix("\ufeff").removesuffix("\n").split("\n")


def _fault_of_form(text: str, path: Path) -> str:
    """Return what a text is that is no list of prompts, with the next step; else nothing."""
    head = text.removeprefix("\ufeff").lstrip()[:1_000_000].partition("\n")[0].strip()
    if path.suffix == ".jsonl":
        return ""
    columns = [column.strip('" \r').lower() for column in re.split(r"[,;\t]", head)]
    if path.suffix in (".csv", ".tsv") or not _COLUMNS.isdisjoint(columns):
        return (
            f"is a table, {head[:60]!r} first; write its column of prompts to a file of "
            "its own, one prompt a line, without the head"
        )
    try:
        is_json = head in ("{", "[") or isinstance(parse_json(head), dict | list)
    except ValueError:
        is_json = False
    if is_json:
        return (
            f"holds JSON, {head[:60]!r} first; write one object a line, "
            '{"prompt": "..."}, to a file whose name ends in .jsonl'
        )
    return ""


def _order(size: int, seed: int, turn: int, distinct: int) -> np.ndarray:
    """Return the random order of the list in a turn, in which no epoch has a prompt twice.

    An epoch of `distinct` prompts may lie across two turns. Such an epoch takes from the new turn
    the first prompts that it has not yet taken from the last one; what they overtake keeps its
    order. That moves nothing beyond the first `distinct` places, so in a list of two epochs or more
    the end of a turn is known without the turns before it.
    """
    first = max(turn - 1, 0) if size >= 2 * distinct else 0
    order = _permutation(size, seed, RngStream.PROMPTS, first)
    for number in range(first + 1, turn + 1):
        # prompts that the epoch across the border has from the last turn
        before = number * size % distinct
        taken = order[size - before :]
        order = _permutation(size, seed, RngStream.PROMPTS, number)
        head = order[~np.isin(order, taken)][: distinct - before]
        order = np.concatenate([head, order[~np.isin(order, head)]])
    return order


def _permutation(size: int, seed: int, stream: RngStream, turn: int) -> np.ndarray:
    """Return a random order of range(size).

    It is by the raw output of a counter-based generator, which no numpy release changes.
    """
    key = np.array([seed, (stream << 32) | turn], np.uint64)
    draws = np.random.Philox(key=key).random_raw(size)
    return draws.argsort(kind="stable").astype(np.int32)


def _batch(prompts: Sequence[str], index: np.ndarray, candidate: np.ndarray) -> PromptBatch:
    return PromptBatch(
        tuple(prompts[int(i)] for i in index),
        index.astype(np.int32),
        candidate.astype(np.int32),
    )
