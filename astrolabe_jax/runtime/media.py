"""What a person looks at: videos, film strips, sheets of them, and curves. Files appear whole."""

import collections
import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.stream import Disposition
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from astrolabe_jax.runtime.files import atomic, local_file, writing
from astrolabe_jax.runtime.progress import counted, log, warn

STRIP_FRAMES = 7  # frames of a film strip
VIDEO_HEIGHT = 192  # smaller videos are enlarged to at least this height in mp4 files
STRIP_HEIGHT = 80  # and smaller strips to this on a sheet
SHEET_WIDTH = 2000  # pixels that a sheet has at most; longer strips are made smaller

# What is read. Playlists are not: they could name other files of this machine.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,"
    "ogg,flv,asf,mxf,nut,dv,yuv4mpegpipe,gif,apng"
)
VIDEO = "one video file (.mp4, .mov, .mkv, .webm, .avi, ...)"
PICTURES = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
MOST_BYTES = 2**31  # of the frames of a video: 1,792 of 480x832, which is 112 s
MOST_PIXELS = 2**27  # of a picture; a camera's have up to 108 million
MUCH_LARGER = 2.0  # a picture that is enlarged more often than this is warned of
MOST_FRAME_PIXELS = 2**26  # of a video's frame, whose decoder keeps some 20; 8K has 35 million

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
    `finish` makes it a plain file, and `close` gives it its name, NAME.mp4. Left without `close`,
    or by an exception, NAME.mp4 is not there.
    """

    def __init__(self, path: Path, fps: int):
        self._path = path
        self._partial = path.with_name(f"{path.stem}.partial.mp4")
        self._fps = fps
        # both from the first frames on
        self._container: Any = None
        self._stream: Any = None
        self._finished = False

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

    def finish(self) -> int:
        """End the video, which has its partial name until `close`, and return its bytes."""
        with writing(self._path):
            self._container.mux(self._stream.encode())
            self._container.close()
        with (
            atomic(self._partial) as file,
            av.open(self._partial) as source,
            av.open(file, "w", format="mp4") as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last one only says that there are no more
                    packet.stream = stream
                    target.mux(packet)
        self._finished = True
        return self._partial.stat().st_size

    def close(self) -> None:
        """Put the video in its place, whole."""
        if not self._finished:
            self.finish()
        self._partial.replace(self._path)


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames [T, height, width, 3] uint8 as one file."""
    with Mp4Writer(path, fps) as writer:
        writer.add(frames)


def read_video(
    path: Path | str,
    fps: int | None = None,
    size: tuple[int, int] | None = None,
    end: bool = False,
) -> np.ndarray:
    """Return the frames [T, height, width, 3] uint8 of a video file, as a player shows them.

    Args:
      path: of the file.
      fps: take the frames that are shown at whole multiples of 1 / fps seconds; None: all.
      size: (width, height) to bring them to, as `fitted` does; None: as they are.
      end: of a video whose frames take more than MOST_BYTES return the last ones. Else that is an
        error.

    Raises:
      OSError: if there is no such file, or it is a directory.
      ValueError: naming the file, if it cannot be read.
    """
    path = local_file(path, VIDEO)
    try:
        with av.open(
            path, options={"format_whitelist": CONTAINERS}, metadata_errors="replace"
        ) as container:
            return _read_frames(container, path, fps, size, end)
    except FFmpegError as error:
        raise ValueError(
            f"{path} cannot be read as a video: {error.strerror}; expected {VIDEO}, whole, no "
            "playlist and no picture"
        ) from None


def _read_frames(
    container: Any, path: Path, fps: int | None, size: tuple[int, int] | None, end: bool
) -> np.ndarray:
    """Do the work of `read_video`."""
    stream = _video_stream(container, path)
    kept: collections.deque[np.ndarray] = collections.deque()
    taken = 0
    decoded = 0
    shown = 0.0
    for shown, frame in _timed(container, stream):
        decoded += 1
        due = (taken if fps is None else int(shown * fps + 1e-6)) + 1 - taken
        if due <= 0:
            continue
        picture, aspect = _upright(frame, stream.sample_aspect_ratio)
        if size is not None:
            if not taken:
                _log_fit(path, picture.shape, size, aspect)
            picture = fitted(picture, size, aspect)
        taken += due
        most = MOST_BYTES // picture.nbytes
        if taken > most and not end:
            height, width = picture.shape[:2]
            raise ValueError(
                f"{path} has more than {counted(most, 'frame')} of {height}x{width}, which are not "
                "held in memory at once; cut it into pieces"
            )
        kept.extend([picture] * min(due, most))
        while len(kept) > most:
            kept.popleft()
    if not kept:
        raise ValueError(f"{path} has a video stream without frames; write the file again")
    if fps is not None and decoded > 1 and shown == 0:
        raise ValueError(
            f"{path}: its frames have no times; wrap it: ffmpeg -i {path} -c copy a.mp4"
        )
    if fps is not None and taken != decoded:
        rate = (decoded - 1) / shown
        log(
            f"{path}: from {rate:.4g} to {fps} frames a second: its {counted(decoded, 'frame')} "
            f"become {taken}"
        )
    if taken > len(kept):
        log(f"{path}: of these {taken} frames the last {len(kept)} are used")
    frames = np.empty((len(kept), *kept[0].shape), np.uint8)
    for i in range(len(frames)):
        frames[i] = kept.popleft()  # so that they are not held twice
    return frames


