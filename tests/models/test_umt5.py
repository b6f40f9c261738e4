"""UMT5: the table of buckets, and embeddings that depend on their own prompt and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astrolabe_jax.models import layers
from astrolabe_jax.models.umt5 import UMT5, XXL, relative_buckets
from tests.models.tiny import TEXT

LENGTHS = (1, 5, 12)


@pytest.fixture(scope="module")
def encoder():
    graphdef, params = layers.split(UMT5(TEXT, nnx.Rngs(0)))

    def run(method, params, ids, mask):
        return getattr(layers.merge(graphdef, params), method)(ids, mask)

    return jax.jit(run, static_argnums=0), params


@pytest.fixture(scope="module")
def batch():
    ids = (
        np.random.default_rng(1)
        .integers(2, TEXT.vocab_size, (len(LENGTHS), TEXT.text_len))
        .astype(np.int32)
    )
    mask = (np.arange(TEXT.text_len) < np.array(LENGTHS)[:, None]).astype(np.int32)
    return np.where(mask == 1, ids, 0), mask


def test_rows_beyond_the_prompt_are_zero_and_no_others(encoder, batch):
    run, params = encoder
    embedding, hidden = run("embed", params, *batch), run("__call__", params, *batch)
    np.testing.assert_array_equal(embedding, np.where(batch[1][:, :, None] == 1, hidden, 0))
    assert np.all(np.any(np.asarray(hidden) != 0, axis=-1))


def test_what_stands_in_the_padding_does_not_matter(encoder, batch):
    run, params = encoder
    ids, mask = batch
    noise = np.random.default_rng(2).integers(0, TEXT.vocab_size, ids.shape)
    np.testing.assert_array_equal(
        run("embed", params, ids, mask),
        run("embed", params, np.where(mask == 1, ids, noise).astype(np.int32), mask),
    )


@pytest.mark.parametrize("i", range(len(LENGTHS)))
def test_a_prompt_does_not_depend_on_its_batch_or_on_the_padded_length(encoder, batch, i):
    run, params = encoder
    ids, mask = batch
    together = run("embed", params, ids, mask)[i, : LENGTHS[i]]
    alone = run("embed", params, ids[i : i + 1, : LENGTHS[i]], mask[i : i + 1, : LENGTHS[i]])[0]
    np.testing.assert_allclose(alone, together, atol=2e-6)


def test_the_only_positions_are_the_biases_of_each_layer(encoder):
    run, params = encoder
    ids, mask = np.arange(2, 8, dtype=np.int32)[None], np.ones((1, 6), np.int32)
    order = np.array([3, 0, 5, 1, 4, 2])

    def change_of_order(edit):
        """Return how much a permutation of the tokens does beyond permuting the hidden states, and
        the hidden states of the tokens in order.
        """
        blocks = params["blocks"]
        edited = params | {
            "blocks": blocks | {"position_bias": jax.tree.map(edit, blocks["position_bias"])}
        }
        straight, permuted = (
            np.asarray(run("__call__", edited, x, mask))[0] for x in (ids, ids[:, order])
        )
        return np.abs(straight[order] - permuted).max(), straight

    with_bias, hidden = change_of_order(lambda table: table)
    assert with_bias > 1e-3
    assert change_of_order(jnp.zeros_like)[0] < 1e-5
    shared = change_of_order(lambda table: table.at[1:].set(table[:1]))[1]
    assert np.abs(shared - hidden).max() > 1e-4


def test_buckets_are_the_published_table():
    # The first distance of each bucket: docs/models.md, Relative position bias.
    starts = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    buckets = relative_buckets(XXL, 512)
    assert buckets.shape == (512, 512)
    for distance in range(512):
        offset = sum(start <= distance for start in starts) - 1
        assert np.all(np.diagonal(buckets, distance) == (16 + offset if distance else 0)), distance
        assert np.all(np.diagonal(buckets, -distance) == offset), distance


def test_sixteen_bit_activations_stay_close_to_float32(encoder, batch):
    _, params = encoder
    half = dataclasses.replace(TEXT, dtype="bfloat16")
    graphdef, _ = layers.graphdef_of(lambda: UMT5(half, nnx.Rngs(0)))
    got = jax.jit(lambda p: layers.merge(graphdef, p).embed(*batch))(params)
    assert got.dtype == jnp.bfloat16
    want = encoder[0]("embed", params, *batch)
    assert np.abs(np.asarray(got, np.float32) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(("field", "value"), [("num_heads", 3), ("num_buckets", 6)])
def test_sizes_that_do_not_fit_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"UMT5Config.*{field}"):
        dataclasses.replace(TEXT, **{field: value})
