"""HPSv2.1 and aesthetics from published files to scores, against transformers' CLIP, PIL and
torch.
"""

import json

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from astrolabe_jax.rewards import directory as directories
from astrolabe_jax.rewards.clip import scorers
from astrolabe_jax.rewards.clip.tokenizer import load_tokenizer, token_ids
from astrolabe_jax.rewards.clip.weights import AESTHETIC, HPSV2
from astrolabe_jax.rewards.directory import PublishedFiles
from astrolabe_jax.rewards.images import CLIP_MEAN, CLIP_STD
from astrolabe_jax.rewards.registry import Setting
from tests.convert import torch_files
from tests.meshes import ONE, mesh_of
from tests.rewards.clip import clips
from tests.rewards.clip.test_weights import predictor, torch_tree

PROMPTS = ["a cab", "abc 1, a bac", "", "a " * 30]
HEIGHT, WIDTH = 20, 33


@pytest.fixture(scope="module")
def videos():
    return np.random.default_rng(0).integers(0, 256, (4, 11, HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """(reward directory, transformers' net of the same weights)."""
    root = tmp_path_factory.mktemp("hps")
    net = clips.model(clips.OPEN)
    torch_files.write(
        root / "HPS.pt", {"state_dict": torch_tree(clips.open_clip(clips.tensors(net)))}
    )
    clips.write_vocabulary(root)
    texts = {name: (root / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    contents = directories.contents_of(HPSV2, PublishedFiles((root / "HPS.pt",)))
    directories.write(root / "reward", contents._replace(texts=texts))
    return root / "reward", net


@pytest.fixture(scope="module")
def laion(tmp_path_factory):
    root = tmp_path_factory.mktemp("laion")
    net, head = clips.model(clips.OPENAI), predictor(clips.OPENAI.embed_dim)
    paths = [root / "pytorch_model.bin", root / "sac.pth"]
    for path, tensors in zip(paths, (clips.tensors(net), head), strict=True):
        torch_files.write(path, torch_tree(tensors))
    contents = directories.contents_of(AESTHETIC, PublishedFiles(tuple(paths[::-1])))
    directories.write(root / "reward", contents)
    return root / "reward", net, head


def run(scorer, frames, prompts):
    return {
        name: np.asarray(value)
        for name, value in scorer.score(scorer.params, frames, prompts).items()
    }


def standardised(pictures):
    """[N, h, w, 3] in 0..255 -> [N, 3, h, w]."""
    return (
        ((pictures / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD))
        .transpose(0, 3, 1, 2)
        .astype(np.float32)
    )


def letterbox(pictures, size):
    """What OpenCLIP's resize to the longer side and its padding make of pictures, with torch."""
    height, width = (round(side * size / max(pictures.shape[1:3])) for side in pictures.shape[1:3])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    if (height, width) != pictures.shape[1:3]:
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (size - height) // 2, (size - width) // 2
    return (
        F.pad(x, (left, size - width - left, top, size - height - top)).permute(0, 2, 3, 1).numpy()
    )


@pytest.mark.parametrize("shape", [(480, 832), (224, 100), (97, 224), (224, 224), (30, 31)])
def test_hpsv2_sees_whole_frames_on_black(shape):
    pictures = np.random.default_rng(1).integers(0, 256, (1, *shape, 3), np.uint8)
    got = np.asarray(scorers.on_black(pictures, 224)).transpose(0, 3, 1, 2)
    want = standardised(letterbox(pictures, 224))
    assert got.shape == (1, 3, 224, 224)
    # A level in 0..255 is at most 0.0151; only ties may fall the other way.
    assert np.abs(got - want).max() < 0.016 and np.mean(np.abs(got - want) > 1e-4) < 0.001


@pytest.mark.parametrize("shape", [(480, 832), (100, 224), (224, 97), (301, 299)])
def test_aesthetics_are_of_the_middle_as_the_processor_cuts_it(shape):
    pictures = np.random.default_rng(2).integers(0, 256, (1, *shape, 3), np.uint8)
    want = CLIPImageProcessorPil()(list(pictures), return_tensors="np")["pixel_values"]
    got = np.asarray(scorers.middle(pictures, 224)).transpose(0, 3, 1, 2)
    assert np.abs(got - want).max() < 0.016 and np.mean(np.abs(got - want) > 1e-4) < 0.001


def test_hpsv2_is_the_mean_of_the_best_cosines(hps, videos):
    directory, net = hps
    options = scorers.CLIPOptions(str(directory), frames_per_batch=7)
    scorer = scorers.load_hpsv2(("hpsv2",), Setting(ONE, 16.0), options)
    got = run(scorer, videos, PROMPTS)
    ids = token_ids(load_tokenizer(directory), PROMPTS, clips.OPEN.text_len)
    pictures = letterbox(videos.reshape(-1, HEIGHT, WIDTH, 3), clips.OPEN.image_size)
    with torch.no_grad():
        seen = net.get_image_features(torch.from_numpy(standardised(pictures))).pooler_output
        read = net.get_text_features(torch.from_numpy(ids)).pooler_output
    seen, read = (F.normalize(x, dim=-1) for x in (seen.reshape(4, 11, -1), read))
    cosines = torch.einsum("bfe,be->bf", seen, read).sort(descending=True).values.numpy()
    np.testing.assert_allclose(got["hpsv2"], cosines[:, :3].mean(axis=1), atol=2e-4)
    np.testing.assert_allclose(got["hpsv2/mean"], cosines.mean(axis=1), atol=2e-4)
    assert np.std(got["hpsv2"]) > 0.01


def test_aesthetics_are_means_over_every_eighth_frame(laion, videos):
    directory, net, head = laion
    options = scorers.AestheticOptions(str(directory))
    scorer = scorers.load_aesthetic(("aesthetic",), Setting(ONE, 16.0), options)
    got = run(scorer, videos, PROMPTS)["aesthetic"]
    size = clips.OPENAI.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    pixels = processor(list(videos[:, ::8].reshape(-1, HEIGHT, WIDTH, 3)), return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        x = F.normalize(net.get_image_features(pixels).pooler_output, dim=-1)
        for number in (0, 2, 4, 6, 7):
            weight, bias = (
                torch.from_numpy(head[f"layers.{number}.{part}"]) for part in ("weight", "bias")
            )
            x = F.linear(x, weight, bias)
    want = x.reshape(4, 2).mean(dim=1).numpy()
    # The random layers enlarge what a level more or less in a pixel does.
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["hpsv2", "aesthetic"])
def test_scores_do_not_depend_on_the_batch_or_on_the_devices(hps, laion, videos, kind):
    load, options_of, path = {
        "hpsv2": (scorers.load_hpsv2, scorers.CLIPOptions, hps[0]),
        "aesthetic": (scorers.load_aesthetic, scorers.AestheticOptions, laion[0]),
    }[kind]

    def scores(mesh, frames, prompts, size):
        options = options_of(str(path), frame_stride=2, frames_per_batch=size)
        return run(load(("r",), Setting(mesh, 16.0), options), frames, prompts)["r"]

    together = scores(ONE, videos, PROMPTS, 8)
    tolerance = 1e-5 * np.abs(together).max()
    np.testing.assert_allclose(
        scores(ONE, videos[2:3], PROMPTS[2:3], 8), together[2:3], atol=tolerance
    )
    split = scores(mesh_of(fsdp=2), jax.numpy.asarray(videos), PROMPTS, 5)
    np.testing.assert_allclose(split, together, atol=tolerance)
    other = scores(ONE, videos, PROMPTS[::-1], 8)
    assert np.array_equal(other, together) == (kind == "aesthetic")


def test_weights_are_arguments_and_split_over_fsdp(hps):
    scorer = scorers.load_hpsv2(
        ("r",), Setting(mesh_of(fsdp=2), 16.0), scorers.CLIPOptions(str(hps[0]))
    )
    kernel = scorer.params["vision"]["blocks"]["fc1"]["kernel"]
    assert kernel.shape == (3, 160, 24) and kernel.sharding.shard_shape(kernel.shape) == (3, 80, 24)
    zeros = jax.tree.map(np.zeros_like, scorer.params)
    assert not np.isfinite(
        np.asarray(scorer.score(zeros, np.zeros((1, 2, 9, 9, 3), np.uint8), ["a"])["r"])
    ).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "aesthetic"},
            "config.json is of the kind 'aesthetic'; expected 'hpsv2': give another path",
        ),
        ({"net": {}}, "config.json: fields of net that are missing or unknown: embed_dim, eps, "),
        (
            {"net/vision_heads": 7},
            "config.json: hpsv2: CLIPConfig.vision_dim 160 is not divisible by vision_heads 7",
        ),
        ({"net/embed_dim": 25}, "(?s)weights: .*changed shape: text.projection.kernel is "),
        ({"net/vocab_size": 59}, "changed shape: text.token_embedding.embedding is "),
    ],
)
def test_a_directory_of_another_net_is_refused(hps, tmp_path, change, message):
    content = json.loads((hps[0] / "config.json").read_text())
    for name, value in change.items():
        node, _, field = name.rpartition("/")
        (content[node] if node else content)[field] = value
    (tmp_path / "weights").symlink_to(hps[0] / "weights")
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        scorers.load_hpsv2(("r",), Setting(ONE, 16.0), scorers.CLIPOptions(str(tmp_path)))
    assert str(tmp_path) in str(error.value)


def test_what_is_missing_or_makes_no_sense_is_named(hps, tmp_path):
    def load(path, **options):
        given = scorers.CLIPOptions(str(path), **options)
        return scorers.load_hpsv2(("r",), Setting(ONE, 16.0), given)

    with pytest.raises(
        FileNotFoundError,
        match=f"no {tmp_path}/config.json; expected .*astrolabe_jax.convert reward ",
    ):
        load(tmp_path)
    (tmp_path / "config.json").write_bytes((hps[0] / "config.json").read_bytes())
    with pytest.raises(
        FileNotFoundError, match="no whole Orbax store .*weights; convert the reward again"
    ):
        load(tmp_path)
    (tmp_path / "weights").symlink_to(hps[0] / "weights")
    with pytest.raises(FileNotFoundError, match="no .*vocab.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="frame_stride is 0"):
        load(hps[0], frame_stride=0)
    with pytest.raises(ValueError, match="dtype is 'int8'; expected float32 or bfloat16"):
        load(hps[0], dtype="int8")
