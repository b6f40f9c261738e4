"""a_*: schedule tables, warped step lists, and the conversions between x0, velocity and noisy latents."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from astrolabe_jax import schedule
from astrolabe_jax.schedule import Schedule
from tests.golden.entry import CONVERSION, TABLE, Entry
from tests.golden.files import GoldenFile

SET_SHIFT = 5.0  # `setN` holds the table of set_timesteps(N) on the scheduler of the released models
INPUTS = ("x0", "noise", "flow", "t", "t_int", "t_mid")


def entries(file: GoldenFile) -> Iterator[Entry]:
    for group in file.groups():
        if group.startswith("shift"):
            table = _schedule(file.config, float(group.removeprefix("shift")), file.config["num_train_timesteps"])
            yield from _tables(file, group, table)
            yield from _conversions(file, group, table)
        elif group.startswith("set"):
            table = _schedule(file.config, SET_SHIFT, int(group.removeprefix("set")))
            yield from _tables(file, group, table)


def _schedule(config: dict, shift: float, num_steps: int) -> Schedule:
    return Schedule(shift, num_steps, sigma_min=config["sigma_min"], extra_one_step=config["extra_one_step"])


def _tables(file: GoldenFile, group: str, table: Schedule) -> Iterator[Entry]:
    functions = {"sigmas": schedule.sigmas, "timesteps": schedule.timesteps}
    for name, function in functions.items():
        yield Entry(f"{group}/{name}", lambda function=function: function(table), TABLE)
    weights = f"{group}/training_weights"
    if weights in file:
        yield Entry(weights, lambda: schedule.training_weights(table), CONVERSION)
    for key in file.keys(f"{group}/warped"):
        steps = file[key.replace("/warped", "/steps")]
        yield Entry(key, lambda steps=steps: schedule.warp(steps, table), TABLE)


def _conversions(file: GoldenFile, group: str, table: Schedule) -> Iterator[Entry]:
    given = {name: file[f"{group}/{name}"] for name in INPUTS if f"{group}/{name}" in file}
    x0, noise, flow = given["x0"], given["noise"], given["flow"]
    for suffix, t in (("", "t"), ("_int", "t_int")):
        if t not in given:
            continue
        sigma = schedule.sigma_of(given[t], table, "lookup")
        functions = {
            "add_noise": lambda sigma: schedule.add_noise(x0, noise, sigma),
            "flow_to_x0": lambda sigma: schedule.velocity_to_x0(x0, flow, sigma),
            "x0_to_flow": lambda sigma: schedule.x0_to_velocity(x0, flow, sigma),
        }
        for name, function in functions.items():
            if f"{group}/{name}{suffix}" in file:
                yield Entry(f"{group}/{name}{suffix}", lambda f=function, s=sigma: f(s), CONVERSION)
    for name, t in (("step", "t"), ("step_mid", "t_mid")):
        if f"{group}/{name}" in file:
            n = len(given[t])
            yield Entry(
                f"{group}/{name}", lambda t=given[t], n=n: _euler(table, jnp.asarray(x0[:n]), flow[:n], t), CONVERSION
            )


def _euler(table: Schedule, x_t, velocity, t):
    """One Euler step; the reference sends a whole batch to the end as soon as one of its t is the last entry."""
    nearest = np.argmin(np.abs(schedule.timesteps(table)[:, None] - t[None]), axis=0)
    return schedule.euler_step(x_t, velocity, t, table, to_final=bool(np.any(nearest + 1 >= table.num_steps)))
