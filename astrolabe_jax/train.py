"""The conductor: one training iteration is the chain of stages in `_epoch`, from prompts to update.

Everything an epoch does derives from (seed, epoch) and the state before it, so that a run that was
stopped or killed goes on from its last checkpoint exactly as if nothing had happened.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import advantages as adv
from astrolabe_jax import checkpoint, prompts, report, segments, sharding
from astrolabe_jax.config import repeats, samples
from astrolabe_jax.convert.lora import save_peft
from astrolabe_jax.evaluate import ceiling, evaluate, held_out
from astrolabe_jax.generate import Texts, encode_texts, generate, joined
from astrolabe_jax.prepare import Run
from astrolabe_jax.report import Metrics, Progress, say
from astrolabe_jax.rewards.registry import RewardError
from astrolabe_jax.runtime import multihost
from astrolabe_jax.runtime.files import read_json
from astrolabe_jax.runtime.preemption import Stopped
from astrolabe_jax.types import Evaluation, PromptBatch, Purpose
from astrolabe_jax.update import (
    Samples,
    TrainState,
    TrainStep,
    blend_old,
    init_state,
    old_decay,
    reset_reference,
    update,
)


class Point(NamedTuple):
    """Where a run stands between two epochs: all that a checkpoint holds."""

    epoch: int  # finished ones
    state: TrainState
    risk: adv.RiskState  # controllers of the selective KL
    reset: adv.ResetState
    seconds: dict[str, float]  # spent so far, by phase
    # progressive streams at the next epoch's window, one set for each round
    streams: list[segments.Streams] = []


class Drawn(NamedTuple):
    """An epoch's videos."""

    latents: jax.Array  # [N, F, C, H, W]
    scores: dict[str, np.ndarray]  # [N] of every reward and its parts
    texts: Texts
    work: Callable | None = None  # parts of a microbatch, see update.update
    # progressive streams: (policy, total reward [N]) -> those of the next epoch
    go_on: Callable | None = None


# A number that is not finite, named with its sample, or a file that cannot be read or written, such
# as on a full disk: the run ends, its last checkpoint stays as it is.
REFUSED = (FloatingPointError, RewardError, OSError)


def resume(run: Run) -> Point:
    """The last checkpoint, or the beginning. Raises ValueError if there is one that this run cannot
    go on from.
    """
    state = init_state(run.config, run.adapter, run.mesh)
    found = checkpoint.restore(
        run.workdir, lambda epoch: _saved(state, _stream_shapes(run, epoch)), run.identity
    )
    if found is None:
        return Point(0, state, adv.RiskState(), adv.ResetState(run.config.kl.reset_threshold), {})
    if found.epoch > run.config.train.epochs:
        raise ValueError(
            f"config.train.epochs is {run.config.train.epochs}, but the run in {run.workdir} has a "
            f"checkpoint of epoch {found.epoch}; give at least as many epochs, or another --workdir"
        )
    risk, reset = adv.RiskState(**found.progress["risk"]), adv.ResetState(**found.progress["reset"])
    state = found.state["train"]
    streams = segments.dealt(run, found.state.get("streams"))
    return Point(found.epoch, state, risk, reset, found.progress["seconds"], streams)


def _saved(state: TrainState, streams: segments.Streams | None) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"train": state} | ({} if streams is None else {"streams": streams})


def _stream_shapes(run: Run, epoch: int) -> segments.Streams | None:
    """Of the progressive streams that a checkpoint after so many epochs holds."""
    if not run.starts or run.config.streaming.mode != "progressive":
        return None
    return segments.shapes(run, segments.begins_at(run, epoch), progressive=True)


