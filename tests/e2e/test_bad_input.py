"""Whatever is wrong is said before anything is compiled, with its name and the next step (issue 2, part 9)."""

import json
import re
import shutil

import pytest

from astrolabe_jax import prepare, train
from astrolabe_jax.convert.lora import save_peft
from tests.e2e import runs
from tests.tiny_base import write_tiny_base


def refusal(config, workdir) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        train.resume(prepare.prepare(config, workdir))
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "config.prompts.test: prompt file .*list.txt does not exist; give a text file"),
        (b"", "config.prompts.test: .*list.txt is empty; write one prompt a line"),
        (b"a cat\n\xff\n", r"config.prompts.test: .*list.txt is not UTF-8: byte 6 \(line 2\) is 0xff"),
        (b"a cat\n\na dog\n", "config.prompts.test: .*list.txt, line 2 is empty"),
        (b"a cat\n" + b"red " * 16, "config.prompts.test: .*list.txt, line 2 has 17 tokens, the text encoder takes 16"),
    ],
)
def test_prompt_files(base, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    config = runs.small_config(base, **{"prompts.test": str(tmp_path / "list.txt")})
    assert re.search(expected, refusal(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"video.frames": 6}, "config.video.frames: 6 pixel frames: expected 1 modulo 4"),
        ({"model.block": 3}, "config.video.frames and config.model: 2 frames are not a whole number of blocks of 3"),
        ({"video.height": 40}, "config.video.height is 40; this model takes multiples of 16 pixels"),
        ({"model.window": 2, "model.sink": 2}, "config.model: a window of 2 frames cannot hold the sink of 2"),
        ({"sampler.steps": (1000, 500.5)}, "config.sampler: denoising step 500.5 is not a whole number"),
        ({"rewards.shapes_vq": -2.0}, "config.rewards has a total weight of 0"),
        ({"prompts.groups": 8, "prompts.candidates": 1, "advantages.std": "prompt"}, "config.prompts.candidates is 1"),
        ({"lora.init": "nowhere"}, "config.lora.init: .*nowhere"),
    ],
)
def test_settings(base, tmp_path, changes, expected):
    assert re.search(expected, refusal(runs.small_config(base, **changes), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_too_few_prompts_for_an_epoch(base, tmp_path):
    (tmp_path / "list.txt").write_text("a red circle moving left on a grey background\n")
    config = runs.small_config(base, **{"prompts.train": str(tmp_path / "list.txt")})
    assert "has 1 prompts, an epoch takes 2 different ones; add prompts" in refusal(config, tmp_path / "run")


def test_another_adapter(base, tmp_path):
    run = prepare.prepare(runs.small_config(base), tmp_path / "run")
    save_peft(run.adapter, tmp_path / "lora", 2, 4.0)
    changed = {"lora.init": str(tmp_path / "lora")}
    assert "has alpha / rank 2, config.lora.alpha / rank is 1" in refusal(
        runs.small_config(base, **changed), tmp_path / "a"
    )
    assert "changed shape" in refusal(runs.small_config(base, **changed, **{"lora.rank": 4}), tmp_path / "b")


def test_a_missing_or_broken_base_is_named(base, tmp_path):
    message = refusal(runs.small_config("nowhere"), tmp_path / "run")
    assert "config.base: base 'nowhere': no nowhere/config.json; expected a shipped base" in message
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
    prepare.prepare(runs.small_config(base, seed=5), tmp_path / "mine")
    shutil.copytree(workdir / "checkpoints", tmp_path / "mine" / "checkpoints")
    message = refusal(runs.small_config(base, seed=5), tmp_path / "mine")
    assert "is of another run" in message and "config.seed: 0 there, 5 now" in message
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["config.seed"] == 5


def test_unwritable_and_foreign_directories(base, tmp_path):
    (tmp_path / "file").write_text("")
    config = runs.small_config(base)
    assert f"workdir {tmp_path / 'file' / 'run'} cannot be written" in refusal(config, tmp_path / "file" / "run")
    assert "holds 'file' but no run of astrolabe_jax" in refusal(config, tmp_path)
