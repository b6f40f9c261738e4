import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from astrolabe_jax.worlds.moving_shapes import dataset, render, vocabulary

PER_SPLIT = 5  # videos written per split in these tests


@pytest.fixture(autouse=True)
def no_tensorflow():
    before = "tensorflow" in sys.modules
    yield
    assert ("tensorflow" in sys.modules) == before


@pytest.fixture
def few():
    return tfds.download.DownloadConfig(max_examples_per_split=PER_SPLIT)


def assert_equal(record, example):
    assert set(record) == set(example) == {"prompt", "video", *vocabulary.Attributes._fields}
    for name, value in example.items():
        if name == "video":
            assert record[name].dtype == np.uint8 and (record[name] == value).all()
        else:
            assert record[name].decode() == value


@pytest.mark.parametrize("file_format", [None, "parquet"])
def test_what_is_written_comes_back_at_random(tmp_path, few, file_format):
    dataset.MovingShapes(data_dir=tmp_path, file_format=file_format).download_and_prepare(
        download_config=few
    )
    builder = dataset.MovingShapes(data_dir=tmp_path)  # finds the format on disk
    for split in dataset.SPLITS:
        source = builder.as_data_source(split)
        assert len(source) == PER_SPLIT
        for index in (3, 0, 4):
            assert_equal(source[index], dataset.example(split, index))


def test_it_is_served_by_name(tmp_path, few):
    source = tfds.data_source(
        "moving_shapes",
        split="test",
        data_dir=tmp_path,
        download_and_prepare_kwargs={"download_config": few},
    )
    assert [record["prompt"].decode() for record in source] == vocabulary.prompts("test")[
        :PER_SPLIT
    ]


def test_a_prompt_may_have_several_videos(tmp_path, few):
    config = dataset.MovingShapesConfig(videos_per_prompt=3)
    builder = dataset.MovingShapes(data_dir=tmp_path, config=config)
    builder.download_and_prepare(download_config=few)
    source = builder.as_data_source("train")
    first, second = vocabulary.prompts("train")[:2]
    assert [source[i]["prompt"].decode() for i in range(PER_SPLIT)] == [first] * 3 + [second] * 2
    assert (source[0]["video"] != source[1]["video"]).any()
    assert dataset.MovingShapes(data_dir=tmp_path).data_dir != builder.data_dir


@pytest.mark.parametrize("file_format", [None, "parquet"])
def test_long_videos_come_back_with_their_scenes(tmp_path, few, file_format):
    builder = dataset.MovingShapes(
        data_dir=tmp_path, config="long_videos_per_prompt_1", file_format=file_format
    )
    builder.download_and_prepare(download_config=few)
    for split in dataset.SPLITS:
        source, scenes = builder.as_data_source(split), vocabulary.long_scenes(f"long_{split}")
        assert [record["prompt"].decode() for record in source] == vocabulary.prompts(
            f"long_{split}"
        )[:PER_SPLIT]
        for index in (2, 0):
            record, example = source[index], dataset.example(split, index, long=True)
            assert record["video"].shape == (vocabulary.LONG_FRAMES, render.SIZE, render.SIZE, 3)
            assert (record["video"] == example["video"]).all()
            read = [prompt.decode() for prompt in record["scenes"]["prompt"]]
            assert list(zip(read, record["scenes"]["frames"], strict=True)) == scenes[index]
            assert [(scene["prompt"], scene["frames"]) for scene in example["scenes"]] == scenes[
                index
            ]


def test_examples_are_the_splits_prompts_and_their_videos():
    prompts = [
        dataset.example("test", i)["prompt"] for i in range(0, len(vocabulary.prompts("test")), 20)
    ]
    assert prompts == vocabulary.prompts("test")[::20]
    example = dataset.example("test", 7)
    assert example["video"].shape == (render.FRAMES, render.SIZE, render.SIZE, 3)
    attributes = vocabulary.Attributes(*(example[field] for field in vocabulary.Attributes._fields))
    assert vocabulary.to_prompt(attributes) == example["prompt"]
    np.testing.assert_array_equal(example["video"], dataset.example("test", 7)["video"])


def test_no_two_videos_share_their_random_draws(monkeypatch):
    monkeypatch.setattr(render, "sample", lambda prompt, rng: rng.random())
    monkeypatch.setattr(render, "sample_scenes", lambda scenes, rng: rng.random())
    places = [
        (split, i, long) for split in ("train", "test") for i in range(3) for long in (False, True)
    ]
    drawn = [dataset.example(split, i, long=long)["video"] for split, i, long in places]
    assert len(set(drawn)) == len(drawn)


def test_bad_requests_are_named():
    with pytest.raises(
        IndexError, match=r"video 144 of moving_shapes/test, which has 144 prompts x 1 videos"
    ):
        dataset.example("test", 144)
    with pytest.raises(ValueError, match="'validation'"):
        dataset.example("validation", 0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        dataset.MovingShapesConfig(videos_per_prompt=0)
