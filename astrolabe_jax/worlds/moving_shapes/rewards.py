"""Five analytic rewards of the moving-shapes world, measured on decoded pixels, each in [0, 1].

    shapes_vq  visual quality: a crisp, clean, on-palette and well visible shape on a clean
               background
    shapes_mq  motion quality: a shape that moves, at constant velocity, without teleport or flicker
    shapes_ta  text alignment: colour, shape, direction, speed and background as the prompt says
    bounce_mq  the same as shapes_mq for clips of long videos, in which a shape is reflected at the
               borders
    bounce_ta  the same as shapes_ta for them

How they conflict. VQ knows neither the prompt nor motion: what serves it best is the shape that a
decoder draws most sharply, large, in whatever colour stands out, and still. MQ asks for motion, but
counts unsteadiness in pixels, so that slow motion is the safest; it ignores which colour and how
sharp. TA asks for the colour and the speed of the prompt, quick motion included, and forgives blur,
dirt and jitter as long as the shape can be told.

How they measure. Per frame, the background is the median of the border and the shape the pixels
that differ most from it; the coverage of a pixel is its place between the two colours. The covered
area is compared with the renderer's three shapes, drawn at its centroid and of its size
(intersection over union). Over a video, the centroids give the velocity. Every part is graded by a
rational or exponential fall-off, so that a poor video still has a slope to climb, and a reward is
the geometric mean of its parts: a weak part cannot be bought off by the others. Lengths are pixels
of the renderer's own frame size, whatever the size of the frames.

How they see a bounce. The bounce rewards unfold the path first, with at most two turns per axis,
which is as many as the fastest shape makes in 36 frames (use them on clips of about that length):
behind a turn it goes on as in a mirror at the border, so that a proper bounce unfolds to a straight
path. A turn elsewhere costs steadiness, up to that of a misplaced step of TURN_COST pixels. A clip
does not tell a shape that comes back from the border from one that goes the wrong way, so the
direction is right either way along the asked axis.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from astrolabe_jax.worlds.moving_shapes import render, vocabulary

# Reward -> its parts and their exponents: a score is the weighted geometric mean of its parts,
# times the visibility.
EXPONENTS = {
    "shapes_vq": {"visibility": 1.0, "crispness": 0.5, "palette": 0.25, "cleanness": 0.25},
    "shapes_mq": {
        "visibility": 1.0,
        "steadiness": 0.3,
        "motion": 0.3,
        "colour": 0.15,
        "form": 0.1,
        "stillness": 0.15,
    },
    "shapes_ta": {
        "visibility": 1.0,
        "colour": 0.2,
        "shape": 0.2,
        "direction": 0.2,
        "speed": 0.2,
        "background": 0.2,
    },
}
EXPONENTS["bounce_mq"] = EXPONENTS["shapes_mq"]
EXPONENTS["bounce_ta"] = EXPONENTS["shapes_ta"]
TURN_COST = 1.5  # pixels of a misplaced step, as which a turn far from the border counts
TURN_SCALE = 4.0  # pixels, twice the distance from the border at which a turn counts as 0.7 of that
FLOOR = 0.02  # a part of 0 counts as this, so that the others still show in the product
# videos scored at once: one compilation serves every batch size, and the working set stays in cache
CHUNK = 8

_AREAS = {
    "circle": math.pi * render.RADIUS**2,
    "square": 4 * (render.RADIUS - 1) ** 2,
    "triangle": 3 * 3**0.5 * (0.65 * render.RADIUS) ** 2,
}
# standard deviation of an antialiased edge after _smooth, in pixels
_SHARP_EDGE = (1 / 12 + 1 / 2) ** 0.5
_COLOURS = np.array(list(vocabulary.COLOURS.values()), np.float32)
_BACKGROUNDS = np.array(list(vocabulary.BACKGROUNDS.values()), np.float32)


class Target(NamedTuple):
    """What a prompt asks for, in numbers (with a leading B: of a batch)."""

    colour: np.ndarray  # [3], RGB on the 0..255 scale
    shape: np.ndarray  # [3], bool, one-hot over the vocabulary's shapes
    direction: np.ndarray  # [2], unit step (x, y)
    speed: np.ndarray  # [], pixels per frame
    background: np.ndarray  # [3]


class Frame(NamedTuple):
    """What is seen in one frame (with a leading T: in a video); colours are RGB on the 0..255
    scale.
    """

    background: Array  # [3], median of the border
    contrast: Array  # [3], colour of the shape minus background
    centre: Array  # [2], (x, y) in pixels
    area: Array  # [], pixels
    fit: Array  # [3], intersection over union with each of the vocabulary's shapes
    # [], standard deviation in pixels of the blur that would have widened the renderer's edge so
    blur: Array
    inside_error: Array  # [], RMS deviation from the shape's colour well inside it
    outside_error: Array  # [], RMS deviation from the background well outside the shape
    outside: Array  # [h, w], bool, the pixels well outside the shape


def score(frames: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return all five rewards and their parts, from decoded pixels.

    Args:
      frames: uint8 `[B, T, height, width, 3]`, B >= 1, T >= 2.
      prompts: B prompts of the world's vocabulary.

    Returns:
      float32 `[B]` in [0, 1] for each reward, and for each part as `REWARD/PART` (EXPONENTS lists
      them). A video's values do not depend on the rest of the batch.

    Raises:
      ValueError: for frames of another shape or dtype, or for a prompt that is not of this world.
    """
    frames = np.asarray(frames)
    shape = frames.shape
    pixels = frames.dtype == np.uint8 and len(shape) == 5 and shape[-1] == 3
    if not pixels or shape[0] < 1 or min(shape[1:4]) < 2:
        raise ValueError(
            "moving-shapes rewards need at least one uint8 video [B, T, height, width, 3] of at "
            f"least 2 frames and 2x2 pixels, got {frames.dtype} {list(shape)}"
        )
    if len(prompts) != len(frames):
        raise ValueError(
            f"moving-shapes rewards got {len(frames)} videos but {len(prompts)} prompts"
        )
    targets = _targets(prompts)
    chunks = []
    for start in range(0, len(frames), CHUNK):
        # The last chunk is filled up with the first videos.
        rows = np.arange(start, start + CHUNK) % len(frames)
        planes = np.ascontiguousarray(np.moveaxis(frames[rows], -1, 2))
        chunks.append(_score_chunk(planes, Target(*(values[rows] for values in targets))))
    scores = {}
    for reward, parts in EXPONENTS.items():
        for name in (reward, *(f"{reward}/{part}" for part in parts)):
            scores[name] = np.concatenate([chunk[name] for chunk in chunks])[: len(frames)]
    return scores


