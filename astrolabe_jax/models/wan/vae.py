"""The Wan 2.1 causal video autoencoder (spec vae_and_text.md, part A).

One code path serves whole clips and streams. Every temporal convolution sees a short history of its
own input: zeros at the start of a video, afterwards what the previous chunk left. A stream is
therefore a flat tuple of arrays, one per temporal convolution in execution order, and a whole clip
is a stream of one chunk, so that both give identical frames (A4).

Inside this file videos are channels-last, `[B, T, height, width, channels]`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

Stream = tuple[jax.Array, ...]

# Per-channel statistics of the published latents (sampling.md section 6).
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


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder; the defaults are the published Wan 2.1 VAE.

    Each entry of `temporal_downsample` belongs to the transition after one encoder stage; every
    transition halves height and width. `latent_mean` and `latent_std` normalise the `z_dim` latent
    channels.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
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
        """Pixels per latent position along height and width (8 for Wan)."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame after the first (4 for Wan)."""
        return 2 ** sum(self.temporal_downsample)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that a whole video of `latent_frames` decodes to."""
        return 1 + self.temporal_stride * (latent_frames - 1)

    def latent_frames(self, pixel_frames: int) -> int:
        """Latent frames of a whole video; the pixel count must be 1 modulo the temporal stride."""
        if (pixel_frames - 1) % self.temporal_stride:
            raise ValueError(
                f"{pixel_frames} pixel frames: expected 1 modulo {self.temporal_stride}"
            )
        return 1 + (pixel_frames - 1) // self.temporal_stride


class _History:
    """Hands out the stream's arrays in execution order while one chunk is traced, and collects
    their successors.
    """

    def __init__(self, stream: Stream | None):
        self._old = None if stream is None else iter(stream)
        self.first = stream is None
        self.new: list[jax.Array] = []

    def extend(self, x: jax.Array, frames: int) -> jax.Array:
        """Puts the last `frames` input frames of the past (zeros at the start of a video) in front
        of `x`.
        """
        if self._old is None:
            past = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        else:
            past = next(self._old)
        extended = jnp.concatenate([past, x], axis=1)
        self.new.append(extended[:, extended.shape[1] - frames :])
        return extended


_LECUN = nnx.initializers.lecun_normal()


class Conv(nnx.Module):
    """Convolution with bias over the last `len(kernel)` axes before the channels, without padding.

    A kernel with a time axis runs as a 2D convolution over time-shifted inputs stacked in the
    channels: on a CPU that is several times faster than a 3D convolution (spec embedded_world.md),
    elsewhere it is not used.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        kernel: tuple[int, ...],
        config: VaeConfig,
        rngs: nnx.Rngs,
        init=_LECUN,
    ):
        param_dtype = jnp.dtype(config.param_dtype)
        self.kernel = nnx.Param(
            init(rngs.params(), (*kernel, features_in, features_out), param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros((features_out,), param_dtype))
        self.dtype = config.dtype

    def spatial(self, x: jax.Array, stride: int = 1, padding="SAME") -> jax.Array:
        """`[B, T, height, width, in]`, every frame on its own."""
        return self._biased(_conv2d(x, self.kernel[...].astype(self.dtype), stride, padding))

    def temporal(self, x: jax.Array, stride: int = 1) -> jax.Array:
        """`[B, T, height, width, in]` with valid padding in time (the caller adds the past), same
        in space.
        """
        kernel = self.kernel[...].astype(self.dtype)
        size = kernel.shape[0]
        frames = (x.shape[1] - size) // stride + 1
        if jax.default_backend() == "cpu":
            last = stride * (frames - 1) + 1
            shifted = jnp.concatenate([x[:, i : i + last : stride] for i in range(size)], axis=-1)
            stacked = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
            return self._biased(_conv2d(shifted, stacked, 1, "SAME"))
        pads = [(0, 0)] + [((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[1:3]]
        dims = ("NDHWC", "DHWIO", "NDHWC")
        return self._biased(
            jax.lax.conv_general_dilated(x, kernel, (stride, 1, 1), pads, dimension_numbers=dims)
        )

    def pointwise(self, x: jax.Array) -> jax.Array:
        """`[..., in]`, for a kernel of one position."""
        kernel = self.kernel[...].astype(self.dtype)
        return self._biased(x @ kernel.reshape(kernel.shape[-2:]))

    def _biased(self, x: jax.Array) -> jax.Array:
        return x + self.bias[...].astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    batch, frames = x.shape[:2]
    flat = x.reshape(batch * frames, *x.shape[2:])
    dims = ("NHWC", "HWIO", "NHWC")
    flat = jax.lax.conv_general_dilated(
        flat, kernel, (stride, stride), padding, dimension_numbers=dims
    )
    return flat.reshape(batch, frames, *flat.shape[1:])


class ChannelNorm(nnx.Module):
    """x / max(|x|_2, 1e-12) * sqrt(channels) * gamma over the channel axis, in float32."""

    def __init__(self, features: int, config: VaeConfig):
        self.gamma = nnx.Param(jnp.ones((features,), jnp.dtype(config.param_dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        # max(|x|, e)^2 = max(|x|^2, e^2), which keeps the gradient finite at x = 0; e^2 is
        # representable in float32
        scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(wide * wide, axis=-1, keepdims=True), 1e-24))
        gamma = math.sqrt(x.shape[-1]) * self.gamma[...].astype(jnp.float32).reshape(
            (1,) * (x.ndim - 1) + (-1,)
        )
        return (wide * scale * gamma).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two normalised convolutions around a shortcut. The second starts at zero: a new net is then a
    linear chain that keeps its input, whereas with random branches training first forgets it.
    """

    def __init__(self, features_in: int, features_out: int, config: VaeConfig, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(features_in, config)
        self.conv1 = Conv(features_in, features_out, (3, 3, 3), config, rngs)
        self.norm2 = ChannelNorm(features_out, config)
        self.conv2 = Conv(
            features_out, features_out, (3, 3, 3), config, rngs, nnx.initializers.zeros_init()
        )
        if features_in != features_out:
            self.shortcut = Conv(features_in, features_out, (1, 1, 1), config, rngs)

    def __call__(self, x: jax.Array, history: _History) -> jax.Array:
        y = self.conv1.temporal(history.extend(jax.nn.silu(self.norm1(x)), 2))
        y = self.conv2.temporal(history.extend(jax.nn.silu(self.norm2(y)), 2))
        return y + (self.shortcut.pointwise(x) if hasattr(self, "shortcut") else x)


class FrameAttention(nnx.Module):
    """One-head attention among the positions of each frame."""

    def __init__(self, features: int, config: VaeConfig, rngs: nnx.Rngs):
        self.norm = ChannelNorm(features, config)
        self.to_qkv = Conv(features, 3 * features, (1, 1), config, rngs)
        self.proj = Conv(features, features, (1, 1), config, rngs)

    def __call__(self, x: jax.Array, history: _History) -> jax.Array:
        del history  # no memory in time
        batch, frames, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch * frames, height * width, channels)
        q, k, v = jnp.split(self.to_qkv.pointwise(tokens), 3, axis=-1)
        y = jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
        return x + self.proj.pointwise(y).reshape(x.shape)


class Downsample(nnx.Module):
    """Halves height and width, then, with `temporal`, the frame rate; the first frame of a video
    stays single.
    """

    def __init__(self, features: int, temporal: bool, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = Conv(features, features, (3, 3), config, rngs)
        if temporal:
            self.time_conv = Conv(features, features, (3, 1, 1), config, rngs)

    def __call__(self, x: jax.Array, history: _History) -> jax.Array:
        x = self.conv.spatial(x, stride=2, padding=((0, 1), (0, 1)))
        if not hasattr(self, "time_conv"):
            return x
        if not history.first:
            return self.time_conv.temporal(history.extend(x, 1), stride=2)
        history.new.append(x[:, -1:])
        if x.shape[1] == 1:
            return x
        return jnp.concatenate([x[:, :1], self.time_conv.temporal(x, stride=2)], axis=1)


class Upsample(nnx.Module):
    """Doubles, with `temporal`, the frame rate (not of a video's first frame), then height and
    width; halves C.
    """

    def __init__(self, features: int, temporal: bool, config: VaeConfig, rngs: nnx.Rngs):
        self.conv = Conv(features, features // 2, (3, 3), config, rngs)
        if temporal:
            self.time_conv = Conv(features, 2 * features, (3, 1, 1), config, rngs)

    def __call__(self, x: jax.Array, history: _History) -> jax.Array:
        if hasattr(self, "time_conv"):
            # the first frame is neither doubled nor part of the later frames' past (A7.1)
            single, rest = (x[:, :1], x[:, 1:]) if history.first else (x[:, :0], x)
            extended = history.extend(rest, 2)
            if rest.shape[1]:
                pairs = self.time_conv.temporal(extended)
                batch, frames, height, width, channels = pairs.shape
                pairs = pairs.reshape(batch, frames, height, width, 2, channels // 2)
                rest = jnp.moveaxis(pairs, 4, 2).reshape(
                    batch, 2 * frames, height, width, channels // 2
                )
            x = jnp.concatenate([single, rest], axis=1)
        return self.conv.spatial(x.repeat(2, axis=2).repeat(2, axis=3))


class _Middle(nnx.Module):
    def __init__(self, features: int, config: VaeConfig, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [
                ResidualBlock(features, features, config, rngs),
                FrameAttention(features, config, rngs),
                ResidualBlock(features, features, config, rngs),
            ]
        )

    def __call__(self, x: jax.Array, history: _History) -> jax.Array:
        for layer in self.layers:
            x = layer(x, history)
        return x


class Encoder(nnx.Module):
    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv_in = Conv(3, widths[0], (3, 3, 3), config, rngs)
        stages = []
        for i, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            for block in range(config.num_res_blocks):
                stages.append(ResidualBlock(width_in if block == 0 else width, width, config, rngs))
            if i < len(config.temporal_downsample):
                stages.append(Downsample(width, config.temporal_downsample[i], config, rngs))
        self.stages = nnx.List(stages)
        self.middle = _Middle(widths[-1], config, rngs)
        self.norm_out = ChannelNorm(widths[-1], config)
        self.conv_out = Conv(widths[-1], 2 * config.z_dim, (3, 3, 3), config, rngs)

    def __call__(self, x: jax.Array, history: _History) -> jax.Array:
        x = self.conv_in.temporal(history.extend(x, 2))
        for stage in self.stages:
            x = stage(x, history)
        x = self.middle(x, history)
        return self.conv_out.temporal(history.extend(jax.nn.silu(self.norm_out(x)), 2))


class Decoder(nnx.Module):
    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        widths = [config.dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        temporal_upsample = config.temporal_downsample[::-1]
        self.conv_in = Conv(config.z_dim, widths[0], (3, 3, 3), config, rngs)
        self.middle = _Middle(widths[0], config, rngs)
        stages = []
        for i, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            # the upsampling before this stage halved it
            width_in = width_in if i == 0 else width_in // 2
            for block in range(config.num_res_blocks + 1):
                stages.append(ResidualBlock(width_in if block == 0 else width, width, config, rngs))
            if i < len(temporal_upsample):
                stages.append(Upsample(width, temporal_upsample[i], config, rngs))
        self.stages = nnx.List(stages)
        self.norm_out = ChannelNorm(widths[-1], config)
        self.conv_out = Conv(widths[-1], 3, (3, 3, 3), config, rngs)

    def __call__(self, x: jax.Array, history: _History) -> jax.Array:
        x = self.middle(self.conv_in.temporal(history.extend(x, 2)), history)
        for stage in self.stages:
            x = stage(x, history)
        return self.conv_out.temporal(history.extend(jax.nn.silu(self.norm_out(x)), 2))


class Vae(nnx.Module):
    """Encoder and decoder with latent normalisation.

    `encode` and `decode` take and return a stream: pass None for a new video and hand the returned
    stream to the next chunk. The first chunk of an encoded video has 1 modulo the temporal stride
    (4) frames, later ones a multiple of it; decoded chunks may have any number of latent frames.
    """

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.conv1 = Conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), config, rngs)
        self.conv2 = Conv(config.z_dim, config.z_dim, (1, 1, 1), config, rngs)
        self.decoder = Decoder(config, rngs)

    def encode(self, pixels: jax.Array, stream: Stream | None = None) -> tuple[jax.Array, Stream]:
        """Pixels `[B, T, height, width, 3]` in [-1, 1] -> normalised latents `[B, F, C, H, W]`
        float32 (the mean).
        """
        stride, start = self.config.temporal_stride, int(stream is None)
        if pixels.shape[1] < start or (pixels.shape[1] - start) % stride:
            expected = f"1 modulo {stride}" if start else f"a multiple of {stride}"
            raise ValueError(
                f"Vae.encode: got {pixels.shape[1]} frames in a chunk, expected {expected}"
            )
        mean, stream = self.encode_mean(pixels, stream)
        shift, scale = self._statistics()
        return jnp.moveaxis((mean - shift) / scale, -1, 2), stream

    def encode_mean(
        self, pixels: jax.Array, stream: Stream | None = None
    ) -> tuple[jax.Array, Stream]:
        """The mean `[B, F, H, W, C]`, float32, before normalisation; of the encoder's variance
        nobody makes use.
        """
        history = _History(stream)
        moments = self.conv1.pointwise(self.encoder(pixels.astype(self.config.dtype), history))
        return moments[..., : self.config.z_dim].astype(jnp.float32), tuple(history.new)

    def decode(self, latents: jax.Array, stream: Stream | None = None) -> tuple[jax.Array, Stream]:
        """Normalised latents `[B, F, C, H, W]` -> pixels `[B, T, height, width, 3]`, float32, not
        clamped.
        """
        history = _History(stream)
        mean, std = self._statistics()
        z = (jnp.moveaxis(latents, 2, -1).astype(jnp.float32) * std + mean).astype(
            self.config.dtype
        )
        pixels = self.decoder(self.conv2.pointwise(z), history)
        return pixels.astype(jnp.float32), tuple(history.new)

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        shape = (1, 1, 1, 1, self.config.z_dim)
        return tuple(
            jnp.asarray(v, jnp.float32).reshape(shape)
            for v in (self.config.latent_mean, self.config.latent_std)
        )
