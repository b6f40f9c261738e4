import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from astrolabe_jax.worlds.moving_shapes import render, rewards, vocabulary
from astrolabe_jax.worlds.moving_shapes.vocabulary import Attributes

REWARDS = ("shapes_vq", "shapes_mq", "shapes_ta")
TABLES = {
    "colour": vocabulary.COLOURS,
    "shape": vocabulary.SHAPES,
    "direction": vocabulary.DIRECTIONS,
    "speed": vocabulary.SPEEDS,
    "background": vocabulary.BACKGROUNDS,
}


def draw(count, seed):
    """Random prompts of both splits and ground-truth videos of them."""
    rng = np.random.default_rng(seed)
    everything = vocabulary.prompts("train") + vocabulary.prompts("test")
    prompts = [everything[i] for i in rng.choice(len(everything), count, replace=False)]
    return np.stack([render.sample(prompt, rng) for prompt in prompts]), prompts


TRUTH, PROMPTS = draw(16, seed=0)
SCORES = rewards.score(TRUTH, PROMPTS)


def background(frames):
    return frames[:, :, :1, :1].astype(float)


def faint(frames, contrast):
    return np.rint(background(frames) + contrast * (frames - background(frames))).astype(np.uint8)


def blurred(frames, sigma):
    """Gaussian blur in height and width, in pixels."""
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-3)) ** 2).astype(np.float32)
    height, width = frames.shape[2:4]
    padded = np.pad(
        frames.astype(np.float32),
        [(0, 0), (0, 0), (reach, reach), (reach, reach), (0, 0)],
        mode="edge",
    )
    rows = sum(tap * padded[:, :, i : i + height] for i, tap in enumerate(taps / taps.sum()))
    columns = sum(tap * rows[:, :, :, i : i + width] for i, tap in enumerate(taps / taps.sum()))
    return np.rint(columns).astype(np.uint8)


def noisy(frames, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def shaken(prompts, amplitude):
    """The prompts' videos with a random error of the place in every frame, in pixels."""
    rng = np.random.default_rng(2)
    videos = []
    for prompt in prompts:
        attributes = vocabulary.parse(prompt)
        centres = render.bounce(attributes, render.sample_start(attributes, rng), render.FRAMES)
        videos.append(
            render.render(attributes, centres + amplitude * rng.normal(size=centres.shape))
        )
    return np.stack(videos)


def flickering(frames, other, period=4):
    """Every `period`-th frame comes from `other`."""
    frames = frames.copy()
    frames[:, ::period] = other[:, ::period]
    return frames


def scaled(frames, factor):
    """The shape shrunk around the frame's centre by `factor` (nearest neighbour)."""
    size = frames.shape[2]
    source = np.rint((np.arange(size) + 0.5 - size / 2) / factor + size / 2 - 0.5).astype(int)
    frames = np.pad(frames, [(0, 0), (0, 0), (64, 64), (64, 64), (0, 0)], mode="edge")
    return frames[:, :, source + 64][:, :, :, source + 64]


def change(prompt, field, seed=0):
    """The prompt with another value of one attribute."""
    attributes = vocabulary.parse(prompt)
    others = [attributes._replace(**{field: value}) for value in TABLES[field]]
    others = [other for other in others if other != attributes and other.colour != other.background]
    return vocabulary.to_prompt(
        others[np.random.default_rng([seed, len(prompt)]).integers(len(others))]
    )


def assert_descending(reward, versions, prompts=PROMPTS, margin=0.0, slack=0.0):
    """Means of a reward fall by more than `margin` from version to version, and no video rises by
    over `slack`.
    """
    scores = [rewards.score(version, prompts)[reward] for version in versions]
    for better, worse in zip(scores[:-1], scores[1:], strict=True):
        assert worse.mean() < better.mean() - margin
        assert (worse <= better + slack).all()


# Ground truth


@pytest.mark.parametrize("reward", REWARDS)
def test_ground_truth_scores_near_one(reward):
    frames, prompts = draw(64, seed=3)
    assert rewards.score(frames, prompts)[reward].min() > 0.97


@pytest.mark.parametrize("reward", REWARDS)
def test_a_score_is_the_product_of_its_parts(reward):
    floor = rewards.FLOOR
    scores = rewards.score(noisy(blurred(TRUTH, 1.0), 20), PROMPTS[::-1])
    parts = {part: scores[f"{reward}/{part}"] for part in rewards.EXPONENTS[reward]}
    product = np.prod(
        [((parts[p] + floor) / (1 + floor)) ** e for p, e in rewards.EXPONENTS[reward].items()],
        axis=0,
    )
    np.testing.assert_allclose(scores[reward], product, rtol=1e-4)
    # visibility, and a mean of the others
    assert sum(rewards.EXPONENTS[reward].values()) == pytest.approx(2)


# Any input


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, (2, 3, 7, 9, 3)))
@example(np.zeros((2, 3, 7, 9, 3), np.uint8))
@example(np.full((2, 3, 7, 9, 3), 255, np.uint8))
@example(np.random.default_rng(0).integers(0, 256, (2, 3, 7, 9, 3), dtype=np.uint8))
def test_scores_and_parts_are_finite_and_between_0_and_1(frames):
    for name, values in rewards.score(frames, PROMPTS[:2]).items():
        assert values.dtype == np.float32 and values.shape == (2,), name
        assert ((values >= 0) & (values <= 1)).all(), name  # false for NaN too


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 127))
def test_no_noise_scores_high(seed, amplitude):
    noise = np.random.default_rng(seed).uniform(-amplitude, amplitude, TRUTH[:1].shape)
    scores = rewards.score(np.rint(128 + noise).astype(np.uint8), PROMPTS[:1])
    assert all(scores[reward] < 0.3 for reward in REWARDS)


