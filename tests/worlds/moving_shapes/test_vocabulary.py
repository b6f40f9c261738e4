import collections
import itertools

import pytest

from astrolabe_jax.worlds.moving_shapes import vocabulary


def test_prompt_and_attributes_are_inverse():
    everything = vocabulary.all_attributes()
    prompts = [vocabulary.to_prompt(attributes) for attributes in everything]
    assert [vocabulary.parse(prompt) for prompt in prompts] == everything
    assert len(set(prompts)) == len(everything)


def test_prompts_read_as_documented():
    attributes = vocabulary.Attributes("red", "circle", "left", "quickly", "blue")
    assert vocabulary.to_prompt(attributes) == "a red circle moving left quickly on a blue background"
    assert vocabulary.parse("a  red circle moving left on a blue background\n") == attributes._replace(speed="")


def test_no_shape_hides_in_its_background():
    assert all(a.colour != a.background for a in vocabulary.all_attributes())
    combinations = [
        len(vocabulary.COLOURS) * len(vocabulary.BACKGROUNDS) - 1,  # blue on blue is the only clash
        len(vocabulary.SHAPES),
        len(vocabulary.DIRECTIONS),
        len(vocabulary.SPEEDS),
    ]
    assert len(vocabulary.all_attributes()) == 23 * 3 * 4 * 3
    assert len(vocabulary.all_attributes()) == combinations[0] * combinations[1] * combinations[2] * combinations[3]


def test_splits_are_disjoint_and_complete():
    train, test = vocabulary.prompts("train"), vocabulary.prompts("test")
    assert not set(train) & set(test)
    assert set(train) | set(test) == {vocabulary.to_prompt(a) for a in vocabulary.all_attributes()}
    assert len(train) > 4 * len(test)


def test_the_held_out_split_asks_for_unseen_triples_of_seen_pairs():
    def seen(split, *fields):
        return {tuple(getattr(vocabulary.parse(p), field) for field in fields) for p in vocabulary.prompts(split)}

    triple = ("colour", "shape", "background")
    assert len(seen("test", *triple)) == 12
    assert not seen("train", *triple) & seen("test", *triple)
    for pair in itertools.combinations(vocabulary.Attributes._fields, 2):
        assert seen("test", *pair) <= seen("train", *pair)
    for field in triple:  # the held-out combinations favour no word
        counts = collections.Counter(getattr(vocabulary.parse(p), field) for p in vocabulary.prompts("test"))
        assert len(set(counts.values())) == 1


def test_words_are_those_of_the_training_prompts():
    assert vocabulary.words() == sorted({word for p in vocabulary.prompts("train") for word in p.split()})


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
    with pytest.raises(ValueError, match=r"expected 'a COLOUR SHAPE.*red, green.*circle, square, triangle") as error:
        vocabulary.parse(prompt)
    assert repr(prompt) in str(error.value)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'validation'.*'train' or 'test'"):
        vocabulary.prompts("validation")