def _targets(prompts: Sequence[str]) -> Target:
    """Return the numbers of B >= 1 prompts; raise ValueError for a prompt of another world."""
    attributes = [vocabulary.parse(prompt) for prompt in prompts]

    def numbers(table: dict, field: str) -> np.ndarray:
        return np.array([table[getattr(a, field)] for a in attributes], np.float32)

    return Target(
        numbers(vocabulary.COLOURS, "colour"),
        np.array([[shape == a.shape for shape in vocabulary.SHAPES] for a in attributes]),
        numbers(vocabulary.DIRECTIONS, "direction"),
        numbers(vocabulary.SPEEDS, "speed"),
        numbers(vocabulary.BACKGROUNDS, "background"),
    )


def _score_video(video: Array, target: Target) -> dict[str, Array]:
    """Return scores and parts `[]` of one video of colour planes uint8 `[T, 3, h, w]`."""
    planes = video.astype(jnp.float32)
    frames = jax.vmap(_observe)(planes)
    unfolded = frames._replace(centre=_unfold(frames))
    # the asked axis, in whichever way the shape goes along it
    along = target.direction @ _velocity(unfolded.centre, _visible(frames))
    either_way = target._replace(direction=jnp.where(along < 0, -1, 1) * target.direction)
    parts = {
        "shapes_vq": _quality_parts(frames),
        "shapes_mq": _motion_parts(frames, planes),
        "shapes_ta": _alignment_parts(frames, target),
        "bounce_mq": _motion_parts(unfolded, planes),
        "bounce_ta": _alignment_parts(unfolded, either_way),
    }
    # Weighted means may exceed 1 by rounding.
    parts = jax.tree.map(lambda part: jnp.clip(part, 0, 1), parts)
    scores = {}
    for name, exponents in EXPONENTS.items():
        logs = [
            exponent * jnp.log((parts[name][part] + FLOOR) / (1 + FLOOR))
            for part, exponent in exponents.items()
        ]
        scores[name] = jnp.exp(jnp.asarray(sum(logs)))
        scores |= {f"{name}/{part}": value for part, value in parts[name].items()}
    return scores


_score_chunk = jax.jit(jax.vmap(_score_video))


# Parts of the rewards.


