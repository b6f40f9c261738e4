"""Score videos while the caller samples the next ones, with the weights of rewards where the config
wants them.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from astrolabe_jax import sharding
from astrolabe_jax.rewards import registry
from astrolabe_jax.rewards.registry import Loaded, RewardError
from astrolabe_jax.runtime import multihost
from astrolabe_jax.types import Scores

POLL_SECONDS = 0.5  # between two looks whether a wait is to end
GRACE_SECONDS = 2.0  # that a scorer under way gets when the run ends
LAST_SECONDS = 5.0  # that a program which ends waits for a reward that no device computes


@dataclasses.dataclass(frozen=True)
class _Call:
    """Some rewards of a batch of videos, which a thread computes."""

    groups: list[Loaded]
    numbers: Sequence[int]  # of the videos
    end: float  # of its time, on the clock of time.monotonic
    names: list[str]  # of the rewards that are computed now; before that of all
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)


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
        self._loaded = list(map(_moved_to_host, loaded)) if place == "host" else list(loaded)
        self._under_way: _Call | None = None

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
        held at most. All processes call this, and what comes back; an error on one of them is an
        error on all.

        Args:
          frames: decoded videos, uint8 `[B, T, height, width, 3]`.
          prompts: B prompts.
          numbers: B numbers of the videos among those of their epoch, for errors; by default from
            0.
          check: called while scores are waited for, equally often on all processes; may raise to
            end the wait.

        Returns:
          A function that returns `REWARD` and `REWARD/PART` -> float32 `[B]`, of the rewards that
          this process scores with, or raises RewardError, as registry.score does.

        Raises:
          RewardError: for a reward that may not be under way when this returns, and for the call
            before, if it takes longer than the timeout.
        """
        videos = (frames, prompts, range(len(prompts)) if numbers is None else numbers)
        self.settle(check)
        on_devices = [group for group in self._loaded if _on_devices([group])]
        elsewhere = [group for group in self._loaded if not _on_devices([group])]
        if jax.process_index() > 0:
            elsewhere = []
        later = self._begin(filter(self._may_overlap, on_devices + elsewhere), videos)
        self._under_way = later
        scores: Scores = {}
        # What all processes compute together ends before they talk about what is waited for.
        for groups in (on_devices, elsewhere):
            call = self._begin(itertools.filterfalse(self._may_overlap, groups), videos)
            scores = {**scores, **self._result(call, check)}
        return lambda: {**scores, **self._result(later, check)}

    def settle(self, check: Callable[[], None] = lambda: None, last: bool = False) -> None:
        """Wait until nothing is under way; `check` and errors are as in `score_async`.

        The `last` call waits for what devices compute, but not for long for what hangs elsewhere,
        such as a server; multihost.exit_together ends a program beside it.
        """
        call = self._under_way
        if call and last:
            computes = _on_devices(call.groups)
            concurrent.futures.wait([call.future], self._timeout if computes else LAST_SECONDS)
        elif call:
            self._wait(call, check)
        self._under_way = None

    def _may_overlap(self, group: Loaded) -> bool:
        on_host = group.scorer.params is None
        return self._overlap == "all" or (self._overlap == "host" and on_host)

    def _begin(self, groups: Iterable[Loaded], videos: tuple[Any, ...]) -> _Call:
        """Score with these groups, one after the other, on a thread of its own.

        The thread does not keep the program from its end (multihost.exit_together).

        Args:
          groups: of rewards.
          videos: frames, prompts and numbers, as registry.score takes them.
        """
        groups = list(groups)
        names = [name for group in groups for name in group.names]
        call = _Call(groups, videos[-1], time.monotonic() + self._timeout, names)

        def work() -> None:
            try:
                scores: Scores = {}
                for group in call.groups:
                    call.names[:] = group.names
                    scores |= self._score(group, *videos)
                call.future.set_result(scores)
            except BaseException as error:
                call.future.set_exception(error)

        multihost.start_apart(work)
        return call

    def _result(self, call: _Call, check: Callable[[], None]) -> Scores:
        self._wait(call, check)
        return multihost.on_all(call.future.result)

    def _wait(self, call: _Call, check: Callable[[], None]) -> None:
        """Wait until a call is done on all processes; RewardError if it takes too long.

        If `check` raises, what devices compute is waited for nevertheless.
        """
        try:
            while _goes_on(call):
                check()
        except BaseException:
            computes = _on_devices(call.groups)
            concurrent.futures.wait([call.future], self._timeout if computes else GRACE_SECONDS)
            self._under_way = None  # nobody waits for it again
            raise
        multihost.on_all(lambda: self._refuse_late(call))

    def _refuse_late(self, call: _Call) -> None:
        if call.future.done():
            return
        self._under_way = None  # nobody waits for it again
        raise RewardError(
            f"reward{'s' * (len(call.names) > 1)} {', '.join(map(repr, call.names))} did not "
            f"answer within {self._timeout:g} s for {registry.samples_named(call.numbers)}; look "
            "whether a scorer hangs, or raise config.scoring.timeout"
        )

    def _score(self, group: Loaded, *videos: Any) -> Scores:
        with sharding.on_devices(group.scorer.params) as params:
            return registry.score(_with_params(group, params), *videos)


def _goes_on(call: _Call) -> bool:
    """Wait a while for a call, and return whether it goes on, within its time, on any process."""
    left = max(call.end - time.monotonic(), 0.0)
    # the processes talk by a program of their own, which must not come between those of rewards
    apart = jax.process_count() == 1 or not _on_devices(call.groups)
    concurrent.futures.wait([call.future], min(POLL_SECONDS, left) if apart else left)
    late = time.monotonic() >= call.end
    return bool(multihost.first_nonempty("" if call.future.done() or late else "goes on"))


def _on_devices(groups: Sequence[Loaded]) -> bool:
    """Return whether one of the groups has weights on the mesh, and so computes there."""
    return any(group.scorer.params is not None for group in groups)


def _with_params(group: Loaded, params: Any) -> Loaded:
    return group._replace(scorer=group.scorer._replace(params=params))


def _moved_to_host(group: Loaded) -> Loaded:
    return _with_params(group, sharding.moved_to_host(group.scorer.params))
