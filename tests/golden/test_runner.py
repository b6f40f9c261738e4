"""The runner on folders made here by the numpy oracle, intact and damaged, and on the shared folder
where it exists.
"""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from astrolabe_jax.models.lora import adapter_shapes
from tests.adapters import to_peft
from tests.golden import nft_step, oracle
from tests.golden.__main__ import main
from tests.golden.dit import wan_config
from tests.golden.entry import EXACT, TABLE, Tolerance, difference
from tests.golden.files import GoldenFile
from tests.golden.runner import run_file

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"
SIZES = {
    "dim": 12,
    "ffn_dim": 16,
    "freq_dim": 8,
    "num_heads": 2,
    "head_dim": 6,
    "num_layers": 2,
    "in_dim": 2,
    "lat_h": 2,
    "lat_w": 4,
    "fsl": 2,
    "max_global": 10,
    "text_dim": 5,
    "text_len": 3,
}
SCENARIO = {
    "name": "c_x",
    "pipe": "causal",
    "B": 1,
    "block": 2,
    "frames": 4,
    "local": -1,
    "sink": 0,
    "shift": 5.0,
    "init": 0,
    "ctx": 0,
    "steps": [1000, 500],
    "warp": True,
    "infer": False,
    "flow": True,
    "gsink": True,
    "prompts": None,
    "switch": None,
}
# What the shared folder does not hold. The global window is 5 frames here (max_global over fsl).
SCENARIOS = {
    "local_no_sink": {"B": 2, "frames": 8, "local": 4},
    "longer_than_global": {"frames": 8, "sink": 1},
    "initial_latents": {"init": 2, "frames": 6, "local": 6, "sink": 2},
    "context_noise_raw_steps": {"ctx": 100, "warp": False, "shift": 3.0, "flow": False},
    "sink_larger_than_block": {"block": 1, "frames": 6, "local": 4, "sink": 2},
    "sink_not_a_multiple": {"frames": 10, "local": 7, "sink": 3},
    "inference_class": {"frames": 10, "local": 6, "sink": 2, "infer": True},
    "inference_class_blocks_across_the_end": {"frames": 10, "local": 5, "sink": 1, "infer": True},
    "inference_class_no_sink": {"frames": 8, "local": 5, "infer": True},
    "inference_class_longer_than_global": {"frames": 8, "sink": 1, "infer": True},
    "one_step": {"steps": [1000], "infer": True},
    "sink_and_block_overlap": {"block": 3, "frames": 12, "local": 5, "sink": 3},
    "sink_and_block_overlap_while_growing": {"frames": 10, "local": 5, "sink": 4},
    "sink_and_block_overlap_inference_class": {
        "block": 3,
        "frames": 9,
        "local": 4,
        "sink": 2,
        "infer": True,
    },
    "window_of_one_block": {"frames": 6, "local": 2, "sink": 2},
    "window_smaller_than_the_sink": {"frames": 8, "local": 3, "sink": 4},
    "global_window_smaller_than_sink_and_block": {"frames": 8, "sink": 4},
    "global_window_smaller_than_the_sink": {"frames": 8, "sink": 6},
    "video_shorter_than_the_sink": {"frames": 2, "local": 8, "sink": 3},
}


@pytest.fixture(scope="module")
def weights():
    rng, d, f = np.random.default_rng(0), SIZES["dim"], SIZES["ffn_dim"]
    shapes = {
        "patch_embedding.weight": (d, 2, 1, 2, 2),
        "patch_embedding.bias": (d,),
        "head.modulation": (1, 2, d),
        "text_embedding.0": (d, 5),
        "text_embedding.2": (d, d),
        "time_embedding.0": (d, 8),
        "time_embedding.2": (d, d),
        "time_projection.1": (6 * d, d),
        "head.head": (8, d),
    }
    for i in range(SIZES["num_layers"]):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.modulation": (1, 6, d),
            f"{block}.ffn.0": (f, d),
            f"{block}.ffn.2": (d, f),
        }
        shapes |= {f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,)}
        for attention in ("self_attn", "cross_attn"):
            shapes |= {f"{block}.{attention}.{part}": (d, d) for part in "qkvo"}
            shapes |= {f"{block}.{attention}.norm_{part}.weight": (d,) for part in "qk"}
    tensors = {}
    for name, shape in shapes.items():
        whole = name.endswith((".weight", ".bias", "modulation"))
        tensors[name if whole else f"{name}.weight"] = rng.normal(size=shape) / np.sqrt(shape[-1])
        if not whole:
            tensors[f"{name}.bias"] = 0.1 * rng.normal(size=shape[:1])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


