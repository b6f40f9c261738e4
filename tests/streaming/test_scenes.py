"""Scene strings and the timeline that follows from them: text and whole numbers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.streaming.scenes import (
    Rules,
    Scene,
    is_plain,
    parse,
    parse_published,
    scenes_by_frame,
    shots,
)

ABSOLUTE = Layout(block=3, window=12, sink=3)
RELATIVE = Layout(block=3, window=12, sink=3, positions="relative")
NO_SINK = Layout(block=3, window=9, positions="relative")


def test_durations_and_cuts():
    assert parse("a cat[5s] | a dog[10s#]|a [2.5 s] bird", 3, 16) == [
        Scene("a cat", 5.0, 6, False),
        Scene("a dog", 10.0, 13, True),
        Scene("a  bird", 2.5, 3, False),
    ]
    assert parse("a | b", 1, 16)[0] == Scene("a", 10.5, 42, False)  # of blocks of any size
    assert parse("a #1 fan [at work] | b", 3, 16)[0] == Scene("a #1 fan [at work]", 10.5, 14, False)


def test_published_strings_are_read_as_published():
    assert parse_published("a #1 fan | [5S] b", 1, 16) == [
        Scene("a #1 fan", 3.5, 14, True),
        Scene("[5S] b", 3.5, 14, False),
    ]
    assert [scene.blocks for scene in parse_published("a[5s][6s] | b[5.s#]", 3, 16)] == [6, 6]
    assert parse_published("|", 3, 16)[1].prompt == ""


@pytest.mark.parametrize(
    ("text", "at", "what", "why"),
    [
        ("a[5s] | ", 8, " ", "is a scene without a prompt"),
        ("a[5s]||b", 7, "", "is a scene without a prompt"),
        ("a [5S] | b", 3, "[5S]", "is no duration"),
        ("a | b [ 5s ]", 7, "[ 5s ]", "is no duration"),
        ("a | b[.5s]", 6, "[.5s]", "is no duration"),
        ("a | b[-5s]", 6, "[-5s]", "is no duration"),
        ("a[5s #] | b", 2, "[5s #]", "is no duration"),
        ("a[5sec] | b", 2, "[5sec]", "is no duration"),
        ("a[5s | b", 2, "[5s ", "is no duration"),
        ("a | b[#]", 6, "[#]", "is no duration"),
        ("a[5s] [6s] | b", 7, "[6s]", "is a second duration"),
        ("a | b[5]", 6, "[5]", "is no duration"),
        ("a | b[0s]", 6, "[0s]", "is no time between 0 and a day"),
        ("a[99999s] | b", 2, "[99999s]", "is no time between 0 and a day"),
    ],
)
def test_faults_are_found_with_their_place(text, at, what, why):
    with pytest.raises(ValueError) as error:
        parse(text, 3, 16)
    assert str(error.value).startswith(f"character {at} of {text!r}: {what!r} {why}")


def test_plain_prompts():
    assert (
        is_plain("[4k] a cat [at work] #1, [2 dogs], [3 stars]")
        and not is_plain("a | b")
        and not is_plain("a [5S]")
    )


@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_videos_are_as_long_as_they_say(parts, block):
    text = " | ".join(
        f"scene {i}[{seconds:.2f}s{'#' * cut}]" for i, (seconds, cut) in enumerate(parts)
    )
    scenes = parse(text, block, 16)
    layout = Layout(block=block, window=3 * block, positions="relative")
    made = shots(scenes, layout, Rules(), 16)
    assert [prompt for shot in made for prompt in shot.prompts] == [
        scene.prompt for scene in scenes
    ]
    assert len(made) == 1 + sum(scene.cut for scene in scenes[:-1])
    for shot in made:
        seconds = [scene.seconds for scene in scenes if scene.prompt in shot.prompts]
        blocks = [scene.blocks for scene in scenes if scene.prompt in shot.prompts]
        shown = 1 + 4 * (shot.latent_frames - 1)
        assert shown - 4 * block < shot.frames <= shown
        assert shot.frames == max(round(sum(seconds) * 16), 1 + 4 * (block * sum(blocks) - 1))
        counts = [
            sum(step.scene == scene for step in shot.steps) for scene in range(len(shot.prompts))
        ]
        assert counts[:-1] == blocks[:-1] and counts[-1] >= blocks[-1]


def video(layout, rules, *lengths, cut=False, **options):
    scenes = [Scene(str(i), blocks * 0.75, blocks, cut) for i, blocks in enumerate(lengths)]
    return shots(scenes, layout, rules, 16, **options)


def test_a_flush_keeps_the_first_frame_and_the_last_two():
    (shot,) = video(RELATIVE, Rules(), 6, 3)
    step = shot.steps[6]
    assert step.change.keep == (0, 10, 11) and step.change.end == 18  # of a window of 12
    assert (step.frame, step.start, step.positions) == (18, 3, (3, 4, 5)) and not step.cut
    (shot,) = video(RELATIVE, Rules(), 2, 3)
    assert shot.steps[2].change.keep == (
        0,
        4,
        5,
    )  # of the 6 that are there; published: places 10 and 11, which are empty
    assert video(RELATIVE, Rules(published=True), 2, 3)[0].steps[2].change.keep == (0, 10, 11)
    single = Layout(block=1, window=12, positions="relative")
    assert video(single, Rules(), 1, 3)[0].steps[1].change.keep == (0,)
    assert video(single, Rules(), 2, 3)[0].steps[2].change.keep == (0, 1)


def test_absolute_positions_go_on_after_a_flush_and_jump_behind_a_cut():
    (shot,) = video(ABSOLUTE, Rules(), 6, 3)
    assert [step.positions for step in shot.steps[5:8]] == [
        (15, 16, 17),
        (18, 19, 20),
        (21, 22, 23),
    ]
    (shot,) = video(ABSOLUTE, Rules(), 6, 3, cut=True)
    assert [step.positions for step in shot.steps[5:8]] == [
        (15, 16, 17),
        (45, 46, 47),
        (21, 22, 23),
    ]
    assert [step.start for step in shot.steps[5:8]] == [15, 3, 6] and shot.steps[6].cut


def test_a_cut_with_relative_positions_keeps_the_sink_or_begins_a_new_shot():
    (shot,) = video(RELATIVE, Rules(), 6, 3, cut=True)
    assert shot.steps[6].change.keep == (0, 1, 2) and shot.steps[6].positions == (3, 4, 5)
    assert video(RELATIVE, Rules(published=True), 6, 3, cut=True)[0].steps[6].change.keep == (
        0,
        10,
        11,
    )
    for layout, rules in (
        (NO_SINK, Rules()),
        (RELATIVE, Rules(cut="nothing")),
        (ABSOLUTE, Rules(cut="nothing")),
    ):
        first, second = video(layout, rules, 6, 3, cut=True)
        # the last in part
        assert [step.frame for step in second.steps] == [0, 3, 6, 9] and second.frames == 36
        assert not any(step.change for step in second.steps)
    assert len(video(NO_SINK, Rules("cut"), 6, 3)) == 2


def test_a_recache_makes_the_keys_of_the_window_anew():
    (shot,) = video(RELATIVE, Rules("recache"), 6, 3)
    change = shot.steps[6].change
    assert (
        change.keep is None
        and change.frames == change.positions == tuple(range(6, 18))
        and change.skip == 3
    )
    assert shot.steps[6].start == 18
    assert video(RELATIVE, Rules("recache", global_sink=False), 6, 3)[0].steps[6].change.skip == 0
    change = video(RELATIVE, Rules("recache"), 4, 3)[0].steps[4].change
    # a window just full: the sink is made anew as well
    assert change.frames == tuple(range(12)) and change.skip == 0


def test_a_recache_behind_a_cut_knows_which_frames_the_cache_holds():
    scenes = [Scene("a", 4.5, 6, True), Scene("b", 1.5, 2, False), Scene("c", 1.5, 2, False)]
    (shot,) = shots(scenes, RELATIVE, Rules("recache"), 16)
    change = shot.steps[8].change
    assert change.frames == (0, 1, 2, 18, 19, 20, 21, 22, 23) and change.positions == tuple(
        range(9)
    )


def test_switches_take_one_block_each():
    assert scenes_by_frame([40, 80], range(0, 90, 3)) == [0] * 14 + [1] * 13 + [2] * 3
    assert scenes_by_frame([2, 2], [0, 3, 6]) == [0, 1, 2]


def test_given_frames_come_first():
    (shot,) = video(RELATIVE, Rules(), 2, 2, given=6)
    assert [step.frame for step in shot.steps] == [6, 9, 12, 15] and shot.latent_frames == 18
    assert shot.frames == 21 + 48 and shot.steps[2].change.keep == (0, 10, 11)


@pytest.mark.parametrize(
    ("layout", "lengths", "options", "message"),
    [
        (RELATIVE, (6, 3), {"frames": 69}, "69 frames are over before scene 2 begins"),
        (
            RELATIVE,
            (1,),
            {"given": 6, "frames": 21},
            "all of the 21 frames are given, 21 frames .* at least 33",
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
    assert json.loads(json.dumps(shot._asdict()))["steps"][6][7][2] == list(range(6, 18))


@pytest.mark.parametrize("frames", [1, 4, 7])
def test_an_independent_first_frame_is_a_block(frames):
    layout = Layout(block=3, window=9, independent_first_frame=True, positions="relative")
    (shot,) = shots([Scene("a", 0.0, 0, False)], layout, Rules(), 16, frames=1 + 4 * (frames - 1))
    assert [step.count for step in shot.steps] == [1, 3, 3][
        : 1 + frames // 3
    ] and shot.latent_frames == frames


def test_a_recache_of_places_that_hold_nothing_is_refused():
    scenes = [Scene("a", 1.5, 2, True), Scene("b", 1.5, 2, False), Scene("c", 1.5, 2, False)]
    with pytest.raises(ValueError, match="a re-cache behind a published flush"):
        shots(scenes, RELATIVE, Rules("recache", published=True), 16)
