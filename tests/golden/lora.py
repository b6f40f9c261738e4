"""h_*: adapters saved by PEFT, applied, disabled and merged. Groups are named
r{rank}_alpha{alpha}.
"""

import json
from collections.abc import Iterator

from astrolabe_jax.models.lora import adapter_shapes, parameter_count
from experiments.moving_shapes_base.bases import save_net
from tests.adapters import from_peft, merge_adapter
from tests.golden.dit import Dit, to_x0, training_layout
from tests.golden.entry import EXACT, FORWARD, Entries, Entry
from tests.golden.files import GoldenFile

SHIFT = 5.0  # of every released model; the file stores none


def entries(file: GoldenFile) -> Entries:
    dit = Dit(file)
    for group in file.groups():
        yield _group(file, dit, group)


def _group(file: GoldenFile, dit: Dit, group: str) -> Entries:
    stored = json.loads(str(file[f"{group}/adapter_config_json"]))
    rank, scale = stored["r"], stored["lora_alpha"] / stored["r"]
    adapter = from_peft(file.under(f"{group}/adapter/"), adapter_shapes(dit.config, rank))
    yield Entry(f"{group}/num_trainable", lambda: parameter_count(adapter), EXACT)
    merged = merge_adapter(dit.params, adapter, scale)
    for name in file.keys(f"{group}/merged"):  # merged weights, under their original names
        tensor = name.rpartition("/")[2]
        yield Entry(
            name, lambda tensor=tensor: save_net("transformer", merged, dit.config)[tensor], FORWARD
        )
    for block in [name for name in file.groups(f"{group}/") if name.startswith("block")]:
        yield _forwards(file, dit, f"{group}/{block}", adapter, scale, merged)


def _forwards(
    file: GoldenFile, dit: Dit, prefix: str, adapter, scale: float, merged
) -> Iterator[Entry]:
    x, t, prompts = file["x"], file["t"], file["prompt_embeds"]
    layout = training_layout(int(prefix.rpartition("/block")[2]), -1, x.shape[1])
    shift = file.config.get("shift", SHIFT)

    def run(params=None, adapter=None):
        return dit.forward(x, t, prompts, layout, adapter, scale, params)

    variants = {
        "flow": lambda: run(adapter=adapter),
        "x0": lambda: to_x0(x, run(adapter=adapter), t, shift),
        "flow_adapter_disabled": run,
        "flow_merged": lambda: run(params=merged),
    }
    for name, compute in variants.items():
        yield Entry(f"{prefix}/{name}", compute, FORWARD)
