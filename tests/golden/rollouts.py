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

from astrolabe_jax import schedule, stream
from astrolabe_jax.models.wan.cache import init_cache, reference_order
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rollout import Sampler, Trace, noise_from_array, rollout
from astrolabe_jax.schedule import Schedule
from astrolabe_jax.stream import Policy
from astrolabe_jax.streaming import scenes
from tests.golden.dit import Dit
from tests.golden.entry import EXACT, ROLLOUT, TABLE, Entry, Unsupported
from tests.golden.files import GoldenFile
from tests.meshes import ONE

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
    if scenario["prompts"] is None and scenario["switch"] is None:
        return _plain(file, dit, layout, sampler)
    return _streamed(file, dit, layout, sampler)


def _plain(file: GoldenFile, dit: Dit, layout: Layout, sampler: Sampler) -> Result:
    """One prompt for the whole video: the rollout that training uses."""
    scenario, config = file.config["scenario"], file.config
    given, total = scenario["init"], scenario["init"] + scenario["frames"]
    latent_hw = (config["lat_h"], config["lat_w"])
    text = np.stack([file[key] for key in sorted(file.keys("prompt_embeds/p"), key=_prompt_index)])

    @jax.jit
    def run(params, text, noise, initial):
        cache = init_cache(
            dit.config, layout, scenario["B"], total, latent_hw, slots=_capacity(scenario)
        )
        draw = noise_from_array(noise, given)
        latents, cache, traces = rollout(
            dit.graphdef,
            params,
            None,
            text,
            draw,
            frames=scenario["frames"],
            latent_hw=latent_hw,
            layout=layout,
            sampler=sampler,
            initial_latents=initial,
            cache=cache,
            trace=True,
        )
        stored = reference_order(
            cache, 0, layout, total, dit.config, latent_hw, rotated=not scenario["infer"]
        )
        return latents, traces, *stored

    latents, traces, cache_k, cache_v = run(dit.params, text, _noise(file), _initial_latents(file))
    passes = list(zip(layout.blocks(total), traces, strict=True))
    first = given // scenario["block"]
    sampled = [
        Sampled(block.start, block.stop, min(block.stop, _capacity(scenario)), False, trace)
        for block, trace in passes[first:]
    ]
    return Result(
        latents,
        [Given(block.start, 0, trace) for block, trace in passes[:first]],
        sampled,
        cache_k,
        cache_v,
    )


def _streamed(file: GoldenFile, dit: Dit, layout: Layout, sampler: Sampler) -> Result:
    """Prompts that change: the sampler of streams."""
    scenario, config, slots = (
        file.config["scenario"],
        file.config,
        _capacity(file.config["scenario"]),
    )
    latent_hw, given = (config["lat_h"], config["lat_w"]), scenario["init"]
    policy = Policy(dit.graphdef, dit.params, None, 1.0, dit.config, layout, sampler, ONE)
    steps = _timeline(scenario, layout, slots)
    noise = _noise(file)
    file.under("prompt_embeds/")  # also those of scenes that the video does not reach

    def text(scene: int):
        embeddings = _scene_prompts(file, scene)
        return stream.encode_text(dit.graphdef, dit.params, None, 1.0, embeddings, mesh=policy.mesh)

    def block_noise(step):
        return noise[:, :, step.frame - given : step.frame - given + step.count]

    initial = _initial_latents(file)
    pieces = list(
        stream.stream(
            policy, text, steps, block_noise, slots, scenario["B"], latent_hw, initial, trace=True
        )
    )
    made, sampled = [], []
    for piece in pieces:
        if piece.step is None:
            made.append(
                Given(sum(block.latents.shape[1] for block in pieces[: len(made)]), 0, piece.trace)
            )
            continue
        step, calls = piece.step, len(sampler.steps) + 1
        if piece.change is not None:
            made.append(Given(step.change.frames[0], len(sampled) * calls, piece.change))
        held = min(step.start + step.count, slots)
        sampled.append(Sampled(step.frame, step.frame + step.count, held, step.cut, piece.trace))
    end = steps[-1].start + steps[-1].count
    stored = reference_order(
        pieces[-1].cache, 0, layout, end, dit.config, latent_hw, rotated=not scenario["infer"]
    )
    latents = np.concatenate([piece.latents for piece in pieces], axis=1)
    return Result(latents, made, sampled, *stored)


def _timeline(scenario: dict, layout: Layout, slots: int) -> list[scenes.Step]:
    given, total = scenario["init"], scenario["init"] + scenario["frames"]
    blocks = [block for block in layout.blocks(total) if block.start >= given]
    if scenario["switch"] is not None:
        rules = scenes.Rules("recache", global_sink=bool(scenario["gsink"]), published=True)
        scene_of = scenes.scenes_by_frame(scenario["switch"], [block.start for block in blocks])
        return scenes.timeline(
            blocks, scene_of, [False] * (len(scenario["switch"]) + 1), layout, slots, rules
        )
    prompt = scenario["prompts"] if isinstance(scenario["prompts"], str) else scenario["prompts"][0]
    parsed = scenes.parse_published(prompt, scenario["block"], scenario.get("fps", 16))
    scene_of = scenes.scenes_by_length(parsed, len(blocks))
    cuts = [scene.cut for scene in parsed]
    return scenes.timeline(
        blocks, scene_of, cuts, layout, slots, scenes.Rules("flush", published=True)
    )


def _scene_prompts(file: GoldenFile, scene: int) -> np.ndarray:
    """Embeddings [B, S, E] of a scene: stored as p{scene}.{sample}, or as p{scene} for a batch of
    one.
    """
    batch = file.config["scenario"]["B"]
    keys = [f"prompt_embeds/p{scene}.{sample}" for sample in range(batch)]
    return np.stack([file[key if key in file else f"prompt_embeds/p{scene}"] for key in keys])


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


def _prompt_index(key: str) -> int:
    return int(key.removeprefix("prompt_embeds/p"))


def _padded(cache, tokens: int) -> np.ndarray:
    """The reference allocates its whole buffer at once: slots not yet reached are zero."""
    return np.pad(np.asarray(cache), ((0, 0), (0, tokens - cache.shape[1]), (0, 0), (0, 0)))
