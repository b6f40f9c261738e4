"""Every published run against the tables of docs/published.md (Published runs, Batch arithmetic),
written down here a second time.
"""

import functools
import re

import jax
import pytest

from astrolabe_jax import plan, report
from astrolabe_jax.arithmetic import piece, repeats, samples, window_starts
from astrolabe_jax.config import REFERENCE_SWITCHES, flatten, reward_weights, with_reference
from astrolabe_jax.config_checks import validate
from astrolabe_jax.convert import base as bases
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime import backend
from configs import (
    causal_forcing,
    krea14b,
    longlive,
    moving_shapes,
    moving_shapes_long,
    published,
    self_forcing,
)
from tests.meshes import mesh_of
from tests.tiny_base import write_tiny_base

RECIPES = {
    "self_forcing": self_forcing,
    "causal_forcing": causal_forcing,
    "longlive": longlive,
    "krea14b": krea14b,
}
# name, devices, rewards (H: HPSv3, M: motion quality, T: text alignment), lambda, learning rate,
# eval_freq, special
ROWS = """
self_forcing_video_hpsv3                        8  H      1e-4 1e-5 10
self_forcing_video_hpsv3_16gpu                  16 H      1e-3 1e-5 30
self_forcing_video_hpsv3_24gpu                  24 H      1e-3 1e-5 30
self_forcing_video_hpsv3_48gpu                  48 H      1e-4 1e-5 10
self_forcing_video_multi_reward                 8  H+M    1e-4 1e-5 10
self_forcing_video_multi_reward_16gpu           16 H+M    1e-3 1e-5 30
self_forcing_video_multi_reward_24gpu           24 H+M    1e-3 1e-5 30
self_forcing_video_multi_reward_48gpu           48 H+M    1e-4 1e-5 10
casual_forcing_video_hpsv3                      8  H      1e-4 1e-5 30
casual_forcing_video_hpsv3_16gpu                16 H      1e-4 1e-5 10
casual_forcing_video_hpsv3_24gpu                24 H      1e-4 1e-5 10
casual_forcing_video_hpsv3_48gpu                48 H      1e-4 1e-5 30
casual_forcing_video_hpsv3_mq_ta_48gpu          48 H+M+T  1e-4 1e-5 30
casual_forcing_video_hpsv3_ta_48gpu             48 .1H+T  1e-4 1e-5 30
casual_forcing_video_multi_reward               8  H+M    1e-4 2e-5 30
casual_forcing_video_multi_reward_16gpu         16 H+M    1e-4 1e-5 10
casual_forcing_video_multireward_48gpu          48 H+M    5e-4 1e-5 30
casual_forcing_video_ta_48gpu                   48 T      1e-4 2e-5 30
longlive_video_hpsv3                            8  H      1e-4 1e-5 10
longlive_video_hpsv3_16gpu                      16 H      1e-4 1e-5 10
longlive_video_hpsv3_24gpu                      24 H      1e-4 1e-5 10
longlive_video_hpsv3_48gpu                      48 H      1e-4 1e-5 30
longlive_video_hpsv3_with_lora_init             8  H      1e-4 1e-5 10 lora
longlive_video_hpsv3_with_lora_init_24gpu       24 H      1e-4 1e-5 10 lora
longlive_video_hpsv3_with_lora_init_48gpu       48 H      1e-4 1e-5 30 lora
longlive_video_multi_reward                     8  H+M    1e-4 1e-5 10
longlive_video_multi_reward_16gpu               16 H+M    1e-4 1e-5 10
longlive_video_multi_reward_with_lora_init      8  H+M    1e-4 1e-5 10 lora
longlive_video_multireward_48gpu                48 H+M    1e-4 1e-5 30
longlive_video_mq                               8  M      1e-4 1e-5 20
longlive_video_mq_16gpu                         16 M      1e-4 1e-5 20
longlive_video_long                             8  H      1e-4 1e-5 10 long
longlive_video_hpsv3_gardo                      8  H+M    1e-4 1e-5 10 selective
longlive_video_hpsv3_gardo_24gpu                24 H+M    1e-4 1e-5 10 selective
longlive_video_hpsv3_gardo_48gpu                48 H+M    1e-4 1e-5 30 selective
longlive_video_hpsv3_streaming_with_lora_init   8  H      1e-4 1e-5 30 lora
krea14b_video_hpsv3                             8  H      1e-4 1e-5 30
krea14b_video_hpsv3_16gpu                       16 H      1e-4 1e-5 30
krea14b_video_hpsv3_24gpu                       24 H      1e-4 1e-5 30
krea14b_video_hpsv3_48gpu                       48 H      1e-4 1e-5 30
krea14b_video_multi_reward                      8  H+M    1e-4 1e-5 30
krea14b_video_multi_reward_24gpu                24 H+M    1e-4 1e-5 30
"""
ROWS = {name: rest for name, *rest in map(str.split, ROWS.strip().splitlines())}
STREAMING = "longlive_video_hpsv3_streaming_with_lora_init"
NAMES = {"H": "hpsv3", "M": "videoalign_mq", "T": "videoalign_ta"}
# (preset, D): b, K, groups, samples per epoch, sampling batches, distinct prompts as coded, eval
# batch
BATCHES = {
    ("wan", 8): (3, 24, 16, 384, 16, 1, 3),
    ("wan", 16): (2, 16, 16, 256, 8, 2, 2),
    ("wan", 24): (4, 24, 48, 1152, 12, 4, 4),
    ("wan", 48): (4, 24, 48, 1152, 6, 8, 4),
    ("krea14b", 8): (1, 8, 8, 64, 8, 1, 1),
    ("krea14b", 16): (1, 16, 16, 256, 16, 1, 1),
    ("krea14b", 24): (1, 24, 24, 576, 24, 1, 1),
    ("krea14b", 48): (1, 16, 48, 768, 16, 3, 1),
}
MODELS = {  # transformer, size, window, sink
    "self_forcing": ("checkpoints/self_forcing_dmd.pt", "wan_1.3b", -1, 0),
    "causal_forcing": ("checkpoints/casualforcing/chunkwise/causal_forcing.pt", "wan_1.3b", -1, 0),
    "longlive": ("checkpoints/longlive_models/models/longlive_base.pt", "wan_1.3b", 12, 3),
    "krea14b": ("checkpoints/krea-realtime-video-14b.safetensors", "wan_14b", -1, 0),
}
COMMON = {
    "base": "wan_models/Wan2.1-T2V-1.3B",
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.block": 3,
    "model.max_global": 21,
    "sampler.steps": [1000, 750, 500, 250],
    "sampler.warp": True,
    "sampler.shift": 5.0,
    "video.height": 480,
    "video.width": 832,
    "video.fps": 16,
    "loss.kind": "astrolabe",
    "loss.mix_beta": 0.1,
    "advantages.clip": 5.0,
    "advantages.std": "global",
    "lora.rank": 256,
    "lora.alpha": 256.0,
    "optimizer.weight_decay": 1e-4,
    "optimizer.clip_norm": 1.0,
    "optimizer.old_decay": "type1",
    "optimizer.inner_epochs": 1,
    "optimizer.steps_per_pass": 1,
    "prompts.train": "dataset/vidprom/train.txt",
    "prompts.test": "dataset/vidprom/test.txt",
    "seed": 42,
}


