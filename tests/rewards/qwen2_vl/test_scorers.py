"""The rewards on Qwen2-VL from their directories: what they score is what the parts make of it one
by one.
"""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

from astrolabe_jax.models import layers
from astrolabe_jax.rewards import convert as conversions
from astrolabe_jax.rewards import images, registry
from astrolabe_jax.rewards.qwen2_vl import chat, hpsv3, patches, scoring, videoalign
from astrolabe_jax.rewards.qwen2_vl.hpsv3 import HPSv3Options
from astrolabe_jax.rewards.qwen2_vl.videoalign import VideoAlignOptions
from astrolabe_jax.rewards.qwen2_vl.weights import HPSV3, VIDEOALIGN
from astrolabe_jax.rewards.registry import SampleError, Setting
from tests.meshes import ONE, mesh_of
from tests.rewards.qwen2_vl import chats, published

PROMPTS = ["a cat", "a very long text about a dog " * 9, "ein Bär"]
SETTINGS = published.SETTINGS["inference_config"]
VQ, MQ, TA, OVERALL = videoalign.NAMES
TOKENS = {HPSV3.name: chat.HPSV3_TOKENS, VIDEOALIGN.name: chat.VIDEOALIGN_TOKENS}
# tests/rewards/test_images.py compares it with torch and PIL
resize = jax.jit(images.resize, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("rewards"), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        published.stand_in(monkeypatch)
        for kind in (HPSV3.name, VIDEOALIGN.name):
            given = published.write(folder / "given" / kind, kind)
            if given.tokenizer is None:
                given = given._replace(tokenizer=given.weights[0].parent / "tokenizer")
            found[kind] = conversions.convert(kind, given, folder / kind)
    return found


def videos(count, length, height, width, seed=0):
    """Smooth pictures with edges, all different."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, length, height // 4, width // 4, 3), dtype=np.uint8)
    return small.repeat(4, axis=2).repeat(4, axis=3)


def scores(scorer, frames, prompts):
    return scorer.score(scorer.params, frames, prompts)


@functools.cache
def net_of(kind):
    config, graphdef, params = published.net(kind)

    @functools.partial(jax.jit, static_argnums=2)
    def outputs(params, patches, grid, ids, where):
        return layers.merge(graphdef, params)(patches, grid, ids, where)

    return functools.partial(outputs, params)


def alone(kind, directory, patches, grid, prompt):
    """What the net says of one sample, without padding or company."""
    talk = chat.load(
        directory,
        TOKENS[kind],
        {HPSV3.name: chat.IMAGE}.get(kind, chat.VIDEO),
        chats.rows(TOKENS[kind]),
    )
    question = chat.ask(talk, prompt, grid)
    ids = question.ids[
        : np.flatnonzero(question.ids != talk.tokenizer.token_to_id("<|endoftext|>"))[-1] + 1
    ]
    return np.asarray(net_of(kind)(patches[None], grid, ids[None], question.where[None]))[0]


def processed(pictures):
    """Rows of the processor of Hugging Face, which looks at each picture twice."""
    limits = {"shortest_edge": 1, "longest_edge": 10**9}
    return theirs.Qwen2VLImageProcessorPil()(pictures, size=limits, return_tensors="np")[
        "pixel_values"
    ]


def rows_of_video(frames):
    """Patches of pairs of frames, from the processor's for each alone."""
    single = processed(list(frames)).reshape(len(frames) // 2, 2, -1, 3, 2, 196)
    return np.stack([single[:, i, :, :, i] for i in range(2)], axis=-2).reshape(-1, 1176)


@pytest.fixture(scope="module")
def hpsv3_scorer(directories):
    setting = Setting(ONE, 16.0)
    path = str(directories[HPSV3.name])
    options = HPSv3Options(path, frames_per_batch=3, dtype="float32")
    return hpsv3.load((hpsv3.NAME,), setting, options)


@pytest.fixture(scope="module")
def hpsv3_scores(hpsv3_scorer):
    frames = videos(2, 4, 48, 80)
    return frames, scores(hpsv3_scorer, frames, PROMPTS[:2])


def test_hpsv3_is_the_mean_of_the_best_frames(directories, hpsv3_scores):
    frames, found = hpsv3_scores
    size = patches.smart_resize(48, 80)
    for i in range(2):
        pictures = [
            Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)
            for frame in frames[i]
        ]
        rows = processed(pictures).reshape(4, -1, 1176)
        grid = patches.grid_of(1, *size)
        mu, sigma = np.stack(
            [alone("hpsv3", directories["hpsv3"], row, grid, PROMPTS[i]) for row in rows]
        ).T
        assert np.ptp(mu) > 1e-3
        # floor(0.3 * 4) is 1
        np.testing.assert_allclose(found[hpsv3.NAME][i], mu.max(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{hpsv3.NAME}/mean"][i], mu.mean(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found[f"{hpsv3.NAME}/uncertainty"][i], np.exp(sigma).mean(), rtol=1e-4
        )
    assert all(np.asarray(values).shape == (2,) for values in found.values()) and len(found) == 3


def test_hpsv3_of_a_video_does_not_depend_on_the_others(hpsv3_scorer, hpsv3_scores):
    frames, together = hpsv3_scores
    for i in range(2):
        single = scores(hpsv3_scorer, frames[i : i + 1], PROMPTS[i : i + 1])
        for name, values in single.items():
            np.testing.assert_allclose(values[0], together[name][i], rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_hpsv3_on_several_devices_and_of_fewer_frames(directories, hpsv3_scores):
    frames, found = hpsv3_scores
    setting, path = Setting(mesh_of(2, 2, jax.devices()[:4]), 16.0), str(directories["hpsv3"])
    split = hpsv3.load(
        (hpsv3.NAME,), setting, HPSv3Options(path, frames_per_batch=1, dtype="float32")
    )
    kernel = split.params["language"]["blocks"]["q"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 2}
    assert (
        split.identity
        and split.identity == hpsv3.load((hpsv3.NAME,), setting, HPSv3Options(path)).identity
    )
    for name, values in scores(split, frames, PROMPTS[:2]).items():
        np.testing.assert_allclose(values, found[name], rtol=1e-5, err_msg=name)
    options = HPSv3Options(path, frame_stride=2, frames_per_batch=1, dtype="float32")
    sparse = hpsv3.load((hpsv3.NAME,), setting, options)
    of_half = scores(sparse, frames, PROMPTS[:2])[f"{hpsv3.NAME}/mean"]
    chosen = scores(split, frames[:, ::2], PROMPTS[:2])[f"{hpsv3.NAME}/mean"]
    np.testing.assert_allclose(of_half, chosen, rtol=1e-6)


@pytest.fixture(scope="module")
def load_videoalign(directories):
    def load(*names, fps=16.0, **options):
        path = str(directories[VIDEOALIGN.name])
        given = VideoAlignOptions(path, dtype="float32", **options)
        return videoalign.load(names, Setting(ONE, fps), given)

    return load


@pytest.fixture(scope="module")
def videoaligns(load_videoalign):
    frames = videos(3, 33, 48, 80, seed=3)
    return frames, scores(load_videoalign(VQ, MQ, TA, OVERALL, videos_per_batch=2), frames, PROMPTS)


def test_videoalign_is_the_normalised_output_at_three_tokens(directories, videoaligns):
    """33 frames at 16 a second are 4 at 2 a second: 0, 11, 21, 32."""
    frames, found = videoaligns
    size = patches.smart_resize(48, 80, min_pixels=128 * 784, max_pixels=200704)
    grid = patches.grid_of(4, *size)
    for i, prompt in enumerate(PROMPTS):
        taken = frames[i, [0, 11, 21, 32]]
        gray = (taken.astype(np.float64) @ [0.2989, 0.587, 0.114] + 1e-9).astype(np.uint8)
        wanted = []
        for pictures in (taken, gray[..., None].repeat(3, axis=-1)):
            rows = rows_of_video(np.asarray(resize(pictures, size, "torch")))
            raw = alone(VIDEOALIGN.name, directories[VIDEOALIGN.name], rows, grid, prompt)
            pairs = [
                (SETTINGS[f"{aspect}_mean"], SETTINGS[f"{aspect}_std"])
                for aspect in ("VQ", "MQ", "TA")
            ]
            wanted.append(
                [(value - mean) / std for value, (mean, std) in zip(raw, pairs, strict=True)]
            )
        colour, without = wanted
        np.testing.assert_allclose(
            [found[VQ][i], found[TA][i]], [colour[0], colour[2]], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(found[MQ][i], without[1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            found[OVERALL][i], (colour[0] + without[1] + colour[2]) / 3, rtol=1e-5, atol=1e-5
        )
        assert abs(colour[1] - without[1]) > 1e-3


def test_videoalign_of_a_video_does_not_depend_on_the_others(load_videoalign, videoaligns):
    frames, together = videoaligns
    scorer = load_videoalign(VQ, MQ, TA, videos_per_batch=2)
    for i in range(3):
        single = scores(scorer, frames[i : i + 1], PROMPTS[i : i + 1])
        for name, values in single.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(
                values[0], together[name][i], rtol=1e-6, atol=1e-7, err_msg=name
            )


def test_only_alignment_depends_on_the_prompt(load_videoalign, videoaligns):
    frames, before = videoaligns
    after = scores(load_videoalign(VQ, MQ, TA, videos_per_batch=2), frames, PROMPTS[::-1])
    for name in (VQ, MQ):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)
    assert np.abs(after[TA] - before[TA])[[0, 2]].min() > 1e-4


@pytest.mark.slow
def test_videoalign_computes_what_is_asked(load_videoalign, videoaligns, monkeypatch):
    frames, before = videoaligns
    calls = []
    evaluate = scoring.evaluate

    def counted(*given, **more):
        calls.append(given[3].gray)
        return evaluate(*given, **more)

    monkeypatch.setattr(scoring, "evaluate", counted)
    for names, passes in [
        ((MQ,), [True]),
        ((VQ, TA), [False]),
        ((OVERALL, MQ), [True, False]),
        ((OVERALL,), [0, 1]),
    ]:
        calls.clear()
        found = scores(load_videoalign(*names), frames[:1], PROMPTS[:1])
        assert sorted(calls) == sorted(passes) and set(found) == set(names)
        for name in names:
            np.testing.assert_allclose(found[name], before[name][:1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_published_input_is_the_default_for_the_published_clip(load_videoalign):
    facts = {"fps": 2.0, "max_frame_pixels": 200704}
    for published_input in (False, True):
        of_the_clip = videoalign.select((81, 480, 832), 16.0, published_input, facts)
        assert of_the_clip == (patches.frame_indices(81, 10), (336, 588))
    fixed, default = (
        videoalign.select((240, 832, 480), 16.0, published_input, facts)
        for published_input in (True, False)
    )
    assert fixed == (patches.frame_indices(240, 10), (336, 588))
    assert default == (patches.frame_indices(240, 30), (588, 336))
    frames = videos(1, 10, 28, 28)
    found = scores(load_videoalign(VQ, OVERALL, published=True), frames, PROMPTS[:1])
    coloured = [
        found[VQ],
        *scores(load_videoalign(TA, published=True), frames, PROMPTS[:1]).values(),
    ]
    assert found[OVERALL] != sum(coloured) and np.isfinite(found[OVERALL])


def test_what_cannot_be_scored_is_refused(load_videoalign, hpsv3_scorer):
    wide = np.zeros((1, 4, 2, 402, 3), np.uint8)
    for scorer in (hpsv3_scorer, load_videoalign(MQ)):
        with pytest.raises(
            ValueError, match="frames of 2 x 402 pixels; expected an aspect ratio of at most 200"
        ):
            scores(scorer, wide, ["a"])
        with pytest.raises(
            SampleError, match="'<.im_end.>', which stands for a special token"
        ) as error:
            scores(scorer, videos(2, 4, 28, 28), ["a", "b <|im_end|>"])
        assert error.value.row == 1
    with pytest.raises(ValueError, match="a video of one frame; expected at least 2"):
        scores(load_videoalign(MQ), videos(1, 1, 28, 28), ["a"])
    with pytest.raises(
        ValueError, match="a video of 9 frames; expected at least the 10 that are sampled"
    ):
        scores(load_videoalign(MQ, published=True), videos(1, 9, 28, 28), ["a"])


def test_options_are_checked(directories, load_videoalign):
    with pytest.raises(ValueError, match="fps is 0.0; expected a positive number"):
        load_videoalign(MQ, fps=0.0)
    with pytest.raises(ValueError, match="published is 1; expected true or false"):
        load_videoalign(MQ, published=1)
    with pytest.raises(
        ValueError, match="videos_per_batch is 0; expected a whole number, at least 1"
    ):
        load_videoalign(MQ, videos_per_batch=0)
    setting, path = Setting(ONE, 16.0), str(directories["hpsv3"])
    with pytest.raises(ValueError, match="frame_stride is 0; expected a whole number, at least 1"):
        hpsv3.load((hpsv3.NAME,), setting, HPSv3Options(path, frame_stride=0))
    with pytest.raises(
        ValueError, match="is of the kind 'hpsv3'; expected 'videoalign': give another path"
    ):
        videoalign.load((MQ,), setting, VideoAlignOptions(path))
    with pytest.raises(
        FileNotFoundError, match="no nowhere/config.json; expected a directory that `python -m"
    ):
        hpsv3.load((hpsv3.NAME,), setting, HPSv3Options("nowhere"))


def test_a_damaged_directory_is_named(directories, load_videoalign, tmp_path):
    path = directories[VIDEOALIGN.name] / "config.json"
    before = path.read_text()
    content = json.loads(before)
    del content["facts"]["MQ_std"]
    path.write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match=f"{path} has no number MQ_std; convert it again"):
            load_videoalign(MQ)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ((hpsv3.NAME,), {"frame_stride": 2, "frames_per_batch": 2}),
        ((VQ, MQ), {"videos_per_batch": 1}),
        ((TA,), {"published": True}),
    ],
)
def test_what_a_plan_counts_is_what_a_scorer_runs(directories, monkeypatch, names, options):
    """All calls of a video, with pictures and outputs of the same shapes."""
    called = []
    outputs = scoring._outputs

    def recorded(graphdef, params, frames, ids, where, **rest):
        called.append((frames.shape, where.shape, rest["preparation"]))
        return outputs(graphdef, params, frames, ids, where, **rest)

    kind = HPSV3.name if names[0] == hpsv3.NAME else VIDEOALIGN.name
    setting = {"path": str(directories[kind]), "dtype": "float32"} | options
    frames = videos(1, 12, 48, 80)
    settings = {name: setting for name in names}
    works = list(registry.works(settings, registry.Clip(12, 48, 80, 16.0), ONE))
    monkeypatch.setattr(scoring, "_outputs", recorded)
    for loaded in registry.load(settings, Setting(ONE, 16.0)):
        scores(loaded.scorer, frames, PROMPTS[:1])
    assert sum(work.calls for _, _, work in works) == len(called)
    each = len(called) // len(works)
    for (_, params, work), seen in zip(works, called[::each], strict=True):
        pictures, where, preparation = seen
        given, _, read = work.arguments
        assert (given.shape, read.shape) == (pictures, where)
        assert work.function.args[1] == preparation
        assert jax.eval_shape(work.function, params, *work.arguments).shape[0] == where[0]
