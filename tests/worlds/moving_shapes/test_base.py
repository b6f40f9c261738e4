"""The shipped base model: small enough to ship, good enough to look at, and poor enough to be worth
aligning.
"""

import jax
import numpy as np
import pytest

from astrolabe_jax import encode
from astrolabe_jax.convert import base as bases
from astrolabe_jax.decode import decode
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rollout import Sampler, noise_from_keys, rollout
from astrolabe_jax.worlds.moving_shapes import render, rewards, vocabulary
from tests.meshes import ONE

VIDEOS = 48


@pytest.fixture(scope="module")
def drawn():
    """What the base draws for random prompts of the training split: frames [VIDEOS, T, SIZE, SIZE,
    3], prompts.
    """
    base = bases.load_base(
        "moving_shapes", dtype="float32", param_dtype="float32", remat=False, attention="xla"
    )
    prompts = list(
        np.random.default_rng(0).choice(vocabulary.prompts("train"), VIDEOS, replace=False)
    )
    text = encode.encode_prompts(
        base.text.graphdef, base.text.params, base.tokenizer, prompts, base.text.config, ONE
    )
    draw = noise_from_keys(
        jax.random.split(jax.random.key(0), VIDEOS), (base.vae.config.z_dim, 6, 6)
    )
    latents, _ = jax.jit(
        lambda params, text: rollout(
            base.transformer.graphdef,
            params,
            None,
            text,
            draw,
            frames=base.vae.config.latent_frames(render.FRAMES),
            latent_hw=(6, 6),
            layout=Layout(block=3),
            sampler=Sampler(),
        )
    )(base.transformer.params, text)
    frames = decode(base.vae.graphdef, base.vae.params, latents, chunk=1, mesh=ONE)
    return np.asarray(frames), prompts


@pytest.fixture(scope="module")
def scores(drawn):
    """Scores and their parts [VIDEOS]."""
    return rewards.score(*drawn)


def test_size():
    """Everything that ships with the package, at most 8 MB."""
    files = list(bases.directory_of("moving_shapes").iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= 8e6


@pytest.mark.slow
@pytest.mark.parametrize("part", ["visibility", "direction", "background"])
def test_most_videos_show_what_the_prompt_says(scores, part):
    assert np.mean(scores[f"shapes_ta/{part}"] > 0.5) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "share"), [("circle", 0.8), ("square", 0.4), ("triangle", 0.8)])
def test_every_shape_is_told_from_the_two_others(drawn, scores, shape, share):
    """The asked shape is seen more clearly than either of the others would be; squares have round
    corners.
    """
    frames, prompts = drawn
    attributes = [vocabulary.parse(prompt) for prompt in prompts]
    asked = [i for i, a in enumerate(attributes) if a.shape == shape]
    others = [
        rewards.score(
            frames[asked],
            [vocabulary.to_prompt(attributes[i]._replace(shape=other)) for i in asked],
        )
        for other in vocabulary.SHAPES
        if other != shape
    ]
    rival = np.maximum(*(values["shapes_ta/shape"] for values in others))
    assert len(asked) >= 8 and np.mean(scores["shapes_ta/shape"][asked] > rival) > share


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes_ta/colour", "shapes_ta/speed", "shapes_mq/steadiness"])
def test_there_is_work_left(scores, name):
    assert np.mean(scores[name]) < 0.9
