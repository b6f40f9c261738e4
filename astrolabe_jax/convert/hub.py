"""Where the files that the recipes expect are published (docs/checkpoints.md, Downloads)."""

from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    """A file or a directory of a repository on the Hugging Face hub."""

    path: str  # where the recipes expect it
    repo: str
    file: str = ""  # in the repository; empty: all that it holds
    gigabytes: float = 0.0  # 0: not known
    kind: str = "model"

    @property
    def command(self) -> str:
        """The command that puts it where the recipes expect it."""
        directory = self.path.removesuffix(self.file).rstrip("/") or "."
        dataset = " --repo-type dataset" if self.kind == "dataset" else ""
        file = f" {self.file}" if Path(self.file).suffix else ""
        folder = f" --include '{self.file}/*'" if self.file and not file else ""
        return f"hf download {self.repo}{file}{folder}{dataset} --local-dir {directory}"


DOWNLOADS = (
    Published("wan_models/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-1.3B", gigabytes=17.5),
    Published(
        "checkpoints/self_forcing_dmd.pt",
        "gdhe17/Self-Forcing",
        "checkpoints/self_forcing_dmd.pt",
        5.68,
    ),
    *(
        Published(
            f"checkpoints/casualforcing/{kind}/causal_forcing.pt",
            "zhuhz22/Causal-Forcing",
            f"{kind}/causal_forcing.pt",
            5.68,
        )
        for kind in ("chunkwise", "framewise")
    ),
    *(
        Published(
            f"checkpoints/longlive_models/models/{name}",
            "Efficient-Large-Model/LongLive-1.3B",
            f"models/{name}",
            size,
        )
        for name, size in (("longlive_base.pt", 5.68), ("lora.pt", 2.80))
    ),
    Published(
        "checkpoints/krea-realtime-video-14b.safetensors",
        "krea/krea-realtime-video",
        "krea-realtime-video-14b.safetensors",
        28.6,
    ),
    Published("dataset/vidprom", "Franklinzhang/stream_align", "vidprom", kind="dataset"),
    Published("reward_ckpts/HPSv3.safetensors", "MizzenAI/HPSv3", "HPSv3.safetensors", 16.6),
    Published("reward_ckpts/Videoreward", "KlingTeam/VideoReward", gigabytes=5.03),
)
# What a reward directory is converted from (docs/rewards.md, Conversion).
_SOURCES = {
    "rewards/hpsv3": "reward_ckpts/HPSv3.safetensors",
    "rewards/videoalign": "reward_ckpts/Videoreward",
}


def where(path: str) -> str:
    """Return how to get what the recipes expect at `path`; empty for any other path."""
    wanted = _SOURCES.get(path, path)
    for published in DOWNLOADS:
        if f"{wanted}/".startswith(f"{published.path}/"):
            size = f" ({published.gigabytes:g} GB)" if published.gigabytes else ""
            then = ", then docs/rewards.md, Conversion" if path in _SOURCES else ""
            return f"{published.command}{size}{then}"
    return ""
