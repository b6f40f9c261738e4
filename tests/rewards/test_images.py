"""Resizing, against what the published rewards run: PIL and torch."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from astrolabe_jax.rewards import images

resize = jax.jit(images.resize, static_argnums=(1, 2))
sides = st.integers(1, 90)


def noise(*shape, seed=0):
    """Noise, and the sharpest edges there are: where weights are negative, results leave [0,
    255].
    """
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(rng.random(shape) < 0.5, picture, np.where(picture < 128, 0, 255)).astype(
        np.uint8
    )


def with_pil(pictures, size):
    """The width first, as all versions of Pillow before 13 do whatever the sizes are."""
    bicubic, found = Image.Resampling.BICUBIC, []
    for picture in map(Image.fromarray, pictures):
        wide = picture.resize((size[1], picture.height), bicubic)
        found.append(np.asarray(wide.resize(size[::-1], bicubic)))
    return np.stack(found)


def with_torch(pictures, size):
    """What torchvision does to tensors of 8 bit."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(
        x, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@settings(max_examples=8, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 2**32 - 1))
def test_resizing_is_pils_bit_for_bit(height, width, to_height, to_width, seed):
    picture = noise(2, height, width, 3, seed=seed)
    size = (to_height, to_width)
    if max(height / to_height, width / to_width) <= 16:
        np.testing.assert_array_equal(resize(picture, size, "pil"), with_pil(picture, size))


@settings(max_examples=8, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 2**32 - 1))
def test_resizing_is_that_of_tensors(height, width, to_height, to_width, seed):
    picture = noise(2, height, width, 3, seed=seed)
    size = (to_height, to_width)
    difference = resize(picture, size, "torch").astype(int) - with_torch(picture, size)
    assert np.abs(difference).max() <= 1


def test_resizing_at_the_published_size():
    picture = noise(1, 480, 832, 3)
    wanted = Image.fromarray(picture[0]).resize((588, 336), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(picture, (336, 588), "pil")[0], np.asarray(wanted))
    difference = resize(picture, (336, 588), "torch").astype(int) - with_torch(picture, (336, 588))
    # its tables are float32
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 2e-3


@pytest.mark.parametrize("rounding", ["pil", "torch"])
def test_resizing_keeps_flat_pictures_and_sizes(rounding):
    for level in (0, 1, 127, 254, 255):
        flat = np.full((1, 37, 50, 1), level, np.uint8)
        assert np.unique(resize(flat, (50, 23), rounding)) == [level]
    picture = noise(1, 20, 30, 4)
    np.testing.assert_array_equal(resize(picture, (20, 30), rounding), picture)


def test_resizing_refuses_what_is_no_picture():
    picture = noise(1, 20, 30, 3)
    with pytest.raises(ValueError, match="rounding is 'numpy'; expected 'pil' or 'torch'"):
        images.resize(picture, (10, 10), "numpy")
    with pytest.raises(ValueError, match="images are float32; expected uint8"):
        images.resize(picture.astype(np.float32), (10, 10))
