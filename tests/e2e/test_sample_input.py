"""What is asked of `sample` wrongly is refused by name, before anything is loaded."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from astrolabe_jax.runtime.media import write_mp4, write_png
from tests.e2e.asking import AWAY, GREEN, RED, ask


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "give either --prompt or --prompt_file"),
        ({}, {"prompt": RED, "prompt_file": "x"}, "give either --prompt or --prompt_file"),
        ({}, {"prompt": " "}, "--prompt is empty"),
        ({}, {"prompt": RED, "lora": ""}, "--lora is empty; expected a path"),
        ({}, {"prompt_file": ""}, "--prompt_file is empty"),
        ({}, {"prompt": "a [5S]"}, "--prompt: character 3 of 'a .5S.': '.5S.' is no duration"),
        ({}, {"prompt": "a | | b"}, "--prompt: character 4 of 'a | | b'"),
        (
            {},
            {"prompt": RED, "frames": 6},
            "--prompt: --frames is 6; whole blocks of 1 latent frame make 5 or 9",
        ),
        (
            {"video.frames": 7},
            {"prompt": RED},
            "--prompt: config.video.frames is 7; whole blocks .* 5 or 9",
        ),
        ({"lora.init": "x"}, {"prompt": RED}, "config.lora.init is .*; videos take an adapter as"),
        ({}, {"prompt": "red " * 16}, "--prompt: 'red .* has 17 tokens, the text encoder takes 16"),
        (
            {},
            {"prompt": f"{RED} | a cat", "score": True},
            "--prompt: reward .* not a prompt of the moving-shapes",
        ),
        (
            {},
            {"prompt": f"{RED}[1s] | {RED}[1s]", "frames": 13},
            "--prompt: 13 frames are over before scene 2 begins",
        ),
        (
            {"model.positions": "absolute"},
            {"prompt": f"{RED}[300s]"},
            r"--prompt: 4800 frames \(300 s\): 1201 latent frames exceed the 1024 absolute",
        ),
        ({}, {"prompt_file": "nowhere.txt"}, "prompt file nowhere.txt does not exist"),
        ({}, {"prompt": RED, "lora": "nowhere"}, "--lora: nothing is at /.*/nowhere; expected"),
        ({}, {"prompt": f"{RED}[9{'9' * 400}s]"}, "is no time between 0 and a day"),
        (
            {"model.window": 2, "scenes.published": True, "scenes.transition": "flush"},
            {"prompt": "a[1s] | b", "frames": 45},
            "--prompt: the published flush keeps 3 frames, the window has 2",
        ),
        ({}, {"prompt": RED, "image": "nowhere.png"}, "--image: no file nowhere.png"),
        ({"mesh.data": 3}, {"prompt": RED}, "config.mesh has data 3"),
        ({"base": "nowhere"}, {"prompt": RED}, "config.base: base 'nowhere'"),
        (
            AWAY,
            {"prompt": RED, "score": True},
            "2 things are wrong:\n  config.rewards.smell: .*\n  config.rewards.taste: .* reached",
        ),
        (
            {"scenes.transition": "melt"},
            {"prompt": RED},
            "config.scenes.transition is 'melt'; expected one of flush",
        ),
    ],
)
def test_bad_input_is_refused_by_name(base, tmp_path, capsys, changes, options, message):
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path / "out", changes, **options)
    assert ended.value.code == 2 and re.search(f"error: (.|\n)*{message}", capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ('{"prompts": []}', 'line 2: expected {"prompts"'),
        ('{"prompts": ["a", " "], "switch_frames": [3]}', 'line 2: expected {"prompts"'),
        ('{"prompts": ["a"], "switch": 1}', 'line 2: expected {"prompt"'),
        ('{"prompts": ["a", "b"]}', r"line 2: switch_frames is \[\]; expected 1 latent frames"),
        (
            '{"prompts": ["a", "b", "c"], "switch_frames": [3, 3]}',
            "line 2: switch_frames is .*ascending",
        ),
        (
            '{"prompts": ["a", "b"], "switch_frames": [30]}',
            "line 2: 5 frames are over before scene 2 begins",
        ),
    ],
)
def test_bad_switches_are_refused_by_line(base, tmp_path, capsys, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompts": ["red"]}) + f"\n{line}\n")
    with pytest.raises(SystemExit):
        ask(base, tmp_path / "out", prompt_file=str(path))
    assert re.search(f"error: .*a.jsonl, {message}", capsys.readouterr().err)


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


NPY = npy(np.zeros((2, 4, 2, 2), np.float32))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "latents",
            np.zeros((2, 4, 2, 3), np.float32),
            r"--latents: .*a.npy holds float32 \[2, 4, 2, 3\]; expected floats "
            r"\[frames, 4 channels, height 2, width 2\]",
        ),
        ("latents", np.full((1, 4, 2, 2), np.nan), "not finite"),
        ("latents", np.full((1, 4, 2, 2), 1e300), "not finite"),
        ("latents", np.full((2, 4, 2, 2), -1e30), r"up to 1e\+30; expected latents that the VAE"),
        ("latents", np.zeros((2, 4, 2, 2), int), "holds int64 .*; expected floats"),
        ("latents", np.zeros((3, 4, 2, 2)), "has 3 frames; expected whole blocks of 2"),
        ("latents", np.zeros((0, 4, 2, 2)), "has 0 frames"),
        ("latents", b"", "a.npy is an empty file"),
        ("latents", b"12345678901234567890", "a.npy is no .npy file; expected floats .frames"),
        ("latents", b"PK12345678901234567890", r"a.npy is an archive \(.npz .*; expected floats"),
        ("latents", NPY[:-1], "a.npy is a .npy that is cut short, or holds no numbers; expected"),
        ("latents", NPY[:20], "a.npy is a .npy that is cut short, or holds no numbers; expected"),
        ("latents", np.array([None]), "is a .npy that is cut short, or holds no numbers"),
        ("video", np.zeros((4, 16, 16, 3), np.uint8), "has 4 frames; .* of at least 5 frames"),
        ("video", b"no video", "a.mp4 cannot be read as a video"),
        ("video", b"version https://git-lfs.github.com/spec/v1", "a.mp4 is a git-lfs pointer, not"),
        ("image", b"<!doctype html>", "a.png is a web page, not the file itself"),
        ("video", b"#EXTM3U\n#EXTINF:1,\n/etc/hosts\n", "a.mp4 cannot be read as a video"),
        ("image", b"no picture", "a.png cannot be read as a picture; expected one of PNG"),
        (
            "image",
            np.zeros((16, 16, 3), np.uint8),
            "has 1 frame; this model begins with whole blocks",
        ),
    ],
)
def test_frames_that_cannot_be_given_are_refused(base, tmp_path, capsys, name, content, message):
    path = tmp_path / {"latents": "a.npy", "video": "a.mp4", "image": "a.png"}[name]
    writers = {"latents": np.save, "video": lambda p, c: write_mp4(p, c, 16), "image": write_png}
    (Path.write_bytes if isinstance(content, bytes) else writers[name])(path, content)
    with pytest.raises(SystemExit):
        ask(base, tmp_path / "out", {"model.block": 2}, prompt=RED, frames=13, **{name: str(path)})
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("image", "one picture file"),
        ("video", "one video file"),
        ("latents", "one .npy file"),
    ],
)
def test_what_is_no_file_is_told_apart(base, tmp_path, capsys, name, expected):
    for given, message in (
        (tmp_path, f"--{name}: {tmp_path} is a directory; expected {expected}"),
        ("", f"--{name}: the name of a file is empty; expected {expected}"),
        (tmp_path / "a", f"--{name}: no file {tmp_path / 'a'}; expected {expected}"),
        ("https://there/a", f"--{name}: https://there/a is an address; download it, and give"),
    ):
        with pytest.raises(SystemExit) as ended:
            ask(base, tmp_path / "out", prompt=RED, **{name: str(given)})
        told = capsys.readouterr().err
        assert ended.value.code == 2 and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "source", "fault"),
    [
        (5, "", "gives 5 frames, and the whole video is to have 5"),
        (24, "", "gives 21 frames, and the whole video is to have 5"),
        (5, "list.txt, line 2)", "gives 5 frames, and the whole video is to have 5"),
    ],
)
def test_a_video_that_is_given_whole_is_named(base, tmp_path, capsys, given, source, fault):
    """Not the prompt, which is not at fault."""
    path = tmp_path / "a.mp4"
    write_mp4(path, np.zeros((given, 16, 16, 3), np.uint8), 16)
    options = {"prompt": RED}
    if source:
        (tmp_path / "list.txt").write_text(f"{RED}[2s] | {GREEN}[1s]\n{RED}\n")
        options = {"prompt_file": str(tmp_path / "list.txt")}
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path / "out", video=str(path), **options)
    told = capsys.readouterr()
    least = 9 if given == 5 else 25
    assert ended.value.code == 2 and f"error: --video {path} {fault}: nothing" in told.err
    assert f"ask for at least {least}, with --frames or longer scenes, or give fewer" in told.err
    assert told.err.endswith(f"{source}\n") and "--prompt" not in told.err
    cut = f"{path}: videos begin with the last 21 of its 24 frames, whole blocks\n"
    assert told.out == (cut if given == 24 else "")