def family_of(name):
    return next(family for family in RECIPES if name.startswith(family.replace("causal", "casual")))


def rewards_of(text):
    """H+M -> {'hpsv3': 1.0, 'videoalign_mq': 1.0}, .1H -> {'hpsv3': 0.1}"""
    return {NAMES[part[-1]]: float(part[:-1] or 1) for part in text.split("+")}


def load(name):
    return RECIPES[family_of(name)].get_config(name)


@pytest.mark.parametrize("family", RECIPES)
def test_the_header_of_a_recipe_lists_its_published_runs(family):
    header = RECIPES[family].__doc__
    listed = dict(re.findall(r"^    ([a-z0-9_,]+) +([\d, ]+)$", header, re.MULTILINE))
    there = {}
    for row in (*published.ROWS, *published.PAPER_ROWS):
        if row.family == family:
            there.setdefault(row.words, []).append(str(row.devices))
    assert listed == {words: ", ".join(devices) for words, devices in there.items()}
    count = sum(row.family == family for row in published.ROWS)
    assert f"Reproduces: {count} published configurations" in header


@pytest.mark.parametrize("recipe", [*RECIPES.values(), moving_shapes, moving_shapes_long])
def test_the_headers_of_recipes_answer_the_same_questions(recipe):
    name = recipe.__name__.replace(".", "/")
    lines = recipe.__doc__.splitlines()
    assert lines[0].startswith("Align ")
    assert any(f"astrolabe_jax.main --config={name}.py" in line for line in lines)
    questions = re.findall(r"^(\w+): ", recipe.__doc__, re.MULTILINE)
    assert questions == ["Reproduces", "Needs", "Hardware", "Time", "Expect"]


