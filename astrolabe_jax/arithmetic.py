"""What follows from a config: how many videos, pieces and rounds, and which frames
(docs/published.md, Batch arithmetic).
"""

from ml_collections import ConfigDict


def samples(config: ConfigDict) -> int:
    """Return the videos of an epoch, N = G K."""
    return config.prompts.prompts_per_epoch * config.prompts.samples_per_prompt


def repeats(config: ConfigDict) -> int:
    """Return how many sampling batches ask for the same prompts: prompts.repeated, or for -1 all
    batches of the epoch.
    """
    repeated = config.prompts.repeated
    return samples(config) // config.sampler.batch if repeated == -1 else repeated


def eval_frames(config: ConfigDict) -> int:
    """Return the pixel frames of a held-out video."""
    return config.eval.frames or config.video.frames


def clip_length(config: ConfigDict) -> int:
    """Return the latent frames of a long video that are scored at once."""
    return config.streaming.score_frames or config.streaming.window


def window_starts(config: ConfigDict, frames: int) -> tuple[int, ...]:
    """Return the latent frames at which a window may begin, ascending.

    A whole video is the window that begins at frame 0.

    Args:
      config: its `streaming` says how long windows are, and which are taken.
      frames: latent frames of the video.

    Returns:
      The starts; one that streaming.starts has twice is there twice.

    Raises:
      ValueError: a window is not whole blocks, or does not lie in the video.
    """
    streaming = config.streaming
    block = config.model.block
    window = streaming.window
    if not window:
        return (0,)
    last = frames - window
    choices = {
        "first": (0,),
        "last": (last - last % block,),
        "random": range(0, max(last, 0) + 1, block),
        "choices": sorted(streaming.starts),
    }
    progressive = range(0, max(last, 0) + 1, window)
    starts = tuple(progressive if streaming.mode == "progressive" else choices[streaming.selection])
    if window % block or any(type(at) is not int or at < 0 or at % block for at in starts):
        raise ValueError(
            f"config.streaming has a window of {window} and starts {tuple(streaming.starts)}; "
            f"expected whole blocks of {block}"
        )
    if last < 0 or not starts or starts[-1] > last:
        raise ValueError(
            f"config.streaming: a window of {window} from frame {max(starts, default='(none)')} "
            f"does not lie in the {frames} latent frames of a video; give other starts, or raise "
            "config.video.frames"
        )
    return starts


def shares_prefix(config: ConfigDict) -> bool:
    """Return whether the videos of a prompt share its past; else each begins at frame 0."""
    return bool(config.streaming.window) and config.streaming.sampling == "clip"


def rounds(config: ConfigDict, devices: int) -> tuple[int, int]:
    """Return how an epoch's videos are taken in turn: (rounds, streams of a round).

    A stream is the past of one prompt, on one device, with its share of the prompt's videos. With
    more devices than prompts, several devices hold the same past. Where nothing is shared, every
    video is a stream of its own.

    Raises:
      ValueError: unless prompts, samples and devices fit each other.
    """
    prompts = config.prompts.prompts_per_epoch
    videos = config.prompts.samples_per_prompt
    if not shares_prefix(config):
        streams = piece(config, config.sampler.batch, devices)
        return max(prompts * videos // streams, 1), streams
    streams = devices * config.streaming.prompts_per_device
    if prompts % streams == 0:
        return prompts // streams, streams
    copies = streams // prompts
    if streams % prompts == 0 and copies <= videos and videos % copies == 0:
        return 1, streams
    raise ValueError(
        f"config.prompts.prompts_per_epoch is {prompts}; expected a multiple of {streams} "
        f"(streaming.prompts_per_device on each of {devices} devices), or a divisor of it that "
        f"splits the {videos} candidates evenly"
    )


def piece(config: ConfigDict, batch: int, devices: int) -> int:
    """Return how many videos of a batch all devices together work on at once.

    It is the largest divisor of the batch that gives no device more than mesh.samples_per_device.

    Args:
      config: its mesh.samples_per_device is the limit.
      batch: videos, a multiple of `devices`.
      devices: of the mesh.
    """
    limit = config.mesh.samples_per_device
    if limit == -1:
        return batch
    each = batch // devices
    return devices * max(size for size in range(1, min(limit, each) + 1) if each % size == 0)
