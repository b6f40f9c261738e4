"""Windows of long videos: what a window sees of its past, against the cached rollout and the
uncached forward.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.lora import scaled
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.config import Block, Layout
from astrolabe_jax.models.wan.transformer import Past
from astrolabe_jax.streaming import streams
from tests.models import tiny
from tests.streams_of import begin, cache, plain_videos, policy_of

LAYOUTS = {
    "sink, relative": Layout(block=3, window=12, sink=3, positions="relative"),
    "sink, absolute": Layout(block=3, window=12, sink=3),
    "no sink": Layout(block=3, window=9, positions="relative"),
    "sink of two": Layout(block=3, window=11, sink=2, positions="relative"),
    "frames": Layout(block=1, window=6, sink=3, positions="relative"),
    "global": Layout(block=3, max_global=9),
}
FRAMES = 21


@functools.cache
def streamed(name: str, stop: int):
    """The clean passes of a video of FRAMES frames to frame `stop`: (cache, velocities of every
    block so far).
    """
    layout = LAYOUTS[name]
    policy = policy_of(layout, tiny.adapter())
    videos = plain_videos(layout, FRAMES, 2, traced=True)
    blocks = streams.blocks_between(videos, 0, stop)
    if not blocks:
        return begin(policy, videos).cache, None
    video = cache(policy, videos, tiny.latents(FRAMES, 2)[:, :stop], blocks, trace=True)
    velocities = [trace.velocity[0] for trace in video.traces]
    return video.state.cache, np.concatenate(velocities, axis=1)


def model_of(params, copies: int = 1):
    """The network, its adapter as layers take it, and two prompts, each `copies` times."""
    model = merge(tiny.model()[0], params)
    adapter = scaled(tiny.adapter(), 1.0)
    text = model.encode_text(tiny.text(2).repeat(copies, axis=0), adapter)
    return model, adapter, text


@functools.cache
def window_program(name: str, context: bool):
    """The forward of a window, one program for every start."""
    layout = LAYOUTS[name]

    @jax.jit
    def run(params, cache, start, x, t):
        model, adapter, text = model_of(params)
        past = Past(cache, start)
        clean = None
        if context:
            earlier = x[:, : x.shape[1] - layout.block]
            clean = model.context(earlier, text, adapter, layout=layout, past=past)
        times = jnp.full(x.shape[:2], t)
        return model(x, times, text, adapter, layout=layout, context=clean, past=past)

    return run


def window(name: str, start: int, context: bool, t: float = 0.0, x=None):
    """Velocity of a window of 9 frames behind the streamed ones; of the video's own by default."""
    x = tiny.latents(FRAMES, 2)[:, start : start + 9] if x is None else x
    _, params = tiny.model()
    cache, _ = streamed(name, start)
    return window_program(name, context)(params, cache, jnp.int32(start), x, t)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("start", [0, 3, 6, 12])
