"""Writes docs/hardware.md: on which devices each recipe fits, by astrolabe_jax/estimate.py.

python docs/hardware_page.py            write it (about ten minutes of one core)
"""

import contextlib
import importlib
from pathlib import Path

from absl import app

from astrolabe_jax import estimate, plan

PAGE = Path(__file__).with_name("hardware.md")
RECIPES = (
    "self_forcing:hpsv3",
    "self_forcing:paper",
    "causal_forcing:framewise",
    "longlive:hpsv3",
    "longlive:streaming",
    "longlive:paper",
    "krea14b:hpsv3",
    "krea14b:paper",
)
DEVICES = (
    "h100:1",
    "h100:4",
    "h100:8",
    "h200:1",
    "h200:4",
    "h200:8",
    "v5e:4x4",
    "v6e:4x4",
    "v5p:2x2x2",
    "v5p:2x2x4",
)
SHORT = {
    "mesh.samples_per_device": "1 a device",
    "mesh.fsdp": "fsdp",
    "prompts.encoder": "encoder=host",
    "scoring.weights": "rewards=host",
    "video.decode_chunk": "chunk 1",
    "model.remat": "remat",
}
PUBLISHED_FOR = (8, 16, 24, 48)  # devices
HEAD = """<!-- Written by docs/hardware_page.py. -->

# Hardware

```bash
python -m astrolabe_jax.plan --config=configs/longlive.py:streaming --on=h100:8 --price=2.5
```

says, without any file or accelerator and in seconds, whether a run fits on such devices, what each
phase of an epoch holds and takes, settings with which it fits where it does not, none of them in
vain, and what the run costs. Kinds: a100 (80 GB), h100, h200, v5e, v5p, v6e;
`v5e:4x4` are 16 chips.

Every program of an epoch is traced on one device's share, and its jaxpr counted (`cost.py`):
products, convolutions, bytes read and written, and the most bytes that live at once, where chains
of elementwise operations are fused into what consumes them. Compilers hold about a fifth more.
Products run at a half, convolutions at a quarter of the peak for bfloat16, memory at 0.8 of its
bandwidth. Products of rewards run at 0.14 of the peak, as HPSv3's did on one H100; HPSv3 alone can
take as long as all the rest. Traffic between devices, evaluations and checkpoints are not counted,
nor rewards that are remote, of your own, or computed on the host.

How near this comes, LongLive streaming, one video at a time:

| program | compiled for | GiB | counted x 1.2 |
|---|---|---|---|
| update | v5p | 20.4 | 18.6 |
| update, feed-forwards whole | v5p | 21.5 | 21.0 |
| a block | v5e, v5p | 0.90, 1.15 | 0.96 |
| decoding a block | v5p | 3.06 | 2.5 |

Of seconds three were measured, on one H100 and of an earlier version: the update 3.57 (counted
4.2), decoding a block 0.055 (0.055) and HPSv3 of 81 frames 8.7 (8.5). On other devices the shares
of the peak are taken over.

## Measure

```bash
python -m astrolabe_jax.bench --config=configs/longlive.py:streaming --json=figures.json
```

measures a recipe on the devices that are here, in one process or several, without weights or
prompts: a block after the cache is full and the first one, frames a second of the transformer
alone, with the VAE and from the first block on; the phases of the smallest epoch that has the
recipe's pieces, with the share of the rate that products of large matrices reach there; each reward
whose weights are there; a checkpoint; the most memory. Everything runs twice, the first time
compiles. From that follow the seconds of a whole epoch.

## Recipes

GiB at most on a device, minutes of an epoch without rewards, and, where it needs them, the settings
with which it fits: `fsdp` is `mesh.fsdp` over all devices, `1 a device`
`mesh.samples_per_device=1`, `encoder=host` `prompts.encoder=host`, `rewards=host`
`scoring.weights=host`, `chunk 1` `video.decode_chunk=1`. A recipe is that for the fewest devices
(`devices=N`) that these divide; "-" where they divide none.

"""


def cell(recipe: str, on: str) -> str:
    """Return what the table says of a recipe on devices."""
    family, _, variant = recipe.partition(":")
    _, device, count = estimate.parse(on)
    fitting = [number for number in PUBLISHED_FOR if number % count == 0]
    module = importlib.import_module(f"configs.{family}")
    for number in fitting:
        words = variant if number == PUBLISHED_FOR[0] else f"{variant},devices={number}"
        with contextlib.suppress(ValueError):
            settings, found = plan.fitting(module.get_config(words), device, count)
            size = f"{found.peak / 2**30:.0f} GiB"
            if not found.fits:
                return f"no: {size} at least"
            needed = ", ".join(SHORT[field] for field in settings)
            minutes = f"{found.seconds / 60:.0f} min"
            return f"{size}, {minutes}" + (f"; {needed}" if needed else "")
    return "-"


def main(argv: list[str]) -> None:
    """Write the page."""
    rows = [["recipe", *DEVICES], ["---"] * (1 + len(DEVICES))]
    for recipe in RECIPES:
        row = [recipe]
        for on in DEVICES:
            row.append(cell(recipe, on))
            print(recipe, on, row[-1], flush=True)
        rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    PAGE.write_text(f"{HEAD}{table}\n")


if __name__ == "__main__":
    app.run(main)