def _quality_parts(video: Frame) -> dict[str, Array]:
    """Return the parts of shapes_vq, each `[]`: means over the frames, by visibility."""

    def nearest(colour: Array, palette: np.ndarray) -> Array:
        return jnp.min(_norm(colour[:, None] - palette[None]), axis=1)

    colour = _falloff(nearest(video.background + video.contrast, _COLOURS), 50)
    background = _falloff(nearest(video.background, _BACKGROUNDS), 50)
    inside = _falloff(video.inside_error, 40)
    outside = _falloff(video.outside_error, 20)
    visibility = _visible(video, 110, 160)
    return {
        "visibility": jnp.mean(visibility),
        "crispness": _mean(_falloff(video.blur, 1.0), visibility),
        "palette": _mean(jnp.sqrt(colour * background), visibility),
        "cleanness": _mean(jnp.sqrt(inside * outside), visibility),
    }


def _motion_parts(video: Frame, planes: Array) -> dict[str, Array]:
    """Return the parts of shapes_mq, each `[]`; `planes` is `[T, 3, h, w]`."""
    weight = _visible(video)

    def spread(value: Array) -> Array:
        """Return the RMS deviation from the mean over time, of frames where a shape is seen."""
        return _rms(value - _mean(value, weight)[None], weight)

    velocity = _velocity(video.centre, weight)
    error = jnp.diff(video.centre, axis=0) - velocity[None]
    jitter = _rms(error, jnp.sqrt(weight[1:] * weight[:-1]))
    outside = video.outside[1:] & video.outside[:-1]
    change = _ratio(jnp.sum(outside * jnp.sum(jnp.diff(planes, axis=0) ** 2, 1)), jnp.sum(outside))
    size = jnp.log(jnp.maximum(video.area, 1.0))[:, None]
    steady_size = _falloff(spread(size), 0.1)
    return {
        "visibility": jnp.mean(weight),
        "steadiness": _falloff(jitter, 0.25),
        "motion": 1 - jnp.exp(-((_norm(velocity) / 0.1) ** 2)),
        "colour": _falloff(spread(video.background + video.contrast), 15),
        "form": jnp.sqrt(steady_size * _falloff(spread(video.fit), 0.05)),
        "stillness": _falloff(jnp.sqrt(change), 15),
    }


def _alignment_parts(video: Frame, target: Target) -> dict[str, Array]:
    """Return the parts of shapes_ta, each `[]`."""
    weight = _visible(video)
    velocity = _velocity(video.centre, weight)
    speed = _norm(velocity)
    cosine = jnp.matmul(target.direction, velocity) / jnp.sqrt(speed**2 + 0.03**2)
    fit = video.fit @ target.shape
    margin = fit - jnp.max(jnp.where(target.shape[None], 0, video.fit), axis=1)
    margin = (margin - 0.04) / 0.05  # a circle and a square of one size overlap by 0.83
    told_apart = (1 + margin / jnp.sqrt(1 + margin**2)) / 2
    colour_error = _norm(video.background + video.contrast - target.colour[None])
    background_error = _norm(video.background - target.background[None])
    return {
        "visibility": jnp.mean(weight),
        "colour": _mean(_falloff(colour_error, 50), weight),
        "shape": _mean(told_apart * jnp.minimum(fit / 0.9, 1), weight),
        "direction": ((1 + cosine) / 2) ** 2,
        "speed": _falloff(jnp.log((speed + 0.05) / (target.speed + 0.05)), 0.4),
        "background": jnp.mean(_falloff(background_error, 50)),
    }


# What is seen in a frame.


def _observe(planes: Array) -> Frame:
    """Measure a frame, colour planes float32 `[3, h, w]` on the 0..255 scale."""
    _, height, width = planes.shape
    background, contrast, coverage = _segment(planes)
    # This quiets noise, and makes what follows blind to the subpixel phase of an edge.
    coverage = _smooth(coverage)
    mask = jnp.clip(2 * coverage - 0.5, 0, 1)
    area = jnp.sum(mask)
    x = jnp.arange(width) + 0.5
    y = jnp.arange(height) + 0.5
    moments = [jnp.sum(mask, 0) @ x, jnp.sum(mask, 1) @ y]
    centre = jnp.stack([_ratio(moment, area) for moment in moments])

    def distance(shape: str) -> Array:
        """Return signed distances `[h, w]` to the edge of a shape of this area at the centre."""
        scale = jnp.sqrt(jnp.maximum(area, 1.0) / _AREAS[shape])
        return scale * render.edge_distance(
            shape, (x - centre[0])[None, :] / scale, (y - centre[1])[:, None] / scale, jnp
        )

    def overlap(distance: Array) -> Array:
        """Return the intersection over union of the mask and a shape."""
        drawn = jnp.clip(0.5 - distance, 0, 1)
        return _ratio(jnp.sum(jnp.minimum(mask, drawn)), jnp.sum(jnp.maximum(mask, drawn)))

    distances = [distance(shape) for shape in vocabulary.SHAPES]
    fit = jnp.stack([overlap(distance) for distance in distances])
    share = jax.nn.softmax(fit / 0.02)  # the best shape, without a switch
    nearest = jnp.asarray(sum(share[i] * distance for i, distance in enumerate(distances)))
    inside = nearest < -2
    outside = nearest > 3
    offset = planes - background[:, None, None]
    inside_squares = jnp.sum((offset - contrast[:, None, None]) ** 2, 0)
    outside_squares = jnp.sum(offset**2, 0)
    return Frame(
        background,
        contrast,
        centre,
        area,
        fit,
        _blur(coverage, nearest),
        jnp.sqrt(_ratio(jnp.sum(inside * inside_squares), jnp.sum(inside))),
        jnp.sqrt(_ratio(jnp.sum(outside * outside_squares), jnp.sum(outside))),
        outside,
    )


