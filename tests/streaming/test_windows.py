"""Streams, forks and windows of long videos: the tests of spec/streaming.md 10, by their numbers.

Tests 1 and 7 are in models/test_window.py, test 9 is in e2e/test_windows.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import prompts, rollout, segments, update
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rollout import Sampler, noise_from_keys
from astrolabe_jax.schedule import velocity_to_x0
from astrolabe_jax.types import RngStream
from tests.e2e import runs
from tests.models import tiny
from tests.test_update import make_batch, make_config, make_samples
from tests.tiny_base import write_tiny_base

FRAMES = 6
ONE_DEVICE = runs.WINDOWS | {"streaming.prompts_per_device": 2}
GEOMETRIES = {
    "sink, relative": {},
    "sink, absolute": {"model.positions": "absolute"},
    "no sink, relative": {"model.sink": 0, "model.window": 2},
    "no sink, absolute, blocks of two": {
        "model.block": 2,
        "model.sink": 0,
        "model.window": 4,
        "model.positions": "absolute",
    },
}

SOME = [
    name
    if name in ("sink, relative", "no sink, absolute, blocks of two")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in GEOMETRIES
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def told(base, tmp_path_factory):
    """geometry -> a run on one device, and the cast of its first epoch: two prompts with four
    videos each.
    """

    @functools.cache
    def tell(geometry):
        config = runs.small_config(base, **ONE_DEVICE | GEOMETRIES[geometry])
        run = runs.prepared(config, tmp_path_factory.mktemp("runs") / "run")
        batch = prompts.draw(run.train_prompts, config.seed, 0, 2, 4, 1)
        keys = prompts.sample_keys(batch, config.seed, RngStream.ROLLOUT, 0)
        return run, segments.cast_of(run, batch, keys, FRAMES, runs.quiet())

    return tell


def filmed(run, cast, start, stop, streams=None, **options):
    streams = segments.begin(run, len(cast.stories)) if streams is None else streams
    return segments.film(
        run, tiny.adapter(), cast, streams, segments.blocks_of(run, start, stop), **options
    )


# before and after a block has stopped to see all that is before it
@pytest.mark.parametrize("start", [2, 4])
@pytest.mark.parametrize("geometry", SOME)
def test_2_3_8_a_fork_with_the_keys_of_a_run_goes_on_as_the_run(told, geometry, start):
    """Bit for bit where as many are computed at once, its frames too; with other keys it is another
    video.
    """
    run, cast = told(geometry)
    whole = filmed(run, cast, 0, FRAMES, watch=True)
    past = filmed(run, cast, 0, start)
    forked = segments.fork(run, past.streams, 1)
    memory = forked.vae
    take = filmed(run, cast, start, FRAMES, forked, decode=False)
    np.testing.assert_array_equal(
        np.concatenate([past.latents, take.latents], axis=1), whole.latents
    )
    for got, want in zip(take.streams.cache, whole.streams.cache, strict=True):
        np.testing.assert_array_equal(got, want)
    frames = segments.on_host(segments.decoded(run, take.latents, memory)[0])
    assert frames.shape[1] == 4 * (FRAMES - start)
    for i in range(frames.shape[1]):
        np.testing.assert_array_equal(frames[:, i], whole.frames[:, 4 * start - 3 + i])

    # what is before the window is the first one's
    shared = filmed(run, cast.part(np.array([0, 4])), 0, start)
    np.testing.assert_allclose(shared.latents, past.latents[::4], atol=2e-5)
    forked = segments.fork(run, shared.streams, 4)
    same, memory = segments.fork(run, shared.streams, 4), forked.vae
    own = np.asarray(filmed(run, cast, start, FRAMES, forked, decode=False).latents)
    np.testing.assert_allclose(own[::4], whole.latents[::4, start:], atol=2e-5)
    frames = segments.on_host(segments.decoded(run, own, memory)[0])[::4].astype(int)
    assert np.abs(frames - whole.frames[::4, 4 * start - 3 :]).max() <= 1
    for videos in (own[:4], own[4:]):
        apart = np.abs(videos[:, None] - videos[None]).max(axis=(3, 4, 5))
        assert (apart[~np.eye(4, dtype=bool)] > 0.1).all()
    chosen = np.array([1, 1, 1, 1, 6, 6, 6, 6])
    again = filmed(run, cast.part(chosen), start, FRAMES, same, decode=False).latents
    np.testing.assert_array_equal(again, own[chosen])


@pytest.mark.parametrize("geometry", SOME)
def test_2_a_stream_equals_the_rollout(told, geometry):
    run, cast = told(geometry)
    own = cast.part(np.array([0, 4]))
    streamed = segments.film(
        run, tiny.adapter(), own, segments.begin(run, 2), segments.blocks_of(run, 0, FRAMES)
    )
    net, text = run.base.transformer, cast.embeddings[[cast.rows[prompt] for prompt in own.at(0)]]

    @jax.jit
    def sampled(params, adapter, text):
        draw, hw = noise_from_keys(own.keys, run.latent_shape[1:]), run.latent_shape[2:]
        options = {"layout": run.layout, "sampler": run.sampler, "lora_scale": run.lora_scale}
        return rollout.rollout(
            net.graphdef, params, adapter, text, draw, frames=FRAMES, latent_hw=hw, **options
        )

    latents, cache = sampled(net.params, tiny.adapter(), text)
    np.testing.assert_allclose(streamed.latents, latents, atol=2e-5)
    for got, want in zip(streamed.streams.cache, cache, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    slots = run.layout.capacity
    np.testing.assert_array_equal(streamed.streams.recent, np.asarray(streamed.latents)[:, -slots:])
    np.testing.assert_array_equal(
        streamed.streams.first, np.asarray(streamed.latents)[:, : run.layout.kept]
    )


@pytest.mark.parametrize("start", [2, 4])
def test_a_stream_goes_on_behind_given_latents_as_if_it_had_sampled_them(told, start):
    """streaming.md 5.2: the clean passes alone leave the same keys, latents and decoder, bit for
    bit.
    """
    run, cast = told("sink, relative")
    past, stop = filmed(run, cast, 0, start), start + 2
    want = filmed(run, cast, start, stop, segments.fork(run, past.streams, 1))
    blocks = segments.blocks_of(run, start, stop)
    got = segments.proceed(
        run, tiny.adapter(), cast, past.streams, want.latents, blocks, decode=True
    )
    jax.tree.map(np.testing.assert_array_equal, got, want.streams)


def test_making_keys_anew_changes_nothing_while_all_is_in_sight(told):
    """By the same policy (streaming.md 5.2); behind evicted frames deep layers, which have seen
    them, differ.
    """
    run, cast = told("sink, relative")
    for start, frames in ((2, 2), (4, 3)):
        streams = filmed(run, cast, 0, start).streams
        again = segments.recached(run, tiny.adapter(), cast, streams, start)
        for got, want in zip(again.cache, streams.cache, strict=True):
            apart = np.abs(got - want)[:, :, : frames * 1]
            assert apart[0].max() < 2e-5 and (apart[1].max() < 2e-5) == (start == 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"streaming.selection": "random"}, {0, 1, 2, 3, 4}),
        ({"streaming.selection": "first"}, {0}),
        ({"streaming.selection": "last"}, {4}),
        ({"streaming.selection": "choices", "streaming.starts": (3, 1)}, {1, 3}),
        ({"streaming.mode": "progressive"}, {0, 2, 4}),
        ({"model.block": 2, "model.window": 4}, {0, 2, 4}),
    ],
    ids=str,
)
def test_10_windows_begin_at_the_same_frames_everywhere(base, tmp_path, changes, expected):
    """For 1000 epochs, on one device or two: at whole blocks, the last one ends with the video, all
    equally often.
    """
    config = runs.small_config(base, **runs.WINDOWS | {"model.sink": 0} | changes)
    one, other = (
        [segments.begins_at(run, epoch) for epoch in range(1000)]
        for run in (runs.prepared(config, tmp_path / f"{devices}", devices) for devices in (2, 4))
    )
    assert one == other and set(one) == expected
    assert all(start % config.model.block == 0 and 0 <= start <= FRAMES - 2 for start in one)
    assert (
        config.streaming.starts or max(one) == FRAMES - 2 or config.streaming.selection == "first"
    )
    counts = np.bincount(one)[sorted(expected)] / (1000 / len(expected))
    assert 0.8 < counts.min() and counts.max() < 1.2
    other_seed = runs.small_config(base, **runs.WINDOWS | {"model.sink": 0, "seed": 1} | changes)
    run = runs.prepared(other_seed, tmp_path / "seed", 2)
    drawn = config.streaming.mode == "epoch" and len(expected) > 1
    assert ([segments.begins_at(run, epoch) for epoch in range(1000)] != one) == drawn


LAYOUT = Layout(block=2, window=6, sink=2, positions="relative")
PAST = 6  # frames, of which the window sees four


@functools.cache
def past_of(prefix):
    """What the loss reads of a past, made of `adapter` and latents [2, PAST, C, H, W]: History's
    arrays.
    """
    graphdef, params = tiny.model()

    def cache_of(adapter, latents):
        model = merge(graphdef, params)
        text = model.encode_text(tiny.text(2), adapter)
        made = model.context(latents, text, adapter, layout=LAYOUT)
        return kv.place_visible(
            kv.empty_cache(tiny.CONFIG, 2, LAYOUT.capacity, tiny.LATENT_HW), *made, LAYOUT, PAST
        )

    def history(adapter, latents):
        start, positions = jnp.int32(PAST), np.arange(PAST, PAST + 4)
        if prefix == "full":
            return update.History(start, positions, whole=latents)
        if prefix == "rollout_old":
            return update.History(start, positions, cache_of(adapter, latents))
        return update.History(
            start, positions, first=latents[:, :2], recent=latents[:, -LAYOUT.capacity :]
        )

    return history


@pytest.mark.parametrize(
    "prefix",
    [
        "rollout_old",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("per_policy", "noised_prefix", "full")
        ),
    ],
)
def test_4_gradients_end_at_the_window_unless_they_are_asked_to_go_on(prefix):
    """Of the loss, by the latents of the past, by its keys, and by the policy through either:
    exactly zero, or not.
    """
    graphdef, params = tiny.model()
    changes = {"streaming__backprop": "full"} if prefix == "full" else {"streaming__prefix": prefix}
    config = make_config(streaming__window=4, **changes)
    forward = update.training_forward(config, graphdef, LAYOUT)
    micro = jax.tree.map(lambda leaf: leaf[0], make_batch(make_samples(4), 4))

    def loss(params, current, behind, latents, keys):
        """behind: the policy, where it makes what is behind the window."""
        history = past_of(prefix)(behind, latents)
        if history.cache is not None:
            history = history._replace(cache=jax.tree.map(jnp.add, history.cache, keys))
        state = update.TrainState(
            current, tiny.adapter(seed=1), tiny.adapter(seed=2), None, None, 0
        )
        terms = update.sample_terms(
            config, forward, update.standard_normal, state, params, tiny.text(2), micro, history
        )
        return terms["total_loss"].sum()

    slots = LAYOUT.capacity * 4  # of four tokens
    keys = kv.Cache(
        *[np.zeros((tiny.CONFIG.num_layers, 2, slots, 2, tiny.CONFIG.head_dim), np.float32)] * 2
    )
    x = tiny.latents(PAST, 2, seed=4)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3, 4)))(
        params, tiny.adapter(), tiny.adapter(seed=3), x, keys
    )
    of_policy, of_behind, of_latents, of_keys = (
        max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) for grad in grads
    )
    assert np.isfinite(value) and of_policy > 0
    assert of_behind == of_keys == 0
    assert (of_latents > 0) == (prefix == "full")


@pytest.mark.slow
def test_4_the_policy_learns_through_the_past_with_full_gradients():
    """The same predictions from its own keys of the past, held fixed, have another gradient.

    So do the latents of the past, which have none then.
    """
    graphdef, params = tiny.model()
    full = update.training_forward(
        make_config(streaming__backprop="full", streaming__window=4), graphdef, LAYOUT
    )
    fixed = update.training_forward(
        make_config(streaming__window=4, loss__context_gradient=True), graphdef, LAYOUT
    )
    x0, x_t, t = (
        tiny.latents(4, 2, seed=5),
        tiny.latents(4, 2, seed=6),
        np.full(2, 700.0, np.float32),
    )
    weight, before = tiny.latents(4, 2, seed=7), tiny.latents(PAST, 2, seed=4)

    def value(adapter, before, params, forward, prefix):
        history = past_of(prefix)(adapter, before)
        return (
            forward.velocity(params, adapter, tiny.text(2), x0, x_t, t, history) * weight
        ).mean()

    both = jax.jit(
        lambda *given: [
            jax.value_and_grad(value, argnums=(0, 1))(*given, *kind)
            for kind in ((full, "full"), (fixed, "rollout_old"))
        ]
    )
    (one, (through, reached)), (other, (ended, unreached)) = both(tiny.adapter(), before, params)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(through))
    gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), through, ended)
    assert max(jax.tree.leaves(gap)) > 1e-3
    assert np.abs(reached).max() > 1e-5 and not np.any(unreached)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(block=2, window=4, sink=2, positions="relative"),
        pytest.param(Layout(block=1, window=4, sink=1), marks=pytest.mark.slow),
        pytest.param(Layout(block=2, window=4), marks=pytest.mark.slow),
        pytest.param(Layout(block=1, window=3, positions="relative"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_5_a_window_behind_a_past_returns_what_was_sampled(layout):
    """streaming.md 6.6, from the sampler's own last-step input, at every start by one program; not
    with other keys.
    """
    graphdef, params = tiny.model()
    sampler, count, frames = Sampler(steps=(1000.0, 625.0)), 4, 10
    forward = update.training_forward(make_config(streaming__window=count), graphdef, layout)

    @jax.jit
    def sampled(params, adapter, cache, start):
        noise = noise_from_keys(jax.random.split(jax.random.key(0), 2), tiny.FRAME)
        noise = jnp.stack([noise(start, step, layout.block) for step in range(2)])
        text = rollout.encode_text(graphdef, params, adapter, tiny.text(2))
        return rollout.rollout_block(
            graphdef,
            params,
            adapter,
            text,
            noise,
            cache,
            start,
            layout=layout,
            sampler=sampler,
            partial=True,
        )

    @jax.jit
    def predicted(params, adapter, cache, start, x0, x_t):
        history, t = update.History(start, start + jnp.arange(count), cache), jnp.full(2, 625.0)
        velocity = forward.velocity(params, adapter, tiny.text(2), x0, x_t, t, history)
        return velocity_to_x0(x_t, velocity, t / 1000)

    cache = kv.empty_cache(tiny.CONFIG, 2, layout.capacity, tiny.LATENT_HW)
    blocks, inputs, caches = [], [], {}
    for start in range(0, frames, layout.block):
        caches[start] = cache
        latents, cache, record = sampled(params, tiny.adapter(), cache, jnp.int32(start))
        blocks.append(latents)
        inputs.append(record.inputs[-2])  # the last pass is the clean one
    latents, inputs = (np.concatenate(parts, axis=1) for parts in (blocks, inputs))
    for start in range(0, frames - count + 1, layout.block):
        part = slice(start, start + count)
        given = (
            params,
            tiny.adapter(),
            caches[start],
            jnp.int32(start),
            latents[:, part],
            inputs[:, part],
        )
        np.testing.assert_allclose(predicted(*given), latents[:, part], atol=2e-5)
    assert predicted._cache_size() == 1
    other = jax.tree.map(lambda part: part + 0.1, caches[start])
    assert (
        np.abs(predicted(params, tiny.adapter(), other, *given[3:]) - latents[:, part]).max() > 1e-3
    )
