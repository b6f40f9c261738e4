"""Sizes of the causal Wan DiT (WanConfig), and how a video is cut into blocks and how far a block
sees (Layout).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from astrolabe_jax.models.attention import BACKENDS

# Absolute frame positions that the models know (docs/models.md, Rotary positions).
ABSOLUTE_LIMIT = 1024


def _refuse(*faults: tuple[bool, str]) -> None:
    """Raise ValueError with the message of the first fault that is there."""
    for there, message in faults:
        if there:
            raise ValueError(message)


@dataclass(frozen=True)
class WanConfig:
    """Sizes and numerics of one causal Wan DiT (docs/models.md, Transformer sizes)."""

    dim: int  # D, model width
    ffn_dim: int
    num_layers: int
    num_heads: int  # A
    freq_dim: int = 256  # width of the timestep sinusoid
    text_dim: int = 4096  # E, width of the text encoder
    text_len: int = 512  # S, tokens of a padded prompt; all of them are attended to
    in_channels: int = 16  # C, latent channels
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of one token
    eps: float = 1e-6  # of every norm
    dtype: str = "bfloat16"  # compute and cache dtype; norms and softmax stay float32 inside
    param_dtype: str = "bfloat16"  # storage dtype of the base weights
    remat: bool = True  # recompute each layer in the backward pass
    attention: str = "auto"  # one of models/attention.py's BACKENDS

    def __post_init__(self):
        for name in (
            "dim",
            "ffn_dim",
            "num_layers",
            "num_heads",
            "freq_dim",
            "text_dim",
            "text_len",
            "in_channels",
        ):
            _refuse(
                (
                    getattr(self, name) < 1,
                    f"WanConfig.{name} is {getattr(self, name)}; it must be at least 1",
                )
            )
        _refuse(
            (
                self.dim % self.num_heads != 0 or self.head_dim % 2 != 0,
                f"WanConfig.dim {self.dim} over num_heads {self.num_heads} must give an even head "
                "width",
            ),
            (
                self.head_dim < 6,
                f"head width is {self.head_dim}; rotary positions of three axes need at least 6",
            ),
            (
                self.freq_dim % 2 != 0,
                f"WanConfig.freq_dim is {self.freq_dim}; sines and cosines need an even width",
            ),
            (
                len(self.patch_size) != 3 or self.patch_size[0] != 1,
                f"WanConfig.patch_size is {self.patch_size}; expected (1, rows, columns): a patch "
                "covers one frame",
            ),
            (
                self.attention not in BACKENDS,
                f"WanConfig.attention is {self.attention!r}; expected {', '.join(BACKENDS)}",
            ),
        )

    @property
    def head_dim(self) -> int:
        """Return K, the width of one head."""
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Return the numbers in one patch: channels x rows x columns."""
        return self.in_channels * self.patch_size[1] * self.patch_size[2]

    def grid(self, latent_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the patch grid (h, w) of latents of (H, W); h w is L, the tokens of a frame.

        Raises ValueError unless the patch divides the latents.
        """
        rows, columns = latent_hw
        _, patch_rows, patch_columns = self.patch_size
        if rows % patch_rows or columns % patch_columns:
            raise ValueError(
                f"latent size {rows}x{columns} is not a multiple of the patch "
                f"{patch_rows}x{patch_columns}; change the video size"
            )
        return rows // patch_rows, columns // patch_columns


WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_layers=30, num_heads=12)
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_layers=40, num_heads=40)


class Block(NamedTuple):
    """One block of latent frames and what its queries see; frames count from the start of the
    video.
    """

    start: int  # first frame
    stop: int  # one past the last frame that is there
    ranges: tuple[tuple[int, int], ...]  # frames seen, ascending and disjoint: [first, last + 1)
    shift: int  # frames by which the sink keys are moved forward (relative positions)


@dataclass(frozen=True)
class Layout:
    """How a video is cut into blocks and how far a block sees; all units are latent frames.

    A block of frames [c, e) sees itself and the past inside its window (docs/models.md, KV cache):
    everything if e <= window, else the first `sink` frames and the last window - sink up to e.

    faithful_sinks reproduces the published code where a block meets the slots of the sink: where it
    is smaller than the sink, or the window has no room for both (docs/models.md, Faithful sinks).
    Sink slots that are not generated yet are then read as zero keys, later blocks overwrite those
    in the way, and only a later block's first pass writes sink slots.
    """

    block: int = 3  # frames of a block
    window: int = -1  # frames that a block sees, itself included; -1: global, `max_global` frames
    sink: int = 0  # first frames of a video, which every block sees
    # 'absolute' keeps every frame at its own index, at most ABSOLUTE_LIMIT. 'relative' moves the
    # sink along with the window: distances never exceed the window, and the length is unlimited.
    # With a global window nothing moves.
    positions: Literal["absolute", "relative"] = "absolute"
    independent_first_frame: bool = False  # frame 0 is a block of its own
    max_global: int = 21  # the length the models were made for; raise it to see further
    faithful_sinks: bool = False  # reproduce the published code; see above

    def __post_init__(self):
        _refuse(
            (self.block < 1, f"Layout.block is {self.block}; a block has at least 1 frame"),
            (
                self.window != -1 and self.window < 1,
                f"Layout.window is {self.window}; use -1 (global) or at least 1 frame",
            ),
            (self.sink < 0, f"Layout.sink is {self.sink}; it must not be negative"),
            (
                self.sink > max(self.capacity - self.block, 0) and not self.faithful_sinks,
                f"a window of {self.capacity} frames cannot hold the sink of {self.sink} and a "
                f"block of {self.block}; raise the window to at least {self.sink + self.block}",
            ),
            (
                self.positions not in ("absolute", "relative"),
                f"Layout.positions is {self.positions!r}; use 'absolute' or 'relative'",
            ),
            (
                self.faithful_sinks and self.positions == "relative" and self.sink > self.block,
                "Layout.faithful_sinks: the published code with relative positions fails on a "
                f"sink of {self.sink} frames with blocks of {self.block}; use a sink of at most "
                "one block",
            ),
        )

    @property
    def capacity(self) -> int:
        """Return the most frames that a block sees, itself included."""
        return self.max_global if self.window == -1 else self.window

    @property
    def kept(self) -> int:
        """Return how many first frames are never evicted.

        These are the sink, or with faithful_sinks what a block leaves of it.
        """
        if self.faithful_sinks and self.window != -1:
            return max(min(self.sink, self.window - self.block), 0)
        return self.sink

    @property
    def sink_moves(self) -> bool:
        """Return whether sink keys are kept un-rotated and rotated anew for each block."""
        return self.positions == "relative" and self.window != -1 and self.kept > 0

    def shift(self, end):
        """Return by how many frames the sink moves forward for the block that ends at `end`.

        `end` is an int or traced, and so is what comes back.
        """
        evicted = end - self.capacity
        return evicted * (evicted > 0)

    def visible(self, end: int) -> tuple[tuple[int, int], ...]:
        """Return the frame ranges that the block ending at `end` sees.

        This is V(e) of docs/streaming.md, Notation.
        """
        if end <= self.capacity:
            return ((0, end),)
        recent = (end - max(self.capacity - self.kept, 0), end)
        return ((0, self.kept), recent) if self.kept else (recent,)

    def blocks(self, frames: int) -> tuple[Block, ...]:
        """Return the blocks of a video of `frames` frames.

        The last may be cut short; its window counts from its full end.
        """
        ends = range(self.lead or self.block, self.whole(frames, up=True) + 1, self.block)
        blocks = []
        for end in ends if frames else ():
            ranges = tuple(
                (first, min(stop, frames)) for first, stop in self.visible(end) if first < frames
            )
            start = max(end - self.block, 0)
            blocks.append(Block(start, min(end, frames), ranges, self.shift(end)))
        return tuple(blocks)

    @property
    def lead(self) -> int:
        """Return the frames before the blocks of `block` frames: an independent first frame, or
        none.
        """
        return int(self.independent_first_frame)

    def whole(self, frames: int, up: bool = False) -> int:
        """Return `frames` rounded down to whole blocks.

        With `up` it is rounded up, to one block at least.
        """
        blocks = (frames - self.lead + (self.block - 1 if up else 0)) // self.block
        smallest = (self.lead or self.block) if up else 0
        return max(self.lead + blocks * self.block, smallest)

    def check_frames(self, frames: int) -> None:
        """Raise ValueError unless `frames` is a whole number of blocks that the window and the
        position table can hold.
        """
        _refuse(
            (
                frames < 1 or self.whole(frames) != frames,
                f"{frames} latent frames are not a whole number of blocks of {self.block}"
                f"{' after the independent first frame' if self.lead else ''}; the next that fits "
                f"is {self.whole(max(frames, 1), up=True)}",
            ),
            (
                self.capacity < self.block,
                f"a window of {self.capacity} frames cannot hold a block of {self.block}; raise "
                "the window",
            ),
            (
                self.positions == "absolute" and frames > ABSOLUTE_LIMIT,
                f"{frames} latent frames exceed the {ABSOLUTE_LIMIT} absolute positions; use "
                "positions='relative' for longer videos",
            ),
        )
