"""a_*: schedule tables, warped step lists, and the conversions between x0, velocity and noisy
latents.

A group's name gives its shift and, after `set`, its number of steps: shift5, set50. Everything else
that makes a table stands in the config, whose entry of a group's name, if there is one, overrides
it for that group alone.
"""

import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from astrolabe_jax import schedule
from astrolabe_jax.schedule import T_MAX, Schedule
from tests.golden.entry import CONVERSION, TABLE, Entries, Entry, Unsupported
from tests.golden.files import GoldenFile

GROUP = re.compile(r"(?:shift(?P<shift>[\d.]+))?_?(?:set(?P<steps>\d+))?")
# Field of the config -> ours; what is absent keeps the value of the released models.
FIELDS = {"num_inference_steps": "num_steps"} | {
    name: name
    for name in (
        "shift",
        "sigma_min",
        "sigma_max",
        "extra_one_step",
        "denoising_strength",
        "inverse_timesteps",
        "reverse_sigmas",
    )
}
INPUTS = ("x0", "noise", "flow", "t", "t_int", "t_mid")


def entries(file: GoldenFile) -> Entries:
    for group in file.groups():
        yield _group(file, group)


def _group(file: GoldenFile, group: str) -> Entries:
    table = _schedule(file.config, group)
    yield _tables(file, group, table)
    if f"{group}/x0" in file:
        yield _conversions(file, group, table)


def _schedule(config: dict, group: str) -> Schedule:
    """The table of a group. Raises Unsupported for a setting, or a name, whose meaning is not known
    here.
    """
    own, name = config.get(group), GROUP.fullmatch(group)
    if own is None and name is None:
        raise Unsupported(
            f"group {group!r} is named neither shift<number> nor set<steps>, and the config has no "
            "entry"
        )
    settings = {key: value for key, value in config.items() if not isinstance(value, dict)} | (
        own or {}
    )
    scale = settings.pop("num_train_timesteps", T_MAX)
    unknown = sorted(settings.keys() - FIELDS.keys())
    if unknown or scale != T_MAX:
        raise Unsupported(
            f"group {group!r}: settings {unknown} are not known, and num_train_timesteps is {scale}"
        )
    fields = {FIELDS[key]: value for key, value in settings.items()}
    if name is not None and name["shift"]:
        fields["shift"] = float(name["shift"])
    if name is not None and name["steps"]:
        fields["num_steps"] = int(name["steps"])
    return Schedule(**fields)


def _tables(file: GoldenFile, group: str, table: Schedule) -> Iterator[Entry]:
    # 1 - sigma cancels in the reference's float32.
    tolerance = CONVERSION if table.reverse_sigmas else TABLE
    yield Entry(f"{group}/sigmas", lambda: schedule.sigmas(table), tolerance)
    yield Entry(f"{group}/timesteps", lambda: schedule.timesteps(table), tolerance)
    yield Entry(f"{group}/training_weights", lambda: schedule.training_weights(table), CONVERSION)
    for key in file.keys(f"{group}/warped"):
        steps = file[key.replace("/warped", "/steps")]
        yield Entry(key, lambda steps=steps: schedule.warp(steps, table), tolerance)


def _conversions(file: GoldenFile, group: str, table: Schedule) -> Iterator[Entry]:
    given = {
        name: jnp.asarray(file[f"{group}/{name}"]) for name in INPUTS if f"{group}/{name}" in file
    }
    x0, noise, flow = given["x0"], given["noise"], given["flow"]
    functions = {
        "add_noise": lambda sigma: schedule.add_noise(x0, noise, sigma),
        "flow_to_x0": lambda sigma: schedule.velocity_to_x0(x0, flow, sigma),
        "x0_to_flow": lambda sigma: schedule.x0_to_velocity(x0, flow, sigma),
    }

    def sigma(t: str):
        return schedule.sigma_of(given[t], table, "lookup")

    for suffix, t in (("", "t"), ("_int", "t_int")):
        for name, function in functions.items():
            yield Entry(f"{group}/{name}{suffix}", lambda f=function, t=t: f(sigma(t)), CONVERSION)
    for name, t in (("step", "t"), ("step_mid", "t_mid")):
        yield Entry(
            f"{group}/{name}", lambda t=t: _euler(table, x0, flow, np.asarray(given[t])), CONVERSION
        )


def _euler(table: Schedule, x_t, velocity, t):
    """One Euler step of the samples that t [n] is given for, the first n.

    The reference sends all of them to the end as soon as one t is the last entry.
    """
    nearest = np.argmin(np.abs(schedule.timesteps(table)[:, None] - t[None]), axis=0)
    to_final = bool(np.any(nearest + 1 >= table.num_steps))
    return schedule.euler_step(x_t[: len(t)], velocity[: len(t)], t, table, to_final)
