"""Videos on disk: whole or not at all, the same bytes however they are cut, and watchable while
they are made.
"""

import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from astrolabe_jax.runtime import media
from astrolabe_jax.runtime.media import (
    Mp4Writer,
    fitted,
    read_picture,
    read_video,
    strip,
    write_mp4,
)


def moving(count):
    """A bright square that moves over a dark ground: [count, 32, 32, 3] uint8."""
    frames = np.full((count, 32, 32, 3), 30, np.uint8)
    for t in range(count):
        frames[t, 8:16, t % 24 : t % 24 + 8] = (220, 180, 40)
    return frames


def test_a_video_is_read_as_it_was_written(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(40), 16)
    with av.open(tmp_path / "a.mp4") as container:
        assert (
            container.streams.video[0].frames == 40
            and container.streams.video[0].average_rate == 16
        )
    read = read_video(tmp_path / "a.mp4")[:, 3::6, 3::6]  # small videos are enlarged, by 6
    assert np.abs(read.astype(int) - moving(40)).mean() < 3


@pytest.mark.parametrize(("rate", "expected"), [(32, 20), (16, 40), (8, 79)])
def test_a_video_is_read_at_another_rate(tmp_path, capsys, rate, expected):
    """Seconds stay seconds: of 40 frames at twice the rate every other one, at half the rate each
    twice.
    """
    write_mp4(tmp_path / "a.mp4", moving(40), rate)
    capsys.readouterr()
    frames = read_video(tmp_path / "a.mp4", 16, (32, 32))
    assert frames.shape == (expected, 32, 32, 3)
    told = f"a.mp4: from {rate} to 16 frames a second: its 40 frames become {expected}\n"
    assert capsys.readouterr().out == (f"{tmp_path}/{told}" if rate != 16 else "")
    shown = moving(40)[(np.arange(expected) * rate / 16).astype(int)]
    assert np.abs(frames.astype(int) - shown).mean() < 5


def test_bytes_do_not_depend_on_the_pieces(tmp_path):
    frames = moving(50)
    write_mp4(tmp_path / "whole.mp4", frames, 16)
    with Mp4Writer(tmp_path / "pieces.mp4", 16) as writer:
        for start in range(0, 50, 7):
            writer.add(frames[start : start + 7])
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_video_can_be_watched_while_it_is_made(tmp_path):
    path, frames = tmp_path / "a.mp4", moving(400)
    with Mp4Writer(path, 16) as writer:
        writer.add(frames[:200])
        assert not path.exists()
        early = len(read_video(tmp_path / "a.partial.mp4"))
        writer.add(frames[200:])
        assert len(read_video(tmp_path / "a.partial.mp4")) > early > 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"] and len(read_video(path)) == 400


def test_a_video_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), Mp4Writer(tmp_path / "a.mp4", 16) as writer:
        writer.add(moving(100))
        raise RuntimeError
    assert not (tmp_path / "a.mp4").exists()
    write_mp4(tmp_path / "a.mp4", moving(5), 16)  # the next one takes its place
    assert len(read_video(tmp_path / "a.mp4")) == 5 and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read as a video"):
        read_video(tmp_path / "a.mp4")


def test_the_same_frames_give_the_same_bytes(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (9, 48, 48, 3), np.uint8)
    paths = [tmp_path / f"{i}.mp4" for i in range(8)]
    for path in paths:
        write_mp4(path, video, 16)
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_strip_shows_the_first_and_the_last_frame():
    video = moving(33)
    shown = strip(video)
    assert np.array_equal(shown[:, :32], video[0]) and np.array_equal(shown[:, -33:-1], video[-1])
    assert (shown[:, 32] == 255).all() and shown.shape == (32, 7 * 33, 3)
    assert strip(video[:2]).shape == (32, 2 * 33, 3)


# What people bring: pictures and videos as their cameras and programs write them.

SIZE = (96, 48)
CORNERS = np.zeros((48, 96, 3), np.uint8)
CORNERS[:24, :48] = (220, 40, 40)
CORNERS[:24, 48:] = (40, 220, 40)
CORNERS[24:, :48] = (40, 40, 220)


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


