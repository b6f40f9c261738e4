"""g_*: scene strings as the published command line reads them."""

import json
import re
from collections.abc import Iterator

import numpy as np

from astrolabe_jax.streaming.scenes import parse_published
from tests.golden.entry import EXACT, Entry
from tests.golden.files import GoldenFile


def entries(file: GoldenFile) -> Iterator[Entry]:
    """One JSON object a prompt; a key names the block size and the frame rate."""
    prompts = file["prompts"]
    for key in file.keys("parsed_"):
        block, fps = map(int, re.fullmatch(r"parsed_block(\d+)_fps(\d+)", key).groups())
        yield Entry(
            key,
            lambda block=block, fps=fps: np.array([_described(p, block, fps) for p in prompts]),
            EXACT,
        )


def _described(prompt: str, block: int, fps: int) -> str:
    scenes = parse_published(str(prompt), block, fps, 4)
    columns = {"texts": "prompt", "blocks": "blocks", "hard_cut": "cut"}
    return json.dumps(
        {name: [getattr(scene, field) for scene in scenes] for name, field in columns.items()}
    )
