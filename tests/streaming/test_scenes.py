"""Scene strings and the timeline that follows from them: text and whole numbers."""

import contextlib
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.streaming.scenes import (
    Rules,
    Scene,
    is_plain,
    literal,
    parse,
    parse_published,
    read,
    scenes_by_frame,
    shots,
    timeline_of,
)

ABSOLUTE = Layout(block=3, window=12, sink=3)
RELATIVE = Layout(block=3, window=12, sink=3, positions="relative")
NO_SINK = Layout(block=3, window=9, positions="relative")


def test_durations_and_cuts():
    assert parse("a cat[5s] | a dog[10s#]|a [2.5 s] bird", 3, 16, 4) == [
        Scene("a cat", 5.0, 6, False),
        Scene("a dog", 10.0, 13, True),
        Scene("a  bird", 2.5, 3, False),
    ]
    assert [scene.seconds for scene in parse("a[.5s] | b[5.s]", 3, 16, 4)] == [0.5, 5.0]
    assert is_plain("a [nan] [info] [inf man]")
    assert parse("a | b", 1, 16, 4)[0] == Scene("a", 10.5, 42, False)  # of blocks of any size
    assert parse("a #1 fan [at work] [16:9] | b", 3, 16, 4)[0] == Scene(
        "a #1 fan [at work] [16:9]", 10.5, 14, False
    )


def test_published_strings_are_read_as_published():
    assert parse_published("a #1 fan | [5S] b", 1, 16, 4) == [
        Scene("a #1 fan", 3.5, 14, True),
        Scene("[5S] b", 3.5, 14, False),
    ]
    assert [scene.blocks for scene in parse_published("a[5s][6s] | b[5.s#]", 3, 16, 4)] == [6, 6]
    assert parse_published("|", 3, 16, 4)[1].prompt == ""


@pytest.mark.parametrize(
    ("text", "at", "what", "why"),
    [
        ("a[5s] | ", 8, " ", "is a scene without a prompt"),
        ("a[5s]||b", 7, "", "is a scene without a prompt"),
        ("a [5S] | b", 3, "[5S]", "is no duration"),
        ("a | b [ 5s ]", 7, "[ 5s ]", "is no duration"),
        ("a | b[.s]", 6, "[.s]", "is no duration"),
        ("a | b[nan s]", 6, "[nan s]", "is no duration"),
        ("a[infs]", 2, "[infs]", "is no duration"),
        ("a[-Infinity sec]", 2, "[-Infinity sec]", "is no duration"),
        ("a | b[-5s]", 6, "[-5s]", "is no duration"),
        ("a[5s #] | b", 2, "[5s #]", "is no duration"),
        ("a[5sec] | b", 2, "[5sec]", "is no duration"),
        ("a[5s | b", 2, "[5s ", "is no duration"),
        ("a | b[#]", 6, "[#]", "is no duration"),
        ("a[5s] [6s] | b", 7, "[6s]", "is a second duration"),
        ("a | b[5]", 6, "[5]", "is no duration"),
        ("a | b[2,5s]", 6, "[2,5s]", "is no duration"),
        ("a | b[5m]", 6, "[5m]", "is no duration"),
        ("a | b[3ms]", 6, "[3ms]", "is no duration"),
        ("a | b[1/2s]", 6, "[1/2s]", "is no duration"),
        ("a | b[3-5s]", 6, "[3-5s]", "is no duration"),
        ("a | b[1e3s]", 6, "[1e3s]", "is no duration"),
        ("a | b[~5s]", 6, "[~5s]", "is no duration"),
        ("a[1s]# | b", 2, "[1s]", "is followed by #; a hard cut is written in the bracket"),
        ("a | b[0s]", 6, "[0s]", "is no time between 0 and a day"),
        ("a[99999s] | b", 2, "[99999s]", "is no time between 0 and a day"),
    ],
)
def test_faults_are_found_with_their_place(text, at, what, why):
    with pytest.raises(ValueError) as error:
        parse(text, 3, 16, 4)
    assert str(error.value).startswith(f"character {at} of {text!r}: {what!r} {why}")


