import dataclasses
import re
import subprocess
import sys
import types
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.worlds.moving_shapes import render, vocabulary

PROMPTS = ["a cat", "a dog", "a cow"]
FRAMES = np.arange(3 * 2 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 2, 4, 4, 3)


def score(names, frames=FRAMES, prompts=PROMPTS, numbers=None):
    """All rewards of these names with weight 1."""
    loaded = rewards.load(dict.fromkeys(names, 1.0), None)
    numbers = numbers or range(len(prompts))
    return {
        key: values
        for group in loaded
        for key, values in rewards.score(group, frames, prompts, numbers).items()
    }


@pytest.fixture
def add(monkeypatch):
    """Adds a reward as a user does: a module with a function, and one line in the table."""

    def add(name, function, target=None, check=None):
        module = types.ModuleType(f"fake_{name}")
        module.score, module.check = function, check
        monkeypatch.setitem(sys.modules, module.__name__, module)
        line = rewards.Reward(
            target or f"{module.__name__}:score", f"{module.__name__}:check" if check else ""
        )
        monkeypatch.setitem(rewards.TABLE, name, line)

    return add


def test_a_reward_is_a_function_and_a_line(add):
    def brightness(frames, prompts):
        assert frames.dtype == np.uint8 and prompts == PROMPTS
        return frames.mean((1, 2, 3, 4))

    add("brightness", brightness)
    rewards.validate(dict.fromkeys(["brightness"], 1.0))
    scores = score(["brightness"])
    assert list(scores) == ["brightness"] and scores["brightness"].dtype == np.float32
    np.testing.assert_allclose(scores["brightness"], FRAMES.reshape(3, -1).mean(1))


def test_rewards_of_one_function_cost_one_call(add):
    calls = []

    def both(frames, prompts):
        calls.append(len(frames))
        return {"a": [1, 2, 3], "b": [4, 5, 6], "b/part": [7, 8, 9], "other": [0, 0, 0]}

    add("a", both)
    add("b", both, "fake_a:score")
    scores = score(["b", "a"])
    assert {name: list(values) for name, values in scores.items()} == {
        "b": [4, 5, 6],
        "b/part": [7, 8, 9],
        "a": [1, 2, 3],
    }
    assert calls == [3]
    assert list(score(["a"])) == ["a"]


def test_unknown_rewards_are_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown rewards 'vq', 'mq'; known rewards: .*shapes_mq, .*shapes_vq"
    ):
        rewards.validate(dict.fromkeys(["vq", "shapes_ta", "mq"], 1.0))
    with pytest.raises(ValueError, match="no reward is configured"):
        rewards.validate({})
    with pytest.raises(ValueError, match="unknown reward 'vq'"):
        score(["vq"])


@pytest.mark.parametrize("target", ["no_such_module_here:score", "math:score"])
def test_a_wrong_line_is_named(add, target):
    add("broken", None, target)
    with pytest.raises(ValueError, match=f"reward 'broken': cannot import '{target}'"):
        rewards.validate(dict.fromkeys(["broken"], 1.0))


def test_a_wrong_line_for_the_check_is_named(monkeypatch):
    monkeypatch.setitem(rewards.TABLE, "broken", rewards.Reward("math:sqrt", "math:no_such_check"))
    with pytest.raises(ValueError, match="reward 'broken': cannot import 'math:no_such_check'"):
        rewards.validate(dict.fromkeys(["broken"], 1.0))


def test_prompts_are_checked_by_the_rewards_that_care(add):
    def short(prompt):
        if len(prompt) > 5:
            raise ValueError(f"{prompt!r} is long")

    add("any", lambda frames, prompts: frames.mean((1, 2, 3, 4)))
    add("brief", lambda frames, prompts: frames.mean((1, 2, 3, 4)), check=short)
    rewards.check_prompt(["any", "brief"], "a cat")
    rewards.check_prompt(["any"], "a longer cat")
    with pytest.raises(ValueError, match="reward 'brief': 'a longer cat' is long"):
        rewards.check_prompt(["any", "brief"], "a longer cat")


