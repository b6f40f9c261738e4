"""The collector: whole videos and windows from the same blocks, forks with their decoders, and
where windows begin.

What a window sees of its past is in models/test_window.py, where its gradients end in
test_training_forward.py; whole runs are in e2e/test_windows.py.
"""

import functools

import jax
import numpy as np
import pytest

from astrolabe_jax import prompts
from astrolabe_jax.decode import decode_video
from astrolabe_jax.streaming import streams, windows
from astrolabe_jax.types import RngStream
from tests.e2e import runs
from tests.models import tiny
from tests.tiny_base import write_tiny_base

FRAMES = 6
ONE_DEVICE = runs.WINDOWS | {"streaming.prompts_per_device": 2}
KINDS = {
    "whole videos": {"video.frames": 9},
    "clip": ONE_DEVICE,
    "sequence": ONE_DEVICE | {"streaming.sampling": "sequence"},
    "first goes on": ONE_DEVICE
    | {"streaming.mode": "progressive", "streaming.continuation": "first"},
    "best goes on": ONE_DEVICE
    | {"streaming.mode": "progressive", "streaming.continuation": "best"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def prepared(base, tmp_path_factory):
    """kind, changes -> a run on one device, and the videos of its first epoch: two prompts with
    four videos each.
    """

    @functools.cache
    def prepare(kind, *changes):
        config = runs.small_config(base, **KINDS[kind] | dict(changes))
        run = runs.prepared(config, tmp_path_factory.mktemp("runs") / "run")
        batch = prompts.draw(run.train_prompts, config.seed, 0, 2, 4, 1)
        frames = run.latent_shape[0]
        stream = RngStream.ROLLOUT
        return run, windows.encode_videos(run, batch, stream, 0, frames, runs.quiet())

    return prepare


def collected(run, videos, start, begun=()):
    return windows.collect(run, tiny.adapter(), videos, start, list(begun), runs.quiet(), "")


def sampled(run, videos, stop):
    """Latents to frame `stop` and the state there, by the driver of blocks alone."""
    state = windows.begin(run, len(videos.timelines), run.latent_shape[0])
    blocks = streams.blocks_between(videos, 0, stop)
    policy = run.policy(tiny.adapter())
    return windows.sampled(streams.sample_blocks(policy, videos, state, blocks))


def decoded(run, latents, memory=None):
    """Frames [B, T, height, width, 3] int, and the decoder's memory behind them."""
    parts, memory = decode_video(run.base.vae, latents, memory, run.config.video.decode_chunk)
    return windows.to_host(parts).astype(int), memory


@pytest.mark.parametrize("limit", [-1, pytest.param(2, marks=pytest.mark.slow)])
def test_collected_whole_videos_are_those_of_the_driver_of_blocks(prepared, limit):
    """Bit for bit where as many are sampled at once; their frames are scored."""
    run, videos = prepared("whole videos", ("mesh.samples_per_device", limit))
    segment = collected(run, videos, 0)
    latents, _ = sampled(run, videos, 3)
    assert segment.prefixes == segment.whole == []
    if limit == -1:
        np.testing.assert_array_equal(segment.latents, latents)
    np.testing.assert_allclose(segment.latents, latents, atol=2e-5)
    frames, _ = decoded(run, segment.latents)
    numbers = list(range(8))
    scores = run.reward_runner.score_async(frames.astype(np.uint8), videos.batch.texts, numbers)()
    assert scores.keys() == segment.scores.keys()
    for name, values in scores.items():
        np.testing.assert_allclose(segment.scores[name], values, atol=2e-2, err_msg=name)


@pytest.mark.parametrize("start", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sequence_is_the_whole_video_to_the_end_of_its_window(prepared, start):
    run, videos = prepared("sequence")
    segment = collected(run, videos, start)
    latents, _ = sampled(run, videos._replace(traced=False), start + 2)
    np.testing.assert_allclose(segment.latents, latents, atol=2e-5)
    assert segment.prefixes == []


@pytest.mark.parametrize("start", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_candidates_of_a_window_go_on_from_the_video_of_the_first_one(prepared, start):
    run, videos = prepared("clip")
    segment = collected(run, videos, start)
    whole, _ = sampled(run, videos, start + 2)
    assert segment.latents.shape[:2] == (8, 2)
    np.testing.assert_allclose(segment.latents[::4], whole[::4, start:], atol=2e-5)
    own = np.asarray(segment.latents)
    for candidates in (own[:4], own[4:]):
        apart = np.abs(candidates[:, None] - candidates[None]).max(axis=(2, 3, 4, 5))
        assert (apart[~np.eye(4, dtype=bool)] > 0.1).all()
    assert all(np.isfinite(values).all() for values in segment.scores.values())

    # what is saved of it has the shapes that a resumed run expects
    arrays = windows.segment_arrays(run, segment)
    shapes = windows.segment_shapes(run, start)
    assert jax.tree.structure(arrays) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(arrays), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    states = segment.prefixes
    again = windows.split_streams(run, windows.merge_streams(run, states))
    jax.tree.map(np.testing.assert_array_equal, again, states)


# before and after a block has stopped to see all that is before it
@pytest.mark.parametrize("start", [2, 4])
def test_frames_behind_a_fork_are_those_of_the_video(prepared, start):
    """Bit for bit: the decoder's memory is forked with the rest, and the parent keeps its own."""
    run, videos = prepared("clip")
    latents, _ = sampled(run, videos, FRAMES)
    whole, _ = decoded(run, latents)
    _, state = sampled(run, videos, start)
    _, memory = decoded(run, latents[:, :start])
    parent = state._replace(decoder=memory)
    for _ in range(2):
        forked = streams.fork(parent, 1)
        frames, _ = decoded(run, latents[:, start:], forked.decoder)
        assert frames.shape[1] == 4 * (FRAMES - start)
        np.testing.assert_array_equal(frames, whole[:, 4 * start - 3 :])
    four = streams.fork(parent, 4)
    frames, _ = decoded(run, np.repeat(latents[:, start:], 4, axis=0), four.decoder)
    assert np.abs(frames[::4] - whole[:, 4 * start - 3 :]).max() <= 1


@pytest.mark.parametrize("kind", ["first goes on", "best goes on"])
def test_a_progressive_stream_goes_on_with_one_of_its_candidates(prepared, kind):
    """As if it had sampled that one: its keys, latents and decoder."""
    run, videos = prepared(kind)
    segment = collected(run, videos, 0)
    total = np.array([0, 1, 3, 2, 9, 0, 0, 0], np.float32)
    taken = np.array([0, 4]) if kind == "first goes on" else np.array([2, 4])
    (state,) = windows.continue_streams(run, tiny.adapter(), segment, total, 0)
    latents, want = sampled(run, videos.take(taken), 2)
    np.testing.assert_array_equal(state.recent[:, -2:], segment.latents[taken])
    without_decoder = jax.tree.leaves(state._replace(decoder=None))
    for got, leaf in zip(without_decoder, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, leaf, atol=2e-5)
    _, memory = decoded(run, latents)
    for got, leaf in zip(jax.tree.leaves(state.decoder), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(got, leaf, atol=1e-4)
    after = collected(run, videos, 2, [state])
    if kind == "first goes on":
        whole, _ = sampled(run, videos, 4)
        np.testing.assert_allclose(after.latents[::4], whole[::4, 2:], atol=2e-5)
    last = after._replace(start=run.starts[-1])
    assert windows.continue_streams(run, tiny.adapter(), last, total, 0) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"streaming.selection": "random"}, {0, 1, 2, 3, 4}),
        ({"streaming.selection": "first"}, {0}),
        ({"streaming.selection": "last"}, {4}),
        ({"streaming.selection": "choices", "streaming.starts": (3, 1)}, {1, 3}),
        ({"streaming.mode": "progressive"}, {0, 2, 4}),
        ({"model.block": 2, "model.window": 4}, {0, 2, 4}),
    ],
    ids=str,
)
def test_windows_begin_at_the_same_frames_everywhere(base, tmp_path, changes, expected):
    """For 1000 epochs, on one device or two: at whole blocks, the last one ends with the video, all
    equally often.
    """
    config = runs.small_config(base, **runs.WINDOWS | {"model.sink": 0} | changes)

    def starts(config, name, devices):
        run = runs.prepared(config, tmp_path / name, devices)
        return [windows.window_start(run, epoch) for epoch in range(1000)]

    one = starts(config, "2", 2)
    assert one == starts(config, "4", 4)
    assert set(one) == expected
    assert all(start % config.model.block == 0 and 0 <= start <= FRAMES - 2 for start in one)
    chosen = config.streaming.starts or config.streaming.selection == "first"
    assert chosen or max(one) == FRAMES - 2
    counts = np.bincount(one)[sorted(expected)] / (1000 / len(expected))
    assert 0.8 < counts.min() and counts.max() < 1.2
    config.seed = 1
    drawn = config.streaming.mode == "epoch" and len(expected) > 1
    assert (starts(config, "seed", 2) != one) == drawn
