"""losses.py against numbers worked by hand and closed forms."""

import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from astrolabe_jax import losses
from astrolabe_jax.losses import Predictions


def predictions(count, batch=3):
    return jax.random.normal(jax.random.key(0), (count, batch, 2, 4, 3, 5))


def one(value):
    return jnp.full((1, 1), value)


def nft_loss(x0, x_t, v, v_old, sigma, r, beta, clip_max):
    """DiffusionNFT's loss, which reads no reference."""
    velocities = Predictions(x0, v, v_old, jnp.zeros_like(v), x_t, sigma)
    return losses.diffusion_nft_loss(velocities, r, beta, clip_max)


def test_worked_example():
    """beta 0.1, f 0.7, o 0.5, x0 1, r 0.8; and the same numbers under DiffusionNFT."""
    x0, old, r = one(1.0), one(0.5), jnp.array([0.8])
    positive, negative = losses.interpolate(one(0.7), old, 0.1)
    np.testing.assert_allclose([positive.item(), negative.item()], [0.52, 0.48], rtol=1e-6)

    def policy(forward):
        return losses.astrolabe_loss(x0, forward, old, r, 0.1)["policy"].sum()

    value, grad = jax.value_and_grad(policy)(one(0.7))
    np.testing.assert_allclose([value, grad.item()], [0.2384, -0.056], rtol=1e-5)
    np.testing.assert_allclose(jax.grad(policy)(one(3.5)).item(), 0, atol=1e-7)  # the minimiser

    x_t, sigma = one(2.0), jnp.array([0.5])
    nft = nft_loss(x0, x_t, (x_t - 0.7) / 0.5, (x_t - 0.5) / 0.5, sigma, r, 0.1, clip_max=5.0)
    np.testing.assert_allclose(nft["policy"], [24.4], rtol=1e-5)
    np.testing.assert_allclose([nft["positive"], nft["negative"]], [[0.48], [0.52]], rtol=1e-5)


@pytest.mark.parametrize("beta", [0.03, 0.1, 1.0])
def test_gradient_closed_form_and_minimiser(beta):
    x0, forward, old = predictions(3)
    r = jnp.array([0.0, 0.3, 1.0])
    lead = r[:, None, None, None, None]

    def policy(forward):
        return losses.astrolabe_loss(x0, forward, old, r, beta)["policy"].sum()

    closed = 2 * beta * ((2 * lead - 1) * (old - x0) + beta * (forward - old)) / x0[0].size
    np.testing.assert_allclose(jax.grad(policy)(forward), closed, rtol=1e-4, atol=1e-7)
    best = old + (2 * lead - 1) * (x0 - old) / beta
    assert np.abs(jax.grad(policy)(best)).max() < 1e-2 * np.abs(closed).max() * 1e-3


@pytest.mark.parametrize("sigma", [1.0, 0.75, 0.25])
def test_x0_error_is_sigma_squared_times_the_velocity_error(sigma):
    """If x0 = x_t - sigma v, the x0 loss is sigma^2 times the same loss of the velocities."""
    x_t, target, v, v_old = predictions(4)
    r = jnp.array([0.2, 0.5, 0.9])

    def x0_of(v):
        return x_t - sigma * v

    in_x0 = losses.astrolabe_loss(x0_of(target), x0_of(v), x0_of(v_old), r, 0.1)
    in_v = losses.astrolabe_loss(target, v, v_old, r, 0.1)
    for name in in_x0:
        np.testing.assert_allclose(in_x0[name], sigma**2 * in_v[name], rtol=1e-5)


def test_diffusion_nft_is_the_normalised_x0_loss():
    x0, x_t, v, v_old = predictions(4)
    sigma, r, beta, clip_max = jnp.array([1.0, 0.5, 0.1]), jnp.array([0.1, 0.5, 0.8]), 0.2, 5.0
    lead = sigma[:, None, None, None, None]
    f, o = x_t - lead * v, x_t - lead * v_old
    plain = losses.astrolabe_loss(x0, f, o, r, beta)
    weights = [np.abs(mixed - x0).mean((1, 2, 3, 4)) for mixed in losses.interpolate(f, o, beta)]
    nft = nft_loss(x0, x_t, v, v_old, sigma, r, beta, clip_max)
    want = (
        clip_max
        * (r * plain["positive"] / weights[0] + (1 - r) * plain["negative"] / weights[1])
        / beta
    )
    np.testing.assert_allclose(nft["policy"], want, rtol=1e-5)


def test_adaptive_normaliser_carries_no_gradient_and_has_a_floor():
    """With r = 1 and beta = 1 the loss is the mean square over w: its gradient is 2 gap / (w n), w
    held fixed.
    """
    x0, x_t, v, v_old = predictions(4)
    sigma, r = jnp.ones(3), jnp.ones(3)

    def policy(v):
        return nft_loss(x0, x_t, v, v_old, sigma, r, 1.0, 1.0)["policy"].sum()

    gap = x_t - v - x0
    fixed = 2 * -gap / np.abs(gap).mean((1, 2, 3, 4), keepdims=True) / gap[0].size
    np.testing.assert_allclose(jax.grad(policy)(v), fixed, rtol=1e-4, atol=1e-8)
    exact = nft_loss(x0, x_t, x_t - x0, x_t - x0, sigma, r, 1.0, 1.0)["policy"]
    np.testing.assert_array_equal(exact < 1e-6, True)  # not 0 / 0


