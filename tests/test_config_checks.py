"""Every mistake in a config is named by its field, with what was expected, before anything else
happens.
"""

import re

import pytest

from astrolabe_jax.config import REFERENCE_SWITCHES, get_config
from astrolabe_jax.config_checks import validate, validate_sampling
from astrolabe_jax.rewards import registry as rewards
from configs import moving_shapes


def check(devices=1, backend="cpu", **changes):
    config = moving_shapes.get_config()
    config.update_from_flattened_dict(changes)
    validate(config, rewards.TABLE, devices, backend)


def test_the_recipe_and_its_reference_variants_are_valid():
    check()
    for variant in ("reference", *(f"reference,{switch}" for switch in REFERENCE_SWITCHES)):
        validate(moving_shapes.get_config(variant), rewards.TABLE, 1, "cpu")


@pytest.mark.parametrize(
    "steps", [(1000, 750, 500, 250, 0), (1000, 666, 333, 0), (1000, 500), (1000,)]
)
def test_every_published_list_of_steps_is_valid(steps):
    """Krea's lists end in 0 (docs/sampling.md, Denoising steps)."""
    check(**{"sampler.steps": steps})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"loss.kind": "ppo"},
            "config.loss.kind is 'ppo'; expected one of astrolabe, diffusion_nft",
        ),
        ({"base": ""}, "config.base is empty; expected the name of a shipped model, or a dir"),
        ({"prompts.train": " "}, "config.prompts.train is empty; expected a text file"),
        ({"prompts.test": ""}, "config.prompts.test is empty; expected a text file"),
        ({"seed": -1}, "config.seed is -1; expected at least 0"),
        ({"train.epochs": 0}, "config.train.epochs is 0; expected at least 1"),
        (
            {"optimizer.ema_cap": 1.5},
            "config.optimizer.ema_cap is 1.5; expected at least 0 and at most 1",
        ),
        ({"optimizer.b2": 1.0}, r"config.optimizer.b2 is 1.0; expected a number in \[0, 1\)"),
        ({"advantages.clip": 0.0}, "config.advantages.clip is 0.0; expected a positive number"),
        (
            {"optimizer.clip_norm": float("nan")},
            "config.optimizer.clip_norm is nan; expected a positive number",
        ),
        ({"optimizer.learning_rate": float("nan")}, "config.optimizer.learning_rate is nan"),
        (
            {"optimizer.learning_rate": float("inf")},
            "config.optimizer.learning_rate is inf; expected at least 0, at most 3.4e\\+38$",
        ),
        ({"optimizer.learning_rate": 1e39}, "1e\\+39; expected at least 0, at most 3.4e\\+38$"),
        ({"advantages.clip": 3e38}, "clip is 3e.38; expected a positive number, at most 1e6"),
        ({"video.fps": 2**31 - 1}, "fps is 2147483647; expected at least 1 and at most 1000"),
        ({"optimizer.eps": 1e-40}, "eps is 1e-40; expected a positive number, a size of at"),
        ({"train.epochs": 2**31}, "epochs is 2147483648; expected at least 1, at most 2147483647$"),
        ({"scoring.timeout": 1e10}, "scoring.timeout is 1.*; expected a positive number, at most"),
        ({"rewards.shapes_vq": 1e39}, r"config.rewards.shapes_vq is 1e\+39; expected a finite"),
        ({"streaming.starts": (3, 4.5)}, r"starts is \(3, 4.5\); expected whole numbers from 0 on"),
        ({"prompts.switch_frames": ("a",)}, r"switch_frames is \('a',\); expected whole numbers"),
        ({"model.window": 0}, "config.model.window is 0; expected at least 1, or -1"),
        (
            {"model.window": 2},
            r"^[^:]*:\n  config.model.window is 2; expected at least 3, a block \(model.block 3\)",
        ),
        (
            {"model.window": 5, "model.sink": 3},
            r"config.model.window is 5; expected at least 6, .* the sink \(model.sink 3\)$",
        ),
        ({"model.window": -1, "model.max_global": 2}, "config.model.max_global is 2; expected at"),
        (
            {"sampler.steps": (500, 750)},
            r"config.sampler.steps is \(500, 750\); expected .* strictly decreasing",
        ),
        ({"sampler.steps": ()}, r"config.sampler.steps is \(\)"),
        ({"sampler.steps": (0,)}, r"config.sampler.steps is \(0,\); .* after which a 0 may come"),
        (
            {"sampler.steps": (750, 500, 250)},
            r"config.sampler.steps is \(750, 500, 250\); expected timesteps from 1000, pure noise",
        ),
        ({"sampler.steps": (500, 0, 0)}, r"config.sampler.steps is \(500, 0, 0\)"),
        ({"sampler.steps": (500, -1)}, r"config.sampler.steps is \(500, -1\)"),
        ({"eval.shown": 200}, "config.eval.shown is 200; expected at most eval.videos, 144"),
        (
            {"rewards.shapes_vq": float("inf")},
            "config.rewards.shapes_vq is inf; expected a finite weight",
        ),
        (
            {"scoring.overlap": "all", "mesh.fsdp": 2},
            "config.scoring.overlap is 'all' with mesh.fsdp 2",
        ),
        (
            {"rewards.shapes_vq": 0.0, "rewards.shapes_mq": 0, "rewards.shapes_ta": 0.0},
            "config.rewards has no weight but 0 .*shapes_vq=0.0.*; raise one",
        ),
        (
            {"sampler.batch": 13},
            "config.sampler.batch is 13; expected a divisor of the 48 videos of an epoch",
        ),
        (
            {"prompts.repeated": 4},
            "config.prompts.repeated asks for 4 batches .* divisor of prompts.prompts_per_epoch, 6",
        ),
        ({"optimizer.microbatch": 36}, "config.optimizer.microbatch is 36; expected the 48 videos"),
        ({"optimizer.steps_per_pass": 5}, "in each of the 5 steps of a pass"),
        (
            {"mesh.fsdp": 2},
            "config.mesh has data -1 x fsdp 2; expected their product to be the 1 devices",
        ),
        (
            {
                "advantages.std": "prompt",
                "prompts.prompts_per_epoch": 48,
                "prompts.samples_per_prompt": 1,
            },
            (
                "config.prompts.samples_per_prompt is 1 with advantages.std 'prompt'.*expected at "
                "least 2, or adv"
            ),
        ),
        (
            {"kl.kind": "selective"},
            "config.kl.main_reward is ''; expected one of the rewards of this run",
        ),
    ],
)
def test_a_field_at_fault_is_named(changes, expected):
    with pytest.raises(ValueError, match=expected):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"streaming.window": 0, "eval.frames": 33},
            (
                "config.eval.frames belongs to the training of windows; set video.frames, or "
                "streaming.window"
            ),
        ),
        (
            {"streaming.score_frames": 4},
            (
                "config.streaming.score_frames is 4; expected whole blocks of 3, and the window of "
                "9 to be whole"
            ),
        ),
        (
            {"streaming.score_frames": 6},
            (
                "config.streaming.score_frames is 6; expected whole blocks of 3, and the window of "
                "9 to be whole"
            ),
        ),
        (
            {"streaming.prompts_per_device": 4},
            "config.prompts.prompts_per_epoch is 6; expected a multiple of 4 .*prompts_per_dev",
        ),
        (
            {"sampler.batch": 16},
            "config.sampler.batch is 16, 16 at once .*expected the same number of videos, a divi",
        ),
        ({"optimizer.microbatch": 12}, "config.optimizer.microbatch is 12, 12 at once"),
        (
            {"streaming.prompts_per_device": 2, "mesh.samples_per_device": 1},
            (
                "config.sampler.batch is 8, 1 at once .mesh.samples_per_device.; expected the same "
                "number of videos"
            ),
        ),
        (
            {"streaming.sampling": "sequence", "streaming.mode": "progressive"},
            (
                "config.streaming.sampling is 'sequence', whose videos begin at frame 0; expected "
                "'clip' if progressive"
            ),
        ),
        (
            {"streaming.backprop": "full", "streaming.mode": "progressive"},
            (
                "config.streaming.backprop 'full' makes all keys anew; expected mode 'epoch' and "
                "prefix 'rollout_old'"
            ),
        ),
        (
            {"streaming.backprop": "full", "streaming.prefix": "per_policy"},
            "config.streaming.backprop 'full' makes",
        ),
        (
            {"streaming.sampling": "sequence", "streaming.prefix": "per_policy"},
            (
                "config.streaming.prefix is 'per_policy'; expected 'rollout_old' where sampling is "
                "'sequence'"
            ),
        ),
        (
            {"streaming.mode": "progressive", "streaming.reward": "full"},
            (
                "config.streaming.reward is 'full', a progressive stream does not keep its frames; "
                "expected window_stream"
            ),
        ),
        (
            {"model.independent_first_frame": True},
            (
                "config.streaming.window cuts videos into equal blocks with whole sinks; expected "
                "model.independent_first"
            ),
        ),
        (
            {"model.faithful_sinks": True, "model.sink": 4, "model.window": 12},
            "model.faithful_sinks False for a sink",
        ),
        (
            {"prompts.repeated": 2},
            "config.prompts.repeated is 2; expected 1 where windows are trained",
        ),
        (
            {"model.sink": 3, "loss.mask_sink": False},
            "config.loss.mask_sink and mask_block ask for frames that the",
        ),
        (
            {"loss.mask_block": 9},
            "config.loss.mask_sink and mask_block ask .*mask_block at most model.block",
        ),
        (
            {"model.window": 10, "streaming.prefix": "per_policy"},
            (
                "config.streaming makes keys anew, but a window of 10 less a sink of 0 is not "
                "whole blocks of 3; expected"
            ),
        ),
        (
            {
                "model.window": 10,
                "streaming.recache_on_update": True,
                "streaming.mode": "progressive",
            },
            "config.streaming makes keys anew, but a window of 10 less a sink",
        ),
        (
            {"streaming.selection": "any"},
            "config.streaming.selection is 'any'; expected one of random, first, last, ch",
        ),
        ({"streaming.window": -3}, "config.streaming.window is -3; expected at least 0"),
    ],
)
def test_a_field_of_windows_at_fault_is_named(changes, expected):
    good = {
        "streaming.window": 9,
        "video.frames": 69,
        "sampler.batch": 8,
        "optimizer.microbatch": 8,
    }
    good["optimizer.steps_per_pass"] = 1
    check(**good)
    with pytest.raises(ValueError, match=expected):
        check(**good | changes)


