"""A published recipe is more than a list of fields: shrunk to the tiny base, it runs."""

import numpy as np
import pytest

from configs import published
from tests.e2e import runs

SHRUNK = {
    "transformer": "",
    "model.size": "",
    "video.frames": 9,
    "video.height": 16,
    "video.width": 16,
    "lora.rank": 2,
    "lora.alpha": 2.0,
    "lora.init": "",
    "train.epochs": 1,
    "eval.videos": 20,
    "prompts.prompts_per_epoch": 4,
    "prompts.samples_per_prompt": 4,
    "sampler.batch": 16,
    "optimizer.microbatch": 16,
    "mesh.samples_per_device": 1,
    "prompts.train": "world:moving_shapes/train",
    "prompts.test": "world:moving_shapes/test",
}


@pytest.mark.slow  # most of a minute of compilation
def test_the_papers_run_at_a_tiny_size(base, tmp_path, capsys):
    """bfloat16, selective KL, 16 videos in two pieces on eight devices, evaluation in three,
    published behaviour.
    """
    config = published.recipe("longlive", "paper,rewards=shapes_vq+shapes_mq,reference")
    config.update_from_flattened_dict(SHRUNK | {"base": str(base)})
    summary = runs.start(config, tmp_path / "run")
    assert np.isfinite(summary["gain"]["total"]["mean"])
    assert summary["eval"]["after"]["total"]["n"] == 20
    records = runs.outcome(tmp_path / "run")["metrics"]
    (epoch,) = [record for record in records if record["kind"] == "epoch"]
    assert epoch["groups"] == 4
    assert epoch["step"] == 1
    assert 0 <= epoch["masked"] < 16
    assert epoch["grad_norm"] > 0
    out = capsys.readouterr().out
    assert (
        "2 of 8 videos to sample, 1 per device; 2 of 8 for the gradient of a step, 1 per device"
        in out
    )
    assert "warning: an epoch has 16 videos, the recipe's 1152: " in out
