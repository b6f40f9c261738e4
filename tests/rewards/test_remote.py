"""Remote rewards against a real HTTP server in this process."""

import base64
import collections
import contextlib
import email.utils
import gzip
import http.server
import io
import json
import os
import re
import subprocess
import sys
import textwrap
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
ENCODED = "bytes in Content-Encoding {!r}, not plain text"


@contextlib.contextmanager
def serving(answer):
    """Its URL, and what it was asked: answer(number, body) -> (status, JSON-able or bytes, headers
    if any).
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
            status, content, *headers = answer(number, body)
            with lock:
                busy["now"] -= 1
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            with contextlib.suppress(OSError):  # who asked has gone
                self.send_response(status)
                for name, value in {"Content-Length": len(content), **dict(*headers)}.items():
                    self.send_header(name, str(value))
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
        (200, {"scores": {"taste": True}}, "true.* with numbers for taste", 1),
        (200, {"scores": {"taste": "0.5"}}, "expected .* with numbers for taste", 1),
        (200, {"scores": {"taste": None}}, "null.* with numbers for taste", 1),
        (200, {"scores": {"taste": [0.5]}}, "expected .* with numbers for taste", 1),
        (200, {"scores": {"taste": 10**400}}, "does not answer in JSON: a number of 401", 1),
        (200, b"[" * 100_000, "/score does not answer in JSON", 1),
        (
            200,
            {"scores": {"taste": 0.5}, "why": "x" * remote.ANSWER_LIMIT},
            "/score answers with more than 1,048,576 bytes; expected the scores alone",
            1,
        ),
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


@pytest.mark.parametrize(
    ("content", "headers", "told"),
    [
        (b"<html>\n<b>\x1b[2J sesame " + b"x" * 200, {}, r"'<html>\n<b>\x1b[2J *** xxx"),
        (b"", {}, "nothing"),
        (b"\n", {}, "nothing"),
        (gzip.compress(b"{}", mtime=0), {"Content-Encoding": "gzip"}, ENCODED.format("gzip")),
        (b"", {"Content-Encoding": "br sesame"}, ENCODED.format("br ***")),
        (b"busy", {"Content-Encoding": "identity"}, "'busy'"),
    ],
)
def test_what_came_in_place_of_json_is_told(monkeypatch, content, headers, told):
    monkeypatch.setenv("TASTE_KEY", "sesame")
    for status, expected in (
        (200, f"/score does not answer in JSON: Expecting value: .*; it answers {re.escape(told)}"),
        (400, f"/score refuses the request with status 400: {re.escape(told)}"),
    ):
        with serving(lambda number, body, status=status: (status, content, headers)) as server:
            with pytest.raises(rewards.SampleError, match=expected) as caught:
                scorer(server, key_variable="TASTE_KEY").score(None, FRAMES[:1], PROMPTS[:1])
        text = str(caught.value)
        assert "sesame" not in text and text.isprintable() and text.count("x") <= remote.QUOTED


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400"])
def test_a_number_that_is_none_is_refused(value):
    with serving(
        lambda number, body: (200, f'{{"scores": {{"taste": {value}}}}}'.encode())
    ) as server:
        (loaded,) = rewards.load({"taste": {"weight": 1.0, "url": server.url}}, SETTING)
        with pytest.raises(
            rewards.RewardError, match=f"on sample [0-2] .*: {value} is no finite number"
        ):
            rewards.score(loaded, FRAMES, PROMPTS, range(3))


def test_a_number_that_no_sum_holds_is_refused_as_one_of_a_function():
    with serving(lambda number, body: (200, {"scores": {"taste": 1e300}})) as server:
        (loaded,) = rewards.load({"taste": {"weight": 1.0, "url": server.url}}, SETTING)
        with pytest.raises(rewards.RewardError, match=r"'taste' is 1e\+300 for sample 0 .*below"):
            rewards.score(loaded, FRAMES, PROMPTS, range(3))


def test_a_server_that_is_silent_or_away_is_told_apart_from_none():
    with serving(lambda number, body: (time.sleep(0.5), (200, {}))[1]) as server:
        with pytest.raises(
            rewards.SampleError, match="after 2 tries, the last one with .*timed out"
        ):
            scorer(server, timeout=0.1, retries=1).score(None, FRAMES[:1], PROMPTS[:1])
        url = server.url
    with pytest.raises(rewards.SampleError, match="after 1 try, the last one with .*refused"):
        options = remote.ServerOptions(url=url, retries=0)
        remote.load(("taste",), SETTING, options).score(None, FRAMES[:1], PROMPTS[:1])


def test_a_server_that_does_not_speak_http_is_told_in_one_line():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(b"SSH-2.0-taste\x1b\r\n")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(rewards.SampleError) as caught:
            scorer(server, retries=0).score(None, FRAMES[:1], PROMPTS[:1])
        server.shutdown()
    told = r"after 1 try, the last one with what is not HTTP: 'SSH-2.0-taste\x1b\r\n'"
    assert str(caught.value) == f"{server.url}/score cannot be had {told}"


def test_an_answer_that_ends_early_is_asked_for_again():
    def answer(number, body):
        status, content = brightness(number, body)
        return status, content, {} if number else {"Content-Length": 10_000, "Connection": "close"}

    with serving(answer) as server:
        scores = scorer(server, concurrency=1).score(None, FRAMES[:1], PROMPTS[:1])
        assert len(server.asked) == 2 and list(scores["smell"]) == [5]


def test_many_failures_end_nothing_and_no_score_is_asked_for_twice():
    """A third of the answers are 503s, with the default retries."""
    draws = np.random.default_rng(7).random(10_000)
    with serving(
        lambda number, body: (503, b"busy") if draws[number] < 0.3 else brightness(number, body)
    ) as server:
        prompts = [f"a cat {i}" for i in range(96)]
        scores = scorer(server).score(None, np.repeat(FRAMES, 32, 0), prompts)
        counts = collections.Counter(body["prompt"] for _, _, body in server.asked)
    assert list(scores["smell"]) == [len(prompt) for prompt in prompts]
    failed = sum(draws[: counts.total()] < 0.3)
    assert failed > 20 and counts.total() == 96 + failed


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ({}, 0.005, 0.01),
        ({"Retry-After": "3"}, 3, 3),
        ({"Retry-After": "in 300 s, as a date"}, 100, 300),
        ({"Retry-After": "1e9"}, remote.LONGEST_WAIT, remote.LONGEST_WAIT),
        ({"Retry-After": "nan"}, 0.005, 0.01),
        ({"Retry-After": "soon"}, 0.005, 0.01),
    ],
)
def test_a_server_says_when_to_come_again_and_else_pauses_grow_and_differ(
    monkeypatch, header, least, most
):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    if "date" in header.get("Retry-After", ""):
        header = {"Retry-After": email.utils.formatdate(time.time() + 300, usegmt=True)}
    with serving(
        lambda number, body: brightness(number, body) if number > 7 else (503, b"", header)
    ) as server:
        scorer(server).score(None, FRAMES[:1], PROMPTS[:1])
    assert len(pauses) == 8
    if most <= 0.01:
        bounds = remote.FIRST_PAUSE * 2.0 ** np.arange(8)
        assert all(bounds / 1.01 <= pauses) and all(pauses <= 2.01 * bounds)
        assert len({pause / bound for pause, bound in zip(pauses, bounds, strict=True)}) == 8
    else:
        assert all(least <= pause <= most for pause in pauses)


@pytest.mark.parametrize("seconds", [5, 70])
def test_a_long_wait_is_told_with_server_and_seconds(monkeypatch, capsys, seconds):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    header = {"Retry-After": str(seconds)}
    with serving(
        lambda number, body: brightness(number, body) if number else (503, b"busy", header)
    ) as server:
        scorer(server).score(None, FRAMES[:1], PROMPTS[:1])
    told = f"warning: {server.url}/score is asked again in 70 s, after status 503: 'busy'\n"
    assert capsys.readouterr().out == (told if seconds == 70 else "")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(monkeypatch, status):
    """It would take the key to another host, and a GET would have no video."""
    monkeypatch.setenv("TASTE_KEY", "sesame")
    with serving(brightness) as other:
        location = {"Location": f"{other.url}/score?sesame"}
        with serving(lambda number, body: (status, b"", location)) as server:
            with pytest.raises(
                rewards.SampleError, match=f"/score redirects to {other.url}/score, .*not followed"
            ) as caught:
                scorer(server, key_variable="TASTE_KEY").score(None, FRAMES[:1], PROMPTS[:1])
        assert len(server.asked) == 1 and not other.asked and "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("/other", "{url}/other"),
        ("https://me:secret@host:8/a/sesame?secret#secret", "https://host:8/a/***"),
        ("//host/a%20b\u00e9\x1b[2J", "http://host/a%20b%C3%A9%1B[2J"),
    ],
)
def test_a_redirect_is_told_with_host_port_and_path_and_without_secrets(
    monkeypatch, location, told
):
    monkeypatch.setenv("TASTE_KEY", "sesame")
    with serving(lambda number, body: (302, b"", {"Location": location})) as server:
        with pytest.raises(rewards.SampleError) as caught:
            scorer(server, key_variable="TASTE_KEY").score(None, FRAMES[:1], PROMPTS[:1])
    told = told.format(url=server.url)
    assert f"/score redirects to {told}, which is not followed: " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_fallback_stands_for_a_video_that_cannot_be_had_and_is_told(capsys):
    with serving(
        lambda number, body: brightness(number, body) if "dog" in body["prompt"] else (400, b"no")
    ) as server:
        scores = scorer(server, fallback=-1.0).score(None, FRAMES, PROMPTS)
    assert list(scores["smell"]) == [-1, 5, -1]
    assert list(scores["smell/fallback"]) == list(scores["taste/fallback"]) == [1, 0, 1]
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith(
        "warning: reward taste, smell: 2 more videos have the fallback -1 in place of a score"
    )
    assert "status 400: 'no'" in told


def test_a_fallback_ends_above_a_share():
    prompts = PROMPTS[:1] * 10
    frames = np.repeat(FRAMES[:1], 10, 0)
    with serving(lambda number, body: (400, b"no")) as server:
        taste = scorer(server, fallback=0.0)  # a fifth of 64 videos, 12
        assert list(taste.score(None, frames, prompts)["taste"]) == [0] * 10
        with pytest.raises(
            rewards.SampleError, match="20 of the last 20 videos have the fallback 0 .*'no'"
        ):
            taste.score(None, frames, prompts)


@pytest.mark.parametrize(("key", "sent"), [("sesame", "sesame"), ("sesame\n", "sesame")])
def test_the_key_is_sent_and_not_told(monkeypatch, key, sent):
    """Nor where the server repeats it, at the border of what is quoted."""
    monkeypatch.setenv("TASTE_KEY", key)
    echo = b"x" * (remote.QUOTED - 3) + b"sesame"
    for status, retries in ((401, 0), (503, 1), (200, 0)):
        content = {"scores": "x" * 178 + "sesame"} if status == 200 else echo
        with serving(lambda number, body, answer=(status, content): answer) as server:
            with pytest.raises(rewards.SampleError) as caught:
                taste = scorer(server, key_variable="TASTE_KEY", retries=retries)
                taste.score(None, FRAMES[:1], PROMPTS[:1])
            assert server.asked[0][1]["Authorization"] == f"Bearer {sent}"
        assert "sesa" not in str(caught.value) and "**" in str(caught.value)


@pytest.mark.parametrize("key", ["open\nsesame", "\u00e9sesame", " "])
def test_a_key_that_no_header_can_hold_is_refused_untold(monkeypatch, key):
    monkeypatch.setenv("TASTE_KEY", key)
    with pytest.raises(ValueError, match="key_variable is 'TASTE_KEY', whose value") as caught:
        remote.ServerOptions(url="http://127.0.0.1:1", key_variable="TASTE_KEY")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (200, None),
        (404, None),
        (501, None),
        (401, "refuses the request with status 401"),
        (301, "redirects to https://elsewhere/score, which is not followed"),
    ],
)
def test_a_server_is_asked_before_anything_is_loaded_whether_it_is_there(status, message):
    """With a HEAD, which many do not know: only what would also fail a question is an error."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.send_header("Location", "https://elsewhere/score")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    setting = {"taste": {"weight": 1.0, "url": f"http://127.0.0.1:{server.server_port}/score"}}
    if message is None:
        assert not list(rewards.reach_faults(setting))
    else:
        (fault,) = rewards.reach_faults(setting)
        assert re.match(f"config.rewards.taste: http://.*/score {message}", str(fault))
    server.shutdown()
    server.server_close()
    (fault,) = rewards.reach_faults(setting)
    assert re.search("/score cannot be reached .*refused.*; start the server", str(fault))


