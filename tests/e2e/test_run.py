"""A run from beginning to end, its files, and the same run in pieces."""

import json
import os
import shutil
import signal

import av
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from astrolabe_jax import evaluate, report, train
from astrolabe_jax.convert import commands
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime import preemption
from astrolabe_jax.streaming import streams, windows
from tests.e2e import runs


def test_everything_a_person_looks_at_is_there(straight, capsys):
    config, workdir, summary = straight
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for name in ("before", "after"):
        assert set(summary["eval"][name]) == {"shapes_vq", "shapes_mq", "shapes_ta", "total"}
        parts = [summary["eval"][name][reward]["mean"] for reward in config.rewards]
        assert summary["eval"][name]["total"]["mean"] == pytest.approx(sum(parts))
        for i in range(config.eval.shown):
            with av.open(str(workdir / "samples" / name / f"{i:02d}.mp4")) as video:
                stream = video.streams.video[0]
                frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
                assert (
                    stream.codec_context.name == "h264"
                    and stream.codec_context.pix_fmt == "yuv420p"
                )
                assert (
                    stream.average_rate == config.video.fps and len(frames) == config.video.frames
                )
    assert {"jax", "flax", "python", "astrolabe_jax"} <= set(summary["versions"])
    assert summary["seed"] == 0 and summary["config"]["prompts.prompts_per_epoch"] == 2
    assert {"rollout", "decode", "rewards", "update", "evaluation/rollout"} <= set(
        summary["seconds"]
    )
    for name in ("samples/contact_sheet.png", "curves.png"):
        with Image.open(workdir / name) as picture:
            assert min(picture.size) > 200 and np.asarray(picture).std() > 10
    assert len(load_file(workdir / "lora" / "adapter_model.safetensors")) == 2 * 10 * 2
    assert list((workdir / "tensorboard").glob("events.*"))


def test_the_memory_of_the_opening_summary_is_that_of_the_arrays(straight):
    config, workdir, _ = straight
    run = prepare(config, workdir)
    state = runs.resumed(run).train
    sizes = report.memory(run)

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    nets = [net.params for net in (run.base.transformer, run.base.vae, run.base.text)]
    assert sizes["base"] == held(nets)
    assert sizes["four policies"] == held(state[:4])
    assert sizes["optimizer"] == held(state.optimizer) - state.optimizer[0].count.nbytes
    assert str(len(run.train_prompts)) in report.opening(run)


def test_metrics_have_every_quantity_of_the_objective(straight):
    records = [
        json.loads(line) for line in (straight[1] / "metrics.jsonl").read_text().splitlines()
    ]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [(record["epoch"], record["step"]) for record in epochs] == [(i, i) for i in range(1, 5)]
    expected = {
        "total_loss",
        "policy_loss",
        "kl_loss",
        "x0_norm",
        "old_deviate",
        "old_kl_div",
        "kl_div",
        "group_size",
    }
    expected |= {
        "trained_prompt_num",
        "zero_std_ratio",
        "group_std",
        "total_reward",
        "grad_norm",
        "seconds",
    }
    expected |= {f"top_{share}" for share in (100, 75, 50, 25, 10)} | {
        f"reward/{name}" for name in straight[0].rewards
    }
    expected |= {f"part/{name}/visibility" for name in straight[0].rewards}
    for record in epochs:
        assert expected <= set(record)
        assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))
    assert [record["trained_prompt_num"] for record in epochs] == [2, 4, 6, 8]
    # old lags behind from the second epoch on
    assert epochs[0]["old_deviate"] == 0 and epochs[1]["old_deviate"] > 0
    assert [record["epoch"] for record in records if record["kind"] == "evaluation"] == [0, 4]


def test_training_changes_the_policy_and_the_held_out_videos(straight):
    files = runs.outcome(straight[1])["files"]
    assert files["samples/before/00.mp4"] != files["samples/after/00.mp4"]
    assert any(
        tensor.any()
        for name, tensor in load_file(straight[1] / "lora" / "adapter_model.safetensors").items()
        if "lora_B" in name
    )


@pytest.mark.slow
def test_two_epochs_then_four_equal_four_at_once(straight, base, tmp_path):
    config, workdir, _ = straight
    runs.start(runs.small_config(base, **{"train.epochs": 2}), tmp_path / "run")
    runs.start(runs.small_config(base), tmp_path / "run")
    runs.assert_same_run(config, workdir, tmp_path / "run")


