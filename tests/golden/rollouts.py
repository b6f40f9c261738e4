"""c_*: cached rollouts, call by call: plain videos, scene strings, and prompts switched with a
re-cache.

The stored cache indices are those of the reference's buffer: after a call the buffer has seen every
frame up to the block's end, and holds at most its capacity. Our ring buffer has no such indices;
they follow from the blocks that our rollout went through and from the slots of its cache.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from astrolabe_jax import schedule
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.rope import inverse, rope_table, rotate
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.schedule import Schedule
from astrolabe_jax.streaming import scenes, streams
from astrolabe_jax.types import BlockPlan, Policy, PromptBatch, StreamState, Timeline, VideoBatch
from tests.golden.dit import Dit
from tests.golden.entry import EXACT, ROLLOUT, TABLE, Entry, Unsupported
from tests.golden.files import GoldenFile
from tests.traces import Calls, Trace, traced, traced_blocks

SCENARIO = {
    "name",
    "pipe",
    "B",
    "block",
    "frames",
    "local",
    "sink",
    "shift",
    "init",
    "ctx",
    "steps",
    "warp",
    "infer",
    "flow",
    "gsink",
    "prompts",
    "switch",
    "fps",
}


class Given(NamedTuple):
    """A call outside the denoising loop: a block of initial latents, or a re-cache."""

    start: int  # first frame of its input
    before_call: int  # flattened denoising call that follows
    trace: Trace


class Sampled(NamedTuple):
    """The calls of one block."""

    start: int  # first frame in the video
    stop: int
    held: int  # frames in the cache after it
    cut: bool
    trace: Trace


class Result(NamedTuple):
    """One rollout of ours, in the terms of the stored file."""

    latents: Any
    given: list[Given]
    sampled: list[Sampled]
    cache_k: Any
    cache_v: Any


def entries(file: GoldenFile) -> Iterator[Entry]:
    scenario, fsl = file.config["scenario"], file.config["fsl"]
    _refuse_unsupported(scenario)
    result = functools.cache(lambda: _run(file))
    warped = _steps(scenario)
    calls, capacity = len(warped) + 1, _capacity(scenario) * fsl

    def trace(name: str):
        return np.stack([np.asarray(getattr(block.trace, name)) for block in result().sampled])

    def index(number_of: Callable[[Sampled], int], scale: int = fsl):
        """[blocks, calls]: a number that all calls of a block share, by default frames as
        tokens.
        """
        return np.stack([np.full(calls, number_of(block) * scale) for block in result().sampled])

    yield Entry("denoising_step_list", lambda: warped, TABLE)
    yield Entry("call_timestep", lambda: trace("timestep"), TABLE)
    yield Entry("call_start_token", lambda: index(lambda block: block.start), EXACT)
    yield Entry("call_global_end", lambda: index(lambda block: block.stop), EXACT)
    yield Entry("call_local_end", lambda: index(lambda block: block.held), EXACT)
    yield Entry("call_scene_cut", lambda: index(lambda block: block.cut, 1), EXACT)
    for key, name in (("call_x0", "x0"), ("call_flow", "velocity")):
        if key in file:
            # A file with `flow: false` leaves the clean pass out.
            stored = max(file[key].shape[1], calls if scenario["flow"] else calls - 1)
            yield Entry(key, lambda name=name, n=stored: trace(name)[:, :n], ROLLOUT)
    for group in file.groups():
        if group.startswith("ctx"):
            yield from _context_entries(file, group, result)
    yield Entry("latents", lambda: result().latents, ROLLOUT)
    yield Entry("cache0_k", lambda: _padded(result().cache_k, capacity), ROLLOUT)
    yield Entry("cache0_v", lambda: _padded(result().cache_v, capacity), ROLLOUT)
    yield Entry("cache0_global_end", lambda: index(lambda block: block.stop)[-1, -1:], EXACT)
    yield Entry("cache0_local_end", lambda: index(lambda block: block.held)[-1, -1:], EXACT)


def _refuse_unsupported(scenario: dict) -> None:
    unknown = sorted(key for key in scenario if key not in SCENARIO and scenario[key])
    if unknown:
        raise Unsupported(f"scenario fields {unknown} are not known to this runner")


def _steps(scenario: dict) -> tuple[float, ...]:
    """The timesteps that the network is given."""
    if scenario["warp"]:
        return schedule.warp(scenario["steps"], Schedule(scenario["shift"]))
    return tuple(float(t) for t in scenario["steps"])


def _capacity(scenario: dict) -> int:
    """Frames of the reference's buffer: those of the window, or, with global attention, all of the
    video.
    """
    return scenario["init"] + scenario["frames"] if scenario["local"] == -1 else scenario["local"]


def _run(file: GoldenFile) -> Result:
    scenario, config, dit = file.config["scenario"], file.config, Dit(file)
    layout = Layout(
        block=scenario["block"],
        window=scenario["local"],
        sink=scenario["sink"],
        positions="relative" if scenario["infer"] else "absolute",
        max_global=config["max_global"] // config["fsl"],
        faithful_sinks=True,
    )
    shift = Schedule(scenario["shift"])
    sampler = Sampler(
        steps=_steps(scenario),
        context_noise=float(scenario["ctx"]),
        schedule=shift,
        sigma_source="lookup",
    )
    policy = traced(Policy(dit.params, None, dit.graphdef, dit.config, layout, sampler))
    videos = _videos(file, layout)
    blocks = list(_blocks(file, policy, videos))
    last, _ = blocks[-1]
    end = last.plan.start + last.plan.count
    stored = _reference_order(policy, last.state, end, rotated=not scenario["infer"])
    latents = np.concatenate([block.latents for block, _ in blocks], axis=1)
    return Result(latents, *_calls(blocks, scenario["init"], _capacity(scenario)), *stored)


def _reference_order(policy: Policy, state: StreamState, end: int, rotated: bool):
    """Return keys and values [B, slots L, A, K] of the first layer in the published code's order.

    They are those after a rollout to frame `end`. That order is the sink, then the frames of the
    window, oldest first, then places that are not in use. rotated: keys rotated at the frames of
    the present count (the published training class), or un-rotated (its inference class).
    """
    layout = policy.layout
    slots = state.recent.shape[1]
    grid = policy.config.grid(state.recent.shape[3:])
    place = np.arange(slots)
    frames = place
    slot = place
    if end > slots:
        frames = np.where(place < layout.kept, place, end - slots + place)
        ring = layout.kept + (frames - layout.kept) % (slots - layout.kept)
        slot = np.where(frames < layout.kept, frames, ring)

    def ordered(part):
        framed = part[0].reshape(part.shape[1], slots, -1, *part.shape[3:])
        return framed[:, slot].reshape(part.shape[1:])

    k, v = map(ordered, state.cache)
    raw = min(layout.kept, slots) * grid[0] * grid[1] if layout.sink_moves else 0
    cos, sin = rope_table(frames, grid, policy.config.head_dim)
    if rotated and raw:
        k = k.at[:, :raw].set(rotate(k[:, :raw], (cos[:raw], sin[:raw])))
    if not rotated:
        k = k.at[:, raw:].set(rotate(k[:, raw:], inverse((cos[raw:], sin[raw:]))))
    return k, v


def _blocks(
    file: GoldenFile, policy: Policy, videos: VideoBatch
) -> Iterator[tuple[streams.SampledBlock, Calls]]:
    """Every block of the stored rollout, the given ones first, by the driver of all videos."""
    scenario, config = file.config["scenario"], file.config
    shape = (policy.config.in_channels, config["lat_h"], config["lat_w"])
    state = streams.begin(policy.config, policy.layout, scenario["B"], _capacity(scenario), shape)
    first = scenario["init"]
    given = streams.blocks_between(videos, 0, first)
    if given:
        latents = _initial_latents(file)
        blocks = streams.cache_blocks(policy, videos, state, latents, given, 0.0)
        for block, calls in traced_blocks(policy, blocks):
            # its memory is taken by the next one
            state = block.state
            yield block, calls
    noise = _noise(file)

    def noise_of(plan: BlockPlan):
        return noise[:, :, plan.frame - first : plan.frame - first + plan.count]

    rest = range(given.stop, len(videos.blocks))
    blocks = streams.sample_blocks(policy, videos, state, rest, noise_of)
    yield from traced_blocks(policy, blocks)


def _calls(blocks, first: int, slots: int) -> tuple[list[Given], list[Sampled]]:
    """What our rollout called, in the terms of the stored file; `first` frames were given."""
    given = []
    sampled = []
    for block, calls in blocks:
        plan = block.plan
        if plan.frame < first:
            given.append(Given(plan.frame, 0, calls.block))
            continue
        if calls.change is not None:
            before = len(sampled) * len(calls.block.timestep)
            given.append(Given(plan.change.frames[0], before, calls.change))
        held = min(plan.start + plan.count, slots)
        stop = plan.frame + plan.count
        sampled.append(Sampled(plan.frame, stop, held, plan.cut, calls.block))
    return given, sampled


def _videos(file: GoldenFile, layout: Layout) -> VideoBatch:
    """The videos of a stored rollout: each sample has prompts of its own."""
    scenario = file.config["scenario"]
    batch = scenario["B"]
    if scenario["prompts"] is None and scenario["switch"] is None:
        names = [[f"p{sample}"] for sample in range(batch)]
        plans = _planned(scenario, layout, [0] * len(_sampled_blocks(scenario, layout)), [])
    else:
        file.under("prompt_embeds/")  # also those of scenes that the video does not reach
        plans = _changing_plans(scenario, layout)
        count = max(plan.scene for plan in plans) + 1
        names = [
            [_scene_key(file, scene, sample) for scene in range(count)] for sample in range(batch)
        ]
    distinct = list(dict.fromkeys(name for row in names for name in row))
    embeddings = np.stack([file[f"prompt_embeds/{name}"] for name in distinct])
    timelines = tuple(Timeline(tuple(row), tuple(plans)) for row in names)
    numbers = np.arange(batch, dtype=np.int32)
    prompts = PromptBatch(("",) * batch, numbers, np.zeros(batch, np.int32))
    rows = {name: row for row, name in enumerate(distinct)}
    keys = jax.random.split(jax.random.key(0), batch)  # not used: the noise is stored
    return VideoBatch(prompts, timelines, rows, embeddings, keys)


def _scene_key(file: GoldenFile, scene: int, sample: int) -> str:
    """The embedding of a scene: stored as p{scene}.{sample}, or as p{scene} for a batch of one."""
    name = f"p{scene}.{sample}"
    return name if f"prompt_embeds/{name}" in file else f"p{scene}"


def _sampled_blocks(scenario: dict, layout: Layout) -> list:
    """The blocks behind the given frames."""
    given, total = scenario["init"], scenario["init"] + scenario["frames"]
    return [block for block in layout.blocks(total) if block.start >= given]


def _planned(scenario: dict, layout: Layout, scene_of, cuts, transition="flush") -> list[BlockPlan]:
    """The blocks of a video, the given ones first; `scene_of` and `cuts` are of the others."""
    blocks = layout.blocks(scenario["init"] + scenario["frames"])
    scene_of = [0] * (len(blocks) - len(scene_of)) + scene_of
    rules = scenes.Rules(transition, global_sink=bool(scenario["gsink"]), published=True)
    return scenes.plan_blocks(blocks, scene_of, cuts, layout, _capacity(scenario), rules)


def _changing_plans(scenario: dict, layout: Layout) -> list[BlockPlan]:
    """The blocks of a video whose prompts change: at frames with a re-cache, or in a string."""
    blocks = _sampled_blocks(scenario, layout)
    if scenario["switch"] is not None:
        scene_of = scenes.scenes_by_frame(scenario["switch"], [block.start for block in blocks])
        cuts = [False] * (len(scenario["switch"]) + 1)
        return _planned(scenario, layout, scene_of, cuts, "recache")
    prompt = scenario["prompts"] if isinstance(scenario["prompts"], str) else scenario["prompts"][0]
    parsed = scenes.parse_published(prompt, scenario["block"], scenario.get("fps", 16), 4)
    scene_of = scenes.scenes_by_length(parsed, len(blocks))
    return _planned(scenario, layout, scene_of, [scene.cut for scene in parsed])


def _noise(file: GoldenFile) -> np.ndarray:
    """[steps, B, F, C, H, W]: the initial noise, then what is added before each later step."""
    noise, renoise = file["noise"], file["renoise"]
    # the batch and the frames of a block are one axis, batch first
    blocks, steps = renoise.shape[:2]
    split = renoise.reshape(
        blocks, steps, noise.shape[0], noise.shape[1] // blocks, *noise.shape[2:]
    )
    return np.concatenate([noise[None], np.moveaxis(split, 0, 2).reshape(steps, *noise.shape)])


def _initial_latents(file: GoldenFile) -> np.ndarray | None:
    """The given frames, which are also the first frames of the output."""
    given = file.config["scenario"]["init"]
    if not given:
        return None
    key = next((key for key in file.keys() if "init" in key), None)
    return file["latents"][:, :given] if key is None else file[key]


def _context_entries(file: GoldenFile, group: str, result: Callable[[], Result]) -> Iterator[Entry]:
    """ctxJ/*: the J-th call outside the denoising loop."""

    def given() -> Given:
        return result().given[int(group.removeprefix("ctx"))]

    tokens = file.config["fsl"]
    for key in file.keys(f"{group}/"):
        name = key.rpartition("/")[2]
        if "input" in name:
            yield Entry(key, lambda: given().trace.inputs[0], ROLLOUT)
        elif "flow" in name:
            yield Entry(key, lambda: given().trace.velocity[0], ROLLOUT)
        elif "x0" in name:
            yield Entry(key, lambda: given().trace.x0[0], ROLLOUT)
        elif "time" in name:  # one value for the block, in the reference as [B, 1]
            yield Entry(
                key, lambda shape=file[key].shape: np.full(shape, given().trace.timestep[0]), EXACT
            )
        elif "start" in name:
            yield Entry(
                key, lambda shape=file[key].shape: np.full(shape, given().start * tokens), EXACT
            )
        elif "before" in name:
            yield Entry(
                key, lambda shape=file[key].shape: np.full(shape, given().before_call), EXACT
            )


def _padded(cache, tokens: int) -> np.ndarray:
    """The reference allocates its whole buffer at once: slots not yet reached are zero."""
    return np.pad(np.asarray(cache), ((0, 0), (0, tokens - cache.shape[1]), (0, 0), (0, 0)))