@pytest.mark.parametrize("kind", ["astrolabe", "diffusion_nft"])
def test_no_gradient_reaches_the_behaviour_policy(kind):
    x0, x_t, forward, old = predictions(4)
    r = jnp.array([0.1, 0.5, 0.8])

    def policy(old):
        if kind == "astrolabe":
            return losses.astrolabe_loss(x0, forward, old, r, 0.1)["policy"].sum()
        return nft_loss(x0, x_t, forward, old, r, r, 0.1, 5.0)["policy"].sum()

    np.testing.assert_array_equal(jax.grad(policy)(old), 0)


def test_bfloat16_predictions_are_compared_in_float32():
    x0, forward, old = (x.astype(jnp.bfloat16) for x in predictions(3))
    r = jnp.array([0.1, 0.5, 0.8])
    exact = losses.astrolabe_loss(*(np.asarray(x, np.float32) for x in (x0, forward, old)), r, 0.1)
    rounded = losses.astrolabe_loss(x0, forward, old, r, 0.1)
    assert rounded["policy"].dtype == jnp.float32
    np.testing.assert_allclose(rounded["policy"], exact["policy"], rtol=1e-6)


def test_kl_weights_give_the_mean_of_the_masked_samples():
    kl = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    mask = np.array([True, False, True, False])
    for array in (mask, jnp.asarray(mask)):
        np.testing.assert_allclose((losses.kl_weights(array) * kl).mean(), 2.5, rtol=1e-6)
    np.testing.assert_array_equal(losses.kl_weights(np.ones(4, bool)), 1)
    np.testing.assert_array_equal(losses.kl_weights(np.zeros(4, bool)), 0)


def test_a_masked_sample_weighs_the_same_in_any_microbatch_only_with_the_epochs_count():
    """With counts per microbatch, as published, a masked sample that is alone weighs more."""
    mask = np.array([True, True, True, False])
    published = np.concatenate([losses.kl_weights(part) for part in mask.reshape(2, 2)])
    np.testing.assert_allclose(published, [1, 1, 2, 0])
    np.testing.assert_allclose(losses.kl_weights(mask), [4 / 3, 4 / 3, 4 / 3, 0], rtol=1e-6)


@pytest.mark.parametrize("by_names", [True, False])
def test_shapes_are_checked(by_names):
    """In tests by their names in the signature (conftest.py), and always by the function itself."""
    loss = losses.astrolabe_loss if by_names else inspect.unwrap(losses.astrolabe_loss)
    error = jaxtyping.TypeCheckError if by_names else AssertionError
    x0, forward, old = predictions(3)
    with pytest.raises(error):
        loss(x0, forward, old[:2], jnp.ones(3), 0.1)
    with pytest.raises(error, match=None if by_names else "one number per sample"):
        loss(x0, forward, old, jnp.ones((3, 1)), 0.1)


@pytest.mark.parametrize("kind", ["astrolabe", "diffusion_nft"])
def test_objective_is_the_policy_loss_and_the_weighted_deviation_from_the_reference(kind):
    x0, current, old, reference, x_t = predictions(5)
    sigma = jnp.array([1.0, 0.5, 0.1])
    r = jnp.array([0.1, 0.5, 0.8])
    weight = jnp.array([2.0, 0.0, 1.0])
    terms = losses.objective(
        losses.Coefficients(kind, beta=0.1, kl_weight=0.3, clip_max=4.0),
        Predictions(x0, current, old, reference, x_t, sigma),
        r,
        weight,
    )
    if kind == "astrolabe":
        policy = losses.astrolabe_loss(x0, current, old, r, 0.1)
    else:
        policy = nft_loss(x0, x_t, current, old, sigma, r, 0.1, 4.0)
    np.testing.assert_array_equal(terms["policy_loss"], policy["policy"])
    kl = weight * losses.deviation(current, reference)
    np.testing.assert_array_equal(terms["kl_loss"], kl)
    np.testing.assert_allclose(terms["total_loss"], policy["policy"] + 0.3 * kl, rtol=1e-6)
    np.testing.assert_array_equal(terms["old_deviate"], losses.deviation(current, old))
    np.testing.assert_array_equal(terms["old_kl_div"], losses.deviation(old, reference))
    assert all(term.shape == (3,) for term in terms.values())


def test_velocities_need_the_noisy_latents_and_their_level():
    x0, current, old, reference = predictions(4)
    with pytest.raises(ValueError, match="give both"):
        losses.diffusion_nft_loss(Predictions(x0, current, old, reference), jnp.ones(3), 0.1, 5.0)
