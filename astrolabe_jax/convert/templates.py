"""The texts that reward models are asked with, read from the user's copy of an official package
(spec/rewards.md 3.3, 4.2, 9).

Scores depend on every byte of them, so that each is known by its sha256. The package is parsed,
never imported: only the literal that is assigned to a name is looked at.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MOST = 4 << 20  # bytes of a module; the published ones have less than 100 kB


class Published(NamedTuple):
    """Where a text stands: constants of one module, joined in this order."""

    file: str  # name of the module's file, anywhere in the folder of the package
    constants: dict[str, str]  # name -> sha256 of its UTF-8 content


HPSV3 = Published(
    "data_collator_qwen.py",  # hpsv3 1.0.0
    {
        "INSTRUCTION": "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a",
        "prompt_with_special_token": (
            "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"
        ),
    },
)
VIDEOALIGN = Published(
    "prompt_template.py",  # VideoAlign
    {
        "DETAILED_PROMPT_WITH_SPECIAL_TOKEN": (
            "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
        )
    },
)
UNIFIEDREWARD = Published(
    "rewards.py",  # Astrolabe or Flow-GRPO
    {"question": "d68ab1dcf4dc3a39ec5dfab963d17fe30a6e5f713eb49f743ed88a4c8ce4317f"},
)


def sha256(text: str) -> str:
    """Of the UTF-8 content, in hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_template(given: Path, published: Published) -> str:
    """The text from a module, or from the folder of a package that holds it.

    A constant is a string or an f-string of plain names, whose places stay as {name}; it may be
    assigned inside of functions. Raises FileNotFoundError where there is no such module, or
    ValueError naming the file, and the variable with what was found and expected.
    """
    path = _module(given, published.file)
    content = path.read_bytes()
    if len(content) > _MOST:
        raise ValueError(
            f"{path} has {len(content)} bytes; expected the module {published.file} of the package"
        )
    try:
        with warnings.catch_warnings():  # about escapes in somebody else's strings
            warnings.simplefilter("ignore")
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{path} is no Python module: {error}; copy it again from the package"
        ) from None
    return "".join(
        _constant(path, tree, name, wanted) for name, wanted in published.constants.items()
    )


def _module(given: Path, file: str) -> Path:
    if not given.is_dir():
        if not given.is_file():
            raise FileNotFoundError(
                f"no {given}; expected {file}, or the folder of the package that holds it"
            )
        return given
    found = sorted(given.rglob(file))
    if not found:
        raise FileNotFoundError(
            f"{given} holds no {file}; expected the folder of the official package, or that file"
        )
    if len(found) > 1:
        raise ValueError(
            f"{given} holds several {file}: {', '.join(map(str, found))}; give one of them"
        )
    return found[0]


def _constant(path: Path, tree: ast.Module, name: str, wanted: str) -> str:
    texts = list(_assigned(tree, name))
    if not texts:
        raise ValueError(
            f"{path} assigns no string to {name}; expected the official package, sha256 {wanted}"
        )
    found = {sha256(text): text for text in texts}
    if wanted not in found:
        raise ValueError(
            f"{path}: {name} has the sha256 {' and '.join(found)}; expected {wanted}: take it from "
            "the official package"
        )
    return found[wanted]


def _assigned(tree: ast.Module, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                pass
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if (
                target == name
            ):
                pass
            case _:
                continue
        if (text := _text(value)) is not None:
            yield text


def _text(node: ast.AST) -> str | None:
    """The content of a literal; None for anything that would have to be computed."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=ast.Name(id=name), conversion=-1, format_spec=None):
            return f"{{{name}}}"
        case ast.JoinedStr(values=values):
            parts = [_text(value) for value in values]
            return None if None in parts else "".join(parts)
    return None
