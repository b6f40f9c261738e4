"""A checkpoint comes back bit for bit or not at all, on any devices, and only to the run that it
belongs to.
"""

import gc
import logging
import resource
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from astrolabe_jax import checkpoint
from astrolabe_jax.checkpoint import Snapshot

FINGERPRINT = {
    "base": "abc",
    "config.seed": 0,
    "config.train.epochs": 4,
    "config.sampler.steps": [1000, 500],
}
PROGRESS = {
    "step": 7,
    "risk": {"ratio": 0.1, "history": [1.5, 2.0]},
    "evals": {"0": {"total": 1.25}},
}


def make_state(seed):
    adapter = {
        "q": {
            "a": jax.random.normal(jax.random.key(seed), (2, 8, 4)),
            "b": jnp.full((2, 4), 0.1, jnp.bfloat16),
        }
    }
    return {
        "current": adapter,
        "optimizer": optax.adamw(1e-3).init(adapter),
        "step": jnp.int32(seed),
    }


def save(workdir, epoch, keep):
    return checkpoint.save(workdir, Snapshot(epoch, make_state(epoch), PROGRESS), FINGERPRINT, keep)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_is_exact_and_only_the_newest_are_kept(tmp_path):
    assert checkpoint.restore(tmp_path, lambda epoch: make_state(0), FINGERPRINT) is None
    for epoch in (0, 2, 4):
        whole = Snapshot(epoch, make_state(epoch), PROGRESS | {"step": epoch})
        checkpoint.save(tmp_path, whole, FINGERPRINT, keep=2)
    found = checkpoint.restore(tmp_path, lambda epoch: make_state(0), FINGERPRINT)
    assert found.epoch == 4 and found.progress == PROGRESS | {"step": 4}
    assert_same(found.state, make_state(4))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_restores_onto_other_devices(tmp_path):
    def placed(state, count):
        devices = jax.devices()[:count]
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        state = jax.device_put(state, everywhere)
        a = state["current"]["q"]["a"]
        state["current"]["q"]["a"] = jax.device_put(
            a, NamedSharding(mesh, PartitionSpec(None, "data"))
        )
        return state

    saved = Snapshot(1, placed(make_state(1), 8), PROGRESS)
    checkpoint.save(tmp_path, saved, FINGERPRINT, keep=1)
    template = placed(make_state(0), 2)
    state = checkpoint.restore(tmp_path, lambda epoch: template, FINGERPRINT).state
    assert_same(state, make_state(1))
    assert state["current"]["q"]["a"].sharding == template["current"]["q"]["a"].sharding


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    for epoch in (1, 2):
        save(workdir, epoch, keep=2)
    return workdir