def test_the_smallest_video_has_two_frames_of_two_by_two_pixels():
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 2, 3), dtype=np.uint8)
    assert all(0 <= values[0] <= 1 for values in rewards.score(frames, PROMPTS[:1]).values())


def test_two_frames_of_ground_truth_score_near_one():
    scores = rewards.score(TRUTH[:, :2], PROMPTS)
    assert min(scores[reward].min() for reward in REWARDS) > 0.9


def test_a_score_does_not_depend_on_the_batch():
    frames, prompts = noisy(TRUTH, 10)[:11], PROMPTS[:11]
    whole = rewards.score(frames, prompts)
    for i in (0, 7, 10):
        alone = rewards.score(frames[i : i + 1], prompts[i : i + 1])
        assert all((alone[name] == whole[name][i : i + 1]).all() for name in whole)


@pytest.mark.parametrize(
    ("frames", "prompts", "message"),
    [
        (
            TRUTH[:2].astype(np.float32),
            PROMPTS[:2],
            r"uint8 video .* got float32 \[2, 33, 48, 48, 3\]",
        ),
        (TRUTH[0], PROMPTS[:1], r"got uint8 \[33, 48, 48, 3\]"),
        (TRUTH[:2, :1], PROMPTS[:2], "at least 2 frames"),
        (TRUTH[:0], [], "at least one"),
        (TRUTH[:2], PROMPTS[:3], "2 videos but 3 prompts"),
        (TRUTH[:1], ["a cat"], "'a cat'"),
    ],
)
def test_bad_input_is_named(frames, prompts, message):
    with pytest.raises(ValueError, match=message):
        rewards.score(frames, prompts)


# Text alignment


@pytest.mark.parametrize("field", Attributes._fields)
def test_each_wrong_attribute_lowers_alignment_and_only_its_own_part(field):
    wrong = rewards.score(TRUTH, [change(prompt, field) for prompt in PROMPTS])
    assert (wrong["shapes_ta"] < SCORES["shapes_ta"] - 0.15).all()
    assert (wrong[f"shapes_ta/{field}"] < 0.5).all()
    for other in set(Attributes._fields) - {field}:
        np.testing.assert_allclose(
            wrong[f"shapes_ta/{other}"], SCORES[f"shapes_ta/{other}"], atol=1e-6
        )


def test_alignment_falls_with_every_further_wrong_attribute():
    prompts, last = PROMPTS, SCORES["shapes_ta"]
    for field in Attributes._fields:
        prompts = [change(prompt, field) for prompt in prompts]
        scores = rewards.score(TRUTH, prompts)["shapes_ta"]
        assert (scores < last).all()
        last = scores
    assert last.max() < 0.25


