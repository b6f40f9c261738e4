"""Open one part of a base wherever it lies: in a file, an imported directory, or a base; and the
adapters in a run's checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from astrolabe_jax.convert import base, engine, nets, parts, store
from astrolabe_jax.convert.nets import NetCheckpoint
from astrolabe_jax.convert.weights import open_weights
from astrolabe_jax.models.lora import TARGETS
from astrolabe_jax.runtime.files import read_json

HEAD_WIDTH = 128  # of every published transformer
POLICIES = ("ema", "current", "old")  # adapters in a checkpoint of a run


def open_part(
    given: Path, part: str = "", entry: str = "", num_heads: int | None = None
) -> NetCheckpoint:
    """Open a part of a base, and check its names and shapes; its numbers as they are read.

    Args:
      given: a file of weights, a directory that `import` made of one part, or a base's directory.
      part: name of the part; a file or an imported directory tells it itself.
      entry: entry of a nested file.
      num_heads: of a transformer, where neither a config.json beside the file nor its width tells.

    Raises:
      ValueError: naming the file, for names and shapes that do not make one of the parts.
      OSError: for a file that is not there.
    """
    path = base.weights_of(given, part or "transformer")
    if path.is_dir():
        return _open_store(path, part or path.name)
    tensors = open_weights(path, entry).tensors
    with nets.naming_files(path):
        parts.refuse_lora(tensors)
        found, form = parts.recognise(tensors)
        parts.refuse_other(part, found)
        part = found
        spec = parts.PARTS[part]
        tensors = spec.prepare(tensors)
        config = config_of(part, form, tensors, config_beside(path, part), num_heads)
        return nets.checked(spec, config, form, nets.finite(tensors, path))


def _open_store(path: Path, part: str) -> NetCheckpoint:
    config_file = path.parent / "config.json"
    content = read_json(config_file)
    if part not in parts.PARTS or part not in content:
        raise ValueError(
            f"{path}: expected a directory that import made, with its sizes in {config_file}"
        )
    spec = parts.PARTS[part]
    with nets.naming_files(path):
        parts.refuse_other(part, path.name)
    with nets.naming_files(config_file):
        config = nets.make_config(spec, content[part])
    with nets.naming_files(path):
        leaves = store.tree(store.open_leaves(path), nets.shapes(spec, config).params)
    tensors = engine.tensors(nets.rules(spec, config), leaves)
    return NetCheckpoint(spec, config, nets.finite(tensors, path))


class RunAdapter(NamedTuple):
    """An adapter in a run's checkpoint; no leaf of it is read."""

    adapter: dict
    rank: int
    alpha: float


def find_checkpoint(path: Path) -> Path | None:
    """Return the directory of an epoch: `path`, or the newest of a run's working directory.

    None comes back for any other path.
    """
    if (path / "state").is_dir() and (path / "progress").is_dir():
        return path
    epochs = [epoch for epoch in (path / "checkpoints").glob("*") if epoch.name.isdigit()]
    return max(epochs, key=lambda epoch: int(epoch.name), default=None)


def open_policy(checkpoint: Path, name: str) -> RunAdapter:
    """Open one of POLICIES in a run's checkpoint.

    Raises ValueError, naming the checkpoint, where it is not whole or has no such adapter.
    """
    record = read_json(checkpoint / "progress" / "metadata").get("identity", {})
    try:
        rank = record["config.lora.rank"]
        alpha = record["config.lora.alpha"]
        leaves = store.open_leaves(checkpoint / "state")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{checkpoint} is no whole checkpoint of a run: {error}") from None
    names = {
        module: {half: f"train.{name}.{module}.{half}" for half in ("a", "b")} for module in TARGETS
    }
    missing = [module for module, pair in names.items() if not leaves.keys() >= {*pair.values()}]
    if missing:
        raise ValueError(f"{checkpoint} has no adapter {name!r} of {', '.join(missing)}")
    return RunAdapter(jax.tree.map(leaves.__getitem__, names), rank, alpha)


def config_beside(path: Path, part: str) -> dict[str, Any]:
    """Return sizes from a config.json in the folder of a file, in our form or in that of others."""
    config_file = path.parent / "config.json"
    if not config_file.is_file():
        return {}
    content = read_json(config_file)
    if isinstance(content.get(part), Mapping):
        return dict(content[part])
    try:
        return parts.described(part, content)
    except ValueError:  # of another part, as in a Wan repository
        return {}


def config_of(
    part: str,
    form: str,
    tensors: Mapping[str, Any],
    beside: Mapping[str, Any],
    num_heads: int | None = None,
) -> Any:
    """Return a part's config: measured sizes, then those of `beside`, then the published ones.

    How many blocks there should be no tensor tells, as the last ones may be lost: `beside` or the
    published net of this width does.

    Raises:
      ValueError: with the next step, where nothing tells the number of heads of a transformer or
        the statistics of a VAE's latents.
    """
    spec = parts.PARTS[part]
    published = nets.sizes_of(spec.published)
    known = {field: value for field, value in beside.items() if field in published}
    measured = nets.measure(spec, form, tensors)
    if part == "transformer":
        known["num_heads"] = (
            num_heads or known.get("num_heads") or _heads_of(measured.get("dim", published["dim"]))
        )
    if part == "vae" and "latent_mean" not in known:
        channels = measured.get("z_dim", published["z_dim"])
        if channels != published["z_dim"]:
            raise ValueError(
                f"its latents have {channels} channels, whose statistics are in no file of "
                "weights; put a config.json with latents_mean and latents_std beside it"
            )
    width = measured.get("dim")
    told = [known, *(nets.sizes_of(sizes[part]) for sizes in parts.SIZES.values())]
    blocks = [
        {"num_layers": sizes["num_layers"]}
        for sizes in told
        if sizes.get("dim") == width and "num_layers" in sizes
    ]
    return nets.make_config(spec, published | known | measured | (blocks or [{}])[0])


def _heads_of(width: int) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(
            f"its width is {width}, no multiple of {HEAD_WIDTH}, and no config.json beside it "
            "gives num_heads; give --num_heads"
        )
    return width // HEAD_WIDTH
