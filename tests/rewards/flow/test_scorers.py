"""Rewards of motion: the published formula worked by hand, its corrections, and steadiness."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax.rewards import directory as directories
from astrolabe_jax.rewards.directory import PublishedFiles
from astrolabe_jax.rewards.flow import scorers as flow
from astrolabe_jax.rewards.flow.weights import SEA_RAFT
from astrolabe_jax.rewards.registry import Setting
from astrolabe_jax.runtime.files import write_safetensors
from tests.meshes import ONE, mesh_of
from tests.rewards.flow import rafts

SIZE = (40, 32)
UNIT = 0.15 * math.hypot(*SIZE)  # pixels that count as 1


def motion(*lengths):
    """Motion [1, F] of pairs in which every pixel moves so many units to the right."""
    fields = jnp.stack(
        [jnp.full((*SIZE, 2), jnp.array([UNIT * length, 0.0])) for length in lengths]
    )
    return flow.Motion(*(part[None] for part in flow.motion_of(fields)))


def published(a, *changes, excess=0.0):
    magnitude = (
        math.exp(-((a - 0.6) ** 2) / 0.08)
        * (1 - 0.5 * math.exp(-3 * a))
        * (1 - min(max(excess, 0), 1))
    )
    return 1.5 * magnitude + math.exp(-10 * np.mean(changes or [0.0]))


def dynamic(*lengths, **options):
    return float(flow.dynamic_degree(motion(*lengths), **options)[0])


@pytest.mark.parametrize("options", [{}, {"published": True}])
def test_without_motion(options):
    assert dynamic(0, 0, 0, **options) == pytest.approx(1.0083317, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"published": True}])
def test_the_formula_by_hand(options):
    assert dynamic(0.6, 0.6, **options) == pytest.approx(published(0.6), rel=1e-5)
    assert dynamic(0.2, 0.5, 0.1, **options) == pytest.approx(
        published(0.8 / 3, 0.3, 0.4), rel=1e-5
    )
    assert dynamic(0.3, **options) == pytest.approx(published(0.3), rel=1e-5)


def test_too_much_motion_is_punished_where_the_published_formula_cannot():
    assert dynamic(1.8, 1.8, published=True) == pytest.approx(published(1), rel=1e-5)
    assert dynamic(1.8, 1.8) == pytest.approx(published(1, excess=0.5), rel=1e-5)
    assert dynamic(1.1, 1.1) == pytest.approx(dynamic(1.1, 1.1, published=True), rel=1e-6)
    assert dynamic(3, 3) == pytest.approx(1, abs=1e-6)  # steady, and nothing else


def test_the_largest_twentieth_counts():
    field = np.zeros((1, 20, 20, 2), np.float32)
    field[0, 3, :, 1] = 0.15 * math.hypot(20, 20) * np.linspace(0.1, 2.0, 20)
    found = flow.motion_of(jnp.asarray(field))
    lengths = np.linspace(0.1, 2.0, 20)
    np.testing.assert_allclose(found.top, [lengths.mean()], rtol=1e-5)
    np.testing.assert_allclose(found.top_clipped, [np.minimum(lengths, 1).mean()], rtol=1e-5)
    np.testing.assert_allclose(found.mean_clipped, [np.minimum(lengths, 1).sum() / 400], rtol=1e-5)


def fields(velocities, rows=12, columns=15):
    """[1, F, h, w, 2] of a frame that moves as a whole."""
    return jnp.asarray(
        np.broadcast_to(
            np.float32(velocities)[None, :, None, None], (1, len(velocities), rows, columns, 2)
        )
    )


def turning(angles, rows=24, columns=24):
    """Flow of a picture that turns by each angle about its middle."""
    y, x = np.mgrid[:rows, :columns] - np.array([rows - 1, columns - 1])[:, None, None] / 2
    return jnp.asarray(
        np.stack(
            [
                np.stack(
                    [
                        x * (math.cos(t) - 1) - y * math.sin(t),
                        x * math.sin(t) + y * (math.cos(t) - 1),
                    ],
                    axis=-1,
                )
                for t in angles
            ]
        ).astype(np.float32)[None]
    )


def test_steady_motion_is_smooth_at_any_speed():
    for velocity in ((0, 0), (0.01, 0), (3, -2), (40, 0)):
        np.testing.assert_allclose(flow.smoothness(fields([velocity] * 5)), [1.0], atol=1e-6)
    assert flow.smoothness(turning([0.1] * 6))[0] > 0.9


def test_jitter_is_less_smooth_than_steady_motion():
    rng = np.random.default_rng(0)
    scores = [
        float(flow.smoothness(fields(np.array([2.0, 1.0]) + size * rng.standard_normal((8, 2))))[0])
        for size in (0, 0.1, 0.4, 1.6)
    ]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1] + 0.3
    assert flow.smoothness(turning([0.1, -0.1] * 3))[0] < 0.2
    assert flow.smoothness(fields([(2, 0), (-2, 0)] * 4))[0] < 0.05
    assert flow.smoothness(fields([(0.0005, 0), (-0.0005, 0)] * 4))[0] > 0.9  # flow errs by as much


def test_smoothness_is_a_share_and_the_same_in_a_mirror():
    field = np.random.default_rng(1).standard_normal((3, 4, 9, 11, 2)).astype(np.float32) * 3
    scores = np.asarray(flow.smoothness(jnp.asarray(field)))
    assert ((scores > 0) & (scores < 1)).all()
    mirrored = field[:, :, :, ::-1] * np.float32([-1, 1])
    np.testing.assert_allclose(flow.smoothness(jnp.asarray(mirrored)), scores, atol=1e-5)
    turned = field.swapaxes(2, 3)[..., ::-1]
    np.testing.assert_allclose(flow.smoothness(jnp.asarray(turned)), scores, atol=1e-5)
    np.testing.assert_allclose(flow.smoothness(jnp.asarray(field[:, :1])), 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("raft")
    write_safetensors(root / "model.safetensors", rafts.weights(rafts.TINIEST))
    published_files = PublishedFiles((root / "model.safetensors",))
    directories.write(root / "reward", directories.contents_of(SEA_RAFT, published_files))
    return root / "reward"


NAMES = (flow.DYNAMIC, flow.SMOOTH)


def run(directory, frames, mesh=ONE, names=NAMES, **options):
    given = flow.FlowOptions(str(directory), **options)
    scorer = flow.load(names, Setting(mesh, 16.0), given)
    found = scorer.score(scorer.params, frames, [""] * len(frames))
    return {name: np.asarray(value) for name, value in found.items()}


def test_scores_are_those_of_the_flow_between_consecutive_frames(directory):
    videos = np.random.default_rng(0).integers(0, 256, (2, 4, 128, 130, 3), np.uint8)
    oracle = rafts.Oracle(rafts.TINIEST, rafts.weights(rafts.TINIEST))
    seen = oracle.flow(
        videos[:, :-1].reshape(-1, 128, 130, 3), videos[:, 1:].reshape(-1, 128, 130, 3)
    )
    parts = flow.Motion(
        *(part.reshape(2, 3, *part.shape[1:]) for part in flow.motion_of(jnp.asarray(seen)))
    )
    for options in ({}, {"published": True}):
        got = run(directory, videos, pairs_per_batch=4, **options)
        np.testing.assert_allclose(
            got[flow.DYNAMIC], flow.dynamic_degree(parts, **options), atol=1e-4
        )
        np.testing.assert_allclose(got[flow.SMOOTH], flow.smoothness(parts.field), atol=1e-4)
    lengths = np.minimum(
        np.hypot(*np.moveaxis(seen, -1, 0)) / (0.15 * math.hypot(128, 130)), 1
    ).reshape(6, -1)
    top = np.sort(lengths, axis=1)[:, -(128 * 130 // 20) :].mean(axis=1).reshape(2, 3).mean(axis=1)
    changes = np.abs(np.diff(lengths.mean(axis=1).reshape(2, 3), axis=1))
    want = [published(a, *change) for a, change in zip(top, changes, strict=True)]
    np.testing.assert_allclose(got[flow.DYNAMIC], want, atol=1e-4)


def test_scores_do_not_depend_on_the_batch_or_on_the_devices(directory):
    videos = np.random.default_rng(1).integers(0, 256, (3, 3, 24, 32, 3), np.uint8)
    together = run(directory, videos)
    alone = run(directory, videos[1:2])
    split = run(directory, jnp.asarray(videos), mesh_of(fsdp=2))
    for name in NAMES:
        np.testing.assert_allclose(alone[name], together[name][1:2], atol=1e-5)
        np.testing.assert_allclose(split[name], together[name], atol=1e-5)
    assert set(run(directory, videos, names=(flow.SMOOTH,))) == {flow.SMOOTH}


def test_one_frame_has_no_motion(directory):
    got = run(directory, np.zeros((2, 1, 16, 16, 3), np.uint8))
    np.testing.assert_array_equal(got[flow.DYNAMIC], [0, 0])
    np.testing.assert_array_equal(got[flow.SMOOTH], [1, 1])


def test_options_are_checked(directory):
    with pytest.raises(
        ValueError, match="pairs_per_batch is 0; expected a whole number, at least 1"
    ):
        run(directory, np.zeros((1, 2, 16, 16, 3), np.uint8), pairs_per_batch=0)