def test_nearer_is_better_for_speed_direction_and_colour():
    def parts(video, prompt):
        scores = rewards.score(video[None], [prompt])
        return {field: scores[f"shapes_ta/{field}"][0] for field in Attributes._fields}

    quick = "a red circle moving left quickly on a grey background"
    videos = {
        prompt: render.sample(prompt, np.random.default_rng(0))
        for prompt in (quick, quick.replace("quickly ", ""), quick.replace("quickly", "slowly"))
    }
    speeds = [parts(video, quick)["speed"] for video in videos.values()]
    assert speeds[0] > speeds[1] + 0.2 > speeds[2] + 0.3
    directions = [
        parts(render.sample(quick.replace("left", way), np.random.default_rng(0)), quick)[
            "direction"
        ]
        for way in ("left", "up", "right")
    ]
    assert directions[0] > directions[1] + 0.5 > directions[2] + 0.6
    red, blue = (
        videos[quick].astype(float),
        render.sample(quick.replace("red", "blue"), np.random.default_rng(0)),
    )
    mixed = [
        np.rint((1 - share) * red + share * blue).astype(np.uint8)
        for share in (0, 0.1, 0.3, 0.6, 1)
    ]
    colours = np.array([parts(video, quick)["colour"] for video in mixed])
    assert (np.diff(colours) < -0.02).all()


@pytest.mark.parametrize("shape", vocabulary.SHAPES)
def test_shapes_are_told_apart_under_blur_and_noise(shape):
    prompts = [p for p in vocabulary.prompts("train") if f" {shape} " in p][::60]
    frames = np.stack([render.sample(prompt, np.random.default_rng(0)) for prompt in prompts])
    for version in (frames, blurred(frames, 1.5), noisy(frames, 20)):
        right = rewards.score(version, prompts)["shapes_ta/shape"]
        for other in set(vocabulary.SHAPES) - {shape}:
            wrong = rewards.score(version, [p.replace(f" {shape} ", f" {other} ") for p in prompts])
            assert (right > wrong["shapes_ta/shape"] + 0.3).all()


# Visual quality


def test_quality_falls_as_the_shape_fades():
    assert_descending("shapes_vq", [faint(TRUTH, c) for c in (1, 0.6, 0.3, 0.1, 0)], margin=0.1)


def test_quality_of_empty_frames_is_nothing():
    empty = rewards.score(faint(TRUTH, 0), PROMPTS)
    assert all(empty[reward].max() < 0.02 for reward in REWARDS)


def test_quality_sees_dirt_blotches_and_colours_off_the_palette():
    shape = np.abs(TRUTH - background(TRUTH)).sum(-1, keepdims=True) > 100
    texture = 40 * np.sign(np.random.default_rng(0).normal(size=TRUTH[:1, :1].shape))
    dirty = np.where(shape, TRUTH, np.clip(TRUTH + texture, 0, 255)).astype(np.uint8)
    blotchy = np.where(shape, np.clip(TRUTH + texture, 0, 255), TRUTH).astype(np.uint8)
    brown = np.where(shape, np.array([140, 100, 60]), TRUTH).astype(np.uint8)
    tinted = np.where(shape, TRUTH, np.array([190, 150, 90])).astype(np.uint8)
    for version, part in [
        (dirty, "cleanness"),
        (blotchy, "cleanness"),
        (brown, "palette"),
        (tinted, "palette"),
    ]:
        scores = rewards.score(version, PROMPTS)
        assert (scores["shapes_vq"] < SCORES["shapes_vq"] - 0.05).all()
        assert (scores[f"shapes_vq/{part}"] < 0.8).all()


def test_only_the_renderers_edge_is_fully_crisp():
    crispness = [
        rewards.score(blurred(TRUTH, s), PROMPTS)["shapes_vq/crispness"] for s in (0, 0.5, 1, 2, 4)
    ]
    assert crispness[0].min() > 0.98 and crispness[0].min() - crispness[1].max() > 0.02
    assert all(
        (worse < better).all() for better, worse in zip(crispness[:-1], crispness[1:], strict=True)
    )


# Motion quality


def test_motion_falls_with_shaking():
    assert_descending(
        "shapes_mq", [shaken(PROMPTS, a) for a in (0, 0.1, 0.3, 1, 3)], margin=0.03, slack=0.05
    )


@pytest.mark.parametrize("damage", ["static", "shuffled", "teleporting", "choppy", "reversing"])
def test_motion_sees(damage):
    order = np.arange(render.FRAMES)
    order = {
        "static": np.full(render.FRAMES, 16),
        "shuffled": np.random.default_rng(0).permutation(render.FRAMES),
        "teleporting": np.where(order < 16, order, 48 - order),  # jumps to the end and comes back
        "choppy": order // 4 * 4,
        "reversing": np.minimum(order, 32 - order),
    }[damage]
    # all but what moves slowly: there, halts and jumps are no longer than half a pixel
    moving = [i for i, prompt in enumerate(PROMPTS) if "slowly" not in prompt]
    scores = rewards.score(TRUTH[moving][:, order], [PROMPTS[i] for i in moving])["shapes_mq"]
    assert scores.max() < 0.85 and scores.mean() < 0.6


