"""The documentation holds: what code cites is there, links lead somewhere, files and flags that
pages name exist.
"""

import importlib
import importlib.util
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest

from astrolabe_jax import config as fields

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "astrolabe_jax"
TREES = ("astrolabe_jax", "configs", "experiments", "tests")
MANUAL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("experiments/*/README.md"))]

CITATION = re.compile(r"\bdocs/(\w+\.md)(?:, ([A-Z][^\"]{0,80}))?")
# notes that readers do not have
PRIVATE = re.compile(
    r"(?<!\.com/)\bspec/|\bspec \w+\.md"
    r"|(?<![\w/])(?:model|sampling|vae_and_text|checkpoints|objective"
    r"|streaming|rewards|paper|platform|embedded_world)\.md\b"
)
SECTION = re.compile(r"\b[Ss]ections? (?:\d[\d.]*|[AB]\d)|\((?:(?:[1-9]|1[0-5])\.\d{1,2}|[AB]\d)\)")
NAMED = re.compile(r"\bpaper\b|arXiv|docs/|et al")
# in backticks on a page, but no file of ours
ELSEWHERE = {"data_collator_qwen.py", "prompt_template.py"}


def prose(path: Path) -> str:
    """Return the comments and strings of a module, each on a line without breaks."""
    parts = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            parts.append(token.string.lstrip("#"))
        elif token.type == tokenize.STRING:
            parts.append("\n" + " ".join(token.string.split()) + "\n")
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            parts.append("\n")
    return re.sub(r"\n+", "\n", "".join(parts))


def without_code(text: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(page: Path) -> list[str]:
    """Return the headings of a page."""
    return re.findall(r"^#+ (.+?) *$", without_code(page.read_text()), flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """Return what a link calls a heading, on GitHub as in mkdocs."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def bad_citations(text: str) -> list[str]:
    faults = []
    for page, cited in CITATION.findall(text):
        path = ROOT / "docs" / page
        if not path.is_file():
            faults.append(f"docs/{page} does not exist")
        elif cited and not any(
            re.match(rf"{re.escape(heading)}(?!\w)", cited) for heading in headings(path)
        ):
            faults.append(f"docs/{page} has no heading {cited!r}")
    return faults


@pytest.mark.parametrize("tree", TREES)
def test_what_code_cites_is_there(tree):
    faults = []
    for path in sorted((ROOT / tree).rglob("*.py")):
        faults += [f"{path.relative_to(ROOT)}: {fault}" for fault in bad_citations(prose(path))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("tree", TREES)
def test_nobody_cites_notes_that_readers_do_not_have(tree):
    faults = []
    for path in sorted((ROOT / tree).rglob("*.py")):
        if path == Path(__file__):
            continue
        text = prose(path)
        where = path.relative_to(ROOT)
        faults += [f"{where}: {match[0]!r}" for match in PRIVATE.finditer(text)]
        for match in SECTION.finditer(text):
            around = text[max(match.start() - 120, 0) : match.end() + 120]
            if not NAMED.search(around):
                faults.append(f"{where}: {match[0]!r} of what?")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, part = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            faults.append(f"{target}: no such file")
        elif part and part not in map(anchor, headings(path)):
            faults.append(f"{target}: no such heading")
    assert not faults, "\n".join(faults)


def test_headings_are_told_apart():
    for page in PAGES:
        anchors = [anchor(heading) for heading in headings(page)]
        if page.name != "CHANGELOG.md":
            assert len(anchors) == len(set(anchors)), f"{page}: two headings with one anchor"


def files_named(text: str) -> set[str]:
    """Return the files and folders of ours that a page names in backticks."""
    names = set()
    for name in re.findall(r"(?<!`)`([\w./-]+)`", without_code(text)):
        placeholder = re.search(r"[A-Z]{2}", name) and not name.endswith((".md", "MIT"))
        in_a_tree = name.split("/")[0] in (*TREES, "docs", ".ci") and "/" in name
        if not placeholder and name not in ELSEWHERE and (in_a_tree or name.endswith(".py")):
            names.add(name)
    return names


def is_there(name: str) -> bool:
    if (ROOT / name).exists():
        return True
    parts = Path(name).parts
    return any(path.parts[-len(parts) :] == parts for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page):
    missing = sorted(name for name in files_named(page.read_text()) if not is_there(name))
    assert not missing, f"{page.name} names {', '.join(missing)}"


def names_in_files(text: str) -> set[tuple[str, str]]:
    """Return (file, name) where a page says in which file a function or a table is."""
    text = " ".join(without_code(text).split())
    found = set(re.findall(r"`([\w./]+\.py)`, `(\w+)`", text))
    for name, file in re.findall(r"`(\w+)` (?:of|in) `([\w./]+\.py)`", text):
        found.add((file, name))
    return found


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_names_are_in_the_files_that_pages_say(page):
    missing = []
    for file, name in sorted(names_in_files(page.read_text())):
        sources = [path for path in (ROOT / file, PACKAGE / file) if path.is_file()]
        if not any(re.search(rf"\b{name}\b", path.read_text()) for path in sources):
            missing.append(f"{name} in {file}")
    assert not missing, f"{page.name}: {', '.join(missing)}"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_nine_arrows_are_modules(page):
    stages = re.findall(r"^(\w+(?:\.py|/)) {2,}\S", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert len(stages) == 9, stages
    assert all((PACKAGE / stage).exists() for stage in stages), stages


def commands() -> list[tuple[str, str]]:
    """Return (page, command) of the fenced blocks that run a module of ours."""
    found = []
    for page in MANUAL:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if "python -m astrolabe_jax" in line]
    return found


def sources_of(module: str) -> str:
    """Return the source of a command and of the modules that define flags for it."""
    path = ROOT / Path(*module.split("."))
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return "\n".join(file.read_text() for file in [*files, PACKAGE / "runtime/cli.py"])


def variant_of(value: str):
    file, _, variant = value.partition(":")
    return importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(variant)


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_have_flags_that_exist(page, command):
    words = shlex.split(command, comments=True)
    source = sources_of(words[words.index("-m") + 1])
    given = [word.removeprefix("--").partition("=") for word in words if word.startswith("--")]
    recipe = next((value for name, _, value in given if name == "config"), None)
    known = fields.flatten(variant_of(recipe)) if recipe else {}
    for name, _, _ in given:
        field = name.removeprefix("config.")
        if field != name:
            assert field in known or field.startswith("rewards."), f"{page}: no field {field}"
        else:
            assert re.search(rf"""["'](--)?{name}["']""", source), f"{page}: no flag --{name}"


def test_the_page_of_the_config_is_up_to_date():
    place = ROOT / "docs/config_page.py"
    spec = importlib.util.spec_from_file_location("config_page", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.text(), "run: python docs/config_page.py"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 100
