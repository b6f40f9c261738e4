"""Stages 3 and 4: a causal diffusion teacher by teacher-forced flow matching, then its four-step
student.

The teacher learns from real clips with noisy captions, some of whose words are replaced, as in web
data. So the base confuses colours and speeds, and reinforcement learning has something to do. The
student regresses the end of the teacher's deterministic trajectories from their points at the four
warped noise levels of the sampler (ODE distillation, as Causal Forcing does before its last stage).
Each noise leads to one video, so a start position that the prompt leaves open is not averaged away.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from astrolabe_jax import schedule as time
from astrolabe_jax.convert.nets import Net
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import load_tokenizer, tokenize
from astrolabe_jax.models.umt5 import UMT5Config
from astrolabe_jax.models.wan.config import Layout, WanConfig
from astrolabe_jax.models.wan.vae import Vae
from astrolabe_jax.runtime import cli
from astrolabe_jax.worlds.moving_shapes import render, vocabulary
from experiments.moving_shapes_base import common, train_vae
from experiments.moving_shapes_base.bases import random_base, save_base
from experiments.moving_shapes_base.words import word_tokenizer

OUTPUT = flags.DEFINE_string(
    "output", "astrolabe_jax/worlds/moving_shapes/base", "where the finished base goes"
)

BATCH = 32
VIDEOS = 3072  # encoded clips that the teacher learns from
TRAJECTORIES = 1024  # videos whose teacher trajectories the student learns from
ODE_STEPS = 16  # of a trajectory; levels of the sampler that are not among them come on top
AVERAGE_DECAY = 0.98
TEACHER_STEPS = 2400
TEACHER_RATE = 8e-3
# Probability that a word of a caption is replaced by one of its kind: for the teacher, and in the
# student's last round.
CAPTION_NOISE = {"colour": 0.2, "shape": 0.0, "direction": 0.0, "speed": 0.3, "background": 0.0}
STUDENT_NOISE = {"colour": 0.5, "shape": 0.0, "direction": 0.0, "speed": 0.3, "background": 0.0}
NO_NOISE = dict.fromkeys(CAPTION_NOISE, 0.0)
# Optimizer steps, peak rate, caption noise.
STUDENT_ROUNDS = ((600, 4e-3, NO_NOISE), (250, 2e-3, STUDENT_NOISE))
TEXT_LEN = 16
LAYOUT = Layout(block=3)
SCHEDULE = time.Schedule(shift=5.0)
# Noise levels of the sampler, as sigma.
LEVELS = np.array(time.warp((1000, 750, 500, 250), SCHEDULE), np.float32) / 1000
FLOAT32: Any = {"dtype": "float32", "param_dtype": "float32"}
WORDS = sorted(
    {
        word
        for attributes in vocabulary.all_attributes()
        for word in vocabulary.to_prompt(attributes).split()
    }
)
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


# Field of vocabulary.Attributes -> its words.
_VOCABULARY = {
    "colour": vocabulary.COLOURS,
    "shape": vocabulary.SHAPES,
    "direction": vocabulary.DIRECTIONS,
    "speed": vocabulary.SPEEDS,
    "background": vocabulary.BACKGROUNDS,
}


def noisy_caption(
    attributes: vocabulary.Attributes,
    probabilities: dict[str, float],
    rng: np.random.Generator,
) -> str:
    """Draw a caption of a clip, some of whose words are replaced by random ones of their kind.

    `probabilities` are those of a replacement, by kind of word. The caption is a training prompt.
    """
    while True:
        words = {}
        for kind, choices in _VOCABULARY.items():
            if rng.random() < probabilities[kind]:
                words[kind] = rng.choice(list(choices))
            else:
                words[kind] = getattr(attributes, kind)
        prompt = vocabulary.to_prompt(vocabulary.Attributes(**words))
        if prompt in _TRAIN and words["colour"] != words["background"]:
            return prompt


_TRAIN = frozenset(common.TRAIN_PROMPTS)


class Clips(NamedTuple):
    """Encoded clips that the generator learns from."""

    latents: np.ndarray  # [VIDEOS, F, C, H, W]
    prompts: list[str]  # the true ones


def encoded_clips(vae: Net, path: Path, seed: int = 2) -> Clips:
    """Return random training clips; they are encoded once and kept in `path`."""
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
    return Clips(np.load(path, mmap_mode="r"), prompts)


def _velocity(nets: dict[str, Net], params, clean, ids, mask):
    """Return `(x, t) -> velocity` of every block of x, each of which reads the clean video before
    it.
    """
    model = layers.merge(nets["transformer"].graphdef, params["transformer"])
    encoder = layers.merge(nets["text_encoder"].graphdef, params["text_encoder"])
    text = model.encode_text(encoder.embed(ids, mask))
    context = model.context(clean, text, layout=LAYOUT)
    return lambda x, t: model(x, t, text, layout=LAYOUT, context=context)


def _noise_levels(key: jax.Array, batch: int, frames: int) -> jax.Array:
    """Draw sigmas [batch, frames], one for each block: uniform, then shifted."""
    u = jax.random.uniform(key, (batch, frames // LAYOUT.block))
    sigma = SCHEDULE.shift * u / (1 + (SCHEDULE.shift - 1) * u)
    return jnp.repeat(sigma, LAYOUT.block, axis=1)


def _regression(nets: dict[str, Net], peak_rate: float, steps: int):
    """Return the optimizer, and the jitted step of `common.descent` on the error of the
    velocity.
    """
    optimizer = common.optimizer(peak_rate, peak_rate / 4, steps, kernel_ndim=2)

    def loss_and_metrics(params, x, sigma, clean, target, ids, mask):
        velocity = _velocity(nets, params, clean, ids, mask)(x, 1000 * sigma)
        loss = jnp.mean((velocity - target) ** 2)
        return loss, {"loss": loss}

    return optimizer, common.descent(loss_and_metrics, optimizer, AVERAGE_DECAY)


def train_teacher(
    nets: dict[str, Net], clips: Clips, tokenizer, directory: Path, seed: int = 3
) -> dict:
    """Train the teacher by teacher-forced flow matching on encoded clips with noisy captions.

    Returns:
      The averaged parameters of each net.
    """
    params = {name: net.params for name, net in nets.items()}
    attributes = [vocabulary.parse(prompt) for prompt in clips.prompts]

    def step(update, state, i):
        rng = np.random.default_rng([seed, i])
        key = jax.random.fold_in(jax.random.key(seed), i)
        chosen = rng.integers(VIDEOS, size=BATCH)
        captions = [noisy_caption(attributes[j], CAPTION_NOISE, rng) for j in chosen]
        ids, mask = tokenize(tokenizer, captions, TEXT_LEN)
        clean = jnp.asarray(clips.latents[chosen], jnp.float32)
        noise_key, level_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clean.shape)
        sigma = _noise_levels(level_key, *clean.shape[:2])
        noisy = time.add_noise(clean, noise, sigma)
        return update(state, noisy, sigma, clean, noise - clean, ids, mask)

    optimizer, update = _regression(nets, TEACHER_RATE, TEACHER_STEPS)
    state = (params, optimizer.init(params), params)
    path = directory / "teacher.state"
    _, _, average = common.train(path, state, partial(step, update), TEACHER_STEPS)
    return average


def teacher_trajectories(
    nets: dict[str, Net], params: dict, clips: Clips, tokenizer, path: Path, seed: int = 4
) -> np.ndarray:
    """Return points [N, 5, F, C, H, W] of the teacher's ODE; they are solved once and kept in
    `path`.

    The points are those at the sampler's four levels, and the ends.
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
            clean = jnp.asarray(clips.latents[part], jnp.float32)
            key = jax.random.fold_in(jax.random.key(seed), start)
            noise = jax.random.normal(key, clean.shape)
            ids, mask = tokenize(tokenizer, clips.prompts[part], TEXT_LEN)
            solved = solve(params, noise, clean, ids, mask)
            points.append(np.asarray(solved, np.float16))
            logging.log_every_n_seconds(
                logging.INFO, "solved %d of %d trajectories", 30, start, TRAJECTORIES
            )
        common.save_array(path, np.concatenate(points))
    return np.load(path)


