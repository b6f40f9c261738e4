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
EXPONENTS |= {"bounce_mq": EXPONENTS["shapes_mq"], "bounce_ta": EXPONENTS["shapes_ta"]}
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


class Asked(NamedTuple):
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

    background: jax.Array  # [3], median of the border
    contrast: jax.Array  # [3], colour of the shape minus background
    centre: jax.Array  # [2], (x, y) in pixels
    area: jax.Array  # [], pixels
    fit: jax.Array  # [3], intersection over union with each of the vocabulary's shapes
    # [], standard deviation in pixels of the blur that would have widened the renderer's edge so
    blur: jax.Array
    inside_error: jax.Array  # [], RMS deviation from the shape's colour well inside it
    outside_error: jax.Array  # [], RMS deviation from the background well outside the shape
    outside: jax.Array  # [h, w], bool, the pixels well outside the shape


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return numerator / jnp.maximum(denominator, 1e-6)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def _falloff(error: jax.Array, scale: float) -> jax.Array:
    """1 without error, 1/2 at `scale`, with a long tail: no error is too large to improve."""
    return 1 / (1 + (error / scale) ** 2)


def _median(values: jax.Array) -> jax.Array:
    """Lower median `[...]` of 8-bit levels `[..., n]`, by bisection: far cheaper than a sort."""
    low, high = jnp.zeros(values.shape[:-1]), jnp.full(values.shape[:-1], 255.0)
    for _ in range(8):
        middle = jnp.floor((low + high) / 2)
        enough = 2 * jnp.sum(values <= middle[..., None], axis=-1) >= values.shape[-1]
        low, high = jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)
    return low


