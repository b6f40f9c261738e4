"""Published reward models -> reward directories, as `python -m astrolabe_jax.convert reward` does.

Everything is checked before anything is written: names and shapes of all tensors, the tokenizer,
every byte of the template. To add a kind, write a function from PublishedFiles to RewardContents in
the folder of its net, and add a line to KINDS.
"""

from collections.abc import Callable
from pathlib import Path

from astrolabe_jax.convert.commands import byte_counter
from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.clip import weights as clip
from astrolabe_jax.rewards.directory import PublishedFiles, RewardContents
from astrolabe_jax.rewards.flow import weights as flow
from astrolabe_jax.rewards.qwen2_vl import convert as qwen2_vl

KINDS: dict[str, Callable[[PublishedFiles], RewardContents]] = {
    "hpsv3": qwen2_vl.convert_hpsv3,
    "videoalign": qwen2_vl.convert_videoalign,
    "hpsv2": clip.convert_hpsv2,
    "aesthetic": clip.convert_aesthetic,
    "sea_raft": flow.convert,
}


def convert(kind: str, published: PublishedFiles, to: Path) -> Path:
    """Write the reward directory `to` of one of KINDS, with one tensor in memory at a time.

    Returns:
      The directory.

    Raises:
      ValueError, OSError: before anything is written, naming the file and what in it is at fault.
    """
    contents = KINDS[kind](published)
    size = sum(piece.nbytes for stack in contents.stacks.values() for piece in stack.pieces)
    directory.write(to, contents, byte_counter(kind, size))
    return to
