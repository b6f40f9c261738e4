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
    """The prompts of a text file (UTF-8, one a line) or of `world:NAME/SPLIT`, in their order.

    A prompt has at most `limit` tokens, as `count_tokens` counts them, and `check` raises
    ValueError for those that the rewards cannot judge. Raises ValueError or OSError naming the file
    and the line at fault.
    """
    world = world_of(source)
    lines = world.prompts(source.partition("/")[2]) if world else _lines(Path(source))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(
                f"{source}, line {number} is empty; write a prompt there or delete the line"
            )
        try:
            if (tokens := count_tokens(line)) <= limit:
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
    """The world of a prompt list `world:NAME/SPLIT`; None for a text file. ValueError for an
    unknown name.
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
    prompts: Sequence[str], seed: int, epoch: int, groups: int, candidates: int, repeated: int
) -> PromptBatch:
    """The `groups` x `candidates` videos of an epoch: `candidates` for each of `groups` distinct
    prompts.

    Prompts are taken without replacement: the list is gone through in a random order, and then
    again in another one, across epochs; no epoch has a prompt twice. `repeated` > 1 is the
    published behaviour (objective.md 15.2): each run of `repeated` sampling batches asks for the
    same prompts, so that the epoch has groups / repeated prompts with repeated x candidates videos
    each.
    """
    if groups % repeated:
        raise ValueError(
            f"{groups} groups cannot be drawn {repeated} times each; give a divisor of {groups}"
        )
    distinct, size = groups // repeated, len(prompts)
    if distinct > size:
        raise ValueError(f"{distinct} distinct prompts asked for in an epoch, the list has {size}")
    cycle, start = divmod(epoch * distinct, size)
    order = _order(size, seed, cycle, distinct)
    if start + distinct > size:
        order = np.concatenate([order, _order(size, seed, cycle + 1, distinct)])
    chosen = order[start : start + distinct]
    videos = repeated * candidates
    return _batch(prompts, np.repeat(chosen, videos), np.tile(np.arange(videos), distinct))


def held_out(prompts: Sequence[str], seed: int, videos: int) -> PromptBatch:
    """The videos of every evaluation of a run: all prompts once in a random order, then their
    second candidates, ...
    """
    turn, place = np.divmod(np.arange(videos), len(prompts))
    return _batch(prompts, _permutation(len(prompts), seed, RngStream.HELD_OUT, 0)[place], turn)


def sample_keys(batch: PromptBatch, seed: int, purpose: RngStream, epoch: int) -> jax.Array:
    """One key [B] per video, from (seed, purpose, epoch, prompt, candidate)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), epoch)

    def one(index, candidate):
        return jax.random.fold_in(jax.random.fold_in(key, index), candidate)

    return jax.vmap(one)(batch.index, batch.candidate)


def _lines(path: Path) -> list[str]:
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


def _order(size: int, seed: int, cycle: int, distinct: int) -> np.ndarray:
    """Random order of the list in its `cycle`-th turn, such that no epoch across two turns has a
    prompt twice.

    Such an epoch takes from the new turn the first prompts that it has not yet taken from the last
    one; what they overtake keeps its order. That moves nothing beyond the first `distinct` places,
    so in a list of two epochs or more the end of a turn is known without the turns before it.
    """
    first = max(cycle - 1, 0) if size >= 2 * distinct else 0
    order = _permutation(size, seed, RngStream.PROMPTS, first)
    for turn in range(first + 1, cycle + 1):
        # prompts that the epoch across the border has from the last turn
        before = turn * size % distinct
        taken = order[size - before :]
        order = _permutation(size, seed, RngStream.PROMPTS, turn)
        if before:
            head = order[~np.isin(order, taken)][: distinct - before]
            order = np.concatenate([head, order[~np.isin(order, head)]])
    return order


def _permutation(size: int, seed: int, purpose: RngStream, turn: int) -> np.ndarray:
    """Random order of range(size): by the raw output of a counter-based generator, which no numpy
    release changes.
    """
    generator = np.random.Philox(key=np.array([seed, (purpose << 32) | turn], np.uint64))
    return np.argsort(generator.random_raw(size), kind="stable").astype(np.int32)


def _batch(prompts: Sequence[str], index: np.ndarray, candidate: np.ndarray) -> PromptBatch:
    return PromptBatch(
        tuple(prompts[i] for i in index), index.astype(np.int32), candidate.astype(np.int32)
    )
