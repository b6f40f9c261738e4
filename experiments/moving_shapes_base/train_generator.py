"""Stages 3 and 4: a causal diffusion teacher by teacher-forced flow matching, then its four-step
student.

The teacher learns from real clips with noisy captions: some words are replaced, as in web data, so
that the base confuses colours and speeds and reinforcement learning has something to do. The
student regresses the end of the teacher's deterministic trajectories from their points at the four
warped noise levels of the sampler (ODE distillation, as Causal Forcing does before its last stage).
Each noise leads to one video, so a start position that the prompt leaves open is not averaged away.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from astrolabe_jax import schedule as time
from astrolabe_jax.convert.base import Net, random_base, save_base
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import load_tokenizer, tokenize, word_tokenizer
from astrolabe_jax.models.umt5 import UMT5Config
from astrolabe_jax.models.wan.config import Layout, WanConfig
from astrolabe_jax.worlds.moving_shapes import render, vocabulary
from experiments.moving_shapes_base import common, train_vae

OUTPUT = flags.DEFINE_string(
    "output", "astrolabe_jax/worlds/moving_shapes/base", "where the finished base goes"
)

BATCH = 32
VIDEOS = 3072  # encoded clips that the teacher learns from
TRAJECTORIES = 1024  # videos whose teacher trajectories the student learns from
ODE_STEPS = 16  # of the table; the levels that are not among them come on top
AVERAGE_DECAY = 0.98
TEACHER_STEPS, TEACHER_RATE = 2400, 8e-3
# Chance that a word of a caption is replaced by one of its kind: for the teacher, and in the
# student's last round.
CAPTION_NOISE = {"colour": 0.2, "shape": 0.0, "direction": 0.0, "speed": 0.3, "background": 0.0}
STUDENT_NOISE = {"colour": 0.5, "shape": 0.0, "direction": 0.0, "speed": 0.3, "background": 0.0}
NO_NOISE = dict.fromkeys(CAPTION_NOISE, 0.0)
# optimizer steps, peak rate, caption noise
STUDENT_ROUNDS = ((600, 4e-3, NO_NOISE), (250, 2e-3, STUDENT_NOISE))
TEXT_LEN = 16
LAYOUT = Layout(block=3)
SCHEDULE = time.Schedule(shift=5.0)
# of the sampler, as sigma
LEVELS = np.array(time.warp((1000, 750, 500, 250), SCHEDULE), np.float32) / 1000
FLOAT32 = {"dtype": "float32", "param_dtype": "float32"}
WORDS = vocabulary.words()
TRANSFORMER = WanConfig(
    dim=128,
    ffn_dim=384,
    num_layers=4,
    num_heads=4,
    freq_dim=64,
    text_dim=64,
    text_len=TEXT_LEN,
    remat=False,
    **FLOAT32,
)
TEXT = UMT5Config(
    vocab_size=3 + len(WORDS),
    dim=64,
    dim_attn=64,
    dim_ffn=128,
    num_heads=4,
    num_layers=2,
    text_len=TEXT_LEN,
    **FLOAT32,
)


def noisy_caption(
    attributes: vocabulary.Attributes, chances: dict[str, float], rng: np.random.Generator
) -> str:
    """A caption of the clip with each word replaced, with the chance of its kind, by a random one
    of that kind.
    """
    kinds = dict(
        zip(
            attributes._fields,
            (
                vocabulary.COLOURS,
                vocabulary.SHAPES,
                vocabulary.DIRECTIONS,
                vocabulary.SPEEDS,
                vocabulary.BACKGROUNDS,
            ),
            strict=True,
        )
    )
    while True:
        said = {
            kind: rng.choice(list(words))
            if rng.random() < chances[kind]
            else getattr(attributes, kind)
            for kind, words in kinds.items()
        }
        prompt = vocabulary.to_prompt(vocabulary.Attributes(**said))
        if prompt in _TRAIN and said["colour"] != said["background"]:
            return prompt


_TRAIN = frozenset(common.TRAIN_PROMPTS)


def encoded_clips(vae: Net, path: Path, seed: int = 2) -> tuple[np.ndarray, list[str]]:
    """Latents `[VIDEOS, F, C, H, W]` of random training clips, encoded once, and their true
    prompts.
    """
    rng = np.random.default_rng(seed)
    prompts = [
        common.TRAIN_PROMPTS[i] for i in rng.integers(len(common.TRAIN_PROMPTS), size=VIDEOS)
    ]
    if not path.exists():
        encode = jax.jit(
            lambda params, pixels: layers.merge(vae.graphdef, params).encode(pixels)[0]
        )
        chunks = []
        for start in range(0, VIDEOS, BATCH):
            videos = np.stack(
                [render.sample(prompt, rng) for prompt in prompts[start : start + BATCH]]
            )
            chunks.append(np.asarray(encode(vae.params, train_vae.to_float(videos)), np.float16))
            logging.log_every_n_seconds(logging.INFO, "encoded %d of %d clips", 30, start, VIDEOS)
        common.save_array(path, np.concatenate(chunks))
    return np.load(path, mmap_mode="r"), prompts


def _velocity(nets, params, clean, ids, mask):
    """`(x, t) -> velocity` of every block of `x`, each reading the clean video before it."""
    model = layers.merge(nets["transformer"].graphdef, params["transformer"])
    text = model.encode_text(
        layers.merge(nets["text_encoder"].graphdef, params["text_encoder"]).embed(ids, mask)
    )
    context = model.context(clean, text, layout=LAYOUT)
    return lambda x, t: model(x, t, text, layout=LAYOUT, context=context)


def _noise_levels(key, batch: int, frames: int) -> jax.Array:
    """One shifted-uniform sigma per block `[batch, frames]`."""
    u = jax.random.uniform(key, (batch, frames // LAYOUT.block))
    sigma = SCHEDULE.shift * u / (1 + (SCHEDULE.shift - 1) * u)
    return jnp.repeat(sigma, LAYOUT.block, axis=1)


def _regression(nets, peak_rate: float, steps: int):
    """Jitted step with averaged weights on the velocity error."""
    optimizer = common.optimizer(peak_rate, peak_rate / 4, steps, kernel_ndim=2)

    def of_params(params, x, sigma, clean, target, ids, mask):
        velocity = _velocity(nets, params, clean, ids, mask)(x, 1000 * sigma)
        loss = jnp.mean((velocity - target) ** 2)
        return loss, {"loss": loss}

    return optimizer, common.descent(of_params, optimizer, AVERAGE_DECAY)


def train_teacher(nets, latents, prompts, tokenizer, directory: Path, seed: int = 3) -> dict:
    """Teacher-forced flow matching on encoded clips with noisy captions; returns the averaged
    parameters.
    """
    params = {name: net.params for name, net in nets.items()}
    attributes = [vocabulary.parse(prompt) for prompt in prompts]

    def step(update, state, i):
        rng, key = np.random.default_rng([seed, i]), jax.random.fold_in(jax.random.key(seed), i)
        chosen = rng.integers(VIDEOS, size=BATCH)
        ids, mask = tokenize(
            tokenizer, [noisy_caption(attributes[j], CAPTION_NOISE, rng) for j in chosen], TEXT_LEN
        )
        clean = jnp.asarray(latents[chosen], jnp.float32)
        noise_key, level_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clean.shape)
        sigma = _noise_levels(level_key, *clean.shape[:2])
        return update(
            state, time.add_noise(clean, noise, sigma), sigma, clean, noise - clean, ids, mask
        )

    optimizer, update = _regression(nets, TEACHER_RATE, TEACHER_STEPS)
    state = (params, optimizer.init(params), params)
    return common.train(directory / "teacher.state", state, partial(step, update), TEACHER_STEPS)[2]


def teacher_trajectories(nets, params, latents, prompts, tokenizer, path: Path, seed: int = 4):
    """Points `[N, 5, F, C, H, W]` of the teacher's ODE: at the sampler's four levels, and the
    ends.
    """
    if not path.exists():
        grid = np.union1d(time.sigmas(SCHEDULE)[:: 1000 // ODE_STEPS], LEVELS)[::-1]
        grid = np.append(grid, 0.0).astype(np.float32)
        kept = np.array([np.abs(grid - level).argmin() for level in LEVELS])

        @jax.jit
        def solve(params, noise, clean, ids, mask):
            velocity = _velocity(nets, params, clean, ids, mask)

            def euler(x, sigmas):
                now, later = sigmas
                return x + (later - now) * velocity(x, jnp.full(x.shape[:2], 1000 * now)), x

            end, points = jax.lax.scan(euler, noise, (grid[:-1], grid[1:]))
            return jnp.moveaxis(jnp.concatenate([points[kept], end[None]]), 0, 1)

        points = []
        for start in range(0, TRAJECTORIES, BATCH):
            part = slice(start, start + BATCH)
            clean = jnp.asarray(latents[part], jnp.float32)
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), start), clean.shape)
            solved = solve(params, noise, clean, *tokenize(tokenizer, prompts[part], TEXT_LEN))
            points.append(np.asarray(solved, np.float16))
            logging.log_every_n_seconds(
                logging.INFO, "solved %d of %d trajectories", 30, start, TRAJECTORIES
            )
        common.save_array(path, np.concatenate(points))
    return np.load(path)


def train_student(
    nets, teacher, latents, trajectories, prompts, tokenizer, directory: Path, seed: int = 5
):
    """Regresses the ends of trajectories from their points, starting from the teacher."""
    attributes = [vocabulary.parse(prompt) for prompt in prompts]

    def step(update, seed, chances, state, i):
        rng = np.random.default_rng([seed, i])
        chosen = rng.integers(TRAJECTORIES, size=BATCH)
        blocks = latents.shape[1] // LAYOUT.block
        level = np.repeat(rng.integers(len(LEVELS), size=(BATCH, blocks)), LAYOUT.block, axis=1)
        x = trajectories[chosen[:, None], level, np.arange(latents.shape[1])[None]].astype(
            np.float32
        )
        end, sigma = trajectories[chosen, -1].astype(np.float32), LEVELS[level]
        target = (x - end) / sigma[:, :, None, None, None]
        ids, mask = tokenize(
            tokenizer, [noisy_caption(attributes[j], chances, rng) for j in chosen], TEXT_LEN
        )
        return update(state, x, sigma, np.asarray(latents[chosen], np.float32), target, ids, mask)

    params = teacher
    for i, (steps, rate, chances) in enumerate(STUDENT_ROUNDS):
        optimizer, update = _regression(nets, rate, steps)
        state = (params, optimizer.init(params), params)
        path = directory / f"student{i + 1}.state"
        params = common.train(path, state, partial(step, update, seed + 100 * i, chances), steps)[2]
    return params


def main(_):
    directory = Path(train_vae.DIRECTORY.value)
    common.check_recipe(directory, "generator", globals())
    graphdef, params = train_vae.train(directory, train_vae.STEPS.value)
    config = train_vae.with_statistics(graphdef, params)
    graphdef, _ = layers.graphdef_of(lambda: train_vae.Vae(config, nnx.Rngs(0)))
    vae = Net(graphdef, params, config)
    nets = random_base({"transformer": TRANSFORMER, "text_encoder": TEXT}, seed=0)
    tokenizer_json = word_tokenizer(WORDS)
    (directory / "tokenizer.json").write_text(tokenizer_json)
    tokenizer = load_tokenizer(directory)

    latents, prompts = encoded_clips(vae, directory / "latents.npy")
    teacher = train_teacher(nets, latents, prompts, tokenizer, directory)
    trajectories = teacher_trajectories(
        nets, teacher, latents, prompts, tokenizer, directory / "trajectories.npy"
    )
    student = train_student(nets, teacher, latents, trajectories, prompts, tokenizer, directory)
    vae = vae._replace(
        params=train_vae.train_decoder(directory, graphdef, params, train_vae.DECODER_STEPS.value)
    )
    trained = {name: net._replace(params=student[name]) for name, net in nets.items()}
    save_base(
        Path(OUTPUT.value),
        trained["transformer"],
        vae,
        trained["text_encoder"],
        tokenizer_json,
        dtype=np.float16,
    )


if __name__ == "__main__":
    app.run(main)
