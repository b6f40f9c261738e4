"""Stages 1 and 2: the Wan autoencoder on full-length clips of the moving-shapes world, then its
decoder alone.

The autoencoder sees every combination of words, those of the test prompts included, as one of real
videos is trained on more than any prompt list. Test prompts are held out from the generator and
from reinforcement learning.
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
from astrolabe_jax.runtime import cli
from experiments.moving_shapes_base import common

DIRECTORY = flags.DEFINE_string(
    "directory", "runs/moving_shapes_base", "where states and results go"
)
STEPS = flags.DEFINE_integer("vae_steps", 1500, "optimizer steps of the whole autoencoder")
DECODER_STEPS = flags.DEFINE_integer("decoder_steps", 2000, "optimizer steps of the decoder alone")
RATE_STEPS = 2700  # of the cosine decay; stage 2 starts its own where stage 1 stops
# Short clips first, for many scenes at little cost; then full ones, without which the net does not
# extend in time.
SHORT_STEPS = 300
SHORT_BATCH = 8
SHORT_FRAMES = 5
FULL_BATCH = 2
# Standard deviation of the noise that decoding must bear. With LATENT_WEIGHT it makes a KL term of
# fixed variance.
LATENT_NOISE = 0.2
LATENT_WEIGHT = 5e-4
EDGE_WEIGHT = 1.0
SHAPE_WEIGHT = 3.0  # the shape covers a tenth of a frame and is all that a person looks at
AVERAGE_DECAY = 0.99

CONFIG = VaeConfig(
    dim=8, dim_mult=(1, 2, 6, 8), num_res_blocks=1, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16
)


def loss(vae: Vae, pixels: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
    """Return the loss of stage 1 and its metrics.

    It is the weighted absolute error of pixels and of their spatial differences, plus the mean
    square of the latents. Pixels are [B, T, H, W, 3] in [-1, 1].
    """
    mean, _ = vae.encode_mean(pixels)
    total, metrics = reconstruction_loss(vae, mean, pixels, key)
    size = jnp.mean(mean**2)
    return total + LATENT_WEIGHT * size, metrics | {"latent": jnp.sqrt(size)}


def reconstruction_loss(
    vae: Vae, mean: jax.Array, pixels: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict]:
    """Return the part of `loss` that depends on the decoder, and its metrics.

    `mean` is the latents before normalisation, [B, F, H, W, C].
    """
    z = mean + LATENT_NOISE * jax.random.normal(key, mean.shape)
    decoded, _ = vae.decode(jnp.moveaxis(z, -1, 2))
    error = decoded - pixels
    shape = jnp.any(jnp.abs(pixels - pixels[:, :, :1, :1]) > 0.05, axis=-1, keepdims=True)
    edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3))
    absolute = jnp.mean(jnp.abs(error) * (1 + SHAPE_WEIGHT * shape))
    total = absolute + EDGE_WEIGHT * edges
    mse = jnp.mean((jnp.clip(decoded, -1, 1) - pixels) ** 2)
    return total, {"loss": total, "psnr": 10 * jnp.log10(4 / mse)}


def to_float(video: np.ndarray) -> np.ndarray:
    """Return uint8 pixels as float32 in [-1, 1]."""
    return video.astype(np.float32) / 127.5 - 1


def train(directory: Path, steps: int, seed: int = 0) -> tuple[nnx.GraphDef[Vae], dict]:
    """Train the autoencoder, or resume; return graph definition and averaged parameters."""
    common.check_recipe(directory, "vae", globals())
    graphdef, params = layers.split(Vae(CONFIG, nnx.Rngs(seed)))
    optimizer = common.optimizer(2e-3, 2e-3, RATE_STEPS, kernel_ndim=5)

    def step(state, i):
        rng = np.random.default_rng([seed, i])
        if i < SHORT_STEPS:
            videos = common.clips(common.ALL_PROMPTS, SHORT_BATCH, rng, cuts=False)
            videos = videos[:, :SHORT_FRAMES]
        else:
            videos = common.clips(common.ALL_PROMPTS, FULL_BATCH, rng, cuts=True)
        return update(state, to_float(videos), jax.random.fold_in(jax.random.key(seed), i))

    def loss_and_metrics(params, pixels, key):
        return loss(layers.merge(graphdef, params), pixels, key)

    update = common.descent(loss_and_metrics, optimizer, AVERAGE_DECAY)
    state = (params, optimizer.init(params), params)
    _, _, average = common.train(directory / "vae.state", state, step, steps)
    return graphdef, average


def train_decoder(
    directory: Path, graphdef: nnx.GraphDef[Vae], params: dict, steps: int, seed: int = 6
) -> dict:
    """Train the decoder further on full clips while the encoder stays; return the parameters.

    Those of the decoder are averaged. The latents that a generator learns from are fixed by then,
    so that this may run beside its training.
    """
    frozen = {name: params[name] for name in ("encoder", "conv1")}
    trained = {name: params[name] for name in ("conv2", "decoder")}
    optimizer = common.optimizer(1.5e-3, 1.5e-3, steps, kernel_ndim=5, end=0.0)

    def loss_and_metrics(trained, frozen, pixels, key):
        vae = layers.merge(graphdef, frozen | trained)
        mean, _ = vae.encode_mean(pixels)
        return reconstruction_loss(vae, jax.lax.stop_gradient(mean), pixels, key)

    def step(state, i):
        rng = np.random.default_rng([seed, i])
        pixels = to_float(common.clips(common.ALL_PROMPTS, FULL_BATCH, rng, cuts=True))
        return update(state, frozen, pixels, jax.random.fold_in(jax.random.key(seed), i))

    update = common.descent(loss_and_metrics, optimizer, AVERAGE_DECAY)
    state = (trained, optimizer.init(trained), trained)
    _, _, average = common.train(directory / "decoder.state", state, step, steps)
    return frozen | average


def with_statistics(
    graphdef: nnx.GraphDef[Vae], params: dict, seed: int = 1, count: int = 128
) -> VaeConfig:
    """Return the config with mean and std of each latent channel, measured on `count` clips.

    So are the latents of Wan normalised.
    """
    encode = jax.jit(lambda pixels: layers.merge(graphdef, params).encode(pixels)[0])
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count // 8):
        videos = common.clips(common.ALL_PROMPTS, 8, rng, cuts=False)
        batches.append(np.asarray(encode(to_float(videos))))
    latents = np.concatenate(batches)
    axes = (0, 1, 3, 4)  # all but the channels
    return dataclasses.replace(
        CONFIG,
        latent_mean=tuple(map(float, latents.mean(axes))),
        latent_std=tuple(map(float, latents.std(axes))),
    )


def main(_):
    """Run both stages, and log the scale of the latents."""
    directory = Path(DIRECTORY.value)
    graphdef, params = train(directory, STEPS.value)
    train_decoder(directory, graphdef, params, DECODER_STEPS.value)
    config = with_statistics(graphdef, params)
    logging.info("latent std per channel: %s", np.round(config.latent_std, 2))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
