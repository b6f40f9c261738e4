"""`python -m astrolabe_jax.rewards` scores a file as training scored its frames."""

import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from astrolabe_jax.rewards import __main__ as program
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.runtime.media import write_mp4
from astrolabe_jax.worlds.moving_shapes import rewards as world
from astrolabe_jax.worlds.moving_shapes.render import sample_scenes
from configs import moving_shapes

PROMPT = "a red circle moving left on a blue background"


def check(video, options=(), **changes):
    config = moving_shapes.get_config()
    config.update_from_flattened_dict(changes)
    given = {"config": config, "video": str(video), "prompt": PROMPT}
    given |= {"golden": None, "record": False, "tolerance": 1e-3, **dict(options)}
    program.main({name: SimpleNamespace(value=value) for name, value in given.items()})


def test_a_video_is_brought_to_the_size_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program.registry, "load", lambda rewards, setting: [])
    write_mp4(tmp_path / "a.mp4", np.zeros((9, 48, 48, 3), np.uint8), 16)  # enlarged
    check(tmp_path / "a.mp4")
    assert "9 frames of 48x48 at 16 a second" in capsys.readouterr().out
    check(tmp_path / "a.mp4", **{"video.height": 32, "video.width": 64})
    out = capsys.readouterr().out
    assert "is 192x192: of it the middle, 96x192, is used at 32x64" in out
    assert "9 frames of 32x64 at 16 a second" in out


@pytest.mark.slow
def test_a_video_scores_as_its_frames_did_in_training(tmp_path, capsys):
    config = moving_shapes.get_config()
    frames = sample_scenes([(PROMPT, 33)], np.random.default_rng(0))
    scores = world.score(frames[None], [PROMPT])
    write_mp4(tmp_path / "a.mp4", frames, config.video.fps)  # enlarged
    check(tmp_path / "a.mp4")
    out = capsys.readouterr().out
    assert "33 frames of 48x48" in out
    for name in config.rewards:
        found = re.search(rf"^  {name} +(\S+)$", out, re.MULTILINE)
        assert found and abs(float(found[1]) - scores[name][0]) < 0.03


def test_all_servers_that_are_away_are_listed(tmp_path, capsys):
    load = "astrolabe_jax.rewards.remote:load"
    changes = {
        f"rewards.{name}": {"load": load, "url": f"http://127.0.0.1:1/{name}"}
        for name in ("smell", "taste")
    }
    with pytest.raises(SystemExit) as ended:
        check(tmp_path / "a.mp4", **changes)
    first, *lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and first == "error: 2 things are wrong:"
    for name, line in zip(("smell", "taste"), lines, strict=True):
        assert line.startswith(f"  config.rewards.{name}: http://127.0.0.1:1/{name} cannot be rea")


@pytest.mark.parametrize("weight", ["abc", float("nan")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, capsys, weight):
    value = {"weight": weight, "path": "a"}
    with pytest.raises(SystemExit) as ended:
        check(tmp_path / "a.mp4", **{"rewards.hpsv2": weight, "rewards.hpsv3": value})
    told = (
        f"  config.rewards.hpsv2 is {weight!r}; expected a finite weight\n"
        f"  config.rewards.hpsv3.weight is {weight!r}; expected a finite weight\n"
    )
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: the config does not make sense:\n{told}"


def test_what_is_no_video_is_one_line(tmp_path, capsys):
    for content, message in (
        (b"no video", "a.mp4 cannot be read as a video"),
        (None, "no file"),
        ("directory", "a.mp4 is a directory; expected one video file"),
    ):
        if content is None:
            (tmp_path / "a.mp4").unlink()
        elif content == "directory":
            (tmp_path / "a.mp4").mkdir()
        else:
            (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            check(tmp_path / "a.mp4")
        error = capsys.readouterr().err
        assert ended.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "--prompt is empty; write what the video should show"),
        ({"golden": "."}, "--golden: . is a directory; expected a file that --record has written"),
        ({"golden": ".", "record": True}, "--golden: . is a directory; expected a file that"),
        ({"golden": "new.json"}, "--golden: no file new.json; expected a file that --record has"),
        ({"golden": "README.md"}, "--golden: README.md is not valid JSON: "),
        ({"golden": "other.json"}, "other.json was not written by --record; give another"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_read(
    tmp_path, capsys, options, message
):
    (tmp_path / "other.json").write_text('{"model_type": "clip"}')
    if options.get("golden") == "other.json":
        options = options | {"golden": str(tmp_path / "other.json")}
    with pytest.raises(SystemExit) as ended:
        check(tmp_path / "nowhere.mp4", options)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and told.count("\n") == 1


def test_scores_are_recorded_in_a_new_folder_and_where_that_fails_it_is_one_line(
    tmp_path, capsys, monkeypatch
):
    score = rewards.Scorer(lambda params, frames, prompts: np.ones(1))
    loaded = [rewards.Loaded(("mine",), score)]
    monkeypatch.setattr(program.registry, "load", lambda rewards, setting: loaded)
    write_mp4(tmp_path / "a.mp4", np.zeros((9, 48, 48, 3), np.uint8), 16)
    golden = tmp_path / "new" / "golden.json"
    check(tmp_path / "a.mp4", {"golden": str(golden), "record": True})
    check(tmp_path / "a.mp4", {"golden": str(golden)})
    assert "agrees with the recorded 1.000000" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        golden = tmp_path / "a.mp4" / "golden.json"
        check(tmp_path / "a.mp4", {"golden": str(golden), "record": True})
    told = capsys.readouterr().err
    assert ended.value.code == 1 and told.startswith(f"error: --golden: {golden} cannot be written")


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("score(frames, prompts)", "reward 'mine' failed on sample 0: MemoryError: "),
        ("load(names, setting)", "config.rewards.mine: MemoryError: "),
    ],
)
def test_a_reward_that_has_too_little_memory_is_named_with_its_line(
    tmp_path, capsys, monkeypatch, signature, message
):
    function = signature.partition("(")[0]
    module = f"hungry_{function}"
    (tmp_path / f"{module}.py").write_text(f"def {signature}:\n    return bytearray(1 << 62)\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_mp4(tmp_path / "a.mp4", np.zeros((9, 48, 48, 3), np.uint8), 16)
    with pytest.raises(SystemExit) as ended:
        check(tmp_path / "a.mp4", **{"rewards.mine": {"load": f"{module}:{function}"}})
    told = capsys.readouterr().err
    assert ended.value.code == 1 and told.startswith(f"error: out of memory: {message}")
    assert f"({tmp_path / module}.py:2); a device holds" in told


def test_a_reward_that_hangs_is_named(tmp_path, capsys, monkeypatch):
    hang = threading.Event()
    score = rewards.Scorer(lambda params, frames, prompts: hang.wait())
    loaded = [rewards.Loaded(("mine",), score)]
    monkeypatch.setattr(program.registry, "load", lambda rewards, setting: loaded)
    write_mp4(tmp_path / "a.mp4", np.zeros((9, 48, 48, 3), np.uint8), 16)
    with pytest.raises(SystemExit) as ended:
        check(tmp_path / "a.mp4", **{"scoring.timeout": 0.2})
    hang.set()
    assert ended.value.code == 1
    assert "'mine' did not answer within 0.2 s for sample 0" in capsys.readouterr().err
