"""Training on windows of long videos, epoch by epoch through the real conductor, every variant."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from astrolabe_jax import advantages, evaluate, prompts, sharding, train
from astrolabe_jax.config import flatten
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.runtime.preemption import Stopped
from astrolabe_jax.streaming import windows
from astrolabe_jax.types import RngStream, Segment
from astrolabe_jax.update import TrainStep
from tests.e2e import runs
from tests.models import tiny
from tests.policies import assert_same_state

ONE = {"streaming.prompts_per_device": 2}
PLAIN = "a red circle moving left on a grey background"
SECOND = "a red circle moving right on a grey background"
# Fields that are compiled into a train step.
COMPILED = (
    "loss",
    "mesh",
    "model",
    "sampler",
    "lora",
    "optimizer",
    "advantages",
    "streaming.prefix",
    "streaming.backprop",
)


CONTRAST = {"contrast": 1.0}


def contrast(frames, prompts):
    """A reward that needs no compilation, and is not the mean of a video's parts."""
    return frames.std(axis=(1, 2, 3, 4)) / 128


def lack_of_red(frames, prompts):
    """A reward whose scale is a hundred times that of the other."""
    return -100 * frames[..., 0].mean(axis=(1, 2, 3)) / 256


@pytest.fixture(scope="module", autouse=True)
def rewards_of_pixels():
    """For tests of many clips: each length would compile the rewards of the world anew."""
    here = {
        name: rewards.Reward(f"tests.e2e.test_windows:{name}")
        for name in ("contrast", "lack_of_red")
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(rewards, "TABLE", rewards.TABLE | here)
        yield


def window_config(base, rewards=None, **changes):
    """Return the config of a small run of windows, with the demo's rewards or others."""
    config = runs.small_config(base, **runs.WINDOWS | changes)
    config.rewards = rewards or config.rewards
    return config


STEPS = {}


def step_of(run):
    """The train step of a run, compiled once for all that have the same."""
    fields = json.dumps(
        {field: value for field, value in flatten(run.config).items() if field.startswith(COMPILED)}
    )
    key = fields, run.layout, run.mesh
    if key not in STEPS:
        STEPS[key] = TrainStep(run.config, run.base.transformer.graphdef, run.layout, run.mesh)
    return STEPS[key]


class Made:
    """Some epochs of a run."""

    def __init__(self, run, epochs=1, starts=None):
        run = run._replace(adapter=jax.device_get(tiny.adapter()), starts=starts or run.starts)
        self.run = run
        self.point = runs.resumed(run)
        self.records = []  # of each epoch, as what follows
        self.segments = []
        self.prefixes = []
        collect = windows.collect

        def kept(*arguments):
            segment = collect(*arguments)
            self.segments.append(segment)
            # progressive streams are taken when they go on
            self.prefixes.append(jax.device_get(segment.prefixes))
            self.latents = np.asarray(segment.latents)
            return segment

        with pytest.MonkeyPatch.context() as monkeypatch, jax.set_mesh(run.mesh):
            monkeypatch.setattr(windows, "collect", kept)
            for _ in range(epochs):
                self.point, record = train.epoch(run, self.point, step_of(run), runs.quiet())
                self.records.append(record)
        self.state = jax.device_get(self.point.train)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """made(changes, epochs, devices, starts, rewards): epochs of a run of windows."""

    def make(changes=None, epochs=1, devices=1, starts=None, rewards=None):
        fields = (ONE if devices == 1 else {}) | (changes or {})
        config = window_config(base, rewards, **fields)
        return Made(
            runs.prepared(config, tmp_path_factory.mktemp("runs") / "run", devices), epochs, starts
        )

    return make


def collected(run, start: int) -> Segment:
    """Return what a first epoch collects in the window at `start`; nothing is learnt from it."""
    progress = runs.quiet()
    with jax.set_mesh(run.mesh):
        batch = train.draw_prompts(run, 0)
        length = run.latent_shape[0]
        videos = windows.encode_videos(run, batch, RngStream.ROLLOUT, 0, length, progress)
        adapter = sharding.replicate(run.mesh, run.adapter)
        return windows.collect(run, adapter, videos, start, [], progress, "sampling")


def assert_same_epoch(one, other):
    """Videos, figures and policies agree to rounding; bytes of frames, which rewards read, may
    differ by one.
    """
    np.testing.assert_allclose(one.latents, other.latents, atol=2e-5)
    for a, b in zip(one.records, other.records, strict=True):
        for name in set(a) - {"seconds", "kind"}:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
    assert_same_state(one.state, other.state)


def assert_learnt(made):
    for record in made.records:
        assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))
        assert record["grad_norm"] > 0
    assert np.isfinite(made.latents).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"streaming.prefix": "noised_prefix", "loss.context": "noisy"},
        {"loss.kind": "diffusion_nft", "loss.mask_block": 1},
        {"streaming.sampling": "sequence", "loss.context": "noisy"},
        {"streaming.backprop": "full", "streaming.reward": "full"},
    ],
    ids=str,
)
def test_every_variant_learns(made, changes):
    epochs = made(changes, epochs=1, starts=(4,))
    assert_learnt(epochs)
    assert epochs.records[0]["window_start"] == 4