# Prompts that change: scene strings, 16 frames a second, blocks of 2 are half a second; and
# switches at a frame. A flush takes the last two places of the buffer, whatever lies there: an
# empty, a full and a half refilled one.
CHANGES = {
    "flush_of_a_full_window": {"frames": 14, "local": 6, "sink": 2, "prompts": "a[2s] | b"},
    "flush_of_a_window_not_full": {"frames": 10, "local": 8, "sink": 1, "prompts": "a[1s] | b"},
    "flush_of_a_window_refilled_in_part": {
        "frames": 18,
        "local": 8,
        "sink": 2,
        "prompts": "a[2.5s] | b[0.5s] | c",
    },
    "flush_of_a_global_window": {"frames": 12, "prompts": "a[1s] | b[1s] | c"},
    "flush_inference_class": {
        "frames": 22,
        "local": 6,
        "sink": 2,
        "infer": True,
        "prompts": "a[2s] | b[2s] | c",
    },
    "flush_inference_class_refilled_in_part": {
        "frames": 20,
        "local": 8,
        "sink": 3,
        "block": 4,
        "infer": True,
        "prompts": "a[3s] | b[1s] | c",
    },
    "flush_of_single_frames": {
        "block": 1,
        "frames": 9,
        "local": 5,
        "sink": 1,
        "prompts": "a[1s] | b",
    },
    "cut_of_the_training_class": {
        "block": 3,
        "frames": 18,
        "local": 9,
        "sink": 3,
        "prompts": "a[2.25s#] | b[1.5s#] | c",
    },
    "cut_of_the_inference_class": {
        "block": 3,
        "frames": 15,
        "local": 6,
        "infer": True,
        "prompts": "a[2.25s#] | b",
    },
    "switch_before_the_window_is_full": {
        "B": 2,
        "frames": 10,
        "local": 8,
        "sink": 2,
        "switch": [4],
    },
    "switch_of_a_full_window": {"B": 2, "frames": 14, "local": 6, "sink": 2, "switch": [3, 9]},
    "switch_without_global_sink": {
        "frames": 14,
        "local": 6,
        "sink": 2,
        "switch": [7, 10],
        "gsink": False,
    },
    "switch_without_sink": {"frames": 12, "local": 4, "switch": [6], "ctx": 60},
    "switch_of_a_global_window": {"frames": 12, "sink": 1, "switch": [4, 10]},
    "switch_of_single_frames": {"block": 1, "frames": 8, "local": 4, "sink": 1, "switch": [2, 6]},
    "switch_of_the_inference_class": {
        "frames": 14,
        "local": 6,
        "sink": 2,
        "infer": True,
        "switch": [8],
    },
    "switch_of_the_inference_class_without_global_sink": {
        "frames": 14,
        "local": 6,
        "sink": 2,
        "infer": True,
        "switch": [8],
        "gsink": False,
    },
    "switch_behind_initial_latents": {"frames": 8, "init": 2, "local": 6, "sink": 2, "switch": [6]},
    "two_switches_at_once": {"frames": 8, "local": 4, "switch": [2, 2]},
}


