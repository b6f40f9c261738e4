"""A base model as a directory: transformer, VAE, text encoder, tokenizer and sizes, in one of the
LAYOUTS.

own         config.json with the sizes of the three nets and nothing that a run may choose (dtypes,
            window, remat); of
            each part a file of weights, or an Orbax directory that `python -m astrolabe_jax.convert
            import` made; tokenizer.json or spiece.model
original    a Wan repository as published (spec/checkpoints.md 1); its config.json describes the
            transformer alone
diffusers   a diffusers package: model_index.json and a folder for each part

Weights may have any of the formats, nestings and prefixes of published files (parts.py,
weights.py): vae.pth may be Wan2.1_VAE.pth, transformer.pt may be self_forcing_dmd.pt.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from astrolabe_jax.convert import engine, store
from astrolabe_jax.convert.nets import (
    Net,
    field_faults,
    make_config,
    sizes_of,
    with_shards,
)
from astrolabe_jax.convert.parts import PARTS, SIZES, described, load_net, save_net, shapes
from astrolabe_jax.convert.weights import READERS, read_weights, suffix_of
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.models.umt5 import UMT5Config
from astrolabe_jax.models.wan.config import WanConfig
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.runtime.files import INDEX, read_json, write_atomic, write_safetensors

SHIPPED = {"moving_shapes": Path(__file__).parents[1] / "worlds" / "moving_shapes" / "base"}


class Base(NamedTuple):
    """What every policy of a run shares, and the hash of the files it came from."""

    transformer: Net
    vae: Net
    text: Net
    tokenizer: Any
    identity: str


class Layout(NamedTuple):
    """Where the files of a base lie, relative to its directory."""

    mark: str  # file that tells the layout
    weights: dict[str, tuple[str, ...]]  # part -> names, of which one is there
    configs: dict[str, str]  # part -> its config.json; a part without one has the published sizes
    tokenizer: str  # directory


def _safetensors(stem: str) -> tuple[str, ...]:
    return f"{stem}.safetensors", f"{stem}{INDEX}"


# Sizes in which published models differ; what else their config.json leaves out is the same in all
# of them.
_VARYING = frozenset(
    {"dim", "dim_attn", "dim_ffn", "ffn_dim", "num_layers", "num_heads", "vocab_size", "z_dim"}
)
TOKENIZERS = ("tokenizer.json", "spiece.model")
# The first whose mark is there.
LAYOUTS = {
    "diffusers": Layout(
        "model_index.json",
        {
            "transformer": _safetensors("transformer/diffusion_pytorch_model"),
            "vae": _safetensors("vae/diffusion_pytorch_model"),
            "text_encoder": _safetensors("text_encoder/model"),
        },
        {part: f"{part}/config.json" for part in PARTS},
        "tokenizer",
    ),
    "original": Layout(
        "Wan2.1_VAE.pth",
        {
            "transformer": _safetensors("diffusion_pytorch_model"),
            "vae": ("Wan2.1_VAE.pth",),
            "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth",),
        },
        {"transformer": "config.json"},
        "google/umt5-xxl",
    ),
    "own": Layout(
        "config.json",
        {part: (*(f"{part}{suffix}" for suffix in READERS), part) for part in PARTS},
        dict.fromkeys(PARTS, "config.json"),
        ".",
    ),
}


def directory_of(base: str) -> Path:
    """Directory of a shipped base by its name, or the given directory; FileNotFoundError says what
    was expected.
    """
    directory = SHIPPED.get(base, Path(base))
    if not any((directory / layout.mark).is_file() for layout in LAYOUTS.values()):
        raise FileNotFoundError(
            f"base {base!r}: no {directory / 'config.json'}; "
            f"expected a shipped base ({', '.join(SHIPPED)}) or a directory with {_marks()}"
        )
    return directory


def _marks() -> str:
    return " or ".join(f"{layout.mark} ({name})" for name, layout in reversed(LAYOUTS.items()))


def layout_of(directory: Path) -> Layout | None:
    """The layout of a base's directory, or None for any other directory."""
    return next(
        (layout for layout in LAYOUTS.values() if (directory / layout.mark).is_file()), None
    )


def tokenizer_of(base: str) -> Path:
    """The directory that `load_tokenizer` takes."""
    directory = directory_of(base)
    return directory / layout_of(directory).tokenizer


