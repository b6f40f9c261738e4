"""Patches, against the processor of Hugging Face, PIL and torch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

from astrolabe_jax.rewards import images
from astrolabe_jax.rewards.qwen2_vl import patches
from tests.rewards.test_images import noise, resize


def test_smart_resize():
    for given_size, size in {
        (480, 832): (336, 588),
        (240, 416): (364, 616),
        (1080, 1920): (336, 588),
        (512, 512): (448, 448),
    }.items():
        assert patches.smart_resize(*given_size) == size
    for size in [(0, 28), (28, 28 * 201), (5601, 28)]:
        with pytest.raises(
            ValueError,
            match=f"frames of {size[0]} x {size[1]} pixels; expected an aspect ratio of at",
        ):
            patches.smart_resize(*size)
    assert patches.smart_resize(10, 2000, min_pixels=0)[0] == 28


@given(st.integers(28, 3000), st.integers(28, 3000), st.integers(1, 600), st.integers(1, 600))
def test_smart_resize_is_that_of_the_processor(height, width, least, more):
    limits = least * 784, (least + more) * 784
    assert patches.smart_resize(
        height, width, min_pixels=limits[0], max_pixels=limits[1]
    ) == theirs.smart_resize(height, width, 28, *limits)


def test_grayscale():
    """The float formula wherever its sum is not whole, for every colour of a grid and all its
    neighbours.
    """
    axis = np.unique(np.concatenate([np.arange(0, 256, 5), [1, 127, 128, 254, 255]]))
    colours = np.stack(np.meshgrid(axis, axis, axis), axis=-1).astype(np.uint8)
    gray = np.asarray(patches.grayscale(jnp.asarray(colours)))
    assert gray.dtype == np.uint8 and (gray == gray[..., :1]).all()
    wanted = colours.astype(np.float64) @ [0.2989, 0.587, 0.114]
    whole = colours.astype(int) @ [2989, 5870, 1140] % 10000 == 0
    np.testing.assert_array_equal(gray[..., 0][~whole], wanted[~whole].astype(np.uint8))
    np.testing.assert_array_equal(gray[..., 0][whole], np.rint(wanted[whole]))
    assert 0 < whole.sum() < whole.size / 1000


@functools.cache
def processor():
    return theirs.Qwen2VLImageProcessorPil()


@jax.jit
def prepared(frames):
    return patches.patches(images.normalised(frames))


def test_patches_of_pictures_are_those_of_the_processor():
    pictures = noise(3, 56, 84, 3)
    limits = {"shortest_edge": 28 * 28, "longest_edge": 10**9}
    wanted = processor()(
        [Image.fromarray(one) for one in pictures], size=limits, return_tensors="np"
    )
    assert wanted["image_grid_thw"].tolist() == [list(patches.grid_of(1, 56, 84))] * 3
    got = prepared(pictures[:, None])
    np.testing.assert_allclose(got.reshape(-1, 1176), wanted["pixel_values"], atol=2e-6)


def test_a_picture_is_prepared_as_hpsv3_does():
    """Resized by PIL, then patched by the processor, whose own resizing changes nothing any
    more.
    """
    picture = noise(1, 240, 416, 3)
    size = patches.smart_resize(240, 416)
    resized = Image.fromarray(picture[0]).resize(size[::-1], Image.Resampling.BICUBIC)
    wanted = processor()([resized], return_tensors="np")["pixel_values"]
    got = prepared(resize(picture, size, "pil")[:, None])
    np.testing.assert_allclose(got[0], wanted, atol=2e-6)


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_pixels_that_tell_their_place(frames):
    """Row and column of every patch, and what is inside of it, for values that encode where they
    come from.
    """
    height, width = 56, 84
    where = np.stack(
        np.meshgrid(*map(np.arange, (2, frames, height, width, 3)), indexing="ij"), axis=-1
    )
    got = (
        np.asarray(patches.patches(jnp.asarray(where @ np.array([10**7, 10**6, 1000 * 10, 30, 1]))))
        % 10**8
    )
    time = -(-frames // 2)
    rows = itertools.product(range(time), range(2), range(3), range(2), range(2))
    for number, (t, row, column, inner_row, inner_column) in enumerate(rows):
        y, x = 28 * row + 14 * inner_row, 28 * column + 14 * inner_column
        both = [min(2 * t + i, frames - 1) for i in range(2)]
        block = where[:, both, y : y + 14, x : x + 14] @ np.array([10**7, 10**6, 1000 * 10, 30, 1])
        np.testing.assert_array_equal(got[:, number], block.transpose(0, 4, 1, 2, 3).reshape(2, -1))
    assert got.shape == (2, time * 24, 1176) and number == time * 24 - 1


def test_frames_of_the_published_clip():
    assert patches.sampled_count(81, 16.0, 2.0) == 10
    assert patches.frame_indices(81, 10) == (0, 9, 18, 27, 36, 44, 53, 62, 71, 80)


def test_frames_are_spaced_as_torch_does():
    for frames in range(1, 130):
        for count in range(1, min(frames, 40) + 1):
            wanted = torch.linspace(0, frames - 1, count).round().long().tolist()
            assert list(patches.frame_indices(frames, count)) == wanted, (frames, count)


@given(st.integers(2, 2000), st.floats(0.5, 120))
def test_so_many_frames_as_the_published_code_takes(frames, fps):
    count = patches.sampled_count(frames, fps, 2.0)
    assert count % 2 == 0 and 2 <= count <= min(frames, 768)
    if 4 <= frames / fps * 2 <= min(frames, 768) - 1:
        assert abs(count - frames / fps * 2) <= 1
    assert len(set(patches.frame_indices(frames, count))) == count


def test_frames_that_are_not_there():
    with pytest.raises(
        ValueError, match="a video of 9 frames; expected at least the 10 that are sampled"
    ):
        patches.frame_indices(9, 10)
    with pytest.raises(ValueError, match="a video of one frame; expected at least 2"):
        patches.sampled_count(1, 16.0, 2.0)