def test_a_backslash_makes_bars_and_brackets_text():
    text = r"a tin robot \| soft light \[5s] [2s] | a \[#] boat \\ c"
    assert parse(text, 3, 16, 4) == [
        Scene("a tin robot | soft light [5s]", 2.0, 2, False),
        Scene(r"a [#] boat \\ c", 10.5, 14, False),
    ]
    plain = r"a \| b \[5s], \ c"
    assert is_plain(plain)
    assert literal(plain).prompt == parse(plain, 3, 16, 4)[0].prompt == r"a | b [5s], \ c"
    for text, way in ((r"a || b", r"or \| where the bar is text"), ("a [5]", r"or \[ where it is")):
        with pytest.raises(ValueError, match=re.escape(way)):
            parse(text, 3, 16, 4)
    # the published code knows no escape
    assert [scene.prompt for scene in parse_published(r"a \| b\[5s]", 3, 16, 4)] == ["a \\", "b\\"]


@pytest.mark.parametrize("fill", ["9", "9.", " ", "[", "[5", "[5s#]", "|", "\\", "[ 5 s "])
def test_no_scene_string_takes_long(fill):
    """Each takes milliseconds, where the time once grew with the square of the digits."""
    start = time.process_time()
    for text in ("a[5" + fill * 30_000, "a[" + fill * 30_000 + "s]", fill * 30_000 + "x"):
        is_plain(text)
        parse_published(text, 3, 16, 4)
        with contextlib.suppress(ValueError):
            parse(text, 3, 16, 4)
    assert time.process_time() - start < 2


def test_a_fault_of_a_long_text_is_shown_with_what_stands_around_it():
    text = "a cat " * 1000 + "[5] | " + "a dog " * 1000
    with pytest.raises(ValueError) as error:
        parse(text, 3, 16, 4)
    assert "character 6001 of ...'" in str(error.value) and "'[5]' is no dur" in str(error.value)
    assert len(str(error.value)) < 300


def switched(texts, switches, given=0, layout=RELATIVE):
    prompt = json.dumps({"prompts": texts, "switch_frames": switches})
    assert not is_plain(prompt)
    return read(prompt, layout, Rules(), 16, 4, given)


def test_prompts_with_switch_frames_are_scenes():
    found = switched(["a | b", "c [5s]", "d"], [6, 7])
    assert [scene.prompt for scene in found] == ["a | b", "c [5s]", "d"]
    assert [scene.blocks for scene in found[:2]] == [2, 1]
    timeline = timeline_of(found, 18, RELATIVE, Rules())
    assert [plan.scene for plan in timeline.blocks] == [0, 0, 1, 2, 2, 2]
    assert timeline.changes == [6, 9]
    # given frames come first
    assert [scene.blocks for scene in switched(["a", "b"], [12], given=6)][0] == 2
    # their texts are taken as they are
    assert switched([r"a \| b"], [])[0].prompt == r"a \| b"
    assert literal(json.dumps({"prompts": [r"a \| b"]})).prompt == r"a \| b"


