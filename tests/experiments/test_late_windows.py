"""All adapters are checked before anything is loaded."""

import types

import pytest

from astrolabe_jax.convert.lora import save_peft
from astrolabe_jax.runtime import cli
from experiments.late_windows import transfer
from tests.e2e import runs
from tests.models import tiny
from tests.tiny_base import write_tiny_base


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], "no adapter is given; expected LORA [LORA ...] in front of --config"),
        (["good", "none"], "nothing is at {tmp}/none; expected a PEFT directory"),
        (["good", "strong"], "{tmp}/strong has alpha / rank 2, config.lora.alpha / rank is 1; giv"),
        (["good"], "prepare is called"),
    ],
)
def test_the_second_adapter_is_checked_as_early_as_the_first(
    tmp_path, monkeypatch, capsys, paths, expected
):
    def prepare(config, workdir):
        raise ValueError("prepare is called")

    monkeypatch.setattr(cli, "set_up", lambda: None)
    monkeypatch.setattr(transfer, "prepare", prepare)
    for name, alpha in (("good", 2.0), ("strong", 4.0)):
        save_peft(tiny.adapter(), tmp_path / name, 2, alpha)
    config = runs.small_config(write_tiny_base(tmp_path / "base"))
    given = [str(tmp_path / path) for path in paths]
    with pytest.raises(SystemExit) as ended:
        transfer.main(given, types.SimpleNamespace(value=config))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {expected.format(tmp=tmp_path)}")
