"""The mean of the largest; pieces of one shape, whatever the batch, on all devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import sharding
from astrolabe_jax.rewards.frames import check_counts, map_frames, top_mean
from tests.meshes import ONE, mesh_of


@pytest.mark.parametrize(("frames", "count"), [(81, 24), (84, 25), (3, 1), (1, 1)])
def test_the_mean_of_the_largest_thirty_percent(frames, count):
    scores = np.random.default_rng(frames).standard_normal((3, frames)).astype(np.float32)
    want = np.sort(scores, axis=1)[:, frames - count :].mean(axis=1)
    np.testing.assert_allclose(top_mean(jnp.asarray(scores)), want, rtol=1e-5)


@pytest.mark.parametrize("mesh", [ONE, mesh_of(), mesh_of(fsdp=2)], ids=["1", "8", "4x2"])
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_pieces_are_of_one_shape_and_give_each_item_its_own(mesh, place):
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 2, 4, 3), np.uint8)
    seen = []

    @jax.jit
    def difference(params, first, second):
        seen.append(first.shape)
        return {
            "by": params * (second.astype("float32") - first.astype("float32")),
            "of": first[:, 0, 0, 0],
        }

    times = np.array([0, 2, 4])
    got = map_frames(
        difference, jnp.float32(2), place(frames), times, per_call=2, mesh=mesh, following=2
    )
    np.testing.assert_array_equal(
        got["by"], 2 * (frames[:, 1::2].astype("float32") - frames[:, ::2])
    )
    np.testing.assert_array_equal(got["of"], frames[:, ::2, 0, 0, 0])
    assert seen == [(max(2, mesh.size), 2, 4, 3)]


def test_pictures_are_split_over_the_devices():
    mesh = mesh_of()
    frames, places = np.zeros((1, 16, 2, 2, 3), np.uint8), []

    def note(params, pictures):
        places.append(pictures.sharding)
        return pictures[:, 0, 0, 0]

    for place in (np.asarray, jnp.asarray):
        map_frames(note, None, place(frames), np.arange(16), per_call=8, mesh=mesh)
    assert (
        all(place.is_equivalent_to(sharding.batch_sharding(mesh), 4) for place in places)
        and len(places) == 4
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_options_that_are_no_counts_are_refused_by_name(value):
    with pytest.raises(ValueError, match="frame_stride is .*; expected a whole number, at least 1"):
        check_counts(size=1, frame_stride=value)
