"""sharding.py on eight CPU devices: the rules, what they refuse, and that placing changes no
value.
"""

import os
import re
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from astrolabe_jax import sharding
from tests.meshes import mesh_of


@pytest.mark.parametrize(
    "data, fsdp, shape", [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, 8, (1, 8)), (4, 2, (4, 2))]
)
def test_mesh_shapes(data, fsdp, shape):
    mesh = mesh_of(data, fsdp)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == sharding.AXES


@pytest.mark.parametrize(
    "data, fsdp, culprit",
    [(-1, 3, "mesh.fsdp is 3"), (-1, 0, "mesh.fsdp is 0"), (2, 2, "mesh.data 2 x mesh.fsdp 2")],
)
def test_mesh_must_use_every_device(data, fsdp, culprit):
    with pytest.raises(ValueError, match=culprit):
        mesh_of(data, fsdp)


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("['blocks']['ffn']['fc1']['kernel']", (4, 16, 64), P(None, None, "fsdp")),  # longest
        ("['blocks']['ffn']['fc2']['kernel']", (4, 64, 16), P(None, "fsdp", None)),
        # equal: the last
        ("['blocks']['self_attn']['q']['kernel']", (4, 16, 16), P(None, None, "fsdp")),
        ("['head']['linear']['kernel']", (16, 18), P("fsdp", None)),  # longest that divides
        ("['odd']['kernel']", (4, 6, 9), P()),  # layers are never split
        ("['conv']['kernel']", (4, 4, 4, 8, 8), P(None, None, None, None, "fsdp")),
        ("['tokens']['embedding']", (256, 16), P("fsdp", None)),
        ("['blocks']['ffn']['fc1']['bias']", (4, 64), P()),
        ("['blocks']['position_bias']['embedding']", (4, 32, 8), P()),
    ],
)
def test_param_rule(path, shape, spec):
    assert sharding.param_sharding(mesh_of(fsdp=4), path, shape).spec == spec
    assert sharding.param_sharding(mesh_of(fsdp=1), path, shape).spec == P()


def test_params_are_split_and_unchanged():
    params = {"layer": {"kernel": np.arange(64.0).reshape(8, 8), "bias": np.arange(8.0)}}
    placed = sharding.shard_params(mesh_of(fsdp=4), params)
    assert placed["layer"]["kernel"].addressable_shards[0].data.shape == (8, 2)
    assert placed["layer"]["bias"].is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(placed), params)


def test_batch_is_split_over_both_axes():
    batch = {"x": np.arange(32.0).reshape(16, 2), "key": jax.random.split(jax.random.key(0), 16)}
    placed = sharding.shard_batch(mesh_of(fsdp=4), batch)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(sharding.to_host(placed["x"]), batch["x"])
    np.testing.assert_array_equal(
        jax.random.key_data(placed["key"]), jax.random.key_data(batch["key"])
    )
    second = sharding.shard_batch(mesh_of(), np.zeros((3, 8)), axis=1)
    assert second.sharding.spec == P(None, sharding.AXES)


def test_batch_that_does_not_divide_is_named():
    with pytest.raises(
        ValueError, match=r"batch\['r'\] holds 12 samples.*8 devices.*multiple of 8"
    ):
        sharding.shard_batch(mesh_of(), {"r": np.zeros(12)})


def test_replicas_may_be_donated():
    """Two replicas of one array are separate: donating one leaves the other and the source as they
    were.
    """
    for source in (np.zeros((256, 256), np.float32), jnp.zeros((256, 256))):
        first, second = (sharding.replicate(mesh_of(), source) for _ in range(2))
        jax.jit(lambda x: x + 1, donate_argnums=0)(first).block_until_ready()
        np.testing.assert_array_equal(second, 0)
        np.testing.assert_array_equal(source, 0)


