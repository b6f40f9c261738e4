"""plan.py describes the run that run.py would make, without its files."""

import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from astrolabe_jax import cost, estimate, plan, report, sharding, train
from astrolabe_jax.arithmetic import samples
from astrolabe_jax.config import get_config
from astrolabe_jax.decode import decode_video
from astrolabe_jax.rewards import registry
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime.preemption import Stopped
from astrolabe_jax.streaming import streams, windows
from configs import self_forcing
from tests.e2e import runs
from tests.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh.fsdp": 4, "prompts.encoder": "host"},
        {"sampler.batch": 16, "mesh.samples_per_device": 1},
        runs.PROGRESSIVE,
    ],
)
def test_it_describes_what_a_run_says_of_itself(base, tmp_path, changes):
    config = runs.small_config(base, **changes | {"prompts.prompts_per_epoch": 4})
    run = prepare(config, tmp_path / "run")
    planned = plan.abstract_run(config, jax.device_count())
    assert report.memory(planned) == report.memory(run)
    rows = report.describe(planned, "8")
    wanted = report.describe(run, "8")
    unknown = {"epoch": f" of {len(run.train_prompts)}", "run": f" of {len(run.test_prompts)}"}
    assert rows == {
        name: text.replace(unknown.get(name, "\0"), "") for name, text in wanted.items()
    }


def test_the_traced_programs_are_those_of_an_epoch(base, tmp_path):
    """The shapes of the plan are those that an epoch hands from stage to stage."""
    config = runs.small_config(
        base, **{"optimizer.steps_per_pass": 2, "optimizer.microbatch": 4, "mesh.fsdp": 2}
    )
    with pytest.raises(
        ValueError, match="config.optimizer.microbatch is 4; expected a multiple of the 8 devices"
    ):
        plan.abstract_run(config, 8)
    shapes = plan.trace(plan.abstract_run(config, 4))
    want = {
        "text encoder": ((8, 16, 16), "float32"),
        "rollout": ((8, 2, 4, 2, 2), "float32"),
        "decoder": ((8, 5, 16, 16, 3), "uint8"),
        "train step": ((4,), "float32"),
    }
    assert {name: (out.shape, str(out.dtype)) for name, out in shapes.items()} == want


@pytest.mark.parametrize(
    ("changes", "past", "pixels"),
    [
        ({}, 2, 4),
        pytest.param(*({"streaming.prefix": "per_policy"}, 2, 4), marks=pytest.mark.slow),
        pytest.param(
            *({"streaming.backprop": "full", "streaming.reward": "window_alone"}, 2, 1),
            marks=pytest.mark.slow,
        ),
        ({"streaming.sampling": "sequence"}, 4, 1),
        pytest.param(
            *({"streaming.sampling": "sequence", "streaming.backprop": "full"}, 4, 1),
            marks=pytest.mark.slow,
        ),
        ({"streaming.mode": "progressive", "loss.context": "noisy"}, 2, 4),
    ],
    ids=str,
)
def test_the_traced_programs_of_windows(base, changes, past, pixels):
    """A block of the streams (of sequences, those of an update), of what forks from them, and the
    train step.
    """
    fields = runs.WINDOWS | {"sampler.batch": 8, "optimizer.microbatch": 4} | changes
    shapes = plan.trace(plan.abstract_run(runs.small_config(base, **fields), 2))
    want = {
        "text encoder": ((8, 16, 16), "float32"),
        "past": ((past, 1, 4, 2, 2), "float32"),
        "rollout": ((8, 1, 4, 2, 2), "float32"),
        "decoder": ((8, pixels, 16, 16, 3), "uint8"),
        "train step": ((8,), "float32"),
    }
    assert {name: (out.shape, str(out.dtype)) for name, out in shapes.items()} == want