# By its number in EXIF: how a picture is stored that is shown upright.
STORED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.swapaxes(0, 1),
    6: np.rot90(CORNERS),
    7: CORNERS.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90(CORNERS, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_as_the_camera_was_held(tmp_path, orientation):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    image.save(tmp_path / "a.png", exif=exif(orientation))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", SIZE), CORNERS)


RAMP = np.broadcast_to(np.arange(0, 192, 4, dtype=np.uint8)[:, None], (48, 96))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", Image.fromarray(RAMP)),
        ("a.png", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("a.tif", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("a.tif", Image.fromarray(RAMP.astype(np.int32) * 257)),
        ("a.png", Image.fromarray(RAMP).convert("P")),
        ("a.png", Image.fromarray(RAMP).convert("RGBA")),
        ("a.gif", Image.fromarray(RAMP)),
    ],
)
def test_a_picture_has_its_colours_whatever_the_bits(tmp_path, name, image):
    image.save(tmp_path / name)
    read = read_picture(tmp_path / name, SIZE)
    np.testing.assert_array_equal(read, np.repeat(RAMP[..., None], 3, axis=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    values = np.zeros((48, 96, 4), np.uint8)
    values[:, 32:64, 3] = 255
    values[:, 64:, 3] = 0 if mode == "P" else 51
    Image.fromarray(values).convert(mode).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png", SIZE)
    assert (read[:, :32] == 255).all() and (read[:, 32:64] == 0).all()
    assert mode == "P" or (read[:, 64:] == 204).all()


def test_a_picture_of_another_shape_is_cut_and_that_is_said(tmp_path, capsys):
    wide = np.pad(CORNERS, ((0, 0), (48, 48), (0, 0)), constant_values=255)
    tall = np.pad(CORNERS, ((16, 16), (0, 0), (0, 0)), constant_values=255)
    for picture in (wide, tall):
        Image.fromarray(picture).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_picture(tmp_path / "a.png", SIZE), CORNERS)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a.png is 48x192: of it the middle, 48x96, is used at 48x96",
        f"{tmp_path}/a.png is 80x96: of it the middle, 48x96, is used at 48x96",
    ]
    Image.fromarray(CORNERS).save(tmp_path / "a.png")
    read_picture(tmp_path / "a.png", SIZE)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((1, 1), "a.png is 1x1: it is enlarged 96 times, to 48x96"),
        ((38, 19), "a.png is 19x38: it is enlarged 2.53 times, to 48x96"),
        ((48, 24), ""),  # twice
        ((96, 48), ""),
    ],
)
def test_a_picture_that_is_much_too_small_is_warned_of(tmp_path, capsys, size, told):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png", SIZE)
    assert read.shape == CORNERS.shape and (read == (10, 200, 30)).all()
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path}/{told}" if told else "")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_an_animation_the_first_picture_is_taken_and_that_is_said(tmp_path, capsys, name):
    first, *others = [Image.new("RGB", SIZE, (level, level, level)) for level in (0, 100, 200)]
    first.save(tmp_path / name, save_all=True, append_images=others)
    assert (read_picture(tmp_path / name, SIZE) == 0).all()
    told = f"warning: {tmp_path}/{name} holds 3 pictures; the first alone is used\n"
    assert capsys.readouterr().out == told


def test_the_preview_behind_a_photo_is_no_second_picture(tmp_path, capsys):
    photo = Image.fromarray(CORNERS)
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[photo.resize((8, 4))])
    assert read_picture(tmp_path / "a.jpg", SIZE).shape == CORNERS.shape
    assert not capsys.readouterr().out


def png_of(width, height):
    """A picture of one colour in a few kilobytes."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    rows = zlib.compress(bytes(height * (width // 8 + 2)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of(30000, 30000), "a.png cannot be read as a picture: .*900000000 pixels"),
        (png_of(12000, 12000), "it has 12000x12000 pixels, at most 134,217,728"),
        (png_of(3000, 3000)[:-600], "a.png cannot be read as a picture: "),
        (b"", "a.png cannot be read as a picture; expected one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "expected one of PNG, JPEG"),
    ],
)
def test_what_is_no_picture_is_named_in_one_line(tmp_path, content, message, recwarn):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_picture(tmp_path / "a.png", SIZE)
    assert "\n" not in str(raised.value) and not recwarn


def test_a_picture_of_floating_point_numbers_is_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
        read_picture(tmp_path / "a.tif", SIZE)


def record(path, frames, times=None, rotation=0, aspect=None):
    """Write frames as a camera would: at 16 a second, or at times in sixteenths of a second."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width = frames.shape[1:3]
        stream.options = {"crf": "4"}
        stream.codec_context.time_base = Fraction(1, 16)
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = times[i] if times else i
            picture.time_base = Fraction(1, 16)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def mean_difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