def sizes(base: str, size: str = "") -> dict[str, dict]:
    """Sizes of the three parts, those of SIZES if `size` names one, else from the base; cheap, no
    weights are read.

    Raises ValueError naming a config.json that lacks something, or is of another kind of model.
    """
    directory = directory_of(base)
    if size:
        return {part: sizes_of(config) for part, config in SIZES[size].items()}
    layout = layout_of(directory)
    if layout is LAYOUTS["own"]:
        path = directory / layout.mark
        content = read_json(path)
        if set(content) != set(PARTS) or not all(
            isinstance(part, dict) for part in content.values()
        ):
            raise ValueError(
                f"{path}: expected objects under the keys {', '.join(PARTS)}, and nothing else"
            )
        return content
    found = {part: sizes_of(entry.published) for part, entry in PARTS.items()}
    for part, name in layout.configs.items():
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}, which tells the sizes of the {part}; put it back or set "
                "config.model.size"
            )
        try:
            same = {field: value for field, value in found[part].items() if field not in _VARYING}
            found[part] = same | described(part, read_json(path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def configs(base: str, size: str = "", **numerics) -> dict[str, Any]:
    """The config of each part: sizes from `sizes`, `numerics` (dtype, param_dtype, remat,
    attention) from the run.

    Raises ValueError naming the file and the fields of a part that do not make sense, or of two
    that do not fit.
    """
    directory, content, parts = directory_of(base), sizes(base, size), {}
    layout = layout_of(directory)
    path = directory / layout.mark
    if faults := [
        fault for name, values in content.items() for fault in field_faults(PARTS[name], values)
    ]:
        raise ValueError("\n  ".join([f"{path}: fields that do not make sense:", *faults]))
    for name, values in content.items():
        try:
            parts[name] = make_config(PARTS[name], values, **numerics)
        except ValueError as error:
            raise ValueError(
                f"{directory / layout.configs.get(name, layout.mark)}, {error}"
            ) from None
    if faults := list(_misfits(parts["transformer"], parts["vae"], parts["text_encoder"])):
        raise ValueError("\n  ".join([f"{path}: the parts do not fit each other:", *faults]))
    return parts


def _misfits(net: WanConfig, vae: VaeConfig, text: UMT5Config) -> Iterator[str]:
    """What one part makes and another takes must agree."""
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
    place: Callable[[str, tuple, np.ndarray], Any] = lambda part, path, leaf: leaf,
    **numerics,
) -> Base:
    """Reads a base; FileNotFoundError, ValueError or ConversionError name the file, tensor or field
    at fault.

    size: a name of SIZES in place of the base's own sizes. transformer: a file or base whose
    transformer is read in place of this base's. place(part, path, leaf) puts each leaf on its
    devices before the next is read, so that the host never holds more than the largest leaf.
    """
    directory, digest, nets = directory_of(base), hashlib.sha256(), {}
    layout, parts = layout_of(directory), configs(base, size, **numerics)
    words = directory / layout.tokenizer
    tokenizer = load_tokenizer(words)
    largest, rows = max(tokenizer.get_vocab().values()), parts["text_encoder"].vocab_size
    if largest >= rows:
        raise ValueError(
            f"{directory / layout.mark}: text_encoder.vocab_size is {rows}, but the tokenizer in "
            f"{words} has ids up to {largest}; expected at least {largest + 1}: do both files "
            "belong to this base?"
        )
    described_in = sorted({directory / name for name in layout.configs.values()})
    for path in (*described_in, *(words / name for name in TOKENIZERS)):
        digest.update(path.read_bytes() if path.is_file() else b"")
    for name, config in parts.items():
        path = weights_of(transformer if name == "transformer" and transformer else base, name)
        for file in files_of(path):
            with open(file, "rb") as content:
                hashlib.file_digest(content, lambda: digest)
        nets[name] = read_net(name, path, config, place)
    return Base(
        nets["transformer"], nets["vae"], nets["text_encoder"], tokenizer, digest.hexdigest()
    )


def read_net(
    part: str,
    path: Path,
    config: Any,
    place: Callable[[str, tuple, np.ndarray], Any] = lambda part, path, leaf: leaf,
) -> Net:
    """A part from a file of weights or an Orbax directory, in config.param_dtype; errors name the
    file.
    """
    try:
        if not path.is_dir():
            return load_net(part, read_weights(path), config, place)
        net = shapes(part, config)
        leaves = engine.flatten(store.tree(store.open_leaves(path), net.params))
        dtypes = {where: leaf.dtype for where, leaf in engine.flatten(net.params).items()}
        placed = (
            (where, place(part, where, np.asarray(leaf, dtypes[where])))
            for where, leaf in leaves.items()
        )
        return net._replace(params=engine.nested(placed))
    except (engine.ConversionError, store.StoreError) as error:
        raise type(error)(f"{path}: {error}") from None


def weights_of(given: str | Path, part: str) -> Path:
    """Where the weights of a part are: `given` itself, if it is a file or a store, or in the base
    `given`.
    """
    directory = SHIPPED.get(str(given), Path(given))
    if directory.is_file() or store.is_store(directory):
        if directory.is_file() and suffix_of(directory) is None:
            raise ValueError(f"{directory}: expected a file of weights, {', '.join(READERS)}")
        return directory
    layout = layout_of(directory)
    if layout is None:
        raise FileNotFoundError(
            f"no {directory}; expected a file of weights or a directory with {_marks()}"
        )
    paths = [directory / name for name in layout.weights[part]]
    found = [path for path in paths if path.is_file() or store.is_store(path)]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(directory)) for path in paths)
        raise FileNotFoundError(
            f"{directory} has {len(found)} files of the {part}; expected one of {names}"
        )
    return found[0]


def files_of(path: Path) -> list[Path]:
    """The files that weights are in: itself, an index and its shards, or every file of a store,
    sorted by name.
    """
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return with_shards(path)


def save_base(
    directory: Path, transformer: Net, vae: Net, text: Net, tokenizer_json: str, dtype=np.float32
) -> None:
    """Writes a base that `load_base` reads; floating-point tensors are stored as `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {}
    for name, net in (("transformer", transformer), ("vae", vae), ("text_encoder", text)):
        tensors = {
            key: np.asarray(value, dtype)
            for key, value in save_net(name, net.params, net.config).items()
        }
        write_safetensors(directory / f"{name}.safetensors", tensors)
        content[name] = sizes_of(net.config)
    write_atomic(directory / "tokenizer.json", tokenizer_json.encode())
    write_atomic(directory / "config.json", json.dumps(content, indent=2).encode())


def random_base(parts: Mapping[str, Any], seed: int) -> dict[str, Net]:
    """Nets as their classes initialise them, by the names of their parts: where the training of a
    base starts.
    """
    nets = {}
    for i, (name, config) in enumerate(parts.items()):
        key = jax.random.fold_in(jax.random.key(seed), i)
        graphdef, params = layers.split(PARTS[name].module(config, rngs=nnx.Rngs(key)))
        nets[name] = Net(graphdef, params, config)
    return nets