@pytest.mark.slow
def test_rewards_of_other_frames_are_others(made):
    scored = {
        kind: made({"streaming.reward": kind}, starts=(4,))
        for kind in ("window_stream", "window_alone", "full")
    }
    for kind in ("window_alone", "full"):
        assert_learnt(scored[kind])
        np.testing.assert_array_equal(scored[kind].latents, scored["window_stream"].latents)
        assert (
            scored[kind].records[0]["total_reward"]
            != scored["window_stream"].records[0]["total_reward"]
        )


COMPILED_NOW = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **kwargs: (
        COMPILED_NOW.append(kwargs.get("fun_name")) if "backend_compile" in event else None
    )
)


@pytest.mark.slow
def test_one_program_serves_every_start(made):
    """At frame 0 the decoder has other programs, since it remembers nothing; those of the network
    are the same.

    Besides them only the latents of as many blocks are put together, and cut for the decoder.
    """
    made(starts=(2,))
    sizes = set()
    for start in (0, 4, 3):
        COMPILED_NOW.clear()
        there = made(starts=(start,))
        segment = there.segments[0]
        held = jax.tree.leaves((segment.prefixes, segment.whole))
        sizes.add(sum(leaf.nbytes for leaf in held))
        allowed = {"jit(concatenate)", "jit(dynamic_slice)"}
        if start == 0:
            allowed |= {"jit(fork)", "jit(decode_chunk)", "jit(decode_chunks)", "jit(_score_video)"}
        assert set(COMPILED_NOW) <= allowed, COMPILED_NOW
    assert len(sizes) == 1  # what the loss reads does not grow with the video


@pytest.mark.parametrize("context", ["clean", pytest.param("noisy", marks=pytest.mark.slow)])
def test_at_frame_0_a_clip_is_a_sequence(made, context):
    one, other = (
        made({"loss.context": context, "streaming.sampling": sampling}, starts=(0,))
        for sampling in ("clip", "sequence")
    )
    assert_same_epoch(one, other)


@pytest.mark.slow
def test_full_sequences_at_frame_0_are_the_training_of_short_videos(made, base, tmp_path):
    """Of as many frames, with gradients through the clean context."""
    fields = {"streaming.sampling": "sequence", "streaming.backprop": "full"}
    window = made(fields, starts=(0,))
    short = {
        "video.frames": 5,
        "eval.frames": 0,
        "streaming.window": 0,
        "loss.context_gradient": True,
    }
    run = runs.prepared(window_config(base, **short), tmp_path / "short")
    run = run._replace(adapter=jax.device_get(tiny.adapter()))
    with jax.set_mesh(run.mesh):
        point, record = train.epoch(run, train.resume(run), step_of(run), runs.quiet())
    for name in set(record) - {"seconds", "kind"}:
        np.testing.assert_allclose(window.records[0][name], record[name], rtol=2e-4, err_msg=name)
    assert_same_state(window.state, jax.device_get(point.train))


