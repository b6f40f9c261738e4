import collections
import hashlib
import itertools

import pytest

from astrolabe_jax.streaming import scenes
from astrolabe_jax.worlds.moving_shapes import vocabulary


def test_prompt_and_attributes_are_inverse():
    everything = vocabulary.all_attributes()
    prompts = [vocabulary.to_prompt(attributes) for attributes in everything]
    assert [vocabulary.parse(prompt) for prompt in prompts] == everything
    assert len(set(prompts)) == len(everything)


def test_prompts_read_as_documented():
    attributes = vocabulary.Attributes("red", "circle", "left", "quickly", "blue")
    assert (
        vocabulary.to_prompt(attributes) == "a red circle moving left quickly on a blue background"
    )
    assert vocabulary.parse(
        "a  red circle moving left on a blue background\n"
    ) == attributes._replace(speed="")


def test_no_shape_hides_in_its_background():
    assert all(a.colour != a.background for a in vocabulary.all_attributes())
    combinations = [
        len(vocabulary.COLOURS) * len(vocabulary.BACKGROUNDS) - 1,  # blue on blue is the only clash
        len(vocabulary.SHAPES),
        len(vocabulary.DIRECTIONS),
        len(vocabulary.SPEEDS),
    ]
    assert len(vocabulary.all_attributes()) == 23 * 3 * 4 * 3
    assert (
        len(vocabulary.all_attributes())
        == combinations[0] * combinations[1] * combinations[2] * combinations[3]
    )


def test_splits_are_disjoint_and_complete():
    train, test = vocabulary.prompts("train"), vocabulary.prompts("test")
    assert not set(train) & set(test)
    assert set(train) | set(test) == {vocabulary.to_prompt(a) for a in vocabulary.all_attributes()}
    assert len(train) > 4 * len(test)


def test_the_held_out_split_asks_for_unseen_triples_of_seen_pairs():
    def seen(split, *fields):
        return {
            tuple(getattr(vocabulary.parse(p), field) for field in fields)
            for p in vocabulary.prompts(split)
        }

    triple = ("colour", "shape", "background")
    assert len(seen("test", *triple)) == 12
    assert not seen("train", *triple) & seen("test", *triple)
    for pair in itertools.combinations(vocabulary.Attributes._fields, 2):
        assert seen("test", *pair) <= seen("train", *pair)
    for field in triple:  # the held-out combinations favour no word
        counts = collections.Counter(
            getattr(vocabulary.parse(p), field) for p in vocabulary.prompts("test")
        )
        assert len(set(counts.values())) == 1


def test_words_are_those_of_the_training_prompts():
    everything = [vocabulary.to_prompt(attributes) for attributes in vocabulary.all_attributes()]
    assert {word for p in everything for word in p.split()} == {
        word for p in vocabulary.prompts("train") for word in p.split()
    }


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a blue circle moving left on a blue background",
        "a red circle moving left slowly quickly on a blue background",
        "A red circle moving left on a blue background",
    ],
)
def test_other_prompts_are_refused_with_the_vocabulary(prompt):
    with pytest.raises(
        ValueError, match=r"expected 'a COLOUR SHAPE.*red, green.*circle, square, triangle"
    ) as error:
        vocabulary.parse(prompt)
    assert repr(prompt) in str(error.value)


def test_an_unknown_split_is_named():
    with pytest.raises(
        ValueError, match=r"'validation'.*'train', 'test', 'long_train', 'long_test'"
    ):
        vocabulary.prompts("validation")


LONG = [(split, count) for split, count in vocabulary.LONG_SPLITS.items()]


@pytest.mark.parametrize(("split", "count"), LONG)
def test_scene_strings_are_those_of_the_sampler(split, count):
    """Scenes are windows of 9 latent frames, and their plain prompts are of the world."""
    prompts, listed = vocabulary.prompts(split), vocabulary.long_scenes(split)
    assert len(set(prompts)) == len(prompts) == len(listed) == count
    for prompt, video in zip(prompts, listed, strict=True):
        read = scenes.parse(prompt, block=3, fps=vocabulary.FPS, stride=4)
        assert [scene.prompt for scene in read] == [plain for plain, _ in video]
        assert not any(scene.cut for scene in read)
        ends = list(itertools.accumulate(scene.blocks for scene in read[:-1]))
        assert [4 * 3 * end - 3 for end in ends] == list(
            itertools.accumulate(n for _, n in video[:-1])
        )
        assert all(end % 3 == 0 for end in ends)
        assert sum(frames for _, frames in video) == vocabulary.LONG_FRAMES == 249


@pytest.mark.parametrize(("split", "count"), LONG)
def test_long_videos_are_plain_or_change_as_documented(split, count):
    videos = [
        [vocabulary.parse(plain) for plain, _ in video] for video in vocabulary.long_scenes(split)
    ]
    assert collections.Counter(map(len, videos)) == {1: count // 3, 2: count // 3, 3: count // 3}
    assert all(
        vocabulary.held_out(scene) == (split == "long_test") for video in videos for scene in video
    )
    pairs = [pair for video in videos for pair in itertools.pairwise(video)]
    changed = collections.Counter(
        tuple(name for name, a, b in zip(last._fields, last, new, strict=True) if a != b)
        for last, new in pairs
    )
    allowed = {tuple(tables) for tables in vocabulary.CHANGES} - (
        {("colour",)} if split == "long_test" else set()
    )
    assert set(changed) == allowed and min(changed.values()) > len(pairs) / 8
    for field in vocabulary.Attributes._fields:  # varied
        counts = collections.Counter(getattr(scene, field) for video in videos for scene in video)
        assert min(counts.values()) > max(counts.values()) / 2


def test_long_lists_stay_what_they_are():
    """Runs are repeated with them: no release of Python or numpy may change a list."""
    digests = [
        hashlib.sha256("\n".join(vocabulary.prompts(split)).encode()).hexdigest()
        for split, _ in LONG
    ]
    assert [digest[:16] for digest in digests] == ["8179681f88648ae0", "ab1c1f5bb1bb26a7"]