SHIPPED = ["shapes_vq", "shapes_mq", "shapes_ta", "bounce_mq", "bounce_ta"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_rewards_refuse_what_they_could_not_score(name):
    frames = np.zeros((1, 2, 8, 8, 3), np.uint8)
    for prompt in ("a cat", "a blue circle moving left on a blue background"):
        with pytest.raises(ValueError, match="not a prompt of the moving-shapes world"):
            rewards.check_prompt([name], prompt)
        with pytest.raises(ValueError, match="not a prompt of the moving-shapes world"):
            score([name], frames, [prompt])
    rewards.check_prompt([name], vocabulary.prompts("test")[0])


def loaded_modules(*names):
    """Modules of the library that a fresh interpreter has after importing these."""
    script = f"import sys, {', '.join(names)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return {name for name in run.stdout.split() if name.startswith("astrolabe_jax.")}


def test_modules_are_imported_when_first_used():
    modules = loaded_modules("astrolabe_jax.rewards.registry")
    assert not {name for name in modules if "moving_shapes" in name}
    assert not {name for name in modules if name.startswith(FOLDERS)}


REWARDS = "astrolabe_jax.rewards"
FOLDERS = (f"{REWARDS}.qwen2_vl", f"{REWARDS}.clip", f"{REWARDS}.flow")
# What an import of one scorer must leave alone: commands, and the tables and the conversions of
# other nets.
COMMANDS = {f"astrolabe_jax.convert.{name}" for name in ("commands", "describe", "open", "base")}
TABLES = {f"astrolabe_jax.convert.{name}" for name in ("parts", "wan", "vae", "umt5", "lora")}
CONVERSIONS = {f"{REWARDS}.convert", f"{REWARDS}.qwen2_vl.convert"}


@pytest.mark.parametrize(
    "scorer",
    [
        "qwen2_vl.hpsv3",
        "qwen2_vl.videoalign",
        "clip.scorers",
        "flow.scorers",
        "remote",
    ],
)
def test_a_scorer_imports_nothing_of_the_others(scorer):
    modules = loaded_modules(f"{REWARDS}.{scorer}")
    others = tuple(name for name in FOLDERS if not f"{REWARDS}.{scorer}".startswith(name))
    assert not {name for name in modules if name.startswith(others)}
    assert not modules & (COMMANDS | TABLES | CONVERSIONS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            [1.0, 2.0],
            r"'bad' returned float64 of shape \(2,\); expected real numbers of shape \(3,\), one",
        ),
        ([[1.0], [2.0], [3.0]], r"float64 of shape \(3, 1\)"),
        (1.0, r"float64 of shape \(\)"),
        (
            np.ones(3, np.complex64),
            r"'bad' returned complex numbers of shape \(3,\); expected real",
        ),
        (jnp.ones(3, jnp.complex64), r"complex numbers of shape \(3,\); expected real"),
        ([0.5, 1j, 1.0], "complex numbers"),
        (["0.5", "1", "2"], r"text of shape \(3,\); expected real"),
        (np.array([b"1", b"2", b"3"]), "text"),
        ([0.5, "1", 2], "text"),
        ([True, False, True], r"True and False of shape \(3,\); expected real"),
        (None, r"'bad' returned None \(does it end in a return\?\); expected real"),
        ({"bad": None}, "'bad' returned None"),
        ([0.5, None, 1.0], "'bad' returned list of NoneType, float; expected"),
        ([Decimal(1), None, 1.0], "'bad' returned list of Decimal, NoneType, float; expected"),
        ([Decimal(1), True, 1.0], "'bad' returned list of Decimal, bool, float; expected"),
        ([Decimal(1), Decimal("nan"), 1.0], "'bad' is nan for sample 1 "),
        ([1, 10**400, 1], "'bad' returned a list that is no array of numbers; expected"),
        ([[1.0], [2.0, 3.0], [4.0]], "'bad' returned a list that is no array of numbers; expected"),
        ((x for x in range(3)), "'bad' returned a generator; expected"),
        ({1.0, 2.0, 3.0}, "'bad' returned a set; expected"),
        (np.array(["2026-01-01"] * 3, "datetime64"), "datetime64"),
        ([1.0, 1e300, 3.0], r"'bad' is 1e\+300 for sample 1 .*; expected a number below 1e\+30"),
        ({}, "'bad': its scorer returned only an empty mapping"),
        ([1.0, np.nan, 3.0], r"is nan for sample 1 \(prompt 'a dog'\); expected a finite number$"),
        (
            [1.0, -np.inf, np.inf],
            r"'bad' is -inf for sample 1 \(prompt 'a dog'\) and for 1 more; expected a finite num",
        ),
        (
            {"bad": [1, 2, 3], "bad/part": [1, 2, np.nan]},
            r"'bad/part' is nan for sample 2 \(prompt 'a cow'\)",
        ),
        ({"good": [1, 2, 3]}, "'bad': its scorer returned only 'good'"),
    ],
)
def test_scores_that_are_no_scores_are_refused(add, recwarn, returned, message):
    add("bad", lambda frames, prompts: returned)
    with pytest.raises(ValueError, match=message) as raised:
        score(["bad"])
    assert "\n" not in str(raised.value)
    # JAX's own, of a generator
    assert not [warning for warning in recwarn if "PyTree" not in str(warning.message)]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        [np.float64(1), jnp.float32(2), 3],
        np.array([1, 2, 3], np.uint8),
        np.array([1, 2, 3], ">f8"),
        jnp.array([1, 2, 3], jnp.bfloat16),
        {"fine": [1, 2, 3], 7: "not asked for"},
        [Decimal(1), Fraction(2), 3],
        np.array([1, np.float32(2), 3.0], object),
    ],
)
def test_real_numbers_of_any_kind_are_scores(add, returned):
    add("fine", lambda frames, prompts: returned)
    scores = score(["fine"])["fine"]
    assert scores.dtype == np.float32 and scores.tolist() == [1, 2, 3]


