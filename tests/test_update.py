"""update.py: the train step's invariances, its agreement with the rollout, its plan of an epoch.

Its agreement with the published optimizer step is an entry of the golden runner (fh_nft_step.npz).
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from astrolabe_jax import sharding, update
from astrolabe_jax.config import get_config
from astrolabe_jax.losses import kl_weights
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rollout import Sampler, noise_from_keys, rollout
from astrolabe_jax.schedule import velocity_to_x0
from tests.meshes import ONE, mesh_of
from tests.models import tiny
from tests.policies import assert_same_state

LAYOUT = Layout(block=2)
SAMPLES, FRAMES = 8, 4


def make_config(**fields):
    """The defaults at test size; fields as 'loss.kind' with the dot written __."""
    config = get_config()
    config.lora.rank, config.lora.alpha = 2, 2.0
    config.optimizer.microbatch = SAMPLES
    config.optimizer.learning_rate = 1e-2
    config.loss.kl_weight = 0.1
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


@functools.cache
def adapter(seed=50):
    return jax.device_get(tiny.adapter(seed=seed))


def make_state(config, mesh=None, step=1):
    """Four different policies, so that no term vanishes."""
    mesh = mesh or ONE
    state = update.init_state(config, adapter(), mesh)
    others = {"old": adapter(0), "reference": adapter(1), "ema": adapter(2), "step": np.int32(step)}
    return state._replace(**sharding.replicate(mesh, others))


def make_samples(count=SAMPLES):
    return update.Samples(
        latents=tiny.latents(FRAMES, count),
        r=np.linspace(0.1, 0.9, count, dtype=np.float32),
        mask=np.arange(count) % 3 > 0,
        prompt=np.arange(count, dtype=np.int32) % 2,
        key=jax.random.split(jax.random.key(5), count),
        text=tiny.text(2),
    )


def make_batch(samples, microbatch=SAMPLES):
    t = np.resize(np.array([1000, 937.5, 833.3333, 625], np.float32), len(samples.r))
    flat = (samples.latents, samples.r, kl_weights(samples.mask), samples.prompt, t, samples.key)
    return update.Batch(*(x.reshape(-1, microbatch, *x.shape[1:]) for x in flat))


@functools.cache
def compiled(config_json, mesh):
    """The train step of a config, compiled once for all tests that ask for it."""
    return update.TrainStep(ConfigDict(json.loads(config_json)), tiny.model()[0], LAYOUT, mesh)


def run_step(config, batch=None, mesh=None, state=None):
    mesh = mesh or ONE
    batch = sharding.shard_batch(
        mesh, make_batch(make_samples()) if batch is None else batch, axis=1
    )
    state = make_state(config, mesh) if state is None else state
    params = sharding.shard_params(mesh, tiny.model()[1])
    return compiled(config.to_json(), mesh)(state, params, make_samples().text, batch)


@functools.cache
def whole_batch_step():
    """The step that the others are compared with: all samples in one microbatch, on one device."""
    return jax.device_get(run_step(make_config()))


def assert_same_step(got, want):
    """States, metrics and samples' losses agree to float32 rounding."""
    (state, metrics), (wanted_state, wanted) = jax.device_get(got), want
    np.testing.assert_allclose(metrics.pop("sample_loss"), wanted["sample_loss"], rtol=2e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-5, err_msg=name)
    assert_same_state(state, wanted_state)


