"""Rewards that another program computes, asked over HTTP: one's own by a plain contract, and
UnifiedReward.

The contract of one's own: for each video a POST of JSON

    {"rewards": ["taste"], "prompt": "a cat", "fps": 16.0, "frames": ["<base64 of an image file>",
    ...]}

which is answered with status 200 and {"scores": {"taste": 0.71}}: a number for each reward asked
for, larger is better. In TABLE the line is `"taste":
Reward(load="astrolabe_jax.rewards.remote:load")`, in a config

    config.rewards.taste = {"weight": 1.0, "url": "http://127.0.0.1:8000/score"}

UnifiedReward (spec/rewards.md 9) is asked through an OpenAI-compatible chat endpoint about single
frames, whose scores are averaged.

Options of both, besides `url`: timeout, seconds that the server may be silent; retries, of a
request that met no server, silence, or a status 429 or 5xx, each after twice the time of the last;
concurrency, requests at once; fallback, the score of a video that could not be had (by default that
is an error); key_variable, the environment variable that has the server's key, which is sent as a
bearer token and nowhere shown.
"""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from astrolabe_jax.convert.templates import UNIFIEDREWARD, read_template
from astrolabe_jax.rewards import SampleError, Scorer, Setting

FIRST_PAUSE = 0.5  # seconds before the first retry
ANSWER_LIMIT = 1 << 20  # bytes that are read of an answer
FORMATS = {"png": {}, "jpeg": {"quality": 95}}
SIZE = (512, 512)  # of the frames that UnifiedReward sees
SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")


class Server(NamedTuple):
    """Where and how to ask."""

    url: str
    timeout: float
    retries: int
    key: str | None


