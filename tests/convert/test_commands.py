"""The commands as users run them: one message and status 2 for what cannot be done."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from astrolabe_jax import checkpoint
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import engine, lora, nets, parts, store
from astrolabe_jax.convert.__main__ import main
from astrolabe_jax.runtime.files import Lazy, read_safetensors, write_safetensors
from astrolabe_jax.update import TrainState
from tests import tiny_base
from tests.adapters import to_peft
from tests.convert import torch_files
from tests.e2e.disks import small_disk
from tests.models import tiny

ROOT = Path(__file__).parents[2]
IMPORT_WHEN_TOLD = """
from astrolabe_jax.convert.__main__ import main
input()
main()
"""


def run(capsys, *arguments):
    """Run a command; return (status, output, error messages)."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base.write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def imported(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("imported") / "base"
    main(["import", str(base), "--to", str(directory)])
    return directory


def test_inspect_says_what_a_file_is(capsys, base):
    status, out, _ = run(capsys, "inspect", base / "transformer.safetensors")
    assert status == 0
    assert "part: transformer" in out and "tensors: 69" in out and "parameters: 19,832" in out
    assert "dtypes: float32 69" in out and "complete: yes" in out
    status, out, _ = run(capsys, "inspect", base, "--json")
    found = json.loads(out)
    assert found["complete"] and set(found["parts"]) == set(parts.PARTS)
    assert found["parts"]["vae"]["sizes"]["temporal_downsample"] == [False, True, True]


def test_inspect_says_what_is_missing(capsys, base, tmp_path):
    tensors = dict(read_safetensors(base / "transformer.safetensors"))
    tensors["blocks.0.ffn.0.wieght"] = tensors.pop("blocks.0.ffn.0.weight")
    write_safetensors(tmp_path / "a.safetensors", tensors)
    status, out, err = run(capsys, "inspect", tmp_path / "a.safetensors")
    assert status == 2 and "complete: no, 2 faults" in out
    assert err == (
        f"error: {tmp_path}/a.safetensors cannot be used as it is: missing tensor: "
        "blocks.0.ffn.0.weight [32, 24] (and 1 more)\n"
    )
    assert (
        "missing tensor: blocks.0.ffn.0.weight" in out
        and "unused tensor: blocks.0.ffn.0.wieght" in out
    )


def test_inspect_reads_headers_only(capsys, tmp_path, monkeypatch):
    """The 14B model's names and shapes, without its 57 GB: the content of the file is a hole."""
    config = parts.SIZES["wan_14b"]["transformer"]
    shapes = nets.source_shapes(parts.PARTS["transformer"], config)
    header, stop = {}, 0
    for name, shape in shapes.items():
        start, stop = stop, stop + 2 * int(np.prod(shape))
        header[f"model.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with open(tmp_path / "krea.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)
    status, out, _ = run(capsys, "inspect", tmp_path / "krea.safetensors", "--json")
    found = json.loads(out)
    assert (found["tensors"], found["parameters"], found["bytes"]) == (
        1095,
        14_288_491_584,
        28_576_983_168,
    )
    assert (found["families"], found["size"], found["complete"]) == (["Krea"], "wan_14b", True)


def test_inspect_knows_adapters(capsys, tmp_path):
    lora.save_peft(tiny.adapter(), tmp_path / "peft", 2, 3.0)
    found = json.loads(run(capsys, "inspect", tmp_path / "peft", "--json")[1])
    assert (found["families"], found["sizes"]["rank"], found["sizes"]["scale"]) == (
        ["PEFT"],
        2,
        1.5,
    )
    tree = {name: torch_files.whole(tensor) for name, tensor in to_peft(tiny.adapter()).items()}
    torch_files.write(tmp_path / "lora.pt", {"generator_lora": tree, "critic_lora": {}, "step": 1})
    found = json.loads(run(capsys, "inspect", tmp_path / "lora.pt", "--json")[1])
    assert found["families"] == ["LongLive LoRA"] and found["entries"] == [
        "generator_lora",
        "critic_lora",
        "step",
    ]
    tree.popitem()
    torch_files.write(tmp_path / "lora.pt", {"generator_lora": tree})
    found = json.loads(run(capsys, "inspect", tmp_path / "lora.pt", "--json")[1])
    assert not found["complete"] and "missing tensor: " in found["faults"][1]


