"""A base model as a directory: transformer, VAE, text encoder, tokenizer and sizes, in one of the
LAYOUTS (docs/checkpoints.md, Base directories).

own         config.json with the sizes of the three nets, and nothing that a run may choose (dtypes,
            window, remat). Of each part a file of weights, or an Orbax directory that `python -m
            astrolabe_jax.convert import` made. tokenizer.json or spiece.model
original    a Wan repository as published; its config.json describes the transformer alone
diffusers   a diffusers package: model_index.json and a folder for each part

Weights may have any of the formats, nestings and prefixes of published files (parts.py,
weights.py): vae.pth may be Wan2.1_VAE.pth, transformer.pt may be self_forcing_dmd.pt.
"""

import difflib
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from astrolabe_jax.convert import engine, store
from astrolabe_jax.convert.lora_file import PEFT_CONFIG
from astrolabe_jax.convert.nets import Net, field_faults, finite, make_config, sizes_of, with_shards
from astrolabe_jax.convert.parts import (
    NO_NET,
    PARTS,
    SIZES,
    PlaceLeaf,
    described,
    load_net,
    refuse_other,
    shapes,
)
from astrolabe_jax.convert.parts import check_net as check_tensors
from astrolabe_jax.convert.weights import READERS, read_weights
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.models.umt5 import UMT5Config
from astrolabe_jax.models.wan.config import WanConfig
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.runtime.files import INDEX, local_directory, read_json, what_is_at

SHIPPED = {"moving_shapes": Path(__file__).parents[1] / "worlds" / "moving_shapes" / "base"}


class Base(NamedTuple):
    """The frozen nets that all policies of a run share."""

    transformer: Net
    vae: Net
    text: Net
    tokenizer: Any
    fingerprint: str  # hash of the files that it was read from


class BaseLayout(NamedTuple):
    """Where the files of a base are, relative to its directory."""

    mark: str  # the file by which the layout is recognised
    weights: dict[str, tuple[str, ...]]  # part -> names, of which exactly one must be there
    configs: dict[str, str]  # part -> its config.json; a part without one has the published sizes
    tokenizer: str  # directory


def _safetensors(stem: str) -> tuple[str, ...]:
    return f"{stem}.safetensors", f"{stem}{INDEX}"


# Sizes in which published models differ. All others that their config.json leaves out are the same
# in all of them.
_VARYING = frozenset(
    {"dim", "dim_attn", "dim_ffn", "ffn_dim", "num_layers", "num_heads", "vocab_size", "z_dim"}
)
# In the path of a transformer whose shapes are those of Wan 2.1.
_ONE_OF_TWO = re.compile(r"(high|low)[_-]?noise", re.IGNORECASE)
TOKENIZERS = ("tokenizer.json", "spiece.model")
# The layout of a directory is the first whose mark is there.
LAYOUTS = {
    "diffusers": BaseLayout(
        "model_index.json",
        {
            "transformer": _safetensors("transformer/diffusion_pytorch_model"),
            "vae": _safetensors("vae/diffusion_pytorch_model"),
            "text_encoder": _safetensors("text_encoder/model"),
        },
        {part: f"{part}/config.json" for part in PARTS},
        "tokenizer",
    ),
    "original": BaseLayout(
        "Wan2.1_VAE.pth",
        {
            "transformer": _safetensors("diffusion_pytorch_model"),
            "vae": ("Wan2.1_VAE.pth",),
            "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth",),
        },
        {"transformer": "config.json"},
        "google/umt5-xxl",
    ),
    "own": BaseLayout(
        "config.json",
        {part: (*(f"{part}{suffix}" for suffix in READERS), part) for part in PARTS},
        dict.fromkeys(PARTS, "config.json"),
        ".",
    ),
}


def _locate(base: str) -> tuple[Path, BaseLayout]:
    """Return the directory of a base, given its name or the directory itself, and its layout.

    Raises FileNotFoundError, which says what is expected, for a directory that is no base.
    """
    directory = place_of(base)
    layout = layout_of(directory)
    if layout is None:
        close = difflib.get_close_matches(base, SHIPPED, 1)
        question = f" (did you mean the shipped {close[0]}?)" if close else ""
        raise FileNotFoundError(
            f"base {base!r}: {what_is_at(directory)}{question}; "
            f"expected a shipped base ({', '.join(SHIPPED)}) or a directory with {marks()}"
        )
    return directory, layout


def place_of(base: str | Path) -> Path:
    """Return the path of what a user gives: the name of a shipped base, or a path, perhaps with
    `~`. Raises ValueError for an address.
    """
    return SHIPPED.get(str(base)) or local_directory(base)


def marks() -> str:
    """Return the files by which the directory of a base is known, for people."""
    return " or ".join(f"{layout.mark} ({name})" for name, layout in reversed(LAYOUTS.items()))


