"""One epoch of the demo, from prompts to update, is the same on one device, on several, and cut
into pieces.
"""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from astrolabe_jax import sharding, train
from astrolabe_jax.decode import encode_video
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.run import Run, prepare
from astrolabe_jax.streaming import windows
from astrolabe_jax.types import TrainState
from astrolabe_jax.update import TrainStep
from tests.e2e import runs
from tests.meshes import ONE, mesh_of
from tests.policies import assert_same_state


class Epoch(NamedTuple):
    """What the first epoch of a run made."""

    run: Run
    pieces: int
    latents: np.ndarray
    frames: np.ndarray
    encoded: np.ndarray  # latents of the frames once more
    record: dict
    state: TrainState  # after it


def first_epoch(base, workdir, mesh, **changes) -> Epoch:
    """Run the real epoch on a mesh."""
    collect = windows.collect
    score = windows.score_async
    segments = []
    pieces = []

    def kept(*arguments):
        segments.append(collect(*arguments))
        return segments[-1]

    def scored(run, frames, texts, numbers, progress):
        pieces.append((numbers, frames))
        return score(run, frames, texts, numbers, progress)

    with pytest.MonkeyPatch.context() as monkeypatch, jax.set_mesh(mesh):
        monkeypatch.setattr(sharding, "make_mesh", lambda config: mesh)
        monkeypatch.setattr(windows, "collect", kept)
        monkeypatch.setattr(windows, "score_async", scored)
        run = prepare(runs.small_config(base, **changes), workdir)
        run = run._replace(adapter=random_adapter(run))
        step = TrainStep(run.config, run.base.transformer.graphdef, run.layout, run.mesh)
        point, record = train.epoch(run, train.resume(run), step, runs.quiet())
        frames = [frames for _, frames in pieces]
        chunk = run.config.video.decode_chunk
        encoded = [encode_video(run.base.vae, part, None, chunk, mesh)[0] for part in frames]
    latents = segments[0].latents
    # whole videos on every device, evenly
    for array in (*encoded, latents):
        assert array.sharding.is_equivalent_to(sharding.batch_sharding(mesh), array.ndim)
    order = np.argsort(np.concatenate([numbers for numbers, _ in pieces]))
    return Epoch(
        run,
        len(pieces),
        np.asarray(latents),
        np.concatenate(frames)[order],
        np.concatenate(encoded)[order],
        record,
        point.train,
    )


def random_adapter(run):
    """Neither half zero, as in the middle of training."""
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(run.base.transformer.config, run.config.lora.rank)
    return jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def on_one_device(base, tmp_path_factory):
    return first_epoch(base, tmp_path_factory.mktemp("one") / "run", ONE)


@pytest.mark.parametrize(
    "data, fsdp, limit, pieces",
    [
        pytest.param(8, 1, -1, 1, marks=pytest.mark.slow),
        pytest.param(2, 4, -1, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 3, 2, marks=pytest.mark.slow),
    ],
)
def test_an_epoch_is_the_same_on_other_devices_and_in_pieces(
    on_one_device, base, tmp_path, data, fsdp, limit, pieces
):
    mesh = mesh_of(data, fsdp, jax.devices()[: data * fsdp])
    epoch = first_epoch(base, tmp_path / "run", mesh, **{"mesh.samples_per_device": limit})
    assert epoch.pieces == pieces

    whole = {
        name: all(
            leaf.is_fully_replicated
            for leaf in jax.tree.leaves(getattr(epoch.run.base, name).params)
        )
        for name in ("transformer", "text", "vae")
    }
    assert whole == {"transformer": fsdp == 1, "text": fsdp == 1, "vae": True}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), epoch.state)
    for leaf, placed in zip(
        jax.tree.leaves(epoch.state),
        jax.tree.leaves(sharding.shard_params(mesh, shapes)),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(placed.sharding, leaf.ndim)
    split = [leaf for leaf in jax.tree.leaves(epoch.state) if not leaf.is_fully_replicated]
    assert bool(split) == (fsdp > 1)

    want = on_one_device
    np.testing.assert_allclose(epoch.latents, want.latents, atol=2e-5)
    apart = np.abs(epoch.frames.astype(int) - want.frames)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3  # bytes are truncated
    # of frames that differ by those bytes
    np.testing.assert_allclose(epoch.encoded, want.encoded, atol=1e-2)
    for name in set(epoch.record) - {"seconds", "kind"}:
        np.testing.assert_allclose(epoch.record[name], want.record[name], rtol=1e-4, err_msg=name)
    assert_same_state(*jax.device_get((epoch.state, want.state)))
    assert epoch.record["grad_norm"] > 0 and np.ptp(epoch.frames) > 100