def test_a_sample_is_named_by_its_number_in_the_epoch(add):
    add("bad", lambda frames, prompts: [1.0, 2.0, np.nan])
    with pytest.raises(ValueError, match=r"'bad' is nan for sample 26 \(prompt 'a cow'\)"):
        score(["bad"], numbers=range(24, 24 + len(PROMPTS)))


def test_the_shipped_rewards_score_their_world():
    prompts = vocabulary.prompts("test")[:2]
    frames = np.stack([render.sample(prompt, np.random.default_rng(0)) for prompt in prompts])
    scores = score(SHIPPED, frames, prompts)
    assert [name for name in scores if "/" not in name] == SHIPPED
    assert all(
        values.shape == (2,) and values.min() > 0.9 for values in (scores[name] for name in SHIPPED)
    )
    for reward in ("shapes_ta", "bounce_ta"):
        parts = {name.partition("/")[2] for name in scores if name.startswith(f"{reward}/")}
        assert parts == {"visibility", *vocabulary.Attributes._fields}


@dataclasses.dataclass(frozen=True)
class TintOptions:
    path: str
    gain: float = 1.0
    limit: int | None = None


@pytest.fixture
def loader(monkeypatch):
    """A reward with options, `tint` and `shade`; what it was loaded with is collected."""
    loaded = []

    def load(names, setting, options: TintOptions):
        loaded.append((names, setting, options))
        if options.path == "nowhere":
            raise FileNotFoundError("nowhere is not there; convert the weights first")
        return rewards.Scorer(
            lambda params, frames, prompts: {name: params * len(frames) for name in names},
            np.ones(3),
        )

    module = types.ModuleType("fake_loader")
    module.load = load
    module.TintOptions = TintOptions
    monkeypatch.setitem(sys.modules, "fake_loader", module)
    for name in ("tint", "shade"):
        monkeypatch.setitem(rewards.TABLE, name, rewards.Reward(load="fake_loader:load"))
    return loaded