def _segment(planes: Array) -> tuple[Array, Array, Array]:
    """Return background `[3]`, contrast `[3]` and coverage `[h, w]` in [0, 1] of colour planes `[3,
    h, w]`.
    """
    border = [planes[:, 0], planes[:, -1], planes[:, :, 0], planes[:, :, -1]]
    background = _median(jnp.concatenate(border, axis=1))
    offset = planes - background[:, None, None]

    def project(contrast: Array) -> Array:
        length = jnp.maximum(jnp.sum(contrast**2), 1.0)
        return jnp.clip(jnp.einsum("chw,c->hw", offset, contrast) / length, 0, 1)

    def mean_offset(weight: Array) -> Array:
        return _ratio(jnp.einsum("hw,chw->c", weight, offset), jnp.sum(weight))

    # the most distinct pixels, but biased by the antialiased edge
    rough = mean_offset((jnp.sum(offset**2, axis=0) / 255**2) ** 2)
    contrast = mean_offset(jnp.clip((project(rough) - 0.6) / 0.3, 0, 1))
    return background, contrast, project(contrast)


def _blur(coverage: Array, distance: Array) -> Array:
    """Return the blur `[]` that has widened an edge, in pixels.

    The area in transition between the colours is proportional to the width of the edge, whatever
    its contrast. `coverage` is smooth; `distance` is that to the edge; both are `[h, w]`.
    """
    band = jnp.clip(6.5 - jnp.abs(distance), 0, 1)
    # a normal cumulative distribution, nearly
    sharp = jax.nn.sigmoid(-1.702 / _SHARP_EDGE * distance)
    transition = jnp.sum(band * coverage * (1 - coverage))
    wider = _ratio(transition, jnp.sum(band * sharp * (1 - sharp)))
    return _SHARP_EDGE * jnp.sqrt(jnp.maximum(wider**2 - 1, 0))


