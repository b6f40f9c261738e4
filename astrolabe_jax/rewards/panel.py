"""Score videos while the caller samples the next ones, with the weights of rewards where the config
wants them.
"""

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from astrolabe_jax.rewards import registry
from astrolabe_jax.rewards.registry import Loaded, RewardError
from astrolabe_jax.types import Scores

POLL_SECONDS = 0.5  # between two looks whether a wait is to end
GRACE_SECONDS = 2.0  # that a scorer under way gets when the run ends
LAST_SECONDS = 5.0  # that a program which ends waits for a reward that no device computes


class RewardRunner:
    """The rewards of a run.

    Of several processes, the first one alone scores with rewards without weights on the mesh: a
    server is asked once about each video, and what no device computes need not be equal twice.

    Args:
      loaded: what registry.load returns.
      overlap: which of them may be under way when `score_async` returns: none; those without
        weights on the mesh (host), such as remote ones; or all, whose memory is then needed beside
        that of sampling.
      place: where their weights are between two calls: on the device, or in the memory of the host.
      timeout: seconds that the rewards of a batch may take; more is an error.
    """

    def __init__(
        self,
        loaded: Sequence[Loaded],
        overlap: str = "none",
        place: str = "device",
        timeout: float = 3600.0,
    ):
        self._overlap = overlap
        self._timeout = timeout
        self._home = {
            group.names: jax.tree.map(lambda leaf: leaf.sharding, group.scorer.params)
            for group in loaded
        }
        self._swapped = place == "host"
        self._loaded = list(map(_moved_to_host, loaded)) if self._swapped else list(loaded)
        self._under_way: concurrent.futures.Future | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rewards; none if nothing is to be scored."""
        return tuple(name for group in self._loaded for name in group.names)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the weights, by reward.NAME: two runs with other ones are not the same."""
        return {
            f"reward.{name}": group.scorer.identity
            for group in self._loaded
            for name in group.names
            if group.scorer.identity
        }

    @property
    def weights(self) -> int:
        """Bytes of all weights on one device."""
        return sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves([group.scorer.params for group in self._loaded])
        )

    def score_async(
        self,
        frames: Any,
        prompts: Sequence[str],
        numbers: Sequence[int] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Callable[[], Scores]:
        """Begin to score B videos, and return a function that waits for the scores.

        The scores of the call before are waited for first, so that the frames of two batches are
        held at most.

        Args:
          frames: decoded videos, uint8 `[B, T, height, width, 3]`.
          prompts: B prompts.
          numbers: B numbers of the videos among those of their epoch, for errors; by default from
            0.
          check: called while scores are waited for; may raise to end the wait. Several processes
            wait for different times, and do not call it.

        Returns:
          A function that returns `REWARD` and `REWARD/PART` -> float32 `[B]`, of the rewards that
          this process scores with, or raises RewardError, as registry.score does.

        Raises:
          RewardError: for a reward that may not be under way when this returns.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        self.settle(check)
        # first those that all processes compute together: an error of another would keep one away
        mine = [group for group in self._loaded if _on_devices([group])]
        if jax.process_index() == 0:
            mine += [group for group in self._loaded if not _on_devices([group])]
        later = [group for group in mine if self._may_overlap(group)]
        now = [group for group in mine if not self._may_overlap(group)]
        under_way = self._begin(later, frames, prompts, numbers)
        self._under_way = under_way
        started = self._begin(now, frames, prompts, numbers)
        self._wait(started, check, _on_devices(now))
        scores = self._result(started, now, numbers)

        def wait() -> Scores:
            self._wait(under_way, check, _on_devices(later))
            return scores | self._result(under_way, later, numbers)

        return wait

    def settle(self, check: Callable[[], None] = lambda: None, last: bool = False) -> None:
        """Wait until nothing is under way; `check` is as in `score_async`.

        A program that ends while a thread of its own computes may crash. So the `last` call waits
        for what devices compute, but not for long for what hangs elsewhere, such as a server.
        """
        if self._under_way:
            computes = _on_devices(self._loaded) and self._overlap == "all"
            if last and not computes:
                concurrent.futures.wait([self._under_way], LAST_SECONDS)
            else:
                self._wait(self._under_way, check, computes)
            self._under_way = None

    def _wait(
        self, future: concurrent.futures.Future, check: Callable[[], None], computes: bool
    ) -> None:
        """Wait until a future is done, at most the timeout; also if `check` raises, where devices
        compute for it.
        """
        end = time.monotonic() + self._timeout
        try:
            while not future.done() and time.monotonic() < end:
                concurrent.futures.wait([future], min(POLL_SECONDS, self._timeout))
                if jax.process_count() == 1:
                    check()
        except BaseException:
            concurrent.futures.wait([future], self._timeout if computes else GRACE_SECONDS)
            self._under_way = None  # nobody waits for it again
            raise

    def _may_overlap(self, group: Loaded) -> bool:
        on_host = group.scorer.params is None
        return self._overlap == "all" or (self._overlap == "host" and on_host)

    def _begin(self, groups: Sequence[Loaded], *videos: Any) -> concurrent.futures.Future:
        """Score with these groups, one after the other, on a thread of its own.

        The thread does not keep the program from its end.

        Args:
          groups: of rewards.
          *videos: frames, prompts and numbers, as registry.score takes them.
        """
        future = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(
                    {
                        name: values
                        for group in groups
                        for name, values in self._score(group, *videos).items()
                    }
                )
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def _result(
        self, future: concurrent.futures.Future, groups: Sequence[Loaded], numbers: Sequence[int]
    ) -> Scores:
        try:
            return future.result(0)
        except concurrent.futures.TimeoutError:
            self._under_way = None  # nobody waits for it again
            names = ", ".join(repr(name) for group in groups for name in group.names)
            raise RewardError(
                f"rewards {names} did not answer within {self._timeout:g} s for samples "
                f"{numbers[0]} to {numbers[-1]}; look whether a scorer hangs, or raise "
                "config.scoring.timeout"
            ) from None

    def _score(self, group: Loaded, *videos: Any) -> Scores:
        if not self._swapped or group.scorer.params is None:
            return registry.score(group, *videos)
        params = jax.device_put(group.scorer.params, self._home[group.names])
        try:
            return registry.score(_with_params(group, params), *videos)
        finally:
            jax.tree.map(lambda leaf: leaf.delete(), params)


def _on_devices(groups: Sequence[Loaded]) -> bool:
    """Return whether one of the groups has weights on the mesh, and so computes there."""
    return any(group.scorer.params is not None for group in groups)


def _with_params(group: Loaded, params: Any) -> Loaded:
    return group._replace(scorer=group.scorer._replace(params=params))


def _moved_to_host(group: Loaded) -> Loaded:
    def move(leaf: jax.Array) -> jax.Array:
        if isinstance(leaf, jax.ShapeDtypeStruct):  # of a run that is only planned
            return leaf
        moved = jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))
        leaf.delete()
        return moved

    return _with_params(group, jax.tree.map(move, group.scorer.params))
