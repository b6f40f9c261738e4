"""The moving-shapes world as a tensorflow-datasets builder that needs no TensorFlow.

    builder = MovingShapes(data_dir="...")
    builder.download_and_prepare()
    train = builder.as_data_source("train")   # random access: train[7]["video"], len(train)

or, once this module is imported, `tfds.data_source("moving_shapes", split="train",
data_dir="...")`. Splits are those of the vocabulary. Text comes back as bytes, as
tensorflow-datasets stores it.

Long videos, whose shapes bounce at the borders and change with their scenes, are a config of their
own:

    builder = MovingShapes(data_dir="...", config="long_videos_per_prompt_1")

or `tfds.data_source("moving_shapes/long_videos_per_prompt_1", ...)`; its `train` and `test` are
`long_train` and `long_test` of the vocabulary. A `prompt` is a scene string, and `scenes` has each
scene's plain prompt and its pixel frames. Several videos of a prompt:
`config=MovingShapesConfig(long=True, videos_per_prompt=3)`.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from astrolabe_jax.worlds.moving_shapes import render, vocabulary

SPLITS = ("train", "test")


@dataclasses.dataclass(kw_only=True)
class MovingShapesConfig(tfds.core.BuilderConfig):
    """Which videos are drawn; the name, a folder under `data_dir`, follows from the fields.

    Attributes:
      videos_per_prompt: videos of each prompt, each with a path of its own.
      long: whether they are long ones (see above).
    """

    name: str = ""
    videos_per_prompt: int = 1
    long: bool = False

    def __post_init__(self):
        if self.videos_per_prompt < 1:
            raise ValueError(f"videos_per_prompt must be at least 1, got {self.videos_per_prompt}")
        length = "long_" if self.long else ""
        self.name = f"{length}videos_per_prompt_{self.videos_per_prompt}"


def example(split: str, index: int, videos_per_prompt: int = 1, long: bool = False) -> dict:
    """Return video `index` of a split, which depends on nothing else.

    The videos of a prompt follow one another.

    Returns:
      prompt, colour, shape, direction, speed (empty: medium), background: str; video: uint8 `[33,
      48, 48, 3]`. For a long one prompt: str; video: uint8 `[249, 48, 48, 3]`; scenes: a list of
      {prompt: str, frames: int}.

    Raises:
      IndexError: for an index beyond the split.
      ValueError: for an unknown split.
    """
    name = f"long_{split}" if long else split
    prompts = vocabulary.prompts(name)
    if not 0 <= index < len(prompts) * videos_per_prompt:
        raise IndexError(
            f"video {index} of moving_shapes/{split}, which has {len(prompts)} prompts x "
            f"{videos_per_prompt} videos"
        )
    prompt = prompts[index // videos_per_prompt]
    rng = np.random.default_rng([SPLITS.index(split) + (len(SPLITS) if long else 0), index])
    if not long:
        return {
            "prompt": prompt,
            "video": render.sample(prompt, rng),
            **vocabulary.parse(prompt)._asdict(),
        }
    scenes = vocabulary.long_scenes(name)[index // videos_per_prompt]
    return {
        "prompt": prompt,
        "video": render.sample_scenes(scenes, rng),
        "scenes": [{"prompt": plain, "frames": frames} for plain, frames in scenes],
    }


class MovingShapes(tfds.core.GeneratorBasedBuilder):
    """One shape moving steadily on a plain background, with the prompt that says so."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [MovingShapesConfig(), MovingShapesConfig(long=True)]
    builder_config: MovingShapesConfig
    # Where to find checksums of downloads: there are none, and the default looks for them with
    # importlib_resources, which tensorflow-datasets 4.9.10 uses without requiring it.
    code_path = None

    def __init__(self, *, file_format: str | None = None, **kwargs):
        """Make a builder as every other.

        `file_format` is array_record (default) or parquet, which are read without TensorFlow.
        """
        super().__init__(file_format=file_format, **kwargs)
        if file_format is None and not self.info.initialized:
            self.info.set_file_format("array_record", override=True)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        long = self.builder_config.long
        video = tfds.features.Tensor(
            shape=(vocabulary.LONG_FRAMES if long else render.FRAMES, render.SIZE, render.SIZE, 3),
            dtype=np.uint8,
            encoding="zlib",
        )
        described = dict.fromkeys(vocabulary.Attributes._fields, text)
        if long:
            described = {"scenes": tfds.features.Sequence({"prompt": text, "frames": np.int32})}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"prompt": text, "video": video, **described}),
            disable_shuffling=True,  # record i is video i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        prompts = vocabulary.prompts(f"long_{split}" if config.long else split)
        for index in range(len(prompts) * config.videos_per_prompt):
            yield index, example(split, index, config.videos_per_prompt, config.long)
