"""What a person looks at: videos, film strips, the before/after contact sheet, and curves. All
pure, files whole.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from astrolabe_jax.runtime.files import atomic, write_atomic, writing

STRIP_FRAMES = 7  # frames of a film strip
VIDEO_HEIGHT = 192  # smaller videos are enlarged to at least this height in mp4 files
STRIP_HEIGHT = 80  # likewise on the contact sheet
INK, PALE, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


class Mp4Writer:
    """A video that can be watched while it is made: H.264, yuv420p, which every player shows. Same
    frames, same bytes.

    Frames go into NAME.partial.mp4, in fragments of about two seconds; `close` makes it the plain
    file NAME.mp4. Left without `close`, or by an exception, NAME.mp4 is not there.
    """

    def __init__(self, path: Path, fps: int):
        self._path, self._partial, self._fps = path, path.with_name(f"{path.stem}.partial.mp4"), fps
        self._container = self._stream = None

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        elif self._container is not None:
            with contextlib.suppress(OSError):  # a full disk has been told
                self._container.close()

    def add(self, frames: np.ndarray) -> None:
        """Frames [T, height, width, 3] uint8, all of one size. Small ones are enlarged to
        VIDEO_HEIGHT.
        """
        frames = _enlarge(frames, VIDEO_HEIGHT)
        # chroma is stored at half size
        height, width = (side // 2 * 2 for side in frames.shape[1:3])
        with writing(self._path):
            if self._container is None:
                self._open(height, width)
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(frame[:height, :width]), format="rgb24"
                )
                self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Ends the video and puts it in place whole."""
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

    def _open(self, height: int, width: int) -> None:
        fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(self._partial, "w", format="mp4", options=fragments)
        # With mbtree, x264 varies from call to call; its default preset is several times slower
        # than a GPU samples.
        options = {
            "preset": "veryfast",
            "crf": "16",
            "g": str(2 * self._fps),
            "x264-params": "threads=1:mbtree=0",
        }
        self._stream = self._container.add_stream(
            "libx264", rate=Fraction(self._fps), options=options
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Frames [T, height, width, 3] uint8 as one file."""
    with Mp4Writer(path, fps) as writer:
        writer.add(frames)


def read_video(
    path: Path, fps: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Frames [T, height, width, 3] uint8 of a video file; ValueError naming it if there are none.

    fps: those shown at whole multiples of 1 / fps seconds, in place of all. size: (width, height)
    to resize to.
    """
    frames, first = [], None
    try:
        with av.open(path) as container:
            for frame in container.decode(video=0):
                first = frame.time if first is None else first
                due = 1 if fps is None else int((frame.time - first) * fps + 1e-6) + 1 - len(frames)
                if due > 0:
                    picture = frame.to_ndarray(format="rgb24")
                    frames += [picture if size is None else resized(picture, size)] * due
        return np.stack(frames)
    # TypeError: a frame without a time
    except (av.FFmpegError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from None


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture [height, width, 3] uint8 at (width, height)."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def strip(frames: np.ndarray) -> np.ndarray:
    """Frames [T, height, width, 3] -> some of them, evenly spaced in time, side by side: [height,
    width', 3] uint8.

    A white column lies between neighbours.
    """
    times = np.rint(np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames)))).astype(int)
    return np.concatenate(
        [np.pad(frames[t], ((0, 0), (0, 1), (0, 0)), constant_values=255) for t in times], axis=1
    )


def write_png(path: Path, picture: np.ndarray | Image.Image) -> None:
    """A picture [height, width, 3] uint8 as a lossless file."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "png")
    write_atomic(path, buffer.getvalue())


def read_png(path: Path) -> np.ndarray:
    """The inverse of `write_png`."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def contact_sheet(
    title: str,
    prompts: Sequence[str],
    columns: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str]]],
) -> Image.Image:
    """One row per prompt, one column per policy: the film strip, and below it a caption with the
    video's rewards.

    `columns` maps a heading to one strip [height, width, 3] and one caption per prompt; all strips
    are of one size.
    """
    strips = {
        heading: [_enlarge(strip, STRIP_HEIGHT) for strip in column]
        for heading, (column, _) in columns.items()
    }
    height, width = next(iter(strips.values()))[0].shape[:2]
    text, small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    margin, head, row = 16, 64, height + 56
    sheet = Image.new(
        "RGB", (margin + (width + margin) * len(columns), head + row * len(prompts)), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 10), title, INK, ImageFont.load_default(size=20))
    for j, (heading, (_, captions)) in enumerate(columns.items()):
        x = margin + (width + margin) * j
        draw.text((x, 40), heading, PALE, text)
        for i, prompt in enumerate(prompts):
            y = head + row * i
            if j == 0:
                draw.text((x, y), prompt, INK, text)
            sheet.paste(Image.fromarray(strips[heading][i]), (x, y + 22))
            draw.text((x, y + 24 + height), captions[i], PALE, small)
    return sheet


def curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], log: Sequence[str]
) -> bytes:
    """One panel per entry of `panels`, {title: {label: (epochs, values)}}, as a PNG; those in `log`
    have a log axis.
    """
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for label, (epochs, values) in lines.items():
            axes.plot(epochs, values, marker="o" if len(epochs) < 4 else None, label=label)
        positive = any(value > 0 for _, values in lines.values() for value in values)
        if title in log and positive:
            axes.set_yscale("log")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _enlarge(frames: np.ndarray, height: int) -> np.ndarray:
    """Repeats pixels by a whole factor until the height axis (third from last) is at least about
    `height`.
    """
    factor = max(1, -(-height // frames.shape[-3]))
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)
