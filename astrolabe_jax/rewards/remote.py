"""Rewards that another program computes and serves over HTTP: one of your own, and UnifiedReward.

A program of your own answers, for each video, a POST of JSON

    {"rewards": ["taste"], "prompt": "a cat", "fps": 16.0, "frames": ["<base64 of an image file>",
    ...]}

with status 200 and {"scores": {"taste": 0.71}}: a number for each reward asked for, larger is
better. In a config

    config.rewards.taste = {
        "weight": 1.0,
        "load": "astrolabe_jax.rewards.remote:load",
        "url": "http://127.0.0.1:8000/score",
    }

UnifiedReward is asked through an OpenAI-compatible chat endpoint about single frames, whose scores
are averaged. See docs/rewards.md, Remote rewards.
"""

import base64
import collections
import contextlib
import dataclasses
import email.utils
import functools
import http.client
import io
import json
import math
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from astrolabe_jax.rewards.registry import LARGEST_SCORE, SampleError, Scorer, Setting
from astrolabe_jax.rewards.templates import PublishedText, read_template
from astrolabe_jax.runtime.files import local_directory, parse_json
from astrolabe_jax.runtime.progress import counted, warn

FIRST_PAUSE = 0.5  # seconds before the second round of questions; each lasts twice as long
LONGEST_PAUSE = 30.0
LONGEST_WAIT = 600.0  # seconds that a server may ask for (Retry-After)
TOLD_WAIT = 5.0  # seconds; a longer wait is logged
FALLBACK_SPAN = 64  # last videos of which a share may have the fallback
ANSWER_LIMIT = 1 << 20  # bytes that are read of an answer
QUOTED = 200  # characters of an answer in an error
FORMATS = {"png": {}, "jpeg": {"quality": 95}}
UNIFIEDREWARD_TEXT = PublishedText(
    "rewards.py",  # Astrolabe or Flow-GRPO
    {"question": "d68ab1dcf4dc3a39ec5dfab963d17fe30a6e5f713eb49f743ed88a4c8ce4317f"},
)
UNIFIEDREWARD_SIZE = (512, 512)  # of the frames that it sees
_FINAL_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")

MOST_SECONDS = 86_400  # that a server may be silent
# Asks a server once: the scores of a video or a part of it, or an error.
Question = Callable[[], dict[str, float]]


class Away(OSError):
    """A server did not answer, and may another time; `wait`: the seconds that it asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """How to ask a server.

    Raises ValueError for options that cannot be, OSError for a key that is not set.
    """

    url: str
    timeout: float = 60.0  # seconds that the server may be silent
    # rounds of questions in a row that may all fail: no server, silence, or a status 429 or 5xx
    retries: int = 8
    concurrency: int = 8  # requests at once
    fallback: float | None = None  # score of a video that could not be had; None: an error
    fallback_share: float = 0.2  # of the last FALLBACK_SPAN videos; with more it is an error
    # environment variable with the server's key, which is sent as a bearer token and nowhere shown
    key_variable: str = ""

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if "@" in parts.netloc:
            raise ValueError("url holds a name or password; expected them in key_variable")
        plain = self.url.isascii() and self.url.isprintable() and " " not in self.url
        if parts.scheme not in ("http", "https") or not (plain and parts.hostname):
            raise ValueError(f"url is {self.url!r}; expected http://... or https://...")
        parts.port  # noqa: B018  (raises ValueError for one that cannot be)
        if not 0 < self.timeout <= MOST_SECONDS:
            raise ValueError(
                f"timeout is {self.timeout}; expected a positive number, at most {MOST_SECONDS}"
            )
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; expected at least 0")
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; expected at least 1")
        if not abs(self.fallback or 0.0) < LARGEST_SCORE:
            raise ValueError(
                f"fallback is {self.fallback}; expected a score, a number below {LARGEST_SCORE:g}"
            )
        if not 0 <= self.fallback_share <= 1:
            raise ValueError(f"fallback_share is {self.fallback_share}; expected one in [0, 1]")
        if self.key_variable and self.key_variable not in os.environ:
            raise OSError(
                f"key_variable is {self.key_variable!r}, which is not set in the environment"
            )
        if self.key_variable and not (self.key.isascii() and self.key.isprintable() and self.key):
            raise ValueError(
                f"key_variable is {self.key_variable!r}, whose value is no key: it is empty or has "
                "characters that a header cannot hold"
            )

    @property
    def key(self) -> str:
        """The server's key, without the newline that a file may end in; empty if it has none."""
        return os.environ.get(self.key_variable, "").strip()

    @property
    def target(self) -> str:
        """The URL that is asked."""
        return self.url

    @property
    def shown(self) -> str:
        """The URL for messages: a query may hold a secret."""
        return self.target.partition("?")[0]

    def reach(self) -> None:
        """Raise OSError unless the server is there, takes the key, and does not redirect.

        It is asked with a HEAD, which is no question: whatever else it answers is well.
        """
        try:
            _OPENER.open(_request(self, None), timeout=self.timeout).close()
        except urllib.error.HTTPError as error:
            if error.code in (401, 403) or error.code // 100 == 3:
                raise _refusal(self, error) from None
        except urllib.error.URLError as error:
            raise OSError(
                f"{self.shown} cannot be reached ({error.reason}); start the server, or set url"
            ) from None
        except (OSError, http.client.HTTPException):
            pass  # it is there


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

    @property
    def target(self) -> str:
        """The URL that is asked."""
        return f"{self.url.rstrip('/')}/chat/completions"


