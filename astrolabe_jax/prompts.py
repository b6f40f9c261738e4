"""Stage prompts: which videos an epoch asks for.

Everything is derived from (seed, epoch), so a resumed run draws what the uninterrupted one draws,
and no position in the list has to be stored.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from astrolabe_jax.types import PromptBatch, RngStream
from astrolabe_jax.worlds import WORLDS, World

WORLD_PREFIX = "world:"


def load(
    source: str,
    count_tokens: Callable[[str], int],
    limit: int,
    check: Callable[[str], None] = lambda prompt: None,
) -> tuple[str, ...]:
    """Return the prompts of a text file (UTF-8, one a line) or of `world:NAME/SPLIT`, in order.

    Args:
      source: the file or the list of a world.
      count_tokens: of a prompt; ValueError for one that has none.
      limit: tokens that a prompt may have.
      check: raises ValueError for prompts that the rewards cannot judge.

    Raises:
      ValueError, OSError: naming the file and the line at fault.
    """
    world = world_of(source)
    lines = world.prompts(source.partition("/")[2]) if world else _lines(Path(source))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(
                f"{source}, line {number} is empty; write a prompt there or delete the line"
            )
        try:
            tokens = count_tokens(line)
            if tokens <= limit:
                check(line.strip())
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None
        if tokens > limit:
            raise ValueError(
                f"{source}, line {number} has {tokens} tokens, the text encoder takes {limit} with "
                f"the end token; shorten the prompt: {line[:60]!r}..."
            )
    return tuple(line.strip() for line in lines)


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
        raise FileNotFoundError(
            f"prompt file {path} does not exist; give a text file or {WORLD_PREFIX}NAME/SPLIT"
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"prompt file {path} is not UTF-8: byte {error.start} (line {line}) is "
            f"{content[error.start]:#04x}; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"prompt file {path} is empty; write one prompt a line")
    # Not splitlines: it also splits at characters that may stand inside a prompt, and line numbers
    # would be off.
    return text.removeprefix("\ufeff").removesuffix("\n").split("\n")


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