def train_student(
    nets: dict[str, Net],
    teacher: dict,
    clips: Clips,
    trajectories: np.ndarray,
    tokenizer,
    directory: Path,
    seed: int = 5,
) -> dict:
    """Train the student, which starts as the teacher, to predict ends of trajectories from points.

    Returns:
      The averaged parameters of each net.
    """
    attributes = [vocabulary.parse(prompt) for prompt in clips.prompts]
    frames = clips.latents.shape[1]

    def step(update, seed, probabilities, state, i):
        rng = np.random.default_rng([seed, i])
        chosen = rng.integers(TRAJECTORIES, size=BATCH)
        level = rng.integers(len(LEVELS), size=(BATCH, frames // LAYOUT.block))
        level = np.repeat(level, LAYOUT.block, axis=1)
        x = trajectories[chosen[:, None], level, np.arange(frames)[None]].astype(np.float32)
        end = trajectories[chosen, -1].astype(np.float32)
        sigma = LEVELS[level]
        target = (x - end) / sigma[:, :, None, None, None]
        captions = [noisy_caption(attributes[j], probabilities, rng) for j in chosen]
        ids, mask = tokenize(tokenizer, captions, TEXT_LEN)
        clean = np.asarray(clips.latents[chosen], np.float32)
        return update(state, x, sigma, clean, target, ids, mask)

    params = teacher
    for i, (steps, rate, probabilities) in enumerate(STUDENT_ROUNDS):
        optimizer, update = _regression(nets, rate, steps)
        state = (params, optimizer.init(params), params)
        path = directory / f"student{i + 1}.state"
        round_step = partial(step, update, seed + 100 * i, probabilities)
        _, _, params = common.train(path, state, round_step, steps)
    return params


def main(_):
    """Run all stages that are not done yet, and write the base."""
    directory = Path(train_vae.DIRECTORY.value)
    common.check_recipe(directory, "generator", globals())
    graphdef, params = train_vae.train(directory, train_vae.STEPS.value)
    config = train_vae.with_statistics(graphdef, params)
    graphdef, _ = layers.graphdef_of(lambda: Vae(config, nnx.Rngs(0)))
    vae = Net(graphdef, params, config)
    nets = random_base({"transformer": TRANSFORMER, "text_encoder": TEXT}, seed=0)
    tokenizer_json = word_tokenizer(WORDS)
    (directory / "tokenizer.json").write_text(tokenizer_json)
    tokenizer = load_tokenizer(directory)

    clips = encoded_clips(vae, directory / "latents.npy")
    teacher = train_teacher(nets, clips, tokenizer, directory)
    path = directory / "trajectories.npy"
    trajectories = teacher_trajectories(nets, teacher, clips, tokenizer, path)
    student = train_student(nets, teacher, clips, trajectories, tokenizer, directory)
    steps = train_vae.DECODER_STEPS.value
    vae = vae._replace(params=train_vae.train_decoder(directory, graphdef, params, steps))
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
    app.run(main, flags_parser=cli.parse)
