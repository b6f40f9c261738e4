"""Read the flag --config, a recipe with its overrides --config.FIELD=VALUE, and end programs with
one message where something is wrong.
"""

import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from astrolabe_jax import config
from astrolabe_jax.runtime import backend, multihost, progress

flags.disclaim_key_flags()  # they are those of the program that calls `define`

_HELPED = 1  # status with which absl ends a program that was asked for --help
# Whatever config_flags raises for a field that does not exist or for a value that it does not take.
ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError)
# What a message may have.
_LINE = 1000  # characters in a line
_LINES = 200

# What ml_collections says of a value that is not of the type of its field, and of the types.
_OF_OTHER_TYPE = re.compile(
    r"Could not override field '(.*)' \(reference\)\. (.*) is of original type <class '(.*)'> and "
    r"cannot be casted to type <class '(?:.*\.)?(.*)'>",
    re.DOTALL,
)
# What absl says of a value that cannot be read as the type of its field.
_UNREADABLE = re.compile(
    r"flag --([\w.]+)=(.*): (?:invalid literal for |could not convert string to |"
    r"Failed to parse .* as a |Error while parsing string: .* as |\('Non-)"
    "(int|float|ConfigDict|tuple|bool)",
    re.DOTALL,
)
_TYPES = {
    "bool": "True or False",
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "tuple": "a tuple",
    "ConfigDict": "a section, whose fields are set one by one",
}

# Flags of astrolabe_jax.main alone, by which several processes meet.
_JOINING = ("distributed", "coordinator", "processes", "process", "join_timeout")


def define() -> flags.FlagHolder:
    """Define --config and return its holder, whose value is the config.

    A recipe's config has its fields locked (config.get_config), all but `rewards`, which takes new
    names. A --flagfile that cannot be read, which ml_collections looks into here, ends the program.
    """
    try:
        return config_flags.DEFINE_config_file(
            "config",
            None,
            "recipe, for example configs/moving_shapes.py",
            lock_config=False,
            accept_new_attributes=True,
        )
    except (flags.Error, ValueError) as error:
        fail(f"--flagfile: {str(error).removeprefix('ERROR:: ')}; expected a text file of flags", 2)


def define_joining() -> tuple[flags.FlagHolder, ...]:
    """Define the flags by which several processes meet, and return their holders.

    They are the arguments of multihost.join. On a TPU pod or a cluster that JAX knows the first is
    enough, elsewhere it takes the next three.
    """
    return (
        flags.DEFINE_bool("distributed", False, "join the others of this TPU pod or cluster"),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where that is not known"),
        flags.DEFINE_integer("processes", None, "how many there are, with --coordinator"),
        flags.DEFINE_integer("process", None, "which one this is, from 0, with --coordinator"),
        flags.DEFINE_float("join_timeout", 300.0, "seconds in which all must have come"),
    )


def parse(argv: list[str], positional: bool = False) -> list[str]:
    """Return what the flags leave of `argv`, as absl's flags_parser, of any program.

    Whatever is wrong with a recipe or its fields ends the program with one message and status 2, as
    does what is no flag, unless it may be `positional`. --help ends it with status 0.
    """
    refuse_joining(argv)
    given = dict(_given(argv))
    for flag, value in given.items():
        if _is_empty(flag, value):
            fail(f"--{flag} is empty; expected: {flags.FLAGS[flag].help}", 2)
    if "config" in flags.FLAGS:
        for flag, value in given.items():
            _check_flag(flag, value)
        loose = [value for value in argv[1:] if value.partition(":")[0].endswith(".py")]
        if loose and "config" not in given and not positional:
            fail(f"unexpected argument {loose[0]!r}; a recipe is given as --config={loose[0]}", 2)
        left = _with_recipe(argv)
    else:
        left = _read(argv)
    if len(left) > 1 and not positional:
        fail(f"unexpected argument {left[1]!r}; flags start with --", 2)
    return left


def _with_recipe(argv: list[str]) -> list[str]:
    """Return what the flags leave of `argv`, with a recipe among them."""
    recipe = flags.FLAGS["config"]
    read = recipe.parser.parse
    recipe.parser.parse = lambda argument: _with_rewards_of_flags(_read_recipe(argument), argv)
    try:
        left = _read(argv)
    finally:
        recipe.parser.parse = read
    if isinstance(recipe.value, ConfigDict):
        _take_rewards_out(recipe.value.get("rewards"))
        _refuse_holes(recipe.value)
    return left


