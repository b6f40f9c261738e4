"""A base model as a directory: transformer, VAE and text encoder in the original Wan naming, tokenizer, sizes.

config.json                 sizes of the three nets; nothing that a run may choose (dtypes, window, remat)
transformer.safetensors     spec/checkpoints.md section 2
vae.safetensors             section 3
text_encoder.safetensors    section 4
tokenizer.json              or spiece.model

Weights may also be files of torch, .pth or .pt, and all may have the nesting and the prefixes of published files
(convert/weights.py): vae.pth may be Wan2.1_VAE.pth, transformer.pt may be self_forcing_dmd.pt.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from astrolabe_jax.convert import engine, umt5, vae, wan
from astrolabe_jax.convert.files import read_json, write_atomic
from astrolabe_jax.convert.weights import READERS, read_weights
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.models.umt5 import UMT5, UMT5Config
from astrolabe_jax.models.wan.config import WanConfig
from astrolabe_jax.models.wan.transformer import WanTransformer
from astrolabe_jax.models.wan.vae import Vae, VaeConfig

SHIPPED = {"moving_shapes": Path(__file__).parents[1] / "worlds" / "moving_shapes" / "base"}


class Net(NamedTuple):
    """A frozen net: graph definition (static), parameters (nested dict of arrays), and its sizes and numerics."""

    graphdef: nnx.GraphDef
    params: dict
    config: Any


class Base(NamedTuple):
    """What every policy of a run shares, and the hash of the files it came from."""

    transformer: Net
    vae: Net
    text: Net
    tokenizer: Any
    identity: str


class _Part(NamedTuple):
    module: Any
    config: Any
    table: Any  # config -> rules of the conversion


_PARTS = {
    "transformer": _Part(WanTransformer, WanConfig, wan.table),
    "vae": _Part(Vae, VaeConfig, vae.table),
    "text_encoder": _Part(UMT5, UMT5Config, umt5.table),
}
# A run chooses these; the others are the sizes that config.json must give.
_NUMERICS = ("dtype", "param_dtype", "remat", "attention")
# By the annotation of a size: what to expect of its value in JSON, and whether it is so (1 is a float there, too).
_KINDS = {
    int: ("a whole number, at least 1", lambda value: type(value) is int and value >= 1),
    float: ("a finite number", lambda value: type(value) in (int, float) and -math.inf < value < math.inf),
    bool: ("true or false", lambda value: type(value) is bool),
}


def directory_of(base: str) -> Path:
    """Directory of a shipped base by its name, or the given directory; FileNotFoundError says what was expected."""
    directory = SHIPPED.get(base, Path(base))
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"base {base!r}: no {directory / 'config.json'}; "
            f"expected a shipped base ({', '.join(SHIPPED)}) or a directory with config.json"
        )
    return directory


def sizes(base: str) -> dict[str, dict]:
    """The content of a base's config.json, checked for its parts; cheap, nothing else is read."""
    path = directory_of(base) / "config.json"
    content = read_json(path)
    if set(content) != set(_PARTS) or not all(isinstance(part, dict) for part in content.values()):
        raise ValueError(f"{path}: expected objects under the keys {', '.join(_PARTS)}, and nothing else")
    return content


def configs(base: str, **numerics) -> dict[str, Any]:
    """The config of each part: sizes from the base, `numerics` (dtype, param_dtype, remat, attention) from the run.

    Raises ValueError naming the file and the fields of a part that do not make sense, or of two that do not fit.
    """
    path, content, parts = directory_of(base) / "config.json", sizes(base), {}
    if faults := [fault for name, values in content.items() for fault in _field_faults(name, values)]:
        raise ValueError("\n  ".join([f"{path}: fields that do not make sense:", *faults]))
    for name, values in content.items():
        config = _PARTS[name].config
        chosen = {field.name: numerics[field.name] for field in dataclasses.fields(config) if field.name in numerics}
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            parts[name] = config(**values, **chosen)
        except (TypeError, ValueError) as error:  # TypeError: a field is missing
            raise ValueError(f"{path}, {name}: {error}") from None
    if faults := list(_misfits(parts["transformer"], parts["vae"], parts["text_encoder"])):
        raise ValueError("\n  ".join([f"{path}: the parts do not fit each other:", *faults]))
    return parts