def _smooth(plane: Array) -> Array:
    """Blur `[h, w]` with the binomial (1, 2, 1) / 4 per axis: half a square pixel of variance."""
    padded = jnp.pad(plane, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


def _median(values: Array) -> Array:
    """Return the lower median `[...]` of 8-bit levels `[..., n]`.

    It is found by bisection, which is far cheaper than a sort.
    """
    low = jnp.zeros(values.shape[:-1])
    high = jnp.full(values.shape[:-1], 255.0)
    for _ in range(8):
        middle = jnp.floor((low + high) / 2)
        enough = 2 * jnp.sum(values <= middle[..., None], axis=-1) >= values.shape[-1]
        low = jnp.where(enough, low, middle + 1)
        high = jnp.where(enough, middle, high)
    return low


# The path over a video.


def _visible(video: Frame, contrast: float = 50, area: float = 80) -> Array:
    """Return how surely there is a shape at all, `[T]`.

    By default it is less demanding than VQ, which takes a strong one.
    """
    return jnp.minimum(_norm(video.contrast) / contrast, 1) * jnp.minimum(video.area / area, 1)


def _velocity(centres: Array, weight: Array) -> Array:
    """Return the weighted least-squares slope (x, y) of centres `[T, 2]`, in pixels per frame."""
    time = jnp.arange(len(weight), dtype=jnp.float32)
    time = time - _mean(time, weight)
    return _ratio((weight * time) @ centres, jnp.sum(weight * time**2))


def _unfold(video: Frame) -> Array:
    """Return the centres `[T, 2]` of the path with its turns at the borders taken out.

    A proper bounce becomes a straight line.
    """
    weight = _visible(video)
    height, width = video.outside.shape[1:]
    share = jax.nn.softmax(_mean(video.fit, weight) / 0.02)
    area = jnp.maximum(_mean(video.area, weight), 1.0)
    scale = jnp.sqrt(area / jnp.array([_AREAS[shape] for shape in vocabulary.SHAPES]))
    side, up, down = (share * scale) @ jnp.array([render.EXTENTS[s] for s in vocabulary.SHAPES])
    low = jnp.array([side, up]) + render.MARGIN
    high = jnp.array([width - side, height - down]) - render.MARGIN
    return jax.vmap(_unfold_axis, (1, None, 0, 0), 1)(video.centre, weight, low, high)


def _unfold_axis(place: Array, weight: Array, low: Array, high: Array) -> Array:
    """Return places `[T]` along an axis with up to two turns taken out.

    Turns are at the borders `low` and `high`, in either order. They are tried in all pairs of steps
    from frame to frame; those are taken that leave the steadiest velocity.
    """
    step = jnp.diff(place)
    pair = jnp.sqrt(weight[1:] * weight[:-1])
    none = len(step)  # the step in which a turn happens that does not happen
    index = jnp.arange(none + 1)
    length = jnp.pad(jnp.abs(step), (0, 1))

    def mirrored(border: Array) -> Array:
        """Return what steps over a turn are if they go on behind the border, `[none + 1]`."""
        return jnp.pad(2 * border - place[1:] - place[:-1], (0, 1))

    over_low = mirrored(low)
    over_high = mirrored(high)

    def first_sums(values: Array) -> Array:
        """Return the sums of the first k = 0, 1, ... none + 1 values, by the weight of pairs."""
        return jnp.pad(jnp.cumsum(pair * values), (1, 1), mode="edge").at[0].set(0)

    sums = [first_sums(values) for values in (jnp.ones_like(step), step, step**2)]

    def turn_error(over: Array, at: Array, velocity: Array) -> Array:
        """Return the pixels by which a turn is misplaced.

        It may be off its border, but not longer than the other steps.
        """
        error = jnp.abs(over - velocity)
        cost = TURN_COST * error / jnp.sqrt(error**2 + TURN_SCALE**2)
        return cost + jnp.maximum(length[at] - jnp.abs(velocity), 0)

    def best_second(i: Array) -> tuple[Array, ...]:
        """Return the best second turn behind a first one in step i.

        (what is unsteady then, its step, the velocity, the errors of both turns).
        """
        # sums over the steps between the turns, where the shape goes back, and over the others
        between = [total[:-1] - total[i + 1] for total in sums]
        elsewhere = [total[i] + total[-1] - total[1:] for total in sums]
        moved = elsewhere[1] - between[1]
        velocity = _ratio(moved, elsewhere[0] + between[0])
        forwards = velocity > 0
        first = turn_error(jnp.where(forwards, over_high[i], over_low[i]), i, velocity)
        second = turn_error(-jnp.where(forwards, over_low, over_high), index, velocity)
        unsteady = elsewhere[2] + between[2] - velocity * moved
        # even if it is not seen
        unsteady += jnp.where(i < none, first**2, 0) + jnp.where(index < none, second**2, 0)
        possible = (index > i) | (index == none)
        j = jnp.argmin(jnp.where(possible, unsteady, jnp.inf))
        return unsteady[j], j, velocity[j], first[j], second[j]

    # One after another: memory does not grow with the square of the length.
    unsteady, *results = jax.lax.map(best_second, index)
    i = jnp.argmin(unsteady)
    j, velocity, first, second = (values[i] for values in results)
    index = index[:-1]
    straight = jnp.where((index > i) & (index < j), -step, step)
    for at, error in ((i, first), (j, second)):
        turned = velocity + jnp.where(velocity > 0, error, -error)
        straight = jnp.where(index == at, turned, straight)
    return place[0] + jnp.pad(jnp.cumsum(straight), (1, 0))


# Arithmetic.


def _ratio(numerator: Array, denominator: Array) -> Array:
    return numerator / jnp.maximum(denominator, 1e-6)


def _mean(values: Array, weight: Array) -> Array:
    """Return the weighted mean `[...]` over time of `[T, ...]`."""
    return _ratio(weight @ values, jnp.sum(weight))


def _rms(vectors: Array, weight: Array) -> Array:
    """Return the weighted root mean square `[]` of the lengths of vectors `[T, n]`."""
    return jnp.sqrt(_mean(jnp.sum(vectors**2, -1), weight))


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def _falloff(error: Array, scale: float) -> Array:
    """Return 1 without error and 1/2 at `scale`.

    It has a long tail: no error is too large to improve.
    """
    return 1 / (1 + (error / scale) ** 2)
