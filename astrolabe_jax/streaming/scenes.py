"""Stage scenes: prompts that change in the middle of a video -> what the sampler does before and in
each block.

A scene string is a list of prompts: "a cat[5s] | a dog[10s#] | a bird". `|` separates scenes, [5s]
gives a scene's length, and # a hard cut at its end (spec/sampling.md 7). Everything here is text
and whole numbers on the host; the arrays follow in rollout.py.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from astrolabe_jax.models.wan.config import Block, Layout

DEFAULT_SECONDS = 10.5  # of a scene without a duration
DEFAULT_BLOCKS = 14  # the same in the published code, which counts 14 blocks whatever their size
# rotary positions of a block behind a hard cut, where positions are absolute
CUT_FRAMES = (45, 46, 47)

_TAG = re.compile(r"\[(\d+\.?\d*)\s*s(#?)\]")
# A number of seconds in brackets, however it is written: [5s], [5 sec], [.5S #], [5], and one that
# is not closed.
_LOOKS_LIKE_A_TAG = re.compile(
    r"\[\s*(?:[-+]?[\d.]+\s*(?:s(?:ec(?:ond)?s?)?)?\s*#?|#)\s*(?:\]|(?=\||$))", re.IGNORECASE
)
LONGEST = 24 * 3600.0  # seconds of a scene


class Scene(NamedTuple):
    """One prompt of a video."""

    prompt: str
    seconds: float
    blocks: int  # as many as go into them
    cut: bool  # hard cut at its end


def parse(text: str, block: int, fps: int, stride: int = 4) -> list[Scene]:
    """The scenes of a prompt. `block` latent frames last stride * block / fps seconds.

    A duration is cut to whole blocks, at least one; without one a scene has 10.5 s. Only the # of a
    duration is a cut. Raises ValueError, with the character at fault, for an empty scene, a second
    duration, and a bracket that looks like a duration but is none.
    """
    scenes, start = [], 0
    for part in text.split("|"):
        tags = list(_TAG.finditer(part))
        for found in _LOOKS_LIKE_A_TAG.finditer(part):
            if not _TAG.fullmatch(found.group()):
                raise _error(
                    text,
                    start + found.start(),
                    found.group(),
                    "is no duration; write [5s], [2.5s] or [10s#]",
                )
        if len(tags) > 1:
            raise _error(
                text,
                start + tags[1].start(),
                tags[1].group(),
                "is a second duration of one scene; give one",
            )
        prompt = _without_tags(part)
        if not prompt:
            raise _error(
                text, start, part, "is a scene without a prompt; write one, or take a | away"
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


def parse_published(text: str, block: int, fps: int, stride: int = 4) -> list[Scene]:
    """The scenes as the published command line reads them (spec/sampling.md 7.1); no text is
    refused.

    The first duration counts, all are taken out; one that is misspelt stays in the text; a #
    anywhere is a cut; a scene without a duration has 14 blocks.
    """
    scenes = []
    for part in text.split("|"):
        tag = _TAG.search(part)
        blocks = _blocks(float(tag[1]), block, fps, stride) if tag else DEFAULT_BLOCKS
        scenes.append(
            Scene(_without_tags(part), blocks * stride * block / fps, blocks, "#" in part)
        )
    return scenes


def is_plain(text: str) -> bool:
    """Whether a prompt has neither scenes nor durations, nor what looks like one."""
    return "|" not in text and not _LOOKS_LIKE_A_TAG.search(text)


def _blocks(seconds: float, block: int, fps: int, stride: int) -> int:
    return max(1, math.floor(seconds * fps / (stride * block)))


def _without_tags(part: str) -> str:
    return _TAG.sub("", part.strip()).strip()


def _error(text: str, at: int, what: str, why: str) -> ValueError:
    return ValueError(f"character {at + 1} of {text!r}: {what!r} {why}")


def scenes_by_length(scenes: Sequence[Scene], blocks: int) -> list[int]:
    """The scene of each of `blocks` blocks; the last scene takes what is left (spec/sampling.md
    7.2).
    """
    boundaries = [sum(scene.blocks for scene in scenes[: k + 1]) for k in range(len(scenes) - 1)]
    return [sum(boundary <= q for boundary in boundaries) for q in range(blocks)]


def scenes_by_frame(switches: Sequence[int], starts: Sequence[int]) -> list[int]:
    """The scene of each block, by its first frame: scene k + 1 begins at the first block at or
    behind switches[k].

    At most one scene a block, as published (spec/sampling.md 8).
    """
    scene, found = 0, []
    for start in starts:
        scene += scene < len(switches) and start >= switches[scene]
        found.append(scene)
    return found


class Change(NamedTuple):
    """What happens to the cache before a block. Places are those of models/wan/cache.restart."""

    end: int  # frames so far, in the cache's count
    keep: tuple[int, ...] | None = None  # places that begin a new count; None: the count goes on
    # frames of the video whose keys are made anew, one for each place in use
    frames: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()  # their rotary positions
    skip: int = 0  # first places, of the sink, that keep their keys nevertheless
    # published: the other places keep their content, too, which a later flush may take
    every: bool = False


class Step(NamedTuple):
    """One block of a video."""

    frame: int  # its first frame in the video
    count: int
    scene: int
    start: int  # its first frame in the cache's count, which a change may begin anew
    positions: tuple[int, ...]  # rotary positions of its frames
    aligned: bool  # see models/wan/cache.View
    cut: bool  # behind a hard cut
    change: Change | None


class Story(NamedTuple):
    """What a video of one length tells: its prompts, and what the sampler does in each block."""

    prompts: tuple[str, ...]  # of its scenes
    steps: tuple[Step, ...]

    @property
    def changes(self) -> list[int]:
        """The frames at which a prompt takes over from another."""
        return [
            after.frame
            for before, after in itertools.pairwise(self.steps)
            if before.scene != after.scene
        ]


class Rules(NamedTuple):
    """How scenes follow each other; config.scenes."""

    # flush (spec/sampling.md 7.3), recache (8), or cut: every boundary is a hard cut
    transition: str = "flush"
    cut: str = "sink"  # what a hard cut keeps: the sink, or nothing
    global_sink: bool = True  # recache: the sink keeps the keys of the first prompt
    published: bool = False  # reproduce the published flush (sampling.md 11.3 to 11.5)


class Shot(NamedTuple):
    """A part of a video that shares nothing with what came before it."""

    prompts: tuple[str, ...]  # of its scenes
    steps: tuple[Step, ...]
    latent_frames: int  # given ones included
    frames: int  # pixel frames that are shown; the last block may have more


def shots(
    scenes: Sequence[Scene],
    layout: Layout,
    rules: Rules,
    fps: int,
    stride: int = 4,
    frames: int = 0,
    given: int = 0,
) -> list[Shot]:
    """The shots of a video: a hard cut that keeps nothing begins a new one.

    Scenes last as many blocks as go into their durations, the last one of a shot lasts until the
    shot has all its seconds to the frame, behind `given` latent frames that are there before.
    `frames`: pixel frames of the whole video;
    0 for what the durations give. Raises ValueError if that is over before the last scene begins,
    or for a video that the layout cannot hold.
    """
    last = len(scenes) - 1
    ends = [k for k, scene in enumerate(scenes) if k == last or _starts_anew(scene, layout, rules)]
    made, begin, left = [], 0, frames
    for end in ends:
        part, before = scenes[begin : end + 1], 0 if begin else given
        shown = left if frames and end == last else _shown(part, layout, fps, stride, before)
        left -= shown
        count = layout.whole(1 + math.ceil((shown - 1) / stride), up=True)
        if before and count <= before:
            raise ValueError(
                f"all of the {shown} frames are given, {1 + stride * (before - 1)} frames are "
                f"there before; ask for at least {1 + stride * (before + layout.block - 1)}"
            )
        layout.check_frames(count)
        blocks = [block for block in layout.blocks(count) if block.start >= before]
        if shown < 1 or len(blocks) <= sum(scene.blocks for scene in part[:-1]):
            raise ValueError(
                f"{frames} frames are over before scene {last + 1} begins; ask for more"
            )
        cuts = [scene.cut or rules.transition == "cut" for scene in part]
        slots = cache_slots(layout, rules, count)
        steps = timeline(blocks, scenes_by_length(part, len(blocks)), cuts, layout, slots, rules)
        made.append(Shot(tuple(scene.prompt for scene in part), tuple(steps), count, shown))
        begin = end + 1
    return made


def story(text: str, frames: int, layout: Layout, rules: Rules, fps: int, stride: int = 4) -> Story:
    """A prompt, or scene string, over the first `frames` latent frames of a video; the last scene
    takes what is left.

    Raises ValueError for a string that cannot be read.
    """
    scenes = (parse_published if rules.published else parse)(text, layout.block, fps, stride)
    blocks = layout.blocks(frames)
    cuts = [scene.cut or rules.transition == "cut" for scene in scenes]
    slots = layout.capacity
    steps = timeline(blocks, scenes_by_length(scenes, len(blocks)), cuts, layout, slots, rules)
    return Story(tuple(scene.prompt for scene in scenes), tuple(steps))


def _shown(scenes: Sequence[Scene], layout: Layout, fps: int, stride: int, given: int) -> int:
    """Pixel frames of a shot: its seconds behind the given frames, but at least all the blocks that
    go into them.
    """
    before = 1 + stride * (given - 1) if given else 0
    blocks = sum(scene.blocks for scene in scenes)
    least = (
        given + layout.block * blocks
        if given or not layout.lead
        else layout.lead + layout.block * (blocks - 1)
    )
    return max(
        before + round(sum(scene.seconds for scene in scenes) * fps), 1 + stride * (least - 1)
    )


def cache_slots(layout: Layout, rules: Rules, latent_frames: int) -> int:
    """Frames of the cache for a shot; the published buffer, whose last places a flush takes, has
    its full size.
    """
    if rules.published:
        return latent_frames if layout.window == -1 else layout.window
    return min(layout.capacity, latent_frames)


def _starts_anew(scene: Scene, layout: Layout, rules: Rules) -> bool:
    """Whether nothing is kept behind a scene."""
    cut = scene.cut or rules.transition == "cut"
    nothing = rules.cut == "nothing" or (layout.positions == "relative" and layout.kept == 0)
    return cut and nothing and not rules.published


def timeline(
    blocks: Sequence[Block],
    scene_of: Sequence[int],
    cuts: Sequence[bool],
    layout: Layout,
    slots: int,
    rules: Rules,
) -> list[Step]:
    """What the sampler does: a Step for each of the blocks that it makes, which may begin behind
    given frames.

    scene_of: the scene of each block. cuts: whether each scene ends in a hard cut. slots: frames of
    the cache.

    A flush keeps the first frame and the last two. A hard cut keeps the sink alone where positions
    are relative; where they are absolute it is a flush, and the block behind it stands at positions
    45 to 47. The published flush takes the last two places of the buffer for the last two frames,
    and its hard cut does nothing where positions are relative.
    """
    # (frame of the video, position) by the cache's count
    held = [(frame, frame) for frame in range(blocks[0].start)]
    steps = []
    for q, (block, scene) in enumerate(zip(blocks, scene_of, strict=True)):
        change, cut, frames = None, False, range(block.start, block.stop)
        if q and scene != scene_of[q - 1]:
            cut = cuts[scene_of[q - 1]]
            change = _change(held, layout, slots, cut, rules)
            if change.keep is not None:
                places = _in_places(held, layout, slots)
                held = [places[place] for place in change.keep if place < len(places)]
                # published: places that hold no frame
                held += [(-1, -1)] * (len(change.keep) - len(held))
        start, relative = len(held), layout.positions == "relative"
        positions = [start + i if relative else frame for i, frame in enumerate(frames)]
        if cut and not relative:
            positions[-len(CUT_FRAMES) :] = CUT_FRAMES[-len(positions) :]
        aligned = (start - layout.lead) % layout.block == 0
        steps.append(
            Step(block.start, len(frames), scene, start, tuple(positions), aligned, cut, change)
        )
        held += zip(frames, positions, strict=True)
    return steps


def _in_places(held: list, layout: Layout, slots: int) -> list:
    """What lies in the places of the published buffer that are in use: the sink, then the window,
    oldest first.
    """
    if len(held) <= slots:
        return held
    return held[: layout.kept] + held[len(held) - (slots - layout.kept) :]


def _change(held: list, layout: Layout, slots: int, cut: bool, rules: Rules) -> Change:
    end, used = len(held), min(len(held), slots)
    if cut and layout.positions == "relative" and not rules.published:
        return Change(end, tuple(range(min(layout.kept, used))))
    if rules.transition == "flush" or cut:
        if not rules.published:
            return Change(end, tuple(sorted({0, max(used - 2, 0), used - 1})))
        if slots < 3:
            raise ValueError(
                f"the published flush keeps 3 frames, the window has {slots}; widen "
                "config.model.window"
            )
        return Change(end, (0, slots - 2, slots - 1), every=True)
    if any(frame < 0 for frame, _ in held):
        raise ValueError(
            "a re-cache behind a published flush that took empty places; use "
            "config.scenes.published=False"
        )
    protected = rules.global_sink and layout.window != -1 and end > layout.window
    again = held[end - used :] if layout.window != -1 else _in_places(held, layout, slots)
    frames, positions = zip(*again, strict=True)
    return Change(end, None, frames, positions, layout.kept if protected else 0)