# How a video is stored that is shown upright, by a, b, c, d of its display matrix: (x, y) is shown
# at (a x + c y, b x + d y).
MATRICES = {
    (1, 0, 0, 1): CORNERS,
    (-1, 0, 0, 1): CORNERS[:, ::-1],
    (1, 0, 0, -1): CORNERS[::-1],
    (-1, 0, 0, -1): CORNERS[::-1, ::-1],
    (0, 1, 1, 0): CORNERS.swapaxes(0, 1),
    (0, -1, 1, 0): np.rot90(CORNERS, -1),
    (0, 1, -1, 0): np.rot90(CORNERS),
    (0, -1, -1, 0): CORNERS.swapaxes(0, 1)[::-1, ::-1],
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_video_is_turned_as_the_camera_was_held(tmp_path, matrix):
    path = tmp_path / "a.mp4"
    record(path, np.repeat(MATRICES[matrix][None], 3, axis=0))
    content = path.read_bytes()
    place = content.index(b"tkhd") + 44  # where an mp4 has the matrix of its track
    a, b, c, d = (65536 * value for value in matrix)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(content[:place] + turned + content[place + 36 :])
    for read in (read_video(path), read_video(path, 16, SIZE)):
        assert read.shape == (3, 48, 96, 3) and mean_difference(read[1], CORNERS) < 6


def test_a_video_is_turned_against_the_clock(tmp_path):
    record(tmp_path / "a.mp4", np.repeat(CORNERS[None], 3, axis=0), rotation=90)
    assert mean_difference(read_video(tmp_path / "a.mp4")[1], np.rot90(CORNERS)) < 6


def test_pixels_that_are_not_square_become_so(tmp_path):
    record(tmp_path / "a.mp4", np.repeat(CORNERS[None, :, ::2], 3, axis=0), aspect=Fraction(2))
    assert mean_difference(read_video(tmp_path / "a.mp4", 16, SIZE)[1], CORNERS) < 12


def test_an_enlarged_video_comes_back_as_it_was(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(9), 16)
    assert mean_difference(read_video(tmp_path / "a.mp4", 16, (32, 32)), moving(9)) < 1.5
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    large = picture.repeat(6, 0).repeat(6, 1)
    np.testing.assert_array_equal(fitted(large, (32, 32)), picture)


def test_frames_without_times_follow_at_the_nominal_rate(tmp_path):
    record(tmp_path / "a.h264", moving(33))
    frames = read_video(tmp_path / "a.h264", 8, (32, 32))
    assert len(frames) == 17 and mean_difference(frames, moving(33)[::2]) < 5


def test_joined_recordings_follow_each_other(tmp_path):
    """The clock of the second one begins again."""
    record(tmp_path / "one.ts", moving(40))
    (tmp_path / "a.ts").write_bytes((tmp_path / "one.ts").read_bytes() * 2)
    frames = read_video(tmp_path / "a.ts", 16, (32, 32))
    assert abs(len(frames) - 80) <= 2 and mean_difference(frames[:40], moving(40)) < 5
    assert mean_difference(frames[-30:], moving(40)[-30:]) < 5


def test_frames_that_are_all_at_one_time_are_refused(tmp_path):
    record(tmp_path / "a.mkv", moving(9), times=[0] * 9)
    with pytest.raises(ValueError, match="its frames have no times; wrap it: ffmpeg"):
        read_video(tmp_path / "a.mkv", 16, (32, 32))


def sound(path):
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 44100), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_file_of_sound_is_named(tmp_path):
    sound(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4 has no video stream \(it has sound\)"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.mp4"):
        read_video(tmp_path / "b.mp4")
    with pytest.raises(IsADirectoryError, match="is a directory; expected one video file"):
        read_video(tmp_path)


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"]
)
def test_a_playlist_opens_no_other_file(tmp_path, text):
    write_mp4(tmp_path / "secret.mp4", moving(5), 16)
    (tmp_path / "a.mp4").write_text(text.format("secret.mp4"))
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read as a video: .*no playlist"):
        read_video(tmp_path / "a.mp4")


def test_memory_is_bounded_whatever_the_length(tmp_path, monkeypatch, capsys):
    """A gap of five minutes between two frames is 4,800 frames; three are held."""
    monkeypatch.setattr(media, "MOST_BYTES", 3 * 32 * 32 * 3)
    record(tmp_path / "gap.mkv", moving(2), times=[0, 4800])
    with pytest.raises(ValueError, match=r"gap\.mkv has more than 3 frames of 32x32, .*cut it"):
        read_video(tmp_path / "gap.mkv", 16, (32, 32))
    assert read_video(tmp_path / "gap.mkv", 16, (32, 32), end=True).shape == (3, 32, 32, 3)
    assert "of these 4801 frames the last 3 are used" in capsys.readouterr().out
    record(tmp_path / "long.mkv", moving(20))
    last = read_video(tmp_path / "long.mkv", 16, (32, 32), end=True)
    assert mean_difference(last, moving(20)[-3:]) < 5


def test_frames_beyond_all_bounds_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MOST_FRAME_PIXELS", 32 * 32 - 1)
    record(tmp_path / "a.mkv", moving(2))
    with pytest.raises(ValueError, match="frames of 32x32; at most 1,023 pixels are read"):
        read_video(tmp_path / "a.mkv")