def test_prompts_of_windows_must_fit_the_devices():
    good = {
        "streaming.window": 9,
        "video.frames": 69,
        "sampler.batch": 24,
        "optimizer.microbatch": 24,
    }
    good["optimizer.steps_per_pass"] = 1
    check(devices=3, **good)
    check(devices=12, **good)  # two devices for each prompt
    with pytest.raises(
        ValueError,
        match="prompts.prompts_per_epoch is 6; expected a multiple of 8 .* each of 8 devices",
    ):
        check(devices=8, **good)


def test_one_list_has_the_faults_of_fields_and_those_between_them():
    """But for those that would follow from the fault of a field: 48 videos are no 0 batches."""
    with pytest.raises(ValueError) as error:
        check(
            devices=5,
            **{
                "seed": -1,
                "sampler.batch": 0,
                "model.block": -2,
                "model.window": 2,
                "eval.shown": 200,
                "optimizer.microbatch": 36,
                "kl.kind": "selective",
                "rewards.shapes_vq": float("inf"),
            },
        )
    named = [line.split()[0] for line in str(error.value).splitlines()[1:]]
    assert named == [
        "config.seed",
        "config.model.block",
        "config.sampler.batch",
        "config.eval.shown",
        "config.kl.main_reward",
        "config.rewards.shapes_vq",
        "config.optimizer.microbatch",
    ]


