"""What every program sets before it uses JAX, and what it says about a recipe that is wrong."""

import jax
import jax.numpy as jnp
import pytest

from astrolabe_jax.config import get_config
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


def set_old_field(config):
    config.prompts.groups = 3


def set_field_of_old_section(config):
    config.optimiser.b1 = 0.5


def update_old_field(config):
    config.update_from_flattened_dict({"streaming.clip": 9})


def update_old_section(config):
    config.update_from_flattened_dict({"optimiser.b1": 0.5})


def misspell(config):
    config.optimizer.learnig_rate = 1.0


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (set_old_field, "groups: config.prompts.groups is now config.prompts.prompts_per_epoch"),
        (set_field_of_old_section, "optimiser: config.optimiser is now config.optimizer"),
        (update_old_field, "clip: config.streaming.clip is now config.streaming.score_frames"),
        (update_old_section, "optimiser.b1: config.optimiser is now config.optimizer"),
        (misspell, 'learnig_rate: did you mean "learning_rate" instead of "learnig_rate"?'),
    ],
)
def test_a_recipe_with_an_unknown_field_is_told_the_name_that_there_is(recipe, expected):
    with pytest.raises((AttributeError, KeyError)) as error:
        recipe(get_config())
    assert cli.message(error.value) == f"unknown config field {expected}"