def _segment(planes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Background `[3]`, contrast `[3]` and coverage `[h, w]` in [0, 1] of colour planes `[3, h,
    w]`.
    """
    border = jnp.concatenate(
        [planes[:, 0], planes[:, -1], planes[:, :, 0], planes[:, :, -1]], axis=1
    )
    background = _median(border)
    offset = planes - background[:, None, None]

    def project(contrast):
        return jnp.clip(
            jnp.einsum("chw,c->hw", offset, contrast) / jnp.maximum(jnp.sum(contrast**2), 1.0), 0, 1
        )

    def mean_offset(weight):
        return _ratio(jnp.einsum("hw,chw->c", weight, offset), jnp.sum(weight))

    squared = jnp.sum(offset**2, axis=0) / 255**2
    rough = mean_offset(squared**2)  # the most distinct pixels, but biased by the antialiased edge
    contrast = mean_offset(jnp.clip((project(rough) - 0.6) / 0.3, 0, 1))
    return background, contrast, project(contrast)


def _smooth(plane: jax.Array) -> jax.Array:
    """Blurs `[h, w]` with the binomial (1, 2, 1) / 4 per axis: half a square pixel of variance."""
    padded = jnp.pad(plane, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


def _observe(planes: jax.Array) -> Frame:
    """Measures a frame, colour planes float32 `[3, h, w]` on the 0..255 scale."""
    _, height, width = planes.shape
    background, contrast, coverage = _segment(planes)
    # quiets noise, and makes what follows blind to the subpixel phase of an edge
    coverage = _smooth(coverage)
    mask = jnp.clip(2 * coverage - 0.5, 0, 1)
    area = jnp.sum(mask)
    x, y = jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
    centre = jnp.stack([_ratio(jnp.sum(mask, 0) @ x, area), _ratio(jnp.sum(mask, 1) @ y, area)])

    def distance(shape):
        scale = jnp.sqrt(jnp.maximum(area, 1.0) / _AREAS[shape])
        return scale * render.edge_distance(
            shape, (x - centre[0])[None, :] / scale, (y - centre[1])[:, None] / scale, jnp
        )

    def overlap(distance):
        drawn = jnp.clip(0.5 - distance, 0, 1)
        return _ratio(jnp.sum(jnp.minimum(mask, drawn)), jnp.sum(jnp.maximum(mask, drawn)))

    distances = [distance(shape) for shape in vocabulary.SHAPES]
    fit = jnp.stack([overlap(distance) for distance in distances])
    best = jax.nn.softmax(fit / 0.02)
    # the best shape, without a switch
    nearest = sum(best[i] * distance for i, distance in enumerate(distances))

    # The area in transition between the colours is proportional to the width of the edge, whatever
    # its contrast.
    band = jnp.clip(6.5 - jnp.abs(nearest), 0, 1)
    # a normal cumulative distribution, nearly
    sharp = jax.nn.sigmoid(-1.702 / _SHARP_EDGE * nearest)
    wider = _ratio(jnp.sum(band * coverage * (1 - coverage)), jnp.sum(band * sharp * (1 - sharp)))
    blur = _SHARP_EDGE * jnp.sqrt(jnp.maximum(wider**2 - 1, 0))
    inside, outside = nearest < -2, nearest > 3
    offset = planes - background[:, None, None]
    inside_error = _ratio(
        jnp.sum(inside * jnp.sum((offset - contrast[:, None, None]) ** 2, 0)), jnp.sum(inside)
    )
    outside_error = _ratio(jnp.sum(outside * jnp.sum(offset**2, 0)), jnp.sum(outside))
    return Frame(
        background,
        contrast,
        centre,
        area,
        fit,
        blur,
        jnp.sqrt(inside_error),
        jnp.sqrt(outside_error),
        outside,
    )


def _seen(video: Frame) -> jax.Array:
    """How surely there is a shape at all `[T]`: less demanding than VQ's visibility, which wants a
    strong one.
    """
    return jnp.minimum(_norm(video.contrast) / 50, 1) * jnp.minimum(video.area / 80, 1)


def _velocity(centres: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted least-squares slope (x, y) in pixels per frame of centres `[T, 2]`."""
    time = jnp.arange(len(weight), dtype=jnp.float32)
    time = time - _ratio(weight @ time, jnp.sum(weight))
    return _ratio((weight * time) @ centres, jnp.sum(weight * time**2))


def _unfold(video: Frame) -> jax.Array:
    """Centres `[T, 2]` of the path with its turns at the borders taken out: a proper bounce becomes
    a straight line.
    """
    weight = _seen(video)
    height, width = video.outside.shape[1:]
    best = jax.nn.softmax(_ratio(weight @ video.fit, jnp.sum(weight)) / 0.02)
    area = _ratio(weight @ video.area, jnp.sum(weight))
    scale = jnp.sqrt(
        jnp.maximum(area, 1.0) / jnp.array([_AREAS[shape] for shape in vocabulary.SHAPES])
    )
    side, up, down = (best * scale) @ jnp.array(
        [render.EXTENTS[shape] for shape in vocabulary.SHAPES]
    )
    low, high = (
        jnp.array([side, up]) + render.MARGIN,
        jnp.array([width - side, height - down]) - render.MARGIN,
    )
    return jax.vmap(_unfold_axis, (1, None, 0, 0), 1)(video.centre, weight, low, high)


def _unfold_axis(place: jax.Array, weight: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Places `[T]` along an axis with up to two turns, at `low` and `high` in either order, taken
    out.

    Turns are tried in all pairs of steps from frame to frame; those are taken that leave the
    steadiest velocity.
    """
    step, pair = jnp.diff(place), jnp.sqrt(weight[1:] * weight[:-1])
    none = len(step)  # the step in which a turn happens that does not happen
    index, long = jnp.arange(none + 1), jnp.pad(jnp.abs(step), (0, 1))
    # What a step over a turn is if it goes on behind the border.
    over_low, over_high = (
        jnp.pad(2 * border - place[1:] - place[:-1], (0, 1)) for border in (low, high)
    )

    def upto(values):  # sums [k] of the first k, up to none + 1
        return jnp.pad(jnp.cumsum(pair * values), (1, 1), mode="edge").at[0].set(0)

    sums = [upto(values) for values in (jnp.ones_like(step), step, step**2)]

    # a turn may be off its border, but not longer than the other steps
    def misplaced(over, at, velocity):
        error = jnp.abs(over - velocity)
        return TURN_COST * error / jnp.sqrt(error**2 + TURN_SCALE**2) + jnp.maximum(
            long[at] - jnp.abs(velocity), 0
        )

    def best(i):  # of the second turns `index` behind a first one in step i
        apart = [(total[i] + total[-1] - total[1:], total[:-1] - total[i + 1]) for total in sums]
        (count, between), (moved, back), (square, other) = apart
        velocity = _ratio(moved - back, count + between)
        first = misplaced(jnp.where(velocity > 0, over_high[i], over_low[i]), i, velocity)
        second = misplaced(-jnp.where(velocity > 0, over_low, over_high), index, velocity)
        unsteady = square + other - velocity * (moved - back)
        # even if it is not seen
        unsteady += jnp.where(i < none, first**2, 0) + jnp.where(index < none, second**2, 0)
        possible = (index > i) | (index == none)
        j = jnp.argmin(jnp.where(possible, unsteady, jnp.inf))
        return unsteady[j], j, velocity[j], first[j], second[j]

    # one after another: memory does not grow with the square of the length
    tried = jax.lax.map(best, index)
    i = jnp.argmin(tried[0])
    j, velocity, first, second = (values[i] for values in tried[1:])
    index = index[:-1]
    straight = jnp.where((index > i) & (index < j), -step, step)
    for at, error in ((i, first), (j, second)):
        straight = jnp.where(
            index == at, velocity + jnp.where(velocity > 0, error, -error), straight
        )
    return place[0] + jnp.pad(jnp.cumsum(straight), (1, 0))


def _quality_parts(video: Frame) -> dict[str, jax.Array]:
    """Parts of shapes_vq, each `[]`: means over the frames, by visibility."""

    def nearest(colour, palette):
        return jnp.min(_norm(colour[:, None] - palette[None]), axis=1)

    colour_error = nearest(video.background + video.contrast, _COLOURS)
    background_error = nearest(video.background, _BACKGROUNDS)
    visibility = jnp.minimum(_norm(video.contrast) / 110, 1) * jnp.minimum(video.area / 160, 1)
    parts = {
        "crispness": _falloff(video.blur, 1.0),
        "palette": jnp.sqrt(_falloff(colour_error, 50) * _falloff(background_error, 50)),
        "cleanness": jnp.sqrt(_falloff(video.inside_error, 40) * _falloff(video.outside_error, 20)),
    }
    total = jnp.sum(visibility)
    return {"visibility": jnp.mean(visibility)} | {
        k: _ratio(visibility @ part, total) for k, part in parts.items()
    }


def _motion_parts(video: Frame, planes: jax.Array) -> dict[str, jax.Array]:
    """Parts of shapes_mq, each `[]`; `planes` is `[T, 3, h, w]`."""
    weight = _seen(video)
    pair = jnp.sqrt(weight[1:] * weight[:-1])
    total = jnp.sum(weight)

    def spread(value):  # RMS deviation from the mean over time, of the frames where a shape is seen
        mean = _ratio(weight @ value, total)
        return jnp.sqrt(_ratio(weight @ jnp.sum((value - mean[None]) ** 2, -1), total))

    velocity = _velocity(video.centre, weight)
    jitter = jnp.sum((jnp.diff(video.centre, axis=0) - velocity[None]) ** 2, -1)
    jitter = jnp.sqrt(_ratio(pair @ jitter, jnp.sum(pair)))
    outside = video.outside[1:] & video.outside[:-1]
    change = _ratio(jnp.sum(outside * jnp.sum(jnp.diff(planes, axis=0) ** 2, 1)), jnp.sum(outside))
    size = jnp.log(jnp.maximum(video.area, 1.0))[:, None]
    return {
        "visibility": jnp.mean(weight),
        "steadiness": _falloff(jitter, 0.25),
        "motion": 1 - jnp.exp(-((_norm(velocity) / 0.1) ** 2)),
        "colour": _falloff(spread(video.background + video.contrast), 15),
        "form": jnp.sqrt(_falloff(spread(size), 0.1) * _falloff(spread(video.fit), 0.05)),
        "stillness": _falloff(jnp.sqrt(change), 15),
    }


def _alignment_parts(video: Frame, asked: Asked) -> dict[str, jax.Array]:
    """Parts of shapes_ta, each `[]`."""
    weight = _seen(video)
    velocity = _velocity(video.centre, weight)
    moved = _norm(velocity)
    cosine = asked.direction @ velocity / jnp.sqrt(moved**2 + 0.03**2)
    fit = video.fit @ asked.shape
    margin = fit - jnp.max(jnp.where(asked.shape[None], 0, video.fit), axis=1)
    margin = (margin - 0.04) / 0.05  # a circle and a square of one size overlap by 0.83
    told = (1 + margin / jnp.sqrt(1 + margin**2)) / 2

    def mean_seen(value):
        return _ratio(weight @ value, jnp.sum(weight))

    return {
        "visibility": jnp.mean(weight),
        "colour": mean_seen(
            _falloff(_norm(video.background + video.contrast - asked.colour[None]), 50)
        ),
        "shape": mean_seen(told * jnp.minimum(fit / 0.9, 1)),
        "direction": ((1 + cosine) / 2) ** 2,
        "speed": _falloff(jnp.log((moved + 0.05) / (asked.speed + 0.05)), 0.4),
        "background": jnp.mean(_falloff(_norm(video.background - asked.background[None]), 50)),
    }


def _score_video(video: jax.Array, asked: Asked) -> dict[str, jax.Array]:
    """Scores and parts `[]` of one video of colour planes uint8 `[T, 3, h, w]`."""
    planes = video.astype(jnp.float32)
    frames = jax.vmap(_observe)(planes)
    unfolded = frames._replace(centre=_unfold(frames))
    way = jnp.where(asked.direction @ _velocity(unfolded.centre, _seen(frames)) < 0, -1, 1)
    parts = {
        "shapes_vq": _quality_parts(frames),
        "shapes_mq": _motion_parts(frames, planes),
        "shapes_ta": _alignment_parts(frames, asked),
        "bounce_mq": _motion_parts(unfolded, planes),
        "bounce_ta": _alignment_parts(unfolded, asked._replace(direction=way * asked.direction)),
    }
    # weighted means may exceed 1 by rounding
    parts = jax.tree.map(lambda part: jnp.clip(part, 0, 1), parts)
    scores = {}
    for name, exponents in EXPONENTS.items():
        logs = [
            exponent * jnp.log((parts[name][part] + FLOOR) / (1 + FLOOR))
            for part, exponent in exponents.items()
        ]
        scores[name] = jnp.exp(sum(logs))
        scores |= {f"{name}/{part}": value for part, value in parts[name].items()}
    return scores


_score_chunk = jax.jit(jax.vmap(_score_video))


def _check(frames: np.ndarray, prompts: Sequence[str]) -> None:
    shape = frames.shape
    if (
        frames.dtype != np.uint8
        or len(shape) != 5
        or shape[-1] != 3
        or shape[0] < 1
        or min(shape[1:4]) < 2
    ):
        raise ValueError(
            "moving-shapes rewards need at least one uint8 video [B, T, height, width, 3] of at "
            f"least 2 frames and 2x2 pixels, got {frames.dtype} {list(shape)}"
        )
    if len(prompts) != len(frames):
        raise ValueError(
            f"moving-shapes rewards got {len(frames)} videos but {len(prompts)} prompts"
        )


def _asked(prompts: Sequence[str]) -> Asked:
    """The numbers of B >= 1 prompts; ValueError for a prompt of another world."""
    attributes = [vocabulary.parse(prompt) for prompt in prompts]
    return Asked(
        np.array([vocabulary.COLOURS[a.colour] for a in attributes], np.float32),
        np.array([[shape == a.shape for shape in vocabulary.SHAPES] for a in attributes]),
        np.array([vocabulary.DIRECTIONS[a.direction] for a in attributes], np.float32),
        np.array([vocabulary.SPEEDS[a.speed] for a in attributes], np.float32),
        np.array([vocabulary.BACKGROUNDS[a.background] for a in attributes], np.float32),
    )


def score(frames: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """All five rewards and their parts, from decoded pixels.

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
    _check(frames, prompts)
    asked = _asked(prompts)
    chunks = []
    for start in range(0, len(frames), CHUNK):
        # the last chunk is filled up with the first videos
        rows = np.arange(start, start + CHUNK) % len(frames)
        planes = np.ascontiguousarray(np.moveaxis(frames[rows], -1, 2))
        chunks.append(_score_chunk(planes, Asked(*(values[rows] for values in asked))))
    names = [
        name
        for reward, parts in EXPONENTS.items()
        for name in (reward, *(f"{reward}/{p}" for p in parts))
    ]
    return {
        name: np.concatenate([np.asarray(chunk[name]) for chunk in chunks])[: len(frames)]
        for name in names
    }