def rollout_file(weights, **changes) -> dict[str, np.ndarray]:
    """All arrays of a c_* file, its outputs computed by the oracle."""
    scenario = SCENARIO | changes
    rng, config = np.random.default_rng(1), SIZES | {"scenario": scenario}
    batch, block, steps = scenario["B"], scenario["block"], len(scenario["steps"])
    shape = (SIZES["in_dim"], SIZES["lat_h"], SIZES["lat_w"])

    def normal(*leading, shape=shape):
        return rng.normal(size=(*leading, *shape)).astype(np.float32)

    noise = normal(batch, scenario["frames"])
    renoise = normal(scenario["frames"] // block, steps - 1, batch * block)
    scene_of, cuts = scenes_of(scenario)
    # a scene of the string may lie behind the end of the video
    unreached = int(bool(scenario["prompts"]))
    prompts = normal(max(scene_of) + 1 + unreached, batch, shape=(3, 5))
    initial = normal(batch, scenario["init"]) if scenario["init"] else None
    outputs = oracle.rollout(weights, config, noise, renoise, prompts, initial, scene_of, cuts)
    if not scenario["flow"]:
        outputs["call_x0"] = outputs["call_x0"][:, :-1]
        del outputs["call_flow"]
    inputs = {"noise": noise, "renoise": renoise, "config": np.array(json.dumps(config))}
    for i, scene in enumerate(prompts):
        for j, prompt in enumerate(scene):
            name = f"p{i}.{j}" if scenario["switch"] else f"p{i if scenario['prompts'] else j}"
            inputs[f"prompt_embeds/{name}"] = prompt
    return outputs | inputs


def scenes_of(scenario: dict) -> tuple[list[int], list[bool]]:
    """The scene of each block, and the cuts: worked out from the strings and frames of CHANGES
    alone.
    """
    starts = range(scenario["init"], scenario["init"] + scenario["frames"], scenario["block"])
    if scenario["switch"]:
        scene, scene_of = 0, []
        for start in starts:
            if scene < len(scenario["switch"]) and start >= scenario["switch"][scene]:
                scene += 1
            scene_of.append(scene)
        return scene_of, []
    parts = (scenario["prompts"] or "a").split(" | ")
    lengths = [int(float(part[2:].rstrip("s#]")) * 4 / scenario["block"]) for part in parts[:-1]]
    scene_of = [i for i, length in enumerate(lengths) for _ in range(length)][: len(starts)]
    return scene_of + [len(parts) - 1] * (len(starts) - len(scene_of)), [
        "#" in part for part in parts
    ]


def forward_file(weights, combos) -> dict[str, np.ndarray]:
    """All arrays of a b_* file."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 5, 2, 2, 4)).astype(np.float32)
    prompts = rng.normal(size=(2, 3, 5)).astype(np.float32)
    t = rng.uniform(100, 900, (2, 5)).astype(np.float32)
    config = SIZES | {"combos": combos, "frames": 5, "shift": 5.0, "weights": "dit_weights.npz"}
    arrays = {
        "x": x,
        "prompt_embeds": prompts,
        "t_perframe": t,
        "config": np.array(json.dumps(config)),
    }
    sigmas, times = oracle.schedule(5.0)
    sigma = sigmas[np.argmin(np.abs(times - t[..., None]), axis=-1)][..., None, None, None]
    for block, local in combos:
        flow, mask = oracle.training_forward(weights, config, x, t, prompts, block, local)
        prefix = f"block{block}_local{local}"
        arrays |= {f"{prefix}/perframe/flow": flow, f"{prefix}/perframe/x0": x - sigma * flow}
        arrays[f"{prefix}/frame_mask"] = mask
    return arrays


@pytest.fixture(scope="module")
def rollout(weights):
    return rollout_file(weights)


@pytest.fixture
def folder(tmp_path, weights):
    np.savez(tmp_path / "dit_weights.npz", **weights)
    return tmp_path


def failures(path: Path) -> dict[str, str]:
    """{entry: reason} of the lines of a file that are not ok."""
    lines = list(run_file(path))
    assert lines
    return {line.entry: line.reason for line in lines if not line.ok}


QUICK = {
    *SCENARIOS,
    "flush_inference_class_refilled_in_part",
    "cut_of_the_training_class",
    "switch_of_the_inference_class_without_global_sink",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in SCENARIOS | CHANGES
    ],
)
def test_rollouts_equal_the_oracle(folder, weights, name):
    np.savez(folder / "c_x.npz", **rollout_file(weights, **(SCENARIOS | CHANGES)[name]))
    assert failures(folder / "c_x.npz") == {}


def test_training_forwards_equal_the_oracle(folder, weights):
    # also a window smaller than the block, and a last block cut short
    combos = [[2, -1], [1, 2], [2, 3], [3, 2]]
    np.savez(folder / "b_x.npz", **forward_file(weights, combos))
    assert failures(folder / "b_x.npz") == {}


# Config of an a_* file beyond what the shared folder has; docs/sampling.md says what each field
# does.
SCHEDULES = {
    "class_defaults": {"sigma_min": 0.003 / 1.002, "extra_one_step": False, "shift": 3.0},
    "strength": {"sigma_max": 0.9, "denoising_strength": 0.6},
    "inverse": {"inverse_timesteps": True},
    "reverse": {"reverse_sigmas": True, "sigma_min": 0.01},
    "length": {"num_inference_steps": 60},
}


def scheduler_file(settings: dict) -> dict[str, np.ndarray]:
    """All arrays of an a_* file: a group with everything, and two that hold only tables."""
    rng = np.random.default_rng(3)
    fields = {
        key: value for key, value in settings.items() if key not in ("shift", "num_inference_steps")
    }
    steps = settings.get("num_inference_steps", 1000)
    sigmas, times = oracle.schedule(2.5, steps, **fields)
    inputs = {
        name: rng.normal(size=(3, 2, 4)).astype(np.float32) for name in ("x0", "noise", "flow")
    }
    inputs |= {"t": times[[2 * steps // 5, steps // 2, -1]], "t_int": np.array([700, 501, 333])}
    inputs |= {"t_mid": times[[steps // 2, steps // 3]], "steps1": np.array([60, 33, 0])}
    final = 1.0 if settings.keys() & {"inverse_timesteps", "reverse_sigmas"} else 0.0
    groups = {"shift2.5": inputs | oracle.scheduler(inputs, sigmas, times, final)}
    groups["shift2.5"]["warped1"] = np.append(times, 0)[steps - inputs["steps1"]]
    for name, table in {
        "set50": oracle.schedule(settings.get("shift", 5.0), 50, **fields),
        "mild": oracle.schedule(1.5, 20, **fields | {"sigma_max": 0.7}),
    }.items():
        groups[name] = dict(zip(("sigmas", "timesteps"), table, strict=True))
    own = {"shift": 1.5, "num_inference_steps": 20, "sigma_max": 0.7}
    config = {"num_train_timesteps": 1000, "mild": own, **settings}
    arrays = {
        f"{group}/{name}": array
        for group, members in groups.items()
        for name, array in members.items()
    }
    return arrays | {"config": np.array(json.dumps(config))}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_the_config(folder, name):
    arrays = scheduler_file(SCHEDULES[name])
    np.savez(folder / "a_x.npz", **arrays)
    assert failures(folder / "a_x.npz") == {}
    config = json.loads(str(arrays["config"]))
    for field in SCHEDULES[name]:  # every one of them matters
        rest = {key: value for key, value in config.items() if key != field}
        np.savez(folder / "a_x.npz", **arrays | {"config": np.array(json.dumps(rest))})
        assert any(key.endswith("/sigmas") for key in failures(folder / "a_x.npz"))


@pytest.mark.parametrize("field", [{"num_train_timesteps": 100}, {"sigma_data": 0.5}])
def test_a_schedule_that_is_not_understood_is_reported(folder, field):
    arrays = scheduler_file({})
    config = json.loads(str(arrays["config"])) | field
    np.savez(folder / "a_x.npz", **arrays | {"config": np.array(json.dumps(config))})
    assert failures(folder / "a_x.npz")["-"].startswith("Unsupported: ")
    np.savez(folder / "a_x.npz", **arrays, **{"other/sigmas": np.zeros(3)})
    assert "'other' is named neither" in failures(folder / "a_x.npz")["-"]


# of the others, the first two count: c and a
KEYS = ["video_c", "avg", "video_main", "video_a", "video_b"]


def selective_kl_file(epochs: int) -> dict[str, np.ndarray]:
    """Rewards [epoch, key, sample] and the rank disagreement (docs/objective.md, Rank
    discrepancy).
    """
    rng = np.random.default_rng(4)
    rewards = rng.normal(size=(epochs, len(KEYS), 12))
    ranks = (rewards[..., None, :] > rewards[..., None]).sum(-1) + 1.0  # 1 is the best
    rank_diff = ranks[:, 2] - (ranks[:, 0] + ranks[:, 3]) / 2
    config = {"selkl_x": {"epochs": epochs, "samples": 12, "main_reward": "video_main"}}
    arrays = {
        "rewards": rewards,
        "reward_keys": np.array(KEYS),
        "kl": np.zeros((epochs, 2)),
        "rank_diff": rank_diff,
    }
    return {f"selkl/x/{name}": array for name, array in arrays.items()} | {
        "config": np.array(json.dumps(config))
    }


def lora_file() -> dict[str, np.ndarray]:
    """An h_* file that holds an adapter and its size."""
    shapes = adapter_shapes(wan_config(SIZES), 2)
    adapter = to_peft(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
    arrays = {f"r2/adapter/{key}": value for key, value in adapter.items()}
    described = {"r2/adapter_config_json": np.array(json.dumps({"r": 2, "lora_alpha": 4}))}
    count = {"r2/num_trainable": np.array(sum(value.size for value in adapter.values()))}
    return arrays | described | count | {"config": np.array(json.dumps(SIZES))}


@pytest.mark.parametrize(
    ("name", "make", "odd"),
    [
        ("a_x.npz", lambda: scheduler_file({}), "other/sigmas"),
        ("f_x.npz", lambda: selective_kl_file(3), "loss/other/r"),
        ("f_x.npz", lambda: selective_kl_file(3), "selkl/other/mask"),
        ("f_x.npz", lambda: selective_kl_file(3), "ema/other/decay"),
        ("h_x.npz", lora_file, "other/num_trainable"),
    ],
)
def test_a_group_that_cannot_run_fails_alone(folder, name, make, odd):
    arrays = make()
    np.savez(folder / name, **{odd: np.zeros(3)}, **arrays)
    lines = list(run_file(folder / name))
    assert {line.entry for line in lines if not line.ok} == {"-", odd}
    np.savez(folder / name, **arrays)
    assert sum(line.ok for line in lines) == len(list(run_file(folder / name)))


@pytest.mark.parametrize("epochs", [3, len(KEYS)])
def test_both_orders_of_the_reward_axes_are_read(folder, epochs):
    arrays, path = selective_kl_file(epochs), folder / "f_x.npz"
    exchanged = arrays | {"selkl/x/rewards": arrays["selkl/x/rewards"].swapaxes(0, 1)}
    for stored in (arrays, exchanged):
        np.savez(path, **stored)
        assert failures(path) == {}
        np.savez(path, **stored | {"selkl/x/rank_diff": -stored["selkl/x/rank_diff"]})
        assert failures(path).keys() == {"selkl/x/rank_diff"}
    np.savez(path, **arrays | {"selkl/x/rewards": arrays["selkl/x/rewards"][:, :, 1:]})
    assert "epochs, keys, samples" in failures(path)["selkl/x/rank_diff"]


def step_file(path: Path, left_out: tuple[str, ...]) -> dict[str, np.ndarray]:
    """An fh_* file without some outputs, its reference policy `old`. The numbers are ours: this is
    about the runner.
    """
    rng = np.random.default_rng(5)
    config = SIZES | {
        "variants": {"x": {"mask_block": 1, "select_kl": True}},
        "kl_beta": {"x": 0.01},
        "beta": 0.1,
        "shift": 5.0,
        "accumulation": 2,
        "adv_clip_max": 5,
        "decay_type": 1,
        "ema_decay": 0.9,
        "lora": {"alpha": 4, "r": 2},
        "lr": 1e-3,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    }
    arrays = {"config": np.array(json.dumps(config)), "x/global_step": np.array(30)}
    for policy in ("default", "old"):
        adapter = jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape) / 4, adapter_shapes(wan_config(config), 2)
        )
        arrays |= {
            f"init/{policy}/{key}": value.astype(np.float32)
            for key, value in to_peft(adapter).items()
        }
    for i, t in enumerate((1000, 500)):
        x0, noise = rng.normal(size=(2, 2, 2, 2, 2, 4)).astype(np.float32)
        inputs = {
            "x0": x0,
            "noise": noise,
            "prompt_embeds": rng.normal(size=(2, 3, 5)).astype(np.float32),
        }
        inputs |= {
            "advantages": rng.normal(size=2),
            "t": np.array(t),
            "reward_mask": np.array([True, False]),
        }
        inputs["xt"] = (1 - t / 1000) * x0 + t / 1000 * noise
        arrays |= {f"x/micro{i}/{name}": value for name, value in inputs.items()}
    old_ref = {
        key.replace("/old/", "/old_ref/"): arrays[key]
        for key in arrays
        if key.startswith("init/old/")
    }
    np.savez(path, **arrays, **old_ref)
    for key, compute, _ in itertools.chain.from_iterable(nft_step.entries(GoldenFile(path))):
        if not key.startswith(left_out):
            ours = compute()
            arrays |= (
                {key + name: value for name, value in ours.items()}
                if key.endswith("/")
                else {key: ours}
            )
    return arrays


@pytest.mark.slow
def test_outputs_of_an_optimizer_step_may_be_left_out(folder):
    """Without the stored gradient, and with only one prediction to tell which policy the reference
    is.
    """
    path, layer = folder / "fh_x.npz", "x/old_after/base_model.model.blocks.1."
    arrays = step_file(path, left_out=("x/micro0/", "x/grad/", "x/ema_after/"))
    stored = {key: value for key, value in arrays.items() if not key.startswith(layer)}
    wrong = next(key for key in stored if key.startswith("x/default_after/"))
    # the norm is as exact as the gradient
    stored["x/grad_norm"] = stored["x/grad_norm"] * (1 + 1e-5)
    np.savez(path, **stored | {wrong: stored[wrong] + 1e-2})
    lines = list(run_file(path))
    assert len(lines) == 11  # xt of micro0, the 7 of micro1, grad_norm and 2 adapters
    bad = {line.entry: line.reason for line in lines if not line.ok}
    assert bad == {
        "x/default_after/": f"outside the tolerance: {wrong.removeprefix('x/default_after/')}"
    }


def test_outputs_may_be_left_out_but_not_all_of_them(folder, rollout):
    inputs = {key: rollout[key] for key in ("noise", "renoise", "prompt_embeds/p0", "config")}
    np.savez(folder / "c_x.npz", **inputs, latents=rollout["latents"])
    assert [(line.entry, line.ok) for line in run_file(folder / "c_x.npz")] == [("latents", True)]
    np.savez(folder / "c_x.npz", **inputs)
    assert failures(folder / "c_x.npz")["-"] == "no output to compare"


def test_a_correct_folder_exits_with_0_and_a_perturbed_one_with_1(folder, rollout, capsys):
    np.savez(folder / "c_x.npz", **rollout)
    assert main([str(folder)]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rollout) - 4  # one for each output, none for 3 inputs and the config
    assert all(line.endswith("  ok") for line in lines) and total == f"{len(lines)} ok"

    wrong = rollout["call_x0"].copy()
    wrong[1, 0, 0, 1, 0, 1, 2] += 1e-3  # one number of one call
    np.savez(folder / "c_x.npz", **rollout | {"call_x0": wrong})
    assert main([str(folder)]) == 1
    *perturbed, total = capsys.readouterr().out.splitlines()
    (bad,) = (line for line in perturbed if "FAIL" in line)
    file, entry, error, *rest = bad.split()
    assert (file, entry, *rest) == (
        "c_x.npz",
        "call_x0",
        "1e-04",
        "FAIL",
        "outside",
        "the",
        "tolerance",
    )
    assert float(error) == pytest.approx(1e-3, rel=0.01)
    assert total == f"{len(lines) - 1} ok, 1 failed"


def test_an_array_that_nothing_reads_is_reported(folder, rollout):
    np.savez(folder / "c_x.npz", **rollout, call_entropy=np.zeros(3))
    assert failures(folder / "c_x.npz") == {"call_entropy": "not covered"}


def test_initial_latents_without_a_place_are_reported(folder, rollout):
    np.savez(folder / "c_x.npz", **rollout, initial_latents=rollout["latents"][:, :2])
    assert failures(folder / "c_x.npz") == {"initial_latents": "not covered"}


def test_a_scenario_that_cannot_run_is_reported_and_covers_nothing(folder, rollout):
    for change in ({"frame_skip": 2},):
        config = SIZES | {"scenario": SCENARIO | change}
        np.savez(folder / "c_x.npz", **rollout | {"config": np.array(json.dumps(config))})
        found = failures(folder / "c_x.npz")
        assert found["-"].startswith("Unsupported: ")
        assert found["latents"] == "not covered"


def test_an_exception_fails_the_entry_and_not_the_run(folder, weights):
    arrays = rollout_file(weights, init=2)
    # does not hold the frames of a block
    damaged = arrays | {"renoise": arrays["renoise"][:, :, :-1]}
    np.savez(folder / "c_x.npz", **damaged)
    found = failures(folder / "c_x.npz")
    assert all(reason.startswith("ValueError: ") for reason in found.values())
    assert arrays.keys() - found.keys() == {
        "denoising_step_list",
        "noise",
        "renoise",
        "prompt_embeds/p0",
        "config",
    }


def test_files_that_are_not_understood_are_reported(folder):
    np.savez(folder / "z_new.npz", x=np.zeros(3))
    (folder / "a_broken.npz").write_bytes(b"not an archive")
    assert "unknown file kind" in failures(folder / "z_new.npz")["-"]
    assert failures(folder / "a_broken.npz").keys() == {"-"}
    assert main([str(folder)]) == 1


def test_a_folder_without_files_or_with_weights_only_fails(tmp_path, folder):
    assert main([str(tmp_path / "none")]) == 1
    assert main([str(folder)]) == 1


def test_a_handled_file_that_holds_weights_is_not_passed_over(folder, rollout, weights):
    np.savez(
        folder / "c_x.npz",
        **rollout,
        **{"patch_embedding.weight": weights["patch_embedding.weight"]},
    )
    assert failures(folder / "c_x.npz") == {"patch_embedding.weight": "not covered"}


@pytest.mark.parametrize(
    ("got", "want", "tolerance", "accepted"),
    [
        ([1.0, 2.0], [1.0, 2.0], EXACT, True),
        ([1.0, 2.0 + 1e-9], [1.0, 2.0], EXACT, False),
        ([[1.0]], [1.0], Tolerance(1.0), False),  # another shape
        ([1.0, np.nan], [1.0, 2.0], Tolerance(1.0), False),
        ([np.nan], [np.nan], EXACT, True),
        ([np.inf], [1.0], Tolerance(1.0), False),
        ([1000.001, 1e-3], [1000.0, 1e-3], TABLE, True),
        ([1000.0, 1.1e-3], [1000.0, 1e-3], TABLE, False),  # each on its own scale
        ([1000.0, 1.1e-3], [1000.0, 1e-3], Tolerance(1e-6, "array"), True),
        ([True, False], [True, True], EXACT, False),
        (["a", "b"], ["a", "c"], EXACT, False),
        (["abcd"], ["abc"], EXACT, False),
        (["abc"], ["abc"], EXACT, True),
    ],
)
def test_comparison(got, want, tolerance, accepted):
    assert difference(np.array(got), np.array(want), tolerance)[1] is accepted


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.slow] if path.stem.startswith("fh_") else []
        )
        for path in sorted(SHARED.glob("*.npz"))
        if path.stem != "dit_weights"  # an input
    ],
)
def test_shared_folder(path):
    with jax.numpy_rank_promotion("allow"):  # as in `python -m tests.golden`
        assert failures(path) == {}
