"""Remote rewards against a real HTTP server in this process."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards import remote

SETTING = rewards.Setting(None, 16.0)
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 6, 3), np.uint8)
PROMPTS = ["a cat", "a dog", "a cow"]


@contextlib.contextmanager
def serving(answer):
    """Its URL, and what it was asked: answer(number, path, headers, body) -> (status, JSON-able or
    bytes).
    """
    asked, busy, lock = [], {"now": 0, "most": 0}, threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(asked)
                asked.append((self.path, dict(self.headers), body))
                busy["now"] += 1
                busy["most"] = max(busy.values())
            status, content = answer(number, body)
            with lock:
                busy["now"] -= 1
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            with contextlib.suppress(OSError):  # who asked has gone
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.busy, server.url = asked, busy, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setitem(
        rewards.TABLE, "taste", rewards.Reward(load="astrolabe_jax.rewards.remote:load")
    )


def scorer(server, **options):
    options = remote.ServerOptions(url=f"{server.url}/score", **options)
    return remote.load(("taste", "smell"), SETTING, options)


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def brightness(number, body):
    mean = float(np.mean([pixels(frame).mean() for frame in body["frames"]]))
    return 200, {"scores": {"taste": mean, "smell": len(body["prompt"])}}


def test_every_video_is_asked_about_as_the_contract_says():
    with serving(brightness) as server:
        scores = scorer(server).score(None, FRAMES, PROMPTS)
        asked = sorted(
            (body for _, _, body in server.asked), key=lambda body: PROMPTS.index(body["prompt"])
        )
    for body, video, prompt in zip(asked, FRAMES, PROMPTS, strict=True):
        assert (
            body["rewards"] == ["taste", "smell"]
            and body["prompt"] == prompt
            and body["fps"] == 16.0
        )
        # png loses nothing
        np.testing.assert_array_equal([pixels(frame) for frame in body["frames"]], video)
    np.testing.assert_allclose(scores["taste"], FRAMES.mean((1, 2, 3, 4)), rtol=1e-6)
    assert list(scores["smell"]) == [5, 5, 5]


def test_some_frames_and_jpeg():
    with serving(brightness) as server:
        scorer(server, frames=2, format="jpeg").score(None, FRAMES[:1], PROMPTS[:1])
        frames = [pixels(frame) for frame in server.asked[0][2]["frames"]]
    assert len(frames) == 2 and frames[0].shape == FRAMES.shape[2:]


def test_requests_run_at_once_up_to_a_bound():
    def slow(number, body):
        time.sleep(0.05)
        return brightness(number, body)

    with serving(slow) as server:
        scorer(server, concurrency=2).score(None, np.repeat(FRAMES, 3, 0), PROMPTS * 3)
        assert server.busy["most"] == 2


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_may_pass_is_tried_again(status):
    with serving(
        lambda number, body: brightness(number, body) if number > 1 else (status, b"busy")
    ) as server:
        scores = scorer(server, concurrency=1, retries=2).score(None, FRAMES[:1], PROMPTS[:1])
        assert len(server.asked) == 3 and list(scores["smell"]) == [5]


@pytest.mark.parametrize(
    ("status", "content", "message", "asked"),
    [
        (400, b"no such reward", "/score refuses the request with status 400: 'no such reward'", 1),
        (
            503,
            b"busy",
            "/score cannot be had after 3 tries, the last one with status 503: 'busy'",
            3,
        ),
        (200, b"<html>", "/score does not answer in JSON", 1),
        (200, {"score": 1}, "the answer is .*; expected .*with numbers for taste", 1),
        (200, {"scores": {"taste": "good"}}, "expected .* with numbers for taste", 1),
    ],
)
def test_a_failure_names_reward_sample_and_server(status, content, message, asked):
    with serving(lambda number, body: (status, content)) as server:
        value = {"weight": 1.0, "url": f"{server.url}/score", "retries": 2}
        (loaded,) = rewards.load({"taste": value}, SETTING)
        with pytest.raises(
            rewards.RewardError, match=f"'taste' failed on sample 7 .prompt 'a cat'.: .*{message}"
        ):
            rewards.score(loaded, FRAMES[:1], PROMPTS[:1], [7])
        assert len(server.asked) == asked


@pytest.mark.parametrize(("value", "kind"), [("NaN", "nan"), ("Infinity", "inf")])
def test_a_number_that_is_none_is_refused(value, kind):
    with serving(
        lambda number, body: (200, f'{{"scores": {{"taste": {value}}}}}'.encode())
    ) as server:
        (loaded,) = rewards.load({"taste": {"weight": 1.0, "url": server.url}}, SETTING)
        with pytest.raises(rewards.RewardError, match=f"'taste' is {kind} for sample 0"):
            rewards.score(loaded, FRAMES, PROMPTS, range(3))


def test_a_server_that_is_silent_or_away_is_told_apart_from_none():
    with serving(lambda number, body: (time.sleep(0.5), (200, {}))[1]) as server:
        with pytest.raises(
            rewards.SampleError, match="after 2 tries, the last one with .*timed out"
        ):
            scorer(server, timeout=0.1, retries=1).score(None, FRAMES[:1], PROMPTS[:1])
        url = server.url
    with pytest.raises(rewards.SampleError, match="after 1 tries, the last one with .*refused"):
        options = remote.ServerOptions(url=url, retries=0)
        remote.load(("taste",), SETTING, options).score(None, FRAMES[:1], PROMPTS[:1])


def test_a_fallback_stands_for_a_video_that_cannot_be_had():
    with serving(
        lambda number, body: brightness(number, body) if "dog" in body["prompt"] else (400, b"")
    ) as server:
        scores = scorer(server, fallback=-1.0).score(None, FRAMES, PROMPTS)
    assert list(scores["smell"]) == [-1, 5, -1]


def test_the_key_is_sent_and_not_told(monkeypatch):
    monkeypatch.setenv("TASTE_KEY", "sesame")
    with serving(lambda number, body: (401, b"who are you")) as server:
        with pytest.raises(rewards.SampleError) as caught:
            scorer(server, key_variable="TASTE_KEY").score(None, FRAMES[:1], PROMPTS[:1])
        assert server.asked[0][1]["Authorization"] == "Bearer sesame"
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url is '127.0.0.1:8000'; expected http://"),
        ({"timeout": 0}, "timeout is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"format": "gif"}, "format is 'gif'; expected one of png, jpeg"),
        ({"key_variable": "NO_SUCH_KEY"}, "key_variable is 'NO_SUCH_KEY', which is not set"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        remote.ServerOptions(**({"url": "http://127.0.0.1:1"} | options))


QUESTION = "Look at it.\nFinal Score:\nText Caption: [{prompt}]"


@pytest.fixture
def template(monkeypatch):
    """As if the published text were QUESTION."""
    monkeypatch.setattr(remote, "read_template", lambda path, published: QUESTION)
    return "rewards.py"


def test_unified_reward_asks_about_frames_and_reads_the_score(template):
    replies = ["Thoughts. Final Score: 4.5", "Final Score:\n3", "Final Score: 5"]

    def answer(number, body):
        return 200, {"choices": [{"message": {"content": replies[number % 3]}}]}

    with serving(answer) as server:
        options = remote.UnifiedRewardOptions(template=template, url=f"{server.url}/v1", frames=3)
        unified = remote.load_unified(("unifiedreward",), SETTING, options)
        scores = unified.score(None, FRAMES[:1], ["a {cat}"])
        path, _, body = server.asked[0]
    assert (
        path == "/v1/chat/completions"
        and body["model"] == "UnifiedReward-7b-v1.5"
        and body["temperature"] == 0
    )
    image, text = body["messages"][0]["content"]
    assert text["text"] == "Look at it.\nFinal Score:\nText Caption: [a {cat}]"
    seen = pixels(image["image_url"]["url"].removeprefix("data:image;base64,"))
    expected = np.asarray(
        Image.fromarray(FRAMES[0, 0]).resize((512, 512), Image.Resampling.BICUBIC)
    )
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_allclose(scores["unifiedreward"], (4.5 + 3 + 5) / 15, rtol=1e-6)


@pytest.mark.parametrize("reply", ["Final Score: 7", "I like it", ""])
def test_an_answer_without_a_score_is_no_score(template, reply):
    answer = (200, {"choices": [{"message": {"content": reply}}]})
    with serving(lambda number, body: answer) as server:
        options = remote.UnifiedRewardOptions(template=template, url=server.url, frames=1)
        unified = remote.load_unified(("unifiedreward",), SETTING, options)
        with pytest.raises(rewards.SampleError, match="no 'Final Score:' of 1 to 5"):
            unified.score(None, FRAMES[:1], PROMPTS[:1])
