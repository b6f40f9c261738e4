"""The shipped base model: small enough to ship, good enough to look at, and poor enough to be worth
aligning.
"""

import jax
import numpy as np
import pytest

from astrolabe_jax import encode
from astrolabe_jax.convert import base as bases
from astrolabe_jax.decode import decode_video
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.streaming import streams, windows
from astrolabe_jax.streaming.scenes import Rules, Scene, timeline_of
from astrolabe_jax.types import Policy, PromptBatch, VideoBatch
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
    rng = np.random.default_rng(0)
    prompts = rng.choice(vocabulary.prompts("train"), VIDEOS, replace=False).tolist()
    net = base.transformer
    layout = Layout(block=3)
    policy = Policy(net.params, None, net.graphdef, net.config, layout, Sampler())
    length = base.vae.config.latent_frames(render.FRAMES)
    number = np.arange(VIDEOS, dtype=np.int32)
    timelines = [
        timeline_of([Scene(prompt, 0.0, 0, False)], length, layout, Rules()) for prompt in prompts
    ]
    videos = VideoBatch(
        PromptBatch(tuple(prompts), number, np.zeros_like(number)),
        tuple(timelines),
        {prompt: row for row, prompt in enumerate(prompts)},
        encode.encode_prompts(base.text, base.tokenizer, prompts, ONE),
        jax.random.split(jax.random.key(0), VIDEOS),
    )
    state = streams.begin(
        policy.config, policy.layout, VIDEOS, length, (base.vae.config.z_dim, 6, 6)
    )
    blocks = range(len(videos.blocks))
    latents, _ = windows.sampled(streams.sample_blocks(policy, videos, state, blocks))
    frames, _ = decode_video(base.vae, latents, None, 1)
    return np.concatenate(frames, axis=1), prompts


@pytest.fixture(scope="module")
def scores(drawn):
    """Scores and their parts [VIDEOS]."""
    return rewards.score(*drawn)


def test_size():
    """Everything that ships with the package, at most 8 MB."""
    files = list(bases.SHIPPED["moving_shapes"].iterdir())
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
