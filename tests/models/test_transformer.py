"""The DiT's uncached forward: sizes, anchors, masks by exactly zero derivatives, teacher forcing,
dtypes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astrolabe_jax.models.layers import graphdef_of, merge
from astrolabe_jax.models.lora import parameter_count
from astrolabe_jax.models.wan import rope
from astrolabe_jax.models.wan.config import WAN_1_3B, WAN_14B, Layout, WanConfig
from astrolabe_jax.models.wan.transformer import WanTransformer
from tests.models import tiny


@pytest.mark.parametrize(
    "config, total, per_block",
    [(WAN_1_3B, 1_418_996_800, 46_440_704), (WAN_14B, 14_288_491_584, 351_394_304)],
)
def test_parameter_counts(config, total, per_block):
    _, shapes = graphdef_of(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    assert parameter_count(shapes) == total
    assert parameter_count(shapes["blocks"]) == per_block * config.num_layers


def test_sinusoid_anchors():
    got = rope.sinusoid(jnp.array([[937.5]]), 256)[0, 0]
    np.testing.assert_allclose(got[:3], [0.26230213, 0.58048729, 0.25722338], atol=1e-7)
    np.testing.assert_allclose(got[128:131], [0.96498580, -0.81426931, 0.96635197], atol=1e-7)


def test_sinusoid_keeps_float64_accuracy_off_the_integers():
    t = np.float32([0, 0.37, 421.7, 833.3333, 999.96])
    angle = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(
        rope.sinusoid(jnp.asarray(t), 256),
        np.concatenate([np.cos(angle), np.sin(angle)], -1),
        atol=3e-7,
    )


def test_rope_frequency_anchors():
    frame, row, column = rope.frequencies(128)
    assert (len(frame), len(row), len(column)) == (22, 21, 21)
    np.testing.assert_allclose(
        frame[[0, 1, -1]], [1, 0.657933224657568, 1.519911082952933e-4], rtol=1e-12
    )
    np.testing.assert_allclose(
        row[[0, 1, -1]], [1, 0.6449466771037624, 10000 ** (-40 / 42)], rtol=1e-12
    )
    np.testing.assert_array_equal(row, column)


def test_rope_table_is_accurate_far_out():
    frames, (h, w) = np.array([0, 1023, 1024, 300_001]), (2, 3)
    cos, sin = (t.reshape(4, h, w, -1) for t in rope.rope_table(frames, (h, w), 12))
    freq = rope.frequencies(12)
    for f, r, c in ((0, 1, 2), (1, 0, 1), (2, 1, 1), (3, 1, 2)):
        angle = np.concatenate([p * x for p, x in zip((frames[f], r, c), freq, strict=True)])
        np.testing.assert_allclose(cos[f, r, c], np.cos(angle), atol=2e-7)
        np.testing.assert_allclose(sin[f, r, c], np.sin(angle), atol=2e-7)


def test_rotation_scores_depend_on_distance_only():
    q, k = tiny.normal(0, 1, 4, 2, 12), tiny.normal(1, 1, 4, 2, 12)

    def scores(offset):
        table = rope.rope_table(jnp.arange(1) + offset, (2, 2), 12)
        return jnp.einsum("bnak,bmak->banm", rope.rotate(q, table), rope.rotate(k, table))

    np.testing.assert_allclose(scores(5), scores(1500), atol=2e-5)
    table = rope.rope_table(jnp.arange(1) + 77, (2, 2), 12)
    np.testing.assert_allclose(
        rope.rotate(rope.rotate(q, table), rope.inverse(table)), q, atol=1e-6
    )


def _frame_influence(layout, frames, teacher_forcing=False):
    """bool [output frame, input frame]: where the derivative of an output frame by an input frame
    is not exactly zero.

    Returns the influence of the noisy frames and, under teacher forcing, of the clean frames.
    """
    graphdef, params = tiny.model()
    x = tiny.latents(frames)
    clean = tiny.latents(frames, seed=1)
    # One tangent for each input frame, zero elsewhere.
    one_frame = np.eye(frames, dtype=np.float32).reshape(frames, 1, frames, 1, 1, 1)
    tangents = one_frame * tiny.normal(2, *x.shape)

    @jax.jit
    def influence(params, tangents, clean_tangents):
        def forward(x, clean):
            net = merge(graphdef, params)
            text = net.encode_text(tiny.text())
            context = net.context(clean, text, layout=layout) if teacher_forcing else None
            return net(x, jnp.full((1, frames), 500.0), text, layout=layout, context=context)

        moved = jax.vmap(lambda d, c: jax.jvp(forward, (x, clean), (d, c))[1])(
            tangents, clean_tangents
        )
        return jnp.any(moved != 0, axis=(1, 3, 4, 5)).T

    noisy = influence(params, tangents, np.zeros_like(tangents))
    return np.asarray(noisy), np.asarray(influence(params, np.zeros_like(tangents), tangents))


def _reachable(direct, layers):
    """Influence after several layers, each of which mixes as `direct` says (bool matrix power)."""
    total = np.eye(len(direct), dtype=bool)
    for _ in range(layers):
        total = (direct.astype(int) @ total.astype(int)) > 0
    return total


def _training_mask(frames, block, window, sink=0, independent=False):
    """The training mask of docs/models.md written out frame by frame, with the optional sink."""
    mask = np.zeros((frames, frames), bool)
    for f in range(frames):
        if independent:
            end = 1 if f == 0 else 1 + ((f - 1) // block + 1) * block
        else:
            end = (f // block + 1) * block
        for g in range(frames):
            if window == -1 or end <= window:
                seen = g < end
            else:
                seen = end - (window - sink) <= g < end or g < sink
            mask[f, g] = seen or g == f
    return mask


@pytest.mark.parametrize(
    "frames, block, window, sink, independent",
    [
        (5, 1, -1, 0, False),
        (7, 3, -1, 0, False),  # the last block is cut short
        (7, 2, 4, 0, False),  # cut short under a window
        (8, 2, 5, 2, False),
        (7, 3, 4, 0, True),
        (7, 3, 1, 0, False),  # window smaller than the block: a frame outside it sees only itself
    ],
)
def test_causality_by_exactly_zero_derivatives(frames, block, window, sink, independent):
    layout = Layout(block=block, window=window, sink=sink, independent_first_frame=independent)
    influence, _ = _frame_influence(layout, frames)
    direct = _training_mask(frames, block, window, sink, independent)
    np.testing.assert_array_equal(influence, _reachable(direct, tiny.CONFIG.num_layers))


@pytest.mark.parametrize(
    "layout", [Layout(block=2), Layout(block=2, window=4, sink=1, positions="relative")]
)
def test_teacher_forcing_by_exactly_zero_derivatives(layout):
    """A noisy block depends on no other noisy block and on no clean frame of its own or a later
    block.
    """
    frames = 8
    noisy, clean = _frame_influence(layout, frames, teacher_forcing=True)
    block = np.arange(frames) // 2
    np.testing.assert_array_equal(noisy, block[:, None] == block[None, :])
    direct = _training_mask(frames, 2, layout.window, layout.sink)
    earlier = block[:, None] > block[None, :]
    # Layer 1 reads the clean embeddings; layer 2 reads clean features that have themselves mixed
    # once.
    want = (direct & earlier) | ((direct & earlier).astype(int) @ direct.astype(int) > 0)
    np.testing.assert_array_equal(clean, want)


def test_narrow_window_masks_tokens_not_frames():
    """Outside a window smaller than the block a token sees itself, not its frame."""
    graphdef, params = tiny.model(dataclasses.replace(tiny.CONFIG, num_layers=1))

    def corner(x):
        net = merge(graphdef, params)
        out = net(
            x, jnp.zeros((1, 3)), net.encode_text(tiny.text()), layout=Layout(block=3, window=1)
        )
        return out[0, 0, :, :2, :2].sum()

    gradient = jax.jit(jax.grad(corner))(tiny.latents(3))
    assert np.all(gradient[0, 1] == 0) and np.any(gradient[0, 2] != 0)
    assert np.any(gradient[0, 0, :, :2, :2] != 0) and np.all(gradient[0, 0, :, 2:] == 0)


def test_timesteps_are_per_frame():
    """Framewise, a frame's own timestep moves its output; a later frame's does not, exactly."""
    graphdef, params = tiny.model()

    def forward(t):
        net = merge(graphdef, params)
        return net(tiny.latents(3), t, net.encode_text(tiny.text()), layout=Layout(block=1))

    base, moved = jax.jit(jax.vmap(forward))(
        jnp.array([[[900.0, 500.0, 100.0]], [[900.0, 500.0, 700.0]]])
    )
    np.testing.assert_array_equal(base[:, :2], moved[:, :2])
    assert np.abs(base[:, 2] - moved[:, 2]).max() > 1e-3


def test_short_text_is_padded_with_zeros():
    graphdef, params = tiny.model()
    short = tiny.text()[:, :2]
    padded = np.concatenate([short, np.zeros_like(short)], axis=1)
    encode = jax.jit(lambda text: merge(graphdef, params).encode_text(text).k)
    np.testing.assert_array_equal(encode(short), encode(padded))
    with pytest.raises(ValueError, match="text embeddings"):
        merge(graphdef, params).encode_text(jnp.zeros((1, 9, 8)))


@pytest.mark.slow
def test_remat_changes_no_gradient():
    layout, x = Layout(block=2), tiny.latents(4)

    def gradient(config):
        graphdef, params = tiny.model(config)

        def loss(params):
            net = merge(graphdef, params)
            return jnp.sum(
                net(x, jnp.full((1, 4), 250.0), net.encode_text(tiny.text()), layout=layout) ** 2
            )

        return jax.jit(jax.grad(loss))(params)

    plain, remat = gradient(tiny.CONFIG), gradient(dataclasses.replace(tiny.CONFIG, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), plain, remat)


def test_bfloat16_compute_follows_float32():
    graphdef, params = tiny.model()
    low, _ = tiny.model(dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))
    x, t = tiny.latents(4), jnp.full((1, 4), 750.0)

    def forward(graphdef):
        net = merge(graphdef, params)
        text = net.encode_text(tiny.text())
        return net(x, t, text, layout=Layout(block=2)), text.k

    (full, _), (half, key) = (jax.jit(forward, static_argnums=0)(g) for g in (graphdef, low))
    assert half.dtype == x.dtype and key.dtype == jnp.bfloat16
    error = np.abs(full - half).mean() / np.abs(full).mean()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"block": 0}, "Layout.block"),
        ({"window": 0}, "Layout.window"),
        ({"sink": -1}, "Layout.sink"),
        ({"window": 5, "sink": 3}, "cannot hold the sink"),
        ({"positions": "rolling"}, "Layout.positions"),
        (
            {"window": 12, "sink": 4, "positions": "relative", "faithful_sinks": True},
            "faithful_sinks",
        ),
    ],
)
def test_layout_refuses(change, culprit):
    with pytest.raises(ValueError, match=culprit):
        Layout(**change)


@pytest.mark.parametrize(
    "layout, frames, culprit",
    [
        (Layout(block=3), 7, "the next that fits is 9"),
        (Layout(block=3, independent_first_frame=True), 6, "the next that fits is 7"),
        (Layout(block=3, window=2), 6, "cannot hold a block"),
        (Layout(block=3), 1026, "1024 absolute positions"),
    ],
)
def test_layout_refuses_lengths(layout, frames, culprit):
    with pytest.raises(ValueError, match=culprit):
        layout.check_frames(frames)


def test_layout_of_longlive():
    """Window 12, sink 3, blocks of 3: what each block sees, and where the sink moves to."""
    blocks = Layout(block=3, window=12, sink=3).blocks(18)
    assert [b.ranges for b in blocks[2:]] == [
        ((0, 9),),
        ((0, 12),),
        ((0, 3), (6, 15)),
        ((0, 3), (9, 18)),
    ]
    assert [b.shift for b in blocks] == [0, 0, 0, 0, 3, 6]


SIZES = {"dim": 24, "ffn_dim": 32, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    "change",
    [{"num_heads": 5}, {"num_layers": 0}, {"attention": "flash"}, {"patch_size": (2, 2, 2)}],
    ids=lambda change: next(iter(change)),
)
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        WanConfig(**(SIZES | change))


def test_config_refuses_latents_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match="latent size"):
        WanConfig(**SIZES).grid((5, 4))
