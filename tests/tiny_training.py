"""A training of the tiny model: its config, states and samples."""

import functools

import jax
import numpy as np

from astrolabe_jax import sharding, update
from astrolabe_jax.config import get_config
from astrolabe_jax.losses import kl_weights
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.types import Samples
from tests.meshes import ONE
from tests.models import tiny

LAYOUT = Layout(block=2)
SAMPLES = 8
FRAMES = 4


def make_config(**fields):
    """Return the defaults at test size, with fields such as 'loss.kind' written loss__kind."""
    config = get_config()
    config.lora.rank = 2
    config.lora.alpha = 2.0
    config.optimizer.microbatch = SAMPLES
    config.optimizer.learning_rate = 1e-2
    config.loss.kl_weight = 0.1
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(changes)
    return config


@functools.cache
def adapter(seed=50):
    """Return `tiny.adapter` on the host."""
    return jax.device_get(tiny.adapter(seed=seed))


def make_state(config, mesh=ONE, step=1):
    """Return a state of four different policies, so that no term vanishes."""
    state = update.init_state(config, adapter(), mesh)
    others = {"old": adapter(0), "reference": adapter(1), "ema": adapter(2), "step": np.int32(step)}
    return state._replace(**sharding.replicate(mesh, others))


def make_samples(count=SAMPLES):
    """Return samples of all optimalities, of which the KL restrains two in three."""
    return Samples(
        latents=tiny.latents(FRAMES, count),
        r=np.linspace(0.1, 0.9, count, dtype=np.float32),
        mask=np.arange(count) % 3 > 0,
        prompt=np.arange(count, dtype=np.int32) % 2,
        key=jax.random.split(jax.random.key(5), count),
        text=tiny.text(2),
    )


def make_batch(samples, microbatch=SAMPLES):
    """Return the samples as microbatches, at the default noise levels in turn."""
    t = np.resize(np.array([1000, 937.5, 833.3333, 625], np.float32), len(samples.r))
    flat = (samples.latents, samples.r, kl_weights(samples.mask), samples.prompt, t, samples.key)
    return update.StepBatch(*(x.reshape(-1, microbatch, *x.shape[1:]) for x in flat))
