"""Texts from copies of packages that the tests write: the exact bytes or a refusal, and no code of
theirs ever runs.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.rewards.templates import PublishedText, read_template, sha256

FIRST, SECOND = (
    '\nRate this:  \n- **one:** a "quoted" word\\ \n{text_prompt}\n',
    "\nThe rating is <|Reward|>\n\nEND\n",
)
PUBLISHED = PublishedText("collator.py", {"FIRST": sha256(FIRST), "second": sha256(SECOND)})
MODULE = f"import nothing_like_this\nFIRST = {FIRST!r}\nother = 3\nsecond: str = {SECOND!r}\n"


def write(folder, content=MODULE, name="collator.py"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_from_the_file_or_the_folder(tmp_path):
    path = write(tmp_path / "package" / "data")
    assert read_template(path, PUBLISHED) == FIRST + SECOND
    assert read_template(tmp_path / "package", PUBLISHED) == FIRST + SECOND


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_byte_for_byte(tmp_path_factory, text):
    path = write(tmp_path_factory.getbasetemp(), f"x = {text!r}\n")
    assert read_template(path, PublishedText("collator.py", {"x": sha256(text)})) == text


def test_triple_quotes_neighbours_and_places_of_f_strings(tmp_path):
    text = "a\nb {prompt}]"
    for source in (
        f'"""{text}"""',
        '"a\\n" "b {prompt}]"',
        'f"a\\nb {prompt}]"',
        "f'a\\n' 'b {prompt}]'",
    ):
        path = write(
            tmp_path, f"async def ask(prompt):\n    question = {source}\n    return question\n"
        )
        assert read_template(path, PublishedText("collator.py", {"question": sha256(text)})) == text


def test_the_one_that_fits_of_several(tmp_path):
    path = write(tmp_path, MODULE + "FIRST = 'debug'\n")
    assert read_template(path, PUBLISHED) == FIRST + SECOND


def test_another_text_is_refused_with_both_hashes(tmp_path):
    path = write(tmp_path, MODULE.replace("one:", "One:"))
    found = sha256(FIRST.replace("one:", "One:"))
    with pytest.raises(
        ValueError, match=f"{path}: FIRST has the sha256 {found}; expected {sha256(FIRST)}"
    ):
        read_template(path, PUBLISHED)


def test_a_checkout_with_other_line_endings(tmp_path):
    """Python reads a module with either ending alike."""
    text = "a\nb\n"
    path = write(tmp_path, b'x = """a\r\nb\r\n"""\r\n')
    assert read_template(path, PublishedText("collator.py", {"x": sha256(text)})) == text


@pytest.mark.parametrize(
    "value", ["open('made', 'w').read()", "'a' + 'b'", "f'{open(1)}'", "f'{a!r}'", "b'a'"]
)
def test_what_is_no_literal_is_refused(tmp_path, value):
    path = write(tmp_path, f"FIRST = {value}\n")
    with pytest.raises(
        ValueError,
        match=f"{path} assigns no string to FIRST; expected the official package, sha256",
    ):
        read_template(path, PUBLISHED)


def test_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = "open('ran', 'w').write('x')\nraise SystemExit('ran')\n"
    folder = tmp_path / "package"
    write(folder, attack, "__init__.py")
    write(folder, attack + MODULE)
    assert read_template(folder, PUBLISHED) == FIRST + SECOND
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"x = (", b"\0", b"\xff\xfe", b"(" * 10000, b"# coding: nonsense\n", b"-" * 10**6]
)
def test_what_is_no_module_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=str(path)):
        read_template(path, PUBLISHED)


def test_files_that_are_not_there_or_too_many(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no .*/nothing; expected collator.py, or the folder"
    ):
        read_template(tmp_path / "nothing", PUBLISHED)
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path} holds no collator.py; expected the folder"
    ):
        read_template(tmp_path, PUBLISHED)
    write(tmp_path / "a")
    write(tmp_path / "b")
    with pytest.raises(
        ValueError, match="holds several collator.py: .*/a/collator.py, .*/b/collator.py; give one"
    ):
        read_template(tmp_path, PUBLISHED)
    big = write(tmp_path / "big", b"#" * (5 << 20))
    with pytest.raises(ValueError, match="has 5242880 bytes; expected the module collator.py"):
        read_template(big, PUBLISHED)
