"""Rewards that another program computes and serves over HTTP: one of your own, and UnifiedReward.

A program of your own answers, for each video, a POST of JSON

    {"rewards": ["taste"], "prompt": "a cat", "fps": 16.0, "frames": ["<base64 of an image file>",
    ...]}

with status 200 and {"scores": {"taste": 0.71}}: a number for each reward asked for, larger is
better. In registry.TABLE the line is `"taste": Reward(load="astrolabe_jax.rewards.remote:load")`,
in a config

    config.rewards.taste = {"weight": 1.0, "url": "http://127.0.0.1:8000/score"}

UnifiedReward is asked through an OpenAI-compatible chat endpoint about single frames, whose scores
are averaged. See docs/rewards.md, Remote rewards.
"""

import base64
import concurrent.futures
import dataclasses
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
from typing import Any

import numpy as np
from PIL import Image

from astrolabe_jax.rewards.registry import SampleError, Scorer, Setting
from astrolabe_jax.rewards.templates import PublishedText, read_template

FIRST_PAUSE = 0.5  # seconds before the first retry
ANSWER_LIMIT = 1 << 20  # bytes that are read of an answer
FORMATS = {"png": {}, "jpeg": {"quality": 95}}
UNIFIEDREWARD_TEXT = PublishedText(
    "rewards.py",  # Astrolabe or Flow-GRPO
    {"question": "d68ab1dcf4dc3a39ec5dfab963d17fe30a6e5f713eb49f743ed88a4c8ce4317f"},
)
UNIFIEDREWARD_SIZE = (512, 512)  # of the frames that it sees
_FINAL_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """How to ask a server.

    Raises ValueError for options that cannot be, OSError for a key that is not set.
    """

    url: str
    timeout: float = 60.0  # seconds that the server may be silent
    # of a request that met no server, silence, or a status 429 or 5xx; each waits twice as long
    retries: int = 3
    concurrency: int = 8  # requests at once
    fallback: float | None = None  # score of a video that could not be had; None: an error
    # environment variable with the server's key, which is sent as a bearer token and nowhere shown
    key_variable: str = ""

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; expected http://... or https://...")
        if self.timeout <= 0 or self.retries < 0:
            raise ValueError(
                f"timeout is {self.timeout} and retries {self.retries}; expected a positive number "
                "and at least 0"
            )
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; expected at least 1")
        if self.key_variable and self.key_variable not in os.environ:
            raise OSError(
                f"key_variable is {self.key_variable!r}, which is not set in the environment"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions(RequestOptions):
    """Options of a program of your own."""

    frames: int = 0  # how many are sent, evenly spaced; 0: all
    format: str = "png"  # of the images, or jpeg

    def __post_init__(self):
        super().__post_init__()
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; expected one of {', '.join(FORMATS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnifiedRewardOptions(RequestOptions):
    """Options of UnifiedReward."""

    template: str  # the published astrolabe/rewards.py, which is read, not run
    url: str = "http://127.0.0.1:17140/v1"
    model: str = "UnifiedReward-7b-v1.5"
    frames: int = 8  # how many are scored, evenly spaced


def load(names: tuple[str, ...], setting: Setting, options: ServerOptions) -> Scorer:
    """Return the scorer of a program of your own."""

    def ask_about(video: np.ndarray, prompt: str) -> dict[str, float]:
        body = {
            "rewards": list(names),
            "prompt": prompt,
            "fps": float(setting.fps),
            "frames": [
                _encoded(frame, options.format)
                for frame in video[_evenly_spaced(len(video), options.frames)]
            ],
        }
        return _scores(names, ask(options.url, options, body))

    return _scorer(names, ask_about, options)


def load_unified(names: tuple[str, ...], setting: Setting, options: UnifiedRewardOptions) -> Scorer:
    """Return the scorer of UnifiedReward, with scores in [0, 1].

    Raises ValueError or OSError for another template.
    """
    question = read_template(Path(options.template), UNIFIEDREWARD_TEXT)
    url = f"{options.url.rstrip('/')}/chat/completions"

    def ask_about(video: np.ndarray, prompt: str) -> dict[str, float]:
        text = {"type": "text", "text": question.replace("{prompt}", prompt)}
        scores = []
        for frame in video[_evenly_spaced(len(video), options.frames)]:
            picture = Image.fromarray(frame).resize(UNIFIEDREWARD_SIZE, Image.Resampling.BICUBIC)
            image = f"data:image;base64,{_encoded(np.asarray(picture), 'png')}"
            content = [{"type": "image_url", "image_url": {"url": image}}, text]
            body = {
                "model": options.model,
                "temperature": 0,
                "messages": [{"role": "user", "content": content}],
            }
            scores.append(_final_score(ask(url, options, body)))
        return dict.fromkeys(names, float(np.mean(scores)))

    return _scorer(names, ask_about, options)


def ask(url: str, options: RequestOptions, body: dict[str, Any]) -> Any:
    """Return the JSON that the server of a URL answers to a POST of `body`.

    Raises:
      OSError: naming the server, when all tries have failed.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(options.key_variable):
        headers["Authorization"] = f"Bearer {key}"
    reason = ""
    for attempt in range(options.retries + 1):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=options.timeout) as answer:
                return json.loads(answer.read(ANSWER_LIMIT))
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {error.read(200).decode(errors='replace')!r}"
            if error.code != 429 and error.code < 500:
                raise OSError(f"{url} refuses the request with {reason}") from None
        except ValueError as error:
            raise OSError(f"{url} does not answer in JSON: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise OSError(
        f"{url} cannot be had after {options.retries + 1} tries, the last one with {reason}"
    )


def _scorer(
    names: Sequence[str],
    ask_about: Callable[[np.ndarray, str], dict[str, float]],
    options: RequestOptions,
) -> Scorer:
    """Return a scorer that calls `ask_about(video, prompt)` for several videos at once.

    It raises SampleError as soon as one of them has failed.
    """

    def scores_of(video: np.ndarray, prompt: str) -> dict[str, float]:
        try:
            return ask_about(video, prompt)
        except OSError:
            if options.fallback is None:
                raise
            return dict.fromkeys(names, float(options.fallback))

    def score(params: None, frames: Any, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        pool = concurrent.futures.ThreadPoolExecutor(options.concurrency)
        try:
            futures = [
                pool.submit(scores_of, video, prompt)
                for video, prompt in zip(np.asarray(frames), prompts, strict=True)
            ]
            done, _ = concurrent.futures.wait(
                futures, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for row, future in enumerate(futures):
                if future in done and (error := future.exception()):
                    raise SampleError(row, str(error)) from error
            scores = [future.result() for future in futures]
            return {name: np.array([row[name] for row in scores], np.float32) for name in names}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return Scorer(score)


def _evenly_spaced(frames: int, count: int) -> np.ndarray:
    """Return `count` numbers of frames, the first and the last among them; all if count is 0."""
    count = count if 0 < count < frames else frames
    return np.rint(np.linspace(0, frames - 1, count)).astype(int)


def _encoded(frame: np.ndarray, format: str) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format, **FORMATS[format])
    return base64.b64encode(file.getvalue()).decode()


def _scores(names: Sequence[str], answer: Any) -> dict[str, float]:
    match answer:
        case {"scores": dict(found)} if all(
            isinstance(found.get(name), int | float) for name in names
        ):
            return {name: float(found[name]) for name in names}
    raise OSError(
        f'the answer is {json.dumps(answer)[:200]}; expected {{"scores": ...}} with numbers '
        f"for {', '.join(names)}"
    )


def _final_score(answer: Any) -> float:
    match answer:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            if found := _FINAL_SCORE.search(text):
                return float(found[1]) / 5
    raise OSError(f"the answer has no 'Final Score:' of 1 to 5: {json.dumps(answer)[:300]}")
