"""fh_*: one optimiser step of the published training loop, from two microbatches to the blended behaviour policy."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from astrolabe_jax import advantages, losses, update
from astrolabe_jax.config import get_config
from astrolabe_jax.convert.lora import from_peft, to_peft
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.schedule import T_MAX, add_noise
from tests.golden.dit import Dit, to_x0, training_layout
from tests.golden.entry import CONVERSION, FORWARD, Entry, Tolerance
from tests.golden.files import GoldenFile

GRADIENT = Tolerance(2e-5, "array")  # gradients are far smaller than activations
TINY_GRADIENT = 1e-7  # below it, rounding decides the direction of an AdamW step (MANIFEST)
INPUTS = ("x0", "noise", "prompt_embeds", "advantages", "t", "xt", "reward_mask")


class Variant(NamedTuple):
    """One variant of the file: the forward and the config that its settings ask for, and where it starts."""

    config: ConfigDict
    forward: update.Forward
    params: dict
    state: update.TrainState
    micros: list[dict]  # the stored inputs of each microbatch


def entries(file: GoldenFile) -> Iterator[Entry]:
    dit = Dit(file)
    for name, settings in file.config["variants"].items():
        variant = _variant(file, dit, name, settings)
        for i in range(len(variant.micros)):
            yield from _micro_entries(file, f"{name}/micro{i}/", variant, i)
        yield from _step_entries(file, name, variant)


def _variant(file: GoldenFile, dit: Dit, name: str, settings: dict) -> Variant:
    stored, rank = file.config, file.config["lora"]["r"]
    config = _config(stored, name)
    shapes = adapter_shapes(dit.config, rank)
    initial = {policy: from_peft(file.under(f"init/{policy}/"), shapes) for policy in file.groups("init/")}
    current, old = initial["default"], initial["old"]
    optimiser = update.make_optimiser(config)
    step = jnp.asarray(file[f"{name}/global_step"], jnp.int32)
    micros = [{key: file[f"{name}/micro{i}/{key}"] for key in INPUTS} for i in range(stored["accumulation"])]
    for micro in micros:
        mask = micro["reward_mask"] if settings["select_kl"] else np.ones(len(micro["x0"]), bool)
        micro["kl_weight"] = losses.kl_weights(mask)
    layout = training_layout(settings["mask_block"], -1, micros[0]["x0"].shape[1])
    forward = update.training_forward(config, dit.graphdef, layout)
    state = update.TrainState(current, old, current, current, optimiser.init(current), step)
    variant = Variant(config, forward, dit.params, state, micros)
    if settings["select_kl"]:
        candidates = [initial["old_ref"]] if "old_ref" in initial else [current, old]
    else:  # the base without an adapter: one that adds nothing
        candidates = [jax.tree.map(jnp.zeros_like, current)]
    want = file[f"{name}/micro0/ref_pred"]
    # The format does not say which of the initial adapters `old_ref` copies; the stored prediction does.
    gaps = [np.abs(_prediction(variant, adapter, 0) - want).max() for adapter in candidates]
    return variant._replace(state=state._replace(reference=candidates[int(np.argmin(gaps))]))


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
        "optimiser.learning_rate": stored["lr"],
        "optimiser.b1": stored["betas"][0],
        "optimiser.b2": stored["betas"][1],
        "optimiser.eps": stored["eps"],
        "optimiser.weight_decay": stored["weight_decay"],
        "optimiser.clip_norm": float(stored["max_grad_norm"]),
        "optimiser.ema_cap": stored["ema_decay"],
        "optimiser.old_decay": f"type{stored['decay_type']}",
    }
    config.update_from_flattened_dict(fields)
    return config


def _micro_entries(file: GoldenFile, prefix: str, variant: Variant, i: int) -> Iterator[Entry]:
    micro, state = variant.micros[i], variant.state
    yield Entry(f"{prefix}xt", lambda: add_noise(micro["x0"], micro["noise"], micro["t"] / T_MAX), CONVERSION)
    for name, adapter in (("old", state.old), ("forward", state.current), ("ref", state.reference)):
        yield Entry(f"{prefix}{name}_pred", lambda a=adapter: _prediction(variant, a, i), FORWARD)
    terms = functools.cache(lambda: jax.jit(lambda state: _terms(variant, state, i))(state))
    for name, term in (("loss", "total_loss"), ("policy_loss", "policy_loss"), ("kl_loss", "kl_loss")):
        yield Entry(f"{prefix}{name}", lambda term=term: terms()[term].mean(), FORWARD)


def _step_entries(file: GoldenFile, name: str, variant: Variant) -> Iterator[Entry]:
    state, config = variant.state, variant.config

    @functools.cache
    def gradient():
        def objective(current):
            here = state._replace(current=current)
            return sum(_terms(variant, here, i)["total_loss"].mean() for i in range(len(variant.micros)))

        # The script divides every loss by the number of microbatches it accumulates.
        return jax.tree.map(lambda leaf: leaf / len(variant.micros), jax.jit(jax.grad(objective))(state.current))

    @functools.cache
    def after():
        norm, optimiser = optax.tree.norm(gradient()), update.make_optimiser(config)
        new = update.apply_gradient(config, optimiser, state, gradient(), norm)
        decay = update.old_decay(config.optimiser.old_decay, int(new.step), config.optimiser.old_decay_constant)
        return new._replace(old=update.average(new.old, new.current, decay))

    yield Entry(f"{name}/grad_norm", lambda: optax.tree.norm(gradient()), CONVERSION)
    stored_gradient = {key: file[f"{name}/grad/{key}"] for key in file.suffixes(f"{name}/grad/")}
    yield Entry(f"{name}/grad/", lambda: to_peft(gradient()), GRADIENT)
    for group, field in (("default_after", "current"), ("ema_after", "ema"), ("old_after", "old")):
        want = {key: file[f"{name}/{group}/{key}"] for key in stored_gradient}

        def result(field=field, want=want):
            ours = to_peft(getattr(after(), field))
            return {key: _settled(ours[key], want[key], stored_gradient[key], file.config["lr"]) for key in want}

        yield Entry(f"{name}/{group}/", result, FORWARD)


def _settled(ours, want, gradient, rate):
    """Ours, but for the elements whose AdamW step is rounding noise: there any result within two steps is right."""
    noise = (np.abs(gradient) < TINY_GRADIENT) & (np.abs(ours - want) <= 2 * rate)
    return np.where(noise, want, ours)


def _terms(variant: Variant, state: update.TrainState, i: int) -> dict:
    """update.sample_terms of microbatch i with the stored noise in place of drawn noise."""
    micro = variant.micros[i]
    samples = jnp.arange(len(micro["x0"]))
    r = advantages.optimality(micro["advantages"], variant.config.advantages.clip)
    batch = update.Batch(
        latents=jnp.asarray(micro["x0"]),
        r=jnp.asarray(r, jnp.float32),
        kl_weight=jnp.asarray(micro["kl_weight"], jnp.float32),
        prompt=samples,
        t=jnp.full(samples.shape, micro["t"], jnp.float32),
        key=samples,
    )
    noise = jnp.asarray(micro["noise"])
    return update.sample_terms(
        variant.config, variant.forward, lambda sample, shape: noise[sample], state, variant.params,
        jnp.asarray(micro["prompt_embeds"]), batch,
    )  # fmt: skip


def _prediction(variant: Variant, adapter: dict, i: int):
    """Clean latents that the policy `adapter` predicts from the stored noisy latents of microbatch i."""
    micro = variant.micros[i]
    t = jnp.full(len(micro["x0"]), micro["t"], jnp.float32)
    velocity = _velocity(variant.forward, variant.params, adapter, micro["prompt_embeds"], micro["x0"], micro["xt"], t)
    return to_x0(micro["xt"], velocity, t, variant.config.sampler.shift)


@functools.partial(jax.jit, static_argnums=0)
def _velocity(forward: update.Forward, params, adapter, text, x0, x_t, t):
    return forward.velocity(params, adapter, text, x0, x_t, t)
