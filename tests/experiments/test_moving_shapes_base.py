"""The documented script that makes the shipped base runs from its first stage to a base that loads,
and resumes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from astrolabe_jax.convert.base import load_base

ROOT = Path(__file__).parents[2]


def make(directory: Path) -> dict[str, bytes]:
    """Runs the script; the files of the base that it writes."""
    flags = [
        f"--directory={directory}/states",
        f"--output={directory}/base",
        "--vae_steps=2",
        "--decoder_steps=2",
    ]
    command = [sys.executable, "-m", "tests.experiments.shrunk", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.name: path.read_bytes() for path in (directory / "base").iterdir()}


@pytest.mark.slow
def test_the_script_makes_a_base_and_goes_on_from_what_is_there(tmp_path):
    made = make(tmp_path)
    load_base(
        str(tmp_path / "base"), dtype="float32", param_dtype="float32", remat=False, attention="xla"
    )
    for lost in ("trajectories.npy", "student2.state", "decoder.state"):
        (tmp_path / "states" / lost).unlink()
    assert make(tmp_path) == made
