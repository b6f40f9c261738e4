"""The flag --config: a recipe, its overrides --config.FIELD=VALUE, and what is said when one of
them is wrong.
"""

import os
import re
import sys
from typing import NoReturn

import jax
from absl import flags, logging
from ml_collections import config_flags

flags.disclaim_key_flags()  # they are those of the program that calls `define`

# Whatever config_flags raises for a recipe, or for a field, that does not exist or does not work.
ERRORS = (
    flags.Error,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    SyntaxError,
)


def define() -> flags.FlagHolder:
    """Defines the flag. A recipe locks its fields (config.get_config), all but `rewards`, which
    takes new names.
    """
    text = "recipe, for example configs/moving_shapes.py"
    return config_flags.DEFINE_config_file(
        "config", None, text, lock_config=False, accept_new_attributes=True
    )


def parse(argv: list[str]) -> list[str]:
    """The flags; whatever is wrong with a recipe or its fields becomes one message and status 2."""
    try:
        return flags.FLAGS(argv)
    except ERRORS as error:
        fail(message(error), 2)


def set_up() -> None:
    """What every program does before it uses JAX: compiled programs are kept on the disk, and
    float32 is float32.

    Without the latter a GPU multiplies matrices of float32 in tf32, and a TPU in bfloat16; bfloat16
    stays as it is. JAX_COMPILATION_CACHE_DIR and JAX_DEFAULT_MATMUL_PRECISION have the last word.
    """
    logging.set_verbosity(logging.WARNING)
    # it would warn that torch is missing; nothing needs it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cache = os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "astrolabe_jax", "xla"
    )
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", cache)
    )
    precision = os.environ.get("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    jax.config.update("jax_default_matmul_precision", precision)


def fail(message: str | Exception, status: int) -> NoReturn:
    """Ends a program with one message, without traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def message(error: Exception) -> str:
    """What to tell the user about one of ERRORS: one line, without tracebacks."""
    text = str(error)
    # the field, perhaps all others, and the one that may be meant
    if isinstance(error, AttributeError | KeyError):
        text = re.sub(
            r'Key "(\w+)" does not exist and cannot be added.*?(?=\\nDid you mean|$)', r"\1", text
        )
        return "unknown config field " + text.replace("\\nDid", ": did").replace("\\", "").replace(
            "'", ""
        )
    # With a recipe's own error comes its traceback, which ends in the message.
    last = text.splitlines()[-1] if "Traceback (most recent call last):" in text else text
    return last.removeprefix("ValueError: ")
