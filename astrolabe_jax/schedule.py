"""The flow-matching time axis: the only module that knows what a timestep means.

A timestep t lives on [0, 1000]; sigma in [0, 1] is the share of noise: x_t = (1 - sigma) x0 + sigma
noise, and the network predicts the velocity v = noise - x0 (docs/sampling.md, Schedule). Tables
are built in float64 on the host and kept as float32; the conversions run in float32 on the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

T_MAX = 1000.0  # the timestep of pure noise

SigmaSource = Literal["exact", "lookup"]


@dataclass(frozen=True)
class Schedule:
    """A table of `num_steps` noise levels, decreasing from sigma_max and pushed towards noise by
    `shift`.

    The defaults are those of every released causal Wan model. `extra_one_step` ramps over num_steps
    + 1 points and drops the last; without it the ramp keeps its end.
    """

    shift: float = 5.0
    num_steps: int = 1000
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    extra_one_step: bool = True
    denoising_strength: float = 1.0
    inverse_timesteps: bool = False
    reverse_sigmas: bool = False

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(
                f"Schedule.shift is {self.shift}; it must be positive (5 in every released model)"
            )
        if self.num_steps < 2:
            raise ValueError(
                f"Schedule.num_steps is {self.num_steps}; a table needs at least 2 entries"
            )


@cache
def _sigmas64(schedule: Schedule) -> np.ndarray:
    span = schedule.sigma_max - schedule.sigma_min
    start = schedule.sigma_min + span * schedule.denoising_strength
    points = schedule.num_steps + schedule.extra_one_step
    ramp = np.linspace(start, schedule.sigma_min, points)[: schedule.num_steps]
    if schedule.inverse_timesteps:
        ramp = ramp[::-1]
    table = schedule.shift * ramp / (1 + (schedule.shift - 1) * ramp)
    return 1 - table if schedule.reverse_sigmas else table


def sigmas(schedule: Schedule) -> np.ndarray:
    """Return the noise levels [num_steps], float32 in [0, 1].

    They decrease strictly for the default flags.
    """
    return _sigmas64(schedule).astype(np.float32)


def timesteps(schedule: Schedule) -> np.ndarray:
    """Return the timesteps [num_steps], float32 in [0, 1000]: 1000 times the noise levels."""
    return (_sigmas64(schedule) * T_MAX).astype(np.float32)


def training_weights(schedule: Schedule) -> np.ndarray:
    """Return the loss weight of each table entry [num_steps], float32.

    They are a bell over t, zero at its lowest, and sum to num_steps.
    """
    n = schedule.num_steps
    t = _sigmas64(schedule) * T_MAX
    bell = np.exp(-2 * ((t - n / 2) / n) ** 2)
    bell -= bell.min()
    return (bell * (n / bell.sum())).astype(np.float32)


def warp(steps: Iterable[float], schedule: Schedule) -> tuple[float, ...]:
    """Map raw denoising steps, whole numbers in [0, num_steps], through the table.

    See docs/sampling.md, Denoising steps.

    d becomes the table's entry num_steps - d, with a 0 appended at the end: for shift 5,
    (1000, 750, 500, 250) -> (1000, 937.5, 833.3333, 625).
    """
    extended = np.append(timesteps(schedule), np.float32(0))
    for d in steps:
        if d != int(d) or not 0 <= d <= schedule.num_steps:
            raise ValueError(
                f"denoising step {d} is not a whole number in [0, {schedule.num_steps}]; "
                "give the raw list, or pass already warped steps without warping again"
            )
    return tuple(float(extended[schedule.num_steps - int(d)]) for d in steps)


def sigma_of(t: ArrayLike, schedule: Schedule, source: SigmaSource = "exact") -> Array:
    """Return the noise levels, float32 in [0, 1], of timesteps t in [0, 1000] of any shape.

    'exact' inverts t = 1000 sigma. 'lookup' returns the nearest table entry as the published code
    does, so t = 0 gives 0.00498 at shift 5 and 500 gives 0.5006; the two agree on table entries.
    """
    t = jnp.asarray(t, jnp.float32)
    if source == "exact":
        return t / T_MAX
    if source != "lookup":
        raise ValueError(f"sigma source {source!r} is unknown; use 'exact' or 'lookup'")
    return jnp.asarray(sigmas(schedule))[_nearest(t, schedule)]


def add_noise(x0: Array, noise: Array, sigma: ArrayLike) -> Array:
    """Return x_t = (1 - sigma) x0 + sigma noise, computed in float32, in the dtype of the noise.

    The axes of sigma are the first ones of x0.
    """
    sigma = _leading(sigma, x0)
    return ((1 - sigma) * _f32(x0) + sigma * _f32(noise)).astype(noise.dtype)


def velocity_to_x0(x_t: Array, velocity: Array, sigma: ArrayLike) -> Array:
    """Return x0 = x_t - sigma v, computed in float32, in the dtype of v.

    sigma: scalar, [B] or [B, F].
    """
    return (_f32(x_t) - _leading(sigma, x_t) * _f32(velocity)).astype(velocity.dtype)


def x0_to_velocity(x_t: Array, x0: Array, sigma: ArrayLike) -> Array:
    """Return v = (x_t - x0) / sigma, computed in float32, in the dtype of x0.

    sigma must not be 0.
    """
    return ((_f32(x_t) - _f32(x0)) / _leading(sigma, x_t)).astype(x0.dtype)


def euler_step(
    x_t: Array,
    velocity: Array,
    t: ArrayLike,
    schedule: Schedule,
    to_final: bool = False,
) -> Array:
    """Step from t to the next table entry: return x + v (sigma_next - sigma).

    After the last entry comes the final sigma, 0, or 1 for a table that runs towards noise.

    Args:
      x_t: [B, ...].
      velocity: as x_t.
      t: [] or [B] or [B, F], looked up in the table.
      schedule: the table.
      to_final: step straight to the final sigma. The published code does so for a whole batch as
        soon as one t is the last entry.
    """
    final = 1.0 if schedule.inverse_timesteps or schedule.reverse_sigmas else 0.0
    levels = np.append(sigmas(schedule), np.float32(final))
    table = jnp.asarray(levels)
    index = _nearest(jnp.asarray(t, jnp.float32), schedule)
    target = final if to_final else table[index + 1]
    return x_t + velocity * _leading(target - table[index], x_t)


def _nearest(t: Array, schedule: Schedule) -> Array:
    """Return the indices of the table entries that are nearest to t."""
    table = jnp.asarray(timesteps(schedule))
    entries = table.reshape((-1,) + (1,) * t.ndim)
    return jnp.argmin(jnp.abs(entries - t[None]), axis=0)


def _leading(sigma: ArrayLike, x: Array) -> Array:
    """Append axes of size 1 to sigma, so that it broadcasts against x from the left."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)
