"""What is measured of a recipe: pieces like those of its epochs, by the stages themselves."""

import json
import re
import subprocess
import sys
import types

import pytest

from astrolabe_jax import bench, plan, sharding
from astrolabe_jax.arithmetic import piece, rounds, samples, shares_prefix
from astrolabe_jax.train import RunState
from configs import krea14b, longlive, self_forcing
from tests.e2e import runs
from tests.e2e.test_processes import environment_of, free_port


@pytest.mark.parametrize(
    "config",
    [
        self_forcing.get_config("hpsv3"),
        self_forcing.get_config("paper"),
        longlive.get_config("streaming"),
        krea14b.get_config("hpsv3"),
    ],
    ids=lambda config: config.name,
)
def test_the_smallest_epoch_has_the_pieces_of_the_whole_one(config):
    devices = plan.planned_devices(config)
    small = bench.smallest_epoch(config, devices, (39,))
    for of_both in (
        lambda c: piece(c, c.sampler.batch, devices),
        lambda c: piece(c, c.optimizer.microbatch, devices),
        shares_prefix,
    ):
        assert of_both(small) == of_both(config)
    mesh = sharding.abstract_mesh(config.mesh, devices)
    whole = plan.shapes_of(config, mesh)
    run = plan.shapes_of(small, mesh)
    assert run.latent_shape[1:] == whole.latent_shape[1:] and run.window == whole.window
    often = bench.repetitions(config, run)
    assert often["rollout"] * samples(small) == samples(config) > samples(small)
    assert often["update"] == config.optimizer.inner_epochs * often["rollout"]
    if shares_prefix(config):
        assert rounds(small, devices)[0] == 1 and run.starts == (39,)
        mean = sum(whole.starts) / len(whole.starts)
        assert often["past"] == pytest.approx(rounds(config, devices)[0] * mean / 39)


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({}, ("rollout", "decode", "update")),
        pytest.param(
            *(runs.WINDOWS | {"mesh.fsdp": 2}, ("past", "rollout", "decode", "update")),
            marks=pytest.mark.slow,
        ),
        pytest.param(*(runs.PROGRESSIVE, ("rollout", "decode", "update")), marks=pytest.mark.slow),
        pytest.param(
            *(runs.WINDOWS | {"streaming.sampling": "sequence"}, ("rollout", "decode", "update")),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_all_stages_are_measured(base, tmp_path, capsys, changes, phases):
    config = runs.small_config(base, **changes)
    with config.unlocked():
        config.rewards.hpsv3 = {"weight": 1.0, "path": str(tmp_path / "absent")}
    found = json.loads(json.dumps(bench.measure(config, tmp_path)))
    assert found["devices"] == 8 and found["epoch"].keys() == set(phases)
    for figure in found["epoch"].values():
        assert figure["seconds"] > 0 and figure["times"] > 0 and 0 < figure["share_of_rate"] < 1
    block = found["block"]
    later = block["later"]["transformer"] + block["later"]["vae"]
    rates = block["frames_per_second"]
    stride = 4  # of the VAE: a later block of one latent frame has as many frames
    assert rates["with_vae"] == pytest.approx(stride * block["videos"] / later)
    assert rates["transformer"] > rates["with_vae"]
    assert list(found["rewards"]) == ["shapes_mq + shapes_ta + shapes_vq"]
    (fault,) = found["rewards_left_out"]
    assert "config.rewards.hpsv3" in fault and "absent" in fault
    assert found["checkpoint"]["bytes"] > 0 and not list(tmp_path.iterdir())
    told = dict(bench.rows(found))
    assert re.fullmatch(r"\d+ videos? in .* s, \d+ % of the products' rate", told["update"])
    assert told["left out"] == fault and "of the transformer alone" in told["frames/s"]


def test_the_second_time_counts(base, monkeypatch):
    """The first update compiles; only the other one is in the figures."""
    numbers = []

    def learned(run, before: RunState, *_):
        numbers.append(before.epoch)
        return before.train, before.reset, {}

    def collected(run, adapter, videos, start, begun, progress, label):
        with progress.phase("rollout" if numbers else "first"):
            return types.SimpleNamespace()

    monkeypatch.setattr(bench.train, "learn", learned)
    monkeypatch.setattr(bench.train, "samples_of", lambda *_: None)
    monkeypatch.setattr(bench.windows, "collect", collected)
    run = bench.random_run(runs.small_config(base))
    state = bench.init_state(run.config, run.adapter, run.mesh)
    _, seconds, _ = bench.measure_epoch(run, bench.random_videos(run), state)
    assert numbers == [0, 1] and seconds.keys() == {"rollout", "update"}


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"sampler.batch": 7}, {}, "config.sampler.batch is 7"),
        (
            {},
            {"directory": "gone"},
            "--directory: gone cannot be written .gone takes no files",
        ),
        ({}, {"json": "gone/a.json"}, "--json: gone/a.json cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    base, capsys, monkeypatch, changes, given, expected
):
    def holder(value):
        return types.SimpleNamespace(value=value)

    monkeypatch.setattr(bench, "_random", None)
    values = {"config": runs.small_config(base, **changes), "directory": None, "json": None}
    alone = tuple(map(holder, (False, None, None, None, 300.0)))
    with pytest.raises(SystemExit) as ended:
        bench.main({name: holder(value) for name, value in (values | given).items()}, alone)
    assert ended.value.code == 2 and re.search(expected, capsys.readouterr().err)


def fails(frames, prompts):
    raise ValueError("no taste")


def test_a_reward_that_fails_is_left_out(base):
    config = runs.small_config(base)
    with config.unlocked():
        config.rewards.mine = {"weight": 1.0, "load": "tests.e2e.test_bench:fails"}
    mesh = sharding.make_mesh(config.mesh)
    figures, left_out = bench.measure_rewards(config, mesh)
    assert list(figures) == ["shapes_mq + shapes_ta + shapes_vq"]
    assert (
        len(left_out) == 1
        and "reward 'mine' failed on samples 0 to 7: ValueError: no taste" in (left_out[0])
    )


@pytest.mark.slow
def test_two_processes_measure_together(base, tmp_path, environment):
    port = free_port()
    command = [sys.executable, "-m", "astrolabe_jax.bench", *runs.flags(base)]
    started = [
        subprocess.Popen(
            [
                *command,
                f"--json={tmp_path / 'figures.json'}",
                f"--coordinator=127.0.0.1:{port}",
                "--processes=2",
                f"--process={i}",
            ],
            env=environment_of(environment, 2),
            cwd=runs.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [runs.finish(process) for process in started]
    assert [status for status, _, _ in outputs] == [0, 0], outputs
    assert "4 x cpu in 2 processes" in outputs[0][1] and "bench of" not in outputs[1][1]
    assert json.loads((tmp_path / "figures.json").read_text())["processes"] == 2
