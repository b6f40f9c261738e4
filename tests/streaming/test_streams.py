"""Streams: equal to the rollout where no prompt changes; what a change keeps, and that nothing else
is kept.
"""

import jax
import numpy as np
import pytest

from astrolabe_jax import rollout as R
from astrolabe_jax import stream as S
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.streaming.scenes import Rules, Scene, cache_slots, shots
from tests.meshes import ONE, mesh_of
from tests.models import tiny

SAMPLER = R.Sampler(steps=(1000.0, 625.0))
RELATIVE = Layout(block=2, window=6, sink=2, positions="relative")


def noise_of(frames, batch=1, seed=3):
    return np.stack([tiny.latents(frames, batch, seed + j) for j in range(2)])


def policy_of(layout, adapter=None, mesh=ONE):
    graphdef, params = tiny.model()
    return S.Policy(graphdef, params, adapter, 0.5, tiny.CONFIG, layout, SAMPLER, mesh)


def run(layout, shot, noise, rules=None, texts=(100, 200, 300), given=None, policy=None):
    """Latents [B, F, C, H, W] of a shot, scene k with the prompts of seed texts[k]."""
    policy = policy or policy_of(layout)
    batch, first = noise.shape[1], 0 if given is None else given.shape[1]

    def text(scene):
        embeddings = tiny.text(batch, texts[scene])
        return S.encode_text(
            policy.graphdef,
            policy.params,
            policy.adapter,
            policy.lora_scale,
            embeddings,
            mesh=policy.mesh,
        )

    def draw(step):
        return noise[:, :, step.frame - first : step.frame - first + step.count]

    slots = cache_slots(layout, rules or Rules(), shot.latent_frames)
    pieces = S.stream(policy, text, shot.steps, draw, slots, batch, tiny.LATENT_HW, given)
    return np.concatenate([piece.latents for piece in pieces], axis=1)


def shot_of(layout, *lengths, cut=False, rules=None, given=0):
    """The only shot of scenes with so many blocks each."""
    fps = 4 * layout.block  # a block a second
    scenes = [Scene(str(i), float(count), count, cut) for i, count in enumerate(lengths)]
    frames = 1 + 4 * (given + layout.block * sum(lengths) - 1)
    (shot,) = shots(scenes, layout, rules or Rules(), fps, frames=frames, given=given)
    return shot


LAYOUTS = {
    "global": (Layout(block=2), 4),
    "relative": (Layout(block=2, window=5, sink=1, positions="relative"), 12),
    "framewise": (Layout(block=1, window=3, sink=2), 5),
}