def test_the_table_holds_exactly_the_published_runs():
    assert len(ROWS) == 42 and [row.name for row in published.ROWS] == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_published_run_is_what_the_specification_says(name):
    devices, weights, kl_weight, learning_rate, every, *special = ROWS[name]
    family, config = family_of(name), load(name)
    preset = "krea14b" if family == "krea14b" else "wan"
    each, candidates, groups, count, batches, prompts, eval_batch = BATCHES[preset, int(devices)]
    transformer, size, window, sink = MODELS[family]
    expected = COMMON | {
        "name": name,
        "transformer": transformer,
        "model.size": size,
        "model.window": window,
        "model.sink": sink,
        "loss.kl_weight": float(kl_weight),
        "optimizer.learning_rate": float(learning_rate),
        "train.eval_every": int(every),
        "prompts.prompts_per_epoch": groups,
        "prompts.samples_per_prompt": candidates,
        "sampler.batch": each * int(devices),
        "optimizer.microbatch": each * int(devices),
        "mesh.samples_per_device": each,
        "eval.videos": 20 * eval_batch * int(devices),
        "lora.init": "checkpoints/longlive_models/models/lora.pt" if "lora" in special else "",
        "video.frames": 237 if "long" in special else 957 if name == STREAMING else 81,
        "eval.frames": 237 if name == STREAMING else 0,
        "streaming.window": 21 if name == STREAMING else 0,
        "streaming.starts": [21] if name == STREAMING else [],
        "streaming.selection": "choices" if name == STREAMING else "random",
        "kl.kind": "selective" if "selective" in special else "uniform",
        "kl.main_reward": "hpsv3" if "selective" in special else "",
    }
    flat = flatten(config)
    assert {field: flat[field] for field in expected} == expected
    assert reward_weights(config) == rewards_of(weights)
    assert (
        samples(config) == config.prompts.tuned_for == count
        and count // config.sampler.batch == batches
    )
    published_prompts = with_reference(config, "repeated_prompts")
    assert groups // repeats(published_prompts) == prompts


def test_streaming_starts_from_the_adapter_and_trains_the_window_behind_the_first_one(tmp_path):
    config = longlive.get_config("streaming")
    assert (
        config.name == STREAMING
        and config.to_json() == longlive.get_config("streaming,lora_init").to_json()
    )
    validate(config, rewards.TABLE, 8, "cpu")
    run = plan.abstract_run(config, 8)
    # frames 0 to 41: the window and what is before it
    assert run.latent_shape[0] == 42 and run.starts == (21,)
    assert (
        "21 latent frames from 21; mode epoch, sampling clip"
        in report.describe(run, "8")["windows"]
    )
    with pytest.raises(ValueError, match="no run streaming,lora_init,devices=24 was published"):
        longlive.get_config("streaming,devices=24")