def train(run: Run, point: Point, check: Callable[[], None]) -> dict[str, Any] | None:
    """Runs from `point` to the last epoch and its report: the content of summary.json.

    `check` is called before every phase; when it raises Stopped, the run saves and None is
    returned. Raises REFUSED.
    """
    config, count = run.config, run.config.train.epochs
    say(report.opening(run))
    for line in report.warnings(run):
        say(line)
    if point.epoch:
        say(f"going on after epoch {point.epoch} of {count}")
    began = saved = point.epoch
    progress = Progress(point.seconds, check)
    metrics = Metrics(
        run.workdir, point.epoch, lambda record: _still_holds(run, record, point.epoch)
    )
    step = TrainStep(config, run.base.transformer.graphdef, run.layout, run.mesh)
    try:
        _say_what_is_lost(run, point.epoch, metrics)
        _measure_ceiling(run, metrics, progress)
        _evaluate_if_due(run, 0, sharding.replicate(run.mesh, run.adapter), metrics, progress)
        while True:
            _evaluate_if_due(run, point.epoch, _policy(run, point.state), metrics, progress)
            if point.epoch >= count:
                break
            point, record = _epoch(run, point, step, progress)
            metrics.add(record)
            progress.epoch(record, count, progress.lasted.get("evaluation", 0.0))
            if _to_be_saved(config, point):
                with progress.phase("checkpoint"):
                    saved = _save(run, point, progress)
        summary = multihost.by_first(lambda: _finished(run)) if began == count else None
        summary = summary or _finish(run, point, metrics, progress)
        say(report.closing(run.workdir, summary))
        return summary
    except Stopped as stopped:
        if saved != point.epoch:
            _save(run, point, progress)
        say(f"{stopped}: saved after epoch {point.epoch} of {count}; run the same command to go on")
        return None
    finally:
        metrics.close()
        run.panel.settle()


def _epoch(
    run: Run, point: Point, step: Callable, progress: Progress
) -> tuple[Point, dict[str, Any]]:
    """One iteration: the point after it, and its record. Up to the update nothing is changed."""
    config, (epoch, state, risk, reset, *_) = run.config, point
    progress.take()
    wanted, number = config.prompts, segments.drawing(run, epoch)
    batch = prompts.draw(
        run.train_prompts,
        config.seed,
        number,
        wanted.prompts_per_epoch,
        wanted.samples_per_prompt,
        repeats(config),
    )
    loss_noise = prompts.sample_keys(batch, config.seed, Purpose.LOSS, epoch)
    drawn = (_segment if run.starts else _videos)(run, point, batch, progress)
    rewards = {name: drawn.scores[name] for name in config.rewards}
    result = adv.advantages(config, rewards, batch.index)
    risk, mask, record = _kl_mask(config, rewards, risk)
    with progress.phase("update"):
        if config.kl.kind == "selective" and config.loss.kl_weight > 0:
            reset, now = adv.start_epoch(
                reset, epoch, config.kl.reset_epochs, config.kl.reset_bounds
            )
            state = reset_reference(state) if now else state
            record["reference_reset"] = int(now)
        texts = drawn.texts
        learnt = Samples(drawn.latents, result.r, mask, texts.row, loss_noise, texts.embeddings)
        steps = []
        params = run.base.transformer.params
        for after, figures in update(
            step, config, run.mesh, state, params, learnt, epoch, drawn.work
        ):
            state, reset = after, adv.after_step(reset, figures["kl_loss"])
            steps.append(figures)
        taken = int(state.step)
        settings = config.optimizer
        state = blend_old(state, old_decay(settings.old_decay, taken, settings.old_decay_constant))
        streams = drawn.go_on(state.old, result.total) if drawn.go_on else []
    distinct = len(set(batch.index.tolist()))
    record = {
        "kind": "epoch",
        "epoch": epoch + 1,
        "step": taken,
        **{name: float(np.mean([figures[name] for figures in steps])) for name in steps[0]},
        "total_reward": float(result.total.mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in rewards.items()},
        **{
            f"part/{name}": float(values.mean())
            for name, values in drawn.scores.items()
            if name not in rewards
        },
        **result.metrics,
        "trained_prompt_num": min(len(run.train_prompts), distinct * (number + 1)),
        **({"window_start": segments.begins_at(run, epoch)} if run.starts else {}),
        **record,
        "seconds": progress.take(),
    }
    table = _table(batch, rewards, result)
    multihost.by_first(lambda: report.write_scores(run.workdir, epoch + 1, table))
    return Point(epoch + 1, state, risk, reset, dict(progress.seconds), streams), record


