"""b_*: the uncached training forward under every combination of block size and local window."""

import functools
from collections.abc import Iterator

from tests.golden.dit import Dit, frame_mask, to_x0, training_layout
from tests.golden.entry import EXACT, FORWARD, Entry
from tests.golden.files import GoldenFile


def entries(file: GoldenFile) -> Iterator[Entry]:
    config, dit = file.config, Dit(file)
    x, prompts = file["x"], file["prompt_embeds"]
    frames = x.shape[1]
    for block, local in config["combos"]:
        prefix = f"block{block}_local{local}"
        layout = training_layout(block, local, frames)
        for times in file.groups(f"{prefix}/"):
            t = file[f"t_{times}"]
            velocity = functools.cache(lambda t=t, layout=layout: dit.forward(x, t, prompts, layout))
            yield Entry(f"{prefix}/{times}/flow", velocity, FORWARD)
            yield Entry(f"{prefix}/{times}/x0", lambda v=velocity, t=t: to_x0(x, v(), t, config["shift"]), FORWARD)
        yield Entry(f"{prefix}/frame_mask", lambda layout=layout: frame_mask(layout, frames), EXACT)
