"""Prompts that change in the middle of a video -> its timeline of blocks.

A scene string is a list of prompts: "a cat[5s] | a dog[10s#] | a bird". `|` separates scenes, [5s]
gives a scene's length, and # a hard cut at its end (docs/sampling.md, Scene strings). A backslash
before | or [ makes them text. A prompt may also be a JSON object, {"prompts": [...],
"switch_frames": [...]}, whose texts are taken as they are (docs/sampling.md, Prompt switches).
Everything here is text and whole numbers on the host; streams.py follows the timeline with arrays.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from astrolabe_jax.models.wan.config import Block, Layout
from astrolabe_jax.runtime.files import parse_json
from astrolabe_jax.runtime.progress import counted
from astrolabe_jax.types import BlockPlan, CacheChange, Timeline

DEFAULT_SECONDS = 10.5  # of a scene without a duration
DEFAULT_BLOCKS = 14  # the same in the published code, which counts 14 blocks whatever their size
# rotary positions of a block behind a hard cut, where positions are absolute
CUT_FRAMES = (45, 46, 47)

# Possessive where a text could repeat what matches: no text takes longer than its length.
_PUBLISHED_TAG = re.compile(r"\[(\d++(?:\.\d*+)?)\s*+s(#?)\]")
_TAG = re.compile(r"(?<!\\)\[(\d++(?:\.\d*+)?|\.\d++)\s*+s(#?)\]")
# A number of seconds in brackets, however it is written: [5s], [5 sec], [.5S #], [2,5s], [5m], [5],
# [inf s], and one that is not closed. [16:9] is none.
_LOOKS_LIKE_A_TAG = re.compile(
    r"(?<!\\)\[\s*+(?:[-+~]?(?:[\d.]++|(?:\d[\d.,:/e+~-]*+|nan|inf(?:inity)?)(?=\s*+[sm]))"
    r"\s*+(?:s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?|s)?)?\s*+#?|#)\s*+(?:\]|(?=\||$))",
    re.IGNORECASE,
)
_BAR = re.compile(r"(?<!\\)\|")
_ESCAPED = re.compile(r"\\([|\[])")
_SWITCHED = re.compile(r'\{\s*"prompts"')
LONGEST = 24 * 3600.0  # seconds of a scene
_SHOWN = 60  # characters of a text on each side of a fault


class Scene(NamedTuple):
    """One prompt of a video."""

    prompt: str
    seconds: float
    blocks: int  # as many as go into them
    cut: bool  # hard cut at its end


def read(
    prompt: str, layout: Layout, rules: "Rules", fps: int, stride: int, given: int = 0
) -> list[Scene]:
    """Return the scenes of a prompt in any of its forms.

    Args:
      stride: pixel frames of a latent frame.
      given: latent frames that are there before; the scenes come behind them.

    Raises:
      ValueError: of `parse`, or for a JSON object of another form.
    """
    if not is_switched(prompt):
        parse_string = parse_published if rules.published else parse
        return parse_string(prompt, layout.block, fps, stride)
    texts, switches = _read_switched(prompt)
    if switches and switches[-1] > LONGEST * fps / stride:
        raise ValueError(f"switch_frames has {switches[-1]}, more than a day; give latent frames")
    # enough blocks for the last scene to begin, as each begins in a block of its own
    frames = given + max(switches, default=0) + layout.block * (len(texts) + 1)
    starts = [block.start for block in layout.blocks(frames) if block.start >= given]
    scene_of = scenes_by_frame(switches, starts)
    counts = [scene_of.count(scene) for scene in range(len(texts))]
    if 0 in counts:
        raise ValueError(
            f"prompt {counts.index(0) + 1} gets no block: switch_frames is {switches}, and blocks "
            f"begin at the latent frames {starts[:3]} ...; give later switches"
        )
    seconds = stride * layout.block / fps
    return [
        Scene(text, count * seconds, count, False)
        for text, count in zip(texts, counts, strict=True)
    ]


def literal(prompt: str) -> Scene:
    """Return the one scene of a whole video: its prompt is text, but for the backslashes.

    Raises ValueError for a JSON object that has several prompts.
    """
    if is_switched(prompt):
        texts, _ = _read_switched(prompt)
        if len(texts) > 1:
            raise ValueError(
                f"{len(texts)} prompts follow each other, and whole videos are trained, which have "
                "one; set config.streaming.window, or give one prompt a line"
            )
        return Scene(texts[0], 0.0, 0, False)
    return Scene(_ESCAPED.sub(r"\1", prompt) if "\\" in prompt else prompt, 0.0, 0, False)


def _read_switched(prompt: str) -> tuple[list[str], list[int]]:
    """Return texts and switch frames of a JSON object; ValueError if it is of another form."""
    try:
        content = parse_json(prompt)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    texts = content.get("prompts")
    if not _is_list_of(texts, str) or not texts or not all(text.strip() for text in texts):
        raise ValueError(
            f'expected {{"prompts": ["...", ...], "switch_frames": [40, ...]}}, got {prompt[:60]}'
        )
    # a video of one prompt may leave them out
    switches = content.get("switch_frames", [] if len(texts) == 1 else None)
    if (
        not _is_list_of(switches, int)
        or sorted(set(switches)) != switches
        or len(switches) != len(texts) - 1
    ):
        raise ValueError(
            f"switch_frames is {switches!r}; expected {len(texts) - 1} latent frames in ascending "
            "order, one for each change of the prompt; or give them once for all lines, "
            "--switch_frames=40,80 (sample) or config.prompts.switch_frames (training)"
        )
    return [text.strip() for text in texts], switches


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def parse(text: str, block: int, fps: int, stride: int) -> list[Scene]:
    """Return the scenes of a scene string; `block` latent frames last stride * block / fps seconds.

    A duration is cut to whole blocks, at least one; without one a scene has 10.5 s. Only the # of a
    duration is a cut.

    Raises:
      ValueError: with the character at fault, for an empty scene, a second duration, and a bracket
        that looks like a duration but is none.
    """
    if is_plain(text) and text.strip():
        blocks = _blocks(DEFAULT_SECONDS, block, fps, stride)
        return [Scene(literal(text.strip()).prompt, DEFAULT_SECONDS, blocks, False)]
    scenes = []
    start = 0
    for part in _BAR.split(text):
        tags = list(_TAG.finditer(part))
        for found in _LOOKS_LIKE_A_TAG.finditer(part):
            if not _TAG.fullmatch(found.group()):
                raise _error(
                    text,
                    start + found.start(),
                    found.group(),
                    "is no duration; write [5s], [2.5s] or [10s#], or \\[ where it is text",
                )
        if tags and part[tags[0].end() :].lstrip().startswith("#"):
            raise _error(
                text,
                start + tags[0].start(),
                tags[0].group(),
                "is followed by #; a hard cut is written in the bracket, [10s#]",
            )
        if len(tags) > 1:
            raise _error(
                text,
                start + tags[1].start(),
                tags[1].group(),
                "is a second duration of one scene; give one",
            )
        prompt = literal(_TAG.sub("", part.strip()).strip()).prompt
        if not prompt:
            raise _error(
                text,
                start,
                part,
                "is a scene without a prompt; write one, or \\| where the bar is text",
            )
        seconds = float(tags[0][1]) if tags else DEFAULT_SECONDS
        if not 0 < seconds <= LONGEST:
            raise _error(
                text,
                start + tags[0].start(),
                tags[0].group(),
                "is no time between 0 and a day; give another",
            )
        scenes.append(
            Scene(prompt, seconds, _blocks(seconds, block, fps, stride), bool(tags and tags[0][2]))
        )
        start += len(part) + 1
    return scenes


def parse_published(text: str, block: int, fps: int, stride: int) -> list[Scene]:
    """Return the scenes as the published command line reads them (docs/published.md).

    No text is refused, a duration of more than a day is a day, and a backslash is text. The first
    duration counts, all are taken out; one that is misspelt stays in the text; a # anywhere is a
    cut; a scene without a duration has 14 blocks.
    """
    scenes = []
    for part in text.split("|"):
        tag = _PUBLISHED_TAG.search(part)
        blocks = DEFAULT_BLOCKS
        if tag:
            blocks = _blocks(min(float(tag[1]), LONGEST), block, fps, stride)
        prompt = _PUBLISHED_TAG.sub("", part.strip()).strip()
        scenes.append(Scene(prompt, blocks * stride * block / fps, blocks, "#" in part))
    return scenes


def is_plain(text: str) -> bool:
    """Return whether a prompt has neither scenes nor durations, nor what looks like one."""
    if "|" not in text and "[" not in text:  # almost all of a list of millions
        return True
    return not (is_switched(text) or _BAR.search(text) or _LOOKS_LIKE_A_TAG.search(text))


def is_switched(prompt: str) -> bool:
    """Return whether a prompt is a JSON object with prompts and switch frames."""
    return prompt.startswith("{") and bool(_SWITCHED.match(prompt))


def _blocks(seconds: float, block: int, fps: int, stride: int) -> int:
    return max(1, int(seconds * fps / (stride * block)))


def _error(text: str, at: int, what: str, why: str) -> ValueError:
    """Return the error about `what` at a character of a text; long ones are cut around it."""
    first = max(at - _SHOWN, 0) if len(text) > 2 * _SHOWN else 0
    shown = text[first : first + 2 * _SHOWN]
    before = "..." if first else ""
    after = "..." if first + len(shown) < len(text) else ""
    return ValueError(f"character {at + 1} of {before}{shown!r}{after}: {what[:_SHOWN]!r} {why}")


def scenes_by_length(scenes: Sequence[Scene], blocks: int) -> list[int]:
    """Return the scene of each of `blocks` blocks; the last scene takes what is left."""
    boundaries = [sum(scene.blocks for scene in scenes[: k + 1]) for k in range(len(scenes) - 1)]
    return [sum(boundary <= block for boundary in boundaries) for block in range(blocks)]


def scenes_by_frame(switches: Sequence[int], starts: Sequence[int]) -> list[int]:
    """Return the scene of each block, by the first frames `starts` of the blocks.

    Scene k + 1 begins at the first block at or behind switches[k]; at most one scene begins in a
    block, as published (docs/published.md).
    """
    scene = 0
    scenes = []
    for start in starts:
        scene += scene < len(switches) and start >= switches[scene]
        scenes.append(scene)
    return scenes


class Rules(NamedTuple):
    """How scenes follow each other; config.scenes (docs/streaming.md, Scene changes)."""

    transition: str = "flush"  # flush, recache, or cut: every boundary is a hard cut
    cut: str = "sink"  # what a hard cut keeps: the sink, or nothing
    global_sink: bool = True  # recache: the sink keeps the keys of the first prompt
    published: bool = False  # reproduce the published strings and flush (docs/published.md)


class GivenError(ValueError):
    """Nothing of a video is left to make: what it begins with is as long."""


class Shot(NamedTuple):
    """A part of a video that shares nothing with what came before it."""

    timeline: Timeline  # its first blocks may be given
    given: int  # latent frames that are there before
    latent_frames: int  # given ones included
    frames: int  # pixel frames that are shown; the last block may have more


def shots(
    scenes: Sequence[Scene],
    layout: Layout,
    rules: Rules,
    fps: int,
    stride: int,
    frames: int = 0,
    given: int = 0,
) -> list[Shot]:
    """Return the shots of a video: a hard cut that keeps nothing begins a new one.

    Scenes last as many blocks as go into their durations. The last scene of a shot lasts until the
    shot has all its seconds to the frame.

    Args:
      stride: pixel frames of a latent frame.
      frames: pixel frames of the whole video; 0 for what the durations give.
      given: latent frames that the first shot begins with.

    Raises:
      GivenError: if all frames are given.
      ValueError: if the frames are over before the last scene begins, or for a video that the
        layout cannot hold.
    """
    shots = []
    begin = 0
    left = frames
    for end, scene in enumerate(scenes, start=1):
        last = end == len(scenes)
        if not last and not _starts_anew(scene, layout, rules):
            continue
        part = scenes[begin:end]
        before = 0 if begin else given
        shown = left if frames and last else _shown(part, layout, fps, stride, before)
        left -= shown
        count = layout.whole(1 - (1 - shown) // stride, up=True)
        if before and count <= before:
            raise GivenError(
                f"gives {counted(1 + stride * (before - 1), 'frame')}, and the whole video is to "
                f"have {shown}: nothing is left to make; ask for at least "
                f"{1 + stride * (before + layout.block - 1)}, with --frames or longer scenes, or "
                "give fewer"
            )
        try:
            layout.check_frames(count)
        except ValueError as error:
            raise ValueError(f"{counted(shown, 'frame')} ({shown / fps:g} s): {error}") from None
        own_blocks = len(layout.blocks(count)) - len(layout.blocks(before))
        if shown < 1 or own_blocks <= sum(scene.blocks for scene in part[:-1]):
            raise ValueError(
                f"{counted(frames, 'frame is', 'frames are')} over before scene {len(scenes)} "
                "begins; ask for more"
            )
        slots = cache_slots(layout, rules, count)
        shots.append(
            Shot(
                timeline_of(part, count, layout, rules, slots, before),
                before,
                count,
                shown,
            )
        )
        begin = end
    return shots


def timeline_of(
    scenes: Sequence[Scene],
    frames: int,
    layout: Layout,
    rules: Rules,
    slots: int | None = None,
    given: int = 0,
) -> Timeline:
    """Return the timeline of `frames` latent frames; the last scene takes what is left.

    Args:
      slots: frames of the cache, by default what the layout sees.
      given: first frames, in whole blocks, which come before the first scene's time.
    """
    blocks = layout.blocks(frames)
    before = len(layout.blocks(given))
    plans = plan_blocks(
        blocks,
        [0] * before + scenes_by_length(scenes, len(blocks) - before),
        [scene.cut or rules.transition == "cut" for scene in scenes],
        layout,
        slots or layout.capacity,
        rules,
    )
    return Timeline(tuple(scene.prompt for scene in scenes), tuple(plans))


def _shown(scenes: Sequence[Scene], layout: Layout, fps: int, stride: int, given: int) -> int:
    """Return the pixel frames of a shot: its seconds behind the given frames.

    It has at least the frames of all the blocks that go into the durations.
    """
    before = 1 + stride * (given - 1) if given else 0
    # an independent first frame stands for a whole block
    missing = layout.block - layout.lead if layout.lead and not given else 0
    least = given + layout.block * sum(scene.blocks for scene in scenes) - missing
    return max(
        before + round(sum(scene.seconds for scene in scenes) * fps),
        1 + stride * (least - 1),
    )


def cache_slots(layout: Layout, rules: Rules, latent_frames: int) -> int:
    """Return the frames of the cache for a video of so many latent frames.

    The published buffer, whose last places a flush takes, has its full size.
    """
    if rules.published:
        return latent_frames if layout.window == -1 else layout.window
    return min(layout.capacity, latent_frames)


def _starts_anew(scene: Scene, layout: Layout, rules: Rules) -> bool:
    """Return whether nothing is kept behind a scene."""
    cut = scene.cut or rules.transition == "cut"
    nothing = rules.cut == "nothing" or (layout.positions == "relative" and layout.kept == 0)
    return cut and nothing and not rules.published


# A frame in the cache's count: its number in the video, and its rotary position.
_Held = tuple[int, int]


def plan_blocks(
    blocks: Sequence[Block],
    scene_of: Sequence[int],
    cuts: Sequence[bool],
    layout: Layout,
    slots: int,
    rules: Rules,
) -> list[BlockPlan]:
    """Return a plan for each of the blocks of a video.

    A flush keeps the first frame and the last two. A hard cut keeps the sink alone where positions
    are relative; where they are absolute it is a flush, and the block behind it stands at positions
    45 to 47. The published flush takes the last two places of the buffer for the last two frames,
    and its hard cut does nothing where positions are relative.

    Args:
      scene_of: the scene of each block.
      cuts: whether each scene ends in a hard cut.
      slots: frames of the cache.
    """
    relative = layout.positions == "relative"
    held: list[_Held] = []
    plans = []
    for number, (block, scene) in enumerate(zip(blocks, scene_of, strict=True)):
        change = None
        cut = False
        if number and scene != scene_of[number - 1]:
            cut = cuts[scene_of[number - 1]]
            change = _change(held, layout, slots, cut, rules)
            held = _held_after(held, change, layout, slots)
        start = len(held)
        frames = range(block.start, block.stop)
        positions = list(range(start, start + len(frames))) if relative else list(frames)
        if cut and not relative:
            positions[-len(CUT_FRAMES) :] = CUT_FRAMES[-len(positions) :]
        plans.append(
            BlockPlan(
                block.start,
                len(frames),
                scene,
                start,
                tuple(positions),
                (start - layout.lead) % layout.block == 0,
                cut,
                change,
            )
        )
        held = held + list(zip(frames, positions, strict=True))
    return plans


def _held_after(held: list[_Held], change: CacheChange, layout: Layout, slots: int) -> list[_Held]:
    """Return what the cache holds after a change."""
    if change.keep is None:
        return held
    places = _in_places(held, layout, slots)
    # published: places that hold no frame
    return [places[place] if place < len(places) else (-1, -1) for place in change.keep]


def _in_places(held: list[_Held], layout: Layout, slots: int) -> list[_Held]:
    """Return what lies in the places of the published buffer that are in use.

    These are the sink, then the window, oldest first.
    """
    oldest = max(len(held) - slots, 0) + layout.kept
    return held[: layout.kept] + held[oldest:]


def _change(held: list[_Held], layout: Layout, slots: int, cut: bool, rules: Rules) -> CacheChange:
    """Return what a new prompt does to a cache that holds these frames."""
    end = len(held)
    used = min(end, slots)
    if cut and layout.positions == "relative" and not rules.published:
        return CacheChange(end, tuple(range(min(layout.kept, used))))
    if rules.transition == "flush" or cut:
        if not rules.published:
            return CacheChange(end, tuple(sorted({0, max(used - 2, 0), used - 1})))
        if slots < 3:
            raise ValueError(
                f"the published flush keeps 3 frames, the window has {slots}; widen "
                "config.model.window"
            )
        return CacheChange(end, (0, slots - 2, slots - 1), every=True)
    if any(frame < 0 for frame, _ in held):
        raise ValueError(
            "a re-cache behind a published flush that took empty places; use "
            "config.scenes.published=False"
        )
    protected = rules.global_sink and layout.window != -1 and end > layout.window
    again = held[end - used :] if layout.window != -1 else _in_places(held, layout, slots)
    frames, positions = zip(*again, strict=True)
    return CacheChange(end, None, frames, positions, layout.kept if protected else 0)
