"""Rows in chunks: the numbers of all at once, with less held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import cost
from astrolabe_jax.models.chunks import in_chunks
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan import transformer
from astrolabe_jax.models.wan.config import Layout
from tests.models import tiny

ROWS = 4 * 256  # bytes between the two products, of a row


def feed_forward(x, w1, w2, most):
    return in_chunks(lambda x: jnp.tanh(x @ w1) @ w2, x, ROWS, most)


@pytest.fixture(scope="module")
def arrays():
    shapes = ((2, 37, 16), (16, 256), (256, 16))
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("rows_at_once", [0.1, 1, 5, 36, 37, 100])
def test_chunks_change_no_number(arrays, rows_at_once):
    def loss(most, *given):
        return jnp.sum(jnp.sin(feed_forward(*given, most)))

    most = int(rows_at_once * ROWS)
    wanted = feed_forward(*arrays, 2**40)
    np.testing.assert_allclose(feed_forward(*arrays, most), wanted, rtol=1e-5, atol=1e-5)
    given, expected = (jax.grad(loss, (1, 2, 3))(size, *arrays) for size in (most, 2**40))
    for a, b in zip(given, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_fewer_rows_are_held_at_once(arrays):
    def gradient(most):
        def loss(*given):
            return jnp.sum(feed_forward(*given, most))

        program = jax.make_jaxpr(jax.jit(jax.grad(loss, (0, 1, 2))))(*arrays)
        return next(cost.calls(program))[1]

    whole, parts = gradient(2**40), gradient(4 * ROWS)
    hidden = 2 * 37 * ROWS
    assert whole.held > hidden
    assert parts.held < whole.held - hidden
    # one more forward pass of the first product, and the rows that fill the last chunk
    assert parts.products == pytest.approx(whole.products * 40 / 37 * 7 / 6)


def test_a_transformer_is_the_same_in_chunks(monkeypatch):
    graphdef, params = tiny.model()

    def predicted():
        net = merge(graphdef, params)
        text = net.encode_text(tiny.text())
        return net(tiny.latents(3), jnp.full((1, 3), 500.0), text, layout=Layout(block=1))

    whole = predicted()
    monkeypatch.setattr(transformer, "_MOST_HIDDEN", 5 * 4 * tiny.CONFIG.ffn_dim)
    np.testing.assert_allclose(predicted(), whole, rtol=1e-5, atol=1e-5)
