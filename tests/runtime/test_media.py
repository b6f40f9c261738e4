"""Videos on disk: whole or not at all, the same bytes however they are cut, and watchable while
they are made.
"""

import av
import numpy as np
import pytest

from astrolabe_jax.runtime.media import Mp4Writer, read_video, strip, write_mp4


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
def test_a_video_is_read_at_another_rate(tmp_path, rate, expected):
    """Seconds stay seconds: of 40 frames at twice the rate every other one, at half the rate each
    twice.
    """
    write_mp4(tmp_path / "a.mp4", moving(40), rate)
    frames = read_video(tmp_path / "a.mp4", 16, (32, 32))
    assert frames.shape == (expected, 32, 32, 3)
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
