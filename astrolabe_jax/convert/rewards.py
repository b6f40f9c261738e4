"""Published reward models -> reward directories (reward_store.py), as `python -m
astrolabe_jax.convert reward` does.

Everything is checked before anything is written: names and shapes of all tensors, the tokenizer,
every byte of the template. To add a kind, write a function from Given to Made, and add a line to
KINDS.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from astrolabe_jax.convert import clip, qwen2_vl, reward_store, sea_raft, templates
from astrolabe_jax.convert.commands import byte_counter
from astrolabe_jax.convert.reward_store import Checkpoint, Kind
from astrolabe_jax.models import clip_tokenizer
from astrolabe_jax.models.qwen2_vl import config as sizes
from astrolabe_jax.models.qwen2_vl.model import RewardNet
from astrolabe_jax.rewards import chat
from astrolabe_jax.runtime.files import INDEX, read_json

HPSV3 = Kind("hpsv3", RewardNet, sizes.HPSV3)
VIDEOALIGN = Kind("videoalign", RewardNet, sizes.VIDEOALIGN)
TOKENS = {
    HPSV3.name: ("<|Reward|>",),
    VIDEOALIGN.name: ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"),
}
ASPECTS = ("VQ", "MQ", "TA")  # of VideoAlign, in the order of their tokens
# what VideoAlign's model_config.json calls the template that has the tokens
_TEMPLATE = "detailed_special"
_NEEDED = {
    "tokenizer": (
        "the tokenizer.json of the Qwen2-VL-Instruct that it is made of, or the folder that "
        "holds it"
    ),
    "template": "the folder of its official package, or {} of it",
}


class Given(NamedTuple):
    """What the user has."""

    weights: tuple[Path, ...]
    tokenizer: Path | None = None  # tokenizer.json, or the folder that holds it
    # the official package, or the module of it that holds the template
    template: Path | None = None
    dtype: str = ""  # of the leaves; by default the file's
    quantised: bool = False  # kernels as int8


class Made(NamedTuple):
    """What becomes of it."""

    kind: Kind
    checkpoint: Checkpoint
    sources: tuple[Path, ...]
    texts: dict[str, bytes]  # by file name
    facts: dict[str, Any]  # what config.json says besides


def convert(kind: str, given: Given, to: Path) -> Path:
    """Writes the reward directory `to` of one of KINDS, a tensor in memory at a time.

    Raises ValueError or OSError, before anything is written, naming the file and what in it is at
    fault.
    """
    reward_store.check_new(to)
    made = KINDS[kind](given)
    total = sum(piece.nbytes for stack in made.checkpoint.stacks.values() for piece in stack.pieces)
    reward_store.write(
        to,
        made.kind,
        made.checkpoint,
        made.sources,
        made.texts,
        byte_counter(kind, total),
        made.facts,
    )
    return to


def _hpsv3(given: Given) -> Made:
    return _asked(HPSV3, given, _one(given.weights), templates.HPSV3)


def _videoalign(given: Given) -> Made:
    """model_config.json lies beside model.pth, or beside its folder checkpoint-N, in which there is
    the tokenizer.
    """
    path = _one(given.weights)
    places = [folder / "model_config.json" for folder in (path.parent, path.parent.parent)]
    described = next((place for place in places if place.is_file()), None)
    if described is None:
        raise FileNotFoundError(
            f"no {' or '.join(map(str, places))}, which VideoReward has beside its weights"
        )
    facts, adapter = _facts(described), qwen2_vl.read_adapter(described)
    if given.tokenizer is None and (path.parent / "tokenizer").is_dir():
        given = given._replace(tokenizer=path.parent / "tokenizer")
    made = _asked(VIDEOALIGN, given, path, templates.VIDEOALIGN, adapter)
    return made._replace(sources=(*made.sources, described), facts=made.facts | facts)


def _asked(
    kind: Kind,
    given: Given,
    path: Path,
    published: templates.Published,
    adapter: qwen2_vl.Adapter | None = None,
) -> Made:
    """A net on Qwen2-VL with its tokenizer and template."""
    for option in ("tokenizer", "template"):
        if getattr(given, option) is None:
            raise ValueError(
                f"{kind.name} needs --{option}: {_NEEDED[option].format(published.file)}"
            )
    template = templates.read_template(given.template, published)
    chat.check_template(template, TOKENS[kind.name], given.template)
    path_of_words = (
        given.tokenizer / chat.TOKENIZER if given.tokenizer.is_dir() else given.tokenizer
    )
    tokenizer = chat.read_tokenizer(path_of_words, TOKENS[kind.name])
    checkpoint = qwen2_vl.open_checkpoint(
        path, kind.published, adapter, given.dtype, given.quantised
    )
    chat.ids_of(tokenizer, TOKENS[kind.name], checkpoint.config.vocab_size, path_of_words)
    config = dataclasses.replace(checkpoint.config, **chat.tokens_of(tokenizer))
    return Made(
        kind,
        checkpoint._replace(config=config),
        (*_files(path), path_of_words),
        {chat.TOKENIZER: tokenizer.to_str().encode(), chat.TEMPLATE: template.encode()},
        {"template": templates.sha256(template)},
    )


def _one(weights: tuple[Path, ...]) -> Path:
    if len(weights) != 1:
        raise ValueError(
            f"--weights has {len(weights)} files; expected one, for shards their {INDEX[1:]}"
        )
    return weights[0]


def _files(path: Path) -> list[Path]:
    """A file of weights, and the shards that it names."""
    if not path.name.endswith(INDEX):
        return [path]
    return [
        path,
        *(path.parent / shard for shard in sorted(set(read_json(path)["weight_map"].values()))),
    ]


def _facts(path: Path) -> dict[str, Any]:
    """What VideoAlign's model_config.json says of its input and its scores."""
    content = read_json(path)
    data, scores = (content.get(section) for section in ("data_config", "inference_config"))
    for section, value in (("data_config", data), ("inference_config", scores)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} has no {section}; expected that of VideoReward")
    expected = {"prompt_template_type": _TEMPLATE, "sample_type": "uniform", "num_frames": None}
    odd = {name: data[name] for name, value in expected.items() if data.get(name, value) != value}
    if odd:
        raise ValueError(f"{path}: data_config is of another model: {odd}; expected {expected}")
    found = {name: data.get(name) for name in ("fps", "max_frame_pixels")}
    found |= {
        name: scores.get(name) for aspect in ASPECTS for name in (f"{aspect}_mean", f"{aspect}_std")
    }
    for name, value in found.items():
        if (
            type(value) not in (int, float)
            or not math.isfinite(value)
            or (value <= 0 and not name.endswith("_mean"))
        ):
            raise ValueError(
                f"{path}: {name} is {value!r}; expected a number, positive unless it is a mean"
            )
    return found


