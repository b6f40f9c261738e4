"""Files of torch are read without torch; whatever is broken or hostile is refused, and nothing in
it is run.
"""

import collections
import os
import pickle
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astrolabe_jax.convert import torch_file
from astrolabe_jax.convert.torch_file import MOST_DEPTH, TorchFileError, read_torch
from tests.convert import hostile, torch_files
from tests.convert.torch_files import Storage, Tensor, whole


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    floats = {
        dtype: rng.normal(size=(3, 4)).astype(dtype) for dtype in ("float64", "float32", "float16")
    }
    floats["bfloat16"] = rng.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16)
    return floats | {
        "int64": np.arange(5),
        "bool": np.array([True, False]),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 3)),
    }


def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path):
    want = arrays()
    got = read_torch(
        torch_files.write(tmp_path / "a.pt", {name: whole(array) for name, array in want.items()})
    )
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert np.asarray(got[name]).tobytes() == array.tobytes()


def test_containers_and_scalars_keep_their_nesting(tmp_path):
    state = collections.OrderedDict(w=whole(np.ones(2, np.float32)))
    vars(state)["_metadata"] = {"": {"version": 1}}  # as Module.state_dict() has it
    tree = {"generator": state, "step": 3, 7: [1.5, None, (True, "x")]}
    got = read_torch(torch_files.write(tmp_path / "a.pt", tree, root="any name"))
    assert got["step"] == 3 and got[7] == [1.5, None, (True, "x")]
    np.testing.assert_array_equal(got["generator"]["w"], [1, 1])


def test_tensors_may_view_parts_of_one_storage(tmp_path):
    storage = Storage(np.arange(24, dtype=np.float32))
    tree = {
        "part": Tensor(storage, 4, (2, 3), (6, 1)),
        "turned": Tensor(storage, 0, (4, 6), (1, 4)),
    }
    got = read_torch(torch_files.write(tmp_path / "a.pt", tree))
    np.testing.assert_array_equal(got["part"], [[4, 5, 6], [10, 11, 12]])
    np.testing.assert_array_equal(got["turned"], np.arange(24).reshape(6, 4).T)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ((0, (5, 5), (5, 1)), "reaches beyond its storage of 24"),
        ((23, (2,), (1,)), "reaches beyond its storage"),
        ((-1, (2,), (1,)), "offset -1"),
        ((0, (2, 2), (1,)), "shape"),
        ((0, (2,), (-1,)), "strides"),
        ((0, (10**9,), (0,)), "share memory"),
        ((0, (4, 4), (2, 1)), "share memory"),
        ((0, (1.0,), (1,)), "shape"),
        ((0, (0, 2**47, 2**47), (1, 1, 1)), "impossible"),
        ((0, (1,) * 9, (1,) * 9), "shape"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, tensor, message):
    path = torch_files.write(
        tmp_path / "a.pt", {"w": Tensor(Storage(np.zeros(24, np.float32)), *tensor)}
    )
    with pytest.raises(TorchFileError, match=f"a.pt: .*({message})"):
        read_torch(path)


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_nothing_in_a_pickle_is_run(tmp_path):
    for call in (
        (os.system, f"touch {tmp_path / 'run'}"),
        (eval, "1"),
        (getattr, 1, "real"),
        (memoryview, b"a"),
    ):
        path = torch_files.write_zip(
            tmp_path / "a.pt", {"a/data.pkl": pickle.dumps({"w": Hostile(*call)}, protocol=2)}
        )
        with pytest.raises(
            TorchFileError, match=f"asks for '.*{call[0].__name__}', which could run code"
        ):
            read_torch(path)
    assert not (tmp_path / "run").exists()


def deep(levels):
    tree = []
    for _ in range(levels):
        tree = [tree]
    return tree


def ring():
    tree = [{}]
    tree[0]["model"] = tree
    return tree


DATA, STORED = torch_files.pickled({"w": whole(np.ones(3, np.float32))})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a/data.pkl": b""}, "no pickle|no end"),
        ({"a/data.pkl": b"garbage"}, "data.pkl"),
        ({"a/data.pkl": DATA[:-1], "a/data/0": STORED[0].tobytes()}, "no pickle"),
        ({"a/data.pkl": DATA}, "storage '0' has no content in the file"),
        (
            {"a/data.pkl": DATA, "a/data/0": b"1234"},
            "storage '0' has 4 bytes; expected 3 elements of 4 bytes",
        ),
        ({"a/data.pkl": DATA, "b/data/0": STORED[0].tobytes()}, "one root folder"),
        ({"a/x": b""}, "one root folder with a data.pkl"),
        ({"a/data.pkl": pickle.dumps(deep(MOST_DEPTH + 1), 2)}, "more than 32 deep"),
        ({"a/data.pkl": pickle.dumps(ring(), 2)}, "32 deep, or one is inside itself"),
        ({"a/data.pkl": pickle.dumps({(1, 2): 3}, 2)}, "a key is a tuple"),
        ({"a/data.pkl": pickle.dumps({1, 2}, 4)}, "opcode EMPTY_SET"),
        ({"a/data.pkl": b"\x80\x02cos\nsystem\n."}, "os.system"),
        (
            {"a/data.pkl": b"\x80\x02]r\xff\xff\xff\x7fh\x00."},
            "numbers an object 2147483647; expected 0",
        ),
        ({"a/data.pkl": b"\x80\x02]h\x00."}, "object 0 before it is there"),
        ({"a/data.pkl": b"\x80\x02N0."}, "opcode POP"),
        ({"a/data.pkl": b"\x80\x02ctorch\nFloatStorage\n."}, "a class or a bare storage"),
        ({"a/data.pkl": b"\x80\x02Nb."}, "not there"),
        (
            {"a/data.pkl": DATA, "a/data/0": STORED[0].tobytes(), "a/byteorder": b"big"},
            "not little-endian",
        ),
    ],
)
def test_what_torch_does_not_write_is_refused(tmp_path, members, message):
    with pytest.raises(TorchFileError, match=f"a.pt.*({message})"):
        read_torch(torch_files.write_zip(tmp_path / "a.pt", members))