def test_an_import_says_how_far_it_is(capsys, base, tmp_path):
    write_safetensors(tmp_path / "vae.safetensors", read_safetensors(base / "vae.safetensors"))
    status, _, err = run(capsys, "import", tmp_path / "vae.safetensors", "--to", tmp_path / "x")
    assert status == 2 and "whose statistics are in no file of weights; put a config.json" in err
    status, out, err = run(capsys, "import", base, "--to", tmp_path / "x")
    assert status == 0
    told = re.findall(r"^wrote (.*): (\d+) tensors, ([\d,]+) bytes$", out, re.MULTILINE)
    assert [Path(path) for path, *_ in told] == [tmp_path / "x" / part for part in parts.PARTS]
    assert told[0][2] == f"{4 * 19_832:,}"
    assert re.search(r"^transformer: .* GB in .* MB/s", err, re.MULTILINE), err


def test_an_import_is_an_orbax_checkpoint(imported):
    """Restored by Orbax itself, and onto a mesh."""
    want = bases.load_base(str(imported), dtype="float32", param_dtype="float32").transformer.params
    path = (imported / "transformer").absolute()
    restored = ocp.PyTreeCheckpointer().restore(path)
    jax.tree.map(np.testing.assert_array_equal, restored, want)
    mesh = jax.make_mesh((8,), ("x",))

    def placed_shape(leaf):
        last = "x" if leaf.shape[-1] % 8 == 0 else None
        sharding = NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), last))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.tree.map(placed_shape, want)
    placed = ocp.StandardCheckpointer().restore(path, shapes)
    jax.tree.map(np.testing.assert_array_equal, placed, want)
    kernel = placed["blocks"]["ffn"]["fc1"]["kernel"]
    assert (
        len(kernel.sharding.device_set) == 8
        and kernel.addressable_shards[0].data.shape[-1] == kernel.shape[-1] // 8
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_import_in_another_dtype_is_rounded(capsys, base, tmp_path, dtype):
    assert run(capsys, "import", base, "--to", tmp_path / "x", "--dtype", dtype)[0] == 0
    leaves = store.open_leaves(tmp_path / "x" / "transformer")
    assert {str(leaf.dtype) for leaf in leaves.values()} == {dtype}
    run(
        capsys,
        "export",
        tmp_path / "x",
        "--to",
        tmp_path / "a.safetensors",
        "--part",
        "transformer",
    )
    want = read_safetensors(base / "transformer.safetensors")
    for name, tensor in read_safetensors(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(tensor, np.asarray(want[name]).astype(jnp.dtype(dtype)))


def test_an_entry_may_be_chosen(capsys, base, tmp_path):
    tensors = read_safetensors(base / "transformer.safetensors")
    trees = {
        entry: {
            f"model.{name}": torch_files.whole(np.full(t.shape, value, np.float32))
            for name, t in tensors.items()
        }
        for entry, value in (("generator", 1), ("generator_ema", 2))
    }
    torch_files.write(tmp_path / "a.pt", trees)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    for entry, value in (("", 2), ("generator", 1)):
        to = tmp_path / f"to{entry}"
        assert (
            run(
                capsys,
                "import",
                tmp_path / "a.pt",
                "--to",
                to,
                *(["--entry", entry] if entry else []),
            )[0]
            == 0
        )
        assert np.asarray(store.open_leaves(to / "transformer")["head.modulation"]).max() == value
    status, _, err = run(
        capsys, "import", tmp_path / "a.pt", "--to", tmp_path / "z", "--entry", "critic"
    )
    assert (status, err) == (
        2,
        f"error: {tmp_path}/a.pt has no entry 'critic'; it has generator, generator_ema\n",
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["inspect", "nowhere"], "nothing is at /.*/nowhere; expected a file of weights"),
        (
            ["inspect", "{base}/config.json"],
            "config.json: expected a file of weights, .safetensors",
        ),
        (
            ["import", "nowhere", "--to", "{tmp}/x"],
            "nothing is at /.*/nowhere; expected a file of weights or a directory with",
        ),
        (
            ["import", "{base}", "--to", "{imported}"],
            "imported.*/transformer is there already; remove it or give",
        ),
        (["import", "{base}", "--to", "{tmp}/x", "--entry", "a"], "--entry is of one file"),
        (
            ["import", "{base}", "--to", "{tmp}/x", "--dtype", "int8"],
            "argument --dtype: invalid choice: 'int8'",
        ),
        (
            ["import", "{tmp}/plain.safetensors", "--to", "{tmp}/x"],
            "plain.safetensors: its width is 24, .*--num_heads",
        ),
        (
            ["import", "{tmp}/other.safetensors", "--to", "{tmp}/x"],
            "other.safetensors: the names are those of no model",
        ),
        (
            ["import", "{base}", "--to", "{tmp}/wan"],
            "wan/config.json is none that import wrote; give another --to",
        ),
        (
            ["export", "{imported}", "--to", "{tmp}/a.pt", "--part", "vae"],
            "expected a name that ends in .safetensors",
        ),
        (
            ["export", "{imported}", "--to", "{base}/vae.safetensors", "--part", "vae"],
            "vae.safetensors is there already",
        ),
        (
            ["export", "{imported}", "--to", "{tmp}/a.safetensors", "--part", "head"],
            "argument --part: invalid choice",
        ),
        (["export", "{imported}", "--to", "{tmp}/a.safetensors"], "required: --part"),
        (
            ["export-lora", "{base}", "--to", "{tmp}/x"],
            "base.* is a directory that holds .*config.json.*; expected a PEFT directory",
        ),
        (["export-lora", "{tmp}", "--to", "{base}"], "is there already"),
        (
            ["merge", "{base}", "{tmp}", "--to", "{tmp}/m.safetensors"],
            "is a directory that holds lora.safetensors, other.*, wan; expected a PEFT directory",
        ),
        (
            ["merge", "{base}", "{tmp}/lora.safetensor", "--to", "{tmp}/m.safetensors"],
            "nothing is at .*/lora.safetensor .did you mean .*/lora.safetensors..; expected",
        ),
        (
            ["export-lora", "{tmp}/far/away/lora", "--to", "{tmp}/x"],
            "nothing is at .*/far/away/lora .of its folders there is .*; expected a PEFT",
        ),
        (
            ["export-lora", "{tmp}/lora.safetensors", "--to", "{tmp}/x", "--policy", "ema"],
            "--policy ema is of a run's checkpoint; .*lora.safetensors is none and has one",
        ),
        (
            ["export-lora", "{tmp}/lora.safetensors", "--to", "{tmp}/x.safetensors"],
            "x.safetensors; --format peft writes a directory, diffusers a directory or one file",
        ),
        (
            ["export-lora", "{tmp}/lora.safetensors", "--to", "{tmp}/x.pt", "--format=diffusers"],
            "x.pt; --format peft writes a directory",
        ),
        (
            ["inspect", "{tmp}"],
            "that holds lora.* wan; expected a file .*base .*LoRA .*run .*reward model",
        ),
        (["import", "{base}", "--to", "{base}"], "transformer.safetensors is there already"),
        (
            ["export", "{imported}/vae", "--to", "{tmp}/a.safetensors", "--part", "transformer"],
            "imported.*/vae: it is a vae; expected a transformer",
        ),
        (
            ["export", "{base}/vae.safetensors", "--to", "{tmp}/a.safetensors", "--part"]
            + ["transformer"],
            "vae.safetensors: it is a vae; expected a transformer",
        ),
        (
            ["reward", "sea_raft", "--weights", "nowhere.pth", "--to", "{tmp}/x"],
            "nothing is at /.*/nowhere.pth; expected a file of weights",
        ),
        (["inspect", ""], "the path is empty"),
        (["inspect", "s3://bucket/a.pt"], "s3:// is not supported"),
        (
            ["import", "{base}", "--to", "{tmp}/plain.safetensors"],
            "can be made .File exists.; give",
        ),
        (
            ["merge", "{base}", "{tmp}", "--to", "{tmp}/m.safetensors", "--format", "x"],
            "argument --format: invalid",
        ),
        (
            ["merge", "{tmp}/lora.safetensors", "{base}", "--to", "{tmp}/m.safetensors"],
            "lora.safetensors: it is a LoRA, not a whole net; give the base here and the LoRA",
        ),
        (
            ["export", "{imported}", "--to", "/proc/a.safetensors", "--part", "vae"],
            "--to: /proc/a.safetensors cannot be written ./proc takes no files.: .*; give another",
        ),
        (
            ["export-lora", "{tmp}/ours.safetensors", "--to", "/proc/a"],
            "--to: /proc/a cannot be written ./proc takes no files.: .*; give another --to",
        ),
        (["import", "{imported}/vae", "--to", "/proc"], "--to: /proc cannot be written"),
        ([], "required: command"),
    ],
)
def test_what_cannot_be_done_is_one_message(capsys, base, imported, tmp_path, arguments, expected):
    plain = read_safetensors(base / "transformer.safetensors")
    write_safetensors(tmp_path / "plain.safetensors", plain)
    write_safetensors(tmp_path / "other.safetensors", {"a": np.ones(3, np.float32)})
    halves = {"a.lora_A.weight": np.ones((1, 3)), "a.lora_B.weight": np.ones((3, 1))}
    write_safetensors(tmp_path / "lora.safetensors", halves)
    ours = {name.replace("a.", "blocks.0.ffn.0.", 1): half for name, half in halves.items()}
    write_safetensors(tmp_path / "ours.safetensors", ours, {"lora_alpha": "1"})
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "config.json").write_text('{"_class_name": "WanModel", "dim": 24}')
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(base=base, imported=imported, tmp=tmp_path) for argument in arguments]
    status, out, err = run(capsys, *given)
    assert (status, out) == (2, "") and err.startswith("error: ")
    assert re.search(expected, err), err
    assert sorted(tmp_path.rglob("*")) == before  # nothing was begun


