"""SEA-RAFT: where every pixel of a frame goes in the next one.

Two convolutional encoders at an eighth of the size, the correlations of all pairs of positions at
several scales, and a recurrent update that looks them up around its last estimate. Inside this file
pictures are channels-last. See docs/rewards.md, Dynamic degree.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import LayerNorm, Linear, row
from astrolabe_jax.sharding import by_sample, gathered

STRIDE = 8  # pixels per position of the encoders
_SIDES = 3  # the upsampling mixes so many by so many neighbours
_HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_EXACT = jax.lax.Precision.HIGHEST
MakeConv = Callable[..., "SeaRaftConv"]  # of sizes in and out, with dtype and rngs bound


@dataclasses.dataclass(frozen=True)
class SeaRaftConfig:
    """Sizes; the defaults are those of Tartan-C-T-TSKH-spring540x960-M.

    `block_dims` and `blocks` are the widths and lengths of the three stages of an encoder, `levels`
    and `radius` how many scales of the correlations there are and how far they are looked up.
    """

    dim: int = 128  # of the state, and of the context
    initial_dim: int = 64
    block_dims: tuple[int, ...] = (64, 128, 256)
    blocks: tuple[int, ...] = (3, 4, 6)
    levels: int = 4
    radius: int = 4
    num_blocks: int = 2  # of an update
    iterations: int = 4
    dtype: str = "float32"  # of the activations; correlations and flow are float32
    param_dtype: str = "float32"

    def __post_init__(self):
        if len(self.block_dims) != 3 or len(self.blocks) != 3:
            raise ValueError(
                f"SeaRaftConfig.block_dims {self.block_dims} and blocks {self.blocks}: expected "
                "three stages each"
            )


class SeaRaft(nnx.Module):
    """Flow between two frames."""

    def __init__(self, config: SeaRaftConfig, rngs: nnx.Rngs):
        self.config = config
        conv = functools.partial(SeaRaftConv, param_dtype=config.param_dtype, rngs=rngs)
        dim = config.dim
        self.context = SeaRaftEncoder(conv, 6, config)
        self.init_conv = conv(2 * dim, 2 * dim, 3)
        self.features = SeaRaftEncoder(conv, 3, config)
        # of the flow, and four of its uncertainty
        self.flow_head = SeaRaftHead(conv, dim, 6, 3)
        self.upsample_weight = SeaRaftHead(conv, dim, _SIDES**2 * STRIDE**2, 1)
        self.motion = SeaRaftMotionEncoder(conv, config)
        self.refine = nnx.List(
            [SeaRaftRefinement(conv, config, rngs) for _ in range(config.num_blocks)]
        )

    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Return flow [N, height, width, 2] float32, x and y in pixels, between frames in 0..255.

        The pixel of `first` [N, height, width, 3] at (x, y) is the one of `second` at (x, y) +
        flow. Any size is taken; frames of fewer than 2**(levels + 2) pixels leave the coarsest
        correlations empty, which then are zero.
        """
        height, width = first.shape[1:3]
        missing = (-height % STRIDE, -width % STRIDE)
        rows, columns = ((count // 2, count - count // 2) for count in missing)
        first = self._prepared(first, rows, columns)
        second = self._prepared(second, rows, columns)
        both = self.context(jnp.concatenate([first, second], axis=-1))
        state, context = jnp.split(self.init_conv(both), 2, axis=-1)
        pyramid = correlations(self.features(first), self.features(second), self.config.levels)

        # The flow is not upsampled before the end: what the published code makes of the others is
        # for its loss.
        def iterate(carry, _):
            state, flow = carry
            nearby = lookup(pyramid, flow, self.config.radius)
            motion = self.motion(nearby.astype(state.dtype), flow.astype(state.dtype))
            for block in self.refine:
                state = block(jnp.concatenate([state, context, motion], axis=-1))
            return (state, flow + self._change(state)), None

        (state, flow), _ = jax.lax.scan(
            iterate, (state, self._change(state)), length=self.config.iterations
        )
        weights = 0.25 * self.upsample_weight(state).astype(jnp.float32)
        flow = upsampled(flow, weights)
        return flow[:, rows[0] : rows[0] + height, columns[0] : columns[0] + width]

    def _prepared(
        self, frames: jax.Array, rows: tuple[int, int], columns: tuple[int, int]
    ) -> jax.Array:
        frames = 2 * (frames.astype(jnp.float32) / 255) - 1
        frames = jnp.pad(frames, ((0, 0), rows, columns, (0, 0)), mode="edge")
        return by_sample(frames.astype(self.config.dtype))

    def _change(self, state: jax.Array) -> jax.Array:
        return self.flow_head(state)[..., :2].astype(jnp.float32)


class SeaRaftEncoder(nnx.Module):
    """Pictures [N, h, w, C] -> [N, h/8, w/8, 2 dim]: a ResNet without pooling."""

    def __init__(self, conv: MakeConv, features_in: int, config: SeaRaftConfig):
        width = config.initial_dim
        self.conv_in = conv(features_in, width, 7, stride=2)
        self.norm_in = SeaRaftBatchNorm(width, config.param_dtype)
        self.blocks = nnx.List()
        for stage, (dim, count) in enumerate(zip(config.block_dims, config.blocks, strict=True)):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                self.blocks.append(
                    SeaRaftResidualBlock(conv, width, dim, stride, config.param_dtype)
                )
                width = dim
        self.conv_out = conv(width, 2 * config.dim, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return features [N, h/8, w/8, 2 dim]."""
        x = jax.nn.relu(self.norm_in(self.conv_in(x)))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


class SeaRaftResidualBlock(nnx.Module):
    """relu(x + relu(norm(conv(relu(norm(conv(x))))))): rectified before the sum, too."""

    def __init__(self, conv: MakeConv, features_in: int, features: int, stride: int, param_dtype):
        self.conv1 = conv(features_in, features, 3, stride=stride)
        self.norm1 = SeaRaftBatchNorm(features, param_dtype)
        self.conv2 = conv(features, features, 3)
        self.norm2 = SeaRaftBatchNorm(features, param_dtype)
        if stride > 1 or features_in != features:
            self.shortcut = conv(features_in, features, 1, stride=stride)
            self.norm3 = SeaRaftBatchNorm(features, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x [N, h, w, features], h and w divided by the stride, after the block."""
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        if hasattr(self, "shortcut"):
            x = self.norm3(self.shortcut(x))
        return jax.nn.relu(x + y)


class SeaRaftHead(nnx.Module):
    """conv3x3, rectified, and a convolution of size `size`."""

    def __init__(self, conv: MakeConv, dim: int, features: int, size: int):
        self.conv1 = conv(dim, 2 * dim, 3)
        self.conv2 = conv(2 * dim, features, size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [N, h, w, features] of x [N, h, w, dim]."""
        return self.conv2(jax.nn.relu(self.conv1(x)))


class SeaRaftMotionEncoder(nnx.Module):
    """Correlations and flow to features of motion, of which the last two are the flow."""

    def __init__(self, conv: MakeConv, config: SeaRaftConfig):
        dim = config.dim
        self.correlation1 = conv(config.levels * (2 * config.radius + 1) ** 2, 2 * dim, 1)
        self.correlation2 = conv(2 * dim, dim + dim // 2, 3)
        self.flow1 = conv(2, dim, 7)
        self.flow2 = conv(dim, dim // 2, 3)
        self.conv = conv(dim + 2 * (dim // 2), dim - 2, 3)

    def __call__(self, nearby: jax.Array, flow: jax.Array) -> jax.Array:
        """Return [N, h, w, dim] of correlations [N, h, w, lookups] and flow [N, h, w, 2]."""
        x = jax.nn.relu(self.correlation1(nearby))
        x = jax.nn.relu(self.correlation2(x))
        y = jax.nn.relu(self.flow1(flow))
        y = jax.nn.relu(self.flow2(y))
        both = self.conv(jnp.concatenate([x, y], axis=-1))
        return jnp.concatenate([jax.nn.relu(both), flow], axis=-1)


class SeaRaftRefinement(nnx.Module):
    """A ConvNeXt block [N, h, w, 3 dim] -> [N, h, w, dim]."""

    def __init__(self, conv: MakeConv, config: SeaRaftConfig, rngs: nnx.Rngs):
        dim = config.dim
        wide = 3 * dim
        self.depthwise = conv(wide, wide, 7, groups=wide)
        self.norm = LayerNorm(
            wide,
            eps=1e-6,
            param_dtype=config.param_dtype,
        )
        self.fc1 = Linear(
            wide,
            4 * dim,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.fc2 = Linear(
            4 * dim,
            wide,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.gamma = nnx.Param(jnp.full((wide,), 1e-6, config.param_dtype))
        self.conv_out = conv(wide, dim, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [N, h, w, dim] of x [N, h, w, 3 dim]."""
        y = self.fc1(self.norm(self.depthwise(x)))
        y = self.fc2(jax.nn.gelu(y, approximate=False))
        return self.conv_out(x + row(self.gamma, x) * y)


class SeaRaftConv(nnx.Module):
    """Convolution with bias, zero padding of half the (odd) kernel."""

    def __init__(
        self,
        features_in: int,
        features: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, features_in // groups, features)
        self.kernel = nnx.Param(_HE(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.stride = stride
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [N, h, w, features] of x [N, h, w, features_in]; a stride divides h and w."""
        kernel = gathered(self.kernel[...].astype(x.dtype))
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(size // 2, size // 2) for size in kernel.shape[:2]],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return y + row(self.bias, x)


class SeaRaftBatchNorm(nnx.Module):
    """One affine map of each channel, with the statistics of the training."""

    eps = 1e-5

    def __init__(self, features: int, param_dtype):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.mean = nnx.Param(jnp.zeros((features,), param_dtype))
        self.var = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x [N, h, w, features], normalised."""
        var = self.var[...].astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(var + self.eps)
        bias = self.bias[...].astype(jnp.float32) - self.mean[...].astype(jnp.float32) * scale
        return x * row(scale, x) + row(bias, x)


def correlations(first: jax.Array, second: jax.Array, levels: int) -> list[jax.Array]:
    """Return, for each level l, the correlations float32 [N, h w, h / 2**l, w / 2**l].

    They are of every position of the features `first` [N, h, w, C] with all of `second`, which is
    halved from level to level; over sqrt(C). For frames of 480 x 832 pixels the levels of one pair
    are 207 MB together.
    """
    batch, height, width, channels = first.shape
    first = first.astype(jnp.float32).reshape(batch, height * width, channels) / channels**0.5
    second = second.astype(jnp.float32)
    pyramid = []
    for _ in range(levels):
        pyramid.append(
            jnp.einsum(
                "npc,nhwc->nphw",
                first,
                second,
                precision=_EXACT,
            )
        )
        second = block_means(second, 2)  # bilinear interpolation with half-pixel centres
    return pyramid


def lookup(pyramid: list[jax.Array], flow: jax.Array, radius: int) -> jax.Array:
    """Return the correlations around where `flow` [N, h, w, 2] points.

    They are bilinear, and zero outside. The weights of linear interpolation are a hat around each
    place, so that a lookup is two products with matrices, where a gather would be slow.

    Args:
      pyramid: of `correlations`.
      flow: in positions of the first level.
      radius: how far is looked up in each direction.

    Returns:
      [N, h, w, levels (2 radius + 1)**2] float32; of a level's offsets that of x is the slow one.
    """
    batch, height, width, _ = flow.shape
    grid = jnp.stack(jnp.meshgrid(jnp.arange(width), jnp.arange(height)), axis=-1)
    places = (flow + grid.astype(jnp.float32)[None]).reshape(batch, height * width, 2)
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)

    def hats(centres: jax.Array, size: int) -> jax.Array:
        """Return weights [N, P, offsets, size] around centres [N, P]."""
        points = centres[:, :, None, None] + offsets[None, None, :, None]
        distance = jnp.abs(points - row(jnp.arange(size), points))
        return jnp.maximum(0.0, 1.0 - distance)

    parts = []
    for level, volume in enumerate(pyramid):
        scaled = places / 2**level
        x = hats(scaled[..., 0], volume.shape[3])
        y = hats(scaled[..., 1], volume.shape[2])
        part = jnp.einsum(
            "nphw,npiw,npjh->npij",
            volume,
            x,
            y,
            precision=_EXACT,
        )
        parts.append(part.reshape(batch, height, width, -1))
    return jnp.concatenate(parts, axis=-1)


def upsampled(flow: jax.Array, weights: jax.Array) -> jax.Array:
    """Return flow [N, 8 h, 8 w, 2] in pixels of flow [N, h, w, 2] in positions.

    Each pixel is a mean of the 3 x 3 neighbours of its position (zero outside) with a softmax of
    its own: weights [N, h, w, 9 x 8 x 8], the neighbour slowest, then row and column of the pixel.
    """
    batch, height, width, _ = flow.shape
    mix = weights.reshape(batch, height, width, _SIDES**2, STRIDE, STRIDE)
    padded = jnp.pad(STRIDE * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = [
        padded[:, i : i + height, j : j + width] for i in range(_SIDES) for j in range(_SIDES)
    ]
    pixels = jnp.einsum(
        "nhwkab,nhwkc->nhawbc",
        jax.nn.softmax(mix, axis=3),
        jnp.stack(neighbours, axis=3),
        precision=_EXACT,
    )
    return pixels.reshape(batch, height * STRIDE, width * STRIDE, 2)


def block_means(x: jax.Array, side: int) -> jax.Array:
    """Return the means [N, h // side, w // side, C] of squares of x [N, h, w, C]; odd ends drop."""
    batch, height, width, channels = x.shape
    rows = height // side
    columns = width // side
    x = x[:, : rows * side, : columns * side]
    return x.reshape(batch, rows, side, columns, side, channels).mean(axis=(2, 4))
