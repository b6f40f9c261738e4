"""What a person looks at: videos, film strips, sheets of them, and curves. Files appear whole."""

import contextlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from astrolabe_jax.runtime.files import atomic, writing

STRIP_FRAMES = 7  # frames of a film strip
VIDEO_HEIGHT = 192  # smaller videos are enlarged to at least this height in mp4 files
STRIP_HEIGHT = 80  # and smaller strips to this on a sheet

# RGB
INK = (20, 20, 20)
PALE = (110, 110, 110)

# With mbtree, x264 varies from call to call; its default preset is several times slower than a GPU
# samples.
X264_OPTIONS = {"preset": "veryfast", "crf": "16", "x264-params": "threads=1:mbtree=0"}
# The file can be played while it grows.
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


Line = Sequence[tuple[float, float]]  # points (x, y)


class Mp4Writer:
    """A video that can be watched while it is made: H.264, yuv420p, which every player shows.

    Same frames, same bytes. Frames go into NAME.partial.mp4, in fragments of about two seconds;
    `close` makes it the plain file NAME.mp4. Left without `close`, or by an exception, NAME.mp4 is
    not there.
    """

    def __init__(self, path: Path, fps: int):
        self._path = path
        self._partial = path.with_name(f"{path.stem}.partial.mp4")
        self._fps = fps
        # both from the first frames on
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        elif self._container is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported
                self._container.close()

    def add(self, frames: np.ndarray) -> None:
        """Append frames [T, height, width, 3] uint8, all of one size.

        Small ones are enlarged to VIDEO_HEIGHT.
        """
        frames = _enlarge(frames, VIDEO_HEIGHT)
        # even sides: colour is stored at half size
        height = frames.shape[1] // 2 * 2
        width = frames.shape[2] // 2 * 2
        with writing(self._path):
            if self._container is None:
                self._container = av.open(self._partial, "w", format="mp4", options=FRAGMENTS)
                self._stream = self._container.add_stream(
                    "libx264",
                    rate=Fraction(self._fps),
                    width=width,
                    height=height,
                    pix_fmt="yuv420p",
                    options=X264_OPTIONS | {"g": str(2 * self._fps)},  # frames of a fragment
                )
            for frame in frames[:, :height, :width]:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """End the video and put it in place whole."""
        with writing(self._path):
            self._container.mux(self._stream.encode())
            self._container.close()
        with (
            atomic(self._path) as file,
            av.open(self._partial) as source,
            av.open(file, "w", format="mp4") as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last one only says that there are no more
                    packet.stream = stream
                    target.mux(packet)
        self._partial.unlink()


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames [T, height, width, 3] uint8 as one file."""
    with Mp4Writer(path, fps) as writer:
        writer.add(frames)


def read_video(
    path: Path, fps: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Return the frames [T, height, width, 3] uint8 of a video file.

    Args:
      path: of the file.
      fps: take the frames that are shown at whole multiples of 1 / fps seconds; None: all.
      size: (width, height) to resize to; None: as they are.

    Raises:
      ValueError: naming the file, if there are no frames in it.
    """
    frames: list[np.ndarray] = []
    first = None
    try:
        with av.open(path) as container:
            for frame in container.decode(video=0):
                time: Any = frame.time
                first = time if first is None else first
                shown = len(frames) if fps is None else int((time - first) * fps + 1e-6)
                due = shown + 1 - len(frames)
                if due > 0:
                    picture = frame.to_ndarray(format="rgb24")
                    frames += [picture if size is None else resized(picture, size)] * due
        return np.stack(frames)
    # TypeError: a frame without a time
    except (FFmpegError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from None


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a picture [height, width, 3] uint8 at (width, height)."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def strip(frames: np.ndarray) -> np.ndarray:
    """Return some of the frames [T, height, width, 3], evenly spaced in time, side by side.

    The strip is [height, width', 3] uint8, with a white column between neighbours.
    """
    times = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames)))
    return np.concatenate(
        [
            np.pad(frames[round(time)], ((0, 0), (0, 1), (0, 0)), constant_values=255)
            for time in times
        ],
        axis=1,
    )


def write_png(path: Path, picture: np.ndarray | Image.Image) -> None:
    """Write a picture [height, width, 3] uint8 as a lossless file."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with atomic(path) as file:
        image.save(file, "png")


def read_png(path: Path) -> np.ndarray:
    """Return the picture that `write_png` has written."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def contact_sheet(
    title: str,
    rows: Sequence[str],
    columns: Mapping[str, Sequence[tuple[np.ndarray, str]]],
) -> Image.Image:
    """Return a sheet of film strips, each with a caption below it.

    Args:
      title: of the sheet.
      rows: what is written above each row.
      columns: heading -> (a strip [height, width, 3] uint8, its caption) for each row; all strips
        are of one size.
    """
    first, _ = next(iter(columns.values()))[0]
    height, width = _enlarge(first, STRIP_HEIGHT).shape[:2]
    margin = 16
    head = 64  # pixels of the title and the headings
    pitch = height + 56  # from row to row
    size = (margin + (width + margin) * len(columns), head + pitch * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    text = ImageFont.load_default(size=16)
    small = ImageFont.load_default(size=13)
    draw.text((margin, 10), title, INK, ImageFont.load_default(size=20))
    for i, row in enumerate(rows):
        draw.text((margin, head + pitch * i), row, INK, text)
    for j, (heading, column) in enumerate(columns.items()):
        x = margin + (width + margin) * j
        draw.text((x, 40), heading, PALE, text)
        for i, (strip, caption) in enumerate(column):
            y = head + pitch * i
            sheet.paste(Image.fromarray(_enlarge(strip, STRIP_HEIGHT)), (x, y + 22))
            draw.text((x, y + 24 + height), caption, PALE, small)
    return sheet


def write_curves(
    path: Path, panels: Mapping[str, Mapping[str, Line]], xlabel: str, log: Sequence[str]
) -> None:
    """Write a PNG with a panel for each title.

    Args:
      path: of the file.
      panels: {title: {label: points}}; every x is a whole number.
      xlabel: what x is.
      log: titles of panels whose y axis is logarithmic, if they have a positive value.
    """
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for label, points in lines.items():
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker=("o" if len(points) < 4 else None),
                label=label,
            )
        if title in log and any(y > 0 for points in lines.values() for _, y in points):
            axes.set_yscale("log")
        axes.set(title=title, xlabel=xlabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize="small")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _enlarge(frames: np.ndarray, height: int) -> np.ndarray:
    """Repeat pixels by a whole factor until the height, the third axis from last, is about `height`
    or more.
    """
    factor = max(1, -(-height // frames.shape[-3]))
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)
