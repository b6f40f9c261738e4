"""Stage 1: the Wan autoencoder on full-length clips of the moving-shapes world.

It sees every combination, held-out ones included, as an autoencoder of real videos is trained on more than any prompt
list; what is held out is held out from the generator and from reinforcement learning.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx

from astrolabe_jax.models.wan.vae import Vae, VaeConfig
from experiments.moving_shapes_base import common

DIRECTORY = flags.DEFINE_string("directory", "runs/moving_shapes_base", "where states and results go")
STEPS = flags.DEFINE_integer("vae_steps", 1600, "optimiser steps")
# Short clips first, for many scenes at little cost; then full ones, without which the net does not extend in time.
SHORT_STEPS, SHORT_BATCH, SHORT_FRAMES = 700, 16, 5
FULL_BATCH = 4
LATENT_NOISE = 0.1  # std of the noise that decoding must bear; with LATENT_WEIGHT a KL term of fixed variance
LATENT_WEIGHT = 1e-4
EDGE_WEIGHT = 1.0
SHAPE_WEIGHT = 3.0  # the shape covers a tenth of a frame and is all that a person looks at
AVERAGE_DECAY = 0.99

CONFIG = VaeConfig(dim=8, dim_mult=(1, 2, 6, 8), num_res_blocks=1, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)


def loss(vae: Vae, pixels: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
    """Weighted absolute error of pixels and of their spatial differences, plus the size of the latents."""
    (mean, _), _ = vae.moments(pixels)
    z = mean + LATENT_NOISE * jax.random.normal(key, mean.shape)
    decoded, _ = vae.decode(jnp.moveaxis(z, -1, 2))
    error = decoded - pixels
    shape = jnp.any(jnp.abs(pixels - pixels[:, :, :1, :1]) > 0.05, axis=-1, keepdims=True)
    edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3))
    size = jnp.mean(mean**2)
    total = jnp.mean(jnp.abs(error) * (1 + SHAPE_WEIGHT * shape)) + EDGE_WEIGHT * edges + LATENT_WEIGHT * size
    mse = jnp.mean((jnp.clip(decoded, -1, 1) - pixels) ** 2)
    return total, {"loss": total, "psnr": 10 * jnp.log10(4 / mse), "latent": jnp.sqrt(size)}


def to_float(video: np.ndarray) -> np.ndarray:
    return video.astype(np.float32) / 127.5 - 1


def train(directory: Path, steps: int, seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    """Trains or resumes; returns the graph definition and the averaged parameters."""
    graphdef, params = nnx.split(Vae(CONFIG, nnx.Rngs(seed)))
    params = nnx.to_pure_dict(params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(50, steps // 10), steps, 2e-5)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    @jax.jit
    def update(state, pixels, key):
        params, moments, average = state

        def of_params(params):
            return loss(nnx.merge(graphdef, params), pixels, key)

        gradients, metrics = jax.grad(of_params, has_aux=True)(params)
        changes, moments = optimiser.update(gradients, moments, params)
        params = optax.apply_updates(params, changes)
        return (params, moments, optax.incremental_update(params, average, 1 - AVERAGE_DECAY)), metrics

    def step(state, i):
        rng, short = np.random.default_rng([seed, i]), i < SHORT_STEPS
        videos = common.clips(common.ALL_PROMPTS, SHORT_BATCH if short else FULL_BATCH, rng, cuts=not short)
        pixels = to_float(videos[:, :SHORT_FRAMES] if short else videos)
        return update(state, pixels, jax.random.fold_in(jax.random.key(seed), i))

    state = common.train(directory / "vae.state", (params, optimiser.init(params), params), step, steps)
    return graphdef, state[2]


def with_statistics(graphdef: nnx.GraphDef, params: dict, seed: int = 1, count: int = 128) -> VaeConfig:
    """The configuration with the measured mean and std of each latent channel, as Wan normalises its latents."""
    encode = jax.jit(lambda pixels: nnx.merge(graphdef, params).encode(pixels)[0])
    rng = np.random.default_rng(seed)
    latents = np.concatenate([
        np.asarray(encode(to_float(common.clips(common.ALL_PROMPTS, 8, rng, cuts=False)))) for _ in range(count // 8)
    ])  # fmt: skip
    mean, std = latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4))
    return dataclasses.replace(CONFIG, latent_mean=tuple(map(float, mean)), latent_std=tuple(map(float, std)))


def main(_):
    directory = Path(DIRECTORY.value)
    graphdef, params = train(directory, STEPS.value)
    config = with_statistics(graphdef, params)
    logging.info("latent std per channel: %s", np.round(config.latent_std, 2))


if __name__ == "__main__":
    app.run(main)
