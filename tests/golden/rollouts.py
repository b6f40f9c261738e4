"""c_*: cached rollouts, call by call. Scene and prompt switching belong to the next issue.

The stored cache indices are those of the reference's buffer: after a call the buffer has seen every frame up to the
block's end, and holds at most its capacity. Our ring buffer has no such indices; they follow from the blocks that our
rollout went through and from the slots of its cache.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from astrolabe_jax import schedule
from astrolabe_jax.models.wan.cache import frames_of, init_cache, reference_order
from astrolabe_jax.models.wan.config import Block, Layout
from astrolabe_jax.rollout import Sampler, Trace, noise_from_array, rollout
from astrolabe_jax.schedule import Schedule
from tests.golden.dit import Dit
from tests.golden.entry import EXACT, ROLLOUT, TABLE, Entry, Unsupported
from tests.golden.files import GoldenFile

SCENARIO = {
    "name", "pipe", "B", "block", "frames", "local", "sink", "shift", "init", "ctx", "steps", "warp", "infer", "flow",
    "gsink", "prompts", "switch",
}  # fmt: skip


class Result(NamedTuple):
    """One rollout of ours, in the terms of the stored file."""

    latents: Any
    given: list[tuple[Block, Trace]]  # blocks of initial latents
    sampled: list[tuple[Block, Trace]]
    slots: int  # frames that the cache has room for
    cache_k: Any
    cache_v: Any


def entries(file: GoldenFile) -> Iterator[Entry]:
    scenario, fsl = file.config["scenario"], file.config["fsl"]
    _refuse_unsupported(scenario)
    result = functools.cache(lambda: _run(file))
    warped = _steps(scenario)
    calls, capacity = len(warped) + 1, _capacity(scenario) * fsl

    def trace(name: str):
        return np.stack([np.asarray(getattr(record, name)) for _, record in result().sampled])

    def index(frame_of: Callable[[Block], int]):
        """[blocks, calls] tokens: an index into the video or the cache, which all calls of a block share."""
        return np.stack([np.full(len(record.timestep), frame_of(block)) * fsl for block, record in result().sampled])

    def held(block: Block):
        return min(block.stop, result().slots)

    yield Entry("denoising_step_list", lambda: warped, TABLE)
    yield Entry("call_timestep", lambda: trace("timestep"), TABLE)
    yield Entry("call_start_token", lambda: index(lambda block: block.start), EXACT)
    yield Entry("call_global_end", lambda: index(lambda block: block.stop), EXACT)
    yield Entry("call_local_end", lambda: index(held), EXACT)
    yield Entry("call_scene_cut", lambda: np.zeros(trace("timestep").shape, bool), EXACT)
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
    yield Entry("cache0_local_end", lambda: [result().cache_k.shape[1]], EXACT)


def _refuse_unsupported(scenario: dict) -> None:
    unknown = sorted(key for key in scenario if key not in SCENARIO and scenario[key])
    if unknown:
        raise Unsupported(f"scenario fields {unknown} are not known to this runner")
    if scenario["prompts"] is not None or scenario["switch"] is not None:
        raise Unsupported(f"pipeline {scenario['pipe']!r}: scene and prompt switching are not supported yet")


def _steps(scenario: dict) -> tuple[float, ...]:
    """The timesteps that the network is given."""
    if scenario["warp"]:
        return schedule.warp(scenario["steps"], Schedule(scenario["shift"]))
    return tuple(float(t) for t in scenario["steps"])


def _capacity(scenario: dict) -> int:
    """Frames of the reference's buffer: those of the window, or, with global attention, all of the video."""
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
        steps=_steps(scenario), context_noise=float(scenario["ctx"]), schedule=shift, sigma_source="lookup"
    )
    given, total = scenario["init"], scenario["init"] + scenario["frames"]
    latent_hw = (config["lat_h"], config["lat_w"])
    text = np.stack([file[key] for key in sorted(file.keys("prompt_embeds/p"), key=_prompt_index)])

    @jax.jit
    def run(params, text, noise, initial):
        cache = init_cache(dit.config, layout, scenario["B"], total, latent_hw, slots=_capacity(scenario))
        draw = noise_from_array(noise, given)
        latents, cache, traces = rollout(
            dit.graphdef, params, None, text, draw, frames=scenario["frames"], latent_hw=latent_hw, layout=layout,
            sampler=sampler, initial_latents=initial, cache=cache, trace=True,
        )  # fmt: skip
        stored = reference_order(cache, 0, layout, total, dit.config, latent_hw, rotated=not scenario["infer"])
        return latents, traces, cache, *stored

    latents, traces, cache, cache_k, cache_v = run(dit.params, text, _noise(file), _initial_latents(file))
    passes = list(zip(layout.blocks(total), traces, strict=True))
    first = given // scenario["block"]
    return Result(latents, passes[:first], passes[first:], frames_of(cache, config["fsl"]), cache_k, cache_v)


def _noise(file: GoldenFile) -> np.ndarray:
    """[steps, B, F, C, H, W]: the initial noise, then what is added before each later step."""
    noise, renoise = file["noise"], file["renoise"]
    blocks, steps = renoise.shape[:2]  # the batch and the frames of a block are one axis, batch first
    split = renoise.reshape(blocks, steps, noise.shape[0], noise.shape[1] // blocks, *noise.shape[2:])
    return np.concatenate([noise[None], np.moveaxis(split, 0, 2).reshape(steps, *noise.shape)])


def _initial_latents(file: GoldenFile) -> np.ndarray | None:
    """The given frames, which are also the first frames of the output."""
    given = file.config["scenario"]["init"]
    if not given:
        return None
    key = next((key for key in file.keys() if "init" in key), None)
    return file["latents"][:, :given] if key is None else file[key]


def _context_entries(file: GoldenFile, group: str, result: Callable[[], Result]) -> Iterator[Entry]:
    """ctxJ/*: the pass over the J-th block of initial latents, before the first denoising call."""

    def given():
        return result().given[int(group.removeprefix("ctx"))]

    tokens = file.config["fsl"]
    for key in file.keys(f"{group}/"):
        name = key.rpartition("/")[2]
        if "input" in name:
            yield Entry(key, lambda: given()[1].inputs[0], ROLLOUT)
        elif "flow" in name:
            yield Entry(key, lambda: given()[1].velocity[0], ROLLOUT)
        elif "x0" in name:
            yield Entry(key, lambda: given()[1].x0[0], ROLLOUT)
        elif "time" in name:  # one value for the block, in the reference as [B, 1]
            yield Entry(key, lambda shape=file[key].shape: np.full(shape, given()[1].timestep[0]), EXACT)
        elif "start" in name:
            yield Entry(key, lambda shape=file[key].shape: np.full(shape, given()[0].start * tokens), EXACT)
        elif "before" in name:  # given blocks come first
            yield Entry(key, lambda shape=file[key].shape: given() and np.zeros(shape), EXACT)


def _prompt_index(key: str) -> int:
    return int(key.removeprefix("prompt_embeds/p"))


def _padded(cache, tokens: int) -> np.ndarray:
    """The reference allocates its whole buffer at once: slots not yet reached are zero."""
    return np.pad(np.asarray(cache), ((0, 0), (0, tokens - cache.shape[1]), (0, 0), (0, 0)))
