"""The laws of the tree, enforced: who may import whom, how long things may be, how they are told.

docs/architecture.md (Import law) gives the reasons.
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
    "ground": ("types", "config", "config_checks", "arithmetic", "runtime", "__init__"),
    "time and place": ("schedule", "sharding", "cost"),
    "models": ("models",),
    "convert": ("convert",),
    "stages": (
        "prompts",
        "encode",
        "rollout",
        "decode",
        "rewards",
        "advantages",
        "losses",
        "minibatches",
        "update",
        "checkpoint",
        "worlds",
        "streaming.scenes",
    ),
    "driver": ("streaming", "streaming.streams"),
    "run": ("geometry", "preflight", "run"),
    "collector": ("streaming.windows", "report"),
    "evaluation": ("evaluate", "estimate"),
    "conductor": ("train",),
    "entry": ("main", "plan", "bench", "sample", "convert.__main__", "rewards.__main__"),
}
ORDER = list(LAYERS)
# modules of these layers may import each other
WITHIN = {"ground", "time and place", "models", "convert", "run", "entry"}
# stages that import each other, package by package
EXCEPTIONS = {
    ("update", "losses"),
    ("update", "minibatches"),
    ("minibatches", "losses"),
    ("prompts", "worlds"),
    ("rewards", "rewards"),
    ("worlds", "worlds"),
}
REWARD_FOLDERS = ("qwen2_vl", "clip", "flow")


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
    """Modules of this package that a file imports when it runs, relative to the package."""
    found = set()
    tree = ast.parse(path.read_text())
    hints = [node for node in ast.walk(tree) if is_type_checking(node)]
    skipped = {id(inner) for node in hints for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
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


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downwards(module):
    name = module or "__init__"
    mine = ORDER.index(layer_of(name))
    for imported in imports(SOURCES[module]):
        theirs = ORDER.index(layer_of(imported))
        packages = (name.partition(".")[0], imported.partition(".")[0])
        same = theirs == mine and (ORDER[mine] in WITHIN or packages in EXCEPTIONS)
        assert theirs < mine or same, f"{name} ({ORDER[mine]}) imports {imported} ({ORDER[theirs]})"


@pytest.mark.parametrize("folder", REWARD_FOLDERS)
def test_a_reward_folder_imports_no_other(folder):
    others = tuple(f"rewards.{other}" for other in REWARD_FOLDERS if other != folder)
    mine = [name for name in SOURCES if name.startswith(f"rewards.{folder}")]
    assert mine
    for name in mine:
        assert not [other for other in imports(SOURCES[name]) if other.startswith(others)], name


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
        assert imports(path) <= {"config", "arithmetic"}


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package, under its module."""
    return [
        (name, node)
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_functions_and_files_stay_short():
    for name, path in SOURCES.items():
        assert len(path.read_text().splitlines()) < 700, name
    for name, node in functions():
        assert node.end_lineno - node.lineno < 80, f"{name}.{node.name}"
    assert len(SOURCES["main"].read_text().splitlines()) < 60


def test_functions_take_at_most_seven_parameters():
    for name, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        taken = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
        assert len(taken) <= 7, f"{name}.{node.name}: {taken}"


# What a docstring that says what comes back does not open with.
NOUN_CLAUSES = re.compile(
    r"(The|A|An|Of|Whether|What|Where|Which|How|Whose|Those|These|That|Every|All|As|In|On|For) "
)


def test_docstrings_open_with_a_verb():
    """A property and a class may open with a noun."""
    for name, node in functions():
        text = ast.get_docstring(node)
        is_property = any("property" in ast.dump(decorator) for decorator in node.decorator_list)
        if text and not is_property:
            assert not NOUN_CLAUSES.match(text), f"{name}.{node.name}: {text.splitlines()[0]}"


def test_no_class_name_stands_twice():
    names = [
        node.name
        for path in SOURCES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert not sorted({name for name in names if names.count(name) > 1})


def test_two_values_are_not_packed_to_save_a_line():
    """`a, b = x, y` stands only where the values are swapped or turned."""
    packed = 0
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                packed += isinstance(node.value, ast.Tuple)
    assert packed <= 20


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
            if module not in ("config", "config_checks"):
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
