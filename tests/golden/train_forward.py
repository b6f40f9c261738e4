"""b_*: the uncached training forward under every combination of block size and local window."""

import functools
from collections.abc import Iterator

from tests.golden.dit import Dit, frame_mask, to_x0, training_layout
from tests.golden.entry import EXACT, FORWARD, Entries, Entry
from tests.golden.files import GoldenFile


def entries(file: GoldenFile) -> Entries:
    dit = Dit(file)
    for block, local in file.config["combos"]:
        yield _combo(file, dit, block, local)


def _combo(file: GoldenFile, dit: Dit, block: int, local: int) -> Iterator[Entry]:
    prefix, x, prompts = f"block{block}_local{local}", file["x"], file["prompt_embeds"]
    layout = training_layout(block, local, x.shape[1])
    yield Entry(f"{prefix}/frame_mask", lambda: frame_mask(layout, x.shape[1]), EXACT)
    for times in file.groups(f"{prefix}/"):
        t = file[f"t_{times}"]
        velocity = functools.cache(lambda t=t: dit.forward(x, t, prompts, layout))
        yield Entry(f"{prefix}/{times}/flow", velocity, FORWARD)
        yield Entry(
            f"{prefix}/{times}/x0",
            lambda v=velocity, t=t: to_x0(x, v(), t, file.config["shift"]),
            FORWARD,
        )
