"""Reward directories: what stands in them, and that they are written whole, once, and piece by
piece.
"""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax.convert import engine, nets
from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.clip.weights import HPSV2
from astrolabe_jax.rewards.directory import PublishedFiles
from astrolabe_jax.runtime.files import write_safetensors
from tests.meshes import ONE
from tests.rewards.clip import clips


@pytest.fixture(scope="module")
def given():
    return clips.open_clip(clips.tensors(clips.model(clips.OPEN)))


@pytest.fixture(scope="module")
def source(tmp_path_factory, given):
    path = tmp_path_factory.mktemp("source") / "hps.safetensors"
    write_safetensors(path, given)
    return path


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_what_is_written_is_read(given, source, tmp_path, dtype):
    contents = directory.contents_of(HPSV2, PublishedFiles((source,), dtype=dtype))
    contents = contents._replace(texts={"template.txt": b"text"})
    counts = []
    directory.write(tmp_path / "x", contents, counts.append)
    content = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (
        content["kind"] == "hpsv2"
        and content["net"]["vision_dim"] == 160
        and "dtype" not in content["net"]
    )
    assert content["sources"] == {
        "hps.safetensors": hashlib.sha256(source.read_bytes()).hexdigest()
    }
    assert (tmp_path / "x" / "template.txt").read_bytes() == b"text"
    net = directory.read(tmp_path / "x", HPSV2, ONE, "bfloat16")
    assert (
        net.config.dtype == "bfloat16" and nets.shapes(HPSV2, net.config).graphdef == net.graphdef
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(net.params)} == {jnp.dtype(dtype or "float32")}
    want = engine.load(HPSV2.table(net.config), HPSV2.prepare(given), net.params)
    jax.tree.map(np.testing.assert_array_equal, net.params, want)
    assert sum(counts) == sum(leaf.nbytes for leaf in jax.tree.leaves(net.params))
    with pytest.raises(FileExistsError, match="x holds a reward already"):
        directory.write(tmp_path / "x", contents)


def test_faults_name_the_file(given, source, tmp_path):
    cut = tmp_path / "cut.safetensors"
    write_safetensors(
        cut, {name: tensor for name, tensor in given.items() if name != "visual.proj"}
    )
    with pytest.raises(
        engine.ConversionError,
        match="cut.safetensors: 1 mismatches.*\n.*missing tensor: visual.proj",
    ):
        nets.open_files(HPSV2, [cut])
    with pytest.raises(
        ValueError,
        match="hps.safetensors holds .*, as does another of the files; give each file once",
    ):
        nets.open_files(HPSV2, [cut, source])
    mixed = given | {"visual.transformer.resblocks.0.ln_1.bias": np.zeros(160, jnp.bfloat16)}
    write_safetensors(tmp_path / "mixed.safetensors", mixed)
    mixed_files = PublishedFiles((tmp_path / "mixed.safetensors",))
    with pytest.raises(
        engine.ConversionError, match="mixed.safetensors: .*\n.*dtypes of .*resblocks.0.ln_1.bias"
    ):
        directory.contents_of(HPSV2, mixed_files)
    directory.contents_of(HPSV2, mixed_files._replace(dtype="float32"))
