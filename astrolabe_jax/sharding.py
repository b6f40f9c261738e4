"""One mesh, one table of rules: where every array of a run lives. Computation follows the data.

The batch is split over all devices, so that each runs its own samples; what is large is split over
the `fsdp` axis besides, and gathered layer by layer where it is used: transformer and text encoder,
adapters, and with these every policy, gradient and moment. The VAE is small and replicated.

All placing functions take host arrays that are equal on every process, and each process uploads
only the parts of its own devices; of a ShapeDtypeStruct they make one with a sharding, and of a
traced array one that the compiler places so.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from astrolabe_jax.runtime.progress import counted

AnyMesh = Mesh | AbstractMesh  # of devices that are there, or only planned

AXES = ("data", "fsdp")
_AXIS_TYPES = (AxisType.Auto,) * len(AXES)
FSDP = "fsdp"
HOST_MEMORY = "pinned_host"  # memory kinds of JAX
DEVICE_MEMORY = "device"

_MOST_GATHERED = 256 * 2**20  # bytes that `to_host` puts on every device at once

# Parameters whose path matches are split over `fsdp`, each along its longest axis that divides; all
# others, which are vectors and small tables, are replicated. a and b are those of adapters.
SPLIT_PARAMS = re.compile(r"\['(kernel|a|b)'\]$|(?<!\['position_bias'\])\['embedding'\]$")


def make_mesh(config: ConfigDict, devices=None) -> Mesh:
    """Return the mesh of config.mesh (data, fsdp) over `devices`, by default all of all processes.

    `data` -1 takes what `fsdp` leaves.

    Raises:
      ValueError: unless data x fsdp is the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh(
        _mesh_shape(config, len(devices)), AXES, axis_types=_AXIS_TYPES, devices=devices
    )


def abstract_mesh(config: ConfigDict, devices: int) -> AbstractMesh:
    """Return `make_mesh` for so many devices that are not there.

    Programs are traced on it, not run.
    """
    return AbstractMesh(_mesh_shape(config, devices), AXES, axis_types=_AXIS_TYPES)


def _mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int]:
    fsdp = config.fsdp
    if fsdp < 1 or devices % fsdp:
        raise ValueError(f"mesh.fsdp is {fsdp}, which does not divide {counted(devices, 'device')}")
    data = devices // fsdp if config.data == -1 else config.data
    if data * fsdp != devices:
        raise ValueError(
            f"mesh.data {data} x mesh.fsdp {fsdp} is not the number of devices, {devices}; "
            "set mesh.data to -1 to use what fsdp leaves"
        )
    return data, fsdp


def batch_sharding(mesh: AnyMesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of samples along `axis`, split over all devices."""
    return NamedSharding(mesh, P(*[None] * axis, AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Return the sharding of a full copy on every device."""
    return NamedSharding(mesh, P())


def param_sharding(mesh: AnyMesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of one parameter.

    An axis of layers, which comes first, is never split: the scan over layers takes one slice of it
    at a time. Of equal axes the last is split; where none divides, the parameter is replicated.

    Args:
      path: as of jax.tree_util.keystr.
    """
    size = mesh.shape[FSDP]
    # of in and out of a linear or a convolution
    fitting = [axis for axis in range(len(shape))[-2:] if shape[axis] % size == 0]
    if size == 1 or not SPLIT_PARAMS.search(path) or not fitting:
        return replicated(mesh)
    longest = max(fitting, key=lambda axis: (shape[axis], axis))
    return NamedSharding(
        mesh, P(*[FSDP if axis == longest else None for axis in range(len(shape))])
    )


def shard_params(mesh: AnyMesh, params: Any) -> Any:
    """Place parameters, or a state that has several trees of them, by `param_sharding`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(
            leaf, param_sharding(mesh, jax.tree_util.keystr(path), leaf.shape)
        ),
        params,
    )


def shard_param(mesh: AnyMesh, path: tuple, leaf: Any) -> Any:
    """Place one of them, at this path of keys in its tree."""
    return _place(leaf, param_sharding(mesh, "".join(f"[{key!r}]" for key in path), leaf.shape))


def shard_batch(mesh: AnyMesh, batch: Any, axis: int = 0) -> Any:
    """Place arrays with samples along `axis`, split over all devices.

    Raises:
      ValueError: unless the devices divide the samples.
    """

    def place(path, leaf):
        samples = leaf.shape[axis]
        if samples % mesh.size:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} holds {samples} samples, which {mesh.size} "
                f"devices (mesh {dict(mesh.shape)}) do not divide; use a multiple of {mesh.size}"
            )
        return _place(leaf, batch_sharding(mesh, axis))

    return jax.tree_util.tree_map_with_path(place, batch)


def place_batch(batch: Any, axis: int = 0) -> Any:
    """Return `shard_batch` over the mesh of `jax.set_mesh`; without one the batch as it is.

    Where the batch is traced (plan.py) it is constrained to that sharding.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(batch)):
        return jax.tree.map(functools.partial(by_sample, axis=axis), batch)
    mesh = jax.sharding.get_mesh()
    return batch if mesh.empty else shard_batch(mesh, batch, axis)


def replicate(mesh: AnyMesh, tree: Any) -> Any:
    """Place a full copy of every array on every device, in buffers of its own (safe to donate)."""
    return jax.tree.map(lambda leaf: _place(leaf, replicated(mesh)), tree)


def on_mesh(mesh: AnyMesh, function: Callable) -> Callable:
    """Return the function, to be jitted, traced under a mesh.

    `gathered` and `by_sample` then know it.
    """

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def gathered(param: jax.Array) -> jax.Array:
    """Return a parameter where it is used: whole on every device, under a mesh.

    Without it the compiler may split the features of the activations instead, and move those.
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.shape[FSDP] == 1
    return param if whole else jax.lax.with_sharding_constraint(param, P())