@pytest.mark.parametrize("microbatch", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_microbatches_do_not_change_the_step(microbatch):
    assert_same_step(
        run_step(make_config(), make_batch(make_samples(), microbatch)), whole_batch_step()
    )


@pytest.mark.parametrize("data, fsdp", [(8, 1), (2, 4)])
def test_eight_devices_take_the_same_step(data, fsdp):
    config = make_config(mesh__data=data, mesh__fsdp=fsdp)
    mesh = sharding.make_mesh(config.mesh)
    state, metrics = run_step(config, mesh=mesh)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert_same_step((state, metrics), whole_batch_step())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(block=2),
        Layout(block=1, window=3),
        Layout(block=2, window=4, sink=1),
        Layout(block=2, window=4, sink=2, positions="relative"),
    ],
    ids=str,
)
def test_clean_context_forward_equals_the_rollout(layout):
    """streaming.md 6.6: from the sampler's own last-step input, every block returns exactly what
    was sampled.
    """
    graphdef, params = tiny.model()
    sampler, frames, text, t = Sampler(steps=(1000.0, 625.0)), 6, tiny.text(1), jnp.array([625.0])
    forwards = [
        update.training_forward(make_config(loss__context=context), graphdef, layout)
        for context in ("clean", "noisy")
    ]

    @jax.jit
    def both(params, adapter, text):  # as constants they would be folded, slowly
        noise = noise_from_keys(jax.random.split(jax.random.key(0), 1), tiny.FRAME)
        latents, _, traces = rollout(
            graphdef,
            params,
            adapter,
            text,
            noise,
            frames=frames,
            latent_hw=tiny.LATENT_HW,
            layout=layout,
            sampler=sampler,
            trace=True,
        )
        # the last pass is the clean one
        x_t = jnp.concatenate([trace.inputs[-2] for trace in traces], axis=1)
        return latents, [
            velocity_to_x0(x_t, forward.velocity(params, adapter, text, latents, x_t, t), t / 1000)
            for forward in forwards
        ]

    latents, (clean, noisy) = both(params, adapter(), text)
    np.testing.assert_allclose(clean, latents, atol=2e-5)
    gap = np.abs(noisy - latents)
    # the first block has no context
    assert gap[:, : layout.block].max() < 2e-5 and gap[:, layout.block :].max() > 1e-2


def one_micro(count=2):
    return jax.tree.map(lambda leaf: leaf[0], make_batch(make_samples(count), count))


def test_gradient_reaches_only_the_current_policy_and_is_right():
    """Exactly zero for the others; for `current` equal to finite differences.

    With the astrolabe loss and noisy context nothing that depends on `current` is held fixed.
    """
    graphdef, params = tiny.model()
    config, direction = make_config(loss__context="noisy"), adapter(9)
    forward = update.training_forward(config, graphdef, LAYOUT)

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, params):
        state = update.TrainState(**adapters, ema=None, optimizer=None, step=0)
        terms = update.sample_terms(
            config, forward, update.standard_normal, state, params, tiny.text(2), one_micro()
        )
        return terms["total_loss"].sum()

    def moved(step):
        current = jax.tree.map(lambda a, d: a + np.float32(step) * d, adapter(), direction)
        return {"current": current, "old": adapter(0), "reference": adapter(1)}

    grads = loss(moved(0), params)[1]
    for name in ("old", "reference"):
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads[name]))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads["current"]))
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, jax.device_get(grads["current"]), direction)))
    np.testing.assert_allclose(
        (loss(moved(1e-2), params)[0] - loss(moved(-1e-2), params)[0]) / 2e-2, slope, rtol=1e-2
    )


def test_no_gradient_through_the_clean_context():
    """The gradient is that of a forward which is handed the context as a constant."""
    graphdef, params = tiny.model()
    text, weight = tiny.text(1), tiny.latents(FRAMES, seed=3)
    x0, x_t, t = tiny.latents(FRAMES, seed=1), tiny.latents(FRAMES, seed=2), jnp.array([700.0])
    forward = update.training_forward(make_config(), graphdef, LAYOUT)

    def own(policy, params, context):
        return forward.velocity(params, policy, text, x0, x_t, t)

    def given(policy, params, context):
        model = merge(graphdef, params)
        return model(
            x_t,
            jnp.full((1, FRAMES), 700.0),
            model.encode_text(text, policy),
            policy,
            layout=LAYOUT,
            context=context,
        )

    @jax.jit
    def gradients(policy, params):
        model = merge(graphdef, params)
        context = model.context(x0, model.encode_text(text, policy), policy, layout=LAYOUT)
        return [
            jax.grad(lambda policy, run=run: (run(policy, params, context) * weight).sum())(policy)
            for run in (own, given)
        ]

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        *gradients(adapter(), params),
    )


def test_velocity_deviations_times_sigma_squared_are_those_of_clean_latents():
    graphdef, params = tiny.model()

    def terms(kind, params):
        config = make_config(loss__kind=kind, loss__context="noisy")
        forward = update.training_forward(config, graphdef, LAYOUT)
        state = update.TrainState(adapter(), adapter(0), adapter(1), None, None, 0)
        return update.sample_terms(
            config, forward, update.standard_normal, state, params, tiny.text(2), one_micro(4)
        )

    x0_space, v_space = jax.jit(
        lambda params: [terms(kind, params) for kind in ("astrolabe", "diffusion_nft")]
    )(params)
    sigma = one_micro(4).t / 1000
    for name in ("old_deviate", "old_kl_div", "kl_div"):
        np.testing.assert_allclose(x0_space[name], sigma**2 * v_space[name], rtol=1e-4)
    np.testing.assert_array_equal(x0_space["x0_norm"], v_space["x0_norm"])


