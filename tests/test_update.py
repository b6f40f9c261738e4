"""The train step: its invariances, its gradient, what it refuses, and the averages of policies.

Its agreement with the published optimizer step is an entry of the golden runner (fh_nft_step.npz).
"""

import copy
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from astrolabe_jax import sharding, update
from astrolabe_jax.types import TrainState
from tests.meshes import ONE, mesh_of
from tests.models import tiny
from tests.policies import assert_same_state
from tests.tiny_training import (
    LAYOUT,
    SAMPLES,
    adapter,
    make_batch,
    make_config,
    make_samples,
    make_state,
)


@functools.cache
def compiled(config_json, mesh):
    """The train step of a config, compiled once for all tests that ask for it."""
    return update.TrainStep(ConfigDict(json.loads(config_json)), tiny.model()[0], LAYOUT, mesh)


def run_step(config, batch=None, mesh=ONE, state=None):
    batch = sharding.shard_batch(
        mesh, make_batch(make_samples()) if batch is None else batch, axis=1
    )
    state = make_state(config, mesh) if state is None else state
    params = sharding.shard_params(mesh, tiny.model()[1])
    with jax.set_mesh(mesh):
        return compiled(config.to_json(), mesh)(state, params, make_samples().text, batch)


def test_layers_are_gathered_one_at_a_time():
    """No device ever holds a whole stack of kernels or of adapters."""
    config = make_config(mesh__data=1, mesh__fsdp=8)
    mesh = sharding.make_mesh(config.mesh)
    samples = make_samples()
    batch = sharding.shard_batch(mesh, make_batch(samples), axis=1)
    state = make_state(config, mesh)
    part = update.PartArrays(np.int32(0), None, None, None, update.scalars_of(config))
    params = sharding.shard_params(mesh, tiny.model()[1])
    with jax.set_mesh(mesh):
        step = compiled(config.to_json(), mesh)
        program = step.accumulate.lower(state.current, state, params, samples.text, batch, part)
        text = program.compile().as_text()
    gathered = {
        tuple(map(int, sizes.split(",")))
        for sizes in re.findall(r"= \(?f32\[([\d,]+)\]\S* all-gather\(", text)
    }
    split = [
        leaf.shape
        for leaf in jax.tree.leaves((state.current, params))
        if not leaf.is_fully_replicated and leaf.ndim == 3
    ]
    assert {(1, *shape[1:]) for shape in split} <= gathered
    assert not gathered & set(split)


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


@pytest.mark.parametrize("data, fsdp", [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4)])
def test_eight_devices_take_the_same_step(data, fsdp):
    config = make_config(mesh__data=data, mesh__fsdp=fsdp)
    mesh = sharding.make_mesh(config.mesh)
    state, metrics = run_step(config, mesh=mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        place = sharding.param_sharding(mesh, name, leaf.shape)
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), name
    on_each = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    in_all = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert on_each == pytest.approx(in_all / fsdp, rel=1e-3)
    assert_same_step((state, metrics), whole_batch_step())


def one_micro(count=2):
    return jax.tree.map(lambda leaf: leaf[0], make_batch(make_samples(count), count))


def test_gradient_reaches_only_the_current_policy_and_is_right():
    """Exactly zero for the others; for `current` equal to finite differences.

    With the astrolabe loss and noisy context nothing that depends on `current` is held fixed.
    """
    graphdef, params = tiny.model()
    config = make_config(loss__context="noisy")
    direction = adapter(9)
    objective = update.Objective(config, update.training_forward(config, graphdef, LAYOUT))

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, params):
        state = TrainState(**adapters, ema=None, optimizer=None, step=0)
        terms = update.sample_terms(objective, state, params, tiny.text(2), one_micro())
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


def test_velocity_deviations_times_sigma_squared_are_those_of_clean_latents():
    graphdef, params = tiny.model()

    def terms(kind, params):
        config = make_config(loss__kind=kind, loss__context="noisy")
        objective = update.Objective(config, update.training_forward(config, graphdef, LAYOUT))
        state = TrainState(adapter(), adapter(0), adapter(1), None, None, 0)
        return update.sample_terms(objective, state, params, tiny.text(2), one_micro(4))

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
        pytest.param(1, 3, "epoch", "stratified", marks=pytest.mark.slow),
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


def run_epoch(config, samples, state=None, mesh=ONE):
    """Every (state, metrics) that `update` yields for epoch 2, on the host."""
    state = make_state(config, mesh) if state is None else sharding.replicate(mesh, state)
    # how steps and passes divide an epoch is not compiled in
    step = copy.copy(compiled(make_config().to_json(), mesh))
    step.config = config
    with jax.set_mesh(mesh):
        steps = update.update(step, state, tiny.model()[1], samples, 2)
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


# Averages and copies of policies.


def test_decays_of_the_behaviour_policy():
    """The table of docs/objective.md, Behaviour policy."""
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


def test_a_sweep_over_the_scalars_compiles_once():
    programs = set()
    for number in (0.1, 0.7):
        config = make_config(
            loss__mix_beta=number,
            loss__kl_weight=number,
            loss__kind="diffusion_nft",
            advantages__clip=10 * number,
            optimizer__learning_rate=number / 100,
        )
        graphdef, params = tiny.model()
        step = update.TrainStep(config, graphdef, LAYOUT, ONE)
        state = make_state(config)
        scalars = update.scalars_of(config)
        part = update.PartArrays(np.int32(0), None, None, None, scalars)
        samples = make_samples()
        with jax.set_mesh(ONE):
            arguments = (state.current, state, params, samples.text, make_batch(samples), part)
            gradient = step.accumulate.lower(*arguments)
            _, terms = gradient.out_info
            finish = step.finish.lower(state, scalars, state.current, [terms], True)
        programs.add((gradient.as_text(), finish.as_text()))
    assert len(programs) == 1


def test_samples_that_are_all_alike_move_nothing():
    """All optimalities are 1/2: of the rounding in their gradient AdamW would make full steps."""
    config = make_config()
    train_step = compiled(config.to_json(), ONE)
    samples = make_samples()
    params = sharding.shard_params(ONE, tiny.model()[1])
    before = jax.device_get(make_state(config))
    for r, moves in ((np.full(SAMPLES, 0.5, np.float32), False), (samples.r, True)):
        given = samples._replace(r=r)
        assert update.teaches(given) == moves
        with jax.set_mesh(ONE):
            ((state, metrics),) = update.update(train_step, make_state(config), params, given, 0)
        changed = [
            not np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (before, jax.device_get(state))), strict=True)
        ]
        assert any(changed) == moves and metrics["grad_norm"] > 0 and metrics["kl_loss"] > 0
