"""The objective as pure maths: predictions of shape [B, ...] in, one number per sample [B] out, in
float32.

x0 denotes a sampled clean latent, `forward`, `old` and `reference` the clean latents (or
velocities) that the trained, the behaviour and the reference policy predict from the same noisy
x_t, and r in [0, 1] the optimality of the sample (advantages.optimality). Section numbers are those
of spec/objective.md.
"""

import chex
import jax
import jax.numpy as jnp

MIN_NORMALISER = 1e-5  # floor of DiffusionNFT's adaptive normaliser


def objective(
    kind: str,
    x0,
    forward,
    old,
    reference,
    r,
    kl_weight,
    *,
    beta: float,
    kl_lambda: float,
    x_t,
    sigma,
    clip_max: float,
) -> dict[str, jax.Array]:
    """Every term of the objective from the predictions of the three policies: {name: [B]}, float32.

    kind 'astrolabe': predictions are clean latents; x_t, sigma and clip_max are not read.
    'diffusion_nft': they are velocities, and so are the deviations. r, kl_weight, sigma [B]; see
    `kl_weights`. `total_loss` carries the gradient.
    """
    if kind == "astrolabe":
        policy = astrolabe_loss(x0, forward, old, r, beta)
    else:
        policy = diffusion_nft_loss(x0, x_t, forward, old, sigma, r, beta, clip_max)
    kl_div = deviation(forward, reference)
    kl = kl_weight * kl_div
    return {
        "total_loss": total_loss(policy["policy"], kl, kl_lambda),
        "policy_loss": policy["policy"],
        "positive_loss": policy["positive"],
        "negative_loss": policy["negative"],
        "kl_loss": kl,
        "kl_div": kl_div,
        "old_deviate": deviation(forward, old),
        "old_kl_div": deviation(old, reference),
        "x0_norm": deviation(x0, jnp.zeros_like(x0)),
    }


def interpolate(forward: jax.Array, old: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """The implicit positive and negative policies, of which `forward` and `old` are the parameters
    (section 5.3).

    positive = beta forward + (1 - beta) old, negative = (1 + beta) old - beta forward; their mean
    is `old`. Works alike on clean-latent and on velocity predictions. [B, ...] -> two of [B, ...]
    in float32.
    """
    chex.assert_equal_shape([forward, old])
    forward, old = _f32(forward), _f32(old)
    return beta * forward + (1 - beta) * old, (1 + beta) * old - beta * forward


def astrolabe_loss(x0, forward, old, r, beta: float) -> dict[str, jax.Array]:
    """Astrolabe's policy loss r |x+ - x0|^2 + (1 - r) |x- - x0|^2 in x0 space (section 5, steps 3
    to 5).

    x0, forward, old [B, ...], r [B]. Gradients flow into `forward` only. Per element d policy / d
    forward =
    2 beta [(2r - 1)(old - x0) + beta (forward - old)], so the minimiser is old + (2r - 1)(x0 - old)
    / beta. Returns `policy`, and its two squared errors `positive` and `negative`, each [B].
    """
    _check(x0, forward, old, r=r)
    positive, negative = interpolate(forward, jax.lax.stop_gradient(old), beta)
    positive, negative = deviation(positive, x0), deviation(negative, x0)
    return {"policy": r * positive + (1 - r) * negative, "positive": positive, "negative": negative}


def diffusion_nft_loss(
    x0, x_t, velocity, old_velocity, sigma, r, beta: float, clip_max: float
) -> dict[str, jax.Array]:
    """DiffusionNFT's policy loss: velocities mixed, errors in x0 space over an adaptive normaliser
    (section 6).

    x0, x_t, velocity, old_velocity [B, ...]; sigma [B], the noise level in [0, 1]; r [B]; clip_max
    is the bound A_max of the advantages. The normaliser, the mean absolute error of the sample,
    carries no gradient. Returns `policy` = clip_max [r positive + (1 - r) negative] / beta and both
    normalised errors, each [B].
    """
    _check(x0, x_t, velocity, old_velocity, r=r, sigma=sigma)
    sigma = _f32(sigma).reshape((-1,) + (1,) * (x0.ndim - 1))

    def error(mixed):
        gap = _f32(x_t) - sigma * mixed - _f32(x0)
        normaliser = jnp.maximum(_mean(jnp.abs(jax.lax.stop_gradient(gap))), MIN_NORMALISER)
        return _mean(jnp.square(gap)) / normaliser

    positive, negative = map(
        error, interpolate(velocity, jax.lax.stop_gradient(old_velocity), beta)
    )
    policy = clip_max * (r * positive + (1 - r) * negative) / beta
    return {"policy": policy, "positive": positive, "negative": negative}


def deviation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared difference of each sample, [B, ...], [B, ...] -> [B]: the KL surrogate (section
    5.6).
    """
    chex.assert_equal_shape([a, b])
    return _mean(jnp.square(_f32(a) - _f32(b)))


def kl_weights(mask: jax.Array) -> jax.Array:
    """Weights [B] whose weighted mean of deviations is the mean over the masked samples; all 0 if
    none is (7.4).

    mask: bool [B], numpy or jax, over the samples that share one count: those of the epoch, or, as
    published, of one microbatch. Uniform KL is a mask of ones.
    """
    chex.assert_rank(mask, 1)
    return mask * (mask.shape[0] / mask.sum().clip(1)).astype("float32")


def total_loss(policy: jax.Array, kl: jax.Array, kl_weight: float) -> jax.Array:
    """policy + lambda kl of each sample, [B], [B] -> [B] (section 5.7); `kl` already carries
    `kl_weights`.
    """
    chex.assert_rank([policy, kl], 1)
    return policy + kl_weight * kl


def _check(*predictions, **per_sample):
    chex.assert_equal_shape(predictions)
    for name, values in per_sample.items():
        chex.assert_shape(
            values, predictions[0].shape[:1], custom_message=f"{name} holds one number per sample"
        )


def _mean(x):
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _f32(x):
    return x.astype(jnp.float32)