def spoilt(values, sample, value):
    values = np.array(values)
    values[sample] = value
    return values


def test_a_non_finite_sample_leaves_the_state_alone():
    config, samples = make_config(), make_samples()
    before = jax.device_get(make_state(config))
    for bad in (
        samples._replace(r=spoilt(samples.r, 3, np.nan)),
        samples._replace(latents=spoilt(samples.latents, 3, np.inf)),
    ):
        state, metrics = run_step(config, make_batch(bad))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
        np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(metrics["sample_loss"])), [3])


def broken_moments():
    """A state whose loss and gradient are finite, but not the policy that Adam makes of them."""
    state = jax.device_get(make_state(make_config()))
    adam, *rest = state.optimizer
    name = next(iter(adam.mu))
    spoilt_a = spoilt(adam.mu[name]["a"], 0, np.inf)
    adam = adam._replace(mu=adam.mu | {name: adam.mu[name] | {"a": spoilt_a}})
    return state._replace(optimizer=(adam, *rest))


def test_a_non_finite_adapter_leaves_the_state_alone():
    before = broken_moments()
    state, metrics = run_step(make_config(), state=sharding.replicate(ONE, before))
    assert np.isfinite(metrics["sample_loss"]).all() and np.isfinite(metrics["grad_norm"])
    assert not np.isfinite(metrics["adapter_norm"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


@functools.cache
def whole_epoch(reduction, draw):
    """Two steps of one microbatch each, on one device, nothing cut."""
    return run_epoch(cut_config(reduction, draw, -1), make_samples(4 * SAMPLES))


def cut_config(reduction, draw, limit):
    fields = {
        "kl__reduction": reduction,
        "loss__timestep_draw": draw,
        "mesh__samples_per_device": limit,
    }
    return make_config(optimizer__microbatch=2 * SAMPLES, optimizer__steps_per_pass=2, **fields)


@pytest.mark.parametrize(
    ("devices", "limit", "reduction", "draw"),
    [
        (1, 3, "epoch", "stratified"),
        pytest.param(8, 1, "microbatch", "batch", marks=pytest.mark.slow),
        pytest.param(2, 5, "epoch", "stratified", marks=pytest.mark.slow),
        pytest.param(1, 3, "microbatch", "batch", marks=pytest.mark.slow),
    ],
)
def test_devices_that_hold_less_take_the_same_steps_in_pieces(devices, limit, reduction, draw):
    """Sums over smaller pieces: losses, gradients and policies agree to rounding."""
    config = cut_config(reduction, draw, limit)
    steps = run_epoch(
        config, make_samples(4 * SAMPLES), mesh=mesh_of(devices=jax.devices()[:devices])
    )
    for got, want in zip(steps, whole_epoch(reduction, draw), strict=True):
        for name in got[1]:
            np.testing.assert_allclose(got[1][name], want[1][name], rtol=2e-5, err_msg=name)
        assert_same_state(got[0], want[0])


@given(
    devices=st.sampled_from([1, 2, 4, 8]),
    each=st.integers(1, 12),
    limit=st.integers(1, 16) | st.just(-1),
)
def test_a_cut_plan_is_the_same_plan_in_the_largest_pieces_that_fit(devices, each, limit):
    config = make_config(
        optimizer__microbatch=devices * each,
        kl__reduction="microbatch",
        loss__timestep_draw="batch",
    )
    config.mesh.samples_per_device = limit
    mask = np.arange(3 * devices * each) % 3 > 0
    whole = plan(config, mask=mask)
    pieces = update.cut(config, whole, devices)
    for part, wanted in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(part.reshape(-1), wanted.reshape(-1))
    size, rest = divmod(pieces.order.shape[2], devices)
    fitting = [p for p in range(1, each + 1) if each % p == 0 and (limit == -1 or p <= limit)]
    assert rest == 0 and size == max(fitting)


def run_epoch(config, samples, state=None, mesh=ONE):
    """Every (state, metrics) that `update` yields for epoch 2, on the host."""
    state = make_state(config, mesh) if state is None else sharding.replicate(mesh, state)
    # how steps and passes divide an epoch is not compiled in
    step = compiled(make_config().to_json(), mesh)
    steps = update.update(step, config, mesh, state, tiny.model()[1], samples, 2)
    return [jax.device_get((state, metrics)) for state, metrics in steps]


def test_an_epoch_takes_every_step_of_every_pass():
    config = make_config(optimizer__steps_per_pass=2, optimizer__inner_epochs=2)
    steps = run_epoch(config, make_samples(2 * SAMPLES))
    assert [int(state.step) for state, _ in steps] == [2, 3, 4, 5]
    assert all(np.isfinite(value) for _, metrics in steps for value in metrics.values())


def test_passes_draw_fresh_noise():
    """Two policies that do not move, compared on the same samples at the same level: only the noise
    differs.
    """
    config = make_config(optimizer__inner_epochs=2, sampler__steps=(1000,))
    first, second = (metrics["old_kl_div"] for _, metrics in run_epoch(config, make_samples()))
    assert abs(first - second) > 1e-4


def test_repeated_steps_pull_predictions_towards_good_samples():
    samples = make_samples()._replace(r=np.ones(SAMPLES, np.float32))
    trace = [
        metrics["policy_loss"]
        for _, metrics in run_epoch(make_config(optimizer__inner_epochs=12), samples)
    ]
    # each mean has every sample at every level
    assert np.mean(trace[-4:]) < 0.98 * np.mean(trace[:4])


def test_an_epoch_names_the_sample_whose_loss_is_not_finite():
    samples = make_samples()
    with pytest.raises(
        FloatingPointError, match="epoch 3, step 1: .*1 of 8 samples.*sample 5: nan"
    ):
        run_epoch(make_config(), samples._replace(latents=spoilt(samples.latents, 5, np.nan)))


def applied(config, norm):
    """State before and after a step with a gradient of ones whose norm is said to be `norm`."""
    before = make_state(config)
    grads = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), before.current)
    step = jax.jit(functools.partial(update.apply_gradient, config, update.make_optimizer(config)))
    return before, step(before, grads, jnp.float32(norm))