@pytest.mark.slow
@pytest.mark.parametrize("start", [2, 4])
def test_keys_made_by_each_policy_are_those_of_the_rollout_while_nothing_is_evicted(made, start):
    """In the first epoch, where the policies are equal; afterwards deep layers differ."""
    one, other = (
        made({"streaming.prefix": prefix}, starts=(start,))
        for prefix in ("rollout_old", "per_policy")
    )
    if start <= 3 - 1:  # capacity less a block
        assert_same_epoch(one, other)
    else:
        np.testing.assert_allclose(one.latents, other.latents, atol=2e-5)
        assert abs(one.records[0]["policy_loss"] / other.records[0]["policy_loss"] - 1) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"streaming.prompts_per_device": 1, "sampler.batch": 4, "optimizer.microbatch": 4}, 1),
        ({"mesh.samples_per_device": 4}, 1),
        ({}, 2),
        ({}, 4),  # more devices than prompts
        ({"mesh.samples_per_device": 1}, 4),
        ({}, 8),
    ],
)
def test_devices_and_pieces_do_not_change_an_epoch(made, changes, devices):
    assert_same_epoch(made(changes, devices=devices, starts=(4,)), made(starts=(4,)))


# Progressive streams.


@pytest.fixture(scope="module")
def progressive(made):
    """Return the epochs of a run by its continuation; two rewards disagree which is the best."""

    def run(continuation):
        changes = {"streaming.mode": "progressive", "streaming.continuation": continuation}
        if continuation != "best":
            return made(changes, epochs=3)
        weights = CONTRAST | {"lack_of_red": 1.0}
        return made(changes | {"advantages.standardise": True}, epochs=3, rewards=weights)

    return functools.cache(run)


@pytest.mark.parametrize("continuation", ["uniform", "best", "first"])
def test_a_progressive_stream_goes_on_with_one_of_its_videos(made, progressive, continuation):
    """Its past is what was chosen in the windows before; at the video's end there are new
    prompts.
    """
    epochs = progressive(continuation)
    assert_learnt(epochs)
    assert [record["window_start"] for record in epochs.records] == [
        0,
        2,
        4,
    ] and not epochs.point.streams
    run, weights = epochs.run, dict(epochs.run.config.rewards)
    before = [np.zeros((2, 0, *run.latent_shape[1:]), np.float32)]
    taken = []
    best_by_sum = []
    for epoch, drawn in enumerate(epochs.segments):
        batch = prompts.draw(
            run.train_prompts, run.config.seed, windows.prompt_draw(run, epoch), 2, 4, 1
        )
        assert (
            batch.index[0] == prompts.draw(run.train_prompts, run.config.seed, 0, 2, 4, 1).index[0]
        )
        scores = {name: drawn.scores[name] for name in weights}
        maximised = advantages.total_reward(advantages.standardise(scores), weights)
        chosen = windows.continuations(run, batch, maximised, epoch)
        places = [chosen[int(batch.index[first])] for first in (0, 4)]
        total = advantages.total_reward(scores, weights)
        best_by_sum += [int(np.argmax(total[:4])), 4 + int(np.argmax(total[4:]))]
        if continuation == "best":
            assert places == [int(np.argmax(maximised[:4])), 4 + int(np.argmax(maximised[4:]))]
        elif continuation == "first":
            assert places == [0, 4]
        taken += places
        before.append(np.asarray(drawn.latents)[places])
    assert continuation != "best" or taken != best_by_sum  # which the larger reward decides alone
    video = np.concatenate(before, axis=1)
    assert video.shape[1] == 6
    (last,) = epochs.prefixes[-1]
    np.testing.assert_array_equal(last.recent, video[:, 1:4])
    np.testing.assert_array_equal(last.first, video[:, :1])
    following = prompts.draw(
        run.train_prompts, run.config.seed, windows.prompt_draw(run, 3), 2, 4, 1
    )
    assert set(following.index).isdisjoint(batch.index)


