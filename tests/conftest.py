"""Strict JAX for every test: eight CPU devices, and silent rank promotion is an error.

Tests compile much and compute little, so the compiler's slow optimisations are off: without the
emitters of fusions alone they take half the time.
"""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

# ruff: noqa: E402  (the flags above must be set before the first import of JAX)
import jax
import pytest
from jaxtyping import install_import_hook

# Shapes by name in the signatures of these stages are checked in tests only.
STAGES = ("encode", "rollout", "decode", "losses")
install_import_hook([f"astrolabe_jax.{stage}" for stage in STAGES], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP, and tests'
# programs would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs that were compiled before come from a disk cache, which all workers share.

    Else two workers of pytest-xdist compile what a file needs twice, and every file compiles again
    what the one before it had. `main`s that a test calls would otherwise take the user's cache.
    """
    own = tmp_path_factory.getbasetemp()
    cache = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "xla"
    cache.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        yield cache


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file_go_with_it():
    """Hundreds of compiled programs would stay in memory, and every garbage collection would walk
    through them.
    """
    yield
    jax.clear_caches()
