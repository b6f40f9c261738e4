"""`python -m astrolabe_jax.rewards` scores a file as training scored its frames."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from astrolabe_jax.rewards import __main__ as program
from astrolabe_jax.runtime.media import write_mp4
from astrolabe_jax.worlds.moving_shapes import rewards as world
from astrolabe_jax.worlds.moving_shapes.render import sample_scenes
from configs import moving_shapes

PROMPT = "a red circle moving left on a blue background"


def check(video, **changes):
    config = moving_shapes.get_config()
    config.update_from_flattened_dict(changes)
    given = {"config": config, "video": str(video), "prompt": PROMPT}
    given |= {"golden": None, "record": False}
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