def test_motion_sees_flicker_of_colour_size_shape_and_background():
    def video(changes):
        """Ground truth of changed attributes on the same paths."""
        frames = []
        for i, prompt in enumerate(PROMPTS):
            attributes = vocabulary.parse(prompt)
            changed = {
                field: other
                for field, other in changes.items()
                if getattr(attributes, field) != other
            }
            start = render.sample_start(attributes, np.random.default_rng(i))
            centres = render.bounce(attributes, start, render.FRAMES)
            frames.append(render.render(attributes._replace(**changed), centres))
        return np.stack(frames)

    steady = video({})
    shape = np.abs(steady - background(steady)).sum(-1, keepdims=True) > 10
    dimmed = np.where(shape, np.rint(0.8 * steady), steady).astype(np.uint8)
    tinted = np.where(shape, steady, steady + np.where(steady < 128, 25.0, -25.0)).astype(np.uint8)
    assert rewards.score(steady, PROMPTS)["shapes_mq"].min() > 0.97
    for other, part in [(dimmed, "colour"), (tinted, "stillness"), (scaled(steady, 0.8), "form")]:
        scores = rewards.score(flickering(steady, other), PROMPTS)
        assert scores["shapes_mq"].max() < 0.92 and scores[f"shapes_mq/{part}"].max() < 0.6
    for shape in vocabulary.SHAPES:
        changed = [i for i, prompt in enumerate(PROMPTS) if f" {shape} " not in prompt]
        scores = rewards.score(
            flickering(steady, video({"shape": shape}))[changed], [PROMPTS[i] for i in changed]
        )
        assert scores["shapes_mq/form"].max() < 0.7


def test_a_shape_that_vanishes_lowers_all():
    vanishing = rewards.score(flickering(TRUTH, faint(TRUTH, 0)), PROMPTS)
    for reward in REWARDS:
        assert (vanishing[reward] < SCORES[reward] - 0.2).all()


# All three


def test_blur_lowers_quality_most():
    versions = [blurred(TRUTH, sigma) for sigma in (0, 0.5, 1, 1.5, 2, 3)]
    assert_descending("shapes_vq", versions, margin=0.03)
    assert_descending("shapes_ta", versions, slack=1e-3)
    sharp, soft = (rewards.score(version, PROMPTS) for version in (TRUTH, versions[-1]))
    lost = {name: np.mean(sharp[name] - soft[name]) for name in rewards.EXPONENTS}
    assert lost["shapes_vq"] > 2 * max(lost["shapes_mq"], lost["shapes_ta"])


def test_noise_lowers_all():
    versions = [noisy(TRUTH, sigma) for sigma in (0, 5, 10, 20, 40)]
    assert_descending("shapes_vq", versions, margin=0.05)
    assert_descending("shapes_mq", versions, margin=0.03, slack=0.01)
    assert_descending("shapes_ta", versions, slack=0.01)


def test_mediocre_videos_are_neither_hopeless_nor_done():
    """A blurred, noisy, faded and shaking video has room above and below in every reward."""
    rough = noisy(blurred(faint(shaken(PROMPTS, 0.3), 0.75), 1.5), 6)
    scores = rewards.score(rough, PROMPTS)
    for reward in REWARDS:
        assert 0.3 < scores[reward].mean() < 0.8


