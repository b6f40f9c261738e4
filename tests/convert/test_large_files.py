"""Commands on files larger than what is held of them: bounded memory, and no half results of what
is stopped or killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import lora, nets, parts, store
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.runtime.files import DTYPES, write_safetensors
from tests import tiny_base

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base.write_tiny_base(tmp_path_factory.mktemp("base"))


CHILD = """
import sys, threading, time
from astrolabe_jax.convert.__main__ import main
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
# whatever is imported and started on the way is there before
main(["import", sys.argv[1], "--to", sys.argv[2]])
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
main(sys.argv[3:])
done.set()
print("peak", peak[0] - before)
"""


BIG = bases.WanConfig(dim=1536, ffn_dim=8960, num_layers=3, num_heads=12)


def big_transformer(path, config):
    """Write random weights in bfloat16, tensor by tensor, and a config.json beside them.

    Return the bytes of the largest tensor, and of all.
    """
    shapes = nets.source_shapes(parts.PARTS["transformer"], config)
    rng, dtype = np.random.default_rng(0), DTYPES["BF16"]
    tensors = {
        name: bases.engine.Lazy(
            shape, dtype, lambda shape=shape: rng.standard_normal(shape, np.float32).astype(dtype)
        )
        for name, shape in shapes.items()
    }
    write_safetensors(path, tensors)
    config_file = path.with_name("config.json")
    config_file.write_text(json.dumps({"transformer": nets.sizes_of(config)}))
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return max(sizes), sum(sizes)


def child(*arguments):
    # With a fixed threshold the allocator gives back what is freed: what is measured is what is in
    # use.
    environment = dict(
        os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS="", MALLOC_MMAP_THRESHOLD_="65536"
    )
    return [sys.executable, "-c", CHILD, *map(str, arguments)], environment


@pytest.mark.slow
def test_memory_stays_near_one_tensor(base, tmp_path):
    """Import, export and merge of a file many times as large as its largest tensor: no copy of the
    file is held.
    """
    path = tmp_path / "big.safetensors"
    largest, total = big_transformer(path, BIG)  # 28 MB, 0.33 GB
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), adapter_shapes(BIG, 4))
    lora.save_peft(adapter, tmp_path / "lora", 4, 4.0)
    # The tensor, and copies of it on the way to the disk; in a merge the product in float32, too.
    commands = {
        3: ("import", path, "--to", tmp_path / "x"),
        4: (
            "export",
            tmp_path / "x",
            "--to",
            tmp_path / "out.safetensors",
            "--part",
            "transformer",
        ),
        6: ("merge", path, tmp_path / "lora", "--to", tmp_path / "merged.safetensors"),
    }
    for tensors, arguments in commands.items():
        command, environment = child(base, tmp_path / f"first {arguments[0]}", *arguments)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peak = 1024 * int(done.stdout.splitlines()[-1].split()[1])
        print(arguments[0], peak / 1e6, "MB; largest tensor", largest / 1e6, "file", total / 1e6)
        assert peak < tensors * largest < 0.6 * total, (arguments[0], peak, largest, total)
    assert (tmp_path / "out.safetensors").read_bytes()[-(10**6) :] == path.read_bytes()[-(10**6) :]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "begun"),
    [
        (["import", "{path}", "--to", "{to}"], "to/*/*/d/*"),
        (["merge", "{path}", "{lora}", "--to", "{to}.safetensors"], "to.safetensors.partial.*"),
    ],
)
def test_what_is_stopped_with_ctrl_c_leaves_nothing(tmp_path, command, begun):
    places = {name: tmp_path / name for name in ("path", "lora", "to")}
    places["path"] = tmp_path / "big.safetensors"
    big_transformer(places["path"], BIG)
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), adapter_shapes(BIG, 4))
    lora.save_peft(adapter, places["lora"], 4, 4.0)
    there = {*tmp_path.rglob("*")}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "astrolabe_jax.convert",
            *(each.format(**places) for each in command),
        ],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob(begun)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.endswith("SIGINT: ended\n"), err
    assert {*tmp_path.rglob("*")} - there <= {places["to"]}


@pytest.mark.slow
def test_an_import_that_is_killed_leaves_nothing_that_loads(base, tmp_path):
    path = tmp_path / "big.safetensors"
    big_transformer(path, bases.WanConfig(dim=1024, ffn_dim=4096, num_layers=2, num_heads=8))
    command, environment = child(base, tmp_path / "first", "import", path, "--to", tmp_path / "x")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob("x/*/*/d/*")) and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (
        list(tmp_path.glob("x/transformer*tmp*")) and not (tmp_path / "x" / "config.json").exists()
    )
    with pytest.raises(FileNotFoundError):
        bases.load_base(str(tmp_path / "x"))
    assert not store.is_store(tmp_path / "x" / "transformer")
    command, environment = child(base, tmp_path / "again", "import", path, "--to", tmp_path / "x")
    # the same command again
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert (
        store.is_store(tmp_path / "x" / "transformer") and (tmp_path / "x" / "config.json").exists()
    )