def test_a_finished_run_is_not_repeated(straight, base, capsys):
    config, workdir, summary = straight
    before = runs.outcome(workdir)
    again = runs.start(runs.small_config(base), workdir)
    assert again == summary and runs.outcome(workdir) == before
    assert "going on after epoch 4 of 4" in capsys.readouterr().out


def test_lost_metrics_are_named_and_what_can_be_measured_again_is(straight, base, tmp_path, capsys):
    """metrics.jsonl cut off in its first line, and no summary yet: epochs are gone, both
    evaluations come back.
    """
    config, workdir, summary = straight
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "metrics.jsonl").write_bytes((copy / "metrics.jsonl").read_bytes()[:100])
    (copy / "summary.json").unlink()
    again = runs.start(runs.small_config(base), copy)
    out = capsys.readouterr().out
    assert (
        f"{copy}/metrics.jsonl has lost the records of epoch 1-4: curves.png will lack them" in out
    )
    assert (
        f"{copy}/metrics.jsonl has lost the evaluation before training: it is measured again" in out
    )
    assert again["eval"] == summary["eval"] and again["gain"] == summary["gain"]
    made, wanted = runs.outcome(copy), runs.outcome(workdir)
    assert made["files"] == wanted["files"]
    assert made["metrics"] == [
        record for record in wanted["metrics"] if record["kind"] == "evaluation"
    ]


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(straight, base, tmp_path, capsys):
    _, workdir, _ = straight
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="stop"):
        patch.setattr(train.evaluate, "evaluate", stop)
        runs.start(runs.small_config(base), copy)
    told = f"no checkpoint is in {copy}: it begins anew, and makes 4 epochs once more"
    assert told in capsys.readouterr().out


def stop(*_):
    raise OSError("stop")


def test_spoilt_reports_are_made_again(straight, base, tmp_path):
    """A summary that is no JSON, a line of metrics that is no record, and strips that were thrown
    away.
    """
    config, workdir, summary = straight
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "summary.json").write_text("{")
    (copy / "metrics.jsonl").write_text("1\n" + (copy / "metrics.jsonl").read_text())
    shutil.rmtree(copy / "samples" / "before")
    again = runs.start(runs.small_config(base), copy)
    assert (
        again["eval"] == summary["eval"] == json.loads((copy / "summary.json").read_text())["eval"]
    )


def test_only_lost_records_are_named(straight, base, tmp_path, capsys):
    config, workdir, _ = straight
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(True)
    kept = [line for line in lines if json.loads(line)["epoch"] != 2]
    runs.start(config, copy)
    assert "has lost" not in capsys.readouterr().out
    (copy / "metrics.jsonl").write_text("".join(kept))
    often = runs.small_config(base, **{"train.eval_every": 1})
    runs.go_on(prepare(config, copy)._replace(config=often), lambda: None)
    assert (
        "lost the records of epoch 2 and of evaluation 1-3: curves.png" in capsys.readouterr().out
    )


def test_there_is_no_ceiling_for_videos_of_another_size_than_the_real_ones(base, tmp_path, capsys):
    run = runs.prepared(runs.small_config(base, **{"eval.ceiling": True}), tmp_path / "run")
    assert evaluate.ceiling(run, runs.quiet()) is None
    told = "real videos are 48x48, those of the run 16x16: there is no ceiling"
    assert told in capsys.readouterr().out