def test_a_server_that_drips_ends_at_the_timeout_and_nobody_waits_for_it():
    """In a program of its own: at its end, too, it waits for no thread that listens."""
    script = """
        import sys, numpy as np
        from astrolabe_jax.rewards import panel, registry
        value = {"load": "astrolabe_jax.rewards.remote:load", "url": sys.argv[1]}
        runner = panel.RewardRunner(registry.load({"taste": value}, registry.Setting(None, 16.0)),
                                    "host", timeout=0.5)
        try:
            runner.score_async(np.zeros((2, 1, 4, 4, 3), np.uint8), ["a", "b"])()
        except registry.RewardError as error:
            print(error)
        runner.settle(last=True)
    """
    free = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not free.wait(0.1):
                    self.wfile.write(b" ")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(script),
                f"http://127.0.0.1:{server.server_port}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ,
        )
    finally:
        free.set()
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reward 'taste' did not answer within 0.5 s for samples 0 to 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url is '127.0.0.1:8000'; expected http://"),
        ({"url": "http://"}, "url is 'http://'; expected http://"),
        ({"url": "http://here:99999"}, "Port out of range"),
        ({"url": "http://me:sesame@here"}, "^url holds a name or password; expected them in key"),
        ({"fallback": float("nan")}, "fallback is nan"),
        ({"url": "http://a/sc ore"}, "url is 'http://a/sc ore'; expected http://"),
        ({"fallback": 0.0, "fallback_share": 2.0}, "fallback_share is 2.0; expected one in"),
        ({"fallback": 1e39}, r"fallback is 1e\+39; expected a score, a number below 1e\+30"),
        ({"timeout": 1e10}, "timeout is 1.*; expected a positive number, at most 86400"),
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
        options = remote.UnifiedRewardOptions(
            template=template, url=f"{server.url}/v1", frames=3, concurrency=1
        )
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
