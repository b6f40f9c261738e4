"""Videos of the tiny model through the driver of blocks, in a line."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from astrolabe_jax.models.wan.config import Layout, WanConfig
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.streaming import streams
from astrolabe_jax.streaming.scenes import Rules, Scene, timeline_of
from astrolabe_jax.types import Policy, PromptBatch, StreamState, Timeline, VideoBatch
from tests.models import tiny
from tests.traces import Trace, traced, traced_blocks

SAMPLER = Sampler(steps=(1000.0, 625.0))


class Video(NamedTuple):
    """What has become of some blocks of a set of videos."""

    latents: np.ndarray  # [B, F, C, H, W]
    state: StreamState  # behind them
    traces: list[Trace]  # one a block, if they were asked for


def policy_of(
    layout: Layout,
    adapter: dict | None = None,
    sampler: Sampler = SAMPLER,
    config: WanConfig = tiny.CONFIG,
    lora_scale: float = 1.0,
) -> Policy:
    """Return the tiny model; its parameters are those of tiny.CONFIG, whatever `config` is."""
    graphdef, _ = tiny.model(config)
    _, params = tiny.model()
    return Policy(params, adapter, graphdef, config, layout, sampler, lora_scale)


def videos_of(
    timeline: Timeline, count: int = 1, texts: Sequence[int] = (100, 200, 300), traced: bool = False
) -> VideoBatch:
    """Return `count` videos of one timeline: scene k of video b shows the prompt of seed
    texts[k] + b.
    """
    scenes = range(len(timeline.prompts))
    seeds = [[texts[scene] + video for scene in scenes] for video in range(count)]
    distinct = sorted({seed for video in seeds for seed in video})
    timelines = [timeline._replace(prompts=tuple(str(seed) for seed in video)) for video in seeds]
    names = tuple(own.prompts[0] for own in timelines)
    numbers = np.arange(count, dtype=np.int32)
    return VideoBatch(
        PromptBatch(names, numbers, np.zeros_like(numbers)),
        tuple(timelines),
        {str(seed): row for row, seed in enumerate(distinct)},
        np.concatenate([tiny.text(1, seed) for seed in distinct]),
        jax.random.split(jax.random.key(5), count),
        traced,
    )


def plain_videos(layout: Layout, frames: int, count: int = 1, traced: bool = False) -> VideoBatch:
    """Return `count` videos of one prompt each, `frames` latent frames long."""
    timeline = timeline_of([Scene("", 1.0, 1, False)], frames, layout, Rules())
    return videos_of(timeline, count, traced=traced)


def noise(frames: int, count: int = 1, steps: int = 2) -> np.ndarray:
    """Return stored noise [steps, B, F, C, H, W] for `sample`."""
    return np.stack([tiny.latents(frames, count, seed=3 + step) for step in range(steps)])


def begin(policy: Policy, videos: VideoBatch, slots: int | None = None) -> StreamState:
    """Return the state of videos at frame 0; their cache has no more frames than they have."""
    last = videos.blocks[-1]
    capacity = policy.layout.capacity
    if slots is None:
        slots = capacity if videos.traced else min(capacity, last.frame + last.count)
    return streams.begin(policy.config, policy.layout, len(videos.timelines), slots, tiny.FRAME)


def sample(
    policy: Policy,
    videos: VideoBatch,
    noise: np.ndarray | None = None,
    state: StreamState | None = None,
    blocks: Sequence[int] | None = None,
    trace: bool = False,
) -> Video:
    """Sample some blocks of the videos, by default all.

    Args:
      noise: stored, of the whole videos; by default it is drawn from the videos' keys.
      state: behind the blocks before these, whose memory is taken; by default that at frame 0.
    """
    state = begin(policy, videos) if state is None else state
    blocks = range(len(videos.blocks)) if blocks is None else blocks

    def noise_of(plan):
        return noise[: len(policy.sampler.steps), :, plan.frame : plan.frame + plan.count]

    drawn = None if noise is None else noise_of
    policy = traced(policy) if trace else policy
    return _joined(policy, streams.sample_blocks(policy, videos, state, blocks, drawn), trace)


def cache(
    policy: Policy,
    videos: VideoBatch,
    latents: np.ndarray,
    blocks: Sequence[int],
    state: StreamState | None = None,
    trace: bool = False,
) -> Video:
    """Put given latents [B, F, C, H, W] of some blocks into the videos, read clean."""
    state = begin(policy, videos) if state is None else state
    policy = traced(policy) if trace else policy
    return _joined(policy, streams.cache_blocks(policy, videos, state, latents, blocks, 0.0), trace)


def _joined(policy: Policy, blocks, trace: bool) -> Video:
    if trace:
        blocks, calls = zip(*traced_blocks(policy, blocks), strict=True)
    else:
        blocks, calls = list(blocks), []
    latents = np.concatenate([block.latents for block in blocks], axis=1)
    return Video(latents, blocks[-1].state, [of_block.block for of_block in calls])