def test_bfloat16_adapters_stay_bfloat16():
    before, after = applied(make_config(lora__dtype="bfloat16"), 1.0)
    for part in (after.current, after.optimizer[0].mu, after.optimizer[0].nu):
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(part))
    assert all(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (after.current, before.current)), strict=True)
    )


@pytest.mark.parametrize("norm, scale", [(0.25, 1.0), (5.0, 0.1)])
def test_gradients_are_clipped_by_their_global_norm(norm, scale):
    _, after = applied(make_config(optimizer__clip_norm=0.5), norm)
    for leaf in jax.tree.leaves(after.optimizer[0].mu):  # (1 - b1) gradient
        np.testing.assert_allclose(leaf, 0.1 * scale, rtol=1e-5)


def test_an_epoch_names_an_adapter_that_is_not_finite():
    with pytest.raises(
        FloatingPointError,
        match="epoch 3, step 1: the norm of the updated adapter is inf .*not taken",
    ):
        run_epoch(make_config(), make_samples(), state=broken_moments())


# The plan of a pass.


def plan(config, epoch=0, turn=0, count=24, mask=None):
    return update.plan_pass(config, epoch, turn, np.ones(count, bool) if mask is None else mask)


def test_a_pass_visits_every_sample_once_in_an_order_of_its_own():
    config = make_config(optimizer__microbatch=4, optimizer__steps_per_pass=3)
    first = plan(config)
    assert first.order.shape == first.t.shape == first.kl_weight.shape == (3, 2, 4)
    np.testing.assert_array_equal(np.sort(first.order.reshape(-1)), np.arange(24))
    np.testing.assert_array_equal(plan(config).order, first.order)
    reseeded = make_config(seed=1, optimizer__microbatch=4, optimizer__steps_per_pass=3)
    others = [plan(config, epoch=1), plan(config, turn=1), plan(reseeded)]
    assert all(np.any(other.order != first.order) for other in others)


def levels_by_sample(config, turn, count=24):
    drawn = plan(config, turn=turn, count=count)
    levels = np.empty(count)
    levels[drawn.order.reshape(-1)] = drawn.t.reshape(-1)
    return levels