def test_an_evaluation_in_between_leaves_all_that_the_last_one_does(base, tmp_path):
    """Videos, sheet, curves and adapter of epoch 1 are there when the run is stopped in epoch 2."""
    config = runs.small_config(base, **{"train.eval_every": 1, "train.epochs": 2})
    workdir = tmp_path / "run"

    def stop_after_the_curves():
        if (workdir / "curves.png").exists():
            raise preemption.Stopped("SIGTERM")

    run = prepare(config, workdir)
    assert runs.go_on(run, stop_after_the_curves) is None
    files = runs.outcome_files(workdir)
    assert files["samples/epoch_000001/00.mp4"] != files["samples/before/00.mp4"]
    assert len([name for name in files if name.startswith("samples/epoch_000001/")]) == 4
    with Image.open(workdir / "samples" / "contact_sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10
    commands.export_lora(workdir, tmp_path / "lora", "peft")
    name = "adapter_model.safetensors"
    assert (tmp_path / "lora" / name).read_bytes() == files[f"lora/{name}"]


# in the evaluation before, in the second epoch, after the last checkpoint
@pytest.mark.parametrize(
    "call", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(
    straight, base, tmp_path, monkeypatch, capsys, call
):
    config, workdir, _ = straight
    score, calls = rewards.score, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM if call == 3 else signal.SIGINT)
        return score(*arguments)

    monkeypatch.setattr(rewards, "score", interrupted)
    assert runs.start(runs.small_config(base), tmp_path / "run") is None
    said = "no epoch was finished" if call == 1 else f"saved after epoch {call - 2} of 4"
    assert said in capsys.readouterr().out
    assert runs.start(runs.small_config(base), tmp_path / "run") is not None
    runs.assert_same_run(config, workdir, tmp_path / "run")


def test_a_signal_between_two_steps_saves_the_state_before_the_update(base, tmp_path, monkeypatch):
    changes = {"optimizer.inner_epochs": 3, "train.epochs": 2}
    config = runs.small_config(base, **changes)
    runs.start(config, tmp_path / "whole")
    cut = windows.loss_parts
    calls = []

    def hung_up(*arguments):
        calls.append(None)
        if len(calls) == 5:  # the second step of the second epoch
            os.kill(os.getpid(), signal.SIGHUP)
        return cut(*arguments)

    monkeypatch.setattr(windows, "loss_parts", hung_up)
    assert runs.start(runs.small_config(base, **changes), tmp_path / "run") is None
    assert len(calls) == 5
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert runs.start(runs.small_config(base, **changes), tmp_path / "run") is not None
    runs.assert_same_run(config, tmp_path / "whole", tmp_path / "run")


def test_the_adapter_of_a_checkpoint_is_the_one_that_the_run_exports(straight, tmp_path):
    _, workdir, _ = straight
    commands.export_lora(workdir, tmp_path / "lora", "peft")
    weights, described = (
        sorted((workdir / "lora").glob(f"*.{kind}"))[0] for kind in ("safetensors", "json")
    )
    assert (tmp_path / "lora" / weights.name).read_bytes() == weights.read_bytes()
    assert json.loads((tmp_path / "lora" / described.name).read_text()) == json.loads(
        described.read_text()
    )


def test_the_seed_changes_every_draw(straight, base, tmp_path):
    run = prepare(straight[0], straight[1])
    runs.start(runs.small_config(base, seed=1, **{"train.epochs": 1}), tmp_path / "run")
    other = prepare(runs.small_config(base, seed=1, **{"train.epochs": 1}), tmp_path / "run")
    assert all(
        not np.array_equal(run.adapter[name]["a"], other.adapter[name]["a"]) for name in run.adapter
    )
    first = [
        outcome["metrics"][0] for outcome in map(runs.outcome, (straight[1], tmp_path / "run"))
    ]
    assert all(
        set(first[0]["videos"][name]).isdisjoint(first[1]["videos"][name])
        for name in ("total", "shapes_ta")
    )
    epochs = [
        outcome["metrics"][1] for outcome in map(runs.outcome, (straight[1], tmp_path / "run"))
    ]
    for name in ("total_reward", "policy_loss", "grad_norm", "x0_norm"):
        assert epochs[0][name] != epochs[1][name]


@pytest.mark.slow
def test_the_published_behaviour_runs(base, tmp_path):
    """Every reference switch at once, with the selective KL, whose controllers survive a resume."""
    changes = {
        "kl.kind": "selective",
        "kl.main_reward": "shapes_vq",
        "loss.kl_weight": 1e-2,
        "kl.reset_epochs": 1,
    }
    changes |= {"sampler.batch": 8, "prompts.prompts_per_epoch": 4, "eval.ceiling": True}
    changes |= {"video.height": 48, "video.width": 48}  # those of real videos
    config = runs.small_config(
        base, "reference", **changes, **{"train.epochs": 3, "train.checkpoint_every": 1}
    )
    summary = runs.start(config, tmp_path / "run")
    records = [
        record for record in runs.outcome(tmp_path / "run")["metrics"] if record["kind"] == "epoch"
    ]
    # both batches of an epoch draw the same two prompts
    assert [record["groups"] for record in records] == [2, 2, 2]
    assert [record["reference_reset"] for record in records] == [0, 0, 1]
    assert all(record["masked"] < 16 and 0.02 <= record["risk_ratio"] <= 0.2 for record in records)
    assert summary["eval"]["ceiling"]["total"]["mean"] > 0
    point = runs.resumed(prepare(config, tmp_path / "run"))
    assert len(point.risk.history) == 3 and point.reset.previous == 2
    assert {str(leaf.dtype) for pair in point.train.current.values() for leaf in pair.values()} == {
        "bfloat16"
    }


def same_reward(frames, prompts):
    """It differs between prompts, never within one."""
    return [len(prompt) / 7 for prompt in prompts]


def test_an_epoch_in_which_nothing_differs_moves_nothing_and_is_told(
    base, tmp_path, monkeypatch, capsys
):
    table = dict(rewards.TABLE, same=rewards.Reward("tests.e2e.test_run:same_reward"))
    monkeypatch.setattr(rewards, "TABLE", table)
    config = runs.small_config(base, **{"train.epochs": 2})
    config.rewards = {"same": 1.0}
    chosen_by = []
    go_on = windows.continue_streams

    def spied(run, adapter, segment, score, number):
        chosen_by.extend(score)
        return go_on(run, adapter, segment, score, number)

    monkeypatch.setattr(windows, "continue_streams", spied)
    summary = runs.start(config, tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(told) == 2 and "epoch 2: no video is scored higher than another" in told[1]
    assert summary["gain"]["total"]["mean"] == 0
    run = prepare(config, tmp_path / "run")
    train_state = jax.device_get(runs.resumed(run).train)
    for policy in train_state[:4]:
        jax.tree.map(np.testing.assert_array_equal, policy, run.adapter)
    assert train_state.step == 0
    # the best video goes on by what is maximised, the advantage, not by the total of raw rewards
    assert chosen_by == [0] * 16


def test_a_number_that_is_not_finite_is_refused_with_its_sample(base, tmp_path, monkeypatch):
    table = dict(rewards.TABLE, odd=rewards.Reward("tests.e2e.test_run:odd_reward"))
    monkeypatch.setattr(rewards, "TABLE", table)
    config = runs.small_config(base, **{"eval.videos": 12})  # a batch of 8, and one of 4
    with config.unlocked():
        config.rewards.odd = 1.0
    with pytest.raises(train.REFUSED, match="reward 'odd' is nan for sample 11 .prompt 'a "):
        runs.start(config, tmp_path / "run")
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("stage", ["collect", "encode_videos"])
def test_a_workdir_that_goes_away_is_named_and_not_made_anew(base, tmp_path, monkeypatch, stage):
    function = getattr(windows, stage)

    def moving(run, *arguments):
        run.workdir.rename(tmp_path / "moved")
        return function(run, *arguments)

    monkeypatch.setattr(windows, stage, moving)
    changes = {"train.save_samples": stage == "encode_videos", "train.checkpoint_every": 1}
    with pytest.raises(OSError, match=f"{tmp_path}/run/run.json has gone while the run went on: "):
        runs.start(runs.small_config(base, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_refused_with_its_sample_and_the_checkpoint_stays(
    straight, base, tmp_path, monkeypatch
):
    config, workdir, _ = straight
    runs.start(runs.small_config(base, **{"train.epochs": 2}), tmp_path / "run")
    collect = windows.collect

    def broken(*arguments):
        segment = collect(*arguments)
        return segment._replace(latents=segment.latents.at[3].set(np.inf))

    monkeypatch.setattr(windows, "collect", broken)
    with pytest.raises(
        train.REFUSED, match="epoch 3, step 1: the loss of 1 of 8 samples .*sample 3: nan"
    ):
        runs.start(runs.small_config(base), tmp_path / "run")
    monkeypatch.undo()
    runs.start(runs.small_config(base), tmp_path / "run")
    runs.assert_same_run(config, workdir, tmp_path / "run")


def test_latents_that_are_not_finite_are_refused_before_they_are_decoded(
    base, tmp_path, monkeypatch
):
    """The second batch of the evaluation is broken in two of its videos, and in one that only fills
    it up.
    """
    sample_blocks = streams.sample_blocks
    calls = []

    def broken(*arguments):
        calls.append(None)
        for block in sample_blocks(*arguments):
            if len(calls) == 2:
                latents = block.latents.at[2, 0, 0, 0, 0].set(np.nan)
                latents = latents.at[3].set(np.inf).at[6].set(np.nan)
                block = block._replace(latents=latents)
            yield block

    monkeypatch.setattr(streams, "sample_blocks", broken)
    config = runs.small_config(base, **{"eval.videos": 12})
    with pytest.raises(
        train.REFUSED,
        match="the latents of sample 10 .prompt 'a .* and those of 1 more are not finite",
    ):
        runs.start(config, tmp_path / "run")
    assert len(calls) == 2 and not (tmp_path / "run" / "samples").exists()


def odd_reward(frames, prompts):
    """Not finite for the last video of a batch of four."""
    values = np.zeros(len(prompts))
    if len(prompts) == 4:
        values[3] = np.nan
    return values