def _table(
    batch: PromptBatch, rewards: Mapping[str, np.ndarray], result: adv.Advantages
) -> dict[str, np.ndarray]:
    """Of every sample: the line of its prompt, its rewards, raw and standardised (/z), and what
    follows from them.
    """
    table = {"prompt": batch.index, "candidate": batch.candidate, **rewards}
    table |= {f"{name}/z": values for name, values in adv.standardise(rewards).items()}
    return table | {"total": result.total, "advantage": result.advantage, "optimality": result.r}


def _videos(run: Run, point: Point, batch: PromptBatch, progress: Progress) -> Drawn:
    """Whole videos."""
    texts = encode_texts(run, batch, progress)
    keys = prompts.sample_keys(batch, run.config.seed, Purpose.ROLLOUT, point.epoch)

    def sample():
        what = f"epoch {point.epoch + 1}: sampling batch"
        videos = [
            (v.latents, v.scores)
            for v in generate(run, point.state.old, batch, texts, keys, progress, what)
        ]
        latents = jnp.concatenate([latents for latents, _ in videos])
        return {"latents": latents}, joined([scores for _, scores in videos]), None

    shape = (len(batch.texts), *run.latent_shape)
    arrays, scores, _ = _kept_or(run, point, sample, {"latents": _of_samples(run, shape)}, progress)
    return Drawn(arrays["latents"], scores, texts)