def damages(workdir):
    """Every single file of the newest checkpoint: missing, cut in half, or with one byte
    changed.
    """
    newest = workdir / "checkpoints" / "2"
    for path in sorted(newest.rglob("*")):
        if path.is_file():
            name, content = path.relative_to(newest), path.read_bytes()
            yield name, None
            if content:
                middle = len(content) // 2
                yield name, content[:middle]
                yield name, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def loud_again():
    """What a failing save or restore silences for the rest of a process."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [logger.level for logger in loggers]
    yield
    gc.collect()  # what was never awaited
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_a_checkpoint_that_lost_content_is_set_aside_in_one_line(
    two_checkpoints, tmp_path, capfd, caplog, loud_again
):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "run")
    (lost,) = (workdir / "checkpoints" / "2" / "state" / "d").iterdir()
    lost.unlink()
    sys.unraisablehook = sys.__unraisablehook__  # in place of pytest's
    assert checkpoint.restore(workdir, lambda epoch: make_state(0), FINGERPRINT).epoch == 1
    gc.collect()
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text
    lines = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line and len(line) < 600 for line in lines)
    assert "checkpoints/2 is damaged" in caplog.text


# the reader's unawaited futures
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_checkpoint_falls_back_and_never_gives_wrong_values(
    two_checkpoints, tmp_path, caplog, loud_again
):
    fallbacks, before = 0, contents(two_checkpoints / "checkpoints" / "2")
    for i, (name, content) in enumerate(damages(two_checkpoints)):
        workdir = tmp_path / str(i)
        shutil.copytree(two_checkpoints, workdir)
        path = workdir / "checkpoints" / "2" / name
        path.unlink() if content is None else path.write_bytes(content)
        spoilt = {
            file: payload
            for file, payload in (before | {name: content}).items()
            if payload is not None
        }
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = checkpoint.restore(workdir, lambda epoch: make_state(0), FINGERPRINT)
        assert_same(found.state, make_state(found.epoch))
        assert found.progress == PROGRESS
        if found.epoch == 1:
            fallbacks += 1
            assert f"{workdir}/checkpoints/2 is damaged" in caplog.text
            assert f"going on from the checkpoint before it, {workdir}/checkpoints/1" in caplog.text
            assert not (workdir / "checkpoints" / "2").exists()
            assert contents(workdir / "checkpoints" / "2.damaged") == spoilt  # kept as it was found
    assert fallbacks >= 6


def test_a_copy_of_a_checkpoint_is_not_believed_by_its_name(two_checkpoints, tmp_path, caplog):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "run")
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "7")
    assert checkpoint.restore(workdir, lambda epoch: make_state(0), FINGERPRINT).epoch == 2
    assert "checkpoints/7 is damaged (ValueError: it is of epoch 1, under another" in caplog.text


def test_a_damaged_epoch_is_saved_again_and_may_be_damaged_again(two_checkpoints, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    for _ in range(3):
        next((workdir / "checkpoints" / "2").rglob("progress/metadata")).write_text("{")
        assert checkpoint.restore(workdir, lambda epoch: make_state(0), FINGERPRINT).epoch == 1
        save(workdir, 2, keep=2)
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"1", "2", "2.damaged", "2.damaged.2", "2.damaged.3"}
    assert_same(
        checkpoint.restore(workdir, lambda epoch: make_state(0), FINGERPRINT).state, make_state(2)
    )


def refused(workdir, error, match, template=None):
    """The newest checkpoint stops the program with a message that names it, and everything stays
    where it is.
    """
    before = contents(workdir)
    with pytest.raises(error, match=match):
        checkpoint.restore(workdir, lambda epoch: template or make_state(0), FINGERPRINT)
    assert contents(workdir) == before


def test_a_file_that_cannot_be_read_is_no_damage(two_checkpoints, tmp_path):
    """A loop of links stands for whatever a file system refuses: permissions, a lost mount, an I/O
    error.
    """
    for part in ("progress", "state"):
        workdir = tmp_path / part
        shutil.copytree(two_checkpoints, workdir)
        file = next(
            path for path in (workdir / "checkpoints" / "2" / part).rglob("*") if path.is_file()
        )
        file.unlink()
        file.symlink_to(file)
        refused(workdir, OSError, "checkpoints/2 cannot be read: .*try again")


def test_a_lack_of_memory_is_no_damage(two_checkpoints, monkeypatch):
    def exhausted(state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")

    monkeypatch.setattr(checkpoint, "checksum", exhausted)
    refused(two_checkpoints, jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"step": np.zeros(2, np.int32)}, r"\['step'\]: 'int32 \[\]' there, 'int32 \[2\]' now"),
        ({"step": np.zeros((), np.float32)}, r"\['step'\]: 'int32 \[\]' there, 'float32 \[\]' now"),
        (
            {"average": np.zeros((), np.float32)},
            r"\['average'\]: '\(none\)' there, 'float32 \[\]' now",
        ),
    ],
)
def test_the_state_of_another_program_is_refused(two_checkpoints, change, expected):
    template = make_state(0) | change
    refused(
        two_checkpoints, ValueError, f"(?s)checkpoints/2 holds another state.*{expected}", template
    )


def test_an_unfinished_save_is_ignored(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp-17"
    unfinished.mkdir()
    (unfinished / "state").write_text("half")
    assert checkpoint.restore(tmp_path / "run", lambda epoch: make_state(0), FINGERPRINT).epoch == 2
    assert not unfinished.exists()


def test_nothing_whole_is_refused(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").rglob("metadata"):
        path.write_text("{")
    refused(tmp_path / "run", ValueError, r"(?s)no checkpoint .* is whole.*\n  2: .*\n  1: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"base": "other"}, "base: the base model of config.base or .* differs from the one that"),
        (
            {"lora.init": "other"},
            "lora.init: the adapter in config.lora.init is given, and the run began without one",
        ),
        ({"config.seed": 1}, "config.seed: 0 there, 1 now"),
        ({"config.new": 1}, "config.new: '\\(none\\)' there, 1 now"),
    ],
)
def test_checkpoints_and_workdirs_of_another_run_are_refused(
    two_checkpoints, tmp_path, change, expected
):
    with pytest.raises(ValueError, match=f"(?s)is of another run.*{expected}"):
        checkpoint.restore(two_checkpoints, lambda epoch: make_state(0), FINGERPRINT | change)
    checkpoint.claim(tmp_path / "run", FINGERPRINT)
    with pytest.raises(ValueError, match=f"(?s)belongs to another run.*{expected}"):
        checkpoint.claim(tmp_path / "run", FINGERPRINT | change)


# Of a run of the version before fields were renamed.
OLD_FORM = {
    "base": "abc",
    "config.seed": 0,
    "config.prompts.groups": 6,
    "config.prompts.candidates": 8,
    "config.streaming.clip": 0,
    "config.optimiser.learning_rate": 1e-3,
    "config.optimiser.clip_norm": 1.0,
}
NEW_FORM = {
    "base": "abc",
    "config.seed": 0,
    "config.prompts.prompts_per_epoch": 6,
    "config.prompts.samples_per_prompt": 8,
    "config.streaming.score_frames": 0,
    "config.optimizer.learning_rate": 1e-3,
    "config.optimizer.clip_norm": 1.0,
}


def test_a_run_of_the_old_form_is_refused_by_name(tmp_path):
    """Working directory and checkpoint say which fields have other names now, and stay as they
    are.
    """
    workdir = tmp_path / "run"
    checkpoint.claim(workdir, OLD_FORM)
    checkpoint.save(workdir, Snapshot(2, make_state(2), PROGRESS), OLD_FORM, keep=2)
    before = contents(workdir)
    for refused in (
        lambda: checkpoint.check_workdir(workdir, NEW_FORM),
        lambda: checkpoint.claim(workdir, NEW_FORM),
        lambda: checkpoint.restore(workdir, lambda epoch: make_state(0), NEW_FORM),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        message = str(error.value)
        assert "an older version of astrolabe_jax has written it" in message
        assert "give a new --workdir" in message and "export-lora" in message
        for old, new in zip(OLD_FORM, NEW_FORM, strict=True):
            assert (f"\n  {old} is {new} now" in message) == (old != new)
    assert contents(workdir) == before


def test_samples_of_the_old_form_are_not_used(tmp_path, caplog):
    samples = Snapshot(3, cut(8, make_samples(3)), SCORES)
    checkpoint.save_samples(tmp_path, samples, make_state(3)["current"], OLD_FORM)
    with caplog.at_level(logging.WARNING):
        assert in_flight(tmp_path, fingerprint=NEW_FORM) is None
    assert "an older version of astrolabe_jax has written it" in caplog.text


def test_a_run_may_go_further(two_checkpoints, tmp_path):
    longer = FINGERPRINT | {"config.train.epochs": 8}
    assert checkpoint.restore(two_checkpoints, lambda epoch: make_state(0), longer).epoch == 2
    checkpoint.claim(tmp_path / "run", FINGERPRINT)
    checkpoint.claim(tmp_path / "run", longer)


def test_files_may_move_as_long_as_their_content_stays(tmp_path):
    there = {"base": "abc", "prompts.train": "def", "prompts.test": "ghi", "lora.init": "jkl"}
    paths = {
        "config.base": "bases/a",
        "config.prompts.train": "a.txt",
        "config.prompts.test": "b.txt",
    }
    checkpoint.claim(tmp_path / "run", there | paths)
    checkpoint.claim(
        tmp_path / "run", there | {field: f"/elsewhere/{path}" for field, path in paths.items()}
    )
    for name in there:
        told = f"(?s)belongs to another run.*{name}: the [^:]*config.{name}.* differs from the one"
        with pytest.raises(ValueError, match=told):
            checkpoint.claim(tmp_path / "run", there | paths | {name: "other"})
    told = "lora.init: the adapter in config.lora.init is not given, and the run began with one"
    with pytest.raises(ValueError, match=told):
        checkpoint.claim(
            tmp_path / "run",
            {name: content for name, content in there.items() if name != "lora.init"} | paths,
        )


@pytest.mark.parametrize("content", ["", '{"base": "ab', "[1]", "\udcff"])
def test_a_broken_record_of_the_run_is_named_and_kept(tmp_path, content):
    checkpoint.claim(tmp_path, FINGERPRINT)
    broken = content.encode(errors="surrogateescape")
    (tmp_path / "run.json").write_bytes(broken)
    with pytest.raises(ValueError, match="run.json .*; give another --workdir"):
        checkpoint.claim(tmp_path, FINGERPRINT)
    assert (tmp_path / "run.json").read_bytes() == broken


def test_of_half_written_files_only_those_of_a_run_are_removed(tmp_path):
    checkpoint.claim(tmp_path, FINGERPRINT)
    ours = [
        "run.json.partial.12",
        "curves.png.partial.3",
        "lora/adapter_config.json.partial.1",
        "scores/000001.csv.partial.2",
        "samples/epoch/00.partial.mp4",
    ]
    foreign = ["thesis.partial.12", "run.json.partial.old", "notes/a.partial.1", "lora/a.partial.b"]
    for name in ours + foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    checkpoint.claim(tmp_path, FINGERPRINT)
    assert [(tmp_path / name).exists() for name in ours + foreign] == [False] * 5 + [True] * 4
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.partial.1").write_text("")
    with pytest.raises(ValueError, match="holds 'a.partial.1' but no run"):
        checkpoint.claim(tmp_path / "new", FINGERPRINT)


def test_foreign_and_unwritable_workdirs_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds 'thesis.tex' but no run"):
        checkpoint.claim(tmp_path, FINGERPRINT)
    with pytest.raises(OSError, match="cannot be written"):
        checkpoint.claim(tmp_path / "thesis.tex" / "run", FINGERPRINT)


SCORES = {"shapes_mq": [0.1, 1 / 3], "shapes_mq/steadiness": [0.0, 1.0]}


def cut(count, tree):
    """Arrays split along their first axis over so many devices; numpy stays numpy."""
    mesh = jax.make_mesh(
        (count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )
    place = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, np.ndarray) else jax.device_put(leaf, place), tree
    )


def make_samples(seed):
    """What a streaming epoch keeps: latents, a cache of bfloat16 with its places, something of the
    host.
    """
    key = jax.random.key(seed)
    cache = {
        "k": jax.random.normal(key, (8, 3, 4), jnp.bfloat16),
        "at": jnp.arange(8, dtype=jnp.int32),
    }
    return {
        "latents": jax.random.normal(key, (8, 2, 5)),
        "cache": cache,
        "start": np.arange(3, dtype=np.float32),
    }


def described(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
        ),
        tree,
    )


def in_flight(workdir, **changes):
    """restore_samples of epoch 3 of the policy 3."""
    arguments = {
        "epoch": 3,
        "template": described(cut(8, make_samples(0))),
        "policy": make_state(3)["current"],
        "fingerprint": FINGERPRINT,
    }
    return checkpoint.restore_samples(workdir, **(arguments | changes))


def save_samples(workdir, epoch=3):
    policy = make_state(epoch)["current"]
    samples = Snapshot(epoch, cut(8, make_samples(epoch)), SCORES)
    return checkpoint.save_samples(workdir, samples, policy, FINGERPRINT)


def test_samples_come_back_on_any_devices_until_they_are_learnt_from(tmp_path):
    assert in_flight(tmp_path) is None
    # in the place of those before, and of those after, when a checkpoint was damaged
    for other in (2, 4):
        save_samples(tmp_path, other)
    size = save_samples(tmp_path, 3)
    directory = tmp_path / "samples_in_flight"
    assert [path.name for path in directory.iterdir()] == ["3"]
    assert size == sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    for count in (8, 2, 1):
        template = described(cut(count, make_samples(0)))
        found = in_flight(
            tmp_path,
            template=template,
            fingerprint=FINGERPRINT | {"config.train.save_samples": True},
        )
        assert found.progress == SCORES
        assert_same(found.state, make_samples(3))
        assert found.state["cache"]["k"].dtype == jnp.bfloat16 and isinstance(
            found.state["start"], np.ndarray
        )
        assert found.state["cache"]["k"].sharding == template["cache"]["k"].sharding
    save(tmp_path, 4, keep=2)
    assert not directory.exists() and in_flight(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 2}, "of epoch 4"),
        ({"policy": make_state(2)["current"]}, "another policy has sampled them"),
        ({"fingerprint": FINGERPRINT | {"config.seed": 1}}, "is of another run"),
        (
            {"template": described(make_samples(0) | {"latents": jnp.zeros((8, 3, 5))})},
            "another state than this",
        ),
    ],
)
def test_foreign_samples_are_told_and_not_used(tmp_path, caplog, changes, reason):
    save_samples(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert in_flight(tmp_path, **changes) is None
    epoch = changes.get("epoch", 3) + 1
    assert (
        f"samples in {tmp_path}/samples_in_flight/3 are not used" in caplog.text
        and reason in caplog.text
    )
    assert f"epoch {epoch} is sampled again" in caplog.text


def test_samples_that_were_learnt_from_are_silently_left(tmp_path, caplog):
    save_samples(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert in_flight(tmp_path, epoch=4, policy=make_state(4)["current"]) is None
    assert not caplog.text


# the reader's unawaited futures
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_samples_are_told_and_never_give_wrong_values(tmp_path, caplog, loud_again):
    save_samples(tmp_path / "whole")
    unused = 0
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file() and (size := path.stat().st_size):
            workdir = tmp_path / "spoilt"
            shutil.copytree(tmp_path / "whole", workdir)
            with open(workdir / path.relative_to(tmp_path / "whole"), "r+b") as file:
                file.truncate(size // 2)
            caplog.clear()
            found = in_flight(workdir)
            if found is None:
                unused += 1
                assert "samples_in_flight/3 are not used" in caplog.text
            else:
                assert_same(found.state, make_samples(3))
            shutil.rmtree(workdir)
    assert unused >= 4


@pytest.mark.parametrize(
    ("option", "may"),
    [
        ("path", True),
        ("url", True),
        ("frames_per_batch", True),
        ("pairs_per_batch", True),
        ("weight", False),
        ("frame_stride", False),
        ("published", False),
    ],
)
def test_options_that_say_where_and_how_a_reward_is_computed_may_differ(tmp_path, option, may):
    name = f"config.rewards.hpsv3.{option}"
    checkpoint.claim(tmp_path, FINGERPRINT | {name: 1})
    if may:
        checkpoint.claim(tmp_path, FINGERPRINT | {name: 2})
    else:
        told = name.removesuffix(".weight")  # which is that of a reward without options, too
        with pytest.raises(ValueError, match=f"belongs to another run.*\n  {told}: 1 there, 2 now"):
            checkpoint.claim(tmp_path, FINGERPRINT | {name: 2})


@pytest.mark.parametrize("name", ["checkpoints", "samples", "lora", "scores", "tensorboard"])
def test_a_folder_of_another_user_is_named_before_anything_is_loaded(tmp_path, monkeypatch, name):
    checkpoint.claim(tmp_path, FINGERPRINT)
    (tmp_path / name).mkdir()
    checkpoint.check_workdir(tmp_path, FINGERPRINT)
    made = tempfile.TemporaryFile

    def denied(dir):
        if dir == tmp_path / name:
            raise PermissionError(13, "Permission denied")
        return made(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    told = f"workdir {tmp_path} cannot be written .{tmp_path / name} takes no files.: Permission"
    with pytest.raises(OSError, match=told):
        checkpoint.check_workdir(tmp_path, FINGERPRINT)


def test_a_weight_is_the_same_as_a_number_and_as_an_option(tmp_path):
    alone = FINGERPRINT | {"config.rewards.a": 1.0}
    option = FINGERPRINT | {"config.rewards.a.weight": 1.0}
    checkpoint.claim(tmp_path, alone)
    checkpoint.check_workdir(tmp_path, option)
    checkpoint.claim(tmp_path, option)
    checkpoint.check_workdir(tmp_path, alone)


def test_a_refused_write_names_the_checkpoint_and_leaves_the_one_before(tmp_path, loud_again):
    """A limit on the size of files stands for a full disk."""
    save(tmp_path, 1, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(
            OSError, match=f"{tmp_path}/checkpoints/2 cannot be written: File too large; make room"
        ):
            save(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.restore(tmp_path, lambda epoch: make_state(0), FINGERPRINT).epoch == 1
    save(tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
