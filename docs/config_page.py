"""Writes docs/config.md from the fields that astrolabe_jax/config.py declares.

python docs/config_page.py            write it
python docs/config_page.py --check    status 1 if it is not what would be written
"""

import sys
from pathlib import Path

from astrolabe_jax import config

PAGE = Path(__file__).with_name("config.md")
HEAD = """<!-- Written by docs/config_page.py; change astrolabe_jax/config.py in its place. -->

# Config

Every field of a run. A recipe (`configs/*.py`) starts from the defaults and changes its own; the
command line changes single fields:

```bash
python -m astrolabe_jax.main --config=configs/moving_shapes.py --workdir=runs/other \\
    --config.seed=1 --config.loss.mix_beta=1.0 --config.rewards.shapes_vq=0.5
```

A misspelt field is refused, and one of an earlier version with its new name in the message. What
fields ask of each other is checked before anything is compiled, and all faults are listed at once.
Published behaviour: [Switches](published.md#switches). Fields that may change between the pieces of
one run: [Resume](architecture.md#resume).

"""


def text() -> str:
    """Return the page as it should be."""
    return HEAD + config.describe_fields().rstrip() + "\n"


def main() -> None:
    """Write the page, or check it."""
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != text():
            sys.exit(f"{PAGE} is out of date; run: python docs/config_page.py")
    else:
        PAGE.write_text(text())


if __name__ == "__main__":
    main()
