"""What every program sets before it uses JAX, and what it says about a recipe that is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import app, flags
from ml_collections import config_flags

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
        (["--config.wholly.other=1"], "unknown config field wholly.other: docs/config.md lists"),
        (["--confg.seed=1"], "unknown flag --confg.seed: did you mean --config.seed?"),
        (["--seed=1"], "unknown flag --seed: did you mean --config.seed?"),
        (["configs/self_forcing.py:ta"], "is given as --config=configs/self_forcing.py:ta"),
        (["--config", "configs/longlve.py"], "no recipe configs/longlve.py; did you mean configs/"),
        (["--config.eval.every=1"], "did you mean config.train.eval_every?"),
        (["--config.trian.epochs=1"], "did you mean config.train.epochs?"),
        (["--config.seed:1"], "--config.seed:1: a value stands behind =; expected --config.seed=1"),
        (["--config"], "--config has no value; expected a recipe, such as configs/moving_"),
        (["--config="], "--config has no value; expected a recipe, such as configs/moving_"),
        (["--config", "--config.seed=1"], "--config has no value; expected a recipe, such as"),
        (["--coordinator=a:1"], "--coordinator is of astrolabe_jax.main; this program runs in one"),
        (["--distributed"], "--distributed is of astrolabe_jax.main; this program runs in one"),
        (["--config=longlive:gardo"], "did you mean configs/longlive.py? there are configs/causal"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_what_was_meant(
    arguments, expected, capsys, monkeypatch, config_flag
):
    """Each is refused before a recipe is loaded."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli.parse(["program", *arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def refusal(capsys, arguments) -> str:
    """Return the one line that parsing ends the program with, and status 2."""
    with pytest.raises(SystemExit) as ended:
        cli.parse(["program", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said.removeprefix("error: ").strip()


@pytest.fixture
def config_flag(monkeypatch):
    """Flags of a program that has --config, without those of the test's own."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    config_flags.DEFINE_config_file("config", None, **{"flag_values": values})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "c.train.epochs = (4,)",
            "4: config.train.epochs is (4,), of type tuple; expected a whole",
        ),
        ("c.train.epochs = '4'", "4: config.train.epochs is 4, of type str; expected a whole numb"),
        ("c.prompts = 'a.txt'", "4: config.prompts is a.txt, of type str; expected a section"),
        ("c.training.epochs = 4", "4: unknown config field training: did you mean config.train?"),
        ("c['nowhere']", "4: unknown config field nowhere: docs/config.md lists those that there"),
        ("import nowhere", "4: No module named 'nowhere'; install it, or add the folder"),
        ("raise RuntimeError('a\\nb')", "4: RuntimeError: a b"),
        (
            "open('/no/such')",
            "4: FileNotFoundError: [Errno 2] No such file or directory: '/no/such'",
        ),
        ("None.seed", "4: AttributeError: 'NoneType' object has no attribute 'seed'"),
        ("{}['seed']", "4: KeyError: 'seed'"),
        ("raise SystemExit(3)", "4: it ends the program (3); expected it to return a config"),
        ("c = c(", "4: '(' was never closed"),
    ],
)
def test_an_error_in_a_recipe_is_its_file_line_and_what_is_wrong(
    config_flag, capsys, tmp_path, body, expected
):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from astrolabe_jax import config\ndef get_config(variant=''):\n"
        f"    c = config.get_config()\n    {body}\n    return c\n"
    )
    assert refusal(capsys, [f"--config={recipe}"]).startswith(f"recipe {recipe}, line {expected}")


@pytest.mark.parametrize(
    ("recipe", "variant", "expected"),
    [
        (
            "def get_config():\n    pass",
            "",
            "get_config returns nothing; expected a ConfigDict: begin",
        ),
        ("def get_config():\n    return 3", "", "get_config returns a int; expected a ConfigDict"),
        ("get_config = 3", "", "get_config is 3; expected a function"),
        ("def get_config():\n    pass", ":a", "get_config() cannot be called with :a behind the f"),
        ("def get_config(a):\n    pass", "", "get_config(a) cannot be called without a :VARIANT"),
    ],
)
def test_a_recipe_that_gives_no_config_is_named(
    config_flag, capsys, tmp_path, recipe, variant, expected
):
    path = tmp_path / "recipe.py"
    path.write_text(recipe)
    said = refusal(capsys, [f"--config={path}{variant}"])
    assert said.startswith(f"recipe {path}: {expected}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.seed=1e400"], "config.seed is 1e400; expected a whole number"),
        (["--config.optimizer.b1=much"], "config.optimizer.b1 is much; expected a number"),
        (["--config.seed="], "config.seed is empty; expected a whole number"),
        (["--config.rewards=shapes_vq"], "config.rewards is shapes_vq; expected a section, whose"),
        (["--config.rewards=3"], "config.rewards is 3; expected a section, whose"),
        (["--config.eval.ceiling=yes"], "config.eval.ceiling is yes; expected True or False"),
        (["--config.sampler.steps=(1,"], "config.sampler.steps is (1,; expected a tuple"),
        (
            ["--config.train={'epochs': 3}"],
            "config.train is {'epochs': 3}; expected a section, whose fields are set one by one, "
            "such as --config.train.epochs",
        ),
        (["--config.loss="], "config.loss is empty; expected a section, whose fields are set"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_named(
    config_flag, capsys, monkeypatch, arguments, expected
):
    every = [f"--config={ROOT / 'configs' / 'moving_shapes.py'}", *arguments]
    monkeypatch.setattr(sys, "argv", ["program", *every])
    assert refusal(capsys, every).startswith(expected)


def test_a_recipe_that_replaces_a_section_lacks_its_fields(config_flag, capsys, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from astrolabe_jax import config\ndef get_config():\n    c = config.get_config()\n"
        "    c.train = type(c)({'epochs': 3})\n    return c\n"
    )
    said = refusal(capsys, [f"--config={path}"])
    assert said.startswith("config.train.eval_every is missing; a recipe begins with astrolabe_")


@pytest.mark.parametrize("value", ["33.0", "1e2", "many"])
def test_a_flag_that_is_no_whole_number_is_named(config_flag, capsys, value):
    flags.DEFINE_integer("frames", 0, "pixel frames", flag_values=flags.FLAGS)
    told = refusal(capsys, [f"--frames={value}"])
    assert told == f"--frames is {value}; expected a whole number"


def test_an_empty_text_is_refused_by_its_flag(config_flag, capsys):
    flags.DEFINE_string("lora", None, "an adapter", flag_values=flags.FLAGS)
    flags.DEFINE_string("note", "", "any text", flag_values=flags.FLAGS)
    assert refusal(capsys, ["--note=", "--lora="]) == "--lora is empty; expected: an adapter"
    assert refusal(capsys, ["--lora", ""]) == "--lora is empty; expected: an adapter"


@pytest.mark.parametrize("takes_recipe", [True, False])
def test_help_is_no_fault(request, monkeypatch, capsys, takes_recipe):
    if takes_recipe:
        request.getfixturevalue("config_flag")
    else:
        monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    flags.DEFINE_flag(app.HelpFlag(), flag_values=flags.FLAGS)
    with pytest.raises(SystemExit) as ended:
        cli.parse(["program", "--help"])
    assert ended.value.code == 0 and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stray"], "unexpected argument 'stray'; flags start with --"),
        (["--seed=1"], "Unknown command line flag 'seed'"),
        (["--directory="], "--directory is empty; expected: where files go"),
        (["--frames=a"], "--frames is a; expected a whole number"),
    ],
)
def test_a_program_without_a_recipe_tells_its_faults_alike(
    monkeypatch, capsys, arguments, expected
):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    flags.DEFINE_integer("frames", 0, "pixel frames", flag_values=flags.FLAGS)
    flags.DEFINE_string("directory", None, "where files go", flag_values=flags.FLAGS)
    assert refusal(capsys, arguments) == expected


def test_every_program_reads_its_flags_so():
    for path in [*ROOT.glob("experiments/**/*.py"), *ROOT.glob("astrolabe_jax/**/*.py")]:
        source = path.read_text()
        assert source.count("app.run(") == source.count("flags_parser="), path


def test_all_warnings_look_alike(tmp_path):
    """Whoever says them: this package, absl, a logger, or numpy by the module warnings."""
    program = (
        "import logging, numpy; from absl import logging as absl;"
        "from astrolabe_jax.runtime import cli, progress; cli.set_up(); cli.set_up();"
        "logging.warning('%s', 'one'); absl.warning('two\\n  lines'); absl.info('nothing');"
        "logging.getLogger('jax.x').warning('three'); numpy.float32(1e38) * numpy.float32(1e38);"
        "progress.warn('four')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stderr.splitlines() == [
        "warning: one",
        "warning: two lines",
        "warning: three",
        "warning: overflow encountered in scalar multiply",
    ]
    assert ended.stdout == "warning: four\n"


@pytest.mark.parametrize(
    ("environment", "status", "out", "errors"),
    [
        (
            {
                "JAX_DEFAULT_PRNG_IMPL": "rbg",
                "JAX_ENABLE_X64": "1",
                "JAX_THREEFRY_PARTITIONABLE": "0",
            },
            0,
            "threefry2x32 float32 [0.947667",
            "JAX_DEFAULT_PRNG_IMPL is not used: it would change the numbers\n",
        ),
        ({"JAX_PLATFORMS": "cuda"}, 2, "", "error: JAX_PLATFORMS is 'cuda': "),
        ({"JAX_PLATFORMS": "abacus"}, 2, "", "error: JAX_PLATFORMS is 'abacus': "),
    ],
)
def test_the_environment_does_not_change_numbers_and_names_devices(
    environment, status, out, errors
):
    program = (
        "import jax; from astrolabe_jax.runtime import cli; cli.set_up(); key = jax.random.key(0); "
        "x = jax.random.uniform(key, (3,)); print(jax.random.key_impl(key), x.dtype, x)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout[: len(out)]) == (status, out), ended.stdout
    assert errors in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == (1 if status else 3)