@pytest.mark.parametrize("layout, frames", LAYOUTS.values(), ids=LAYOUTS)
def test_a_stream_of_one_prompt_is_the_rollout(layout, frames):
    noise, adapter = noise_of(frames, 2), tiny.adapter()
    graphdef, params = tiny.model()

    @jax.jit
    def rollout(params, noise):
        return R.rollout(
            graphdef,
            params,
            adapter,
            tiny.text(2),
            R.noise_from_array(noise),
            frames=frames,
            latent_hw=tiny.LATENT_HW,
            layout=layout,
            sampler=SAMPLER,
            lora_scale=0.5,
        )[0]

    shot = shot_of(layout, frames // layout.block)
    got = run(layout, shot, noise, policy=policy_of(layout, adapter))
    np.testing.assert_allclose(got, rollout(params, noise), atol=2e-5)


def test_given_frames_are_the_past():
    """A stream that goes on from the first frames of another equals it."""
    layout, noise = Layout(block=2, window=4), noise_of(10)
    whole = run(layout, shot_of(layout, 5), noise)
    rest = run(layout, shot_of(layout, 3, given=4), noise[:, :, 4:], given=whole[:, :4])
    np.testing.assert_allclose(rest, whole, atol=2e-5)


def test_a_stream_is_the_same_on_eight_devices():
    shot, noise = shot_of(RELATIVE, 3, 1), noise_of(8, 8)
    policy = policy_of(RELATIVE, mesh=mesh_of(2, 4))
    np.testing.assert_allclose(
        run(RELATIVE, shot, noise, policy=policy), run(RELATIVE, shot, noise), atol=2e-5
    )


@pytest.mark.parametrize(
    ("rules", "layout"),
    [
        (Rules(), RELATIVE),
        (Rules("recache"), Layout(block=2, window=6, sink=2)),
        (Rules("cut"), RELATIVE),
    ],
)
def test_a_new_prompt_changes_what_follows_and_nothing_before(rules, layout):
    noise = noise_of(14)
    shot = shot_of(layout, 4, 3, rules=rules)
    one, other = (run(layout, shot, noise, rules, texts) for texts in ((100, 200), (100, 300)))
    np.testing.assert_array_equal(one[:, :8], other[:, :8])
    assert np.abs(one[:, 8:] - other[:, 8:]).max() > 0.05
    plain = run(layout, shot_of(layout, 7), noise)
    np.testing.assert_allclose(one[:, :8], plain[:, :8], atol=2e-5)


def test_a_recache_for_the_same_prompt_differs_only_by_the_missing_mask():
    """Of one block there is nothing to mask: the keys made anew are those that were there."""
    layout, noise = Layout(block=2, window=4), noise_of(6)
    rules = Rules("recache")
    again = run(layout, shot_of(layout, 1, 2, rules=rules), noise, rules, (100, 100))
    np.testing.assert_allclose(again, run(layout, shot_of(layout, 3), noise), atol=2e-5)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_a_flush_of_a_window_not_full_is_that_of_a_full_one(positions):
    """The correction: the last two frames, where the published code takes the last two places of
    the buffer.
    """
    wide, tight = (Layout(block=3, window=size, sink=1, positions=positions) for size in (9, 6))
    noise, published = noise_of(9), Rules(published=True)
    # six frames fill this window
    want = run(tight, shot_of(tight, 2, 1, rules=published), noise, published)
    np.testing.assert_allclose(run(wide, shot_of(wide, 2, 1), noise), want, atol=2e-5)
    empty = run(wide, shot_of(wide, 2, 1, rules=published), noise, published)
    assert np.abs(empty[:, 6:] - want[:, 6:]).max() > 1e-3


def test_behind_a_cut_only_the_sink_is_seen():
    """Two pasts with the same sink go on alike, and, with a flush, not."""
    past = [tiny.latents(8, seed=seed) for seed in (1, 2)]
    past[1][:, :2] = past[0][:, :2]  # the sink, one block: its keys depend on nothing before
    noise, scenes = noise_of(4), (1, 1)
    for cut in (True, False):
        shot = shot_of(RELATIVE, *scenes, cut=cut, given=8)
        one, other = (run(RELATIVE, shot, noise, given=given, texts=(100, 200)) for given in past)
        # The block between is of the first scene; behind the cut it is gone as well.
        same = np.abs(one[:, 10:] - other[:, 10:]).max()
        assert same < 2e-5 if cut else same > 1e-3


def test_a_stream_gives_its_blocks_one_by_one():
    """Nothing is computed before it is asked for, and a stream that ends early leaves nothing
    behind.
    """
    shot, noise, asked = shot_of(RELATIVE, 6), noise_of(12), []

    def draw(step):
        asked.append(step.frame)
        return noise[:, :, step.frame : step.frame + step.count]

    policy = policy_of(RELATIVE)
    keys = S.encode_text(policy.graphdef, policy.params, None, 1.0, tiny.text(), mesh=ONE)
    pieces = S.stream(policy, lambda scene: keys, shot.steps, draw, 6, 1, tiny.LATENT_HW)
    assert next(pieces).step.frame == 0 and asked == [0]
    assert next(pieces).step.frame == 2 and asked == [0, 2]
