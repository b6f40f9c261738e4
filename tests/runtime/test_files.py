"""safetensors, whole and in shards: read one tensor at a time, written as the library reads it,
refused when broken.
"""

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from astrolabe_jax.runtime import files
from astrolabe_jax.runtime.files import (
    INDEX,
    Lazy,
    parse_json,
    read_json,
    read_jsonl,
    read_safetensors,
    read_sharded,
    safetensors_metadata,
    stand_in,
    write_safetensors,
)
from tests.stand_ins import POINTER


def arrays():
    rng = np.random.default_rng(0)
    made = {
        name: rng.normal(size=(3, 4)).astype(name) for name in ("float64", "float32", "float16")
    }
    return made | {
        "bfloat16": rng.normal(size=(2, 1, 2)).astype(ml_dtypes.bfloat16),
        "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 3), np.float32),
    }


def assert_same(got, want):
    assert list(got) == list(want)
    for name, array in want.items():
        assert (tuple(got[name].shape), got[name].dtype) == (array.shape, array.dtype)
        assert np.asarray(got[name]).tobytes() == array.tobytes()


def test_what_is_written_is_what_the_library_reads(tmp_path):
    lazy = {
        name: Lazy(array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays().items()
    }
    counts = []
    write_safetensors(tmp_path / "a.safetensors", lazy, {"key": "value"}, counts.append)
    library = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert_same({name: library[name] for name in lazy}, arrays())
    assert counts == [array.nbytes for array in arrays().values()]
    assert safetensors_metadata(tmp_path / "a.safetensors") == {"format": "pt", "key": "value"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "a.safetensors")
    got = read_safetensors(tmp_path / "a.safetensors")
    assert_same({name: got[name] for name in arrays()}, arrays())


def test_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)})
    tensors = read_safetensors(path)
    write_safetensors(path, {"a": np.full(4, 2, np.float32), "b": np.zeros(4, np.float32)})
    np.testing.assert_array_equal(tensors["a"], 2)  # from the file as it is now


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_safetensors(tmp_path / "a.safetensors", {"a": Lazy((2,), np.dtype(np.float32), fail)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "size, fault",
    [
        (0, "is an empty file; download"),
        (7, "cannot be read: .*; expected a whole safetensors file"),
        (20, "cannot be read: .*; expected a whole safetensors file"),
        (-1, "is cut short, 1 bytes of its content are missing; download the file again"),
    ],
)
def test_a_cut_file_is_refused(tmp_path, size, fault):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"a.safetensors {fault}"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    stored = torch.linspace(-40, 40, 35).reshape(5, 7).to(getattr(torch, kind))
    safetensors.torch.save_file({"b": torch.ones(3), "a": stored}, path)
    got = read_safetensors(path)["a"]
    assert (got.shape, str(got.dtype)) == ((5, 7), kind)
    np.testing.assert_array_equal(np.asarray(got, np.float32), stored.float().numpy())


@pytest.mark.parametrize(
    "content, what", [(POINTER.encode(), "a git-lfs pointer"), (b"<html>", "a web")]
)
def test_what_stands_in_the_place_of_weights_is_named(tmp_path, content, what):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.safetensors is {what}"):
        read_safetensors(path)


@pytest.fixture
def sharded(tmp_path):
    """X.safetensors.index.json with two shards of three tensors, and its content."""
    tensors = {name: np.full((2, 2), i, np.float32) for i, name in enumerate("abc")}
    where = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}
    for shard in ("m-1.safetensors", "m-2.safetensors"):
        write_safetensors(
            tmp_path / shard, {name: tensors[name] for name in where if where[name] == shard}
        )
    index = tmp_path / f"m{INDEX}"
    index.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": where}))
    return index, tensors, where


def test_shards_are_one_file(sharded):
    index, tensors, _ = sharded
    got = read_sharded(index)
    assert_same({name: got[name] for name in tensors}, tensors)


def test_shards_that_do_not_fit_their_index_are_named(sharded, tmp_path):
    index, tensors, where = sharded

    def refused(where, expected, kind=ValueError):
        index.write_text(json.dumps({"weight_map": where}))
        with pytest.raises(kind, match=expected):
            read_sharded(index)

    refused(where | {"d": "m-2.safetensors"}, "d is not in m-2.safetensors")
    refused({name: where[name] for name in "ab"}, "c is in m-1.safetensors, but not in the index")
    refused(where | {"b": "m-3.safetensors"}, "m-3.safetensors is missing", FileNotFoundError)
    refused(where | {"b": "../m-2.safetensors"}, "names the shard '../m-2.safetensors'")
    refused({}, "expected an object weight_map")
    write_safetensors(tmp_path / "m-2.safetensors", tensors)
    refused(where, "a is in m-2.safetensors and in m-1.safetensors")
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json is not valid JSON"):
        read_sharded(index)