def test_options_reach_the_loader_and_equal_ones_share_a_call(loader):
    setting = rewards.Setting(None, 16.0)
    same = {"weight": 0.5, "path": "a"}
    rewards.load({"tint": same, "shade": {**same, "weight": 2.0}}, setting)
    assert loader == [(("tint", "shade"), setting, TintOptions("a"))]
    loader.clear()
    rewards.load({"tint": same, "shade": same | {"gain": 2.0}}, setting)
    assert loader == [
        (("tint",), setting, TintOptions("a")),
        (("shade",), setting, TintOptions("a", 2.0)),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            1.0,
            "config.rewards.tint needs the options path beside its weight; it takes path, gain",
        ),
        (
            {"weight": 1.0, "paht": "a", "path": "a"},
            "config.rewards.tint has unknown options paht; it takes path, gain, limit",
        ),
        (
            {"weight": 1.0, "path": "nowhere"},
            "config.rewards.tint: nowhere is not there; convert the weights first",
        ),
    ],
)
def test_wrong_options_are_named(loader, value, message):
    with pytest.raises((ValueError, OSError), match=message):
        rewards.load({"tint": value}, rewards.Setting(None, 16.0))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("path", 7, "7; expected text"),
        ("gain", "much", "'much'; expected a number"),
        ("gain", True, "True; expected a number"),
        ("limit", "none", "'none'; expected a whole number or "),
    ],
)
def test_an_option_of_another_type_is_named(loader, option, value, expected):
    with pytest.raises(ValueError, match=f"config.rewards.tint.{option} is {expected}"):
        rewards.validate({"tint": {"path": "a", option: value}})
    rewards.validate({"tint": {"path": "a", "gain": 2, "limit": None}})


def test_a_reward_may_come_from_outside_of_the_package(loader, monkeypatch):
    """With a function of frames and prompts, or a loader; `load` is no option of the loader."""
    module = types.ModuleType("fake_outside")
    module.score = lambda frames, prompts: frames.mean((1, 2, 3, 4))
    monkeypatch.setitem(sys.modules, "fake_outside", module)
    settings = {
        "mine": {"weight": 2.0, "load": "fake_outside:score"},
        "toned": {"load": "fake_loader:load", "path": "a"},
    }
    rewards.validate(settings)
    rewards.check_prompt(settings, "a cat")
    setting = rewards.Setting(None, 16.0)
    mine, toned = rewards.load(settings, setting)
    scores = rewards.score(mine, FRAMES, PROMPTS, range(3))
    np.testing.assert_allclose(scores["mine"], FRAMES.reshape(3, -1).mean(1))
    assert loader == [(("toned",), setting, TintOptions("a"))] and toned.names == ("toned",)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module_here:score", "'mine': cannot import 'no_such_module_here:score'"),
        ("fake_loader:gone", "'mine': cannot import 'fake_loader:gone'"),
        ("fake_loader", "mine.load is 'fake_loader', of type module; expected module:function"),
        ("math:pi", "is 'math:pi', of type float; expected module:function"),
        ("a b", "'mine': cannot import 'a b'"),
        ("my/score.py:score", "is 'my/score.py:score'; .* as Python imports it, such as score:sc"),
        ("score.py:score", "is 'score.py:score'; expected a module as Python imports it, such as"),
        (7, "cannot import 7: "),
        ("fake_loader:TintOptions", "TintOptions', of type type; expected module:function"),
    ],
)
def test_a_function_from_outside_that_is_not_there_is_named(loader, target, message):
    with pytest.raises(ValueError, match=message):
        rewards.validate({"mine": {"load": target}})


def test_a_reward_without_options_refuses_them():
    with pytest.raises(
        ValueError, match="config.rewards.shapes_vq has unknown options gain; it takes none"
    ):
        rewards.validate({"shapes_vq": {"weight": 1.0, "gain": 2.0}})