def test_a_command_is_one_process(capsys):
    status, _, err = run(capsys, "inspect", "x", "--process=2")
    assert status == 2
    assert err.startswith("error: --process is of astrolabe_jax.main; this program runs in one pr")


def test_the_number_of_heads_may_be_given(capsys, base, tmp_path):
    write_safetensors(
        tmp_path / "a.safetensors", read_safetensors(base / "transformer.safetensors")
    )
    assert (
        run(capsys, "import", tmp_path / "a.safetensors", "--to", tmp_path / "x", "--num_heads", 2)[
            0
        ]
        == 0
    )
    assert json.loads((tmp_path / "x" / "config.json").read_text())["transformer"]["num_heads"] == 2


def test_inspect_of_a_base_with_a_broken_part_tells_all_and_ends_with_status_2(
    capsys, base, tmp_path
):
    whole = shutil.copytree(base, tmp_path / "base")
    path = whole / "vae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    status, out, err = run(capsys, "inspect", whole)
    assert status == 2 and out.count("complete: yes") == 2 and "[text_encoder]" in out
    assert err == (
        f"error: {whole} cannot be used as it is: vae: {path} is cut short, 100 bytes of its "
        "content are missing; download the file again\n"
    )
    status, out, _ = run(capsys, "inspect", whole, "--json")
    assert status == 2 and not json.loads(out)["parts"]["vae"]["complete"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.safetensors", b"<!DOCTYPE html>\n", "is a web page"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("a.pt", b"", "is an empty file; download the file again"),
        ("a.pt", b"PK\3\4" + bytes(range(200)), "its end is missing or damaged: download or copy"),
        (
            "a.bin",
            b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
            "before 1.6: read it with torch and wr",
        ),
        ("a.pth", b"\x09" + bytes(7) + b"{}       ", "it is a safetensors file: let its name end"),
        ("a.pth", b"nothing known", "download it again, or take it as a safetensors file"),
        ("a.safetensors", b"PK\3\4" + bytes(200), "is a zip archive; if torch.save wrote it, give"),
    ],
)
def test_inspect_of_what_cannot_be_read_ends_with_status_2(
    capsys, tmp_path, name, content, expected
):
    (tmp_path / name).write_bytes(content)
    status, out, err = run(capsys, "inspect", tmp_path / name)
    assert (status, out) == (2, "") and f"error: {tmp_path / name} " in err and expected in err


