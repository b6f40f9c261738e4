"""One epoch of the demo, from prompts to update, is the same on one device, on several, and cut
into pieces.
"""

import jax
import numpy as np
import pytest

from astrolabe_jax import evaluate, prepare, sharding, train
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.runtime.progress import Progress
from astrolabe_jax.update import TrainStep
from tests.e2e import runs
from tests.meshes import ONE, mesh_of
from tests.policies import assert_same_state


def first_epoch(base, workdir, mesh, monkeypatch, **changes):
    """(run, pieces, latents, frames, record, state after) of the real epoch, and latents of its
    frames once more.
    """
    monkeypatch.setattr(prepare.sharding, "make_mesh", lambda config: mesh)
    run = prepare.prepare(runs.small_config(base, **changes), workdir)
    videos, sample = [], train.generate

    def kept(*arguments):
        for part in sample(*arguments):
            videos.append(part)
            yield part

    monkeypatch.setattr(train, "generate", kept)
    run = run._replace(adapter=random_adapter(run))
    step = TrainStep(run.config, run.base.transformer.graphdef, run.layout, run.mesh)
    point, record = train._epoch(run, train.resume(run), step, Progress({}, lambda: None))
    monkeypatch.undo()
    vae = run.base.vae
    again = [
        evaluate._encode(
            vae.graphdef,
            vae.params,
            sharding.shard_batch(run.mesh, part.frames),
            None,
            mesh=run.mesh,
        )[0]
        for part in videos
    ]
    # whole videos on every device, evenly
    for array in (*again, *(part.latents for part in videos)):
        assert array.sharding.is_equivalent_to(sharding.batch_sharding(mesh), array.ndim)
    frames = np.concatenate([part.frames for part in videos])
    latents, again = (np.concatenate(parts) for parts in ([part.latents for part in videos], again))
    return run, len(videos), latents, frames, record, point.state, again


def random_adapter(run):
    """Neither half zero, as in the middle of training."""
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(run.base.transformer.config, run.config.lora.rank)
    return jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def on_one_device(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return first_epoch(base, tmp_path_factory.mktemp("one") / "run", ONE, monkeypatch)


@pytest.mark.parametrize(
    "data, fsdp, limit, pieces",
    [
        pytest.param(8, 1, -1, 1, marks=pytest.mark.slow),
        (2, 4, -1, 1),
        pytest.param(2, 1, 3, 2, marks=pytest.mark.slow),
    ],
)
def test_an_epoch_is_the_same_on_other_devices_and_in_pieces(
    on_one_device, base, tmp_path, monkeypatch, data, fsdp, limit, pieces
):
    mesh = mesh_of(data, fsdp, jax.devices()[: data * fsdp])
    run, parts, latents, frames, record, state, again = first_epoch(
        base, tmp_path / "run", mesh, monkeypatch, **{"mesh.samples_per_device": limit}
    )
    assert parts == pieces
    _, _, want_latents, want_frames, want_record, want_state, want_again = on_one_device

    whole = {
        name: all(
            leaf.is_fully_replicated for leaf in jax.tree.leaves(getattr(run.base, name).params)
        )
        for name in ("transformer", "text", "vae")
    }
    assert whole == {"transformer": fsdp == 1, "text": fsdp == 1, "vae": True}
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))

    np.testing.assert_allclose(latents, want_latents, atol=2e-5)
    apart = np.abs(frames.astype(int) - want_frames)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3  # bytes are truncated
    np.testing.assert_allclose(again, want_again, atol=1e-2)  # of frames that differ by those bytes
    for name in set(record) - {"seconds", "kind"}:
        np.testing.assert_allclose(record[name], want_record[name], rtol=1e-4, err_msg=name)
    assert_same_state(*jax.device_get((state, want_state)))
    assert record["grad_norm"] > 0 and np.ptp(frames) > 100