@pytest.mark.parametrize("name", LAYOUTS)
def test_clean_window_equals_the_stream(name, start, context):
    """Read clean, the frames behind a cache give what the stream gives, before and after its window
    is full.
    """
    _, expected = streamed(name, FRAMES)
    np.testing.assert_allclose(
        window(name, start, context), expected[:, start : start + 9], atol=2e-5
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_window_equals_the_forward_of_a_short_video(name):
    """At frame 0, with noisy context, it is the training forward without a past."""
    x = tiny.latents(9, 2, seed=3)

    @jax.jit
    def plain(params, x):
        model, adapter, text = model_of(params)
        return model(x, jnp.full(x.shape[:2], 700.0), text, adapter, layout=LAYOUTS[name])

    want = plain(tiny.model()[1], x)
    np.testing.assert_allclose(window(name, 0, False, 700.0, x), want, atol=2e-5)


def test_policies_of_positions_agree_until_the_window_is_full():
    x = tiny.latents(9, 2, seed=3)
    same = [window(name, 3, False, 500.0, x) for name in ("sink, relative", "sink, absolute")]
    np.testing.assert_allclose(*same, atol=2e-5)
    apart = [window(name, 12, False, 500.0, x) for name in ("sink, relative", "sink, absolute")]
    assert np.abs(apart[0] - apart[1]).max() > 1e-2


def test_a_prompts_past_serves_all_of_its_samples():
    layout = LAYOUTS["sink, relative"]
    cache, _ = streamed("sink, relative", 12)
    x = tiny.latents(9, 4, seed=4)

    @jax.jit
    def run(params, cache):
        model, adapter, text = model_of(params, copies=2)
        times = jnp.full(x.shape[:2], 500.0)
        return model(x, times, text, adapter, layout=layout, past=Past(cache, 12))

    _, params = tiny.model()
    repeated = jax.tree.map(lambda part: jnp.repeat(part, 2, axis=1), cache)
    np.testing.assert_allclose(run(params, cache), run(params, repeated), atol=2e-6)


@pytest.mark.parametrize("start", [3, 6, 12])
def test_reencoding_what_is_all_there_gives_the_stream(start):
    """While nothing is evicted the one pass equals the stream; afterwards it has not seen what is
    gone.
    """
    name = "sink, relative"
    layout = LAYOUTS[name]
    video = tiny.latents(FRAMES, 2)

    @jax.jit
    def again(params, first, recent, start):
        model, adapter, text = model_of(params)
        return model.reencode(first, recent, 0.0, text, start, adapter, layout=layout)

    # anything before the video
    padded = np.concatenate([np.full_like(video[:, :12], 9.0), video], axis=1)
    recent = padded[:, 12 + start - 6 : 12 + start]
    anew = again(tiny.model()[1], video[:, :3], recent, jnp.int32(start))
    expected, _ = streamed(name, start)
    sink = np.arange(3) < start
    before = start - 6 + np.arange(6) >= 3
    present = np.concatenate([sink, before]).repeat(4)
    for layer in range(2):
        got = kv.past_frames(anew, layer, layout, start, 4, 6)
        want = kv.past_frames(expected, layer, layout, start, 4, 6)
        for one, other in zip(got, want, strict=True):
            gap = np.abs(one - other)[:, present].max()
            assert gap < 2e-5 if start <= 9 or layer == 0 else gap > 1e-3


@dataclasses.dataclass(frozen=True)
class InSight(Layout):
    """A video of which only the sink and the frames from `begin` on are ever seen."""

    begin: int = 0

    def blocks(self, frames: int) -> tuple[Block, ...]:
        """Return the blocks, each of which sees what a cache made anew holds of its window."""
        pieces = []
        for block in super().blocks(frames):
            cut = {block.start, block.stop}
            if self.begin > 0 and block.start < self.kept:
                cut.add(min(self.kept, block.stop))
            for start, stop in itertools.pairwise(sorted(cut)):
                held = set(range(start, stop))
                for first, last in block.ranges:
                    held |= {f for f in range(first, last) if f < self.kept or f >= self.begin}
                pieces.append(Block(start, stop, _ranges(f for f in held if f < stop), block.shift))
        return tuple(pieces)


def _ranges(frames) -> tuple[tuple[int, int], ...]:
    """Return the ranges [first, last + 1) that the frames make up."""
    groups = itertools.groupby(enumerate(sorted(frames)), lambda pair: pair[1] - pair[0])
    spans = [[frame for _, frame in group] for _, group in groups]
    return tuple((span[0], span[-1] + 1) for span in spans)


REENCODED = {
    "LongLive's": (Layout(3, 12, 3, "relative"), 0),
    "LongLive's, before a block": (Layout(3, 12, 3, "relative"), 1),
    "window of 21": (Layout(3, 21, 3, "relative"), 0),
    "absolute": (Layout(3, 12, 3), 0),
    "sink of two": (Layout(3, 11, 2, "relative"), 0),
    "sink of two blocks": (Layout(3, 12, 6, "relative"), 0),
    "frames": (Layout(1, 6, 3, "relative"), 0),
    "no sink": (Layout(3, 9, 0, "relative"), 0),
    "first frame alone": (Layout(3, 10, 1, "relative", True), 0),
}
# (layout, blocks behind which the cache is made): all until two blocks after the window is full
PLACES = {
    (name, block): []
    if (name, block) in {("LongLive's", 2), ("window of 21", 3), ("sink of two", 5)}
    else [pytest.mark.slow]
    for name, (layout, _) in REENCODED.items()
    for block in range(1, layout.capacity // layout.block + 3)
}


@pytest.mark.parametrize(
    ("name", "blocks"), [pytest.param(*place, marks=marks) for place, marks in PLACES.items()]
)
def test_reencoding_equals_a_forward_over_what_is_in_sight(name, blocks):
    """Made anew behind any block, the cache holds the keys of a forward in which nobody has seen
    the frames that are gone, whether the video is shorter than the window or longer.
    """
    layout, room = REENCODED[name]
    start = layout.lead + blocks * layout.block
    video = tiny.latents(start, 2)
    count = layout.capacity - layout.kept - room * layout.block
    begin = start - count
    # anything before the video
    padded = np.concatenate([np.full_like(video[:, :1], 9.0).repeat(count, 1), video], axis=1)
    first = np.concatenate([video, padded], axis=1)[:, : layout.kept]

    @jax.jit
    def run(params, start):
        model, adapter, text = model_of(params)
        recent = padded[:, -count:]
        anew = model.reencode(first, recent, 0.0, text, start, adapter, layout=layout)
        in_sight = InSight(**dataclasses.asdict(layout), begin=begin)
        return anew, model.context(video, text, adapter, layout=in_sight)

    got, want = run(tiny.model()[1], jnp.int32(start))
    held = [f for f in range(start) if f < layout.kept or f >= begin]
    ring = layout.capacity - layout.kept
    slots = [f if f < layout.kept else layout.kept + (f - layout.kept) % ring for f in held]
    for mine, theirs in zip(got, want, strict=True):
        mine = mine.reshape(2, 2, layout.capacity, -1)[:, :, slots]
        theirs = theirs.reshape(2, 2, start, -1)[:, :, held]
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
