import fcntl
import os
import shutil

import jax
import pytest

from tests.e2e import runs
from tests.tiny_base import write_tiny_base


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run jits its own train step; runs of one shape share the compiled program through the
    disk cache.

    So do programs whose `main` a test calls, and which would otherwise take the user's
    (recipes.set_up), and all workers of pytest-xdist. The precision is theirs.
    """
    own = tmp_path_factory.getbasetemp()
    cache = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "xla"
    cache.mkdir(exist_ok=True)
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_default_matmul_precision",
    )
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(cache), 0.1, "float32"), strict=True):
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        yield cache
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


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