def _plain(kind: Kind, given: Given, words: bool = False) -> Made:
    """A net of which reward_store knows all, with the files of CLIP's tokenizer where it reads
    `words`.
    """
    needless = ["template", "quantised", *(() if words else ("tokenizer",))]
    if told := [f"--{option}" for option in needless if getattr(given, option)]:
        raise ValueError(f"{kind.name} takes no {', '.join(told)}")
    texts: list[Path] = []
    if words:
        if given.tokenizer is None:
            raise ValueError(
                f"{kind.name} needs --tokenizer: tokenizer.json, or the folder of it, of CLIP"
            )
        clip_tokenizer.load_tokenizer(given.tokenizer)
        texts = clip_tokenizer.files_of(given.tokenizer)
    checkpoint = reward_store.open_checkpoint(kind, given.weights, given.dtype)
    sources = [file for path in given.weights for file in _files(path)]
    return Made(
        kind, checkpoint, (*sources, *texts), {path.name: path.read_bytes() for path in texts}, {}
    )


KINDS: dict[str, Callable[[Given], Made]] = {
    HPSV3.name: _hpsv3,  # HPSv3.safetensors
    VIDEOALIGN.name: _videoalign,  # VideoReward's checkpoint-N/model.pth
    clip.HPSV2.name: functools.partial(_plain, clip.HPSV2, words=True),  # HPS_v2.1_compressed.pt
    clip.AESTHETIC.name: functools.partial(_plain, clip.AESTHETIC),  # both files of the net
    sea_raft.SEA_RAFT.name: functools.partial(_plain, sea_raft.SEA_RAFT),  # model.safetensors
}
