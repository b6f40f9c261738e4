"""fh_*: one optimizer step of the published training loop, from two microbatches to the blended
behaviour policy.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from astrolabe_jax import advantages, losses, update
from astrolabe_jax.config import get_config
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.schedule import T_MAX, add_noise
from tests.adapters import from_peft, to_peft
from tests.golden.dit import Dit, to_x0, training_layout
from tests.golden.entry import CONVERSION, FORWARD, Entries, Entry, Tolerance
from tests.golden.files import GoldenFile

GRADIENT = Tolerance(2e-5, "array")  # gradients are far smaller than activations
TINY_GRADIENT = 1e-7  # below it, rounding decides the direction of an AdamW step (MANIFEST)
INPUTS = ("x0", "noise", "prompt_embeds", "advantages", "t", "xt", "reward_mask")


class Variant(NamedTuple):
    """One variant of the file: the forward and the config that its settings ask for, and where it
    starts.
    """

    config: ConfigDict
    forward: update.TrainingForward
    params: dict
    state: update.TrainState
    micros: list[dict]  # the stored inputs of each microbatch, with r and kl_weight


def entries(file: GoldenFile) -> Entries:
    dit = Dit(file)
    for name, settings in file.config["variants"].items():
        yield _variant_entries(file, dit, name, settings)


def _variant_entries(file: GoldenFile, dit: Dit, name: str, settings: dict) -> Iterator[Entry]:
    variant = _variant(file, dit, name, settings)
    micros = range(len(variant.micros))
    differentiate = jax.jit(jax.grad(functools.partial(_objective, variant), has_aux=True))
    result = functools.cache(lambda i: differentiate(variant.state.current, variant.micros[i]))
    for i in micros:
        yield from _micro_entries(f"{name}/micro{i}/", variant, i, lambda i=i: result(i)[1])
    yield from _step_entries(file, name, variant, lambda: [result(i)[0] for i in micros])


def _variant(file: GoldenFile, dit: Dit, name: str, settings: dict) -> Variant:
    stored, rank = file.config, file.config["lora"]["r"]
    config = _config(stored, name)
    shapes = adapter_shapes(dit.config, rank)
    initial = {
        policy: from_peft(file.under(f"init/{policy}/"), shapes) for policy in file.groups("init/")
    }
    current, old = initial["default"], initial["old"]
    optimizer = update.make_optimizer(config)
    step = jnp.asarray(file[f"{name}/global_step"], jnp.int32)
    micros = [
        {key: file[f"{name}/micro{i}/{key}"] for key in INPUTS}
        for i in range(stored["accumulation"])
    ]
    for micro in micros:
        mask = micro["reward_mask"] if settings["select_kl"] else np.ones(len(micro["x0"]), bool)
        micro["kl_weight"] = losses.kl_weights(mask)
        micro["r"] = advantages.optimality(micro["advantages"], config.advantages.clip)
    layout = training_layout(settings["mask_block"], -1, micros[0]["x0"].shape[1])
    forward = update.training_forward(config, dit.graphdef, layout)
    state = update.TrainState(current, old, current, current, optimizer.init(current), step)
    variant = Variant(config, forward, dit.params, state, micros)
    if settings["select_kl"]:
        candidates = [initial["old_ref"]] if "old_ref" in initial else [current, old]
    else:  # the base without an adapter: one that adds nothing
        candidates = [jax.tree.map(jnp.zeros_like, current)]
    # The format does not say which of the initial adapters `old_ref` copies; a stored prediction
    # does.
    for i in range(len(micros)):
        if len(candidates) > 1 and f"{name}/micro{i}/ref_pred" in file:
            want = file[f"{name}/micro{i}/ref_pred"]
            candidates = [
                min(
                    candidates,
                    key=lambda adapter: np.abs(_prediction(variant, adapter, i) - want).max(),
                )
            ]
    return variant._replace(state=state._replace(reference=candidates[0]))


def _config(stored: dict, variant: str) -> ConfigDict:
    """The settings of a run that takes this step."""
    config = get_config()
    fields = {
        "loss.mix_beta": stored["beta"],
        "loss.kl_weight": stored["kl_beta"][variant],
        "loss.context": "noisy",
        "loss.mask_block": stored["variants"][variant]["mask_block"],
        "loss.mask_sink": False,
        "advantages.clip": float(stored["adv_clip_max"]),
        "sampler.shift": stored["shift"],
        "sampler.sigma_source": "lookup",
        "lora.rank": stored["lora"]["r"],
        "lora.alpha": float(stored["lora"]["alpha"]),
        "optimizer.learning_rate": stored["lr"],
        "optimizer.b1": stored["betas"][0],
        "optimizer.b2": stored["betas"][1],
        "optimizer.eps": stored["eps"],
        "optimizer.weight_decay": stored["weight_decay"],
        "optimizer.clip_norm": float(stored["max_grad_norm"]),
        "optimizer.ema_cap": stored["ema_decay"],
        "optimizer.old_decay": f"type{stored['decay_type']}",
    }
    config.update_from_flattened_dict(fields)
    return config


def _micro_entries(
    prefix: str, variant: Variant, i: int, terms: Callable[[], dict]
) -> Iterator[Entry]:
    micro, state = variant.micros[i], variant.state
    yield Entry(
        f"{prefix}xt",
        lambda: add_noise(micro["x0"], micro["noise"], micro["t"] / T_MAX),
        CONVERSION,
    )
    for name, adapter in (("old", state.old), ("forward", state.current), ("ref", state.reference)):
        yield Entry(f"{prefix}{name}_pred", lambda a=adapter: _prediction(variant, a, i), FORWARD)
    for name, term in (
        ("loss", "total_loss"),
        ("policy_loss", "policy_loss"),
        ("kl_loss", "kl_loss"),
    ):
        yield Entry(f"{prefix}{name}", lambda term=term: terms()[term].mean(), FORWARD)


def _step_entries(
    file: GoldenFile, name: str, variant: Variant, gradients: Callable[[], list]
) -> Iterator[Entry]:
    state, config = variant.state, variant.config

    @functools.cache
    def gradient():
        # The script divides every loss by the number of microbatches it accumulates.
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients())

    @functools.cache
    def after():
        norm, optimizer = optax.tree.norm(gradient()), update.make_optimizer(config)
        new = update.apply_gradient(config, optimizer, state, gradient(), norm)
        decay = update.old_decay(
            config.optimizer.old_decay, int(new.step), config.optimizer.old_decay_constant
        )
        return new._replace(old=update.average(new.old, new.current, decay))

    yield Entry(f"{name}/grad_norm", lambda: optax.tree.norm(gradient()), GRADIENT)
    yield Entry(f"{name}/grad/", lambda: to_peft(gradient()), GRADIENT)

    def adapter_after(group: str, field: str):
        ours, want = to_peft(getattr(after(), field)), file.under(f"{name}/{group}/")
        # the stored ones, where there are any
        gradients = to_peft(gradient()) | file.under(f"{name}/grad/")
        settled = {
            key: _settled(ours[key], want[key], gradients[key], config.optimizer.learning_rate)
            for key in ours.keys() & want.keys()
        }
        return ours | settled

    for group, field in (("default_after", "current"), ("ema_after", "ema"), ("old_after", "old")):
        yield Entry(
            f"{name}/{group}/",
            lambda group=group, field=field: adapter_after(group, field),
            FORWARD,
        )


def _settled(ours, want, gradient, rate):
    """Ours, but for the elements whose AdamW step is rounding noise: there any result within two
    steps is right.
    """
    noise = (np.abs(gradient) < TINY_GRADIENT) & (np.abs(ours - want) <= 2 * rate)
    return np.where(noise, want, ours)


def _objective(variant: Variant, current: dict, micro: dict) -> tuple[jax.Array, dict]:
    """The loss of a microbatch and update.sample_terms, with the stored noise in place of drawn
    noise.
    """
    samples = jnp.arange(len(micro["x0"]))
    batch = update.StepBatch(
        latents=micro["x0"],
        r=micro["r"].astype(jnp.float32),
        kl_weight=micro["kl_weight"],
        prompt=samples,
        t=jnp.full(samples.shape, micro["t"], jnp.float32),
        key=samples,
    )
    objective = update.Objective(
        variant.config, variant.forward, lambda sample, shape: micro["noise"][sample]
    )
    terms = update.sample_terms(
        objective,
        variant.state._replace(current=current),
        variant.params,
        micro["prompt_embeds"],
        batch,
    )
    return terms["total_loss"].mean(), terms


def _prediction(variant: Variant, adapter: dict, i: int):
    """Clean latents that the policy `adapter` predicts from the stored noisy latents of microbatch
    i.
    """
    micro = variant.micros[i]
    t = jnp.full(len(micro["x0"]), micro["t"], jnp.float32)
    velocity = _velocity(
        variant.forward,
        variant.params,
        adapter,
        micro["prompt_embeds"],
        micro["x0"],
        micro["xt"],
        t,
    )
    return to_x0(micro["xt"], velocity, t, variant.config.sampler.shift)


@functools.partial(jax.jit, static_argnums=0)
def _velocity(forward: update.TrainingForward, params, adapter, text, x0, x_t, t):
    return forward.velocity(params, adapter, text, x0, x_t, t)
