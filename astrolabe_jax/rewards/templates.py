"""Read the texts that reward models are asked with from the user's copy of an official package.

Scores depend on every byte of such a text, so each is known by its sha256. The package is parsed,
never imported: only the literal that is assigned to a name is looked at. See docs/rewards.md,
Templates.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MOST = 4 << 20  # bytes of a module; the published ones have less than 100 kB


class PublishedText(NamedTuple):
    """Where a text stands: constants of one module, joined in this order."""

    file: str  # name of the module's file, anywhere in the folder of the package
    constants: dict[str, str]  # name -> sha256 of its UTF-8 content


def sha256(text: str) -> str:
    """Return the sha256 of the UTF-8 content, in hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_template(package: Path, published: PublishedText) -> str:
    """Return a text from a module, or from the folder of a package that holds the module.

    A constant is a string or an f-string of plain names, whose places stay as {name}; it may be
    assigned inside of functions.

    Raises:
      FileNotFoundError: if there is no such module.
      ValueError: naming the file, and the variable with what was found and expected.
    """
    path = _module(package, published.file)
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
        _constant(path, tree, name, digest) for name, digest in published.constants.items()
    )


def _module(package: Path, file: str) -> Path:
    if package.is_file():
        return package
    if not package.is_dir():
        raise FileNotFoundError(
            f"no {package}; expected {file}, or the folder of the package that holds it"
        )
    paths = sorted(package.rglob(file))
    if not paths:
        raise FileNotFoundError(
            f"{package} holds no {file}; expected the folder of the official package, or that file"
        )
    if len(paths) > 1:
        raise ValueError(
            f"{package} holds several {file}: {', '.join(map(str, paths))}; give one of them"
        )
    return paths[0]


def _constant(path: Path, tree: ast.Module, name: str, digest: str) -> str:
    texts = {sha256(text): text for text in _assigned(tree, name)}
    if not texts:
        raise ValueError(
            f"{path} assigns no string to {name}; expected the official package, sha256 {digest}"
        )
    if digest not in texts:
        raise ValueError(
            f"{path}: {name} has the sha256 {' and '.join(texts)}; expected {digest}: take it from "
            "the official package"
        )
    return texts[digest]


def _assigned(tree: ast.Module, name: str) -> Iterator[str]:
    """Yield every literal that is assigned to a name."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=assigned)], value=value)
                | ast.AnnAssign(target=ast.Name(id=assigned), value=value)
            ) if assigned == name:
                text = _text(value)
                if text is not None:
                    yield text


def _text(node: ast.AST | None) -> str | None:
    """Return the content of a literal; None for anything that would have to be computed."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=ast.Name(id=name), conversion=-1, format_spec=None):
            return f"{{{name}}}"
        case ast.JoinedStr(values=values):
            parts = [_text(value) for value in values]
            return None if None in parts else "".join(filter(None, parts))
    return None