def test_sampling_has_one_list_too():
    config = moving_shapes.get_config()
    config.update_from_flattened_dict({"seed": -1, "model.window": 2, "mesh.fsdp": 2})
    with pytest.raises(ValueError) as error:
        validate_sampling(config, 1, "cpu")
    named = [line.split()[0] for line in str(error.value).splitlines()[1:]]
    assert named == ["config.seed", "config.model.window", "config.mesh"]


def test_unknown_and_missing_rewards_are_named():
    config = moving_shapes.get_config()
    with config.unlocked():
        config.rewards.shapes_qv = 1.0
    with pytest.raises(
        ValueError,
        match="config.rewards.shapes_qv: unknown reward; expected one of aesthetic, bounce_mq, ",
    ):
        validate(config, rewards.TABLE, 1, "cpu")
    for weight in ("high", True, float("nan")):
        config = moving_shapes.get_config()
        del config.rewards["shapes_vq"]
        config.rewards.shapes_vq = weight
        with pytest.raises(
            ValueError, match=f"config.rewards.shapes_vq is {weight!r}; expected a finite weight"
        ):
            validate(config, rewards.TABLE, 1, "cpu")
    with pytest.raises(
        ValueError, match="config.rewards is empty; give at least one reward a weight"
    ):
        validate(get_config(), rewards.TABLE, 1, "cpu")
    config = get_config()
    config.rewards.shapes_vq = 1.0
    config.kl.kind = "selective"
    with pytest.raises(
        ValueError, match="config.kl.kind 'selective' compares rewards; expected at least 2"
    ):
        validate(config, rewards.TABLE, 1, "cpu")


def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        check(**{"loss.kind": "ppo", "train.epochs": 0, "lora.rank": 0})
    assert all(field in str(error.value) for field in ("loss.kind", "train.epochs", "lora.rank"))


def test_batches_must_fit_the_devices():
    check(devices=4)
    with pytest.raises(ValueError) as error:
        check(devices=5)
    assert "config.sampler.batch is 24; expected a multiple of the 5 devices" in str(error.value)
    told = re.search("it runs on (.*) devices; here are 5", str(error.value))
    assert told
    for count in map(int, told[1].split(", ")):
        check(devices=count)


def test_attention_that_the_machine_cannot_compute_is_refused():
    cudnn = {"model.attention": "cudnn"}
    check(backend="gpu", **cudnn, **{"model.dtype": "bfloat16"})
    for backend, dtype in (("gpu", "float32"), ("cpu", "bfloat16")):
        with pytest.raises(
            ValueError,
            match=f"attention is 'cudnn' with model.dtype {dtype} on a {backend}; expected",
        ):
            check(backend=backend, **cudnn, **{"model.dtype": dtype})
