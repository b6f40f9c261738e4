"""The contract page: the values that stages exchange, a sentence a field.

Read it before any other file. The stages stand in the order of docs/architecture.md: prompts,
encode, rollout, decode, rewards, advantages, losses, update, checkpoint.

Shapes are written with these letters:

    B  samples (videos) of a batch or an epoch      A  attention heads
    G  prompts (groups) of an epoch                 K  width of one head
    F  latent frames                                D  model width
    P  latent frames of a block                     S  text tokens
    T  pixel frames                                 E  text width
    C  latent channels                              R  LoRA rank
    H W  latent height, width                       h w  patch grid; L = h w tokens a latent frame

    latents          [B, F, C, H, W]            float32
    frames           [B, T, height, width, 3]   uint8
    text embeddings  [B, S, E]                  float32, zero rows beyond the prompt
    timesteps        [B, F]                     0 (clean) to 1000 (noise);  sigma in [0, 1]
    rewards          {name: [B]}                float32, higher is better

An array may live on the devices or on the host, or, where a run is only planned (plan.py), be its
abstract self, jax.ShapeDtypeStruct; a type checker sees the first.
"""

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jaxtyping import Float, Int, UInt8

if TYPE_CHECKING:
    from astrolabe_jax.models.wan.config import Layout, WanConfig
    from astrolabe_jax.rollout import Sampler

    Array = jax.Array
else:
    Array = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct

Latents = Float[Array, "B F C H W"]
Frames = UInt8[Array, "B T height width 3"]
HostFrames = UInt8[np.ndarray, "B T height width 3"]
Embeddings = Float[Array, "B S E"]

# An adapter: {module: {'a': [layers, in, R], 'b': [layers, R, out]}} (models/lora.py).
Adapter = dict[str, dict[str, Any]]

# Reward name, and REWARD/PART for what it consists of -> float32 [B].
Scores = dict[str, np.ndarray]

# Reward name, and `total` for their weighted sum -> float64 [n], a value for each held-out video,
# always the same videos. Where a video is scored clip by clip they are means over its clips; `late`
# is the total over the clips of the second half, `total/FRAME` that of the clip from FRAME on.
Evaluation = dict[str, np.ndarray]


class RngStream(enum.IntEnum):
    """First link of every chain of `fold_in`: draws of different streams never meet.

    Numbers are never reused.
    """

    PROMPTS = 0  # order of the training prompts
    ADAPTER = 1  # initial LoRA weights
    ROLLOUT = 2  # noise of the training videos
    LOSS = 3  # noise and levels of the loss, order of the samples
    HELD_OUT = 4  # choice of the evaluation prompts, and the noise of their videos
    REAL = 5  # start positions of the real videos behind eval.ceiling
    SAMPLE = 6  # noise of the videos of `python -m astrolabe_jax.sample`
    WINDOW = 7  # where an epoch's window begins
    CONTINUATION = 8  # which video a progressive stream goes on with


class PromptBatch(NamedTuple):
    """The videos that an epoch asks for, one entry a video; those of a prompt stand together.

    prompts -> encode, rewards, advantages. Videos belong to one group exactly if their `index` is
    equal; equal texts on two lines are two groups. The noise of a video depends on its index and
    its candidate number only, wherever in the batch it stands.
    """

    texts: tuple[str, ...]  # B prompts
    index: Int[np.ndarray, " B"]  # int32, line of the prompt in its list, from 0
    candidate: Int[np.ndarray, " B"]  # int32, number of the video among those of its prompt, from 0

    def take(self, videos: np.ndarray) -> "PromptBatch":
        """Return the batch of these videos, in this order; a video may be there several times."""
        return PromptBatch(
            tuple(self.texts[i] for i in videos), self.index[videos], self.candidate[videos]
        )


class CacheChange(NamedTuple):
    """What happens to the key-value cache before a block whose prompt is new.

    Places are those of models/wan/cache.restart (docs/streaming.md, Scene changes).
    """

    end: int  # frames so far, in the cache's count
    keep: tuple[int, ...] | None = None  # places that begin a new count; None: the count goes on
    frames: tuple[int, ...] = ()  # frames whose keys are computed anew, one a place in use
    positions: tuple[int, ...] = ()  # their rotary positions
    skip: int = 0  # first places, of the sink, that keep their keys nevertheless
    # published: the other places keep their content, too, which a later flush may take
    every: bool = False


class BlockPlan(NamedTuple):
    """One block of a video: which frames it has, and where they stand in the cache."""

    frame: int  # its first frame in the video
    count: int  # latent frames
    scene: int  # whose prompt it is sampled with
    start: int  # its first frame in the cache's count, which a change may begin anew
    positions: tuple[int, ...]  # rotary positions of its frames
    aligned: bool = True  # see models/wan/cache.View
    cut: bool = False  # behind a hard cut
    change: CacheChange | None = None  # what happens to the cache before it


class Timeline(NamedTuple):
    """What a video of one length shows: the prompts of its scenes, and its blocks."""

    prompts: tuple[str, ...]  # one a scene
    blocks: tuple[BlockPlan, ...]

    @property
    def changes(self) -> list[int]:
        """The latent frames at which a prompt takes over from another."""
        return [
            block.frame
            for before, block in zip(self.blocks, self.blocks[1:], strict=False)
            if before.scene != block.scene
        ]


