"""Files that torch itself wrote: every number arrives, and what is changed or foreign is
refused.
"""

import collections
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astrolabe_jax.convert.torch_file import TorchFileError, read_torch
from astrolabe_jax.runtime.files import Lazy
from tests.convert import fuzz


def assert_same(got, want):
    if isinstance(want, torch.Tensor):
        assert isinstance(got, Lazy) and got.shape == tuple(want.shape)
        assert str(got.dtype) == str(want.dtype).removeprefix("torch.")
        bits = want.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert np.ascontiguousarray(np.asarray(got)).tobytes() == bits
    elif isinstance(want, torch.dtype):
        assert got == np.dtype(str(want).removeprefix("torch."))
    elif isinstance(want, torch.device):
        assert got == str(want)
    elif isinstance(want, torch.Size):
        assert got == tuple(want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for name, child in want.items():
            assert_same(got[name], child)
    elif isinstance(want, list | tuple):
        assert type(got) is type(want) and len(got) == len(want)
        for mine, theirs in zip(got, want, strict=True):
            assert_same(mine, theirs)
    else:
        assert got == want and type(got) is type(want)


@pytest.mark.parametrize("name", fuzz.trees())
def test_what_torch_writes_is_read(tmp_path, name):
    want = fuzz.trees()[name]
    torch.save(want, tmp_path / "a.pt", _use_new_zipfile_serialization=True)
    assert torch.load(tmp_path / "a.pt", weights_only=True)
    assert_same(read_torch(tmp_path / "a.pt"), want)


@pytest.mark.parametrize(
    ("tree", "culprit"),
    [
        ({"a": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        ({"a": frozenset([1])}, "__builtin__.frozenset"),
        (collections.defaultdict(dict), "collections.defaultdict"),
    ],
)
def test_every_other_class_is_refused_by_name(tmp_path, tree, culprit):
    torch.save(tree, tmp_path / "a.pt")
    with pytest.raises(
        TorchFileError, match=f"a.pt: data.pkl asks for '{culprit}', which could run code"
    ):
        read_torch(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 2).to_sparse(), "'torch._utils._rebuild_sparse_tensor', which is safe and"),
        (torch.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage', which is safe and"),
        (
            torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
            "_rebuild_qtensor', which",
        ),
        (torch.qint8, "torch.qint8', which is safe and yet not read"),
        (
            torch.ones(2, dtype=torch.complex64).conj(),
            "is to be changed when it is read .*'conj': T",
        ),
        (torch.ones(2, dtype=torch.complex64).conj().imag, "changed when it is read .*'neg': True"),
        ({(1, 2): 3}, "a key is a tuple; expected text or a number"),
        ({2**70: 3}, "a key is a number of 71 bits"),
        (torch.zeros(2).untyped_storage(), "a class or a bare storage"),
    ],
)
def test_what_is_safe_and_not_read_has_its_true_reason(tmp_path, tensor, reason):
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with pytest.raises(TorchFileError, match=f"a.pt: .*{reason}"):
        read_torch(tmp_path / "a.pt")


def test_a_file_from_before_torch_1_6_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        TorchFileError,
        match=r"a.pt is not a whole zip archive of torch.save \(torch 1.6 or later\)",
    ):
        read_torch(tmp_path / "a.pt")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return list(fuzz.write(tmp_path_factory.mktemp("written")).values())


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**32))
def test_a_changed_file_is_read_or_refused(written, tmp_path, seed):
    draw = random.Random(seed)
    fuzz.attempt(
        tmp_path / "fuzz.pt", fuzz.changed(draw.choice(written), draw.choice(written), draw)
    )


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_file_with_any_piece_cut_out_is_read_or_refused(written, tmp_path, data):
    content = data.draw(st.sampled_from(written))
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, len(content)))
    outcome = fuzz.attempt(tmp_path / "fuzz.pt", content[:start] + content[stop:])
    assert outcome == "refused" or start == stop
