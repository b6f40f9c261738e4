import fcntl
import os
import shutil

import jax
import pytest

from tests.e2e import runs
from tests.tiny_base import write_tiny_base


@pytest.fixture(scope="session", autouse=True)
def float32_is_float32():
    """Runs multiply in the precision that a program sets (cli.set_up)."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "float32")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="session")
def environment(compiled_once):
    """Of runs in processes of their own: compiled programs are shared between them."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled_once),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONPATH": str(runs.ROOT),
    }


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def straight(base, tmp_path_factory, compiled_once):
    """A whole run, never interrupted: its config, directory and summary.

    One worker of pytest-xdist makes it while the others wait; each has a copy.
    """
    config = runs.small_config(base)
    shared = compiled_once.parent / "straight"
    with open(compiled_once.parent / "straight.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        summary = runs.start(config, shared)  # finished before: read
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    shutil.copytree(shared, workdir)
    return config, workdir, summary
