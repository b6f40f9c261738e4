"""python -m astrolabe_jax.convert inspect|import|export|export-lora|merge|reward ...

Checkpoints in and out (docs/checkpoints.md, Commands).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

from astrolabe_jax.convert import commands, describe, lora, parts

DTYPES = ("float32", "bfloat16")
FORMATS = ("original", "diffusers")
FILE_DTYPE = "default: the file's own"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


class _Command(NamedTuple):
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], object]


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FILE|DIR")
    parser.add_argument("--json", action="store_true", help="for machines")


def _inspect(args: argparse.Namespace) -> None:
    described = describe.describe(args.path)
    print(json.dumps(described, indent=1) if args.json else describe.text(described))


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FILE|DIR")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--entry",
        default="",
        help="entry of a nested file, such as generator; default: the average",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="", help=FILE_DTYPE)
    _add_num_heads(parser)


def _add_num_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num_heads",
        type=int,
        help="of a transformer whose config.json is not at hand",
    )


def _import(args: argparse.Namespace) -> None:
    commands.import_(args.path, args.to, args.entry, args.dtype, args.num_heads)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE")
    parser.add_argument("--part", choices=parts.PARTS, required=True)
    parser.add_argument("--format", choices=FORMATS, default="original")


def _export(args: argparse.Namespace) -> None:
    commands.export(args.path, args.to, args.part, args.format)


def _export_lora_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="CHECKPOINT",
        help="workdir, workdir/checkpoints/EPOCH, or a LoRA",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", choices=lora.SAVERS, default="peft")
    parser.add_argument(
        "--policy", choices=commands.POLICIES, default="ema", help="of a checkpoint"
    )


def _export_lora(args: argparse.Namespace) -> None:
    commands.export_lora(args.path, args.to, args.format, args.policy)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="BASE")
    parser.add_argument("adapter", type=Path, metavar="LORA")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE")
    parser.add_argument("--format", choices=FORMATS, default="original")
    parser.add_argument("--dtype", choices=DTYPES, default="", help="default: the base's own")
    _add_num_heads(parser)


def _merge(args: argparse.Namespace) -> None:
    commands.merge(args.path, args.adapter, args.to, args.format, args.dtype, args.num_heads)


def _reward_arguments(parser: argparse.ArgumentParser) -> None:
    from astrolabe_jax.rewards.convert import KINDS  # rewards import convert, not the reverse

    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "--weights", type=Path, nargs="+", required=True, metavar="FILE", help="as published"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE|DIR",
        help="tokenizer.json, or the folder that holds it",
    )
    parser.add_argument(
        "--template",
        type=Path,
        metavar="FILE|DIR",
        help="module of the official package, or its folder",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="", help=FILE_DTYPE)
    parser.add_argument(
        "--quantised",
        action="store_true",
        help="large weights as int8: half the memory of bfloat16",
    )


def _reward(args: argparse.Namespace) -> None:
    from astrolabe_jax.rewards.convert import convert
    from astrolabe_jax.rewards.directory import PublishedFiles

    published = PublishedFiles(
        tuple(args.weights), args.tokenizer, args.template, args.dtype, args.quantised
    )
    convert(args.kind, published, args.to)


_COMMANDS = {
    "inspect": _Command(
        "Say what a file or directory is, and whether it is complete; read headers only.",
        _inspect_arguments,
        _inspect,
    ),
    "import": _Command(
        "Write a published file, or all parts of a base, as Orbax directories with a config.json.",
        _import_arguments,
        _import,
    ),
    "export": _Command(
        "Write a part of a base, or of what import made, as one safetensors file.",
        _export_arguments,
        _export,
    ),
    "export-lora": _Command(
        "Write the adapter of a run, or of a LoRA in any dialect, for PEFT or diffusers.",
        _export_lora_arguments,
        _export_lora,
    ),
    "merge": _Command(
        "Write a transformer with a LoRA added to its weights.",
        _merge_arguments,
        _merge,
    ),
    "reward": _Command(
        "Write the directory that a published reward model is loaded from.",
        _reward_arguments,
        _reward,
    ),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their arguments."""
    top = _Parser(prog="python -m astrolabe_jax.convert", description="Checkpoints in and out.")
    subparsers = top.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, command in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.about, description=command.about)
        command.add_arguments(subparser)
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one command; exit with status 2 and one message for what cannot be done."""
    args = parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # shapes alone are traced: no accelerator is taken
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
