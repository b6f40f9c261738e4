"""How the tests of `sample` run it, and read what it makes."""

import json
from pathlib import Path
from types import SimpleNamespace

from astrolabe_jax.runtime.media import read_video
from astrolabe_jax.sample import __main__ as program
from tests.e2e import runs

RED, GREEN = (
    "a red circle moving left on a grey background",
    "a green square moving up on a white background",
)
# servers that are not there
AWAY = {
    f"rewards.{name}": {
        "load": "astrolabe_jax.rewards.remote:load",
        "url": f"http://127.0.0.1:1/{name}",
    }
    for name in ("smell", "taste")
}
# 5 pixel frames, 2 latent ones; a block is one latent frame, a quarter of a second.
DEFAULTS = {
    "prompt": None,
    "prompt_file": None,
    "switch_frames": None,
    "overwrite": False,
    "lora": None,
    "candidates": 1,
    "frames": 0,
    "image": None,
    "video": None,
    "latents": None,
    "score": False,
}


def ask(base, directory, changes=None, **options):
    """Runs the program in this process, as its command line does."""
    config = runs.small_config(base)
    config.update_from_flattened_dict(changes or {})
    values = DEFAULTS | options | {"config": config, "output_dir": str(directory)}
    program.main({name: SimpleNamespace(value=value) for name, value in values.items()})
    return rows_of(directory)


def rows_of(directory):
    return [
        json.loads(line) for line in (Path(directory) / "results.jsonl").read_text().splitlines()
    ]


def frames_of(row):
    return read_video(Path(row["video_path"])).astype(int)