@pytest.mark.parametrize(
    "content, what",
    [
        (POINTER.encode(), "a git-lfs pointer"),
        (b"/annex/objects/SHA256E-s1--aa\n", "a git-annex pointer"),
        (b"../.git/annex/objects/x/y/SHA256E-s1--aa", "a git-annex pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
        (b"\xef\xbb\xbf<html lang=en>", "a web page"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "the error message"),
        (b'{"error": "Access to model x is restricted"}', "the error message"),
        (b"Entry not found", "the error message"),
        (b"\x1f\x8b\x08\x00", "a packed archive"),
        (bytes(8192), "empty where it begins"),
        (b"", "an empty file"),
        (b" \n", "an empty file"),
        (b"a cat walks on grass\n", ""),
        (b'{"prompts": ["an error"]}\n', ""),
        (b"<html is a word that a prompt may begin with"[1:], ""),
        (bytes(100) + b"weights", ""),
    ],
)
def test_what_stands_in_the_place_of_a_file_is_named(tmp_path, content, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert stand_in(path).startswith(what) and bool(stand_in(path)) == bool(what)


@pytest.mark.parametrize("ending", [".aria2", ".part", ".crdownload"])
def test_a_download_that_is_not_finished_is_named(tmp_path, ending):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"content")
    assert stand_in(path) == ""
    path.with_name(path.name + ending).touch()
    assert f"not finished (model.safetensors{ending})" in stand_in(path)


@pytest.mark.parametrize(
    "content, fault",
    [
        (b'{"a": ' * 200_000, "it nests too deep"),
        (b"[" * 200_000, "it nests too deep"),
        (b'{"r": 1' + b"0" * 400 + b"}", "a number of 401 digits"),
        (b'{"r": 1e999}', "1e999 is no finite number"),
        (b'{"r": NaN}', "NaN is no finite number"),
        (b'{"r": ', "Expecting value"),
        (b"\xff\xfe\xff", "codec can't decode"),
        (b"1" + b" " * (1 << 25), "it is longer than"),
    ],
)
def test_spoilt_json_is_one_short_line(tmp_path, content, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        parse_json(content)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json is not valid JSON: .*{fault}"):
        read_json(path)
    path.write_bytes(b'{"epoch": 1}\n' + content + b'\n{"epoch": 2}\n')
    assert read_jsonl(path) == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_of_any_utf_is_read(tmp_path, encoding):
    path = tmp_path / "config.json"
    path.write_bytes('{"näme": 12345678901234567890, "eps": 1e-6}'.encode(encoding))
    assert read_json(path) == {"näme": 12345678901234567890, "eps": 1e-6}


def test_a_pointer_in_place_of_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(POINTER)
    with pytest.raises(ValueError, match="config.json is a git-lfs pointer, not the file itself"):
        read_json(path)


def test_a_lock_is_held_by_one_process_and_goes_with_it(tmp_path):
    path = tmp_path / "lock"
    program = (
        "import sys, time; from pathlib import Path; from astrolabe_jax.runtime import files; "
        "print(files.lock(Path(sys.argv[1])), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline().startswith(f"process {other.pid} on ")
        with pytest.raises(ValueError, match=f"is in use by process {other.pid} on .*, since 20"):
            files.lock(path)
        with pytest.raises(ValueError, match=f"is in use by process {other.pid} on .*, since 20"):
            files.refuse_locked(path)
    finally:
        other.kill()
        other.wait()
    mine = files.lock(path)
    assert mine == files.lock(path) and mine.startswith(f"process {os.getpid()} on ")
    files.refuse_locked(path)
    refused = subprocess.run([*command[:2], program, str(path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()} on" in refused.stderr  # a look does not give it up
    path.unlink()  # with the directory it lay in, for example
    files.lock(path)
    assert path.exists()
    files.unlock(path)
    ended = subprocess.run([*command[:2], program.partition("; time.")[0], str(path)])
    assert ended.returncode == 0


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING):
        files.lock(tmp_path / "lock")
    assert "cannot be locked ([Errno 37] No locks available): use it in one run" in caplog.text


def test_what_a_refused_write_asks_for_fits_the_reason():
    assert "make room for it" in str(files.WriteError(Path("a"), os.strerror(errno.ENOSPC)))
    assert "raise its limit (ulimit -n)" in str(
        files.WriteError(Path("a"), os.strerror(errno.EMFILE))
    )


def test_directories_are_those_of_this_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.local_directory("~/runs/demo") == Path("/home/me/runs/demo")
    assert files.local_directory("a~/b:c//d") == Path("a~/b:c/d")
    for text in ("gs://bucket/run", "s3://bucket", "file:///tmp/run", "wandb://a"):
        with pytest.raises(ValueError, match=f"{text}: {text.partition(':')[0]}:// is not support"):
            files.local_directory(text)
    with pytest.raises(
        ValueError, match=r"'b.udcff' is not text in UTF-8; rename it, or, .*UTF8=1"
    ):
        files.local_directory(os.fsdecode(b"b\xff"))
    with pytest.raises(ValueError, match="~nobody.at.all/run: .*; expected a directory"):
        files.local_directory("~nobody.at.all/run")
