"""Hold the published runs as data: every configuration of the Astrolabe repository, and the default
run of its paper.

docs/published.md tells where they come from (Published runs, Batch arithmetic, Model). The recipe
of a family, configs/FAMILY.py, takes a list of words as its argument, as in
`--config=configs/longlive.py:gardo,devices=24`:

    VARIANT                   rewards and objective: one of VARIANTS, hpsv3 if none is named; paper
                              is the paper's default run, which its repository lacks
    lora_init                 training starts from LongLive's published adapter
    devices=N                 the batches published for 8 (default), 16, 24 or 48 devices; a run may
                              use any number of devices that divides them, and does the same
                              arithmetic
    PUBLISHED_NAME            variant, lora_init and devices at once, for example
                              longlive_video_hpsv3_gardo_24gpu
    framewise                 Causal-Forcing's model with blocks of one frame, which the repository
                              never trains
    rewards=NAME[+NAME...]    these rewards, with weight 1, in place of the published ones; the
                              first is the main one
    reference[=SWITCH[+...]]  the published behaviour of all switches, or of these
                              (config.REFERENCE_SWITCHES)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from astrolabe_jax.arithmetic import samples
from astrolabe_jax.config import WEIGHT, get_config, with_reference

# Reward -> the reward directory that it expects (docs/rewards.md, Conversion). Published as
# video_hpsv3_local, videoalign_mq_score and videoalign_ta_score.
REWARDS = {
    "hpsv3": "rewards/hpsv3",
    "videoalign_mq": "rewards/videoalign",
    "videoalign_ta": "rewards/videoalign",
}


class Preset(NamedTuple):
    """The batches of a number of devices."""

    per_device: int  # videos that each samples, trains on and evaluates at once, b
    samples_per_prompt: int  # K
    prompts_per_epoch: int  # G


# Name -> devices -> batches, as intended: all batches of an epoch have prompts of their own.
PRESETS = {
    "wan": {
        8: Preset(3, 24, 16),
        16: Preset(2, 16, 16),
        24: Preset(4, 24, 48),
        48: Preset(4, 24, 48),
    },
    "krea14b": {
        8: Preset(1, 8, 8),
        16: Preset(1, 16, 16),
        24: Preset(1, 24, 24),
        48: Preset(1, 16, 48),
    },
}
EVAL_BATCHES = 20  # batches that each device evaluates


class Family(NamedTuple):
    """A base model, with the config fields that it sets."""

    preset: str  # name in PRESETS
    fields: dict[str, Any]
    lora: str = ""  # file of its published adapter, for lora_init
    framewise: str = ""  # file of its model with blocks of one frame


FAMILIES = {
    "self_forcing": Family(
        "wan",
        {
            "transformer": "checkpoints/self_forcing_dmd.pt",
            "model.size": "wan_1.3b",
            "model.window": -1,
            "model.max_global": 21,
            "model.sink": 0,
        },
    ),
    "causal_forcing": Family(
        "wan",
        {
            "transformer": "checkpoints/casualforcing/chunkwise/causal_forcing.pt",
            "model.size": "wan_1.3b",
            "model.window": -1,
            "model.max_global": 21,
            "model.sink": 0,
        },
        framewise="checkpoints/casualforcing/framewise/causal_forcing.pt",
    ),
    "longlive": Family(
        "wan",
        {
            "transformer": "checkpoints/longlive_models/models/longlive_base.pt",
            "model.size": "wan_1.3b",
            "model.window": 12,
            "model.sink": 3,
            "scenes.transition": "recache",
        },
        lora="checkpoints/longlive_models/models/lora.pt",
    ),
    "krea14b": Family(
        "krea14b",
        {
            "transformer": "checkpoints/krea-realtime-video-14b.safetensors",
            "model.size": "wan_14b",
            "model.window": -1,
            "model.max_global": 21,
            "model.sink": 0,
        },
    ),
}

COMMON = {
    "seed": 42,
    "base": "wan_models/Wan2.1-T2V-1.3B",  # VAE, text encoder and tokenizer of every family
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.block": 3,
    "model.remat": True,
    "model.attention": "auto",
    "sampler.shift": 5.0,
    "sampler.steps": (1000, 750, 500, 250),
    "sampler.warp": True,
    "video.frames": 81,
    "video.height": 480,
    "video.width": 832,
    "video.fps": 16,
    "prompts.train": "dataset/vidprom/train.txt",
    "prompts.test": "dataset/vidprom/test.txt",
    "advantages.std": "global",
    "advantages.clip": 5.0,
    "loss.mix_beta": 0.1,
    "lora.rank": 256,
    "lora.alpha": 256.0,
    "lora.dtype": "float32",
    "optimizer.weight_decay": 1e-4,
    "optimizer.clip_norm": 1.0,
    "optimizer.inner_epochs": 1,
    "optimizer.steps_per_pass": 1,
    "optimizer.old_decay": "type1",
    "eval.ceiling": False,  # there are no real videos of these prompts
    # Ours: the number of epochs is not published (its checkpoints are of the order of 10^2 steps).
    # A checkpoint after every epoch, where 30 was published: an epoch is hundreds of videos, and a
    # run that is killed loses one at most.
    "train.epochs": 120,
    "train.checkpoint_every": 1,
}


class Variant(NamedTuple):
    """Rewards with their weights, and the other config fields that set these runs apart."""

    rewards: dict[str, float]
    fields: Mapping[str, Any] = {}


_SELECTIVE = {"kl.kind": "selective", "kl.main_reward": "hpsv3"}
VARIANTS = {
    "hpsv3": Variant({"hpsv3": 1.0}),
    "multi_reward": Variant({"hpsv3": 1.0, "videoalign_mq": 1.0}),
    "hpsv3_mq_ta": Variant({"hpsv3": 1.0, "videoalign_mq": 1.0, "videoalign_ta": 1.0}),
    "hpsv3_ta": Variant({"hpsv3": 0.1, "videoalign_ta": 1.0}),
    "ta": Variant({"videoalign_ta": 1.0}),
    "mq": Variant({"videoalign_mq": 1.0}),
    "gardo": Variant({"hpsv3": 1.0, "videoalign_mq": 1.0}, _SELECTIVE),
    # Published as 240 frames, which it cuts to 60 latents; the VAE makes 237 frames of those (1 + 4
    # x 59).
    "long": Variant({"hpsv3": 1.0}, {"video.frames": 237}),
    # Published as 960 frames, of which 957 make the 240 latents that are sampled at most. It
    # evaluates 240 frames: 60 latents, of which the VAE makes 237.
    "streaming": Variant(
        {"hpsv3": 1.0},
        {
            "video.frames": 957,
            "eval.frames": 237,
            "streaming.window": 21,
            "streaming.selection": "choices",
            "streaming.starts": (21,),
        },
    ),
    "paper": Variant(
        {"hpsv3": 1.0, "videoalign_mq": 1.0, "videoalign_ta": 1.0},
        {
            **_SELECTIVE,
            "loss.mix_beta": 1.0,
            "optimizer.old_decay": "constant",
            "optimizer.old_decay_constant": 0.9,
            "prompts.prompts_per_epoch": 48,
            "prompts.samples_per_prompt": 24,
        },
    ),
}


class Row(NamedTuple):
    """A published run."""

    name: str
    family: str
    variant: str
    devices: int
    kl_weight: float  # lambda
    learning_rate: float
    eval_every: int  # epochs
    lora_init: bool = False

    @property
    def words(self) -> str:
        """The words that ask for it, but for devices."""
        return f"{self.variant},lora_init" if self.lora_init else self.variant


ROWS = (
    Row("self_forcing_video_hpsv3", "self_forcing", "hpsv3", 8, 1e-4, 1e-5, 10),
    Row("self_forcing_video_hpsv3_16gpu", "self_forcing", "hpsv3", 16, 1e-3, 1e-5, 30),
    Row("self_forcing_video_hpsv3_24gpu", "self_forcing", "hpsv3", 24, 1e-3, 1e-5, 30),
    Row("self_forcing_video_hpsv3_48gpu", "self_forcing", "hpsv3", 48, 1e-4, 1e-5, 10),
    Row("self_forcing_video_multi_reward", "self_forcing", "multi_reward", 8, 1e-4, 1e-5, 10),
    Row(
        "self_forcing_video_multi_reward_16gpu", "self_forcing", "multi_reward", 16, 1e-3, 1e-5, 30
    ),
    Row(
        "self_forcing_video_multi_reward_24gpu", "self_forcing", "multi_reward", 24, 1e-3, 1e-5, 30
    ),
    Row(
        "self_forcing_video_multi_reward_48gpu", "self_forcing", "multi_reward", 48, 1e-4, 1e-5, 10
    ),
    Row("casual_forcing_video_hpsv3", "causal_forcing", "hpsv3", 8, 1e-4, 1e-5, 30),
    Row("casual_forcing_video_hpsv3_16gpu", "causal_forcing", "hpsv3", 16, 1e-4, 1e-5, 10),
    Row("casual_forcing_video_hpsv3_24gpu", "causal_forcing", "hpsv3", 24, 1e-4, 1e-5, 10),
    Row("casual_forcing_video_hpsv3_48gpu", "causal_forcing", "hpsv3", 48, 1e-4, 1e-5, 30),
    Row(
        "casual_forcing_video_hpsv3_mq_ta_48gpu",
        "causal_forcing",
        "hpsv3_mq_ta",
        48,
        1e-4,
        1e-5,
        30,
    ),
    Row("casual_forcing_video_hpsv3_ta_48gpu", "causal_forcing", "hpsv3_ta", 48, 1e-4, 1e-5, 30),
    Row("casual_forcing_video_multi_reward", "causal_forcing", "multi_reward", 8, 1e-4, 2e-5, 30),
    Row(
        "casual_forcing_video_multi_reward_16gpu",
        "causal_forcing",
        "multi_reward",
        16,
        1e-4,
        1e-5,
        10,
    ),
    Row(
        "casual_forcing_video_multireward_48gpu",
        "causal_forcing",
        "multi_reward",
        48,
        5e-4,
        1e-5,
        30,
    ),
    Row("casual_forcing_video_ta_48gpu", "causal_forcing", "ta", 48, 1e-4, 2e-5, 30),
    Row("longlive_video_hpsv3", "longlive", "hpsv3", 8, 1e-4, 1e-5, 10),
    Row("longlive_video_hpsv3_16gpu", "longlive", "hpsv3", 16, 1e-4, 1e-5, 10),
    Row("longlive_video_hpsv3_24gpu", "longlive", "hpsv3", 24, 1e-4, 1e-5, 10),
    Row("longlive_video_hpsv3_48gpu", "longlive", "hpsv3", 48, 1e-4, 1e-5, 30),
    Row("longlive_video_hpsv3_with_lora_init", "longlive", "hpsv3", 8, 1e-4, 1e-5, 10, True),
    Row("longlive_video_hpsv3_with_lora_init_24gpu", "longlive", "hpsv3", 24, 1e-4, 1e-5, 10, True),
    Row("longlive_video_hpsv3_with_lora_init_48gpu", "longlive", "hpsv3", 48, 1e-4, 1e-5, 30, True),
    Row("longlive_video_multi_reward", "longlive", "multi_reward", 8, 1e-4, 1e-5, 10),
    Row("longlive_video_multi_reward_16gpu", "longlive", "multi_reward", 16, 1e-4, 1e-5, 10),
    Row(
        "longlive_video_multi_reward_with_lora_init",
        "longlive",
        "multi_reward",
        8,
        1e-4,
        1e-5,
        10,
        True,
    ),
    Row("longlive_video_multireward_48gpu", "longlive", "multi_reward", 48, 1e-4, 1e-5, 30),
    Row("longlive_video_mq", "longlive", "mq", 8, 1e-4, 1e-5, 20),
    Row("longlive_video_mq_16gpu", "longlive", "mq", 16, 1e-4, 1e-5, 20),
    Row("longlive_video_long", "longlive", "long", 8, 1e-4, 1e-5, 10),
    Row("longlive_video_hpsv3_gardo", "longlive", "gardo", 8, 1e-4, 1e-5, 10),
    Row("longlive_video_hpsv3_gardo_24gpu", "longlive", "gardo", 24, 1e-4, 1e-5, 10),
    Row("longlive_video_hpsv3_gardo_48gpu", "longlive", "gardo", 48, 1e-4, 1e-5, 30),
    Row(
        "longlive_video_hpsv3_streaming_with_lora_init",
        "longlive",
        "streaming",
        8,
        1e-4,
        1e-5,
        30,
        True,
    ),
    Row("krea14b_video_hpsv3", "krea14b", "hpsv3", 8, 1e-4, 1e-5, 30),
    Row("krea14b_video_hpsv3_16gpu", "krea14b", "hpsv3", 16, 1e-4, 1e-5, 30),
    Row("krea14b_video_hpsv3_24gpu", "krea14b", "hpsv3", 24, 1e-4, 1e-5, 30),
    Row("krea14b_video_hpsv3_48gpu", "krea14b", "hpsv3", 48, 1e-4, 1e-5, 30),
    Row("krea14b_video_multi_reward", "krea14b", "multi_reward", 8, 1e-4, 1e-5, 30),
    Row("krea14b_video_multi_reward_24gpu", "krea14b", "multi_reward", 24, 1e-4, 1e-5, 30),
)
# The paper's run, for the batches of each number of devices; its epochs between evaluations are
# ours.
PAPER_ROWS = tuple(
    Row(
        f"{family}_paper" + (f"_{devices}gpu" if devices > 8 else ""),
        family,
        "paper",
        devices,
        1e-4,
        1e-5,
        30,
    )
    for family in FAMILIES
    for devices in PRESETS[FAMILIES[family].preset]
)


def recipe(family: str, argument: str = "") -> ConfigDict:
    """Return the config of a published run.

    Args:
      family: name in FAMILIES.
      argument: words as listed above, with commas between them.

    Raises:
      ValueError: a word is unknown, or no such run was published; the message is one line.
    """
    options = _parse(family, argument)
    row = _find_row(family, options)
    variant = VARIANTS[row.variant]
    fields = COMMON | FAMILIES[family].fields | _batches(row) | dict(variant.fields)
    config = get_config()
    config.update_from_flattened_dict(fields)
    config.name = row.name
    config.loss.kl_weight = row.kl_weight
    config.optimizer.learning_rate = row.learning_rate
    config.train.eval_every = row.eval_every
    config.prompts.tuned_for = samples(config)
    if row.lora_init:
        config.lora.init = FAMILIES[family].lora
    if "framewise" in options:
        config.name += "_framewise"
        config.transformer = FAMILIES[family].framewise
        config.model.block = 1
    rewards = variant.rewards
    if "rewards" in options:
        rewards = dict.fromkeys(options["rewards"], 1.0)
        config.name += f" with {'+'.join(rewards)}"
        if config.kl.kind == "selective":
            config.kl.main_reward = options["rewards"][0]
    for name, weight in rewards.items():
        has_path = name in REWARDS
        config.rewards[name] = {WEIGHT: weight, "path": REWARDS[name]} if has_path else weight
    if "reference" in options:
        with_reference(config, *options["reference"])
    return config


def _batches(row: Row) -> dict[str, int]:
    """Return the fields of a preset, over all devices: they stay the same on any number of them."""
    preset = PRESETS[FAMILIES[row.family].preset][row.devices]
    batch = preset.per_device * row.devices
    return {
        "prompts.prompts_per_epoch": preset.prompts_per_epoch,
        "prompts.samples_per_prompt": preset.samples_per_prompt,
        "sampler.batch": batch,
        "optimizer.microbatch": batch,
        "eval.videos": EVAL_BATCHES * batch,
        "mesh.samples_per_device": preset.per_device,
    }


def _parse(family: str, argument: str) -> dict[str, Any]:
    """Return what the words set: some of variant, lora_init, devices, framewise, rewards,
    reference.
    """
    options = {}
    for word in argument.split(",") if argument else ():
        more = _parse_word(family, word.strip())
        if repeated := options.keys() & more.keys():
            raise ValueError(
                f"configs/{family}.py:{argument}: {word!r} gives {', '.join(sorted(repeated))} a "
                "second time"
            )
        options |= more
    return options


def _parse_word(family: str, word: str) -> dict[str, Any]:
    """Return what one word sets. Raises ValueError, with all that there are, for an unknown one."""
    for row in _rows(family):
        if word == row.name:
            return {"variant": row.variant, "devices": row.devices, "lora_init": row.lora_init}
    if word in VARIANTS:
        return {"variant": word}
    flags = _flags(family)
    if word in flags:
        return {word: True}
    key, equals, value = word.partition("=")
    values = value.split("+") if equals else []
    if key == "devices" and value.isdecimal():
        return {key: int(value)}
    if key == "rewards" and values and all(values):
        return {key: values}
    if key == "reference" and all(values):
        return {key: values}
    variants = list(dict.fromkeys(row.variant for row in _rows(family)))
    settings = ["devices=N", "rewards=NAME[+NAME...]", "reference[=SWITCH[+SWITCH...]]"]
    raise ValueError(
        f"configs/{family}.py does not know {word!r}; expected "
        f"{', '.join(variants + flags + settings)} or the name of a published run"
    )


def _flags(family: str) -> list[str]:
    """Return the words without a value that a family takes besides variants."""
    flags = {"lora_init": FAMILIES[family].lora, "framewise": FAMILIES[family].framewise}
    return [word for word, file in flags.items() if file]


def _rows(family: str) -> list[Row]:
    return [row for row in (*ROWS, *PAPER_ROWS) if row.family == family]


def _find_row(family: str, options: Mapping[str, Any]) -> Row:
    """Return the published run with the options' variant, lora_init and devices.

    Raises ValueError, with all that there are, if there is none.
    """
    rows = _rows(family)
    variant = options.get("variant", "hpsv3")
    devices = options.get("devices", 8)
    # A variant all of whose runs start from the adapter, streaming, does so without the word.
    always = all(row.lora_init for row in rows if row.variant == variant)
    lora_init = options.get("lora_init", always)
    published: dict[str, list[str]] = {}
    for row in rows:
        if (row.variant, row.devices, row.lora_init) == (variant, devices, lora_init):
            return row
        published.setdefault(row.words, []).append(str(row.devices))
    asked = f"{variant},lora_init" if lora_init else variant
    runs = [f"{words},devices={'|'.join(counts)}" for words, counts in published.items()]
    raise ValueError(
        f"configs/{family}.py: no run {asked},devices={devices} was published; there are "
        f"{'; '.join(runs)}"
    )
