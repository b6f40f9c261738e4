"""f_*: losses and their gradients, selective KL and its controllers, advantages, decays and
averages.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import advantages, losses, update
from tests.golden.entry import CONVERSION, EXACT, TABLE, Entries, Entry
from tests.golden.files import GoldenFile

EMA_CAP = 0.9
KL_THRESHOLD, KL_MAX_EPOCHS = 0.15, 15  # the reference's starting threshold and its forced reset


def entries(file: GoldenFile) -> Entries:
    for case in file.groups("loss/"):
        yield _loss(file, case)
    for case in file.groups("selkl/"):
        yield _selective_kl(file, case)
    if file.keys("adv/"):
        yield _advantages(file)
    for key in file.keys("decay/type"):
        yield Entry(
            key, lambda key=key: _old_decays(key.rpartition("/")[2], file["decay/step"]), TABLE
        )
    for case in file.groups("ema/"):
        yield _ema(file, case)
    for kind in file.groups("old_update/"):
        yield _old_update(file, kind)


def objective(x0, old, forward, reference, r, mask, settings: dict) -> dict:
    """Every term of the published loss of one microbatch; `settings` names beta, kl_beta and
    select_kl.
    """
    restrained = mask if settings["select_kl"] else np.ones(len(r), bool)
    terms = losses.objective(
        losses.Coefficients("astrolabe", settings["beta"], settings["kl_beta"]),
        losses.Predictions(x0, forward, old, reference),
        r,
        losses.kl_weights(restrained),
    )
    means = {name: values.mean() for name, values in terms.items()}
    return means | {
        "loss": means["total_loss"],
        "loss_pos": terms["positive_loss"],
        "loss_neg": terms["negative_loss"],
    }


def _loss(file: GoldenFile, case: str) -> Iterator[Entry]:
    prefix, settings = f"loss/{case}/", file.config[case]
    names = ("x0", "old", "forward", "ref")
    x0, old, forward, reference = (jnp.asarray(file[prefix + name]) for name in names)
    mask = file[prefix + "reward_mask"]
    optimality = advantages.optimality(file[prefix + "advantages"], settings["adv_clip_max"])
    r = jnp.asarray(optimality, jnp.float32)

    def terms(forward):
        return objective(x0, old, forward, reference, r, mask, settings)

    results = functools.cache(lambda: terms(forward) | {"r": optimality})
    yield Entry(
        f"{prefix}grad_forward", lambda: jax.grad(lambda f: terms(f)["loss"])(forward), CONVERSION
    )
    for key in file.keys(prefix):
        name = key.rpartition("/")[2]
        if name not in (*names, "advantages", "reward_mask", "grad_forward"):
            yield Entry(key, lambda name=name: results()[name], CONVERSION)


def _selective_kl(file: GoldenFile, case: str) -> Iterator[Entry]:
    prefix, settings = f"selkl/{case}/", file.config[f"selkl_{case}"]
    results = functools.cache(lambda: _controllers(file, prefix, settings))
    inputs = {"rewards", "reward_keys", "kl"}
    exact = {"mask", "refreshed", "reset_after", "prev_epoch"}
    for name in inputs:
        file[prefix + name]
    for key in file.keys(prefix):
        name = key.removeprefix(prefix)
        if name not in inputs:
            yield Entry(key, lambda name=name: results()[name], EXACT if name in exact else TABLE)


def _controllers(file: GoldenFile, prefix: str, settings: dict) -> dict[str, np.ndarray]:
    """All epochs in the order of the training loop: reset test, ranks, risk, mask, then the
    optimizer steps.
    """
    risk, reset = advantages.RiskState(), advantages.ResetState(KL_THRESHOLD)
    rows = []
    for epoch, ranks in enumerate(_rank_discrepancies(file, prefix, settings)):
        reset, refreshed = advantages.start_epoch(reset, epoch, KL_MAX_EPOCHS, "published")
        row = {"refreshed": refreshed, "thres": reset.threshold, "prev_epoch": reset.previous}
        risk, row["risk_mean"] = advantages.update_risk(risk, ranks)
        row["mask"], row["threshold"] = advantages.risk_mask(ranks, risk.ratio)
        for kl in file[f"{prefix}kl"][epoch]:
            reset = advantages.after_step(reset, kl)
        rows.append(row | {"rank_diff": ranks, "beta": risk.ratio, "reset_after": reset.pending})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _rank_discrepancies(file: GoldenFile, prefix: str, settings: dict) -> np.ndarray:
    """[epoch, sample]: the main reward's rank against the mean rank of the first two others, in the
    file's order.

    The MANIFEST gives rewards as [epoch, key, sample], the recorded files hold [key, epoch,
    sample]. With as many epochs as keys the sizes do not tell which; the stored ranks do.
    """
    rewards, keys, main = (
        file[f"{prefix}rewards"],
        file[f"{prefix}reward_keys"].tolist(),
        settings["main_reward"],
    )
    sizes = (settings["epochs"], len(keys), settings["samples"])
    names = [main, *[name for name in keys if name not in (main, "avg")][:2]]

    def ranks(reading):
        epochs = [{name: epoch[keys.index(name)] for name in names} for epoch in reading]
        return np.stack(
            [advantages.rank_discrepancy(scores, main, "published") for scores in epochs]
        )

    readings = [
        ranks(reading) for reading in (rewards, rewards.swapaxes(0, 1)) if reading.shape == sizes
    ]
    if not readings:
        raise ValueError(
            f"{prefix}rewards is {rewards.shape}, expected {sizes}: epochs, keys, samples"
        )
    if len(readings) == 1:
        return readings[0]
    return min(readings, key=lambda reading: np.abs(reading - file[f"{prefix}rank_diff"]).max())


def _advantages(file: GoldenFile) -> Iterator[Entry]:
    rewards = file["adv/rewards"]
    _, groups = np.unique(file["adv/prompts"], return_inverse=True)
    metrics = advantages.statistics(rewards, groups)
    tops = [metrics[f"top_{share}"] for share in advantages.TOP_SHARES]
    results = {
        "advantages_global_std_True": lambda: advantages.normalise(rewards, groups, "global"),
        "advantages_global_std_False": lambda: advantages.normalise(rewards, groups, "prompt"),
        "no_tracking": lambda: advantages.normalise(rewards, np.arange(len(rewards)), "global"),
        "mean_top": lambda: tops,
        "stats": lambda: [metrics["group_size"], metrics["groups"]],
        "zero_std_ratio_and_mean_std": lambda: [metrics["zero_std_ratio"], metrics["group_std"]],
    }
    for name, compute in results.items():
        yield Entry(f"adv/{name}", compute, CONVERSION)


def _old_decays(kind: str, steps: np.ndarray) -> list[float]:
    return [update.old_decay(kind, int(step), constant=0.0) for step in steps]


def _ema(file: GoldenFile, case: str) -> Iterator[Entry]:
    prefix, start = f"ema/{case}/", int(case.removeprefix("start"))
    params, steps = file[f"{prefix}params"], np.arange(len(file[f"{prefix}params"]))
    initial = jnp.asarray(file[f"{prefix}init"])

    def averages():
        mean, rows = initial, []
        for step in steps:
            mean = jnp.asarray(params[step]) if step == start else mean
            mean = update.average(mean, jnp.asarray(params[step]), update.ema_decay(step, EMA_CAP))
            rows.append(mean)
        return np.stack(rows)

    yield Entry(f"{prefix}ema", averages, CONVERSION)
    yield Entry(f"{prefix}decay", lambda: update.ema_decay(steps, EMA_CAP), TABLE)


def _old_update(file: GoldenFile, kind: str) -> Iterator[Entry]:
    prefix = f"old_update/{kind}/"
    initial, steps, sources = (file[prefix + name] for name in ("old_init", "global_step", "src"))

    def averages():
        old, rows = jnp.asarray(initial), []
        for decay, source in zip(_old_decays(kind, steps), sources, strict=True):
            old = update.average(old, jnp.asarray(source), decay)
            rows.append(old)
        return np.stack(rows)

    yield Entry(f"{prefix}old", averages, CONVERSION)