def layout_of(directory: Path) -> BaseLayout | None:
    """Return the layout of a base's directory, or None for any other directory."""
    known = LAYOUTS.values()
    return next((layout for layout in known if (directory / layout.mark).is_file()), None)


def _two_transformers(directory: Path) -> str:
    """Return what a package of two transformers is, and what would do; "" for any other."""
    index = directory / LAYOUTS["diffusers"].mark
    second = read_json(index).get("transformer_2") if index.is_file() else None
    in_index = isinstance(second, list) and any(second)
    if not in_index and not (directory / "low_noise_model").is_dir():
        return ""
    high, low = (
        ("transformer", "transformer_2") if in_index else ("high_noise_model", "low_noise_model")
    )
    return (
        f"{directory} is a Wan 2.2 package with two transformers ({high} for high noise, {low} for "
        "low), which this program cannot run; set config.transformer to one of Wan 2.1 and "
        "config.model.size to its size, to use the VAE and text encoder of this package"
    )


def tokenizer_of(base: str) -> Path:
    """Return the directory that `load_tokenizer` takes."""
    directory, layout = _locate(base)
    return directory / layout.tokenizer


def sizes(base: str, size: str = "") -> dict[str, dict]:
    """Return the sizes of each part, as in our config.json; no weights are read.

    Args:
      base: name of a shipped base, or a directory.
      size: a name of SIZES, whose sizes take the place of the base's own.

    Raises:
      FileNotFoundError: there is no such base, or a config.json is missing.
      ValueError: naming a config.json that lacks something, or is of another kind of model.
    """
    directory, layout = _locate(base)
    if size:
        return {part: sizes_of(config) for part, config in SIZES[size].items()}
    if layout is LAYOUTS["own"]:
        return _own_sizes(directory / layout.mark)
    published = {part: sizes_of(spec.published) for part, spec in PARTS.items()}
    return published | {
        part: _published_sizes(directory / name, part, published[part])
        for part, name in layout.configs.items()
    }


def _own_sizes(path: Path) -> dict[str, dict]:
    """Return the content of our config.json."""
    content = read_json(path)
    if set(content) != set(PARTS) or {type(part) for part in content.values()} != {dict}:
        raise ValueError(
            f"{path}: expected objects under the keys {', '.join(PARTS)}, and nothing else; a Wan "
            f"repository is known by {LAYOUTS['original'].mark} beside it, a diffusers package by "
            f"{LAYOUTS['diffusers'].mark}"
        )
    return content


def _published_sizes(path: Path, part: str, published: dict) -> dict:
    """Return a part's sizes from a config.json of others.

    Those that it leaves out are taken from `published`, unless published models differ in them.
    """
    if not path.is_file():
        raise FileNotFoundError(
            _two_transformers(path.parent)
            or f"no {path}, which tells the sizes of the {part}; put it back or set "
            "config.model.size"
        )
    common = {field: value for field, value in published.items() if field not in _VARYING}
    try:
        return common | described(part, read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def configs(base: str, size: str = "", **numerics) -> dict[str, Any]:
    """Return the config of each part: sizes from `sizes`, and `numerics` of the run.

    These are dtype, param_dtype, remat and attention.

    Raises:
      ValueError: naming the file, and the fields that make no sense or do not fit each other.
      FileNotFoundError: as `sizes`.
    """
    directory, layout = _locate(base)
    content = sizes(base, size)
    path = directory / layout.mark
    faults = [
        fault for part, values in content.items() for fault in field_faults(PARTS[part], values)
    ]
    if faults:
        raise ValueError("\n  ".join([f"{path}: fields that do not make sense:", *faults]))
    parts = {}
    for part, values in content.items():
        try:
            parts[part] = make_config(PARTS[part], values, **numerics)
        except ValueError as error:
            file = layout.configs.get(part, layout.mark)
            raise ValueError(f"{directory / file}, {error}") from None
    faults = list(_misfits(parts["transformer"], parts["vae"], parts["text_encoder"]))
    if faults:
        raise ValueError("\n  ".join([f"{path}: the parts do not fit each other:", *faults]))
    return parts


def _misfits(net: WanConfig, vae: VaeConfig, text: UMT5Config) -> Iterator[str]:
    """Yield a line for each size of a part's output that is not that of another's input."""
    if net.in_channels != vae.z_dim:
        yield f"transformer.in_channels is {net.in_channels}; expected vae.z_dim, {vae.z_dim}"
    if net.text_dim != text.dim:
        yield f"transformer.text_dim is {net.text_dim}; expected text_encoder.dim, {text.dim}"
    if net.text_len < text.text_len:  # a longer one is filled up with zero rows
        yield (
            f"transformer.text_len is {net.text_len}; expected at least text_encoder.text_len, "
            f"{text.text_len}"
        )


def load_base(
    base: str,
    *,
    size: str = "",
    transformer: str = "",
    place: PlaceLeaf = lambda part, path, leaf: leaf,
    **numerics,
) -> Base:
    """Read a base.

    Args:
      base: name of a shipped base, or a directory.
      size: a name of SIZES, whose sizes take the place of the base's own.
      transformer: a file or a base whose transformer is read in place of this base's.
      place: puts each leaf on its devices before the next is read, so that the host never holds
        more than the largest leaf.
      **numerics: as in `configs`.

    Raises:
      FileNotFoundError, ValueError, ConversionError: naming the file, tensor or field at fault.
    """
    directory, layout = _locate(base)
    parts = configs(base, size, **numerics)
    tokenizer_dir = directory / layout.tokenizer
    tokenizer = _tokenizer(base, parts["text_encoder"].vocab_size)
    digest = hashlib.sha256()
    config_files = sorted({directory / name for name in layout.configs.values()})
    for path in (*config_files, *(tokenizer_dir / name for name in TOKENIZERS)):
        digest.update(path.read_bytes() if path.is_file() else b"")
    nets = {}
    for part, config in parts.items():
        path = weights_of(transformer if part == "transformer" and transformer else base, part)
        for file in files_of(path):
            with open(file, "rb") as content:
                hashlib.file_digest(content, lambda: digest)
        nets[part] = read_net(part, path, config, place)
    return Base(
        nets["transformer"],
        nets["vae"],
        nets["text_encoder"],
        tokenizer,
        digest.hexdigest(),
    )


def faults_of(base: str) -> list[str]:
    """Return what keeps a base from being read, but for its weights: its configs and tokenizer."""
    try:
        parts = configs(base)
        _tokenizer(base, parts["text_encoder"].vocab_size)
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def _tokenizer(base: str, rows: int) -> Any:
    """Read the tokenizer of a base whose text encoder embeds so many ids."""
    directory, layout = _locate(base)
    path = directory / layout.tokenizer
    tokenizer = load_tokenizer(path)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"{directory / layout.mark}: text_encoder.vocab_size is {rows}, but the tokenizer in "
            f"{path} has ids up to {largest}; expected at least {largest + 1}: do both files "
            "belong to this base?"
        )
    return tokenizer