def test_stratified_levels_are_balanced_over_neighbours_and_over_passes():
    config = make_config(optimizer__microbatch=4)
    table = np.sort(np.asarray(update.levels(config), np.float32))
    passes = np.stack([levels_by_sample(config, turn) for turn in range(8)])
    for turn in range(8):
        np.testing.assert_array_equal(
            np.sort(passes[turn].reshape(6, 4), axis=1), np.tile(table, (6, 1))
        )
    for cycle in (passes[:4], passes[4:]):
        np.testing.assert_array_equal(np.sort(cycle, axis=0), np.tile(table[:, None], (1, 24)))
    assert np.any(passes[:4] != passes[4:])
    counts = np.unique(
        levels_by_sample(make_config(optimizer__microbatch=1), 0, count=6), return_counts=True
    )[1]
    assert counts.max() <= 2  # 6 samples over 4 levels


def test_nothing_is_learnt_without_noise():
    krea = make_config(sampler__steps=(1000, 750, 500, 250, 0))
    assert update.levels(krea) == update.levels(make_config(sampler__steps=(1000, 750, 500, 250)))


def test_batch_levels_are_one_to_a_microbatch():
    config = make_config(optimizer__microbatch=4, loss__timestep_draw="batch")
    drawn = np.concatenate([plan(config, epoch).t.reshape(-1, 4) for epoch in range(20)])
    assert np.all(drawn == drawn[:, :1])
    assert set(drawn[:, 0]) == set(np.asarray(update.levels(config), np.float32))


def test_levels_warped_or_raw():
    np.testing.assert_allclose(update.levels(make_config()), (1000, 937.5, 833.33333, 625))
    assert update.levels(make_config(loss__timesteps="raw")) == (1000, 750, 500, 250)
    assert update.levels(make_config(sampler__warp=False)) == (1000, 750, 500, 250)


def test_kl_weights_by_epoch_or_microbatch():
    mask = np.arange(24) < 6
    for reduction, size in (("epoch", 24), ("microbatch", 4)):
        config = make_config(optimizer__microbatch=4, kl__reduction=reduction)
        drawn = plan(config, mask=mask)
        chosen = mask[drawn.order.reshape(-1)].reshape(-1, size)
        assert np.all(drawn.kl_weight.reshape(-1, size)[~chosen] == 0)
        np.testing.assert_allclose(
            drawn.kl_weight.reshape(-1, size).mean(axis=1), chosen.any(axis=1), rtol=1e-6
        )


def test_plan_refuses_incomplete_microbatches():
    with pytest.raises(ValueError, match="24 samples .*optimizer.microbatch"):
        plan(make_config(optimizer__microbatch=5))


# Averages and copies of policies.


def test_decays_of_the_behaviour_policy():
    """The table of objective.md 8."""
    table = {
        100: (0, 0.1, 0.1875),
        208: (0, 0.208, 0.9975),
        209: (0, 0.209, 0.999),
        500: (0, 0.5, 0.999),
        9000: (0, 0.5, 0.999),
        74: (0, 0.074, 0),
    }
    for step, want in table.items():
        got = [
            update.old_decay(kind, step, 0.9) for kind in ("type0", "type1", "type2", "constant")
        ]
        np.testing.assert_allclose(got, (*want, 0.9), rtol=1e-12)
    with pytest.raises(ValueError, match="optimizer.old_decay"):
        update.old_decay("type3", 0, 0.9)


def test_decays_of_the_evaluation_average():
    got = [update.ema_decay(step, 0.9) for step in (0, 1, 10, 79, 80, 1000)]
    np.testing.assert_allclose(got, [0.1, 0.1818182, 0.55, 0.8988764, 0.9, 0.9], rtol=1e-6)


def test_the_average_starts_from_the_first_step():
    config = make_config()
    state, _ = run_step(config, state=make_state(config, step=0))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.current)
    state, _ = run_step(config, state=make_state(config, step=1))
    want = update.average(adapter(2), state.current, 2 / 11)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.ema, want
    )


def test_blend_and_reset_copy():
    before = jax.device_get(make_state(make_config()))
    state = update.reset_reference(update.blend_old(make_state(make_config()), 0.25))
    want = jax.tree.map(
        lambda old, current: 0.25 * old + 0.75 * current, before.old, before.current
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.old, want)
    jax.tree.map(np.testing.assert_array_equal, state.reference, before.current)
    pointers = [
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves((state.current, state.reference, state.old))
    ]
    assert len(set(pointers)) == len(pointers)  # or donation would overwrite one through the other
