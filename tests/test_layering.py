"""The shape of the tree, enforced: who may import whom, how long things may be, no config field
that nobody reads.
"""

import ast
import re
from pathlib import Path

import pytest

from astrolabe_jax.config import flatten
from configs import moving_shapes

PACKAGE = Path(__file__).parents[1] / "astrolabe_jax"
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the ground up: a module imports only from lower layers, or from its own where that is
# allowed.
LAYERS = {
    "ground": ("types", "config", "config_checks", "runtime", "__init__"),
    "time and place": ("schedule", "sharding"),
    "nets": ("models",),
    "rooms": ("convert", "rewards", "worlds"),
    "stages": (
        "prompts",
        "encode",
        "streaming",
        "rollout",
        "decode",
        "advantages",
        "losses",
        "update",
        "checkpoint",
    ),
    "run": ("prepare", "report", "requests"),
    "videos": ("generate", "stream"),
    "segments": ("segments",),
    "evaluation": ("evaluate",),
    "conductor": ("train",),
    "entry": ("main", "plan", "sample", "convert.__main__", "rewards.__main__"),
}
ORDER = list(LAYERS)
# read in config.py for others
DERIVED = ("samples", "repeats", "piece", "window_starts", "rounds", "eval_frames", "clip_length")
# modules of these layers may import each other
WITHIN = {"nets", "rooms", "time and place", "ground"}
EXCEPTIONS = {("update", "losses"), ("report", "prepare")}


def layer_of(module: str) -> str:
    matches = [
        (len(name), layer)
        for layer, names in LAYERS.items()
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} belongs to no layer; add it to LAYERS"
    return max(matches)[1]


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, relative to the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {
        name.removeprefix("astrolabe_jax.") for name in found if name.startswith("astrolabe_jax")
    }
    modules = set()
    for name in names:
        while name and name not in SOURCES:
            name = name.rpartition(".")[0]
        modules.add(name or "__init__")
    return modules


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downwards(module):
    name = module or "__init__"
    mine = ORDER.index(layer_of(name))
    for imported in imports(SOURCES[module]):
        theirs = ORDER.index(layer_of(imported))
        same = theirs == mine and (ORDER[mine] in WITHIN or (name, imported) in EXCEPTIONS)
        assert theirs < mine or same, f"{name} ({ORDER[mine]}) imports {imported} ({ORDER[theirs]})"


@pytest.mark.parametrize("name", ["torch", "diffusers", "peft", "tensorflow"])
def test_no_other_framework(name):
    for path in SOURCES.values():
        assert not re.search(rf"^\s*(import|from) {name}\b", path.read_text(), re.MULTILINE), path


def test_two_modules_know_orbax():
    """One stores runs, the other nets."""
    knowing = [
        name
        for name, path in SOURCES.items()
        if re.search(r"^import orbax", path.read_text(), re.M)
    ]
    assert knowing == ["checkpoint", "convert.store"]


def test_recipes_import_only_the_config_and_the_published_runs():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert imports(path) <= {"config"}


def test_functions_and_files_stay_short():
    for name, path in SOURCES.items():
        assert len(path.read_text().splitlines()) < 700, name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}.{node.name}"
    assert len(SOURCES["main"].read_text().splitlines()) < 60


def test_every_config_field_is_read():
    """Under its own section: names that are read elsewhere, which these invented fields have, do
    not count.
    """
    fields = {
        field for field in flatten(moving_shapes.get_config()) if not field.startswith("rewards.")
    }
    invented = {
        "train.seed",
        "video.steps",
        "loss.rank",
        "optimizer.kind",
        "eval.epochs",
        "mesh.batch",
        "shown",
    }
    assert not fields & invented
    assert fields_read(fields | invented) == fields


def fields_read(fields: set[str]) -> set[str]:
    """Those of `fields` that some function of the package reads; checking a value is not reading
    it.
    """
    found = set()
    for module, path in SOURCES.items():
        if not re.search(r"ConfigDict|run\.config", path.read_text()):
            continue  # its `config` is that of a net
        tree = ast.parse(path.read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            if module not in ("config", "config_checks") or function.name in DERIVED:
                # what its parameter `config` is
                given = "mesh" if function.name == "_mesh_shape" else ""
                found |= _read_in(function, {"config": given}, fields, strings)
    return found


def _read_in(
    function: ast.FunctionDef, names: dict[str, str], fields: set[str], strings: set
) -> set[str]:
    """Fields that a function reads through `run.config`, `names`, and the names that it gives to
    sections itself.
    """
    sections = {field.rpartition(".")[0] for field in fields}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=True) if several else [(target, value)]
            found = {
                name.id: _path(part, names) for name, part in pairs if isinstance(name, ast.Name)
            }
            names = names | {name: path for name, path in found.items() if path in sections}
    read = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Load):
            read.add(_path(node, names))
            if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Constant):
                read |= {f"{_path(node.value, names)}.{name}" for name in strings}  # section[name]
    return read & fields


def _path(node: ast.AST, names: dict[str, str]) -> str | None:
    """'video.frames' for run.config.video['frames'] and the like; '' for the config itself, None
    for anything else.
    """
    match node:
        case ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(value=ast.Name(id="run"), attr="config"):
            return ""
        case (
            ast.Attribute(value=above, attr=name)
            | ast.Subscript(value=above, slice=ast.Constant(value=name))
        ):
            section = _path(above, names)
            return None if section is None else f"{section}.{name}".removeprefix(".")
    return None