def _read(argv: list[str]) -> list[str]:
    """Return what the flags leave of `argv`; end the program for what is wrong, and after --help,
    which is nothing wrong.
    """
    try:
        return flags.FLAGS(argv)
    except ERRORS as error:
        fail(message(error), 2)
    except SystemExit as ended:
        sys.exit(0 if ended.code == _HELPED else ended.code)


def _check_flag(flag: str, value: str) -> None:
    """End the program if it has no such flag, or one that takes no such value."""
    section, _, field = flag.partition(".")
    name, colon, rest = field.partition(":")
    if flag == "config":
        if not value or value.startswith("-"):
            fail("--config has no value; expected a recipe, such as configs/moving_shapes.py", 2)
        _find_recipe(Path(value.partition(":")[0]))
    elif section == "config" and colon and _exists(name):
        fail(f"--{flag}: a value stands behind =; expected --config.{name}={rest}", 2)
    elif section == "config" and (new := config.renamed(field)):
        fail(f"config.{field} is now config.{new}", 2)
    elif section == "config" and field and not _exists(field):
        fail(f"unknown config field {_unknown_field(field)}", 2)
    elif section == "config" and field in config.SECTIONS and field != "rewards":
        first = next(known for known in config.FIELDS if known.startswith(f"{field}."))
        fail(
            f"config.{field} is {value or 'empty'}; expected {_TYPES['ConfigDict']}, such as "
            f"--config.{first}",
            2,
        )
    elif section != "config" and (field or flag) in config.FIELDS and flag not in flags.FLAGS:
        fail(f"unknown flag --{flag}: did you mean --config.{field or flag}?", 2)


def refuse_joining(argv: list[str]) -> None:
    """End a program of one process that was started as one of several."""
    for flag, _ in _given(argv):
        if flag in _JOINING and flag not in flags.FLAGS:
            fail(
                f"--{flag} is of astrolabe_jax.main; this program runs in one process: leave it "
                "out",
                2,
            )


def _find_recipe(path: Path) -> None:
    """End the program unless there is such a recipe; let it import its neighbours.

    A recipe in a folder named configs imports them as configs.NAME, wherever the program was
    started.
    """
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() and path.parent.name else Path("configs")
        recipes = [str(file) for file in sorted(folder.glob("*.py")) if _has_recipe(file)]
        names = [Path(recipe).name for recipe in recipes]
        close = difflib.get_close_matches(f"{path.stem}.py", names, 1)
        question = f"did you mean {folder / close[0]}? " if close else ""
        there = f"there are {', '.join(recipes)}" if recipes else f"there are none in {folder}"
        fail(f"no recipe {path}; {question}{there}", 2)
    if path.suffix != ".py" or "get_config" not in path.read_text(errors="replace"):
        fail(
            f"--config: {path} has no get_config; expected a recipe, a Python file with a function "
            "get_config that returns a config (docs/config.md)",
            2,
        )
    directory = path.resolve().parent
    if directory.name == "configs":
        sys.path.insert(0, str(directory.parent))


def _has_recipe(file: Path) -> bool:
    return "def get_config(" in file.read_text(errors="replace")


def _is_empty(flag: str, value: str) -> bool:
    """Return whether a flag is a text that is there to be given, and is empty."""
    if value or flag not in flags.FLAGS:
        return False
    known = flags.FLAGS[flag]
    return known.flag_type() == "string" and known.default is None


def _read_recipe(argument: str) -> ConfigDict:
    """Return the config of a recipe, FILE or FILE:VARIANT.

    Whatever it raises ends the program with one message: the file, the line, what is wrong.
    """
    name, *variant = argument.split(":", 1)
    made = None
    try:
        spec = importlib.util.spec_from_file_location("recipe", name)
        assert spec and spec.loader, "a name that ends in .py has a loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look for it there
        spec.loader.exec_module(module)
        get_config = module.get_config
        fault = _fault_of_call(get_config, variant)
        if not fault:
            made = get_config(*variant)
    except (Exception, SystemExit) as error:
        fail(_raised(error, name), 2)
    if isinstance(made, ConfigDict):
        return made
    if not fault:
        what = "nothing" if made is None else f"a {type(made).__name__}"
        fault = (
            f"get_config returns {what}; expected a ConfigDict: begin with config = "
            "astrolabe_jax.config.get_config(), and end with return config"
        )
    fail(f"recipe {name}: {fault}", 2)


