"""One part of a model wherever it lies: a published file, an imported directory, or a base, under
original names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from astrolabe_jax.convert import base, engine, parts, store
from astrolabe_jax.convert.weights import open_weights
from astrolabe_jax.runtime.files import Lazy, read_json

HEAD = 128  # width of a head of every published transformer


class Source(NamedTuple):
    """A part whose names and shapes are checked, and of which nothing is read."""

    part: str
    config: Any
    tensors: dict[str, Lazy]  # by original name, in the dtypes of the file


def open_part(given: Path, part: str = "", entry: str = "", num_heads: int | None = None) -> Source:
    """Opens `given`, a file, a store of `import`, or a base's directory; `part` may be left out for
    files and stores.

    num_heads is needed where neither a config.json beside the file nor the width tells it. Raises
    ValueError, naming the file, for names and shapes that do not make one of the parts, or OSError.
    """
    path = base.weights_of(given, part) if part else base.weights_of(given, "transformer")
    if path.is_dir():
        return _open_store(path, part or path.name)
    tensors = open_weights(path, entry).tensors
    try:
        part, form = (part, parts.format_of(part, tensors)) if part else parts.recognise(tensors)
        tensors = parts.without_aliases(part, tensors)
        config = config_of(part, form, tensors, _config_beside(path, part), num_heads)
        net = parts.shapes(part, config).params
        own, original = (
            engine.source_shapes(parts.rules(part, config, form), net)
            for form in (form, "original")
        )
        engine.check(own, tensors)
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    return Source(
        part, config, {name: tensors[mine] for name, mine in zip(original, own, strict=True)}
    )


def _open_store(path: Path, part: str) -> Source:
    described = path.parent / "config.json"
    content = read_json(described)
    if part not in parts.PARTS or part not in content:
        raise ValueError(
            f"{path}: expected a directory that import made, with its sizes in {described}"
        )
    try:
        config = parts.make_config(part, content[part])
    except ValueError as error:
        raise ValueError(f"{described}: {error}") from None
    try:
        leaves = store.tree(store.open_leaves(path), parts.shapes(part, config).params)
    except store.StoreError as error:
        raise store.StoreError(f"{path}: {error}") from None
    return Source(part, config, engine.tensors(parts.rules(part, config), leaves))


def _config_beside(path: Path, part: str) -> dict[str, Any]:
    """Sizes from a config.json in the folder of a file, in our form or in that of others."""
    described = path.parent / "config.json"
    if not described.is_file():
        return {}
    content = read_json(described)
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
    """A part's config: sizes that the tensors tell, the rest from `beside`, or as in the published
    models.

    Raises ValueError, with the next step, where the number of heads or the statistics of latents
    are known to nobody.
    """
    published = parts.sizes_of(parts.PARTS[part].published)
    known = {field: value for field, value in beside.items() if field in published}
    measured = parts.measure(part, form, tensors)
    if part == "transformer":
        width = measured.get("dim", published["dim"])
        heads = (
            num_heads or known.get("num_heads") or (width // HEAD if width % HEAD == 0 else None)
        )
        if heads is None:
            raise ValueError(
                f"its width is {width}, no multiple of {HEAD}, and no config.json beside it gives "
                "num_heads; give --num_heads"
            )
        known["num_heads"] = heads
    if (
        part == "vae"
        and measured.get("z_dim", 16) != published["z_dim"]
        and "latent_mean" not in known
    ):
        raise ValueError(
            f"its latents have {measured['z_dim']} channels, whose statistics are in no file of "
            "weights; put a config.json with latents_mean and latents_std beside it"
        )
    return parts.make_config(part, published | known | measured)