def test_streaming_is_prepared_with_another_base(tmp_path):
    config = longlive.get_config("streaming,rewards=shapes_vq")
    changes = {
        "base": str(write_tiny_base(tmp_path / "base")),
        "transformer": "",
        "lora.init": "",
        "model.size": "",
    }
    changes |= {f"prompts.{split}": f"world:moving_shapes/{split}" for split in ("train", "test")}
    config.update_from_flattened_dict(changes | {"video.height": 16, "video.width": 16})
    run = prepare(config, tmp_path / "run")
    assert run.starts == (21,) and run.latent_shape == (42, 4, 2, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"selection": "first"}, 21),
        ({"selection": "last"}, 240),
        ({"selection": "random"}, 240),
        ({"starts": (21, 39, 219)}, 240),
        ({"starts": (222,)}, "a window of 21 from frame 222 does not lie in the 240 latent frames"),
        ({"starts": ()}, r"a window of 21 from frame \(none\) does not lie in"),
        ({"starts": (20,)}, r"a window of 21 and starts \(20,\); expected whole blocks of 3"),
        ({"window": 20, "selection": "last"}, "a window of 20 .* whole blocks of 3"),
    ],
)
def test_windows_lie_in_the_video(changes, expected):
    config = longlive.get_config("streaming")
    config.update_from_flattened_dict(
        {f"streaming.{field}": value for field, value in changes.items()}
    )
    if isinstance(expected, int):
        assert window_starts(config, 240)[-1] + 21 == expected
    else:
        with pytest.raises(ValueError, match=expected):
            window_starts(config, 240)


def test_a_start_that_is_given_twice_is_drawn_twice_as_often():
    config = longlive.get_config("streaming")
    config.streaming.update(selection="choices", starts=(21, 0, 21))
    assert window_starts(config, 240) == (0, 21, 21)


@pytest.mark.parametrize("devices", [8, 16, 24, 48])
@pytest.mark.parametrize("family", RECIPES)
def test_the_papers_run(family, devices):
    config = RECIPES[family].get_config(f"paper,devices={devices}")
    expected = {
        "name": f"{family}_paper" + (f"_{devices}gpu" if devices > 8 else ""),
        "kl.kind": "selective",
        "kl.main_reward": "hpsv3",
        "loss.mix_beta": 1.0,
        "loss.kl_weight": 1e-4,
        "optimizer.learning_rate": 1e-5,
        "optimizer.old_decay": "constant",
        "optimizer.old_decay_constant": 0.9,
        "prompts.prompts_per_epoch": 48,
        "prompts.samples_per_prompt": 24,
        "advantages.clip": 5.0,
        "advantages.std": "global",
        "lora.rank": 256,
        "loss.context": "clean",
        "loss.timesteps": "warped",
    }
    flat = flatten(config)
    assert {field: flat[field] for field in expected} == expected
    assert (
        reward_weights(config) == rewards_of("H+M+T")
        and samples(config) == config.prompts.tuned_for == 1152
    )
    validate(config, rewards.TABLE, devices, "cpu")


# Words of a recipe's argument.


def test_words_and_names_give_the_same_run():
    for row in published.ROWS:
        words = f"{row.words},devices={row.devices}"
        assert RECIPES[row.family].get_config(words).to_json() == load(row.name).to_json()
    assert longlive.get_config().to_json() == load("longlive_video_hpsv3").to_json()
    assert longlive.get_config("lora_init").name == "longlive_video_hpsv3_with_lora_init"


def test_the_framewise_model():
    config = causal_forcing.get_config("framewise,multi_reward")
    chunkwise = flatten(causal_forcing.get_config("multi_reward"))
    changed = {
        field: value for field, value in flatten(config).items() if value != chunkwise[field]
    }
    assert changed == {
        "name": "casual_forcing_video_multi_reward_framewise",
        "transformer": "checkpoints/casualforcing/framewise/causal_forcing.pt",
        "model.block": 1,
    }


