"""The flag --config: a recipe, its overrides --config.FIELD=VALUE, and what is said when one of them is wrong."""

import re

from absl import flags
from ml_collections import config_flags

flags.disclaim_key_flags()  # they are those of the program that calls `define`

# Whatever config_flags raises for a recipe, or for a field, that does not exist or does not work.
ERRORS = (flags.Error, AttributeError, ImportError, KeyError, OSError, TypeError, ValueError, SyntaxError)


def define() -> flags.FlagHolder:
    """Defines the flag. A recipe locks its fields (config.get_config), all but `rewards`, which takes new names."""
    text = "recipe, for example configs/moving_shapes.py"
    return config_flags.DEFINE_config_file("config", None, text, lock_config=False, accept_new_attributes=True)


def message(error: Exception) -> str:
    """What to tell the user about one of ERRORS: one line, without tracebacks."""
    text = str(error)
    if isinstance(error, AttributeError | KeyError):  # the field, perhaps all others, and the one that may be meant
        text = re.sub(r'Key "(\w+)" does not exist and cannot be added.*?(?=\\nDid you mean|$)', r"\1", text)
        return "unknown config field " + text.replace("\\nDid", ": did").replace("\\", "").replace("'", "")
    # With a recipe's own error comes its traceback, which ends in the message.
    return text.splitlines()[-1] if "Traceback (most recent call last):" in text else text
