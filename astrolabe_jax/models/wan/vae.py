"""The Wan 2.1 causal video autoencoder (docs/models.md, VAE layers).

One code path serves whole videos and chunks of them. Every temporal convolution sees the last
frames of its own earlier input: zeros at the start of a video, afterwards what the previous chunk
left. These frames are the state of the VAE, a flat tuple of arrays, one for each temporal
convolution in execution order. A whole video is a single chunk, so both give identical frames
(docs/models.md, VAE streaming).

Inside this file videos are channels-last, `[B, T, height, width, channels]`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astrolabe_jax.models.attention import attention
from astrolabe_jax.runtime import backend

# The encoder's or the decoder's memory between two chunks of a video; see the module docstring.
VaeState = tuple[jax.Array, ...]

# Per-channel statistics of the published latents (docs/models.md, Latent normalisation).
WAN_LATENT_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
WAN_LATENT_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)


class StageLayer(NamedTuple):
    """A residual block of the encoder or the decoder, or the resampling between two stages."""

    features_in: int
    features_out: int  # before an upsampling halves them
    temporal: bool | None = None  # whether a resampling is of the frames, too; None: a block


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder; the defaults are the published Wan 2.1 VAE."""

    dim: int = 96  # channels of the first stage
    z_dim: int = 16  # C, latent channels
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each stage, in units of `dim`
    num_res_blocks: int = 2  # of each encoder stage; a decoder stage has one more
    # After each encoder stage but the last, height and width are halved; the frames, where True.
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN  # of each latent channel
    latent_std: tuple[float, ...] = WAN_LATENT_STD
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"VaeConfig.temporal_downsample has {len(self.temporal_downsample)} entries; "
                f"{len(self.dim_mult)} stages (dim_mult) need {len(self.dim_mult) - 1}"
            )
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"VaeConfig.{name} has {len(getattr(self, name))} entries; z_dim is "
                    f"{self.z_dim}"
                )
        if min(self.latent_std) <= 0:
            raise ValueError(
                f"VaeConfig.latent_std is {self.latent_std}; latents are divided by it: expected "
                "above 0"
            )

    @property
    def spatial_stride(self) -> int:
        """Return the pixels per latent position along height and width (8 for Wan)."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Return the pixel frames per latent frame after the first (4 for Wan)."""
        return 2 ** sum(self.temporal_downsample)

    def pixel_frames(self, latent_frames: int) -> int:
        """Return the pixel frames that a whole video of `latent_frames` decodes to."""
        return 1 + self.temporal_stride * (latent_frames - 1)

    def latent_frames(self, pixel_frames: int) -> int:
        """Return the latent frames of a whole video of `pixel_frames`.

        Raises ValueError unless `pixel_frames` is 1 modulo the temporal stride.
        """
        if (pixel_frames - 1) % self.temporal_stride:
            raise ValueError(
                f"{pixel_frames} pixel frames: expected 1 modulo {self.temporal_stride}"
            )
        return 1 + (pixel_frames - 1) // self.temporal_stride

    def encoder_stages(self) -> list[StageLayer]:
        """Return the layers of all stages of the encoder."""
        widths = itertools.pairwise(self.dim * multiple for multiple in (1, *self.dim_mult))
        return _stage_layers(widths, self.num_res_blocks, self.temporal_downsample)

    def decoder_stages(self) -> list[StageLayer]:
        """Return the layers of all stages of the decoder, which mirrors the encoder.

        Every upsampling halves the width before the next stage.
        """
        widths = [self.dim * multiple for multiple in self.dim_mult[::-1]]
        inputs = [widths[0], *(width // 2 for width in widths[:-1])]
        return _stage_layers(
            zip(inputs, widths, strict=True),
            self.num_res_blocks + 1,
            self.temporal_downsample[::-1],
        )


def _stage_layers(
    widths: Iterable[tuple[int, int]], blocks: int, temporal: tuple[bool, ...]
) -> list[StageLayer]:
    """Return the layers of all stages, given the channels (in, out) of each; the last one has no
    resampling.
    """
    layers = []
    for (width_in, width), is_temporal in zip(widths, (*temporal, None), strict=True):
        layers += [StageLayer(width if i else width_in, width) for i in range(blocks)]
        if is_temporal is not None:
            layers.append(StageLayer(width, width, is_temporal))
    return layers


class _Memory:
    """Hands out the arrays of a VaeState, in execution order, while one chunk is traced, and
    collects those of the next state.
    """

    def __init__(self, state: VaeState | None):
        self.is_first_chunk = state is None
        self._arrays = iter(state or ())
        self.next_arrays: list[jax.Array] = []  # what the next chunk sees

    def extend(self, x: jax.Array, frames: int) -> jax.Array:
        """Return x [B, T, ...] with the `frames` input frames before it in front, which are zeros
        at the start of a video: [B, frames + T, ...].
        """
        past = (
            jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
            if self.is_first_chunk
            else next(self._arrays)
        )
        extended = jnp.concatenate([past, x], axis=1)
        self.next_arrays.append(extended[:, extended.shape[1] - frames :])
        return extended


_LECUN = nnx.initializers.lecun_normal()
Padding = str | tuple[tuple[int, int], tuple[int, int]]  # of height and width


class VideoConv(nnx.Module):
    """A convolution with bias over the last `len(kernel)` axes before the channels.

    On a CPU a kernel with a time axis runs as a 2D convolution over time-shifted inputs stacked in
    the channels. There it is several times faster than a 3D convolution
    (docs/models.md, VAE layers).
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        kernel: tuple[int, ...],
        config: VaeConfig,
        rngs: nnx.Rngs,
        init: nnx.Initializer = _LECUN,
    ):
        shape = (*kernel, features_in, features_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.dtype(config.param_dtype)))
        self.bias = nnx.Param(jnp.zeros((features_out,), config.param_dtype))
        self.dtype = config.dtype

    def spatial(self, x: jax.Array, stride: int = 1, padding: Padding = "SAME") -> jax.Array:
        """Convolve every frame of x [B, T, height, width, in] on its own."""
        return self._add_bias(_conv2d(x, self._kernel(), stride, padding))

    def temporal(self, x: jax.Array, stride: int = 1) -> jax.Array:
        """Convolve x [B, T, height, width, in] in time and space.

        Nothing is padded in time, where the caller has put the past in front. In space the size
        stays.
        """
        if backend.current() == "cpu":
            return self._add_bias(_conv3d_of_shifts(x, self._kernel(), stride))
        kernel = self._kernel()
        pads = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[1:3]]
        return self._add_bias(
            jax.lax.conv_general_dilated(
                x,
                kernel,
                (stride, 1, 1),
                [(0, 0), *pads],
                dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            )
        )

    def pointwise(self, x: jax.Array) -> jax.Array:
        """Map the channels of x [..., in]; the kernel must have one position."""
        return self._add_bias(x @ self._kernel().reshape(self.kernel.shape[-2:]))

    def _kernel(self) -> jax.Array:
        return self.kernel[...].astype(self.dtype)

    def _add_bias(self, x: jax.Array) -> jax.Array:
        return x + self.bias[...].astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _conv3d_of_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Return a 3D convolution, computed as a 2D one over time-shifted copies of x in the
    channels.
    """
    size = kernel.shape[0]
    span = x.shape[1] - size + 1
    shifted = jnp.concatenate([x[:, i : i + span : stride] for i in range(size)], axis=-1)
    stacked = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    return _conv2d(shifted, stacked, 1, "SAME")


def _conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Return the 2D convolution of every frame of x [B, T, height, width, in]."""
    flat = jax.lax.conv_general_dilated(
        jax.lax.collapse(x, 0, 2),
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return flat.reshape(*x.shape[:2], *flat.shape[1:])


class ChannelNorm(nnx.Module):
    """The norm x / max(|x|_2, 1e-12) * sqrt(channels) * gamma over the channels, in float32."""

    def __init__(self, features: int, config: VaeConfig):
        self.gamma = nnx.Param(jnp.ones((features,), jnp.dtype(config.param_dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        # max(|x|, e)^2 = max(|x|^2, e^2), which keeps the gradient finite at x = 0; e^2 is
        # representable in float32
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        gamma = self.gamma[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale * (math.sqrt(x.shape[-1]) * gamma)).astype(x.dtype)


class VideoResidualBlock(nnx.Module):
    """Two normalised convolutions and a shortcut around them.

    The second convolution starts at zero. A new net is then a linear chain that keeps its input;
    with random branches, training first forgets it.
    """

    def __init__(self, features_in: int, features_out: int, config: VaeConfig, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(features_in, config)
        self.conv1 = VideoConv(features_in, features_out, (3, 3, 3), config, rngs)
        self.norm2 = ChannelNorm(features_out, config)
        self.conv2 = VideoConv(
            features_out, features_out, (3, 3, 3), config, rngs, nnx.initializers.zeros_init()
        )
        if features_in != features_out:
            self.shortcut = VideoConv(features_in, features_out, (1, 1, 1), config, rngs)

    def __call__(self, x: jax.Array, memory: _Memory) -> jax.Array:
        y = self.conv1.temporal(memory.extend(jax.nn.silu(self.norm1(x)), 2))
        y = self.conv2.temporal(memory.extend(jax.nn.silu(self.norm2(y)), 2))
        return y + (self.shortcut.pointwise(x) if hasattr(self, "shortcut") else x)


class FrameAttention(nnx.Module):
    """One-head attention among the positions of each frame."""

    def __init__(self, features: int, config: VaeConfig, rngs: nnx.Rngs):
        self.norm = ChannelNorm(features, config)
        self.to_qkv = VideoConv(features, 3 * features, (1, 1), config, rngs)
        self.proj = VideoConv(features, features, (1, 1), config, rngs)

    def __call__(self, x: jax.Array, memory: _Memory) -> jax.Array:
        del memory  # no frame sees another
        tokens = jax.lax.collapse(jax.lax.collapse(self.norm(x), 2, 4), 0, 2)  # [B T, N, C]
        q, k, v = jnp.split(self.to_qkv.pointwise(tokens), 3, axis=-1)
        y = attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
        return x + self.proj.pointwise(y).reshape(x.shape)


class Downsample(nnx.Module):
    """Halves height and width and then, with `temporal`, the frames; the first frame of a video
    stays.
    """

    def __init__(self, features: int, temporal: bool, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = VideoConv(features, features, (3, 3), config, rngs)
        if temporal:
            self.time_conv = VideoConv(features, features, (3, 1, 1), config, rngs)

    def __call__(self, x: jax.Array, memory: _Memory) -> jax.Array:
        x = self.conv.spatial(x, stride=2, padding=((0, 1), (0, 1)))
        if not hasattr(self, "time_conv"):
            return x
        if not memory.is_first_chunk:
            return self.time_conv.temporal(memory.extend(x, 1), stride=2)
        memory.next_arrays.append(x[:, -1:])
        if x.shape[1] == 1:
            return x
        return jnp.concatenate([x[:, :1], self.time_conv.temporal(x, stride=2)], axis=1)


class Upsample(nnx.Module):
    """Doubles, with `temporal`, the frames (but not a video's first), and then height and width;
    halves the channels.
    """

    def __init__(self, features: int, temporal: bool, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = VideoConv(features, features // 2, (3, 3), config, rngs)
        if temporal:
            self.time_conv = VideoConv(features, 2 * features, (3, 1, 1), config, rngs)

    def __call__(self, x: jax.Array, memory: _Memory) -> jax.Array:
        if hasattr(self, "time_conv"):
            # The first frame is neither doubled nor part of the later frames' past, as published.
            single = 1 if memory.is_first_chunk else 0
            doubled = self._double_frames(x[:, single:], memory)
            x = jnp.concatenate([x[:, :single], doubled], axis=1)
        return self.conv.spatial(x.repeat(2, axis=2).repeat(2, axis=3))

    def _double_frames(self, x: jax.Array, memory: _Memory) -> jax.Array:
        """Return [B, 2 T, height, width, in] for x [B, T, height, width, in]."""
        extended = memory.extend(x, 2)
        if x.shape[1] == 0:
            return x
        pairs = self.time_conv.temporal(extended).reshape(*x.shape[:4], 2, x.shape[4])
        return jax.lax.collapse(jnp.moveaxis(pairs, 4, 2), 1, 3)


class _Middle(nnx.Module):
    """The layers between encoder stages and latents, and between latents and decoder stages."""

    def __init__(self, features: int, config: VaeConfig, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [
                VideoResidualBlock(features, features, config, rngs),
                FrameAttention(features, config, rngs),
                VideoResidualBlock(features, features, config, rngs),
            ]
        )


def _stages(
    layers: list[StageLayer],
    resampling: type[Downsample] | type[Upsample],
    config: VaeConfig,
    rngs: nnx.Rngs,
) -> nnx.List:
    return nnx.List(
        [
            VideoResidualBlock(layer.features_in, layer.features_out, config, rngs)
            if layer.temporal is None
            else resampling(layer.features_in, layer.temporal, config, rngs)
            for layer in layers
        ]
    )


class VideoEncoder(nnx.Module):
    """Pixels [B, T, height, width, 3] to moments of the latents [B, F, H, W, 2 C]."""

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        width = config.dim * config.dim_mult[-1]  # of the last stage
        self.conv_in = VideoConv(3, config.dim, (3, 3, 3), config, rngs)
        self.stages = _stages(config.encoder_stages(), Downsample, config, rngs)
        self.middle = _Middle(width, config, rngs)
        self.norm_out = ChannelNorm(width, config)
        self.conv_out = VideoConv(width, 2 * config.z_dim, (3, 3, 3), config, rngs)

    def __call__(self, x: jax.Array, memory: _Memory) -> jax.Array:
        return _run(self, [*self.stages, *self.middle.layers], x, memory)


class VideoDecoder(nnx.Module):
    """Latents [B, F, H, W, C] to pixels [B, T, height, width, 3]."""

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        width = config.dim * config.dim_mult[-1]  # of the first stage
        width_out = config.dim * config.dim_mult[0]
        self.conv_in = VideoConv(config.z_dim, width, (3, 3, 3), config, rngs)
        self.middle = _Middle(width, config, rngs)
        self.stages = _stages(config.decoder_stages(), Upsample, config, rngs)
        self.norm_out = ChannelNorm(width_out, config)
        self.conv_out = VideoConv(width_out, 3, (3, 3, 3), config, rngs)

    def __call__(self, x: jax.Array, memory: _Memory) -> jax.Array:
        return _run(self, [*self.middle.layers, *self.stages], x, memory)


def _run(
    net: VideoEncoder | VideoDecoder, layers: list[nnx.Module], x: jax.Array, memory: _Memory
) -> jax.Array:
    """Return x after the convolution into a net, its layers, and the convolution out of it."""
    x = net.conv_in.temporal(memory.extend(x, 2))
    for layer in layers:
        x = layer(x, memory)
    x = jax.nn.silu(net.norm_out(x))
    return net.conv_out.temporal(memory.extend(x, 2))


class Vae(nnx.Module):
    """Encoder and decoder with latent normalisation.

    `encode` and `decode` take and return a VaeState: pass None for a new video, and the returned
    state with the next chunk. The first chunk that is encoded has 1 modulo the temporal stride (4)
    frames, later ones a multiple of it. A chunk that is decoded has any number of latent frames.
    """

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        moments = 2 * config.z_dim
        self.config = config
        self.encoder = VideoEncoder(config, rngs)
        self.conv1 = VideoConv(moments, moments, (1, 1, 1), config, rngs)
        self.conv2 = VideoConv(config.z_dim, config.z_dim, (1, 1, 1), config, rngs)
        self.decoder = VideoDecoder(config, rngs)

    def encode(
        self, pixels: jax.Array, state: VaeState | None = None
    ) -> tuple[jax.Array, VaeState]:
        """Encode a chunk of a video to the mean of its latents.

        Args:
          pixels: [B, T, height, width, 3] in [-1, 1].
          state: the encoder's state after the previous chunk; None for a new video.

        Returns:
          Normalised latents [B, F, C, H, W], float32, and the state for the next chunk.

        Raises:
          ValueError: T is no number of frames that such a chunk can have.
        """
        stride = self.config.temporal_stride
        frames = pixels.shape[1]
        if state is None and (frames < 1 or (frames - 1) % stride):
            raise ValueError(
                f"Vae.encode: got {frames} frames in a chunk, expected 1 modulo {stride}"
            )
        if state is not None and frames % stride:
            raise ValueError(
                f"Vae.encode: got {frames} frames in a chunk, expected a multiple of {stride}"
            )
        latents, state = self.encode_mean(pixels, state)
        mean, std = self._statistics()
        return jnp.moveaxis((latents - mean) / std, -1, 2), state

    def encode_mean(
        self, pixels: jax.Array, state: VaeState | None = None
    ) -> tuple[jax.Array, VaeState]:
        """Return the mean [B, F, H, W, C], float32, before normalisation, and the next state.

        The encoder's variance is not used.
        """
        memory = _Memory(state)
        moments = self.conv1.pointwise(self.encoder(pixels.astype(self.config.dtype), memory))
        mean = moments[..., : self.config.z_dim].astype(jnp.float32)
        return mean, tuple(memory.next_arrays)

    def decode(
        self, latents: jax.Array, state: VaeState | None = None
    ) -> tuple[jax.Array, VaeState]:
        """Decode a chunk of a video.

        Args:
          latents: normalised, [B, F, C, H, W].
          state: the decoder's state after the previous chunk; None for a new video.

        Returns:
          Pixels [B, T, height, width, 3], float32, around [-1, 1] and not clamped, and the state
          for the next chunk.
        """
        memory = _Memory(state)
        mean, std = self._statistics()
        z = jnp.moveaxis(latents, 2, -1).astype(jnp.float32) * std + mean
        pixels = self.decoder(self.conv2.pointwise(z.astype(self.config.dtype)), memory)
        return pixels.astype(jnp.float32), tuple(memory.next_arrays)

    def _statistics(self) -> np.ndarray:
        """Return mean and std of the latent channels, [2, 1, 1, 1, 1, C], float32."""
        statistics = (self.config.latent_mean, self.config.latent_std)
        return np.array(statistics, np.float32).reshape(2, 1, 1, 1, 1, -1)
