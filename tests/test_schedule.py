"""schedule.py: tables against known entries, conversions as exact inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import schedule as S

SHIFT5 = S.Schedule(shift=5.0)


@pytest.mark.parametrize("shift, last", [(5.0, 0.00498008), (8.0, 0.00794439)])
def test_table_ends_and_monotone(shift, last):
    table = S.sigmas(S.Schedule(shift=shift))
    assert table.shape == (1000,) and table.dtype == np.float32
    assert table[0] == 1 and np.all(np.diff(table) < 0)
    np.testing.assert_allclose(table[-1], last, rtol=2e-6)
    np.testing.assert_array_equal(S.timesteps(S.Schedule(shift=shift))[0], 1000)


def test_second_entry_anchor():
    np.testing.assert_allclose(S.sigmas(SHIFT5)[1], 0.9997998, rtol=1e-7)


def test_warp_anchors():
    np.testing.assert_allclose(
        S.warp((1000, 750, 500, 250), SHIFT5), (1000, 937.5, 833.33333, 625), rtol=1e-7
    )
    np.testing.assert_allclose(
        S.warp((1000, 666, 333, 0), SHIFT5), (1000, 908.8427, 713.9794, 0), rtol=1e-7
    )


@pytest.mark.parametrize("bad", [937.5, -1, 1001])
def test_warp_refuses(bad):
    with pytest.raises(ValueError, match="denoising step"):
        S.warp((1000, bad), SHIFT5)


def test_lookup_anchors_and_exact():
    t = jnp.array([1000, 937.5, 833.3333, 750, 625, 500, 250, 0])
    want = [1, 0.9375, 0.8333333, 0.75000006, 0.625, 0.50059956, 0.25159743, 0.00498008]
    np.testing.assert_allclose(
        jax.jit(lambda t: S.sigma_of(t, SHIFT5, "lookup"))(t), want, rtol=1e-6
    )
    np.testing.assert_allclose(S.sigma_of(t, SHIFT5, "exact"), t / 1000, rtol=1e-7)


def test_lookup_equals_exact_on_the_table():
    t = S.timesteps(SHIFT5)[::37]
    np.testing.assert_allclose(S.sigma_of(t, SHIFT5, "lookup"), S.sigma_of(t, SHIFT5), rtol=2e-7)


def test_unknown_source():
    with pytest.raises(ValueError, match="nearest"):
        S.sigma_of(1.0, SHIFT5, "nearest")


def test_conversions_invert_each_other():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 2, 2))
    sigma = jnp.array([[1.0, 0.9, 0.5], [0.2, 0.1, 0.01]])
    x_t = S.add_noise(x0, noise, sigma)
    np.testing.assert_allclose(S.velocity_to_x0(x_t, noise - x0, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(S.x0_to_velocity(x_t, x0, sigma), noise - x0, atol=1e-4)


def test_zero_noise_is_exact():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 5))
    np.testing.assert_array_equal(S.add_noise(x0, noise, 0.0), x0)


def test_euler_walk_over_the_whole_table_removes_the_noise():
    """With the true velocity, stepping from t = 1000 to the end recovers x0: the sigmas telescope
    to 0.
    """
    schedule = S.Schedule(shift=5.0, num_steps=7)
    x0, noise = jax.random.normal(jax.random.key(1), (2, 1, 4))
    x = noise
    for t in S.timesteps(schedule):
        x = S.euler_step(x, noise - x0, t, schedule)
    np.testing.assert_allclose(x, x0, atol=1e-6)
    np.testing.assert_allclose(
        S.euler_step(noise, noise - x0, 1000.0, schedule, to_final=True), x0, atol=1e-6
    )


def test_general_form():
    table = S.sigmas(
        S.Schedule(
            shift=3.0, num_steps=5, sigma_min=0.2, extra_one_step=False, denoising_strength=0.5
        )
    )
    ramp = np.linspace(0.6, 0.2, 5)
    np.testing.assert_allclose(table, 3 * ramp / (1 + 2 * ramp), rtol=1e-6)
    flipped = S.sigmas(S.Schedule(num_steps=5, inverse_timesteps=True, reverse_sigmas=True))
    np.testing.assert_allclose(flipped, 1 - S.sigmas(S.Schedule(num_steps=5))[::-1], rtol=1e-6)


def test_training_weights_sum_and_zero():
    weights = S.training_weights(SHIFT5)
    np.testing.assert_allclose(weights.sum(), 1000, rtol=1e-5)
    assert weights.min() == 0