# A user's files, and for each fault the line that is at fault.
OUTSIDE = """
import asyncio, helper, json, sys
import numpy as np
def key(frames, prompts):
    return {}[prompts[0]]  # key
def deep(frames, prompts):
    return helper.half(frames)
def installed(frames, prompts):
    return np.stack([])  # installed
def python(frames, prompts):
    return json.loads("{")  # python
def leave(frames, prompts):
    sys.exit(3)  # leave
def lines(frames, prompts):
    raise RuntimeError("one\\n  two")  # lines
def interrupt(frames, prompts):
    raise KeyboardInterrupt("enough")  # interrupt
def cancel(frames, prompts):
    raise asyncio.CancelledError  # cancel
def long(frames, prompts):
    raise RuntimeError("x" * 9999)  # long
def load(names, setting):
    return {}["weights"]  # load
"""
HELPER = """
def half(frames):
    return frames / "2"  # deep
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes modules of a user, where Python finds them; gives FILE:LINE of a marked line."""

    def write(**modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    def place(mark):
        for path in tmp_path.glob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                if line.endswith(f"# {mark}"):
                    return f"{path}:{number}"

    write(outside=OUTSIDE, helper=HELPER)
    yield SimpleNamespace(write=write, place=place)
    for name in ("outside", "helper", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("key", "KeyError: 'a cat'"),
        ("deep", "TypeError: ufunc .divide. not supported .*"),
        ("installed", "ValueError: need at least one array to stack"),
        ("python", "JSONDecodeError: .*"),
        ("leave", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt: enough"),
        ("cancel", "CancelledError: "),
        ("lines", "RuntimeError: one two"),
        ("long", "RuntimeError: x{300}"),
    ],
)
def test_whatever_a_reward_raises_names_it_and_the_line_of_its_user(outside, function, message):
    settings = {"mine": {"load": f"outside:{function}"}}
    (loaded,) = rewards.load(settings, rewards.Setting(None, 16.0))
    with pytest.raises(rewards.RewardError) as raised:
        rewards.score(loaded, FRAMES, PROMPTS, range(4, 7))
    text = str(raised.value)
    assert re.match(f"reward 'mine' failed on samples 4 to 6: ({message})", text)
    assert text.endswith(f" ({outside.place(function)})") and "\n" not in text


def test_whatever_a_loader_or_an_import_raises_names_the_line_of_its_user(outside):
    setting = rewards.Setting(None, 16.0)
    with pytest.raises(ValueError, match="config.rewards.mine: KeyError: 'weights'") as raised:
        rewards.load({"mine": {"load": "outside:load"}}, setting)
    assert str(raised.value).endswith(f" ({outside.place('load')})")
    for text, message in (("import sys\nsys.exit()  # import", "SystemExit: "), ("a b", "SyntaxE")):
        outside.write(broken=text)
        with pytest.raises(ValueError, match=f"cannot import 'broken:score': {message}") as raised:
            rewards.validate({"mine": {"load": "broken:score"}})
        assert outside.place("import") is None or outside.place("import") in str(raised.value)


CHANGING = """
import jax
from astrolabe_jax.rewards.registry import Scorer

def change():
    jax.config.update("jax_enable_x64", True)

def score(frames, prompts):
    change()
    return [0.0] * len(prompts)

def load(names, setting):
    change()
    return Scorer(score)
"""


def test_an_error_that_cannot_be_written_is_named(outside):
    outside.write(
        broken="""
class Silent(Exception):
    def __str__(self):
        raise KeyError

def score(frames, prompts):
    raise Silent
"""
    )
    (loaded,) = rewards.load({"mine": {"load": "broken:score"}}, rewards.Setting(None, 16.0))
    with pytest.raises(rewards.RewardError, match=r"samples 0 to 2: Silent: .*broken.py:7\)"):
        rewards.score(loaded, FRAMES, PROMPTS, range(3))


def test_a_reward_that_changes_how_all_compute_is_named_and_undone(outside):
    outside.write(broken=CHANGING, worse=f"{CHANGING}\nchange()")
    told = "changes jax_enable_x64 for the whole program.*with jax.enable_x64"
    setting = rewards.Setting(None, 16.0)
    (loaded,) = rewards.load({"mine": {"load": "broken:score"}}, setting)
    with pytest.raises(rewards.RewardError, match=f"'mine' failed on samples .*: it {told}"):
        rewards.score(loaded, FRAMES, PROMPTS, range(3))
    with pytest.raises(ValueError, match=f"config.rewards.mine: its code {told}"):
        rewards.load({"mine": {"load": "broken:load"}}, setting)
    with pytest.raises(ValueError, match=f"reward 'mine': .* its module 'worse:score' {told}"):
        rewards.validate({"mine": {"load": "worse:score"}})
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(
    ("made", "what"), [("None", "nothing"), ("print", "a builtin"), ("{}", "a dict")]
)
def test_a_loader_that_returns_no_scorer_is_named(outside, made, what):
    outside.write(broken=f"def load(names, setting): return {made}")
    setting = rewards.Setting(None, 16.0)
    with pytest.raises(ValueError, match=f"rewards.mine: its loader returned {what}.*; expected a"):
        rewards.load({"mine": {"load": "broken:load"}}, setting)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def score(frames): return [1.0]",
            ", which cannot be called with .*: too many positional",
        ),
        ("def score(frames, prompts, fps): return [1.0]", "missing a required argument: 'fps'"),
        ("async def score(frames, prompts): return [1.0]", ", which is async or yields; expected"),
        ("def score(frames, prompts): yield 1.0", ", which is async or yields; expected"),
    ],
)
def test_a_function_that_cannot_score_is_refused_before_it_is_called(outside, text, message):
    outside.write(broken=text)
    with pytest.raises(ValueError, match=f"config.rewards.mine.load is 'broken:score'.*{message}"):
        rewards.validate({"mine": {"load": "broken:score"}})