def _video_stream(container: Any, path: Path) -> Any:
    """Return the video of a file; ValueError if it has none, or one of frames beyond all bounds."""
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic  # the cover of a song
    ]
    if not streams:
        sound = " (it has sound)" if container.streams.audio else ""
        raise ValueError(f"{path} has no video stream{sound}; give a video")
    stream = streams[0]
    stream.codec_context.options = {"max_pixels": str(MOST_FRAME_PIXELS)}
    stream.thread_type = "AUTO"
    if stream.width * stream.height > MOST_FRAME_PIXELS:
        raise ValueError(
            f"{path} has frames of {stream.height}x{stream.width}; at most {MOST_FRAME_PIXELS:,} "
            "pixels are read: make it smaller"
        )
    return stream


def _timed(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Give each frame with the seconds at which it is shown, from the first one on.

    Frames without a time, as in a raw stream, follow each other at the rate that the stream names.
    """
    rate = stream.guessed_rate or stream.average_rate
    step = float(1 / rate) if rate else 0.0
    shown = -step
    begin = None
    for frame in container.decode(stream):
        if frame.time is None:
            shown += step
        else:
            # the first one; or the clock begins again, where recordings were joined
            if begin is None or frame.time - begin < shown - 1:
                begin = frame.time - (shown + step)
            shown = max(shown, frame.time - begin)
        yield shown, frame


def _upright(frame: Any, aspect: Fraction | None) -> tuple[np.ndarray, float]:
    """Return a frame [height, width, 3] uint8 as its display matrix turns it.

    `aspect` is width / height of a pixel as it is stored; that of the result comes back, too.
    """
    picture = frame.to_ndarray(format="rgb24")
    across = float(aspect or 1)
    for data in frame.side_data:
        if data.type == Type.DISPLAYMATRIX:
            # (x, y) is shown at (a x + c y, b x + d y)
            (a, b), (c, d) = np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2].tolist()
            if abs(a) < abs(b):
                picture = picture.swapaxes(0, 1)
                across = 1 / across
                a = c
                d = b
            picture = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(picture), across


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return a picture file [height, width, 3] uint8 at (width, height), as a viewer shows it.

    It is turned as its EXIF data say, 16 bits become 8, what is transparent lies on white, and it
    is brought to its size as `fitted` does. Of an animation the first frame is taken. Raises
    ValueError, naming the file, if it cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, "r", PICTURES) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"it has {image.height}x{image.width} pixels, at most {MOST_PIXELS:,} are "
                    "read; make it smaller"
                )
            # MPO: a camera's JPEG with a preview or a map of brightness behind it
            pictures = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            ImageOps.exif_transpose(image, in_place=True)
            picture = _eight_bits(image)
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} cannot be read as a picture; expected one of {', '.join(PICTURES)}"
        ) from None
    except Exception as error:  # whatever Pillow's decoders raise for a spoilt file
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    if pictures > 1:
        warn(f"{path} holds {pictures} pictures; the first alone is used")
    _log_fit(path, picture.shape, size)
    return fitted(picture, size)


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return an image [height, width, 3] uint8; ValueError for numbers of unknown range."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("it holds numbers beyond 16 bits; save it with 8 or 16")
        image = Image.fromarray(np.round(values / np.float32(257)).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        image = ground
    return np.asarray(image.convert("RGB"))


def fitted(picture: np.ndarray, size: tuple[int, int], aspect: float = 1.0) -> np.ndarray:
    """Return a picture [height, width, 3] uint8 at (width, height), cut to that shape, not bent.

    Its middle stays. A whole multiple of the size is averaged, which undoes the enlargement of
    small videos in mp4 files. `aspect` is width / height of its pixels.
    """
    height, width = picture.shape[:2]
    box = _middle(height, width, size, aspect)
    whole = box == (0, 0, width, height) and not width % size[0] and not height % size[1]
    kind = Image.Resampling.BOX if whole else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize(size, kind, box))


def _middle(
    height: int, width: int, size: tuple[int, int], aspect: float
) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the largest part of the shape of (width, height)."""
    across = min(width, height * size[0] / size[1] / aspect)
    down = min(height, width * size[1] / size[0] * aspect)
    return (width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2


def _log_fit(
    path: Path, shape: tuple[int, ...], size: tuple[int, int], aspect: float = 1.0
) -> None:
    """Log what `fitted` cuts off, if that is more than a row or column at either side.

    And warn of a picture that it makes much larger.
    """
    height, width = shape[:2]
    left, top, right, bottom = _middle(height, width, size, aspect)
    if left > 1 or top > 1:
        log(
            f"{path} is {height}x{width}: of it the middle, {bottom - top:.0f}x{right - left:.0f}, "
            f"is used at {size[1]}x{size[0]}"
        )
    factor = size[1] / (bottom - top)
    if factor > MUCH_LARGER:
        warn(
            f"{path} is {height}x{width}: it is enlarged {factor:.3g} times, to "
            f"{size[1]}x{size[0]}, and looks it; give one of that size"
        )


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
        are of one size. They are made smaller where the sheet would exceed SHEET_WIDTH.
    """
    first, _ = next(iter(columns.values()))[0]
    height, width = _enlarge(first, STRIP_HEIGHT).shape[:2]
    margin = 16
    widest = (SHEET_WIDTH - margin) // len(columns) - margin
    if width > widest:
        height = round(height * widest / width)
        width = widest
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
            shown = Image.fromarray(_enlarge(strip, STRIP_HEIGHT))
            # the kind is for smaller ones
            shown = shown.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(shown, (x, y + 22))
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
