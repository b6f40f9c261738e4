"""`python -m tests.golden DIR`; exit status 1 if any line is a FAIL."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main(arguments: list[str]) -> int:
    from astrolabe_jax.runtime import cli
    from tests.golden.runner import run

    if len(arguments) != 1:
        print("usage: python -m tests.golden DIR", file=sys.stderr)
        return 2
    cli.set_up()  # float32 on an accelerator too
    failed = total = 0
    for line in run(Path(arguments[0])):
        print(line, flush=True)
        total, failed = total + 1, failed + (not line.ok)
    print(f"{total - failed} ok" + (f", {failed} failed" if failed else ""))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