def test_rewards_of_ones_own():
    config = longlive.get_config("gardo,rewards=shapes_mq+shapes_vq")
    assert (
        dict(config.rewards) == {"shapes_mq": 1.0, "shapes_vq": 1.0}
        and config.kl.main_reward == "shapes_mq"
    )
    assert config.name == "longlive_video_hpsv3_gardo with shapes_mq+shapes_vq"
    validate(config, rewards.TABLE, 8, "cpu")


def test_published_rewards_without_their_directories_are_refused_with_the_way_out():
    config = load("longlive_video_hpsv3_gardo")
    assert (
        config.rewards.hpsv3.path == "rewards/hpsv3"
        and config.rewards.videoalign_mq.path == "rewards/videoalign"
    )
    with pytest.raises(
        OSError, match="config.rewards.hpsv3: no rewards/hpsv3.*convert reward hpsv3"
    ):
        rewards.load(config.rewards, rewards.Setting(mesh_of(), config.video.fps))


@pytest.mark.parametrize("family", RECIPES)
def test_reference_sets_the_published_behaviour(family):
    get_config = RECIPES[family].get_config
    plain, every = flatten(get_config()), flatten(get_config("reference"))
    fields = {field for switch in REFERENCE_SWITCHES.values() for field in switch}
    assert {field for field in plain if every[field] != plain[field]} == fields
    two = flatten(get_config("hpsv3,reference=timesteps+context"))
    assert {field for field in plain if two[field] != plain[field]} == {
        "loss.timesteps",
        "loss.context",
    }
    for argument in ("reference", "reference=timesteps+context"):
        validate(get_config(argument), rewards.TABLE, 8, "cpu")


@pytest.mark.parametrize(
    ("recipe", "argument", "expected"),
    [
        (
            longlive,
            "gadro",
            (
                "configs/longlive.py does not know 'gadro'; expected hpsv3, "
                ".*gardo.*lora_init.*devices=N"
            ),
        ),
        (
            self_forcing,
            "lora_init",
            "does not know 'lora_init'; expected hpsv3, multi_reward, paper, devices=N",
        ),
        (longlive, "framewise", "does not know 'framewise'"),
        (longlive, "krea14b_video_hpsv3", "does not know 'krea14b_video_hpsv3'"),
        (longlive, "devices=eight", "does not know 'devices=eight'"),
        (longlive, "rewards=", "does not know 'rewards='"),
        (longlive, "hpsv3,", "does not know ''"),
        (
            longlive,
            "gardo,devices=16",
            "no run gardo,devices=16 was published; there are .*gardo,devices=8|24|48",
        ),
        (
            causal_forcing,
            "ta",
            r"no run ta,devices=8 was published; there are .*; ta,devices=48; paper,devices=8\|16",
        ),
        (longlive, "mq,lora_init", "no run mq,lora_init,devices=8 was published"),
        (longlive, "gardo,mq", "configs/longlive.py:gardo,mq: 'mq' gives variant a second time"),
        (longlive, "longlive_video_mq_16gpu,devices=8", "'devices=8' gives devices a second time"),
        (
            longlive,
            "reference=contxt",
            "unknown reference switch 'contxt'; expected one of context",
        ),
    ],
)
def test_unknown_words_and_unpublished_runs_are_refused_on_one_line(recipe, argument, expected):
    with pytest.raises(ValueError, match=expected) as error:
        recipe.get_config(argument)
    assert "\n" not in str(error.value)


# The same arithmetic on any number of devices.