def load(names: tuple[str, ...], setting: Setting, options: ServerOptions) -> Scorer:
    """Return the scorer of a program of your own."""

    def questions(video: np.ndarray, prompt: str) -> Iterator[Question]:
        def question() -> dict[str, float]:
            body = {
                "rewards": list(names),
                "prompt": prompt,
                "fps": float(setting.fps),
                "frames": [
                    _encoded(frame, options.format)
                    for frame in video[_evenly_spaced(len(video), options.frames)]
                ],
            }
            return _scores(names, ask(options, body))

        yield question

    return _scorer(names, questions, options)


def load_unified(names: tuple[str, ...], setting: Setting, options: UnifiedRewardOptions) -> Scorer:
    """Return the scorer of UnifiedReward, with scores in [0, 1].

    Raises ValueError or OSError for another template.
    """
    template = read_template(local_directory(options.template), UNIFIEDREWARD_TEXT)

    def question(frame: np.ndarray, prompt: str) -> dict[str, float]:
        picture = Image.fromarray(frame).resize(UNIFIEDREWARD_SIZE, Image.Resampling.BICUBIC)
        image = f"data:image;base64,{_encoded(np.asarray(picture), 'png')}"
        text = {"type": "text", "text": template.replace("{prompt}", prompt)}
        content = [{"type": "image_url", "image_url": {"url": image}}, text]
        body = {
            "model": options.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        return dict.fromkeys(names, _final_score(ask(options, body)))

    def questions(video: np.ndarray, prompt: str) -> Iterator[Question]:
        for frame in video[_evenly_spaced(len(video), options.frames)]:
            yield functools.partial(question, frame, prompt)

    return _scorer(names, questions, options)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Ends a redirect in an HTTPError.

    To follow one would take the key to another host, and make a GET without the video of a POST.
    """

    def redirect_request(self, *_) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def ask(options: RequestOptions, body: dict[str, Any]) -> Any:
    """Return the JSON that a server answers to one POST of `body`.

    Raises:
      Away: if it may answer another time.
      OSError: naming the server, if it refuses, or does not answer in JSON.
    """
    try:
        with _OPENER.open(_request(options, body), timeout=options.timeout) as answer:
            text = _text(answer, options)
            beginning = _beginning(text, answer, options)
            longer = answer.read(1)
            if answer.length and not longer:
                raise Away(f"an answer that ends {answer.length} bytes early")
    except urllib.error.HTTPError as error:
        if error.code != 429 and error.code < 500:
            raise _refusal(options, error) from None
        raise Away(_reason(options, error), _seconds(error.headers["Retry-After"])) from None
    except Away:
        raise
    except (OSError, http.client.HTTPException) as error:
        told = str(error) or type(error).__name__
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
            told = f"what is not HTTP: {_keyless(told, options)[:QUOTED]!r}"
        raise Away(told) from None
    if longer:
        raise OSError(
            f"{options.shown} answers with more than {ANSWER_LIMIT:,} bytes; expected the scores "
            "alone"
        )
    try:
        return parse_json(text)
    except ValueError as error:
        raise OSError(
            f"{options.shown} does not answer in JSON: {error}; it answers {beginning}; look at "
            "the server, or set url to another"
        ) from None


def _request(options: RequestOptions, body: dict[str, Any] | None) -> urllib.request.Request:
    """Return the POST of `body` to the server, or a HEAD."""
    headers = {"Content-Type": "application/json"}
    if options.key:
        headers["Authorization"] = f"Bearer {options.key}"
    content = None if body is None else json.dumps(body).encode()
    return urllib.request.Request(
        options.target, content, headers, method="HEAD" if body is None else "POST"
    )


def _text(answer: Any, options: RequestOptions) -> str:
    """Return what a server has written, up to ANSWER_LIMIT bytes, with *** in place of the key."""
    return _keyless(answer.read(ANSWER_LIMIT).decode(errors="replace"), options)


def _keyless(text: str, options: RequestOptions) -> str:
    """Return a text of a server with *** in place of the key, as JSON and URLs write it, too."""
    key = options.key
    for written in {key, json.dumps(key)[1:-1], urllib.parse.quote(key, safe="")} - {""}:
        text = text.replace(written, "***")
    return text


def _beginning(text: str, answer: Any, options: RequestOptions) -> str:
    """Return how messages quote the text of an answer, or what it is if it is none."""
    encoding = answer.headers["Content-Encoding"] or "identity"
    if encoding.strip().lower() != "identity":
        return f"bytes in Content-Encoding {_keyless(encoding, options)[:QUOTED]!r}, not plain text"
    return repr(text[:QUOTED]) if text.strip() else "nothing"


def _reason(options: RequestOptions, error: urllib.error.HTTPError) -> str:
    """Return the status of an answer and the beginning of its text."""
    try:
        shown = _beginning(_text(error, options), error, options)
    except (OSError, http.client.HTTPException):
        shown = "nothing"
    return f"status {error.code}: {shown}"


def _refusal(options: RequestOptions, error: urllib.error.HTTPError) -> OSError:
    """Return the error of a server that will not answer another time either."""
    if error.code // 100 != 3:
        return OSError(f"{options.shown} refuses the request with {_reason(options, error)}")
    there = urllib.parse.urljoin(options.target, error.headers["Location"] or "")
    parts = urllib.parse.urlsplit(there)
    # neither a name and password, nor a query, which may hold a secret
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    printable = urllib.parse.quote(_keyless(shown, options), safe=":/%[]*~")
    return OSError(
        f"{options.shown} redirects to {printable[:QUOTED]}, which is not followed: videos and "
        "keys go to the url alone; set url to the server that answers"
    )


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a Retry-After asks for, a number or a date; at most LONGEST_WAIT."""
    text = (retry_after or "0").strip()
    try:
        wait = float(text)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            wait = 0.0
    return min(max(wait, 0.0), LONGEST_WAIT) if math.isfinite(wait) else 0.0


def _scorer(
    names: Sequence[str],
    questions: Callable[[np.ndarray, str], Iterable[Question]],
    options: RequestOptions,
) -> Scorer:
    """Return a scorer that asks questions(video, prompt) about every video, and takes their mean.

    It raises SampleError for a video that could not be had. With a fallback that score stands for
    it, and REWARD/fallback is 1 for the video, else 0.
    """
    recent = collections.deque[bool](maxlen=FALLBACK_SPAN)  # which videos had the fallback

    def score(params: None, frames: Any, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        asked = [
            (row, question)
            for row, (video, prompt) in enumerate(zip(np.asarray(frames), prompts, strict=True))
            for question in questions(video, prompt)
        ]
        faults: dict[int, OSError] = {}
        found: list[list[dict[str, float]]] = [[] for _ in prompts]
        answers = _answers([question for _, question in asked], options)
        for (row, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, OSError):
                faults.setdefault(row, answer)
            else:
                found[row].append(answer)
        lost = [row in faults for row in range(len(prompts))]
        recent.extend(lost)
        if faults:
            _refuse_or_warn(names, options, faults, recent)
        scores = {}
        for name in names:
            means = [
                options.fallback if gone else np.mean([answer[name] for answer in of_video])
                for gone, of_video in zip(lost, found, strict=True)
            ]
            scores[name] = np.array(means, np.float64)
            if options.fallback is not None:
                scores[f"{name}/fallback"] = np.array(lost, np.float32)
        return scores

    return Scorer(score)


def _refuse_or_warn(
    names: Sequence[str],
    options: RequestOptions,
    faults: dict[int, OSError],
    recent: Collection[bool],
) -> None:
    """Log which videos have the fallback; raise SampleError if none may have it, or too many had.

    Args:
      faults: row of the batch -> why it could not be had.
      recent: of the last videos, whether they had the fallback.
    """
    row = min(faults)
    if options.fallback is None:
        raise SampleError(row, str(faults[row])) from faults[row]
    told = f"fallback {options.fallback:g} in place of a score (one: {faults[row]})"
    if sum(recent) > options.fallback_share * FALLBACK_SPAN:
        raise SampleError(
            row,
            f"{sum(recent)} of the last {counted(len(recent), 'video')} have the {told}; a share "
            f"of {options.fallback_share:g} of {FALLBACK_SPAN} may (fallback_share)",
        ) from faults[row]
    more = counted(len(faults), "more video has", "more videos have")
    warn(f"reward {', '.join(names)}: {more} the {told}")


def _answers(questions: Sequence[Question], options: RequestOptions) -> list[Any]:
    """Return what each question is answered, or the OSError that is there in place of an answer.

    Questions without an answer are asked again, in rounds. What was answered is kept. After
    options.retries + 1 rounds in a row without any answer those that are left have failed. Without
    a fallback the first refusal ends it, and what follows is None.
    """
    answers: list[Any] = [None] * len(questions)
    left = list(range(len(questions)))
    tries = 0  # rounds in a row without an answer
    while left:
        away = []
        for number, answer in _round(questions, left, options.concurrency):
            if isinstance(answer, Away):
                away.append(answer)
                continue
            answers[number] = answer
            if isinstance(answer, OSError) and options.fallback is None:
                return answers
        before = len(left)
        left = [number for number in left if answers[number] is None]
        tries = tries + 1 if len(left) == before else 0
        if tries > options.retries:
            fault = OSError(
                f"{options.shown} cannot be had after {counted(tries, 'try', 'tries')}, the last "
                f"one with {away[-1]}"
            )
            return [fault if answer is None else answer for answer in answers]
        if left:
            pause = min(FIRST_PAUSE * 2 ** min(tries, 16) / 2, LONGEST_PAUSE)
            # runs that failed together do not come back together
            asked_for = max(error.wait for error in away)
            wait = max(pause * random.uniform(1, 2), asked_for)
            if wait > TOLD_WAIT:
                warn(f"{options.shown} is asked again in {wait:.0f} s, after {away[-1]}")
            time.sleep(wait)
    return answers


def _round(
    questions: Sequence[Question], numbers: Iterable[int], concurrency: int
) -> Iterator[tuple[int, Any]]:
    """Ask these questions, several at once: give number and answer, or OSError, as they come.

    A thread that finds the server away asks no more, so not every question need come. The threads
    do not keep the program from its end, as those of concurrent.futures would.
    """
    waiting = collections.deque(numbers)
    given: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        answer: Any = None
        while waiting and not isinstance(answer, Away):
            with contextlib.suppress(IndexError):  # another thread has taken the last one
                number = waiting.popleft()
                try:
                    answer = questions[number]()
                except Exception as error:
                    answer = error
                given.put((number, answer))
        given.put(None)

    threads = min(concurrency, len(waiting))
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        while threads:
            item = given.get()
            if item is None:
                threads -= 1
            elif isinstance(item[1], Exception) and not isinstance(item[1], OSError):
                raise item[1]
            else:
                yield item
    finally:
        waiting.clear()


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
            type(found.get(name)) in (int, float) for name in names
        ):
            return {name: float(found[name]) for name in names}
    raise OSError(
        f'the answer is {json.dumps(answer)[:QUOTED]}; expected {{"scores": ...}} with numbers '
        f"for {', '.join(names)}"
    )


def _final_score(answer: Any) -> float:
    match answer:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            if found := _FINAL_SCORE.search(text):
                return float(found[1]) / 5
    raise OSError(f"the answer has no 'Final Score:' of 1 to 5: {json.dumps(answer)[:300]}")
