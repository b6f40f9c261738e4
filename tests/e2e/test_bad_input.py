"""Whatever is wrong is said before anything is compiled, with its name and the next step."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from astrolabe_jax import preflight, run
from astrolabe_jax.convert.lora import save_peft
from astrolabe_jax.preflight import check
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.run import prepare, timeline_of
from configs import published
from tests.e2e import runs
from tests.models import tiny
from tests.tiny_base import write_tiny_base

GOOD = b"a red circle moving left on a grey background\n"


def refusal(config, workdir) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        runs.resumed(prepare(config, workdir))
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "config.prompts.test: prompt file .*list.txt does not exist; give a text file"),
        (b"", "config.prompts.test: .*list.txt is empty; write one prompt a line"),
        (
            b"a cat\n\xff\n",
            r"config.prompts.test: .*list.txt is not UTF-8: byte 6 \(line 2\) is 0xff",
        ),
        (GOOD + b"\na dog\n", "config.prompts.test: .*list.txt, line 2 is empty"),
        (
            GOOD + b"red " * 16,
            "config.prompts.test: .*list.txt, line 2: '.* has 17 tokens, the text encoder takes 16",
        ),
        (
            GOOD + GOOD + b"a red cat moving left on a grey background\n",
            "config.prompts.test: .*list.txt, line 3: reward 'shapes_mq': not a prompt of the "
            "moving-shapes world: 'a red cat .*; expected 'a COLOUR SHAPE moving",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_prompt_files(base, tmp_path, content, expected, split):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    config = runs.small_config(base, **{f"prompts.{split}": str(tmp_path / "list.txt")})
    assert re.search(
        expected.replace("prompts.test", f"prompts.{split}"), refusal(config, tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"prompt": "a red', "config.prompts.train: .*a.jsonl, line 1: is not JSON"),
        (
            "a.jsonl",
            b'{"prompts": ["a", "b"], "switch_frames": [1]}\n' * 2,
            "config.prompts.train: .*a.jsonl, line 1: 2 prompts follow each other, .*"
            "config.streaming.window",
        ),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0f3a\nsize 145875068\n",
            "config.prompts.train: .*a.txt is a git-lfs pointer, not the file itself",
        ),
    ],
)
def test_files_that_are_no_prompts(base, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    config = runs.small_config(base, **{"prompts.train": str(tmp_path / name)})
    assert re.search(expected, refusal(config, tmp_path / "run"))


def test_lists_have_one_reading_and_are_warned_of(base, tmp_path, monkeypatch, capsys):
    """In whole videos a bar is text, with a backslash and without."""
    monkeypatch.setattr(rewards, "TABLE", rewards.TABLE | {"any": rewards.Reward("math:fsum")})
    lines = [{"tag": 1, "prompt": r"a red circle \| wide"}, {"prompt": "a cat | a dog"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.txt").write_text("a red circle \\| wide\na cat[5s]\na cat[5s]\n")
    config = runs.small_config(
        base,
        **{"prompts.train": str(tmp_path / "a.jsonl"), "prompts.test": str(tmp_path / "a.txt")},
    )
    config.rewards = {"any": 1.0}
    run = prepare(config, tmp_path / "run")
    assert run.train_prompts == (r"a red circle \| wide", "a cat | a dog")
    assert timeline_of(run, run.train_prompts[0], 2).prompts == ("a red circle | wide",)
    assert timeline_of(run, run.train_prompts[1], 2).prompts == ("a cat | a dog",)
    said = capsys.readouterr().out
    for expected in (
        "a.jsonl: 1 of 2 prompts have a . or a duration, which is text where whole videos",
        "a.jsonl, line 2: the tokenizer of this base does not know most words",
        "a.txt: 1 of 3 prompts stand there more than once, line 3 that of line 2",
        "config.prompts.test: 1 of 3 held-out prompts are training prompts, 'a red",
    ):
        assert re.search(f"warning: .*{expected}", said)


def test_lines_of_json_where_windows_are_trained(base, tmp_path):
    """The same list as text with durations; the VAE says how many frames a latent frame is."""
    scenes = {"prompts": [GOOD[:-1].decode()] * 2}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(scenes)}\n" * 2)
    changes = {"prompts.train": str(tmp_path / "a.jsonl"), "prompts.switch_frames": (4,)}
    config = runs.small_config(base, **runs.WINDOWS, **changes)
    config.scenes.transition = "recache"
    run = prepare(config, tmp_path / "run")
    assert timeline_of(run, run.train_prompts[0], 6).changes == [4]
    text = f"{GOOD[:-1].decode()}[1s] | {GOOD[:-1].decode()}"
    assert timeline_of(run, text, 6).changes == [4]
    half = dataclasses.replace(run.base.vae.config, temporal_downsample=(False, False, True))
    run = run._replace(base=run.base._replace(vae=run.base.vae._replace(config=half)))
    assert timeline_of(run, text, 12).changes == [8]


def test_a_reward_that_takes_any_prompt_does_not_mind_those_of_others(base, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "TABLE", rewards.TABLE | {"any": rewards.Reward("math:fsum")})
    (tmp_path / "list.txt").write_text("a cat\n")
    config = runs.small_config(base, **{"prompts.test": str(tmp_path / "list.txt")})
    config.rewards = {"any": 1.0}
    assert prepare(config, tmp_path / "run").test_prompts == ("a cat",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"video.frames": 6},
            "config.video.frames is 6; whole blocks of 1 latent frame make 5 or 9 frames",
        ),
        (
            {"video.frames": 4101, "model.positions": "absolute"},
            "config.video.frames is 4101: 1026 latent frames exceed the 1024 absolute positions",
        ),
        (
            {"model.block": 3},
            "config.video.frames is 5; whole blocks of 3 latent frames make 9 frames",
        ),
        (
            {"loss.mask_block": 3},
            "config.loss.mask_block: 2 latent frames are not a whole number of blocks of 3",
        ),
        (
            {"model.window": 1, "loss.mask_block": 2},
            "config.loss.mask_block: a window of 1 frames cannot hold a block of 2",
        ),
        (
            {"model.window": 2, "model.sink": 1, "loss.mask_block": 2},
            (
                "config.loss.mask_block: a window of 2 frames cannot hold the sink of 1 and a "
                "block of 2"
            ),
        ),
        (
            {"video.height": 40},
            "config.video.height is 40; this model takes multiples of 16 pixels, 32 or 48",
        ),
        (
            {"model.window": 2, "model.sink": 2},
            r"config.model.window is 2; expected at least \d, .* the sink \(model.sink 2\)",
        ),
        (
            {"sampler.steps": (1000, 500.5)},
            "config.sampler: denoising step 500.5 is not a whole number",
        ),
        (
            {"rewards.shapes_vq": 0.0, "rewards.shapes_mq": 0.0, "rewards.shapes_ta": 0.0},
            "config.rewards has no weight but 0",
        ),
        (
            {
                "prompts.prompts_per_epoch": 8,
                "prompts.samples_per_prompt": 1,
                "advantages.std": "prompt",
            },
            "config.prompts.samples_per_prompt is 1",
        ),
        ({"lora.init": "nowhere"}, "config.lora.init: .*nowhere"),
    ],
)
def test_settings(base, tmp_path, changes, expected):
    assert re.search(expected, refusal(runs.small_config(base, **changes), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_all_faults_are_listed_before_anything_is_loaded(base, tmp_path, monkeypatch):
    """Whatever is cheap to see, also where the base is not there or the config makes no sense."""
    monkeypatch.setattr(run, "load_base", None)
    (tmp_path / "file").touch()
    wrong = {
        "sampler.batch": 7,
        "transformer": "no/net.pt",
        "lora.init": "no/lora",
        "prompts.train": "no/train.txt",
        "prompts.test": "no/test.txt",
        "rewards.hpsv3": {"weight": 1.0, "path": "no/hpsv3"},
    }
    expected = (
        "config.sampler.batch is 7",
        "config.transformer, transformer: no no/net.pt",
        "config.lora.init: no no/lora",
        "config.prompts.train: no no/train.txt",
        "config.prompts.test: no no/test.txt",
        "config.rewards.hpsv3: no no/hpsv3/config.json",
        f"cannot be written ({tmp_path / 'file'} takes no files)",
    )
    config = runs.small_config(base, **wrong)
    message = refusal(config, tmp_path / "file" / "run")
    assert message.startswith("7 things are wrong:\n  ")
    assert [text for text in expected if text not in message] == []
    config.sampler.batch = 8
    message = refusal(config, tmp_path / "file" / "run")
    assert "config.transformer: nothing is at /" in message and "/no/net.pt (of its" in message
    assert "config.prompts.test: prompt file no/test.txt does not exist" in message
    config.base = "no/base"
    message = refusal(config, tmp_path / "file" / "run")
    assert "config.base: base 'no/base'" in message and "config.transformer, transf" in message
    assert message.count("config.base") == 1 and "config.prompts.test: no no/test.txt" in message


def test_all_servers_that_are_away_are_listed(base, tmp_path):
    config = runs.small_config(base, **{"prompts.train": "no/train.txt"})
    for name in ("taste", "smell"):
        load = "astrolabe_jax.rewards.remote:load"
        config.rewards[name] = {"weight": 1.0, "load": load, "url": f"http://127.0.0.1:1/{name}"}
    message = refusal(config, tmp_path / "run")
    assert message.startswith("3 things are wrong:\n  ") and "no/train.txt" in message
    for name in ("taste", "smell"):
        away = f"\n  config.rewards.{name}: http://127.0.0.1:1/{name} cannot be reached"
        assert away in message


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_weights_that_do_not_fit_are_refused_by_their_headers(base, tmp_path, monkeypatch, part):
    monkeypatch.setattr(run, "load_base", None)
    cut = shutil.copytree(base, tmp_path / "cut")
    content = load_file(cut / f"{part}.safetensors")
    missing = sorted(content)[0]
    del content[missing]
    save_file(content, cut / f"{part}.safetensors")
    message = refusal(runs.small_config(cut), tmp_path / "run")
    assert message.startswith(f"config.base: {cut}/{part}.safetensors: ") and missing in message


def test_check_prints_the_files_and_where_they_are_published(base, tmp_path, capsys):
    config = published.recipe("longlive", "gardo")
    rows = {row.split()[0].rstrip(","): row for row in preflight.file_rows(config)}
    assert rows["config.transformer"].endswith(
        "longlive_base.pt: missing; hf download Efficient-Large-Model/LongLive-1.3B "
        "models/longlive_base.pt --local-dir checkpoints/longlive_models (5.68 GB)"
    )
    assert all(": missing; hf download " in row for row in rows.values()) and len(rows) == 6
    (row, *_) = preflight.file_rows(runs.small_config(base))
    assert row.endswith(f"{base}/transformer.safetensors: 0.1 MiB")


TOLD = "a red circle moving {} on a grey background"
LEFT, RIGHT = (TOLD.format(way) for way in ("left", "right"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"streaming.window": 9},
            "config.streaming: a window of 9 from frame 0 does not lie in the 6 latent frames",
        ),
        (
            {"streaming.selection": "choices", "streaming.starts": (5,)},
            (
                "config.streaming: a window of 2 from frame 5 does not lie in the 6 latent frames "
                "of a video; give other"
            ),
        ),
        (
            {"streaming.selection": "choices"},
            "config.streaming: a window of 2 from frame .none. does not lie in the 6 latent frames",
        ),
        (
            {"streaming.selection": "choices", "streaming.starts": (0.5,)},
            r"config.streaming.starts is \(0.5,\); expected whole numbers from 0 on",
        ),
        (
            {"model.block": 2, "model.window": 4, "model.sink": 0, "streaming.window": 3},
            r"config.streaming has a window of 3 and starts \(\); expected whole blocks of 2",
        ),
        ({"eval.frames": 14}, "config.eval.frames is 14; whole blocks .* make 13 or 17 frames"),
        (
            {"model.block": 2, "model.window": 4, "model.sink": 0, "eval.frames": 17},
            "config.eval.frames is 17; whole blocks of 2 latent frames make 13 or 21 frames",
        ),
    ],
)
def test_windows(base, tmp_path, changes, expected):
    config = runs.small_config(base, **runs.WINDOWS | changes)
    assert re.search(expected, refusal(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "changes", "expected"),
    [
        (
            [LEFT, f"{LEFT}[9s] | {RIGHT}"],
            {},
            "line 2: the 21 frames of a video are over before its last scene",
        ),
        (
            [LEFT, f"{LEFT}[0.5s] | {RIGHT}"],
            {"streaming.backprop": "full"},
            (
                "line 2: its prompt changes; expected streaming.sampling 'clip' and "
                "streaming.backprop 'detach'"
            ),
        ),
        (
            [f"{LEFT}[0.5s] | {RIGHT}"] * 2,
            {"streaming.sampling": "sequence"},
            "line 1: its prompt changes; expected",
        ),
        (
            [f"{LEFT}[0.5s] | {RIGHT}"] * 2,
            {"scenes.transition": "flush", "streaming.prefix": "per_policy"},
            (
                "line 1: a flush or a hard cut leaves frames that are not the last ones, whose "
                "keys cannot be made anew"
            ),
        ),
        (
            [f"{LEFT}[0.5s#] | {RIGHT}"] * 2,
            {"streaming.mode": "progressive", "streaming.recache_on_update": True},
            "line 1: a flush or a hard cut leaves frames that are not the last ones",
        ),
        (
            [f"{LEFT}[0.5s] | {RIGHT}", LEFT],
            {"scenes.transition": "flush"},
            r"line 2: its prompt changes at the latent frames \[\], "
            r"that of line 1 at \[2\]; flushes and hard",
        ),
        (
            [f"{LEFT}[0.5s] | {RIGHT}", f"{LEFT}[0.5s#] | {RIGHT}"],
            {},
            r"line 2: its prompt changes at the latent frames \[2\], "
            r"that of line 1 at \[2\]; flushes and hard",
        ),
        (
            [LEFT, f"{LEFT}[0.75s] | {RIGHT}"],
            {"streaming.mode": "progressive"},
            r"line 2: its prompt changes at the latent frames \[3\], "
            r"inside of a window of 2 from 2; let scenes begin",
        ),
        (
            [f"{LEFT}[0.25s] | {RIGHT}[0.25s] | {LEFT}", LEFT],
            {"streaming.selection": "first"},
            r"line 1: its prompt changes at the latent frames \[1, 2\], "
            r"inside of a window of 2 from 0; let scenes",
        ),
        ([LEFT, f"{LEFT}[0.5s] | "], {}, "line 2: character .* is a scene without a prompt"),
        (
            [LEFT, f"{LEFT}[0.5s] | a dog"],
            {},
            "line 2: reward 'shapes_mq': not a prompt of the moving-shapes world",
        ),
    ],
)
def test_stories_of_windows(base, tmp_path, lines, changes, expected):
    (tmp_path / "list.txt").write_text("\n".join(lines))
    fields = (
        runs.WINDOWS
        | {"scenes.transition": "recache", "prompts.train": str(tmp_path / "list.txt")}
        | changes
    )
    found = refusal(runs.small_config(base, **fields), tmp_path / "run")
    assert re.search(f"config.prompts.train: .*{expected}", found), found
    assert not (tmp_path / "run").exists()


def test_too_few_prompts_for_an_epoch(base, tmp_path):
    (tmp_path / "list.txt").write_text("a red circle moving left on a grey background\n")
    config = runs.small_config(base, **{"prompts.train": str(tmp_path / "list.txt")})
    assert "has 1 prompt, an epoch takes 2 different ones; add prompts" in refusal(
        config, tmp_path / "run"
    )


def test_another_adapter(base, tmp_path):
    run = prepare(runs.small_config(base), tmp_path / "run")
    save_peft(run.adapter, tmp_path / "lora", 2, 4.0)
    changed = {"lora.init": str(tmp_path / "lora")}
    assert "has alpha / rank 2, config.lora.alpha / rank is 1" in refusal(
        runs.small_config(base, **changed), tmp_path / "a"
    )
    message = refusal(runs.small_config(base, **changed, **{"lora.rank": 4}), tmp_path / "b")
    assert (
        "config.lora.init: " in message
        and "its rank is 2; expected rank 4: set the rank of this run to 2" in message
    )


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, "lora has alpha / rank 0; expected a positive one, .*leave config.lora.init out"),
        (-4.0, "lora has alpha / rank -2; .*convert merge BASE .*lora --to FILE"),
        (4.1234567, "set config.lora.alpha to 4.1234567$"),
    ],
)
def test_what_would_do_for_an_adapter_of_another_strength(base, tmp_path, alpha, expected):
    save_peft(tiny.adapter(), tmp_path / "lora", 2, alpha)
    config = runs.small_config(base, **{"lora.init": str(tmp_path / "lora")})
    assert re.search(f"config.lora.init: .*{expected}", refusal(config, tmp_path / "run"))


def test_a_broken_adapter_is_named(base, tmp_path):
    run = prepare(runs.small_config(base), tmp_path / "run")
    config = runs.small_config(base, **{"lora.init": str(tmp_path / "lora")})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        save_peft(run.adapter, tmp_path / "lora", 2, 2.0)
        path = tmp_path / "lora" / name
        path.write_bytes(path.read_bytes()[:-30])
        assert f"config.lora.init: {path} " in refusal(config, tmp_path / "a")


def test_a_tilde_is_the_home_directory(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_peft(prepare(runs.small_config(base), tmp_path / "run").adapter, tmp_path / "lora", 2, 2.0)
    (tmp_path / "list.txt").write_bytes(GOOD * 8)
    shutil.copytree(base, tmp_path / "base")
    named = {"lora.init": "~/lora", "prompts.train": "~/list.txt", "prompts.test": "~/list.txt"}
    config = runs.small_config("~/base", **named)
    checked = check(config, tmp_path / "new")
    assert checked.adapter and set(checked.prompts["train"]) == {GOOD.decode().strip()}
    for row in preflight.file_rows(config):
        assert f" {tmp_path}/" in row and row.endswith("MiB")


def test_an_adapter_is_no_transformer(base, tmp_path, capsys):
    adapter = prepare(runs.small_config(base), tmp_path / "run").adapter
    path = save_peft(adapter, tmp_path / "lora", 2, 2.0)
    for given in (path, path.parent):
        config = runs.small_config(base, transformer=str(given))
        with pytest.raises((ValueError, OSError)) as error:
            preflight.tell(config, str(tmp_path / "new"))
        assert str(error.value).startswith(
            f"config.transformer: {given}: it is a LoRA, not a whole net; give the base here"
        )
    assert f"{path.parent}: not what is needed" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_named(base, tmp_path):
    directory = shutil.copytree(base, tmp_path / "base")
    path = directory / "vae.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] * float("nan")}, path)
    message = refusal(runs.small_config(directory), tmp_path / "run")
    assert f"{path}: {name} holds numbers that are not finite" in message


def test_a_base_whose_parts_do_not_fit_is_named(base, tmp_path):
    directory = shutil.copytree(base, tmp_path / "base")
    content = json.loads((directory / "config.json").read_text())
    content["transformer"]["in_channels"] = 8
    (directory / "config.json").write_text(json.dumps(content))
    message = refusal(runs.small_config(directory), tmp_path / "run")
    assert message.startswith(
        f"config.base: {directory}/config.json: the parts do not fit each other:"
    )
    assert "transformer.in_channels is 8; expected vae.z_dim, 4" in message


def test_moved_files_with_the_same_content_are_the_same_run(base, tmp_path):
    (tmp_path / "there").mkdir()
    prompts = {
        "train": GOOD + b"a blue square moving up slowly on a black background\n",
        "test": GOOD,
    }
    for split, content in prompts.items():
        (tmp_path / "there" / f"{split}.txt").write_bytes(content)
    shutil.copytree(base, tmp_path / "there" / "base")
    save_peft(tiny.adapter(), tmp_path / "there" / "lora", rank=2, alpha=2.0)

    def config(place, **changes):
        files = {f"prompts.{split}": str(tmp_path / place / f"{split}.txt") for split in prompts}
        files["lora.init"] = str(tmp_path / place / "lora")
        return runs.small_config(tmp_path / place / "base", **files, **changes)

    prepare(config("there"), tmp_path / "run")
    (tmp_path / "there").rename(tmp_path / "here")
    prepare(config("here"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config.base"] == str(
        tmp_path / "here" / "base"
    )
    assert "config.seed: 0 there, 1 now" in refusal(config("here", seed=1), tmp_path / "run")
    for split, content in prompts.items():
        path = tmp_path / "here" / f"{split}.txt"
        path.write_bytes(content.replace(b"red", b"green"))
        message = refusal(config("here"), tmp_path / "run")
        assert "belongs to another run" in message and f"prompts.{split}: " in message
        path.write_bytes(content)
    save_peft(tiny.adapter(seed=51), tmp_path / "here" / "lora", rank=2, alpha=2.0)
    message = refusal(config("here"), tmp_path / "run")
    assert "belongs to another run" in message and "lora.init: " in message


def test_a_truncated_record_of_the_run_is_named(base, tmp_path):
    prepare(runs.small_config(base), tmp_path / "run")
    record = tmp_path / "run" / "run.json"
    record.write_bytes(record.read_bytes()[:100])
    assert refusal(runs.small_config(base), tmp_path / "run").startswith(
        f"{record} is not valid JSON: "
    )


def test_a_missing_or_broken_base_is_named(base, tmp_path):
    message = refusal(runs.small_config("nowhere"), tmp_path / "run")
    assert "config.base: base 'nowhere': nothing is at " in message
    assert "/nowhere; expected a shipped base" in message
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "vae.safetensors").unlink()
    assert "vae.safetensors" in refusal(runs.small_config(tmp_path / "base"), tmp_path / "run")


def test_workdirs_and_checkpoints_of_others(straight, base, tmp_path):
    _, workdir, _ = straight
    shutil.copytree(workdir, tmp_path / "run")
    message = refusal(runs.small_config(base, **{"lora.rank": 4}), tmp_path / "run")
    assert "belongs to another run" in message and "config.lora.rank: 2 there, 4 now" in message
    other = write_tiny_base(tmp_path / "base", seed=1)
    message = refusal(runs.small_config(other), tmp_path / "run")
    assert "belongs to another run" in message and "base: " in message
    fewer = runs.small_config(base, **{"train.epochs": 2})
    assert "config.train.epochs is 2, but the run in" in refusal(fewer, tmp_path / "run")

    # Checkpoints moved into the workdir of another run are no better.
    prepare(runs.small_config(base, seed=5), tmp_path / "mine")
    shutil.copytree(workdir / "checkpoints", tmp_path / "mine" / "checkpoints")
    message = refusal(runs.small_config(base, seed=5), tmp_path / "mine")
    assert "is of another run" in message and "config.seed: 0 there, 5 now" in message
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["config.seed"] == 5


@pytest.mark.parametrize(
    ("given", "expected", "row"),
    [
        ("moving_shape", ".did you mean the shipped moving_shapes..; expected a shipped base", "m"),
        ("~/", "base '~/': {home} is a directory that holds notes; expected a shipped", "not what"),
        ("~nobody-here/x", "~nobody-here/x: Could not determine home directory; expected", "miss"),
    ],
)
def test_what_is_no_base_is_told_with_what_was_meant(
    tmp_path, monkeypatch, capsys, given, expected, row
):
    """By --check, too, whose list of files does not tell it."""
    (tmp_path / "home" / "notes").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = runs.small_config(given)
    for refuse in (preflight.check, preflight.tell):
        with pytest.raises((ValueError, OSError)) as error:
            refuse(config, tmp_path / "run")
        told = str(error.value)
        assert re.search(f"^config.base: .*{expected.format(home=tmp_path / 'home')}", told), told
    assert f": {row}" in capsys.readouterr().out


def test_unwritable_and_foreign_directories(base, tmp_path):
    (tmp_path / "file").write_text("")
    config = runs.small_config(base)
    assert f"workdir {tmp_path / 'file' / 'run'} cannot be written" in refusal(
        config, tmp_path / "file" / "run"
    )
    assert "holds 'file' but no run of astrolabe_jax" in refusal(config, tmp_path)
    before = sorted(tmp_path.iterdir())
    for place in (tmp_path / "file", Path("/proc/no/run")):
        with pytest.raises(OSError, match=f"workdir {place} cannot be written .*; give another"):
            check(config, place)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert (
        f"{tmp_path / 'run' / 'run.json'} is missing, which tells whose the checkpoints beside it "
        "are; put it back, or give a new --workdir"
    ) in refusal(config, tmp_path / "run")
    check(config, tmp_path / "new" / "run")
    shutil.rmtree(tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_missing_is_said_once(base, tmp_path, capsys):
    """The list says how to get it; what else is wrong is said behind it."""
    config = runs.small_config(base, seed=-1, **{"prompts.train": "no/train.txt"})
    config.rewards.hpsv3 = {"weight": 1.0, "path": "rewards/hpsv3"}
    with pytest.raises(ValueError) as error:
        preflight.tell(config, str(tmp_path / "run"))
    assert str(error.value).splitlines() == [
        "2 things are wrong:",
        "  the config does not make sense:",
        "    config.seed is -1; expected at least 0 and at most 2147483647",
        "  missing: 2 paths, see the list above",
    ]
    listed = capsys.readouterr().out
    assert "no/train.txt: missing\n" in listed
    assert "rewards/hpsv3: missing; hf download MizzenAI/HPSv3" in listed
    config = runs.small_config(base)
    config.rewards.hpsv3 = {"weight": 1.0, "path": str(tmp_path)}
    with pytest.raises(ValueError, match="config.rewards.hpsv3: no .*config.json; expected a dire"):
        preflight.tell(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hpsv3": 1.0}, "config.rewards.hpsv3 needs the options path"),
        ({"hpsv3": {"weight": 1.0, "path": 5}}, "config.rewards.hpsv3.path is 5; expected text"),
    ],
)
def test_options_that_a_reward_lacks_are_named(base, tmp_path, settings, expected):
    config = runs.small_config(base)
    config.rewards = settings
    assert expected in refusal(config, tmp_path / "run")


def test_one_process_checks_the_prompts_for_all(base, tmp_path, monkeypatch):
    """Lists of millions take seconds; its error is one of all (multihost.on_all)."""
    path = tmp_path / "list.txt"
    path.write_text("red " * 16 + "\n" + "red\n" * 9)
    config = runs.small_config(base, **{"prompts.test": str(path)})
    with pytest.raises(ValueError, match="list.txt, line 1: .* has 17 tokens"):
        check(config, tmp_path / "run")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert len(check(config, tmp_path / "run").prompts["test"]) == 10
