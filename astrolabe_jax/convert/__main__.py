"""python -m astrolabe_jax.convert inspect|import|export|export-lora|merge|reward ...: checkpoints
in and out.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax

from astrolabe_jax.convert import commands, describe, lora, parts

DTYPES = ("float32", "bfloat16")
FORMATS = ("original", "diffusers")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments; FILE and DIR are what each says in its help."""
    top = _Parser(prog="python -m astrolabe_jax.convert", description="Checkpoints in and out.")
    commands_ = top.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands_.add_parser(name, help=about, description=about)

    one = command(
        "inspect",
        "Says what a file or directory is, and whether it is complete; reads headers only.",
    )
    one.add_argument("given", type=Path, metavar="FILE|DIR")
    one.add_argument("--json", action="store_true", help="for machines")

    one = command(
        "import",
        "Writes a published file, or all parts of a base, as Orbax directories with a config.json.",
    )
    one.add_argument("given", type=Path, metavar="FILE|DIR")
    one.add_argument("--to", type=Path, required=True, metavar="DIR")
    one.add_argument(
        "--entry",
        default="",
        help="entry of a nested file, such as generator; default: the average",
    )
    one.add_argument("--dtype", choices=DTYPES, default="", help="default: the file's own")
    one.add_argument(
        "--num_heads", type=int, help="of a transformer whose config.json is not at hand"
    )

    one = command(
        "export", "Writes a part of a base, or of what import made, as one safetensors file."
    )
    one.add_argument("given", type=Path, metavar="DIR")
    one.add_argument("--to", type=Path, required=True, metavar="FILE")
    one.add_argument("--part", choices=parts.PARTS, required=True)
    one.add_argument("--format", choices=FORMATS, default="original")

    one = command(
        "export-lora",
        "Writes the adapter of a run, or of a LoRA in any dialect, for PEFT or diffusers.",
    )
    one.add_argument(
        "given",
        type=Path,
        metavar="CHECKPOINT",
        help="workdir, workdir/checkpoints/EPOCH, or a LoRA",
    )
    one.add_argument("--to", type=Path, required=True, metavar="DIR")
    one.add_argument("--format", choices=lora.SAVERS, default="peft")
    one.add_argument("--policy", choices=commands.POLICIES, default="ema", help="of a checkpoint")

    one = command("merge", "Writes a transformer with a LoRA added to its weights.")
    one.add_argument("given", type=Path, metavar="BASE")
    one.add_argument("adapter", type=Path, metavar="LORA")
    one.add_argument("--to", type=Path, required=True, metavar="FILE")
    one.add_argument("--format", choices=FORMATS, default="original")
    one.add_argument("--dtype", choices=DTYPES, default="", help="default: the base's own")
    one.add_argument(
        "--num_heads", type=int, help="of a transformer whose config.json is not at hand"
    )

    one = command("reward", "Writes the directory that a published reward model is loaded from.")
    from astrolabe_jax.rewards.convert import KINDS  # rewards import convert, not the reverse

    one.add_argument("kind", choices=KINDS)
    one.add_argument(
        "--weights", type=Path, nargs="+", required=True, metavar="FILE", help="as published"
    )
    one.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE|DIR",
        help="tokenizer.json, or the folder that holds it",
    )
    one.add_argument(
        "--template",
        type=Path,
        metavar="FILE|DIR",
        help="module of the official package, or its folder",
    )
    one.add_argument("--to", type=Path, required=True, metavar="DIR")
    one.add_argument("--dtype", choices=DTYPES, default="", help="default: the file's own")
    one.add_argument(
        "--quantised",
        action="store_true",
        help="large weights as int8: half the memory of bfloat16",
    )
    return top


def _reward(args: argparse.Namespace) -> None:
    from astrolabe_jax.rewards.convert import convert
    from astrolabe_jax.rewards.directory import PublishedFiles

    published = PublishedFiles(
        tuple(args.weights), args.tokenizer, args.template, args.dtype, args.quantised
    )
    convert(args.kind, published, args.to)


def _inspect(args: argparse.Namespace) -> None:
    found = describe.describe(args.given)
    print(json.dumps(found, indent=1) if args.json else describe.text(found))


RUN = {
    "inspect": _inspect,
    "import": lambda args: commands.import_(
        args.given, args.to, args.entry, args.dtype, args.num_heads
    ),
    "export": lambda args: commands.export(args.given, args.to, args.part, args.format),
    "export-lora": lambda args: commands.export_lora(args.given, args.to, args.format, args.policy),
    "merge": lambda args: commands.merge(
        args.given, args.adapter, args.to, args.format, args.dtype, args.num_heads
    ),
    "reward": _reward,
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command; status 2 and one message for what cannot be done."""
    args = parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # shapes alone are traced: no accelerator is taken
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        RUN[args.command](args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