def by_sample(x: jax.Array, axis: int = 0) -> jax.Array:
    """Return activations with whole samples, along `axis`, on every device, under a mesh.

    The mesh is that of `jax.set_mesh`, or of `on_mesh`; without one x is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(*[None] * axis, AXES))


def per_device(samples: int) -> int:
    """Return how many of so many samples, split as `by_sample` does, each device holds."""
    mesh = jax.sharding.get_abstract_mesh()
    return samples if mesh.empty or samples % mesh.size else samples // mesh.size


def each_device(function: Callable) -> Callable:
    """Return the function run on every device's own samples, under a mesh.

    For kernels that the compiler cannot split. Arrays have samples along their first axis, as the
    result has; scalars are given to all. Samples that the devices do not divide are whole on each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def run(*arrays):
        specs = [P(AXES) if x.ndim and x.shape[0] % mesh.size == 0 else P() for x in arrays]
        split = jax.shard_map(function, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
        return split(*arrays)

    return run


def take(pieces: Sequence[jax.Array], index: jax.Array, axis: int = 0) -> jax.Array:
    """Return the samples `index` of pieces that follow each other, split over all devices.

    Under a mesh the parts of the devices go round in a ring, and each device keeps what it is to
    have: none ever holds more than two parts. Indexing would put all samples on every device.

    Args:
      pieces: [B, ...] each, equally many samples, split as `by_sample` does.
      index: of the samples, with those of a device along `axis`, which the devices divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.concatenate(pieces)[index]
    share = pieces[0].shape[0] // mesh.size
    split = P(*[None] * axis, AXES)

    def taken(wanted, *parts):
        own = jnp.concatenate(parts)
        piece, place = jnp.divmod(wanted, share * mesh.size)
        device, row = jnp.divmod(place, share)
        row = piece * share + row

        def turn(step, carried):
            part, found = carried
            here = device == (jax.lax.axis_index(AXES) + step) % mesh.size
            here = here.reshape(*here.shape, *[1] * (part.ndim - 1))
            found = jnp.where(here, part[row], found)
            ring = [(i, (i - 1) % mesh.size) for i in range(mesh.size)]
            return jax.lax.ppermute(part, AXES, ring), found

        found = jnp.zeros((*wanted.shape, *own.shape[1:]), own.dtype)
        return jax.lax.fori_loop(0, mesh.size, turn, (own, found))[1]

    specs = (split, *[P(AXES)] * len(pieces))
    return jax.shard_map(taken, in_specs=specs, out_specs=split, check_vma=False)(index, *pieces)


def to_host(tree: Any) -> Any:
    """Return the whole arrays as numpy on every process, wherever their parts live.

    What several processes share goes through the devices a few frames at a time: these have no room
    for an array of all.
    """

    def fetch(leaf):
        spread = (
            isinstance(leaf, jax.Array)
            and not leaf.is_fully_addressable
            and not leaf.is_fully_replicated
        )
        if not spread:
            return np.asarray(leaf)
        if leaf.nbytes <= _MOST_GATHERED or leaf.ndim == 1:
            return multihost_utils.process_allgather(leaf, tiled=True)
        step = max(leaf.shape[1] * _MOST_GATHERED // leaf.nbytes, 1)
        parts = (leaf[:, begin : begin + step] for begin in range(0, leaf.shape[1], step))
        gathered = [multihost_utils.process_allgather(part, tiled=True) for part in parts]
        return np.concatenate(gathered, axis=1)

    return jax.tree.map(fetch, tree)


def copied_to(memory: str, tree: Any) -> Any:
    """Return copies in HOST_MEMORY or DEVICE_MEMORY, in parts like those of the arrays."""
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(memory)), tree
    )


def moved_to_host(tree: Any) -> Any:
    """Return arrays in the memory of the host, from which `on_devices` brings them back.

    Those on the devices are deleted. Arrays of a run that is only planned stay.
    """

    def move(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        moved = copied_to(HOST_MEMORY, leaf)
        leaf.delete()
        return moved

    return jax.tree.map(move, tree)


@contextlib.contextmanager
def on_devices(tree: Any) -> Iterator[Any]:
    """Give the arrays on the devices; within, those of `moved_to_host` are copied there."""
    leaves, structure = jax.tree.flatten(tree)
    away = [
        isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == HOST_MEMORY for leaf in leaves
    ]
    copies = [
        copied_to(DEVICE_MEMORY, leaf) if moved else leaf
        for leaf, moved in zip(leaves, away, strict=True)
    ]
    try:
        yield structure.unflatten(copies)
    finally:
        for copy, moved in zip(copies, away, strict=True):
            if moved:
                copy.delete()


def _place(leaf, sharding):
    if isinstance(leaf, Tracer):
        return jax.lax.with_sharding_constraint(leaf, sharding)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data: Any = _place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    # Copied: on a CPU a device array can share memory with a host array, which donation would then
    # overwrite.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index].copy())
