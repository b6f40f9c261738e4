"""What every program sets before it uses JAX, and what it says about a recipe that is wrong."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from astrolabe_jax.config import get_config
from astrolabe_jax.runtime import cli

ROOT = Path(__file__).parents[2]
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
        (misspell, "learnig_rate: did you mean config.optimizer.learning_rate?"),
    ],
)
def test_a_recipe_with_an_unknown_field_is_told_the_name_that_there_is(recipe, expected):
    with pytest.raises((AttributeError, KeyError)) as error:
        recipe(get_config())
    assert cli.message(error.value) == f"unknown config field {expected}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.optimser.b1=1"], "optimser.b1: did you mean config.optimizer.b1?"),
        (["--config.learning_rate", "1"], "did you mean config.optimizer.learning_rate?"),
        (["--config.window=1"], "did you mean config.model.window or config.streaming.window?"),
        (["--config.wholly.other=1"], "unknown config field wholly.other\n"),
        (["--confg.seed=1"], "unknown flag --confg.seed: did you mean --config.seed?"),
        (["--seed=1"], "unknown flag --seed: did you mean --config.seed?"),
        (["configs/self_forcing.py:ta"], "is given as --config=configs/self_forcing.py:ta"),
        (["--config", "configs/longlve.py"], "no recipe configs/longlve.py; did you mean configs/"),
        (["--config=longlive:gardo"], "did you mean configs/longlive.py? there are configs/causal"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_what_was_meant(
    arguments, expected, capsys, monkeypatch
):
    """Each is refused before a recipe is loaded."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli.parse(["program", *arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