def test_the_memory_of_streams_is_that_of_their_arrays(base, tmp_path):
    """Two pasts, and four videos that fork from them; on two devices."""
    config = runs.small_config(
        base, **runs.WINDOWS | {"sampler.batch": 4, "optimizer.microbatch": 4}
    )
    run = runs.prepared(config, tmp_path / "run", 2)
    latents = np.zeros((2, 1, *run.latent_shape[1:]), np.float32)
    with jax.set_mesh(run.mesh):
        past = windows.begin(run, 2, run.latent_shape[0])
        _, decoder = decode_video(run.base.vae, sharding.place_batch(latents), None, 1)
        past = past._replace(decoder=decoder)
        both = [past, streams.fork(past, 2)]

    def held(trees):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trees))

    assert report.memory(run)["cache"] == held([state.cache for state in both])
    assert report.memory(run)["decoder"] == held([state.decoder for state in both])


def test_another_number_of_videos_is_said_once(base, tmp_path, capsys):
    config = runs.small_config(
        base, **{"prompts.tuned_for": 384, "train.epochs": 1, "eval.videos": 2}
    )
    run = prepare(config, tmp_path / "run")
    assert report.warnings(run)[0].startswith(
        "warning: an epoch has 8 videos, the recipe's 384: its learning rate"
    )

    def stopped():
        raise Stopped("enough")

    assert train.train(run, train.resume(run), stopped) is None
    assert capsys.readouterr().out.count("warning: ") == 1
    for fine in (0, 8):
        assert not report.warnings(
            run._replace(config=runs.small_config(base, **{"prompts.tuned_for": fine}))
        )


