"""What every program sets before it uses JAX."""

import jax
import jax.numpy as jnp
import pytest

from astrolabe_jax.runtime import cli

SETTINGS = ("jax_compilation_cache_dir", "jax_default_matmul_precision")


@pytest.fixture
def settings():
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def product() -> str:
    square = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    return jax.jit(lambda a, b: a @ b).lower(square, square).as_text()


def test_float32_is_not_multiplied_in_less(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    cli.set_up()
    assert "HIGHEST" in product()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_the_environment_has_the_last_word(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "tensorfloat32")
    cli.set_up()
    assert "HIGHEST" not in product()