def test_held_out_videos_are_scored_clip_by_clip(base, tmp_path):
    """The same videos of six frames, cut into other clips; a single one has no late part."""
    shown = {}
    scores = {}
    for window in (2, 3, 6):
        changes = {"eval.frames": 0, "streaming.window": 6, "streaming.score_frames": window}
        config = window_config(base, CONTRAST, **ONE | changes)
        run = runs.prepared(config, tmp_path / str(window), 1)
        with jax.set_mesh(run.mesh):
            scores[window], shown[window] = evaluate.evaluate(
                run, run.adapter, runs.quiet(), "held-out"
            )
    np.testing.assert_array_equal(shown[6], shown[2])
    np.testing.assert_array_equal(shown[3], shown[2])
    assert set(scores[6]) == {*config.rewards, "total"}
    for window in (2, 3):
        evaluation = scores[window]
        begins = [f"total/{first}" for first in range(0, 6, window)]
        assert [name for name in evaluation if name.startswith("total/")] == begins
        np.testing.assert_allclose(
            evaluation["total"], np.mean([evaluation[name] for name in begins], axis=0)
        )
    np.testing.assert_array_equal(scores[2]["late"], scores[2]["total/4"])
    np.testing.assert_array_equal(scores[3]["late"], scores[3]["total/3"])
    assert np.ptp(np.stack([found["total"] for found in scores.values()]), axis=0).max() > 1e-3