def test_inspect_knows_the_checkpoint_of_a_run_and_a_reward(capsys, workdir, tmp_path):
    for path in (workdir, workdir / "checkpoints" / "10"):
        status, out, _ = run(capsys, "inspect", path)
        assert status == 0 and "checkpoint of a run" in out and "rank 2, scale 1.5" in out
        assert f"path: {workdir}/checkpoints/10" in out and "policies: ema, current, old" in out
    piece = Lazy((2, 3), np.dtype(np.float32), lambda: np.ones((2, 3), np.float32))
    stack = engine.Stack(piece.shape, piece.dtype, False, (piece,))
    store.save(tmp_path / "reward" / "weights", {("a",): stack})
    (tmp_path / "reward" / "config.json").write_text('{"kind": "hpsv2", "net": {"dim": 3}}')
    status, out, _ = run(capsys, "inspect", tmp_path / "reward")
    assert status == 0 and "reward model\nfamilies: hpsv2" in out and "parameters: 6" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_found(dtype, value):
    array = np.arange(600_000).reshape(300, 2000).astype(jnp.dtype(dtype))
    if dtype == "float16":
        array = np.minimum(array, 60_000)
    if dtype == "float8_e4m3fn":
        array = np.ones_like(array)
    assert nets.is_finite(array) and nets.is_finite(array.T[::3])
    array[299, 1999] = value
    assert not nets.is_finite(array) and not nets.is_finite(array.T)
    assert nets.is_finite(array[:, ::2]) and not nets.is_finite(array[-1, -1])
    assert nets.is_finite(array[:0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_numbers_that_are_not_finite_are_not_imported(capsys, base, tmp_path, dtype):
    broken = shutil.copytree(base, tmp_path / "base")
    path = broken / "text_encoder.safetensors"  # the last part that is written
    tensors = {
        name: np.array(t).astype(jnp.dtype(dtype)) for name, t in read_safetensors(path).items()
    }
    tensors["norm.weight"][3] = np.inf
    write_safetensors(path, tensors)
    status, out, err = run(capsys, "import", broken, "--to", tmp_path / "to")
    assert (status, out) == (2, "")
    assert f"error: {path}: norm.weight holds numbers that are not finite" in err
    assert not (tmp_path / "to").exists()
    path = broken / "transformer.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in read_safetensors(path).items()}
    tensors["head.modulation"][:] = np.nan
    write_safetensors(path, tensors)
    command = ["export", broken, "--part", "transformer"]
    status, _, err = run(capsys, *command, "--to", tmp_path / "a.safetensors")
    assert status == 2 and f"{path}: head.modulation holds" in err
    assert not (tmp_path / "a.safetensors").exists()


def test_an_import_without_room_is_one_line_and_leaves_nothing(capsys, base, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        status, out, err = run(capsys, "import", base, "--to", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert (status, out) == (2, "") and not (tmp_path / "x").exists()
    assert err == (
        f"error: {tmp_path}/x/transformer cannot be written: File too large; make room for it, "
        "then run the same command again\n"
    )


@pytest.mark.parametrize("room", [0, 300_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(base, tmp_path, room):
    """Which Orbax notices in one of its threads, and would print."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        to = disk.path / "new" / "x"
        command = [sys.executable, "-c", IMPORT_WHEN_TOLD, "import", str(base), "--to", str(to)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            disk.fill(process, room)
            _, err = process.communicate("\n")
        assert process.returncode == 2 and not to.parent.exists()
    assert re.fullmatch(
        rf"error: {to}/\w+ cannot be written: (No space left on device|File too large); make room "
        "for it, then run the same command again\n",
        re.sub(r"^\w+: .* MB/s\n", "", err),
    ), err


def test_a_damaged_store_is_named(capsys, base, tmp_path):
    run(capsys, "import", base, "--to", tmp_path / "x")
    manifest = tmp_path / "x" / "vae" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    status, _, err = run(
        capsys, "export", tmp_path / "x", "--to", tmp_path / "a.safetensors", "--part", "vae"
    )
    assert status == 2 and f"error: {tmp_path}/x/vae: it cannot be read: " in err


def test_a_store_that_lost_a_file_is_not_opened(tmp_path):
    content = np.ones((4, 1 << 20), np.float32)
    piece = Lazy(content.shape, content.dtype, lambda: content)
    stack = engine.Stack(content.shape, content.dtype, False, (piece,))
    store.save(tmp_path / "x", {("a",): stack})
    assert np.asarray(store.open_leaves(tmp_path / "x")["a"]).sum() == content.sum()
    files = [path for path in (tmp_path / "x").rglob("*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(ValueError, match="its files hold .* bytes in place of 16,777,216 at least"):
        store.open_leaves(tmp_path / "x")


class Policies:
    current, old, reference, ema = (tiny.adapter(seed=seed) for seed in range(4))


@pytest.fixture
def workdir(tmp_path):
    """Return a run's directory with two checkpoints; in the older all adapters are zero."""
    policies = {name: getattr(Policies, name) for name in ("current", "old", "reference", "ema")}
    identity = {"config.lora.rank": 2, "config.lora.alpha": 3.0}
    for epoch, factor in ((9, 0), (10, 1)):
        adapters = jax.tree.map(lambda leaf, by=factor: jnp.asarray(by * leaf), policies)
        state = TrainState(**adapters, optimizer=(), step=jnp.int32(1))
        whole = checkpoint.Snapshot(epoch, {"train": state}, {})
        checkpoint.save(tmp_path / "run", whole, identity, keep=2)
    return tmp_path / "run"


def test_an_adapter_may_be_one_file_of_diffusers(capsys, workdir, tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    status, out, _ = run(capsys, "export-lora", workdir, "--to", path, "--format", "diffusers")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(Policies.ema))
    assert status == 0 and out.endswith(f"wrote {path}: 40 tensors, {size:,} bytes\n")
    got, scale = lora.load_lora(path, tiny.CONFIG, 2)
    assert scale == 1.5
    jax.tree.map(np.testing.assert_array_equal, got, Policies.ema)


@pytest.mark.parametrize("form", lora.SAVERS)
@pytest.mark.parametrize("policy", ["ema", "current", "old"])
def test_the_adapter_of_a_run(capsys, workdir, tmp_path, form, policy):
    assert (
        run(
            capsys,
            "export-lora",
            workdir,
            "--to",
            tmp_path / "x",
            "--format",
            form,
            "--policy",
            policy,
        )[0]
        == 0
    )
    got, scale = lora.load_lora(tmp_path / "x", tiny.CONFIG, 2)
    assert scale == 1.5
    jax.tree.map(np.testing.assert_array_equal, got, getattr(Policies, policy))
    older = workdir / "checkpoints" / "9"
    assert run(capsys, "export-lora", older, "--to", tmp_path / "y", "--format", form)[0] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(lora.load_lora(tmp_path / "y")[0]))


def test_merge_of_a_run(capsys, base, workdir, tmp_path):
    """The adapter of a run that is exported, merged and imported again is a transformer in place of
    the base's.
    """
    run(capsys, "export-lora", workdir, "--to", tmp_path / "lora")
    assert run(capsys, "merge", base, tmp_path / "lora", "--to", tmp_path / "m.safetensors")[0] == 0
    got = bases.load_base(
        str(base),
        transformer=str(tmp_path / "m.safetensors"),
        dtype="float32",
        param_dtype="float32",
    )
    plain = bases.load_base(str(base), dtype="float32", param_dtype="float32")
    pair = Policies.ema["self_attn.q"]
    delta = np.einsum("lir,lro->lio", pair["a"], pair["b"])
    want = plain.transformer.params["blocks"]["self_attn"]["q"]["kernel"]
    merged = got.transformer.params["blocks"]["self_attn"]["q"]["kernel"]
    np.testing.assert_allclose(merged, want + 1.5 * delta, atol=1e-5)
