"""What the stages hand to each other, and the letters that their shapes are written in.

Dimension key:

    B  samples (videos) of a batch or an epoch      A  attention heads
    G  prompts (groups) of an epoch                 K  width of one head
    M  candidates (videos) per prompt               D  model width
    F  latent frames                                S  text tokens
    P  latent frames per block                      E  text width
    T  pixel frames                                 R  LoRA rank
    C  latent channels                              N  tokens of one call
    H W  latent height, width                       h w  patch grid, L = h w tokens per latent frame

    latents          [B, F, C, H, W]            float32
    frames           [B, T, height, width, 3]   uint8
    text embeddings  [B, S, E]                  float32, zero rows beyond the prompt
    timesteps        [B, F]                     0 (clean) to 1000 (noise);  sigma in [0, 1]
    rewards          {name: [B]}                float32, higher is better
"""

import enum
from typing import NamedTuple

import numpy as np


class RngStream(enum.IntEnum):
    """First link of every chain of `fold_in`: draws for different purposes never meet. Numbers are
    never reused.
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
    """Stage `prompts` -> `encode`, `rollout`, `rewards`, `advantages`: one entry per video, a
    prompt's adjacent.

    Videos belong to one group exactly if their `index` is equal; equal texts on two lines are two
    groups. The noise of a video depends on its index and its candidate number only, wherever in the
    batch it stands.
    """

    texts: tuple[str, ...]  # B prompts
    index: np.ndarray  # [B] int32, line of the prompt in its list, from 0
    candidate: np.ndarray  # [B] int32, number of the video among those of its prompt, from 0

    def part(self, videos: slice) -> "PromptBatch":
        """The same batch with these videos only."""
        return PromptBatch(self.texts[videos], self.index[videos], self.candidate[videos])


# Reward name, and `total` for their weighted sum -> one value [n] float64 per held-out video,
# always the same videos. Of long videos, means over their windows; `late` is the total of the
# second half's, `total/FRAME` that of one window.
Evaluation = dict[str, np.ndarray]