@pytest.mark.parametrize(
    "changes, start",
    [
        ({}, 2),
        pytest.param({}, 0, marks=pytest.mark.slow),
        pytest.param({"streaming.reward": "full"}, 2, marks=pytest.mark.slow),
        pytest.param({"streaming.reward": "window_alone"}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_window_has_the_mean_of_its_clips(made, changes, start):
    """The frames that are scored, cut by hand: of a window of four, two clips of two latent
    frames.
    """
    calls = []
    score_async = windows.score_async

    def kept(run, frames, texts, numbers, progress):
        wait = score_async(run, frames, texts, numbers, progress)
        calls.append((frames, numbers, wait))
        return wait

    changes = changes | {"streaming.window": 4}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(windows, "score_async", kept)
        collected(made(changes, epochs=0, rewards=CONTRAST).run, start)
        frames, numbers, _ = calls.pop()
        clips = changes | {"streaming.score_frames": 2}
        cut = collected(made(clips, epochs=0, rewards=CONTRAST).run, start)
    length = 4 * (4 + start * (changes.get("streaming.reward") == "full"))
    length -= 3 * (start == 0 or "streaming.reward" in changes)
    assert frames.shape[1] == length and len(calls) > 1
    np.testing.assert_array_equal(np.concatenate([clip for clip, _, _ in calls], axis=1), frames)
    assert [clip.shape[1] for clip, _, _ in calls[1:]] == [8] * (len(calls) - 1)
    scores = [wait() for _, _, wait in calls]
    for name, values in cut.scores.items():
        np.testing.assert_array_equal(
            values[numbers], np.mean([clip[name] for clip in scores], axis=0), err_msg=name
        )


def test_every_video_is_chosen_now_and_then(made):
    run = made({"streaming.mode": "progressive"}, epochs=0).run
    batch = prompts.draw(run.train_prompts, 0, 0, 2, 4, 1)
    drawn = [windows.continuations(run, batch, np.zeros(8), epoch) for epoch in range(200)]
    counts = np.bincount([place for chosen in drawn for place in chosen.values()], minlength=8)
    assert counts.min() > 30 and counts.max() < 70


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_do_not_change_progressive_streams(made, devices):
    """With a rate of 0, since a first step of Adam takes the sign of rounding for a gradient."""
    still = {"optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0}
    changes = {"streaming.mode": "progressive", "streaming.continuation": "first", **still}
    one, other = (made(changes, epochs=3, devices=count) for count in (1, devices))
    for a, b in zip(one.segments, other.segments, strict=True):
        np.testing.assert_allclose(a.latents, b.latents, atol=2e-5)
    for a, b in zip(one.records, other.records, strict=True):
        for name in ("total_loss", "policy_loss", "total_reward", "window_start"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    "reward", ["window_stream", pytest.param("window_alone", marks=pytest.mark.slow)]
)
def test_keys_that_are_made_anew_follow_the_policy(made, progressive, reward):
    changes = {
        "streaming.mode": "progressive",
        "streaming.continuation": "first",
        "streaming.reward": reward,
    }
    epochs = made(changes | {"streaming.recache_on_update": True}, epochs=3)
    assert_learnt(epochs)
    np.testing.assert_array_equal(
        epochs.segments[0].latents, progressive("first").segments[0].latents
    )
    both = zip(epochs.segments, progressive("first").segments, strict=True)
    apart = [np.abs(np.asarray(one.latents) - other.latents).max() for one, other in both]
    # the window before was put behind its past by the policy that samples this one
    assert apart[1] < 2e-5
    assert apart[2] > 1e-4


# Prompts that change on the way.


AT_THE_SAME = (f"{PLAIN}[0.5s] | {SECOND}", f"{SECOND}[0.5s] | {PLAIN}")
ANYWHERE = (f"{PLAIN}[0.5s] | {SECOND}", PLAIN, f"{SECOND}[1s] | {PLAIN}")


@pytest.mark.parametrize(
    ("transition", "scenes", "mode"),
    [
        ("recache", ANYWHERE, "epoch"),
        ("flush", AT_THE_SAME, "progressive"),
        pytest.param("recache", ANYWHERE, "progressive", marks=pytest.mark.slow),
        pytest.param("cut", AT_THE_SAME, "epoch", marks=pytest.mark.slow),
    ],
)
def test_prompts_change_between_windows(made, tmp_path, transition, scenes, mode):
    """Of 16 frames a second, 4 a latent frame: half a second is a window of two."""
    (tmp_path / "list.txt").write_text("\n".join(scenes))
    fields = {
        "prompts.train": str(tmp_path / "list.txt"),
        "prompts.test": str(tmp_path / "list.txt"),
    }
    fields |= {
        "eval.frames": 21,
        "scenes.transition": transition,
        "streaming.mode": mode,
        "streaming.selection": "choices",
    }
    judged = []
    judge = windows.score_async
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            windows, "score_async", lambda run, *rest: judged.append(rest[1]) or judge(run, *rest)
        )
        epochs = made(fields | {"streaming.starts": (0, 2, 4)}, epochs=3)
    assert_learnt(epochs)
    for epoch, texts in enumerate(judged):
        batch = prompts.draw(
            epochs.run.train_prompts, 0, windows.prompt_draw(epochs.run, epoch), 2, 4, 1
        )
        start = epochs.records[epoch]["window_start"]
        for text, story in zip(texts, batch.texts, strict=True):
            parts = [part.strip() for part in story.split("|")]
            changes = 4 if "[1s]" in story else 2
            assert text == (parts[-1] if start >= changes else parts[0].split("[")[0].strip())


# Runs in pieces.


@pytest.fixture(scope="module")
def go(base):
    """go(workdir, changes, devices, check): a run to its end, or on; its config and summary."""

    def run_on(workdir, changes=None, devices=1, check=lambda: None):
        fields = (
            runs.PROGRESSIVE
            | (ONE if devices == 1 else {})
            | {"train.checkpoint_every": 1}
            | (changes or {})
        )
        run = runs.prepared(window_config(base, **fields), workdir, devices)
        return run, runs.go_on(run, check)

    return run_on


@pytest.fixture(scope="module")
def undisturbed(go, tmp_path_factory):
    """Three windows of one set of streams, and the first of the next."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    go(workdir)
    return workdir


def assert_same_end(run, one, other):
    """Outcomes and checkpoints, streams too, bit for bit."""
    first, second = runs.outcome(one), runs.outcome(other)
    for key in first:
        assert first[key] == second[key], key
    points = [runs.resumed(run._replace(workdir=workdir)) for workdir in (one, other)]
    assert points[0].epoch == points[1].epoch
    assert len(points[0].streams) == 1
    jax.tree.map(np.testing.assert_array_equal, *((point.train, point.streams) for point in points))


@pytest.mark.parametrize(
    "stop", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_in_the_middle_of_its_streams(go, undisturbed, tmp_path, stop):
    """After the first, the second or the last window, with and without saved samples: bit for
    bit.
    """
    go(tmp_path / "run", {"train.epochs": stop, "train.save_samples": stop == 2})
    run, _ = go(tmp_path / "run")
    assert_same_end(run, undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_streams_go_on_on_other_devices(go, undisturbed, tmp_path):
    """To rounding: two prompts on four devices, so that each stream is there twice."""
    go(tmp_path / "run", {"train.epochs": 2})
    run, _ = go(tmp_path / "run", devices=4)
    points = [
        runs.resumed(run._replace(workdir=workdir)) for workdir in (undisturbed, tmp_path / "run")
    ]
    assert_same_state(*(jax.device_get(point.train) for point in points), atol=2e-5)
    for a, b in zip(*(jax.tree.leaves(point.streams) for point in points), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.parametrize(
    ("save", "every", "saved"),
    [
        ("sequence_end", 1, [3, 6, 9, 12, 14]),
        ("sequence_end", 4, [6, 9, 12, 14]),  # not where 3 and 4 meet, at 12
        ("sequence_end", 10, [12, 14]),
        ("full", 4, [4, 8, 12, 14]),
    ],
)
def test_checkpoints_that_fall_due_in_the_middle_of_streams_follow_at_their_end(
    base, save, every, saved
):
    fields = {"streaming.save": save, "train.epochs": 14, "train.checkpoint_every": every}
    run = types.SimpleNamespace(
        config=window_config(base, **runs.PROGRESSIVE | fields), starts=(0, 2, 4)
    )
    states = [
        train.RunState(epoch, *(None,) * 3, {}, [] if epoch % 3 == 0 else [None])
        for epoch in range(1, 15)
    ]
    assert [state.epoch for state in states if train.to_be_saved(run, state)] == saved


@pytest.mark.slow
def test_checkpoints_wait_for_the_end_of_streams(go, undisturbed, tmp_path):
    """streaming.save 'sequence_end': there is one where no streams are, and at the end; the run is
    the same.
    """
    fields = {"streaming.save": "sequence_end", "train.checkpoints_kept": 9}
    run, _ = go(tmp_path / "run", fields)
    assert {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()} == {3, 4}
    assert_same_end(run, undisturbed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("save", ["full", "sequence_end"])
def test_a_stop_during_an_update_saves_the_epoch_and_its_streams(
    go, undisturbed, tmp_path, monkeypatch, save
):
    stops, blend = [], train.blend_old

    def stopped(*arguments):
        stops.append(None)
        return blend(*arguments)

    def check():
        if len(stops) == 2:
            stops.append(None)
            raise Stopped("enough")

    monkeypatch.setattr(train, "blend_old", stopped)
    run, summary = go(tmp_path / "run", {"streaming.save": save}, check=check)
    assert summary is None and runs.resumed(run).epoch == 2
    monkeypatch.undo()
    run, _ = go(tmp_path / "run", {"streaming.save": save})
    assert_same_end(run, undisturbed, tmp_path / "run")


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"streaming.mode": "epoch"},
        {"streaming.recache_on_update": True},
        {"streaming.mode": "epoch", "streaming.prefix": "per_policy"},
        {"streaming.mode": "epoch", "streaming.backprop": "full"},
        {"streaming.mode": "epoch", "streaming.sampling": "sequence"},
    ],
    ids=str,
)
def test_samples_of_windows_are_saved_with_their_pasts(go, tmp_path, monkeypatch, capsys, changes):
    """Killed in the update behind them, the epoch is not sampled again, and ends in the same
    bits.
    """
    fields = {
        "train.save_samples": True,
        "train.epochs": 2,
        "streaming.selection": "last",
    } | changes
    go(tmp_path / "whole", fields)
    blend, calls = train.blend_old, []

    def killed(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise Killed
        return blend(*arguments)

    monkeypatch.setattr(train, "blend_old", killed)
    with pytest.raises(Killed):
        go(tmp_path / "run", fields)
    monkeypatch.setattr(train, "blend_old", blend)
    monkeypatch.setattr(
        windows, "score_async", None
    )  # nothing is scored before the last evaluation
    capsys.readouterr()
    with pytest.raises(TypeError):
        go(tmp_path / "run", fields)
    assert "epoch 2 goes on with the samples that were saved" in capsys.readouterr().out
    monkeypatch.undo()
    go(tmp_path / "run", fields)
    first, second = runs.outcome(tmp_path / "whole"), runs.outcome(tmp_path / "run")
    for key in first:
        assert first[key] == second[key], key