class VideoBatch(NamedTuple):
    """Everything that a set of videos is sampled from, besides the policy.

    encode -> rollout. Videos of one batch have blocks of equal places (`Place`).
    """

    batch: PromptBatch
    timelines: tuple[Timeline, ...]  # one a video
    rows: Mapping[str, int]  # prompt of a scene -> its row of `embeddings`
    embeddings: Embeddings | np.ndarray  # [prompts, S, E], every distinct prompt once; on the host
    keys: jax.Array  # [B] keys of the noise
    # Blocks begin at traced frames, so that one compiled program serves all of them; else a block
    # that is sampled while the cache fills has a program of its own, with shorter reads.
    traced: bool = False
    first_frame: int = 0  # latent frame of the video at which the timelines begin

    @property
    def blocks(self) -> tuple[BlockPlan, ...]:
        """The blocks of the first video: all have the same places."""
        return self.timelines[0].blocks

    def prompts_at(self, block: int) -> list[str]:
        """Return the prompt of each video in a block."""
        return [timeline.prompts[timeline.blocks[block].scene] for timeline in self.timelines]

    def take(self, videos: np.ndarray) -> "VideoBatch":
        """Return the batch of these videos, in this order; a video may be there several times."""
        return self._replace(
            batch=self.batch.take(videos),
            timelines=tuple(self.timelines[i] for i in videos),
            keys=self.keys[videos],
        )


@struct.dataclass
class Policy:
    """What videos are sampled from: an adapter over the frozen base, and how it is sampled.

    A pytree whose arrays are `params` and `adapter`; the rest is static under jit.
    """

    params: dict  # of the base
    adapter: Adapter | None  # None: the base itself
    graphdef: Any = struct.field(pytree_node=False)  # of the transformer
    config: "WanConfig" = struct.field(pytree_node=False)  # its sizes
    layout: "Layout" = struct.field(pytree_node=False)  # blocks, window, sink
    sampler: "Sampler" = struct.field(pytree_node=False)  # denoising steps
    lora_scale: float = struct.field(pytree_node=False, default=1.0)  # alpha / R


@struct.dataclass
class Place:
    """Where a block stands in the cache.

    A pytree: `start` and `positions` are arrays, what remains is static under jit.
    """

    start: Int[Array, ""] | np.int32 | None  # first frame, traced; None: `static_start` is it
    positions: (
        Int[Array, " P"] | np.ndarray | None
    )  # rotary, of the block's frames; None: the frames' numbers
    static_start: int = struct.field(pytree_node=False, default=0)
    aligned: bool = struct.field(pytree_node=False, default=True)  # see models/wan/cache.View
    partial: bool = struct.field(pytree_node=False, default=False)  # likewise

    @property
    def frame(self) -> int | jax.Array | np.int32:
        """First frame of the block, in the cache's count."""
        return self.static_start if self.start is None else self.start


class StreamState(NamedTuple):
    """What a set of videos carries from block to block; none of it grows with their length."""

    cache: Any  # models.wan.cache.Cache, [layers, B, slots L, A, K]
    decoder: Any  # memory of the VAE's decoder; None before the first frame, or where none decodes
    first: Float[Array, "B sink C H W"]  # clean latents of the sink, or at least of the first frame
    recent: Float[Array, "B slots C H W"]  # the last ones, newest last; anything where fewer exist


class PrefixContext(NamedTuple):
    """What the loss of a window reads of the frames before it, a row for each of its streams.

    streaming -> update. Which arrays there are depends on streaming.prefix and streaming.backprop
    (docs/streaming.md, Whose keys).
    """

    start: Int[Array, ""] | np.int32  # frames so far, in the cache's count
    positions: Int[Array, " W"] | np.ndarray  # rotary positions of the window's frames
    cache: Any | None = None  # keys and values of the rollout
    first: Float[Array, "B sink C H W"] | None = None  # clean latents of the sink
    recent: Float[Array, "B n C H W"] | None = None  # the last ones
    whole: Float[Array, "B start C H W"] | None = (
        None  # all of them, with streaming.backprop 'full'
    )


class LossPart(NamedTuple):
    """A part of a microbatch whose loss is computed at once: some frames behind a prefix."""

    frames: tuple[int, int] | None = None  # from, to; None: all
    number: int = 0  # among the parts of the microbatch: each draws noise of its own
    prefix: PrefixContext | None = None


class Segment(NamedTuple):
    """The videos of an epoch: what is learnt from, and what it is learnt behind.

    rollout, decode, rewards -> advantages, update.
    """

    videos: VideoBatch
    start: int  # latent frame at which the window begins
    # of the window, or from frame 0 to its end where each video is sampled by itself
    latents: Latents
    scores: Scores  # of every reward and its parts
    # The streams at the window's start, one set a round (config.rounds); empty where none is shared
    prefixes: list[StreamState]
    # All latents before the window, one array a round, where gradients go back there; else empty.
    whole: list[Float[Array, "B start C H W"]]


class Samples(NamedTuple):
    """What the update learns from: an epoch's N samples.

    rollout, advantages -> update.
    """

    latents: Float[Array, "N F C H W"]  # clean
    r: Float[np.ndarray, " N"]  # optimality in [0, 1]
    mask: np.ndarray  # [N] bool, samples that the KL restrains; all unless kl.kind is 'selective'
    prompt: Int[np.ndarray, " N"]  # int32, each sample's row of `text`
    key: jax.Array  # [N] keys of this epoch's noise
    text: Embeddings | np.ndarray  # [G, S, E]


class TrainState(NamedTuple):
    """What training changes: four adapters in config.lora.dtype, and the optimizer.

    update -> rollout (`old`), checkpoint.
    """

    current: Adapter  # theta, trained
    old: Adapter  # behaviour policy: samples, and supplies the loss's second prediction
    reference: Adapter  # what the KL keeps `current` close to
    ema: Adapter  # average of `current` for evaluation
    optimizer: Any  # state of optax
    step: Int[Array, ""] | np.ndarray  # optimizer steps taken