def _fault_of_call(get_config: Any, variant: list[str]) -> str:
    """Return why get_config cannot be called with these arguments; empty if it can."""
    if not callable(get_config):
        return f"get_config is {get_config!r}; expected a function"
    signature = inspect.signature(get_config)
    try:
        signature.bind(*variant)
    except TypeError as error:
        given = f"with :{variant[0]} behind the file" if variant else "without a :VARIANT"
        return (
            f"get_config{signature} cannot be called {given} ({error}); expected "
            'def get_config(variant: str = "")'
        )
    return ""


def _raised(error: BaseException, recipe: str) -> str:
    """Return the file of a recipe, the last of its lines that led to an error, and its message."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(recipe)]
    text = " ".join(str(error).split())
    told = f"{type(error).__name__}: {text}"
    if type(error) is ValueError and recipe in text:
        return text  # it was meant for the user
    if isinstance(error, SyntaxError):
        lines = [error.lineno] if error.filename == os.path.abspath(recipe) else lines
        told = error.msg if error.filename == os.path.abspath(recipe) else text
    elif isinstance(error, SystemExit):
        told = f"it ends the program ({text}); expected it to return a config"
    elif isinstance(error, ModuleNotFoundError):
        told = f"{text}; install it, or add the folder that holds it to PYTHONPATH"
    elif type(error) is ValueError:
        told = text
    elif isinstance(error, ERRORS) and "ml_collections" in frames[-1].filename:
        told = message(error)
    place = f", line {lines[-1]}" if lines else ""
    return f"recipe {recipe}{place}: {told}"


def _exists(field: str) -> bool:
    """Return whether there is such a field or section, or may be (`rewards` takes any name)."""
    section = f"{field}."
    names = config.FIELDS
    return section.startswith("rewards.") or any(f"{name}.".startswith(section) for name in names)


def _question(field: str) -> str:
    """Return the question whether other fields were meant, with a colon; empty if none is alike."""
    lasts: dict[str, list[str]] = {}
    for name in config.FIELDS:
        lasts.setdefault(name.rpartition(".")[2], []).append(name)
    last = field.rpartition(".")[2]
    joined = f".{field.replace('.', '_')}"  # eval.every is train.eval_every
    close = [name for name in config.FIELDS if name.endswith(joined)] if "." in field else []
    close = close or difflib.get_close_matches(field, config.FIELDS, 1, 0.8)
    if "." not in field:
        close = close or difflib.get_close_matches(field, config.SECTIONS, 1, 0.75)
    alike = difflib.get_close_matches(last, lasts, 1, 0.8)
    names = close or [name for word in alike for name in lasts[word]]
    return f": did you mean {' or '.join(f'config.{name}' for name in names)}?" if names else ""


def _with_rewards_of_flags(recipe: Any, argv: list[str]) -> Any:
    """Return a recipe's config, ready for flags that ml_collections would refuse.

    An option, config.rewards.NAME.OPTION, may be of a reward that the recipe has as a weight alone,
    or not at all; and config.rewards.NAME=0 takes out one that it has with options.

    Raises ValueError for one to take out that is not there, and for a weight in place of options.
    """
    if not isinstance(recipe, ConfigDict) or "rewards" not in recipe:
        return recipe
    rewards = recipe.rewards
    for flag, value in _given(argv):
        place, _, name = flag.partition(".rewards.")
        name, dot, _ = name.partition(".")
        has_options = isinstance(rewards.get(name), ConfigDict)
        if place != "config" or (dot and has_options):
            continue
        if dot:
            weight = rewards.get(name)
            if weight is not None:
                del rewards[name]
            rewards[name] = {} if weight is None else {config.WEIGHT: weight}
        elif _is_zero(value) and name not in rewards:
            raise ValueError(
                f"config.rewards.{name}=0 takes a reward out that the recipe has not; it has "
                f"{', '.join(rewards)}"
            )
        elif has_options and _is_zero(value):
            del rewards[name]
        elif has_options and not value.lstrip().startswith("{"):
            raise ValueError(
                f"config.rewards.{name} has options; give its weight as config.rewards.{name}."
                f"{config.WEIGHT}={value}"
            )
    return recipe


def _is_zero(value: Any) -> bool:
    """Return whether a weight, or the text of one, is 0."""
    try:
        return float(value) == 0
    except (TypeError, ValueError):
        return False


def _take_rewards_out(rewards: Any) -> None:
    """Remove the rewards that are a 0 alone; one with the option weight=0 stays, to be watched."""
    for name, value in list(rewards.items()) if rewards else []:
        if value is not False and _is_zero(value):
            del rewards[name]


def _refuse_holes(recipe: ConfigDict) -> None:
    """End the program if a config lacks a field, as one does of which a section was replaced."""
    there = {"rewards", *config.flatten(recipe)}
    missing = [name for name in config.FIELDS if name not in there]
    if missing:
        section, dot, _ = missing[0].partition(".")
        fail(
            f"config.{missing[0]} is missing; a recipe begins with astrolabe_jax.config."
            "get_config()"
            + (f", and the fields of config.{section} are set one by one" if dot else ""),
            2,
        )


def _given(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each flag, written --NAME=VALUE or --NAME VALUE."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        if argument == "--":
            return
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            yield name, value if equals else following


def set_up(join: Callable[[], None] = multihost.find_devices) -> None:
    """Keep compiled programs on the disk, and make float32 mean float32; every program calls this
    before it uses JAX.

    By itself a GPU multiplies matrices of float32 in tf32, and a TPU in bfloat16; bfloat16 stays as
    it is. JAX_COMPILATION_CACHE_DIR and JAX_DEFAULT_MATMUL_PRECISION have the last word. Numbers
    are drawn in one way, whatever the environment says: a run goes on with the same.

    Args:
      join: finds the devices, and before them the other processes. Its errors end the program with
        status 2.
    """
    logging.set_verbosity(logging.WARNING)
    progress.show_warnings()
    # it would warn that torch is missing; nothing needs it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    jax.config.update(
        "jax_compilation_cache_dir",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "astrolabe_jax", "xla")),
    )
    jax.config.update(
        "jax_default_matmul_precision", os.environ.get("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    )
    for name, value in backend.FIXED.items():
        if getattr(jax.config, name) != value:
            logging.warning("%s is not used: it would change the numbers", name.upper())
        jax.config.update(name, value)
    try:
        join()
    except (ValueError, OSError) as error:
        fail(error, 2)


def fail(message: str | Exception, status: int) -> NoReturn:
    """End the program with one message, without traceback."""
    print(f"error: {printable(str(message))}", file=sys.stderr, flush=True)
    sys.exit(status)


def printable(text: str) -> str:
    """Return a text, in which names of a foreign file may stand, as a terminal may have it.

    Control characters, which could move its cursor or hide a line, are escaped; long lines and
    lists are cut short.
    """
    lines = text.split("\n")
    shown = [
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:_LINE])
        + ("..." if len(line) > _LINE else "")
        for line in lines[:_LINES]
    ]
    rest = [f"  and {len(lines) - _LINES} more lines"] if len(lines) > _LINES else []
    return "\n".join(shown + rest)


def message(error: Exception) -> str:
    """Return what to tell the user about one of ERRORS: one line, without tracebacks."""
    text = str(error)
    if isinstance(error, AttributeError | KeyError):
        return f"unknown config field {_unknown_field(text)}"
    if missing := re.findall(r"flag --(\w+)=None", text):
        return f"give {' and '.join(f'--{name}' for name in missing)}; --help tells more"
    if match := _UNREADABLE.match(text):
        name, value, kind = match.groups()
        name = name if name.startswith("config.") else f"--{name}"
        return f"{name} is {value or 'empty'}; expected {_TYPES[kind]}"
    if match := _OF_OTHER_TYPE.fullmatch(text):
        field, value, given, expected = match.groups()
        named = [name for name in config.FIELDS if f".{name}".endswith(f".{field}")]
        names = " or ".join(f"config.{name}" for name in named or [field])
        return f"{names} is {value}, of type {given}; expected {_TYPES.get(expected, expected)}"
    return text


def _unknown_field(text: str) -> str:
    """Return the name that a config lacks, and the one that may be meant.

    ml_collections writes the name in quotes, perhaps behind the word Key. It leaves out the
    section, so an old name is known by its last part.
    """
    match = re.match(r"\W*(?:Key\W+)?([\w.]+)", text)
    name = match[1] if match else ""
    renames = [
        f"config.{old} is now config.{new}"
        for old, new in config.RENAMED.items()
        if name == old.rpartition(".")[2] or name.startswith(f"{old}.")
    ]
    if renames:
        return f"{name}: {'; '.join(renames)}"
    return f"{name}{_question(name) or ': docs/config.md lists those that there are'}"