def program(*flags):
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "astrolabe_jax.plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_program_plans_without_files():
    done = program(
        "--config=configs/longlive.py:longlive_video_mq_16gpu,reference=context", "--devices=4"
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "plan of longlive_video_mq_16gpu\n" in done.stdout
    for part in (
        (
            "transformer 1.42 B (30 layers of 1536), text encoder 5.68 B, VAE 127 M parameters; "
            "bfloat16"
        ),
        "LoRA of rank 256, 350 M parameters",
        "noisy context",
        "256 videos (16 prompts, 16 each)",
        "32 of 8 videos to sample, 2 per device; 32 of 8 for the gradient of a step, 2 per device",
        "4, planned; data 4 x fsdp 1",
        "traced the rollout: float32 [8, 21, 16, 60, 104]",
        "traced the decoder: uint8 [8, 81, 480, 832, 3]",
        "traced the train step: float32 [16]",
    ):
        assert part in done.stdout, part


def test_the_size_of_streams_in_checkpoints_is_printed(base, capsys):
    config = runs.small_config(base, **runs.PROGRESSIVE)
    run_main(config=config, devices=2)
    assert re.search(
        "a checkpoint with streams in the middle takes \\d+ MiB more", capsys.readouterr().out
    )


def run_main(**given):
    values = {"config": None, "devices": None, "on": "", "price": 0.0, "json": None} | given
    plan.main({name: types.SimpleNamespace(value=value) for name, value in values.items()})


def test_it_says_whether_a_run_fits_and_what_it_takes(base, tmp_path, capsys, monkeypatch):
    config = runs.small_config(base, **{"mesh.samples_per_device": 4})
    run_main(config=config, on="h100:2", price=3.0, json=str(tmp_path / "a.json"))
    told = capsys.readouterr().out
    written = json.loads((tmp_path / "a.json").read_text())
    assert list(plan.told(written)) == told.splitlines()[-4:] and written["cost"] > 0
    assert "rewards of an epoch: not counted: shapes_mq, shapes_ta, shapes_vq" in told
    assert "2 x h100: fits, at most 0.0 of 79.2 GiB on a device" in told
    assert re.search(r"an epoch, without rewards: encode .* rollout .* decode .* update", told)
    assert re.search(r"4 epochs without evaluations: 0\.0 h, .* at 3 an hour", told)
    device = estimate.DEVICES["h100"]
    with_less, found = plan.fitting(config, device, 2)
    assert not with_less and found.fits
    small = device._replace(memory=0.99 * found.peak)
    settings, smaller = plan.fitting(config, small, 2)
    assert settings and smaller.fits and smaller.peak < small.memory
    for field in settings:  # each of them is needed
        fewer = {name: value for name, value in settings.items() if name != field}
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(fewer)
        assert not plan.estimated(plan.planned_on(changed, small, 2), small).fits
    monkeypatch.setitem(estimate.DEVICES, "h100", small)
    run_main(config=config, on="h100:2")
    flags = " ".join(f"--config.{field}={value}" for field, value in settings.items())
    assert "does not fit, at most 0.0 of 0.0 GiB" in (told := capsys.readouterr().out)
    assert f"fits with {flags}: " in told and "an epoch so, without rewards: " in told
    tiny = device._replace(memory=1.0)
    everything, _ = plan.fitting(config, tiny, 2)
    config.mesh.data = 2  # beside which there is no fsdp
    assert everything.keys() - plan.fitting(config, tiny, 2)[0].keys() == {"mesh.fsdp"}
    monkeypatch.setitem(estimate.DEVICES, "h100", device._replace(memory=1.0))
    run_main(config=config, on="h100:2")
    assert "take more devices, or larger ones" in capsys.readouterr().out


def test_more_devices_share_an_epoch(base):
    """Each does the same at once, less often."""
    device = estimate.DEVICES["v5p"]
    config = runs.small_config(base, **{"mesh.samples_per_device": 1})
    one, four = (plan.estimated(plan.planned_on(config, device, count), device) for count in (1, 4))
    for name in ("rollout", "decode", "update"):
        assert four.phases[name].held == one.phases[name].held
        assert four.phases[name].seconds == pytest.approx(one.phases[name].seconds / 4)
    whole = plan.estimated(plan.planned_on(runs.small_config(base), device, 1), device)
    assert whole.phases["update"].held > one.phases["update"].held
    assert whole.phases["update"].operations == pytest.approx(one.phases["update"].operations)


def test_what_is_estimated_of_windows_grows_with_their_past(base):
    device = estimate.DEVICES["h200"]
    takes = []
    for start in (2, 4):
        settings = runs.WINDOWS | {"streaming.selection": "choices", "streaming.starts": (start,)}
        settings |= {"video.frames": 1 + 4 * 7, "prompts.prompts_per_epoch": 1}
        config = runs.small_config(base, **settings | {"prompts.samples_per_prompt": 8})
        takes.append(plan.estimated(plan.planned_on(config, device, 1), device).phases)
    assert takes[1]["past"].operations == pytest.approx(2 * takes[0]["past"].operations)
    assert takes[1]["rollout"].operations == takes[0]["rollout"].operations


@pytest.mark.parametrize(
    ("name", "calls", "pictures"),
    [
        ("hpsv3", 81 / 4, (4, 1, 480, 832, 3)),
        ("videoalign_mq", 1, (1, 10, 480, 832, 3)),
        ("hpsv2", 81 / 32, (32, 480, 832, 3)),
        ("aesthetic", 11 / 32, (32, 480, 832, 3)),
        ("dynamic_degree", 80 / 8, (8, 480, 832, 3)),
    ],
)
def test_rewards_are_counted_at_the_published_sizes_without_their_files(name, calls, pictures):
    clip = registry.Clip(81, 480, 832, 16.0)
    mesh = sharding.abstract_mesh(get_config().mesh, 1)
    ((names, params, work),) = registry.works({name: {"path": "absent"}}, clip, mesh)
    assert names == (name,) and work.calls == pytest.approx(calls)
    assert work.arguments[0].shape == pictures
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.make_jaxpr(jax.jit(work.function))(params, *work.arguments)
    ((_, taken),) = cost.calls(traced)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    # a multiplication and an addition for each weight and token; convolutions have more
    assert taken.products + taken.convolutions > 2 * weights * pictures[0]


def test_rewards_take_as_long_as_measured():
    """HPSv3 takes 8.7 s of a video of 81 frames on one H100."""
    config = self_forcing.get_config("hpsv3")
    device = estimate.DEVICES["h100"]
    found = plan.estimated(plan.planned_on(config, device, 1), device)
    each = found.rewards["hpsv3"].seconds / samples(config)
    assert each == pytest.approx(8.7, rel=0.15)
    eight = plan.estimated(plan.planned_on(config, device, 8), device)
    assert eight.rewards["hpsv3"].seconds == pytest.approx(found.rewards["hpsv3"].seconds / 8)


@pytest.mark.parametrize("on", ["h100", "h100:0", "b200:8", "v5e:4x", "h100:-1", ":8", "h100:8,"])
def test_devices_that_are_not_known_are_refused(base, capsys, on):
    with pytest.raises(SystemExit) as end:
        run_main(config=runs.small_config(base), on=on)
    assert end.value.code == 2
    assert f"error: --on is {on!r}; expected a kind and how many" in capsys.readouterr().err


def refusal(config, devices, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(config=config, devices=devices)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "devices", "expected"),
    [
        ({"base": "nowhere"}, 1, "error: base 'nowhere': nothing is at "),
        ({"video.frames": 6}, 1, "error: config.video.frames is 6; whole blocks"),
        (
            {"model.size": "wan_2b"},
            1,
            "config.model.size is 'wan_2b'; expected one of '', wan_1.3b, wan_14b",
        ),
        ({}, 3, "config.sampler.batch is 8; expected a multiple of the 3 devices"),
        (
            {"mesh.fsdp": 4},
            2,
            "config.mesh has data -1 x fsdp 4; expected their product to be the 2 devices",
        ),
    ],
)
def test_bad_configs_end_with_a_message(base, capsys, changes, devices, expected):
    assert expected in refusal(runs.small_config(**{"base": base} | changes), devices, capsys)