@pytest.mark.parametrize(
    "text",
    [
        "import functools\ndef f(k, frames, prompts): return [k] * len(frames)\n"
        "score = functools.partial(f, 2)",
        "class Two:\n    def __call__(self, frames, prompts): return [2] * len(frames)\n"
        "score = Two()",
        "def score(frames, prompts, gain=2): return [gain] * len(frames)",
        "def score(*args): return [2] * len(args[0])",
    ],
)
def test_whatever_can_be_called_is_a_reward(outside, text):
    outside.write(broken=text)
    (loaded,) = rewards.load({"mine": {"load": "broken:score"}}, rewards.Setting(None, 16.0))
    assert rewards.score(loaded, FRAMES, PROMPTS, range(3))["mine"].tolist() == [2, 2, 2]


def test_a_reward_cannot_change_what_others_see():
    def black(params, frames, prompts):
        frames[:] = 0
        return np.zeros(len(frames))

    loaded = rewards.Loaded(("a",), rewards.Scorer(black))
    frames = np.ones((1, 1, 2, 2, 3), np.uint8)
    with pytest.raises(rewards.RewardError, match="'a' failed .*destination is read-only"):
        rewards.score(loaded, frames, ["a cat"], [0])
    assert frames.all()

    def reverse(params, frames, prompts):
        prompts.reverse()
        return np.zeros(len(frames))

    prompts = ["a cat", "a dog"]
    loaded = rewards.Loaded(("a",), rewards.Scorer(reverse))
    rewards.score(loaded, frames.repeat(2, axis=0), prompts, [0, 1])
    assert prompts == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: sys.exit(0), "'a' failed on sample 0: SystemExit: 0"),
        (lambda: [1e38], "'a' is .* for sample 0 .*; expected a number below 1e.30"),
    ],
)
def test_neither_an_exit_nor_an_endless_score_goes_unnamed(act, message):
    loaded = rewards.Loaded(("a",), rewards.Scorer(lambda *_: np.array(act())))
    with pytest.raises(rewards.RewardError, match=message):
        rewards.score(loaded, np.ones((1, 1, 2, 2, 3), np.uint8), ["a cat"], [0])