def test_the_rewards_conflict():
    static = rewards.score(np.repeat(TRUTH[:, 16:17], render.FRAMES, axis=1), PROMPTS)
    # VQ is content without motion
    assert (static["shapes_vq"] > 0.98).all() and (static["shapes_mq"] < 0.4).all()
    other = rewards.score(TRUTH, [change(change(prompt, "colour"), "speed") for prompt in PROMPTS])
    assert (other["shapes_vq"] == SCORES["shapes_vq"]).all()  # VQ and MQ do not know the prompt
    assert (other["shapes_mq"] == SCORES["shapes_mq"]).all() and (other["shapes_ta"] < 0.7).all()
    soft = rewards.score(blurred(TRUTH, 1.5), PROMPTS)
    # MQ is content with blur
    assert (soft["shapes_mq"] > 0.98).all() and (soft["shapes_vq"] < 0.75).all()
    quick = [p for p in vocabulary.prompts("train") if "quickly" in p][::20]
    slow = [prompt.replace("quickly", "slowly") for prompt in quick]

    def choppy(prompts):  # a decoder that repeats every second frame
        frames = np.stack([render.sample(prompt, np.random.default_rng(0)) for prompt in prompts])
        return frames[:, np.arange(render.FRAMES) // 2 * 2]

    asked, safe = rewards.score(choppy(quick), quick), rewards.score(choppy(slow), quick)
    assert (asked["shapes_mq"] < safe["shapes_mq"]).all() and (
        asked["shapes_ta"] > safe["shapes_ta"]
    ).all()


# Bounces

BOUNCE = ("bounce_mq", "bounce_ta")
CLIP = 36  # frames of a window of a long video
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
OTHER_AXIS = {"left": "up", "right": "down", "up": "left", "down": "right"}


def swap(prompt, words):
    return " ".join(words.get(word, word) for word in prompt.split())


def bouncing(turn, frames=CLIP):
    """Attributes and centres [T, 2] for every shape, direction and speed, coming to the border in
    frame `turn`.
    """
    rng = np.random.default_rng(0)
    made = []
    for attributes in vocabulary.all_attributes():
        if (attributes.colour, attributes.background) != ("red", "grey"):
            continue
        low, high = render.bounds(attributes.shape)
        unit = np.array(vocabulary.DIRECTIONS[attributes.direction])
        border = np.where(unit > 0, high, low)
        place = np.where(
            unit == 0,
            rng.uniform(low, high),
            border - turn * unit * vocabulary.SPEEDS[attributes.speed],
        )
        made.append((attributes, render.bounce(attributes, np.clip(place, low, high), frames)))
    return made


def scored(made):
    """Scores of the videos of (attributes, centres)."""
    videos = np.stack([render.render(attributes, centres) for attributes, centres in made])
    return rewards.score(videos, [vocabulary.to_prompt(attributes) for attributes, _ in made])


BOUNCING = bouncing(turn=17.4)
BOUNCED = scored(BOUNCING)


def test_the_first_three_rewards_are_those_of_the_first_version():
    """By values recorded before there were others (equal to the bit on that machine)."""
    prompts = (vocabulary.prompts("train") + vocabulary.prompts("test"))[::207]
    videos = np.stack(
        [render.sample(p, np.random.default_rng(i)) for i, p in enumerate(prompts)]
    ).astype(float)
    pattern = (
        7 * np.arange(33)[:, None, None, None]
        + 5 * np.arange(48)[:, None, None]
        + 3 * np.arange(48)[:, None]
    )
    rough = (
        np.rint(0.7 * videos + 0.2 * videos[::-1] + (pattern % 23)[None])
        .clip(0, 255)
        .astype(np.uint8)
    )
    recorded = {
        "shapes_vq": [0.59971845, 0.5363967, 0.52016747, 0.54410684],
        "shapes_mq": [0.7990137, 0.8372364, 0.8254837, 0.7513648],
        "shapes_ta": [0.7673344, 0.77388096, 0.71395403, 0.8000473],
    }
    scores = rewards.score(rough, prompts)
    for name, values in recorded.items():
        np.testing.assert_allclose(scores[name], np.float32(values), rtol=1e-5)


@pytest.mark.parametrize("frames", [CLIP, pytest.param(render.FRAMES, marks=pytest.mark.slow)])
def test_a_bounce_scores_like_a_straight_path(frames):
    """Wherever it happens in the clip; quick shapes that turn near an end turn twice."""
    starts = [
        (a, render.sample_start(a, np.random.default_rng(i))) for i, (a, _) in enumerate(BOUNCING)
    ]
    straight = scored([(a, render.bounce(a, start, render.FRAMES)) for a, start in starts])
    for turn in (0, 0.6, 2.5, 9.1, frames / 2, frames - 3.2, frames - 1.3):
        bounced = scored(bouncing(turn, frames))
        for name in BOUNCE:
            assert (
                bounced[name].min() > 0.97 and np.abs(bounced[name] - straight[name]).max() < 0.03
            ), turn


@pytest.mark.parametrize("damage", ["none", "blurred", "noisy", "shaken", "flickering"])
def test_without_a_bounce_the_rewards_are_the_old_ones(damage):
    versions = {
        "none": lambda: TRUTH,
        "blurred": lambda: blurred(TRUTH, 1.5),
        "noisy": lambda: noisy(TRUTH, 20),
        "shaken": lambda: shaken(PROMPTS, 0.3),
        "flickering": lambda: flickering(TRUTH, faint(TRUTH, 0)),
    }
    scores = rewards.score(versions[damage](), PROMPTS)
    for old, new in (("shapes_mq", "bounce_mq"), ("shapes_ta", "bounce_ta")):
        np.testing.assert_allclose(scores[new], scores[old], atol=0.01)


def test_the_way_along_the_axis_does_not_matter():
    scores = rewards.score(TRUTH, [swap(prompt, OPPOSITE) for prompt in PROMPTS])
    np.testing.assert_allclose(scores["bounce_ta"], SCORES["bounce_ta"], atol=1e-5)
    assert (scores["shapes_ta"] < SCORES["shapes_ta"] - 0.3).all()


def damaged(name):
    """The bouncing clips with something wrong: (attributes, centres)."""

    def spoil(attributes, centres):
        unit = np.array(vocabulary.DIRECTIONS[attributes.direction])
        time = np.arange(CLIP)[:, None]
        return {
            "still": np.repeat(centres[:1], CLIP, axis=0),
            "teleport": centres - 10 * unit * (time > 11),
            "teleport and turn": centres - 10 * unit * (time > 17),
            "reversal in mid-picture": centres - 8 * unit,
            "shuffled": centres[np.random.default_rng(0).permutation(CLIP)],
            "stop": centres[np.minimum(np.arange(CLIP), 17)],
            "early stop": centres[np.minimum(np.arange(CLIP), 8)],
        }[name]

    return [(attributes, spoil(attributes, centres)) for attributes, centres in BOUNCING]


@pytest.mark.parametrize(
    ("damage", "most"),
    [
        ("still", 0.4),
        ("teleport", 0.4),
        ("teleport and turn", 0.4),
        ("reversal in mid-picture", 0.85),
        ("shuffled", 0.4),
        ("stop", 0.91),
        ("early stop", 0.75),
    ],
)
def test_motion_with_bounces_sees(damage, most):
    scores = scored(damaged(damage))
    assert scores["bounce_mq"].max() < most


@pytest.mark.parametrize(("damage", "least"), [("still", 0.4), ("early stop", 0.2), ("stop", 0.1)])
def test_alignment_with_bounces_sees(damage, least):
    assert (scored(damaged(damage))["bounce_ta"] < BOUNCED["bounce_ta"] - least).all()


def test_a_turn_costs_more_the_farther_it_is_from_the_border():
    def early(pixels):
        shift = [
            (a, c - pixels * np.array(vocabulary.DIRECTIONS[a.direction])) for a, c in BOUNCING
        ]
        return scored(shift)["bounce_mq"]

    scores = [early(pixels) for pixels in (0, 0.5, 1, 2, 4, 8)]
    assert all(
        (worse < better - 0.002).all()
        for better, worse in zip(scores[:-1], scores[1:], strict=True)
    )
    assert scores[1].min() > 0.96 and scores[2].min() > 0.92  # forgiven by and by


def test_a_shape_that_vanishes_at_the_border_lowers_both():
    videos = np.stack([render.render(attributes, centres) for attributes, centres in BOUNCING])
    videos[:, 18:] = videos[:, :1, :1, :1]
    scores = rewards.score(videos, [vocabulary.to_prompt(attributes) for attributes, _ in BOUNCING])
    for name in BOUNCE:
        assert scores[name].max() < 0.6


@pytest.mark.parametrize("field", ["colour", "shape", "direction", "speed", "background"])
def test_alignment_with_bounces_sees_each_wrong_attribute(field):
    videos = np.stack([render.render(attributes, centres) for attributes, centres in BOUNCING])
    prompts = [vocabulary.to_prompt(attributes) for attributes, _ in BOUNCING]
    if field == "direction":
        wrong = [swap(prompt, OTHER_AXIS) for prompt in prompts]
    else:
        wrong = [change(prompt, field) for prompt in prompts]
    scores = rewards.score(videos, wrong)
    assert (scores["bounce_ta"] < BOUNCED["bounce_ta"] - 0.15).all()
    np.testing.assert_array_equal(scores["bounce_mq"], BOUNCED["bounce_mq"])
