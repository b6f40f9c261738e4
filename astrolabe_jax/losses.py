"""The objective as pure maths: predictions [B, ...] in, one number per sample [B] out, float32.

The equations are those of docs/objective.md. x0 is a sampled clean latent; `current`, `old` and
`reference` are what the trained, the behaviour and the reference policy predict from the same noisy
x_t; r in [0, 1] is the optimality of the sample (advantages.optimality).
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from astrolabe_jax.types import Array

Predicted = Float[Array, "B *dims"]
PerSample = Float[Array, " B"]
Number = float | Array  # one for all samples, which may be traced

MIN_NORMALISER = 1e-5  # floor of DiffusionNFT's adaptive normaliser


class Predictions(NamedTuple):
    """What three policies predict for a batch of samples: clean latents, or velocities."""

    x0: Predicted  # the sampled clean latents
    current: Predicted  # of the trained policy
    old: Predicted  # of the behaviour policy
    reference: Predicted  # of the reference policy
    x_t: Predicted | None = None  # the noisy latents; velocities need them
    sigma: PerSample | None = None  # the noise level in [0, 1]; velocities need it


class Coefficients(NamedTuple):
    """The constants of the objective (docs/objective.md)."""

    # 'astrolabe': predictions are clean latents. 'diffusion_nft': they are velocities, and so are
    # the deviations.
    kind: str
    beta: Number  # interpolation between the current and the behaviour policy
    kl_weight: Number  # lambda, of the deviation from the reference
    clip_max: Number = 5.0  # A_max, bound of the advantages; DiffusionNFT needs it


def objective(
    coefficients: Coefficients, predictions: Predictions, r: PerSample, kl_weight: PerSample
) -> dict[str, PerSample]:
    """Return every term of the objective, {name: [B]} float32; `total_loss` carries the gradient.

    Args:
      r: [B] optimality.
      kl_weight: [B], from `kl_weights`.
    """
    x0, current, old, reference = predictions[:4]
    if coefficients.kind == "astrolabe":
        policy = astrolabe_loss(x0, current, old, r, coefficients.beta)
    else:
        policy = diffusion_nft_loss(predictions, r, coefficients.beta, coefficients.clip_max)
    kl_div = deviation(current, reference)
    kl = kl_weight * kl_div
    chex.assert_rank([policy["policy"], kl], 1)
    return {
        "total_loss": policy["policy"] + coefficients.kl_weight * kl,
        "policy_loss": policy["policy"],
        "positive_loss": policy["positive"],
        "negative_loss": policy["negative"],
        "kl_loss": kl,
        "kl_div": kl_div,
        "old_deviate": deviation(current, old),
        "old_kl_div": deviation(old, reference),
        "x0_norm": deviation(x0, jnp.zeros_like(x0)),
    }


def interpolate(current: Predicted, old: Predicted, beta: Number) -> tuple[Predicted, Predicted]:
    """Return the implicit positive and negative policies (docs/objective.md, Astrolabe loss).

    positive = beta current + (1 - beta) old, negative = (1 + beta) old - beta current; their mean
    is `old`. They may be predictions of clean latents or of velocities.

    Args:
      current, old: [B, ...].

    Returns:
      two of [B, ...] in float32.
    """
    chex.assert_equal_shape([current, old])
    current = _f32(current)
    old = _f32(old)
    return beta * current + (1 - beta) * old, (1 + beta) * old - beta * current


def astrolabe_loss(
    x0: Predicted, current: Predicted, old: Predicted, r: PerSample, beta: Number
) -> dict[str, PerSample]:
    """Return Astrolabe's policy loss r |x+ - x0|^2 + (1 - r) |x- - x0|^2 in x0 space.

    Gradients flow into `current` only. Per element d policy / d current =
    2 beta [(2r - 1)(old - x0) + beta (current - old)], so the minimiser is
    old + (2r - 1)(x0 - old) / beta (docs/objective.md, Astrolabe loss).

    Args:
      x0, current, old: clean latents [B, ...].
      r: [B] in [0, 1].

    Returns:
      `policy`, and its two squared errors `positive` and `negative`, each [B].
    """
    _check(x0, current, old, r=r)
    positive, negative = interpolate(current, jax.lax.stop_gradient(old), beta)
    positive = deviation(positive, x0)
    negative = deviation(negative, x0)
    return {
        "policy": r * positive + (1 - r) * negative,
        "positive": positive,
        "negative": negative,
    }


def diffusion_nft_loss(
    predictions: Predictions, r: PerSample, beta: Number, clip_max: Number
) -> dict[str, PerSample]:
    """Return DiffusionNFT's policy loss: velocities mixed, errors in x0 space, adaptively scaled.

    The normaliser of an error, the mean absolute error of the sample, carries no gradient
    (docs/objective.md, DiffusionNFT loss).

    Args:
      predictions: velocities, with x_t and sigma.
      r: [B] in [0, 1].
      clip_max: the bound A_max of the advantages.

    Returns:
      `policy` = clip_max [r positive + (1 - r) negative] / beta and both normalised errors,
      each [B].
    """
    x0, velocity, old_velocity, _, x_t, sigma = predictions
    if x_t is None or sigma is None:
        raise ValueError("velocities become clean latents through x_t and sigma; give both")
    _check(x0, x_t, velocity, old_velocity, r=r, sigma=sigma)
    sigma = _f32(sigma).reshape((-1,) + (1,) * (x0.ndim - 1))

    def error(mixed):
        gap = _f32(x_t) - sigma * mixed - _f32(x0)
        size = _mean(jnp.abs(jax.lax.stop_gradient(gap)))
        return _mean(jnp.square(gap)) / jnp.maximum(size, MIN_NORMALISER)

    positive, negative = map(
        error, interpolate(velocity, jax.lax.stop_gradient(old_velocity), beta)
    )
    return {
        "policy": clip_max * (r * positive + (1 - r) * negative) / beta,
        "positive": positive,
        "negative": negative,
    }


def deviation(a: Predicted, b: Predicted) -> PerSample:
    """Return the mean squared difference of each sample: [B, ...], [B, ...] -> [B].

    It is the surrogate of the KL divergence (docs/objective.md, KL term).
    """
    chex.assert_equal_shape([a, b])
    return _mean(jnp.square(_f32(a) - _f32(b)))


def kl_weights(mask: Any) -> Any:
    """Return weights [B] whose weighted mean of deviations is the mean over the masked samples.

    All are 0 if no sample is masked. Uniform KL is a mask of ones.

    Args:
      mask: bool [B], numpy or jax, over the samples that share one count: those of the epoch, or,
        as published, of one microbatch (docs/objective.md, Selective KL).
    """
    chex.assert_rank(mask, 1)
    return mask * (mask.shape[0] / mask.sum().clip(1)).astype("float32")


def _check(*predictions, **per_sample):
    chex.assert_equal_shape(predictions)
    for name, values in per_sample.items():
        chex.assert_shape(
            values,
            predictions[0].shape[:1],
            custom_message=f"{name} holds one number per sample",
        )


def _mean(x):
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _f32(x):
    return x.astype(jnp.float32)
