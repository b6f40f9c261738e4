"""The sampling tool as it is used: files, results, what is asked for wrongly, and going on where it
was stopped.
"""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import commands
from astrolabe_jax.convert.lora import save_peft
from astrolabe_jax.geometry import layout_of, open_base, rules_of
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.runtime import files, media, preemption
from astrolabe_jax.runtime.media import write_mp4, write_png
from astrolabe_jax.sample import __main__ as program
from astrolabe_jax.sample import requests, videos
from tests.e2e import runs
from tests.e2e.asking import DEFAULTS, GREEN, RED, ask, frames_of, rows_of
from tests.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "list.txt"
    path.write_text(f"{RED}\n{GREEN}\n{RED}[0.5s] | {GREEN}[0.75s]\n")
    return str(path)


@pytest.fixture(scope="module")
def made(base, listed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sample") / "out"
    return directory, ask(base, directory, prompt_file=listed, score=True)


def test_videos_and_results(made):
    directory, rows = made
    assert [row["sample_id"] for row in rows] == ["00000", "00001", "00002"]
    assert sorted(path.name for path in directory.rglob("*.*")) == [
        "00000.mp4",
        "00001.mp4",
        "00002.mp4",
        "average_scores.json",
        "results.jsonl",
        "results.lock",
    ]
    assert [row["prompt"] for row in rows[:2]] == [RED, GREEN]
    for row, count in zip(rows, (5, 5, 20), strict=True):
        with av.open(row["video_path"]) as container:
            stream = container.streams.video[0]
            assert stream.frames == row["metadata"]["frames"] == count and stream.average_rate == 16
            assert float(container.duration / av.time_base) == pytest.approx(count / 16, abs=0.01)
    scenes = rows[2]["metadata"]["scenes"]
    assert [(scene["prompt"], scene["first_frame"], scene["frames"]) for scene in scenes] == [
        (RED, 0, 8),
        (GREEN, 8, 12),
    ]
    for name in ("shapes_vq", "shapes_mq", "shapes_ta"):
        values = [scene["scores"][name] for scene in scenes]
        assert rows[2]["scores"][name] == pytest.approx(np.mean(values)) and all(
            0 <= value <= 1 for value in values
        )
    averages = json.loads((directory / "average_scores.json").read_text())
    assert averages["shapes_ta"] == pytest.approx(
        np.mean([row["scores"]["shapes_ta"] for row in rows])
    )


def test_a_video_depends_on_its_prompt_and_number_alone(base, made, listed, tmp_path):
    """Not on the batch it is made in, nor on how its decoding is cut."""
    _, rows = made
    alone = ask(
        base,
        tmp_path,
        {"sampler.batch": 1, "video.decode_chunk": 2, "mesh.data": 8},
        prompt_file=listed,
    )
    for row, other in zip(rows, alone, strict=True):
        apart = np.abs(frames_of(row) - frames_of(other))
        # bytes are truncated, and the file is lossy
        assert apart.max() <= 3 and (apart > 1).mean() < 1e-2
    assert np.abs(frames_of(rows[0]) - frames_of(rows[1])).max() > 20


def test_seeds_and_candidates_differ(base, tmp_path):
    first, second = ask(base, tmp_path / "a", prompt=RED, candidates=2)
    assert [first["sample_id"], second["sample_id"]] == ["00000", "00000-1"]
    (other,) = ask(base, tmp_path / "b", {"seed": 1}, prompt=RED)
    for row in (second, other):
        assert np.abs(frames_of(row) - frames_of(first)).max() > 20


def test_going_on_where_it_was_stopped(base, made, listed, tmp_path, monkeypatch, capsys):
    """Stopped in the second batch, that of the scenes; then the rest is made, and a lost or foreign
    video again.
    """
    _, whole = made
    calls = []
    checks = iter(range(100))

    def stopped_in_the_second_batch():
        if next(checks) == 3:
            raise preemption.Stopped("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(
            program, "listening", lambda: contextlib.nullcontext(stopped_in_the_second_batch)
        )
        rows = ask(base, tmp_path, prompt_file=listed)
    assert [row["sample_id"] for row in rows] == ["00000", "00001"]
    assert "SIGTERM: the videos that are done are in" in capsys.readouterr().out
    first = Path(rows[0]["video_path"]).read_bytes()
    make_videos = videos.make_videos

    def counted(run, given, batch, *rest):
        calls.extend(batch)
        return make_videos(run, given, batch, *rest)

    monkeypatch.setattr(videos, "make_videos", counted)
    rows = ask(base, tmp_path, prompt_file=listed)
    assert [request.name for request in calls] == ["00002"] and len(rows) == len(whole)
    assert Path(rows[0]["video_path"]).read_bytes() == first
    assert not list(tmp_path.rglob("*.partial.*"))
    assert "2 of 3 videos made before" in capsys.readouterr().out
    Path(rows[1]["video_path"]).unlink()
    calls.clear()
    ask(base, tmp_path, prompt_file=listed)
    assert [request.name for request in calls] == ["00001"]
    calls.clear()
    moved = tmp_path.rename(tmp_path.with_name("moved"))  # paths in the results are for people
    assert len(ask(base, moved, prompt_file=listed)) == 3 and not calls
    ask(base, moved, {"seed": 5}, prompt_file=listed, overwrite=True)
    assert len(calls) == 3
    # fewer prompts: the rest are not its results
    (row,) = ask(base, moved, {"seed": 5}, prompt=RED, overwrite=True)
    assert row["sample_id"] == "00000"
    assert [path.name for path in moved.rglob("*.mp4")] == ["00000.mp4"]


def test_two_programs_do_not_write_to_one_directory(base, tmp_path, capsys, monkeypatch):
    def in_use(path):
        raise ValueError("is in use by process 7 on here, since today")

    monkeypatch.setattr(files, "lock", in_use)
    with pytest.raises(SystemExit):
        ask(base, tmp_path, prompt=RED)
    assert (
        f"error: --output_dir {tmp_path} is in use by process 7 on here, since today; wait for its "
        "end, or give another --output_dir" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"base": True}, {"prompt_file": True}),  # known when the model is loaded
        ({"seed": 5}, {"prompt_file": True}),  # known before
        ({}, {"prompt": RED}),  # fewer videos
        ({"base": "moving_shapes"}, {"prompt": GREEN}),
    ],
)
def test_the_results_of_another_command_are_kept(
    base, made, listed, tmp_path, capsys, monkeypatch, changes, options
):
    directory, rows = made
    if "prompt_file" in options:
        options = {"prompt_file": listed}
    if changes.get("base") is True:
        changes = {"base": str(write_tiny_base(tmp_path / "other", seed=1))}
    else:  # nothing is loaded
        monkeypatch.setattr(videos, "load", None)
    with pytest.raises(SystemExit) as ended:
        ask(base, directory, changes, **options)
    assert ended.value.code == 2 and rows_of(directory) == rows
    assert re.search(
        r"error: .*out holds \d videos of another command, 0000\d.mp4 first; give another "
        "--output_dir, or --overwrite",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("results", [None, b"", b"half a li"])
def test_videos_of_somebody_else_are_kept(base, tmp_path, capsys, results):
    """No row tells of them: there are none, or the rows are lost."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/00000.mp4").write_bytes(b"holidays")
    if results is not None:
        (tmp_path / "results.jsonl").write_bytes(results)
    with pytest.raises(SystemExit):
        ask(base, tmp_path, prompt=RED)
    assert (
        "holds 1 video without a line in results.jsonl, 00000.mp4 first" in capsys.readouterr().err
    )
    assert (tmp_path / "videos/00000.mp4").read_bytes() == b"holidays"


def test_a_row_is_there_before_its_video(base, tmp_path, monkeypatch):
    """So a program that is killed between the two goes on: no video lacks its row."""

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(media.Mp4Writer, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(base, tmp_path, prompt=RED)
    (row,) = rows_of(tmp_path)
    assert not Path(row["video_path"]).exists()
    assert ask(base, tmp_path, prompt=RED) == [row]
    assert Path(row["video_path"]).stat().st_size == row["bytes"]


@pytest.mark.parametrize(
    ("place", "kind"),
    [("videos/00000.mp4", "directory"), ("results.jsonl", "directory"), ("videos", "file")],
)
def test_what_stands_in_the_place_of_a_result_is_named(base, tmp_path, capsys, place, kind):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    if kind == "directory":
        (tmp_path / place).mkdir()
    else:
        (tmp_path / place).write_text("")
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path, prompt=RED, overwrite=True)
    assert ended.value.code == 2
    assert f"error: {tmp_path / place} is a {kind}, in place of a " in capsys.readouterr().err


def test_more_videos_than_any_disk_holds_are_refused_at_once(base, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path, prompt=RED, candidates=10**8)
    assert ended.value.code == 2
    assert "100,000,000 videos are asked for; expected at most 1,000,000" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["load", "make_videos"])
def test_too_little_memory_is_one_line(base, tmp_path, capsys, monkeypatch, place):
    def full(*_, **__):
        raise MemoryError("9 GiB")

    monkeypatch.setattr(videos, place, full)
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path, prompt=RED)
    told = capsys.readouterr().err
    assert ended.value.code == 1 and told.startswith("error: out of memory: 9 GiB; a device holds")
    assert "adapters" not in told and "config.model.param_dtype=bfloat16" in told


def test_a_video_that_is_not_whole_is_made_again(base, tmp_path):
    (row,) = ask(base, tmp_path, prompt=RED)
    video = Path(row["video_path"])
    content = video.read_bytes()
    video.write_bytes(content[:300])
    ask(base, tmp_path, prompt=RED)
    assert video.read_bytes() == content


def test_an_output_dir_that_cannot_be_one_is_named(base, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        ask(base, tmp_path / "file", prompt=RED)
    told = capsys.readouterr().err
    assert f"--output_dir {tmp_path / 'file'} cannot be written (Not a directory)" in told


def test_an_adapter_is_merged(base, tmp_path, capsys):
    rng = np.random.default_rng(0)
    net = bases.configs(str(base))["transformer"]
    adapter = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
        adapter_shapes(net, 2),
    )
    save_peft(adapter, tmp_path / "lora", 2, 1.0)
    (adapted,) = ask(base, tmp_path / "b", prompt=RED, lora=str(tmp_path / "lora"))
    merged = tmp_path / "merged.safetensors"
    commands.merge(base, tmp_path / "lora", merged, "original")
    (whole,) = ask(base, tmp_path / "a", {"transformer": str(merged)}, prompt=RED)
    np.testing.assert_array_equal(frames_of(whole), frames_of(adapted))
    assert whole["key"] != adapted["key"]
    save_peft(adapter, tmp_path / "lora", 2, 0.5)  # a weaker one
    (weaker,) = ask(base, tmp_path / "b", prompt=RED, lora=str(tmp_path / "lora"), overwrite=True)
    assert weaker["key"] != adapted["key"] and "1 video removed from" in capsys.readouterr().out
    tensors = load_file(merged)
    tensors["head.head.bias"][:] = np.nan
    save_file(tensors, merged)
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path / "c", {"transformer": str(merged)}, prompt=RED)
    assert ended.value.code == 2 and not list((tmp_path / "c").rglob("*.mp4"))
    assert (
        f"config.transformer: {merged}: head.head.bias holds numbers that are not finite"
        in capsys.readouterr().err
    )
    tensors["head.head.bias"][:] = 1e38
    save_file(tensors, merged)
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path / "c", {"transformer": str(merged)}, prompt=RED)
    assert ended.value.code == 1 and not list((tmp_path / "c").rglob("*.mp4"))
    assert re.search(
        "error: the latents of video 00000 are not finite .*a red circle", capsys.readouterr().err
    )


def test_a_broken_adapter_is_blamed_and_not_the_base(base, tmp_path, capsys):
    net = bases.configs(str(base))["transformer"]
    adapter = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), adapter_shapes(net, 2))
    save_peft(adapter, tmp_path / "lora", 2, 1.0)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[:] = np.nan
    save_file(tensors, path)
    with pytest.raises(SystemExit) as ended:
        ask(base, tmp_path / "out", prompt=RED, lora=str(tmp_path / "lora"))
    assert ended.value.code == 2
    assert re.search(
        f"^error: --lora: {path}: blocks.* holds numbers that are not finite",
        capsys.readouterr().err,
        re.MULTILINE,
    )


def test_videos_begin_with_what_is_given(base, tmp_path):
    picture = np.full((16, 16, 3), (200, 60, 90), np.uint8)
    write_png(tmp_path / "a.png", picture)
    write_mp4(tmp_path / "a.mp4", np.repeat(picture[None], 7, axis=0), 16)
    latents = np.zeros((2, 4, 2, 2), np.float32)
    np.save(tmp_path / "a.npy", latents)
    given = {"image": "a.png", "video": "a.mp4", "latents": "a.npy"}
    plain, frames = frames_of(ask(base, tmp_path / "plain", prompt=RED, frames=9)[0]), {}
    for name, file in given.items():
        (row,) = ask(base, tmp_path / name, prompt=RED, frames=9, **{name: str(tmp_path / file)})
        frames[name] = frames_of(row)
        assert frames[name].shape == plain.shape and row["metadata"]["scenes"][0]["frames"] == 9
        assert np.abs(frames[name][0] - plain[0]).max() > 5
    with pytest.raises(SystemExit):
        # all are given
        ask(base, tmp_path / "full", prompt=RED, frames=5, latents=str(tmp_path / "a.npy"))
    # The picture, and the video of it, begin with the same latent frame.
    assert (
        np.abs(frames["image"][0] - frames["video"][0]).mean()
        < 5
        < np.abs(frames["image"][0] - plain[0]).mean()
    )


@pytest.mark.slow
def test_switched_prompts(base, tmp_path):
    path = tmp_path / "switched.jsonl"
    path.write_text(
        json.dumps({"prompts": [RED, GREEN], "switch_frames": [3]})
        + "\n"
        + json.dumps({"prompts": [RED]})
    )
    first, second = ask(
        base,
        tmp_path / "out",
        {"scenes.transition": "recache"},
        prompt_file=str(path),
        frames=21,
        score=True,
    )
    scenes = first["metadata"]["scenes"]
    assert [(scene["first_frame"], scene["frames"]) for scene in scenes] == [(0, 9), (9, 12)]
    assert second["metadata"]["scenes"][0]["frames"] == 21
    # another video, from the first frame on
    assert np.abs(frames_of(first)[:9] - frames_of(second)[:9]).max() > 5


def asked_for(base, **options):
    """The requests of a command, as the program reads them."""
    config = runs.small_config(base)
    sizes, tokenizer = open_base(config)
    limits = requests.Limits(
        layout_of(config), rules_of(config), sizes["vae"], requests.GivenFrames(), tokenizer, 16
    )
    return requests.read_requests(config, DEFAULTS | options, limits)


def test_lines_of_json_and_switch_frames_for_all(base, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    lines = [
        {"prompt": RED, "id": 7},
        {"prompts": [RED, GREEN]},
        {"prompts": [GREEN, "three dragons"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    plain, first, _ = asked_for(
        base, prompt_file=str(path), frames=21, switch_frames=["4", "8"], candidates=1
    )
    assert plain.prompt == RED and plain.shots[0].timeline.changes == []
    assert first.prompt == f"{RED} | {GREEN}" and first.frames == 21
    assert [shot.timeline.prompts for shot in first.shots] == [(RED,), (GREEN,)]  # cut, no sink
    assert [shot.frames for shot in first.shots] == [16, 5]
    assert "a.jsonl, line 3: the tokenizer of this base does not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["4"], "--switch_frames: .*a.txt has no list of prompts"),
        (["4", "x"], "--switch_frames is '4,x'; expected"),
    ],
)
def test_switch_frames_for_nothing_are_refused(base, tmp_path, capsys, flag, message):
    (tmp_path / "a.txt").write_text(RED)
    with pytest.raises(SystemExit):
        ask(base, tmp_path / "out", prompt_file=str(tmp_path / "a.txt"), switch_frames=flag)
    assert re.search(f"error: {message}", capsys.readouterr().err)


def test_published_rules_parse_all_prompts_or_none(base, tmp_path):
    """Without a | a duration is text; with one, all prompts are read, and the length is that of the
    config.
    """
    config = runs.small_config(base, **{"scenes.published": True})
    path = tmp_path / "a.txt"
    sizes, tokenizer = open_base(config)
    limits = requests.Limits(
        layout_of(config), rules_of(config), sizes["vae"], requests.GivenFrames(), tokenizer, 1000
    )

    def read():
        asked = DEFAULTS | {"prompt_file": str(path), "frames": 21}
        return requests.read_requests(config, asked, limits)

    path.write_text("a[0.25s]\n")
    assert read()[0].shots[0].timeline.prompts == ("a[0.25s]",)
    path.write_text("a[0.25s]\nb[0.5s#] | c\n")
    first, second = read()
    assert first.shots[0].timeline.prompts == ("a",)
    timeline = second.shots[0].timeline
    assert timeline.prompts == ("b", "c")
    assert [plan.scene for plan in timeline.blocks] == [0, 0, 1, 1, 1, 1]
    assert second.frames == 21


def test_the_command_line(base, tmp_path):
    command = [
        sys.executable,
        "-m",
        "astrolabe_jax.sample",
        *runs.flags(base),
        f"--output_dir={tmp_path / 'out'}",
    ]
    done = subprocess.run([*command, f"--prompt={RED}[0.5s]"], capture_output=True, text=True)
    assert done.returncode == 0 and "1 video: 8 frames in" in done.stdout, done.stderr
    assert rows_of(tmp_path / "out")[0]["metadata"]["frames"] == 8
    for flag, message in (
        ("--prompt=a[5S]", "character 2 of 'a.5S.'"),
        ("--config.video.frame=9", "unknown config field"),
    ):
        done = subprocess.run([*command, flag], capture_output=True, text=True)
        assert done.returncode == 2 and re.search(f"^error: .*{message}", done.stderr, re.MULTILINE)
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_long_videos_take_no_more_memory(tmp_path):
    """Twenty times longer, the same peak: the shipped model, in processes of their own."""

    def run(name, seconds):
        prompt = f"{RED}[{seconds}s] | {GREEN}[{seconds}s#]"
        code = (
            "import resource, runpy, sys; sys.argv[0] = 'sample'\n"
            "try: runpy.run_module('astrolabe_jax.sample', run_name='__main__')\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        flags = [
            "--config=configs/moving_shapes.py",
            f"--prompt={prompt}",
            f"--output_dir={tmp_path / name}",
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True
        )
        (row,) = rows_of(tmp_path / name)
        assert row["metadata"]["frames"] == 2 * seconds * 16
        return int(re.search(r"peak (\d+)", done.stdout)[1])

    run("compiles", 3)
    assert run("long", 60) <= 1.05 * run("short", 3)