def test_a_word_that_no_recipe_knows_is_one_line_of_the_program():
    done = program("--config=configs/krea14b.py:gadro")
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: configs/krea14b.py does not know 'gadro'; expected hpsv3, multi_reward, paper, "
    )


HUNGRY = """
import resource
import jax.numpy as jnp
from astrolabe_jax.plan import naming_memory
from configs import moving_shapes

config = moving_shapes.get_config()
config.mesh.samples_per_device = 12
jnp.zeros(4).block_until_ready()
(size,) = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = (size << 10) + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
with naming_memory(config):
    try:
        {work}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("work", ["jnp.zeros(1 << 28).block_until_ready()", "bytearray(1 << 30)"])
def test_too_little_memory_is_one_line_with_what_helps(work):
    """On the device, here the host's memory too, and on the host."""
    program = [sys.executable, "-c", HUNGRY.format(work=work)]
    one_device = os.environ | {"XLA_FLAGS": ""}
    ended = subprocess.run(program, capture_output=True, text=True, timeout=100, env=one_device)
    assert ended.returncode == 1, ended.stderr
    told = [line for line in ended.stderr.splitlines() if "error:" in line]
    assert len(told) == 1 and "Traceback" not in ended.stderr
    assert told[0].startswith("error: out of memory: ")
    assert re.search(r"a device holds, in MiB and besides activations, \w+ \d+, ", told[0])
    helps = re.findall(r"config\.([\w.]+)=", told[0])
    assert helps[0] == "mesh.samples_per_device" and "model.param_dtype" in helps


def test_a_file_of_flags_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "flags").write_bytes(b"\xff\xfe")
    for given in (tmp_path / "none", tmp_path / "flags", tmp_path):
        ended = program(f"--flagfile={given}")
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1
        assert ended.stderr.startswith("error: --flagfile: ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": "a.json"}, "--json is about --on; give devices, such as --on=h100:8"),
        ({"price": 2.0}, "--price is about --on; give devices, such as --on=h100:8"),
        ({"price": float("nan"), "on": "h100:2"}, "--price is nan; expected that of a device"),
        (
            {"json": "gone/a.json", "on": "h100:2"},
            "--json: gone/a.json cannot be written .gone takes no files.: No such",
        ),
        ({"json": ".", "on": "h100:2"}, "--json: . is a directory; expected the name of a file"),
    ],
)
def test_flags_that_cannot_be_are_refused_first(base, capsys, monkeypatch, given, expected):
    monkeypatch.setattr(plan, "abstract_run", None)
    with pytest.raises(SystemExit) as end:
        run_main(config=runs.small_config(base), **given)
    assert end.value.code == 2 and re.search(expected, capsys.readouterr().err)
