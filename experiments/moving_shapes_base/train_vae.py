"""Stages 1 and 2: the Wan autoencoder on full-length clips of the moving-shapes world, then its
decoder alone.

It sees every combination, held-out ones included, as an autoencoder of real videos is trained on
more than any prompt list; what is held out is held out from the generator and from reinforcement
learning.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from astrolabe_jax.models import layers
from astrolabe_jax.models.wan.vae import Vae, VaeConfig
from experiments.moving_shapes_base import common

DIRECTORY = flags.DEFINE_string(
    "directory", "runs/moving_shapes_base", "where states and results go"
)
STEPS = flags.DEFINE_integer("vae_steps", 1500, "optimizer steps of the whole autoencoder")
DECODER_STEPS = flags.DEFINE_integer("decoder_steps", 2000, "optimizer steps of the decoder alone")
# length of the cosine decay; the decoder starts its own where the whole net stops
RATE_STEPS = 2700
# Short clips first, for many scenes at little cost; then full ones, without which the net does not
# extend in time.
SHORT_STEPS, SHORT_BATCH, SHORT_FRAMES = 300, 8, 5
FULL_BATCH = 2
# std of the noise that decoding must bear; with LATENT_WEIGHT a KL term of fixed variance
LATENT_NOISE = 0.2
LATENT_WEIGHT = 5e-4
EDGE_WEIGHT = 1.0
SHAPE_WEIGHT = 3.0  # the shape covers a tenth of a frame and is all that a person looks at
AVERAGE_DECAY = 0.99

CONFIG = VaeConfig(
    dim=8, dim_mult=(1, 2, 6, 8), num_res_blocks=1, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16
)


def loss(vae: Vae, pixels: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
    """Weighted absolute error of pixels and of their spatial differences, plus the size of the
    latents.
    """
    mean, _ = vae.encode_mean(pixels)
    total, metrics = reconstruction_loss(vae, mean, pixels, key)
    size = jnp.mean(mean**2)
    return total + LATENT_WEIGHT * size, metrics | {"latent": jnp.sqrt(size)}


def reconstruction_loss(
    vae: Vae, mean: jax.Array, pixels: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict]:
    """The part of `loss` that the decoder answers for, from latents before normalisation `[B, F, H,
    W, C]`.
    """
    z = mean + LATENT_NOISE * jax.random.normal(key, mean.shape)
    decoded, _ = vae.decode(jnp.moveaxis(z, -1, 2))
    error = decoded - pixels
    shape = jnp.any(jnp.abs(pixels - pixels[:, :, :1, :1]) > 0.05, axis=-1, keepdims=True)
    edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3))
    total = jnp.mean(jnp.abs(error) * (1 + SHAPE_WEIGHT * shape)) + EDGE_WEIGHT * edges
    mse = jnp.mean((jnp.clip(decoded, -1, 1) - pixels) ** 2)
    return total, {"loss": total, "psnr": 10 * jnp.log10(4 / mse)}


def to_float(video: np.ndarray) -> np.ndarray:
    return video.astype(np.float32) / 127.5 - 1


def train(directory: Path, steps: int, seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    """Trains or resumes; returns the graph definition and the averaged parameters."""
    common.check_recipe(directory, "vae", globals())
    graphdef, params = layers.split(Vae(CONFIG, nnx.Rngs(seed)))
    optimizer = common.optimizer(2e-3, 2e-3, RATE_STEPS, kernel_ndim=5)

    def step(state, i):
        rng, short = np.random.default_rng([seed, i]), i < SHORT_STEPS
        videos = common.clips(
            common.ALL_PROMPTS, SHORT_BATCH if short else FULL_BATCH, rng, cuts=not short
        )
        pixels = to_float(videos[:, :SHORT_FRAMES] if short else videos)
        return update(state, pixels, jax.random.fold_in(jax.random.key(seed), i))

    def of_params(params, pixels, key):
        return loss(layers.merge(graphdef, params), pixels, key)

    update = common.descent(of_params, optimizer, AVERAGE_DECAY)
    state = common.train(
        directory / "vae.state", (params, optimizer.init(params), params), step, steps
    )
    return graphdef, state[2]


def train_decoder(
    directory: Path, graphdef: nnx.GraphDef, params: dict, steps: int, seed: int = 6
) -> dict:
    """Trains the decoder further on full clips while the encoder stays; returns the averaged
    parameters of both.

    The latents that a generator learns from are fixed by then, so that this may run beside its
    training.
    """
    frozen = {name: params[name] for name in ("encoder", "conv1")}
    moving = {name: params[name] for name in ("conv2", "decoder")}
    optimizer = common.optimizer(1.5e-3, 1.5e-3, steps, kernel_ndim=5, end=0.0)

    def of_decoder(moving, frozen, pixels, key):
        vae = layers.merge(graphdef, frozen | moving)
        mean, _ = vae.encode_mean(pixels)
        return reconstruction_loss(vae, jax.lax.stop_gradient(mean), pixels, key)

    def step(state, i):
        rng = np.random.default_rng([seed, i])
        pixels = to_float(common.clips(common.ALL_PROMPTS, FULL_BATCH, rng, cuts=True))
        return update(state, frozen, pixels, jax.random.fold_in(jax.random.key(seed), i))

    update = common.descent(of_decoder, optimizer, AVERAGE_DECAY)
    return (
        frozen
        | common.train(
            directory / "decoder.state", (moving, optimizer.init(moving), moving), step, steps
        )[2]
    )


def with_statistics(
    graphdef: nnx.GraphDef, params: dict, seed: int = 1, count: int = 128
) -> VaeConfig:
    """The configuration with the measured mean and std of each latent channel, as Wan normalises
    its latents.
    """
    encode = jax.jit(lambda pixels: layers.merge(graphdef, params).encode(pixels)[0])
    rng = np.random.default_rng(seed)
    latents = np.concatenate(
        [
            np.asarray(encode(to_float(common.clips(common.ALL_PROMPTS, 8, rng, cuts=False))))
            for _ in range(count // 8)
        ]
    )
    mean, std = latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4))
    return dataclasses.replace(
        CONFIG, latent_mean=tuple(map(float, mean)), latent_std=tuple(map(float, std))
    )


def main(_):
    directory = Path(DIRECTORY.value)
    graphdef, params = train(directory, STEPS.value)
    train_decoder(directory, graphdef, params, DECODER_STEPS.value)
    config = with_statistics(graphdef, params)
    logging.info("latent std per channel: %s", np.round(config.latent_std, 2))


if __name__ == "__main__":
    app.run(main)
