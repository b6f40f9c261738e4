"""Scores videos while the caller samples the next ones, and keeps weights of rewards where the
config wants them.
"""

import concurrent.futures
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from astrolabe_jax import rewards
from astrolabe_jax.rewards import Loaded, RewardError

Scores = dict[str, np.ndarray]


class Panel:
    """The rewards of a run.

    overlap: which of them may be under way when `score` returns: none; those without weights on the
    mesh (host), such as remote ones; or all, whose memory is then needed beside that of sampling.
    place: where their weights are between two calls, on the devices or in the memory of the host.
    timeout: seconds that a batch of videos may take its rewards; what takes longer is an error.
    """

    def __init__(
        self,
        loaded: Sequence[Loaded],
        overlap: str = "none",
        place: str = "device",
        timeout: float = 3600.0,
    ):
        self._overlap, self._timeout = overlap, timeout
        self._home = [
            jax.tree.map(lambda leaf: leaf.sharding, group.scorer.params) for group in loaded
        ]
        self._loaded = (
            [_moved_to_host(group) for group in loaded] if place == "host" else list(loaded)
        )
        self._swapped = place == "host"
        self._waiting: concurrent.futures.Future | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Of the rewards that have one: what makes two runs the same."""
        known = [group for group in self._loaded if group.scorer.identity]
        return {f"reward.{name}": group.scorer.identity for group in known for name in group.names}

    @property
    def weights(self) -> int:
        """Bytes of all weights on one device."""
        leaves = [leaf for group in self._loaded for leaf in jax.tree.leaves(group.scorer.params)]
        return sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in leaves
        )

    def score(
        self, frames: Any, prompts: Sequence[str], numbers: Sequence[int] | None = None
    ) -> Callable[[], Scores]:
        """Begins to score B videos; what it returns waits for the scores.

        Arguments, scores and errors are those of rewards.score, for all rewards. The scores of the
        call before are waited for first: the frames of two batches are held at most.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        self.settle()
        beside = [i for i, group in enumerate(self._loaded) if self._may_wait(group)]
        now = [i for i in range(len(self._loaded)) if i not in beside]
        self._waiting = first = self._begin(beside, frames, prompts, numbers)
        scores = self._await(self._begin(now, frames, prompts, numbers), now, numbers)
        return lambda: scores | self._await(first, beside, numbers)

    def settle(self) -> None:
        """Waits until nothing is under way: a program that ends while a thread of its own computes
        may crash.
        """
        if self._waiting:
            concurrent.futures.wait([self._waiting], self._timeout)
            self._waiting = None

    def _may_wait(self, group: Loaded) -> bool:
        return self._overlap == "all" or (self._overlap == "host" and group.scorer.params is None)

    def _begin(self, groups: Sequence[int], *given: Any) -> concurrent.futures.Future:
        """Scores these groups, one after the other, on a thread that does not keep the program from
        its end.
        """
        future = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result({k: v for i in groups for k, v in self._score(i, *given).items()})
            except BaseException as error:
                future.set_exception(error)

        if groups:
            threading.Thread(target=work, daemon=True).start()
        else:
            future.set_result({})
        return future

    def _await(
        self, future: concurrent.futures.Future, groups: Sequence[int], numbers: Sequence[int]
    ) -> Scores:
        try:
            return future.result(self._timeout)
        except concurrent.futures.TimeoutError:
            self._waiting = None  # nobody waits for it again
            names = ", ".join(repr(name) for i in groups for name in self._loaded[i].names)
            raise RewardError(
                f"rewards {names} did not answer within {self._timeout:g} s for samples "
                f"{numbers[0]} to {numbers[-1]}; look whether a scorer hangs, or raise "
                "config.scoring.timeout"
            ) from None

    def _score(self, i: int, frames: Any, prompts: Sequence[str], numbers: Sequence[int]) -> Scores:
        group = self._loaded[i]
        if not self._swapped or group.scorer.params is None:
            return rewards.score(group, frames, prompts, numbers)
        params = jax.device_put(group.scorer.params, self._home[i])
        try:
            return rewards.score(
                group._replace(scorer=group.scorer._replace(params=params)),
                frames,
                prompts,
                numbers,
            )
        finally:
            jax.tree.map(lambda leaf: leaf.delete(), params)


def _moved_to_host(group: Loaded) -> Loaded:
    def move(leaf: jax.Array) -> jax.Array:
        if isinstance(leaf, jax.ShapeDtypeStruct):  # of a run that is only planned
            return leaf
        moved = jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))
        leaf.delete()
        return moved

    return group._replace(
        scorer=group.scorer._replace(params=jax.tree.map(move, group.scorer.params))
    )