def test_a_copy_on_the_host_outlives_its_array():
    source = np.arange(64.0).reshape(8, 8)
    params = sharding.shard_params(mesh_of(fsdp=4), {"kernel": source, "bias": source[0]})
    kept = sharding.copied_to(sharding.HOST_MEMORY, params)
    spoil = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    jax.block_until_ready(spoil(params))
    for _ in range(2):
        back = sharding.copied_to(sharding.DEVICE_MEMORY, kept)
        assert back["kernel"].addressable_shards[0].data.shape == (8, 2)
        np.testing.assert_array_equal(back["kernel"], source)
        np.testing.assert_array_equal(back["bias"], source[0])
        jax.block_until_ready(spoil(back))


def test_split_parameters_are_gathered_only_on_the_mesh():
    mesh = mesh_of(fsdp=4)
    kernel = sharding.shard_params(mesh, {"kernel": np.arange(32.0).reshape(8, 4)})["kernel"]
    assert not kernel.is_fully_replicated
    on_mesh, off_mesh = (
        jax.jit(sharding.on_mesh(mesh, sharding.gathered)),
        jax.jit(sharding.gathered),
    )
    assert on_mesh(kernel).is_fully_replicated and not off_mesh(kernel).is_fully_replicated
    np.testing.assert_array_equal(on_mesh(kernel), np.arange(32.0).reshape(8, 4))


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("axis", [0, 1])
def test_samples_change_devices_without_being_gathered(data, fsdp, axis):
    mesh = mesh_of(data, fsdp)
    whole = np.random.default_rng(0).normal(size=(3, 16, 5, 2)).astype(np.float32)
    pieces = [sharding.shard_batch(mesh, piece) for piece in whole]
    index = np.random.default_rng(1).integers(0, 48, (*[3] * axis, 24))
    expected = whole.reshape(48, 5, 2)[index]
    np.testing.assert_array_equal(sharding.take(whole, index, axis), expected)
    with jax.set_mesh(mesh):
        program = jax.jit(sharding.take, static_argnums=2).lower(pieces, index, axis).compile()
        got = program(pieces, index)
    np.testing.assert_array_equal(got, expected)
    assert got.sharding.is_equivalent_to(sharding.batch_sharding(mesh, axis), got.ndim)
    assert not re.search("all-gather|all-reduce|all-to-all", program.as_text())


def test_activations_stay_whole_samples_on_the_mesh():
    """Features that a split parameter would leave split are brought back to their samples."""
    mesh = mesh_of(fsdp=4)
    # split in features
    table = sharding.shard_params(mesh, {"embedding": np.arange(48.0).reshape(6, 8)})["embedding"]
    rows = sharding.shard_batch(mesh, np.arange(8) % 6)
    look_up = jax.jit(sharding.on_mesh(mesh, lambda table, rows: sharding.by_sample(table[rows])))
    got = look_up(table, rows)
    assert got.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    np.testing.assert_array_equal(got, sharding.by_sample(table)[rows])


TWO_PROCESSES = """
    import sys
    import jax
    import numpy as np
    from astrolabe_jax import sharding
    from astrolabe_jax.config import get_config

    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    config = get_config().mesh
    config.fsdp = 2
    mesh = sharding.make_mesh(config)
    x = np.arange(24.0).reshape(8, 3)
    keys = jax.random.split(jax.random.key(0), 8)
    batch = sharding.shard_batch(mesh, {"x": x, "keys": keys})
    params = sharding.shard_params(mesh, {"kernel": x})
    assert not batch["x"].is_fully_addressable
    assert batch["x"].addressable_shards[0].data.shape == (2, 3)

    @jax.jit
    def use(batch, params, scale):
        return batch["x"] * scale + params["kernel"], jax.vmap(jax.random.bits)(batch["keys"])

    got, bits = sharding.to_host(use(batch, params, sharding.replicate(mesh, np.float32(2))))
    np.testing.assert_array_equal(got, 3 * x)
    sharding._MOST_GATHERED = 64  # bytes: two columns of three
    np.testing.assert_array_equal(sharding.to_host(batch["x"]), x)
    np.testing.assert_array_equal(bits, jax.vmap(jax.random.bits)(keys))
"""


def test_two_processes_share_one_mesh():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), address]
    workers = [
        subprocess.Popen(
            [*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0].decode() for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)