@pytest.mark.parametrize("name", ROWS)
def test_other_numbers_of_devices_work_on_pieces_that_fit_them(name):
    config = load(name)
    limit, batch = config.mesh.samples_per_device, config.sampler.batch
    for devices in (1, 2, 4, 8, 16, 24, 48):
        refused = (
            f"config.sampler.batch is {batch}; expected a multiple of" if batch % devices else ""
        )
        if name == STREAMING and devices == 24:  # 16 prompts, whose pasts are on one device each
            refused = (
                "config.prompts.prompts_per_epoch is 16; expected a multiple of 24 "
                ".streaming.prompts_per_device on each of"
            )
        if refused:
            with pytest.raises(ValueError, match=refused):
                validate(config, rewards.TABLE, devices, "cpu")
        else:
            validate(config, rewards.TABLE, devices, "cpu")
            size = piece(config, batch, devices)
            assert size <= limit * devices and batch % size == 0 and size % devices == 0
    assert piece(config, batch, int(ROWS[name][0])) == batch


# The programs of every recipe.

# Fields that shape a program; those of the recipes that are alike in them are traced once.
SHAPING = (
    "model.",
    "sampler.steps",
    "video.",
    "lora.rank",
    "lora.dtype",
    "loss.context",
    "loss.mask",
    "mesh.samples",
    "streaming.",
)
VARIANTS = {name: (family_of(name), name) for name in ROWS}
VARIANTS |= {
    f"{family}:{words}": (family, words)
    for family in RECIPES
    for words in ("paper,devices=48", "reference")
}
VARIANTS |= {"causal_forcing:framewise": ("causal_forcing", "framewise")}
TRACED = {}
# streaming, with an adapter; the others are slow
QUICK = {"longlive_video_hpsv3_streaming_with_lora_init"}


@pytest.fixture(scope="module", autouse=True)
def nets_are_described_once():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bases, "shapes", functools.cache(bases.shapes))
        yield


@pytest.mark.parametrize(
    "family, argument",
    [
        pytest.param(*variant, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, variant in VARIANTS.items()
    ],
)
def test_every_recipe_is_planned(family, argument):
    """Validated for its own devices, and its programs traced on them."""
    config = RECIPES[family].get_config(argument)
    devices = plan.planned_devices(config)
    run = plan.abstract_run(config, devices)
    rows = report.describe(run, str(devices))
    assert f"{config.mesh.samples_per_device} per device" in rows["pieces"] and not report.warnings(
        run
    )
    key = tuple(str(value) for field, value in flatten(config).items() if field.startswith(SHAPING))
    if key not in TRACED:
        TRACED[key] = plan.trace(run)
    block = config.model.block
    latents, frames = (
        (block, 4) if config.streaming.window else (run.latent_shape[0], config.video.frames)
    )
    assert TRACED[key]["rollout"].shape[1:] == (latents, *run.latent_shape[1:])
    assert TRACED[key]["decoder"].shape[1:] == (frames, 480, 832, 3)


@pytest.mark.parametrize(
    "family, argument",
    [
        ("self_forcing", ""),
        ("longlive", "streaming"),
        pytest.param("causal_forcing", "framewise", marks=pytest.mark.slow),
        pytest.param("longlive", "", marks=pytest.mark.slow),
        pytest.param("causal_forcing", "", marks=pytest.mark.slow),
        pytest.param("krea14b", "", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_program_lowers_for_a_tpu(family, argument):
    """Attention is its Pallas kernel there, in the rollout and in the update's backward pass."""
    jax.clear_caches()  # what was traced for a CPU would be taken
    config = RECIPES[family].get_config(argument)
    run = plan.abstract_run(config, plan.planned_devices(config))
    kernels = {}
    with (
        backend.planned("tpu"),
        jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh),
        jax.default_matmul_precision("float32"),
    ):
        for program in plan.programs(run):
            traced = jax.jit(program.function).trace(*program.arguments)
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
            kernels |= dict.fromkeys(program.outputs, text.count("tpu_custom_call"))
    assert kernels.pop("text encoder") == 0  # it adds a bias to its scores
    assert all(kernels.values()), kernels
    assert kernels["train step"] > kernels["rollout"]
