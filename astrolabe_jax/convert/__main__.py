"""python -m astrolabe_jax.convert inspect|import|export|export-lora|merge|reward ...

Checkpoints in and out (docs/checkpoints.md, Commands).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

from astrolabe_jax.convert import commands, describe, lora, parts, store
from astrolabe_jax.convert.open import POLICIES
from astrolabe_jax.rewards import convert as rewards
from astrolabe_jax.rewards.directory import WEIGHTS, PublishedFiles
from astrolabe_jax.runtime import cli, progress
from astrolabe_jax.runtime.files import local_directory, read_safetensors


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        cli.fail(message, 2)


_Argument = tuple[str, dict[str, Any]]  # what add_argument takes


class _Command(NamedTuple):
    about: str
    # takes the arguments by their names, and returns the files and stores that it wrote
    run: Callable[..., list[Path]]
    arguments: list[_Argument]


def _argument(name: str, **options: Any) -> _Argument:
    return name, options


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return local_directory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _to(metavar: str) -> _Argument:
    return _argument("--to", type=_path, required=True, metavar=metavar)


def _dtype(default: str) -> _Argument:
    return _argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help=f"default: {default} own"
    )


_FORMAT = _argument("--format", dest="form", choices=("original", "diffusers"), default="original")
_NUM_HEADS = _argument(
    "--num_heads", type=int, help="of a transformer whose config.json is not at hand"
)


def _inspect(path: Path, as_json: bool) -> list[Path]:
    described = describe.describe(path)
    text = describe.text(described)
    print(json.dumps(described, indent=1) if as_json else cli.printable(text), flush=True)
    if not described["complete"]:
        first, *others = describe.faults_of(described)
        if first.endswith(":") and others:  # the opening of a list
            first = f"{first} {others.pop(0).strip()}"
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(f"{path} cannot be used as it is: {first}{more}")
    return []


def _reward(kind: str, to: Path, weights: list[Path], **options: Any) -> list[Path]:
    return [rewards.convert(kind, PublishedFiles(tuple(weights), **options), to) / WEIGHTS]


def _report(path: Path) -> None:
    """Print what was written: a file, or an Orbax store."""
    tensors = store.open_leaves(path) if path.is_dir() else read_safetensors(path)
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    print(cli.printable(f"wrote {path}: {len(tensors)} tensors, {size:,} bytes"))


_COMMANDS = {
    "inspect": _Command(
        "Say what a file or directory is; end with status 2 if it is not whole. Headers only.",
        _inspect,
        [
            _argument("path", type=_path, metavar="FILE|DIR"),
            _argument("--json", dest="as_json", action="store_true", help="for machines"),
        ],
    ),
    "import": _Command(
        "Write a published file, or all parts of a base, as Orbax directories with a config.json.",
        commands.import_,
        [
            _argument("path", type=_path, metavar="FILE|DIR"),
            _to("DIR"),
            _argument(
                "--entry",
                default="",
                help="entry of a nested file, such as generator; default: the average",
            ),
            _dtype("the file's"),
            _NUM_HEADS,
        ],
    ),
    "export": _Command(
        "Write a part of a base, or of what import made, as one safetensors file.",
        commands.export,
        [
            _argument("path", type=_path, metavar="DIR"),
            _to("FILE"),
            _argument("--part", choices=parts.PARTS, required=True),
            _FORMAT,
        ],
    ),
    "export-lora": _Command(
        "Write the adapter of a run, or of a LoRA in any dialect, for PEFT or diffusers.",
        commands.export_lora,
        [
            _argument(
                "path",
                type=_path,
                metavar="CHECKPOINT",
                help="workdir, workdir/checkpoints/EPOCH, or a LoRA",
            ),
            _to("DIR|FILE"),
            _argument("--format", dest="form", choices=lora.SAVERS, default="peft"),
            _argument(
                "--policy", choices=POLICIES, default="", help="of a checkpoint; default: ema"
            ),
        ],
    ),
    "merge": _Command(
        "Write a transformer with a LoRA added to its weights.",
        commands.merge,
        [
            _argument("path", type=_path, metavar="BASE"),
            _argument("adapter", type=_path, metavar="LORA"),
            _to("FILE"),
            _FORMAT,
            _dtype("the base's"),
            _NUM_HEADS,
        ],
    ),
    "reward": _Command(
        "Write the directory that a published reward model is loaded from.",
        _reward,
        [
            _argument("kind", choices=rewards.KINDS),
            _argument(
                "--weights",
                type=_path,
                nargs="+",
                required=True,
                metavar="FILE",
                help="as published",
            ),
            _argument(
                "--tokenizer",
                type=_path,
                metavar="FILE|DIR",
                help="tokenizer.json, or the folder that holds it",
            ),
            _argument(
                "--template",
                type=_path,
                metavar="FILE|DIR",
                help="module of the official package, or its folder",
            ),
            _to("DIR"),
            _dtype("the file's"),
            _argument(
                "--quantised",
                action="store_true",
                help="large weights as int8: half the memory of bfloat16",
            ),
        ],
    ),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their arguments."""
    top = _Parser(prog="python -m astrolabe_jax.convert", description="Checkpoints in and out.")
    subparsers = top.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, command in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.about, description=command.about)
        for argument, options in command.arguments:
            subparser.add_argument(argument, **options)
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one command; exit with status 2 and one message for what cannot be done."""
    cli.refuse_joining(sys.argv[1:] if argv is None else argv)
    arguments = vars(parser().parse_args(argv))
    jax.config.update("jax_platforms", "cpu")  # shapes alone are traced: no accelerator is taken
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    progress.show_warnings()
    command = _COMMANDS[arguments.pop("command")]
    try:
        for path in command.run(**arguments):
            _report(path)
    except OSError as error:
        cli.fail(f"{error.filename}: {error.strerror}" if error.filename else error, 2)
    except ValueError as error:
        cli.fail(error, 2)


if __name__ == "__main__":
    main()