def load(
    names: tuple[str, ...],
    setting: Setting,
    url: str,
    timeout: float = 60.0,
    retries: int = 3,
    concurrency: int = 8,
    fallback: float | None = None,
    key_variable: str = "",
    frames: int = 0,
    format: str = "png",
) -> Scorer:
    """A scorer of one's own. frames: so many, evenly spaced, are sent, 0: all; format: of the
    images, png or jpeg.

    Raises ValueError for options that cannot be, OSError for an environment variable that is not
    set.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    server = _server(url, timeout, retries, key_variable)

    def one(video: np.ndarray, prompt: str) -> dict[str, float]:
        images = [_image(frame, format) for frame in video[_spaced(len(video), frames)]]
        body = {
            "rewards": list(names),
            "prompt": prompt,
            "fps": float(setting.fps),
            "frames": images,
        }
        return _scores(names, ask(server, body))

    return _scorer(names, one, concurrency, fallback)


def load_unified(
    names: tuple[str, ...],
    setting: Setting,
    template: str,
    url: str = "http://127.0.0.1:17140/v1",
    model: str = "UnifiedReward-7b-v1.5",
    timeout: float = 60.0,
    retries: int = 3,
    concurrency: int = 8,
    fallback: float | None = None,
    key_variable: str = "",
    frames: int = 8,
) -> Scorer:
    """UnifiedReward in [0, 1]. template: the published astrolabe/rewards.py, which is read, not
    run.

    Raises ValueError or OSError for options that cannot be, or another template.
    """
    del setting
    question = read_template(Path(template), UNIFIEDREWARD)
    server = _server(f"{url.rstrip('/')}/chat/completions", timeout, retries, key_variable)

    def one(video: np.ndarray, prompt: str) -> dict[str, float]:
        scores = []
        for frame in video[_spaced(len(video), frames)]:
            seen = Image.fromarray(frame).resize(SIZE, Image.Resampling.BICUBIC)
            image = {
                "type": "image_url",
                "image_url": {"url": f"data:image;base64,{_image(np.asarray(seen), 'png')}"},
            }
            text = {"type": "text", "text": question.replace("{prompt}", prompt)}
            message = {"role": "user", "content": [image, text]}
            scores.append(
                _final_score(ask(server, {"model": model, "temperature": 0, "messages": [message]}))
            )
        return dict.fromkeys(names, float(np.mean(scores)))

    return _scorer(names, one, concurrency, fallback)


def ask(server: Server, body: dict[str, Any]) -> Any:
    """The JSON that the server answers. Raises OSError, naming the server, when all tries have
    failed.
    """
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {server.key}"} if server.key else {}
    )
    for tried in range(server.retries + 1):
        if tried:
            time.sleep(FIRST_PAUSE * 2 ** (tried - 1))
        try:
            request = urllib.request.Request(server.url, content, headers)
            with urllib.request.urlopen(request, timeout=server.timeout) as answer:
                return json.loads(answer.read(ANSWER_LIMIT))
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {error.read(200).decode(errors='replace')!r}"
            if error.code != 429 and error.code < 500:
                raise OSError(f"{server.url} refuses the request with {reason}") from None
        except ValueError as error:
            raise OSError(f"{server.url} does not answer in JSON: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise OSError(
        f"{server.url} cannot be had after {server.retries + 1} tries, the last one with {reason}"
    )


def _server(url: str, timeout: float, retries: int, key_variable: str) -> Server:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}; expected http://... or https://...")
    if timeout <= 0 or retries < 0:
        raise ValueError(
            f"timeout is {timeout} and retries {retries}; expected a positive number and at least 0"
        )
    if key_variable and key_variable not in os.environ:
        raise OSError(f"key_variable is {key_variable!r}, which is not set in the environment")
    return Server(url, timeout, retries, os.environ[key_variable] if key_variable else None)


def _scorer(
    names: Sequence[str], one: Callable, concurrency: int, fallback: float | None
) -> Scorer:
    """A scorer that asks `one(video, prompt)` about several videos at once."""
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; expected at least 1")

    def guarded(video: np.ndarray, prompt: str) -> dict[str, float]:
        try:
            return one(video, prompt)
        except OSError:
            if fallback is None:
                raise
            return dict.fromkeys(names, float(fallback))

    def score(params: None, frames: Any, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        pool = concurrent.futures.ThreadPoolExecutor(concurrency)
        try:
            asked = [
                pool.submit(guarded, video, text)
                for video, text in zip(np.asarray(frames), prompts, strict=True)
            ]
            return _collected(names, asked)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return Scorer(score)


def _collected(
    names: Sequence[str], asked: Sequence[concurrent.futures.Future]
) -> dict[str, np.ndarray]:
    """The answers, in the order asked; SampleError for the first that is none, as soon as it is
    known.
    """
    done, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_EXCEPTION)
    for row, future in enumerate(asked):
        if future in done and (error := future.exception()):
            raise SampleError(row, str(error)) from error
    return {
        name: np.array([future.result()[name] for future in asked], np.float32) for name in names
    }


def _spaced(count: int, wanted: int) -> np.ndarray:
    """So many evenly spaced of `count` frames, the first and the last among them; all if 0 or more
    are wanted.
    """
    return (
        np.arange(count)
        if not 0 < wanted < count
        else np.rint(np.linspace(0, count - 1, wanted)).astype(int)
    )


def _image(frame: np.ndarray, format: str) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format, **FORMATS[format])
    return base64.b64encode(file.getvalue()).decode()


def _scores(names: Sequence[str], answer: Any) -> dict[str, float]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, dict) or not all(
        isinstance(scores.get(name), int | float) for name in names
    ):
        told = json.dumps(answer)[:200]
        raise OSError(
            f'the answer is {told}; expected {{"scores": ...}} with numbers for {", ".join(names)}'
        )
    return {name: float(scores[name]) for name in names}


def _final_score(answer: Any) -> float:
    try:
        text = answer["choices"][0]["message"]["content"]
        return float(SCORE.search(text)[1]) / 5
    except (LookupError, TypeError):
        raise OSError(
            f"the answer has no 'Final Score:' of 1 to 5: {json.dumps(answer)[:300]}"
        ) from None