def check_net(part: str, path: Path, config: Any) -> None:
    """Compare names and shapes of a part with its config, from headers alone.

    Raises what `read_net` does.
    """
    try:
        if path.is_dir():
            refuse_other(part, path.name)
            store.tree(store.open_leaves(path), shapes(part, config).params)
        else:
            check_tensors(part, read_weights(path), config)
    except (engine.ConversionError, store.StoreError) as error:
        raise type(error)(f"{path}: {error}") from None


def read_net(part: str, path: Path, config: Any, place: PlaceLeaf) -> Net:
    """Read a part from a file of weights or an Orbax directory, in config.param_dtype.

    A warning says what a name tells that no tensor does. Raises engine.ConversionError or
    store.StoreError, which name the file.
    """
    if _ONE_OF_TWO.search(path.as_posix()):
        logging.warning(
            "%s is by its name one of the two transformers of Wan 2.2, which take half of the "
            "noise levels each; here it takes all of them",
            path,
        )
    try:
        if not path.is_dir():
            return load_net(part, finite(read_weights(path)), config, place)
        refuse_other(part, path.name)
        net = shapes(part, config)
        expected = engine.flatten(net.params)
        stored = store.tree(finite(store.open_leaves(path)), net.params)
        params = engine.nested(
            (where, place(part, where, np.asarray(leaf, expected[where].dtype)))
            for where, leaf in engine.flatten(stored).items()
        )
        return net._replace(params=params)
    except (engine.ConversionError, store.StoreError) as error:
        raise type(error)(f"{path}: {error}") from None


def weights_of(base: str | Path, part: str) -> Path:
    """Return where the weights of a part are.

    `base` is a base, or a file of weights or a store, which is returned as it is. Raises
    FileNotFoundError, which says what is expected, and ValueError for a tokenizer.
    """
    path = place_of(base)
    if path.name in TOKENIZERS and path.is_file():
        raise ValueError(f"{path} is a tokenizer; expected a file of weights of a {part}")
    if path.is_file() or store.is_store(path):
        return path
    layout = layout_of(path)
    if (path / PEFT_CONFIG).is_file():
        raise FileNotFoundError(f"{path}: {NO_NET}")
    if layout is None:
        raise FileNotFoundError(
            f"{what_is_at(path)}; expected a file of weights or a directory with {marks()}"
        )
    if part == "transformer" and (relative := _two_transformers(path)):
        raise FileNotFoundError(relative)
    candidates = [path / name for name in layout.weights[part]]
    present = [file for file in candidates if file.is_file() or store.is_store(file)]
    if len(present) != 1:
        raise FileNotFoundError(
            f"{path} has {len(present)} files of the {part}; expected one of "
            f"{', '.join(layout.weights[part])}"
        )
    return present[0]


def files_of(path: Path) -> list[Path]:
    """Return the files that weights are in: a file, an index and its shards, or all files of a
    store, sorted by name.
    """
    return sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else with_shards(path)