def test_broken_and_packed_archives_are_refused(tmp_path):
    good = torch_files.write(
        tmp_path / "good.pt", {"w": whole(np.zeros(1000, np.float32))}
    ).read_bytes()
    for size in (0, 3, 100, len(good) // 2, len(good) - 1):
        (tmp_path / "cut.pt").write_bytes(good[:size])
        with pytest.raises(TorchFileError, match="cut.pt is not a whole zip archive"):
            read_torch(tmp_path / "cut.pt")
    bomb = torch_files.write(
        tmp_path / "bomb.pt",
        {"w": whole(np.zeros(10**6, np.uint8))},
        compression=zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(TorchFileError, match="bomb.pt: member .* is compressed"):
        read_torch(bomb)
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pt")


def test_a_container_may_stand_in_two_places(tmp_path):
    """Torch keeps one `betas` for all groups of an optimiser, and pickle stores it once."""
    betas = (0.9, 0.98)
    net = {"w": whole(np.ones(2, np.float32))}
    tree = {"model": net, "ema": net, "optimizer": [{"betas": betas}, {"betas": betas}]}
    got = read_torch(torch_files.write(tmp_path / "a.pt", tree))
    assert got["model"] is got["ema"] and list(got["model"]) == ["w"]
    assert got["optimizer"] == tree["optimizer"]


CHEAP = (
    hostile.doubled,
    hostile.places,
    hostile.inside,
    hostile.numbers,
    hostile.names,
    hostile.archives,
    hostile.devices,
    hostile.cut,
)


def refusal(path):
    """The error that a file is refused with, without its path, once it was seen to be short."""
    told = hostile.attempt(path).replace(str(path), "")
    assert 0 < len(told) <= 450
    return told


@pytest.mark.parametrize("shape", CHEAP, ids=lambda shape: shape.__name__)
def test_a_hostile_file_is_read_or_refused_in_few_words(tmp_path, shape):
    for seed in range(12):
        path = tmp_path / f"{seed}.pt"
        shape(path, random.Random(seed))
        assert len(hostile.attempt(path).replace(str(path), "")) <= 450
        path.unlink()


@pytest.mark.parametrize("place", hostile.PLACES)
@pytest.mark.parametrize("item", [hostile.laughs(26), b"K\x01" + b"\x85" * 2000])
def test_tuples_that_double_or_nest_are_refused_wherever_they_stand(tmp_path, place, item):
    hostile.write(tmp_path / "a.pt", hostile.PLACES[place](item))
    refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("bound", "value", "program", "message"),
    [
        ("MOST_STEPS", 1000, b"](" + b"N" * 1000 + b"e.", "over 1000 steps. Save the state dict"),
        ("MOST_READ", 999, b"](" + b"N" * 1000 + b"e.", "has 1006 bytes; expected at most 999"),
        ("MOST_NUMBERS", 99, b"}(" + b"K\x01N" * 100 + b"u.", "more than 99 keys are numbers"),
        ("MOST_MEMBERS", 2, b"}.", "more than 2 members"),
        ("MOST_PLACES", 99, hostile.shared(7, lambda x: x * 2 + b"\x86") + b".", "many places"),
        ("STEP_BYTES", 1e-9, b"c__builtin__\nbytes\n)R.", "over 1000000 steps"),
    ],
)
def test_what_is_larger_than_any_checkpoint_is_refused(
    tmp_path, monkeypatch, bound, value, program, message
):
    monkeypatch.setattr(torch_file, bound, value)
    hostile.program(tmp_path / "a.pt", program)
    assert message in refusal(tmp_path / "a.pt")


@pytest.mark.slow
def test_600_hostile_files_end_within_seconds_and_300_mb(tmp_path):
    for name, reading in hostile.readings(tmp_path, 600):
        assert reading.is_bounded(), f"{name}: {reading}"


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    tree = {"generator": {name: whole(array) for name, array in arrays().items()}, "step": 3}
    return torch_files.write(tmp_path_factory.mktemp("torch") / "a.pt", tree).read_bytes()


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_changed_file_is_read_or_refused(valid, tmp_path, data):
    """Bytes replaced, cut out and put in, most of them where the pickle or the directory of the
    archive is.
    """
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    (tmp_path / "fuzz.pt").write_bytes(content)
    try:
        tree = read_torch(tmp_path / "fuzz.pt")
    except TorchFileError:
        return
    assert len(repr(tree)) < 10**6  # what was read can be walked


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from(
            [bytes([code]) for code in b"(.0]})tqrhjKMJNQRuseabXcl\x85\x86\x87\x88\x8a\x94"]
        )
        | st.binary(max_size=3)
    )
)
def test_any_program_is_read_or_refused(tmp_path, pieces):
    torch_files.write_zip(
        tmp_path / "fuzz.pt", {"a/data.pkl": b"\x80\x02" + b"".join(pieces) + b"."}
    )
    try:
        read_torch(tmp_path / "fuzz.pt")
    except TorchFileError:
        pass