def _segment(run: Run, point: Point, batch: PromptBatch, progress: Progress) -> Drawn:
    """Windows of long videos, behind a past that the videos of a prompt share (spec/streaming.md
    5).
    """
    config, streaming, start = (
        run.config,
        run.config.streaming,
        segments.begins_at(run, point.epoch),
    )
    keys = prompts.sample_keys(batch, config.seed, Purpose.ROLLOUT, point.epoch)
    cast = segments.cast_of(run, batch, keys, run.latent_shape[0], progress)
    own_pasts = streaming.mode == "epoch" and streaming.sampling == "clip" and start > 0

    def sample():
        what = f"epoch {point.epoch + 1}: sampling window {start}"
        made = segments.sample(
            run, point.state.old, batch, cast, start, point.streams, progress, what
        )
        arrays = {"latents": made.latents}
        if own_pasts:
            arrays |= {"streams": segments.gathered(run, made.pasts.streams)}
            arrays |= {"whole": made.pasts.whole} if made.pasts.whole else {}
        return arrays, made.scores, made.pasts

    frames = start + streaming.window if streaming.sampling == "sequence" else streaming.window
    template = {"latents": _of_samples(run, (len(batch.texts), frames, *run.latent_shape[1:]))}
    if own_pasts:
        template |= {"streams": segments.shapes(run, start, progressive=False)}
        template |= (
            {"whole": segments.whole_shapes(run, start)} if streaming.backprop == "full" else {}
        )
    arrays, scores, pasts = _kept_or(run, point, sample, template, progress)
    if pasts is None and own_pasts:
        pasts = segments.Pasts(segments.dealt(run, arrays["streams"]), arrays.get("whole", []))
    elif pasts is None:
        pasts = segments.untouched(run, point.state.old, cast, batch, start, point.streams)
    # As many texts as prompts, whatever other scenes their stories have: one shape, one program.
    _, first, row = np.unique(batch.index, return_index=True, return_inverse=True)
    told = np.array([cast.rows[prompt] for prompt in cast.at(start // run.layout.block)])
    texts = Texts(cast.embeddings[told[first]], row.astype(np.int32))
    segment = segments.Segment(arrays["latents"], scores, pasts)

    def go_on(policy, total):
        return segments.go_on(run, policy, batch, cast, segment, total, point.epoch)

    work = functools.partial(segments.work_on, run, cast, pasts, start)
    return Drawn(segment.latents, scores, texts, work, go_on)


def _of_samples(run: Run, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(run.mesh))


def _kept_or(
    run: Run,
    point: Point,
    sample: Callable[[], tuple[dict, dict, Any]],
    template: dict,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """Arrays and scores {name: [N]} of an epoch's videos: those that a killed run has saved, or
    sampled now.

    The third is what `sample` gives besides, which is not saved; None with saved ones.
    """
    place = (run.workdir, point.epoch)
    if run.config.train.save_samples:
        found = checkpoint.restore_samples(*place, template, point.state.old, run.identity)
        if found is not None:
            say(f"epoch {point.epoch + 1} goes on with the samples that were saved")
            return (
                found.state,
                {name: np.array(values, np.float32) for name, values in found.progress.items()},
                None,
            )
    arrays, scores, rest = sample()
    if run.config.train.save_samples:
        with progress.phase("save samples"):
            listed = {name: values.tolist() for name, values in scores.items()}
            size = checkpoint.save_samples(*place, arrays, listed, point.state.old, run.identity)
        progress.takes("an epoch's samples", size, run.workdir / checkpoint.SAMPLES)
    return arrays, scores, rest


def _kl_mask(
    config: ConfigDict, rewards: Mapping[str, np.ndarray], risk: adv.RiskState
) -> tuple[adv.RiskState, np.ndarray, dict[str, float]]:
    """The risk controller after this epoch, which samples the KL restrains, bool [N], and figures
    (objective.md 7).
    """
    if config.kl.kind == "uniform":
        return risk, np.ones(samples(config), bool), {}
    discrepancy = adv.rank_discrepancy(rewards, config.kl.main_reward, config.kl.rank_direction)
    risk, value = adv.update_risk(risk, discrepancy)
    mask, threshold = adv.risk_mask(discrepancy, risk.ratio)
    return (
        risk,
        mask,
        {
            "risk": value,
            "risk_ratio": risk.ratio,
            "risk_threshold": threshold,
            "masked": int(mask.sum()),
        },
    )


def _save(run: Run, point: Point, progress: Progress) -> int:
    record = {
        "risk": point.risk._asdict(),
        "reset": point.reset._asdict(),
        "seconds": progress.seconds,
    }
    keep = run.config.train.checkpoints_kept
    saved = _saved(point.state, segments.gathered(run, point.streams))
    size = checkpoint.save(run.workdir, point.epoch, saved, record, run.identity, keep)
    progress.takes("a checkpoint", size, run.workdir / checkpoint.CHECKPOINTS)
    return point.epoch


def _to_be_saved(config: ConfigDict, point: Point) -> bool:
    """Whether a checkpoint follows; progressive streams are saved at their end, with streaming.save
    'full' always.
    """
    if point.epoch == config.train.epochs:
        return True
    held_back = point.streams and config.streaming.save == "sequence_end"
    return point.epoch % config.train.checkpoint_every == 0 and not held_back


def _due(run: Run, epoch: int) -> bool:
    every = run.config.train.eval_every
    return epoch in (0, run.config.train.epochs) or bool(every and epoch % every == 0)


def _still_holds(run: Run, record: Mapping[str, Any], epoch: int) -> bool:
    """Whether a record of metrics.jsonl belongs to the run as it goes on after `epoch`."""
    return record["epoch"] <= epoch and (
        record["kind"] != "evaluation" or _due(run, record["epoch"])
    )


def _say_what_is_lost(run: Run, epoch: int, metrics: Metrics) -> None:
    """Names the records up to `epoch` that a damaged metrics.jsonl lacks. Ceiling and first
    evaluation return.
    """
    if not epoch:
        return
    there = {(record["kind"], record["epoch"]) for record in metrics.records}
    lost = {
        kind: [e for e in range(1, epoch + 1) if (kind, e) not in there]
        for kind in ("epoch", "evaluation")
    }
    lost["evaluation"] = [e for e in lost["evaluation"] if e < epoch and _due(run, e)]
    parts = [f"{kind} {report.spans(epochs)}" for kind, epochs in lost.items() if epochs]
    path = run.workdir / "metrics.jsonl"
    if parts:
        say(
            f"{path} has lost the records of {' and of '.join(parts)}: curves.png will lack them, "
            "training does not"
        )
    if ("evaluation", 0) not in there:
        say(f"{path} has lost the evaluation before training: it is measured again")


def _evaluations(metrics: Metrics, kind: str = "evaluation") -> dict[int, Evaluation]:
    """Evaluations made so far, by epoch, bit for bit as they were measured."""
    return {
        record["epoch"]: {name: np.array(values) for name, values in record["videos"].items()}
        for record in metrics.records
        if record["kind"] == kind
    }


def _add_evaluation(metrics: Metrics, kind: str, epoch: int, result: Evaluation) -> None:
    videos = {name: values.tolist() for name, values in result.items()}
    metrics.add({"kind": kind, "epoch": epoch, "eval": report.table(result), "videos": videos})


def _measure_ceiling(run: Run, metrics: Metrics, progress: Progress) -> None:
    if _evaluations(metrics, "ceiling"):
        return
    with progress.within("ceiling"):
        result = ceiling(run, progress)
    if result is not None:
        _add_evaluation(metrics, "ceiling", 0, result)
        say(report.evaluation_line("ceiling (real videos through the VAE)", result))


def _policy(run: Run, state: TrainState) -> dict:
    return state.ema if run.config.eval.policy == "ema" else state.current


def _evaluate_if_due(
    run: Run, epoch: int, policy: dict, metrics: Metrics, progress: Progress
) -> None:
    if not _due(run, epoch) or epoch in _evaluations(metrics):
        return
    with progress.within("evaluation"):
        result, frames = evaluate(run, policy, progress, f"evaluation after epoch {epoch}: batch")
    name = {0: "before", run.config.train.epochs: "after"}.get(epoch)
    if name:
        place = run.workdir / "samples" / name
        multihost.by_first(lambda: report.write_samples(place, frames, run.config.video.fps))
    _add_evaluation(metrics, "evaluation", epoch, result)
    say(report.evaluation_line(f"evaluation {name or f'after epoch {epoch}'}", result))


def _finished(run: Run) -> dict[str, Any] | None:
    """The summary of a run that had reached its end before, with the seconds that it took then."""
    try:
        summary = read_json(run.workdir / "summary.json")
    except (FileNotFoundError, ValueError):  # it is made again
        return None
    return summary if summary.get("epochs") == run.config.train.epochs else None


def _finish(run: Run, point: Point, metrics: Metrics, progress: Progress) -> dict[str, Any]:
    """Everything that is made once, at the end."""
    held = _evaluations(metrics)
    evaluations = {"before": held[0], "after": held[point.epoch]}
    adapter = sharding.to_host(_policy(run, point.state))
    real = _evaluations(metrics, "ceiling")

    def write():
        save_peft(adapter, run.workdir / "lora", run.config.lora.rank, run.config.lora.alpha)
        report.write_contact_sheet(run.workdir, run.config.name, held_out(run), evaluations)
        report.write_curves(run.workdir, metrics.records)
        everything = evaluations | ({"ceiling": real[0]} if 0 in real else {})
        return report.write_summary(run.workdir, run.config, everything, progress.seconds)

    return multihost.by_first(write)