@pytest.mark.parametrize(
    ("texts", "switches", "message"),
    [
        ([], [], 'expected {"prompts": '),
        (["a", " "], [3], 'expected {"prompts": '),
        (["a", 1], [3], 'expected {"prompts": '),
        (["a", "b"], None, "switch_frames is None; expected 1 latent frames"),
        (["a", "b"], [3, 6], "switch_frames is [3, 6]; expected 1 latent frames"),
        (["a", "b", "c"], [6, 3], "switch_frames is [6, 3]; expected 2 latent frames in ascending"),
        (["a", "b"], [3.5], "switch_frames is [3.5]"),
        (["a", "b"], [0], "prompt 1 gets no block"),
        (["a", "b"], [10**15], "more than a day"),
    ],
)
def test_bad_switch_frames_are_refused(texts, switches, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        switched(texts, switches)


def test_whole_videos_have_one_prompt():
    with pytest.raises(ValueError, match="2 prompts follow each other, .* config.streaming.window"):
        literal('{"prompts": ["a", "b"], "switch_frames": [3]}')


def test_plain_prompts():
    assert is_plain("[4k] a cat [at work] #1, [2 dogs], [3 stars]")
    assert not is_plain("a | b")
    assert not is_plain("a [5S]")


@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_videos_are_as_long_as_they_say(parts, block):
    text = " | ".join(
        f"scene {i}[{seconds:.2f}s{'#' * cut}]" for i, (seconds, cut) in enumerate(parts)
    )
    scenes = parse(text, block, 16, 4)
    layout = Layout(block=block, window=3 * block, positions="relative")
    video = shots(scenes, layout, Rules(), 16, 4)
    prompts = [prompt for shot in video for prompt in shot.timeline.prompts]
    assert prompts == [scene.prompt for scene in scenes]
    assert len(video) == 1 + sum(scene.cut for scene in scenes[:-1])
    for shot in video:
        timeline = shot.timeline
        seconds = [scene.seconds for scene in scenes if scene.prompt in timeline.prompts]
        blocks = [scene.blocks for scene in scenes if scene.prompt in timeline.prompts]
        shown = 1 + 4 * (shot.latent_frames - 1)
        assert shown - 4 * block < shot.frames <= shown
        assert shot.frames == max(round(sum(seconds) * 16), 1 + 4 * (block * sum(blocks) - 1))
        counts = np.bincount([plan.scene for plan in timeline.blocks]).tolist()
        assert counts[:-1] == blocks[:-1]
        assert counts[-1] >= blocks[-1]


def video(layout, rules, *lengths, cut=False, **options):
    scenes = [Scene(str(i), blocks * 0.75, blocks, cut) for i, blocks in enumerate(lengths)]
    return shots(scenes, layout, rules, 16, 4, **options)


def blocks_of(layout, rules, *lengths, cut=False):
    """The blocks of a video that is one shot."""
    (shot,) = video(layout, rules, *lengths, cut=cut)
    return shot.timeline.blocks


def kept(layout, rules, *lengths, cut=False):
    """What the first change of prompts keeps."""
    return blocks_of(layout, rules, *lengths, cut=cut)[lengths[0]].change.keep


def test_a_flush_keeps_the_first_frame_and_the_last_two():
    plan = blocks_of(RELATIVE, Rules(), 6, 3)[6]
    assert plan.change.keep == (0, 10, 11)  # of a window of 12
    assert plan.change.end == 18
    assert (plan.frame, plan.start, plan.positions) == (18, 3, (3, 4, 5))
    assert not plan.cut
    # of the 6 that are there; published: places 10 and 11, which are empty
    assert kept(RELATIVE, Rules(), 2, 3) == (0, 4, 5)
    assert kept(RELATIVE, Rules(published=True), 2, 3) == (0, 10, 11)
    single = Layout(block=1, window=12, positions="relative")
    assert kept(single, Rules(), 1, 3) == (0,)
    assert kept(single, Rules(), 2, 3) == (0, 1)


def test_absolute_positions_go_on_after_a_flush_and_jump_behind_a_cut():
    plans = blocks_of(ABSOLUTE, Rules(), 6, 3)[5:8]
    assert [plan.positions for plan in plans] == [(15, 16, 17), (18, 19, 20), (21, 22, 23)]
    plans = blocks_of(ABSOLUTE, Rules(), 6, 3, cut=True)[5:8]
    assert [plan.positions for plan in plans] == [(15, 16, 17), (45, 46, 47), (21, 22, 23)]
    assert [plan.start for plan in plans] == [15, 3, 6]
    assert plans[1].cut


def test_a_cut_with_relative_positions_keeps_the_sink():
    plan = blocks_of(RELATIVE, Rules(), 6, 3, cut=True)[6]
    assert plan.change.keep == (0, 1, 2)
    assert plan.positions == (3, 4, 5)
    assert kept(RELATIVE, Rules(published=True), 6, 3, cut=True) == (0, 10, 11)


@pytest.mark.parametrize(
    ("layout", "rules"),
    [
        (NO_SINK, Rules()),
        (RELATIVE, Rules(cut="nothing")),
        (ABSOLUTE, Rules(cut="nothing")),
    ],
)
def test_a_cut_that_keeps_nothing_begins_a_new_shot(layout, rules):
    _, second = video(layout, rules, 6, 3, cut=True)
    # the last in part
    assert [plan.frame for plan in second.timeline.blocks] == [0, 3, 6, 9]
    assert second.frames == 36
    assert not any(plan.change for plan in second.timeline.blocks)


def test_where_all_transitions_are_cuts_scenes_without_a_sink_are_shots():
    assert len(video(NO_SINK, Rules("cut"), 6, 3)) == 2


def test_a_recache_makes_the_keys_of_the_window_anew():
    plan = blocks_of(RELATIVE, Rules("recache"), 6, 3)[6]
    change = plan.change
    assert change.keep is None
    assert change.frames == change.positions == tuple(range(6, 18))
    assert change.skip == 3
    assert plan.start == 18
    plan = blocks_of(RELATIVE, Rules("recache", global_sink=False), 6, 3)[6]
    assert plan.change.skip == 0
    # a window just full: the sink is made anew as well
    change = blocks_of(RELATIVE, Rules("recache"), 4, 3)[4].change
    assert change.frames == tuple(range(12))
    assert change.skip == 0


def test_a_recache_behind_a_cut_knows_which_frames_the_cache_holds():
    scenes = [Scene("a", 4.5, 6, True), Scene("b", 1.5, 2, False), Scene("c", 1.5, 2, False)]
    (shot,) = shots(scenes, RELATIVE, Rules("recache"), 16, 4)
    change = shot.timeline.blocks[8].change
    assert change.frames == (0, 1, 2, 18, 19, 20, 21, 22, 23)
    assert change.positions == tuple(range(9))


def test_a_timeline_of_so_many_frames_leaves_the_rest_to_its_last_scene():
    """It is the shot of the same length, and knows where prompts change."""
    scenes = [Scene("a", 1.5, 2, False), Scene("b", 1.5, 2, True), Scene("c", 0.0, 0, False)]
    timeline = timeline_of(scenes, 18, RELATIVE, Rules())
    assert [plan.scene for plan in timeline.blocks] == [0, 0, 1, 1, 2, 2]
    assert timeline.changes == [6, 12]
    assert timeline.prompts == ("a", "b", "c")
    (shot,) = shots(scenes, RELATIVE, Rules(), 16, 4, frames=1 + 4 * 17)
    assert shot.timeline == timeline


def test_switches_take_one_block_each():
    assert scenes_by_frame([40, 80], range(0, 90, 3)) == [0] * 14 + [1] * 13 + [2] * 3
    assert scenes_by_frame([2, 2], [0, 3, 6]) == [0, 1, 2]


def test_given_frames_come_first():
    """They are blocks of the first scene, and come before its time."""
    (shot,) = video(RELATIVE, Rules(), 2, 2, given=6)
    plans = shot.timeline.blocks
    assert [plan.frame for plan in plans] == [0, 3, 6, 9, 12, 15]
    assert [plan.scene for plan in plans] == [0, 0, 0, 0, 1, 1]
    assert shot.given == 6
    assert shot.latent_frames == 18
    assert shot.frames == 21 + 48
    assert plans[4].change.keep == (0, 10, 11)
    assert plans[:2] == timeline_of([Scene("", 1.0, 1, False)], 6, RELATIVE, Rules()).blocks


@pytest.mark.parametrize(
    ("layout", "lengths", "options", "message"),
    [
        (RELATIVE, (6, 3), {"frames": 69}, "69 frames are over before scene 2 begins"),
        (
            RELATIVE,
            (1,),
            {"given": 6, "frames": 21},
            "gives 21 frames, and the whole video is to have 21: .* ask for at least 33, with",
        ),
        (ABSOLUTE, (400,), {}, "exceed the 1024 absolute positions; use positions='relative'"),
    ],
)
def test_what_cannot_be_is_refused(layout, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        video(layout, Rules(), *lengths, **options)


def test_timelines_are_plain_data():
    """They are part of what a video is recognised by."""
    (shot,) = video(RELATIVE, Rules("recache"), 6, 3)
    _, plans = json.loads(json.dumps(shot._asdict()))["timeline"]
    assert plans[6][7][2] == list(range(6, 18))
    assert {shot.timeline: "hashable"}[shot.timeline]


@pytest.mark.parametrize("frames", [1, 4, 7])
def test_an_independent_first_frame_is_a_block(frames):
    layout = Layout(block=3, window=9, independent_first_frame=True, positions="relative")
    (shot,) = shots(
        [Scene("a", 0.0, 0, False)], layout, Rules(), 16, 4, frames=1 + 4 * (frames - 1)
    )
    counts = [plan.count for plan in shot.timeline.blocks]
    assert counts == [1, 3, 3][: 1 + frames // 3]
    assert shot.latent_frames == frames


def test_a_recache_of_places_that_hold_nothing_is_refused():
    scenes = [Scene("a", 1.5, 2, True), Scene("b", 1.5, 2, False), Scene("c", 1.5, 2, False)]
    with pytest.raises(ValueError, match="a re-cache behind a published flush"):
        shots(scenes, RELATIVE, Rules("recache", published=True), 16, 4)
