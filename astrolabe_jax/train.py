"""The conductor: one training iteration is the chain of stages in `epoch`, from prompts to update.

    prompts -> encode -> rollout -> decode -> rewards -> advantages -> losses, update -> checkpoint
                        `------- per piece ------'

Everything an epoch does derives from (seed, epoch) and the state before it, so that a run that was
stopped or killed goes on from its last checkpoint exactly as if nothing had happened
(docs/architecture.md).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import advantages, checkpoint, evaluate, prompts, report, sharding
from astrolabe_jax.arithmetic import repeats, samples
from astrolabe_jax.convert.lora import save_peft
from astrolabe_jax.rewards.registry import RewardError
from astrolabe_jax.run import Run
from astrolabe_jax.runtime import files, multihost, preemption
from astrolabe_jax.runtime.metrics import Metrics
from astrolabe_jax.runtime.progress import Progress, counted, log, warn
from astrolabe_jax.streaming import streams, windows
from astrolabe_jax.types import (
    Evaluation,
    PromptBatch,
    RngStream,
    Samples,
    Segment,
    StreamState,
    TrainState,
    VideoBatch,
)
from astrolabe_jax.update import (
    TrainStep,
    blend_old,
    init_state,
    old_decay,
    reset_reference,
    teaches,
    update,
)


class RunState(NamedTuple):
    """Where a run stands between two epochs: all that a checkpoint holds."""

    epoch: int  # finished ones
    train: TrainState
    risk: advantages.RiskState  # controllers of the selective KL
    reset: advantages.ResetState
    seconds: dict[str, float]  # spent so far, by phase
    # progressive streams at the next epoch's window, one set a round
    streams: list[StreamState] = []


# A number that is not finite, named with its sample, a reward that failed, or a file that cannot be
# read or written, such as on a full disk: the run ends.
REFUSED = (FloatingPointError, RewardError, OSError)


def epoch(
    run: Run, state: RunState, step: TrainStep, progress: Progress
) -> tuple[RunState, dict[str, Any]]:
    """Run one training iteration: return the state after it and its record.

    Up to the update nothing is changed.
    """
    config = run.config
    number = state.epoch
    progress.take()
    # prompts
    batch = draw_prompts(run, number)
    # encode
    videos = windows.encode_videos(
        run, batch, RngStream.ROLLOUT, number, run.latent_shape[0], progress
    )
    # rollout, decode, rewards: piece by piece, so that scoring overlaps sampling
    segment = collect_or_restore(run, state, videos, progress)
    # advantages
    rewards = {name: segment.scores[name] for name in config.rewards}
    result = advantages.advantages(config, rewards, batch.index)
    risk, mask, figures = kl_mask(config, rewards, state.risk)
    # losses, update
    with progress.phase("update"):
        learn_from = samples_of(run, segment, result, mask, number)
        train, reset, metrics = learn(run, state, step, learn_from, segment, progress.check)
        following = windows.continue_streams(run, train.old, segment, result.advantage, number)
    # checkpoint: `train` saves the state that comes back
    record = {
        "kind": "epoch",
        "epoch": number + 1,
        "step": int(train.step),
        **metrics,
        **reward_figures(rewards, segment, result),
        "trained_prompt_num": trained_prompts(run, batch, number),
        "window_start": segment.start,
        **figures,
        "seconds": progress.take(),
    }
    table = score_table(segment, rewards, result)
    _write(run, lambda: report.write_scores(run.workdir, number + 1, table))
    return RunState(number + 1, train, risk, reset, dict(progress.seconds), following), record


def draw_prompts(run: Run, number: int) -> PromptBatch:
    """Return the videos that epoch `number` asks for."""
    settings = run.config.prompts
    return prompts.draw(
        run.train_prompts,
        run.config.seed,
        windows.prompt_draw(run, number),
        settings.prompts_per_epoch,
        settings.samples_per_prompt,
        repeats(run.config),
    )


def collect_or_restore(
    run: Run, state: RunState, videos: VideoBatch, progress: Progress
) -> Segment:
    """Return the segment of an epoch: sampled now, or what a killed run has saved of it."""
    start = windows.window_start(run, state.epoch)
    old = state.train.old
    if run.config.train.save_samples:
        found = checkpoint.restore_samples(
            run.workdir, state.epoch, windows.segment_shapes(run, start), old, run.fingerprint
        )
        if found is not None:
            log(f"epoch {state.epoch + 1} goes on with the samples that were saved")
            scores = {k: np.array(values, np.float32) for k, values in found.progress.items()}
            return windows.restore_segment(
                run, old, videos, start, state.streams, (found.state, scores)
            )
    segment = windows.collect(
        run, old, videos, start, state.streams, progress, f"epoch {state.epoch + 1}: sampling"
    )
    if run.config.train.save_samples:
        _write(run, lambda: None)
        with progress.phase("save samples"):
            scores = {name: values.tolist() for name, values in segment.scores.items()}
            sampled = checkpoint.Snapshot(state.epoch, windows.segment_arrays(run, segment), scores)
            size = checkpoint.save_samples(run.workdir, sampled, old, run.fingerprint)
        progress.takes("an epoch's samples", size, run.workdir / checkpoint.SAMPLES)
    return segment


def kl_mask(
    config: ConfigDict, rewards: Mapping[str, np.ndarray], risk: advantages.RiskState
) -> tuple[advantages.RiskState, np.ndarray, dict[str, float]]:
    """Return the risk controller after this epoch, which samples the KL restrains, and figures.

    The samples are bool [N] (docs/objective.md, Selective KL).
    """
    if config.kl.kind == "uniform":
        return risk, np.ones(samples(config), bool), {}
    discrepancy = advantages.rank_discrepancy(
        rewards, config.kl.main_reward, config.kl.rank_direction
    )
    risk, value = advantages.update_risk(risk, discrepancy)
    mask, threshold = advantages.risk_mask(discrepancy, risk.ratio)
    figures = {
        "risk": value,
        "risk_ratio": risk.ratio,
        "risk_threshold": threshold,
        "masked": int(mask.sum()),
    }
    return risk, mask, figures


def samples_of(
    run: Run, segment: Segment, result: advantages.Advantages, mask: np.ndarray, number: int
) -> Samples:
    """Return what the update of epoch `number` learns from.

    There is one text per prompt, whatever other scenes its video has, so one compiled program
    serves every epoch.
    """
    videos = segment.videos
    _, first, row = np.unique(videos.batch.index, return_index=True, return_inverse=True)
    texts = videos.prompts_at(streams.block_at(videos, segment.start))
    return Samples(
        segment.latents,
        result.r,
        mask,
        row.astype(np.int32),
        prompts.sample_keys(videos.batch, run.config.seed, RngStream.LOSS, number),
        videos.embeddings[np.array([videos.rows[texts[i]] for i in first])],
    )


def learn(
    run: Run,
    state: RunState,
    step: TrainStep,
    learn_from: Samples,
    segment: Segment,
    check: Callable[[], None] = lambda: None,
) -> tuple[TrainState, advantages.ResetState, dict[str, float]]:
    """Take the optimizer steps of an epoch: return the state, the reset controller, and metrics.

    The metrics are means over the steps. The memory of `state.train` is taken. `check` is called
    before every piece of a step, and may raise.
    """

    def parts(*microbatch):
        for part in windows.loss_parts(run, segment, *microbatch):
            check()
            yield part

    config = run.config
    train = state.train
    reset = state.reset
    figures = {}
    if config.kl.kind == "selective" and config.loss.kl_weight > 0:
        reset, due = advantages.start_epoch(
            reset, state.epoch, config.kl.reset_epochs, config.kl.reset_bounds
        )
        train = reset_reference(train) if due else train
        figures["reference_reset"] = int(due)
    if not teaches(learn_from):
        warn(
            f"epoch {state.epoch + 1}: no video is scored higher than another of its "
            "prompt; nothing was learnt, no step is taken"
        )
    steps = []
    for after, metrics in update(
        step,
        train,
        run.base.transformer.params,
        learn_from,
        state.epoch,
        parts,
    ):
        train = after
        reset = advantages.after_step(reset, metrics["kl_loss"])
        steps.append(metrics)
    means = {name: float(np.mean([metrics[name] for metrics in steps])) for name in steps[0]}
    if teaches(learn_from):
        settings = config.optimizer
        decay = old_decay(settings.old_decay, int(train.step), settings.old_decay_constant)
        train = blend_old(train, decay)
    return train, reset, means | figures


def reward_figures(
    rewards: Mapping[str, np.ndarray], segment: Segment, result: advantages.Advantages
) -> dict[str, float]:
    """Return the mean rewards of an epoch, of their parts, and what is logged of the groups."""
    return {
        "total_reward": float(result.total.mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in rewards.items()},
        **{
            f"part/{name}": float(values.mean())
            for name, values in segment.scores.items()
            if name not in rewards
        },
        **result.metrics,
    }


def trained_prompts(run: Run, batch: PromptBatch, number: int) -> int:
    """Return the number of prompts that were trained on so far."""
    distinct = len(set(batch.index.tolist()))
    return min(len(run.train_prompts), distinct * (windows.prompt_draw(run, number) + 1))


def score_table(
    segment: Segment, rewards: Mapping[str, np.ndarray], result: advantages.Advantages
) -> dict[str, np.ndarray]:
    """Return columns [N]: line of the prompt, rewards, raw and standardised (/z), and advantage."""
    batch = segment.videos.batch
    return {
        "prompt": batch.index,
        "candidate": batch.candidate,
        **rewards,
        **{f"{name}/z": values for name, values in advantages.standardise(rewards).items()},
        "total": result.total,
        "advantage": result.advantage,
        "optimality": result.r,
    }


def resume(run: Run) -> RunState:
    """Return the state of the last checkpoint, or the beginning.

    Raises:
      ValueError: if there is a checkpoint that this run cannot go on from.
    """
    train = init_state(run.config, run.adapter, run.mesh)

    def saved(number: int) -> dict[str, Any]:
        if run.config.streaming.mode != "progressive":
            return checkpoint_arrays(train, None)
        start = windows.window_start(run, number)
        return checkpoint_arrays(train, windows.stream_shapes(run, start, progressive=True))

    found = checkpoint.restore(run.workdir, saved, run.fingerprint)
    if found is None:
        return RunState(
            0,
            train,
            advantages.RiskState(),
            advantages.ResetState(run.config.kl.reset_threshold),
            {},
        )
    if found.epoch > run.config.train.epochs:
        raise ValueError(
            f"config.train.epochs is {run.config.train.epochs}, but the run in {run.workdir} has a "
            f"checkpoint of epoch {found.epoch}; give at least as many epochs, or another --workdir"
        )
    return RunState(
        found.epoch,
        found.state["train"],
        advantages.RiskState(**found.progress["risk"]),
        advantages.ResetState(**found.progress["reset"]),
        found.progress["seconds"],
        windows.split_streams(run, found.state.get("streams")),
    )


def checkpoint_arrays(train: TrainState, streams: StreamState | None) -> dict[str, Any]:
    """Return the arrays of a checkpoint."""
    return {"train": train} | ({} if streams is None else {"streams": streams})


def train(run: Run, state: RunState, check: Callable[[], None]) -> dict[str, Any] | None:
    """Run from `state` to the last epoch and its report: return the content of summary.json.

    `check` is called before every phase and between the pieces of a long one; when it raises
    Stopped, the run saves and None is returned. Raises any of the errors in REFUSED.
    """
    count = run.config.train.epochs
    for line in (report.opening(run), *report.warnings(run)):
        log(line)
    saved = state.epoch
    progress = Progress(state.seconds, check)
    metrics = Metrics(run.workdir, state.epoch, functools.partial(_still_holds, run, state.epoch))
    step = TrainStep(run.config, run.base.transformer.graphdef, run.layout, run.mesh)
    try:
        if metrics.dropped and not state.epoch:
            log(
                f"no checkpoint is in {run.workdir}: it begins anew, and makes "
                f"{counted(metrics.dropped, 'epoch')} once more"
            )
        if state.epoch:
            log(f"going on after epoch {state.epoch} of {count}")
            _say_what_is_lost(run, state.epoch, metrics)
        _measure_ceiling(run, metrics, progress)
        _evaluate_if_due(run, 0, None, metrics, progress)
        _evaluate_if_due(run, state.epoch, state.train, metrics, progress)
        summary = multihost.on_primary(lambda: _finished(run)) if state.epoch == count else None
        while state.epoch < count:
            # An update takes the memory of the state that it begins with.
            spare = None
            if saved != state.epoch:
                spare = sharding.copied_to(sharding.HOST_MEMORY, state.train)
            try:
                after, record = epoch(run, state, step, progress)
                metrics.add(record)
            except (preemption.Stopped, *REFUSED):
                kept = spare and sharding.copied_to(sharding.DEVICE_MEMORY, spare)
                state = state._replace(train=kept)
                raise
            state = after
            evaluations = sum(_due(run, number) for number in range(state.epoch, count + 1))
            progress.epoch(record, count, evaluations * progress.lasted.get("evaluation", 0.0))
            if to_be_saved(run, state):
                with progress.phase("checkpoint"):
                    saved = _save(run, state, progress)
            _evaluate_if_due(run, state.epoch, state.train, metrics, progress)
        summary = summary or _finish(run, state, metrics, progress)
        log(report.closing(run.workdir, summary))
        return summary
    except preemption.Stopped as stopped:
        saved = _save_the_last(run, state, saved, progress)
        done = f"saved after epoch {saved} of {count}" if saved else "no epoch was finished"
        log(f"{stopped}: {done}; run the same command to go on")
        return None
    except checkpoint.SaveError:
        raise  # the other processes wait in what this one could not save
    except (RewardError, OSError):
        # what comes before the update, such as a reward server, leaves the state whole
        _write(run, lambda: None)
        try:
            saved = _save_the_last(run, state, saved, progress)
            if saved:
                log(f"saved after epoch {saved} of {count}; run the same command to go on")
        except REFUSED as error:
            log(f"the state after epoch {state.epoch} could not be saved either: {error}")
        raise
    finally:
        metrics.close()
        run.reward_runner.settle(last=True)
        checkpoint.release(run.workdir)


def _save_the_last(run: Run, state: RunState, saved: int, progress: Progress) -> int:
    """Save a run that ends early, if that was not done, and return the epoch of its checkpoint.

    A state whose memory an update has taken cannot be saved.
    """
    arrays = jax.tree.leaves((state.train, state.streams))
    taken = any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in arrays)
    return saved if saved == state.epoch or taken else _save(run, state, progress)


def _save(run: Run, state: RunState, progress: Progress) -> int:
    """Save a checkpoint: return its epoch."""
    record = {
        "risk": state.risk._asdict(),
        "reset": state.reset._asdict(),
        "seconds": progress.seconds,
    }
    arrays = checkpoint_arrays(state.train, windows.merge_streams(run, state.streams))
    _write(run, lambda: None)
    size = checkpoint.save(
        run.workdir,
        checkpoint.Snapshot(state.epoch, arrays, record),
        run.fingerprint,
        run.config.train.checkpoints_kept,
    )
    progress.takes("a checkpoint", size, run.workdir / checkpoint.CHECKPOINTS)
    return state.epoch


def to_be_saved(run: Run, state: RunState) -> bool:
    """Return whether a checkpoint follows: one is due every train.checkpoint_every epochs.

    Where progressive streams are saved at their end alone, it follows at the next end.
    """
    streaming = run.config.streaming
    at_ends = streaming.mode == "progressive" and streaming.save == "sequence_end"
    if at_ends and state.streams and state.epoch != run.config.train.epochs:
        return False
    every = run.config.train.checkpoint_every
    before = state.epoch - (len(run.starts) if at_ends else 1)
    return state.epoch // every > before // every or state.epoch == run.config.train.epochs


def _due(run: Run, number: int) -> bool:
    """Return whether an evaluation follows epoch `number`."""
    every = run.config.train.eval_every
    return number in (0, run.config.train.epochs) or bool(every and number % every == 0)


def _still_holds(run: Run, number: int, record: Mapping[str, Any]) -> bool:
    """Return whether a record of metrics.jsonl belongs to the run as it goes on after `number`."""
    return record["epoch"] <= number and (
        record["kind"] != "evaluation" or _due(run, record["epoch"])
    )


def _say_what_is_lost(run: Run, number: int, metrics: Metrics) -> None:
    """Name the records up to epoch `number` that a damaged metrics.jsonl lacks.

    Ceiling and first evaluation are measured again.
    """
    present = {(record["kind"], record["epoch"]) for record in metrics.records}
    lost = {
        "epoch": [e for e in range(1, number + 1) if ("epoch", e) not in present],
        "evaluation": [
            e for e in range(1, number) if ("evaluation", e) not in present and _due(run, e)
        ],
    }
    parts = [f"{kind} {report.spans(numbers)}" for kind, numbers in lost.items() if numbers]
    path = run.workdir / "metrics.jsonl"
    if parts:
        log(
            f"{path} has lost the records of {' and of '.join(parts)}: curves.png will lack them, "
            "training does not"
        )
    if ("evaluation", 0) not in present:
        log(f"{path} has lost the evaluation before training: it is measured again")


def _evaluations(metrics: Metrics, kind: str = "evaluation") -> dict[int, Evaluation]:
    """Return the evaluations made so far, by epoch, bit for bit as they were measured."""
    return {
        record["epoch"]: {name: np.array(values) for name, values in record["videos"].items()}
        for record in metrics.records
        if record["kind"] == kind
    }


def _add_evaluation(metrics: Metrics, kind: str, number: int, result: Evaluation) -> None:
    metrics.add(
        {
            "kind": kind,
            "epoch": number,
            "eval": report.table(result),
            "videos": {name: values.tolist() for name, values in result.items()},
        }
    )


def _measure_ceiling(run: Run, metrics: Metrics, progress: Progress) -> None:
    """Score real videos once in a run, where there are some."""
    if _evaluations(metrics, "ceiling"):
        return
    with progress.within("ceiling"):
        result = evaluate.ceiling(run, progress)
    if result is not None:
        _add_evaluation(metrics, "ceiling", 0, result)
        log(report.evaluation_line("ceiling (real videos through the VAE)", result))


def _evaluated_policy(run: Run, train: TrainState) -> dict:
    """Return the adapter that is evaluated and exported."""
    return train.ema if run.config.eval.policy == "ema" else train.current


def _evaluate_if_due(
    run: Run, number: int, train: TrainState | None, metrics: Metrics, progress: Progress
) -> None:
    """Evaluate the policy after epoch `number`, unless that is not due or was done before.

    train: the state after it; None: before the first epoch, where all policies are `run.adapter`.
    """
    if not _due(run, number) or number in _evaluations(metrics):
        return
    adapter = (
        _evaluated_policy(run, train) if train else sharding.shard_params(run.mesh, run.adapter)
    )
    with progress.within("evaluation"):
        result, frames = evaluate.evaluate(
            run, adapter, progress, f"evaluation after epoch {number}: batch"
        )
    heading = {0: "before", run.config.train.epochs: "after"}.get(number, f"epoch_{number:06}")
    directory = run.workdir / "samples" / heading
    _write(run, lambda: report.write_samples(directory, frames, run.config.video.fps))
    _add_evaluation(metrics, "evaluation", number, result)
    name = heading if heading in ("before", "after") else f"after epoch {number}"
    log(report.evaluation_line(f"evaluation {name}", result))
    if train and number < run.config.train.epochs:
        _write_results(run, train, metrics, {heading: result})


def _write_results(
    run: Run, train: TrainState, metrics: Metrics, last: Mapping[str, Evaluation]
) -> None:
    """Write adapter, contact sheet and curves; `last` is {folder of samples: evaluation}."""
    adapter = sharding.to_host(_evaluated_policy(run, train))
    evaluations = {"before": _evaluations(metrics)[0], **last}

    def write():
        save_peft(adapter, run.workdir / "lora", run.config.lora.rank, run.config.lora.alpha)
        report.write_contact_sheet(
            run.workdir, run.config.name, evaluate.held_out(run), evaluations
        )
        report.write_curves(run.workdir, metrics.records)

    _write(run, write)


def _finished(run: Run) -> dict[str, Any] | None:
    """Return the summary of a run that had reached its end before, or None."""
    try:
        summary = files.read_json(run.workdir / "summary.json")
    except (FileNotFoundError, ValueError):  # it is made again
        return None
    return summary if summary.get("epochs") == run.config.train.epochs else None


def _write(run: Run, action: Callable[[], Any]) -> Any:
    """Do what writes into the workdir on process 0, and return its result on all.

    Raises OSError if the workdir is not there any more.
    """

    def write() -> Any:
        checkpoint.check_there(run.workdir)
        return action()

    return multihost.on_primary(write)


def _finish(run: Run, state: RunState, metrics: Metrics, progress: Progress) -> dict[str, Any]:
    """Write everything that is made at the end: return the summary."""
    held = _evaluations(metrics)
    real = _evaluations(metrics, "ceiling")
    after = {"after": held[state.epoch]}
    _write_results(run, state.train, metrics, after)
    everything = {"before": held[0]} | after | ({"ceiling": real[0]} if real else {})
    return _write(
        run, lambda: report.write_summary(run.workdir, run.config, everything, progress.seconds)
    )