def _field_faults(part: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Every value must be of its field's annotated type; what else a config asks of it, the config checks itself."""
    kinds = {field.name: field.type for field in dataclasses.fields(_PARTS[part].config)}
    known = [name for name in kinds if name not in _NUMERICS]
    for name, value in values.items():
        if name not in known:
            yield f"{part}.{name} is unknown; expected {', '.join(known)}"
            continue
        kind, *more = get_args(kinds[name]) or (kinds[name],)  # tuple[int, ...] has arguments, int has none
        expected, fits = _KINDS[kind]
        if more and not (isinstance(value, list) and all(map(fits, value))):
            yield f"{part}.{name} is {value!r}; expected a list, each entry {expected}"
        elif not more and not fits(value):
            yield f"{part}.{name} is {value!r}; expected {expected}"


def _misfits(net: WanConfig, vae: VaeConfig, text: UMT5Config) -> Iterator[str]:
    """What one part makes and another takes must agree."""
    if net.in_channels != vae.z_dim:
        yield f"transformer.in_channels is {net.in_channels}; expected vae.z_dim, {vae.z_dim}"
    if net.text_dim != text.dim:
        yield f"transformer.text_dim is {net.text_dim}; expected text_encoder.dim, {text.dim}"
    if net.text_len < text.text_len:  # a longer one is filled up with zero rows
        yield f"transformer.text_len is {net.text_len}; expected at least text_encoder.text_len, {text.text_len}"


def shapes(part: str, config: Any) -> Net:
    """A part's net of these sizes, with shapes and dtypes in place of its parameters: none is allocated."""
    return Net(*layers.graphdef_of(lambda: _PARTS[part].module(config, rngs=nnx.Rngs(0))), config)


def load_net(part: str, tensors: Mapping[str, np.ndarray], config: Any) -> Net:
    """A part's net from tensors in the original naming, in config.param_dtype.

    Raises engine.ConversionError, listing every missing, unused and misshapen tensor.
    """
    net = shapes(part, config)
    return net._replace(params=engine.load(_PARTS[part].table(config), tensors, net.params))


def save_net(part: str, params: dict, config: Any) -> dict[str, np.ndarray]:
    """The exact inverse of `load_net`, in the dtype of the params."""
    return engine.save(_PARTS[part].table(config), params)


def load_base(base: str, **numerics) -> Base:
    """Reads a base; FileNotFoundError, ValueError or ConversionError name the file, tensor or field at fault."""
    directory, digest, nets = directory_of(base), hashlib.sha256(), {}
    parts, tokenizer = configs(base, **numerics), load_tokenizer(directory)
    largest, rows = max(tokenizer.get_vocab().values()), parts["text_encoder"].vocab_size
    if largest >= rows:
        raise ValueError(
            f"{directory / 'config.json'}: text_encoder.vocab_size is {rows}, but the tokenizer in {directory} has ids "
            f"up to {largest}; expected at least {largest + 1}: do both files belong to this base?"
        )
    for path in sorted(directory / name for name in ("config.json", "tokenizer.json", "spiece.model")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    for name, config in parts.items():
        path = _weights(directory, name)
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
        tensors = read_weights(path)
        try:
            nets[name] = load_net(name, tensors, config)
        except engine.ConversionError as error:
            raise engine.ConversionError(f"{path}: {error}") from None
    return Base(nets["transformer"], nets["vae"], nets["text_encoder"], tokenizer, digest.hexdigest())


def _weights(directory: Path, part: str) -> Path:
    paths = [directory / f"{part}{suffix}" for suffix in READERS]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in paths)
        raise FileNotFoundError(f"{directory} has {len(found)} files of the {part}; expected one of {names}")
    return found[0]


def save_base(directory: Path, transformer: Net, vae: Net, text: Net, tokenizer_json: str, dtype=np.float32) -> None:
    """Writes a base that `load_base` reads; floating-point tensors are stored as `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, net in (("transformer", transformer), ("vae", vae), ("text_encoder", text)):
        tensors = {key: np.asarray(value, dtype) for key, value in save_net(name, net.params, net.config).items()}
        write_atomic(directory / f"{name}.safetensors", safetensors.numpy.save(tensors))
        values = dataclasses.asdict(net.config)
        described[name] = {key: value for key, value in values.items() if key not in _NUMERICS}
    write_atomic(directory / "tokenizer.json", tokenizer_json.encode())
    write_atomic(directory / "config.json", json.dumps(described, indent=2).encode())


def random_base(parts: Mapping[str, Any], seed: int) -> dict[str, Net]:
    """Nets as their classes initialise them, by the names of their parts: where the training of a base starts."""
    nets = {}
    for i, (name, config) in enumerate(parts.items()):
        key = jax.random.fold_in(jax.random.key(seed), i)
        graphdef, params = layers.split(_PARTS[name].module(config, rngs=nnx.Rngs(key)))
        nets[name] = Net(graphdef, params, config)
    return nets
