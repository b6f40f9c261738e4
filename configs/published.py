"""The published runs: every configuration of the Astrolabe repository, and the default run of its
paper, as data.

Sources: spec objective.md 11 (batches) and 12 (configurations), paper.md 3, model.md 10 and
checkpoints.md 1 (models). configs/FAMILY.py are the recipes; their argument is a list of words,
`--config=configs/longlive.py:gardo,devices=24`:

    VARIANT                     rewards and objective: one of VARIANTS, hpsv3 if none is named;
                                paper is the paper's
                                own default run, which its repository lacks
    lora_init                   training starts from LongLive's published adapter
    devices=N                   the batches published for 8 (default), 16, 24 or 48 devices; a run
                                with these batches
                                may use any number of devices that divides them, and does the same
                                arithmetic
    PUBLISHED_NAME              variant, lora_init and devices at once:
                                longlive_video_hpsv3_gardo_24gpu
    framewise                   Causal-Forcing's model with blocks of one frame (never trained with
                                in the repository)
    rewards=NAME[+NAME...]      these rewards, with weight 1, instead of the published ones; the
                                first is the main one
    reference[=SWITCH[+...]]    the published behaviour of all switches, or of these
                                (config.REFERENCE_SWITCHES)
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from astrolabe_jax.config import WEIGHT, get_config, with_reference

# Published as video_hpsv3_local, videoalign_mq_score and videoalign_ta_score.
# Reward -> the reward directory that it expects (rewards/, convert reward).
REWARDS = {
    "hpsv3": "rewards/hpsv3",
    "videoalign_mq": "rewards/videoalign",
    "videoalign_ta": "rewards/videoalign",
}


class Preset(NamedTuple):
    """The batches of a number of devices."""

    per_device: int  # b, videos sampled, trained on and evaluated at once by each
    candidates: int  # K
    groups: int  # prompts per epoch


# Name and devices -> batches, as intended: distinct prompts in all batches of an epoch.
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
EVAL_BATCHES = 20  # that each device evaluates


class Family(NamedTuple):
    """A base model."""

    preset: str
    fields: dict[str, Any]
    lora: str = ""  # its published adapter, for lora_init
    framewise: str = ""  # its model with blocks of one frame


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
    """Rewards with their weights, and what else sets these runs apart."""

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
        """Its variant, and lora_init."""
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
    """The config that the words of `argument` (see above) ask for; ValueError, on one line, for
    others.
    """
    wish = _wish(family, argument)
    row = _row(family, wish)
    variant, config = VARIANTS[row.variant], get_config()
    rewards = dict.fromkeys(wish["rewards"], 1.0) if "rewards" in wish else variant.rewards
    config.update_from_flattened_dict(
        COMMON | FAMILIES[family].fields | _batches(row) | dict(variant.fields)
    )
    config.name = row.name
    config.loss.kl_weight = row.kl_weight
    config.optimizer.learning_rate = row.learning_rate
    config.train.eval_every = row.eval_every
    config.prompts.tuned_for = config.prompts.prompts_per_epoch * config.prompts.samples_per_prompt
    for name, weight in rewards.items():
        config.rewards[name] = (
            {WEIGHT: weight, "path": REWARDS[name]} if name in REWARDS else weight
        )
    if row.lora_init:
        config.lora.init = FAMILIES[family].lora
    if "framewise" in wish:
        config.name += "_framewise"
        config.transformer, config.model.block = FAMILIES[family].framewise, 1
    if "rewards" in wish:
        config.name += f" with {'+'.join(rewards)}"
        if config.kl.kind == "selective":
            config.kl.main_reward = next(iter(rewards))
    return with_reference(config, *wish["reference"]) if "reference" in wish else config


def _batches(row: Row) -> dict[str, int]:
    """The numbers of a preset over all devices, which stay the same on any number of them."""
    preset = PRESETS[FAMILIES[row.family].preset][row.devices]
    batch = preset.per_device * row.devices
    return {
        "prompts.prompts_per_epoch": preset.groups,
        "prompts.samples_per_prompt": preset.candidates,
        "sampler.batch": batch,
        "optimizer.microbatch": batch,
        "eval.videos": EVAL_BATCHES * batch,
        "mesh.samples_per_device": preset.per_device,
    }


def _wish(family: str, argument: str) -> dict[str, Any]:
    """What the words ask for, by what they are about: variant, lora_init, devices, framewise,
    rewards, reference.
    """
    wish = {}
    for word in argument.split(",") if argument else ():
        meaning = dict(_meaning(family, word.strip()))
        if both := wish.keys() & meaning.keys():
            raise ValueError(
                f"configs/{family}.py:{argument}: {word!r} gives {', '.join(sorted(both))} a "
                "second time"
            )
        wish |= meaning
    return wish


def _meaning(family: str, word: str) -> Iterator[tuple[str, Any]]:
    rows = {row.name: row for row in _rows(family)}
    key, equals, value = word.partition("=")
    values = value.split("+") if equals else []
    if word in rows:
        row = rows[word]
        yield from {
            "variant": row.variant,
            "devices": row.devices,
            "lora_init": row.lora_init,
        }.items()
    elif word in VARIANTS:
        yield "variant", word
    elif (
        word == "lora_init"
        and FAMILIES[family].lora
        or word == "framewise"
        and FAMILIES[family].framewise
    ):
        yield word, True
    elif key == "devices" and value.isdecimal():
        yield key, int(value)
    elif key == "rewards" and values and all(values) or key == "reference" and all(values):
        yield key, values
    else:
        known = list(dict.fromkeys(row.variant for row in rows.values()))
        known += ["lora_init"] if FAMILIES[family].lora else []
        known += ["framewise"] if FAMILIES[family].framewise else []
        known += ["devices=N", "rewards=NAME[+NAME...]", "reference[=SWITCH[+SWITCH...]]"]
        raise ValueError(
            f"configs/{family}.py does not know {word!r}; expected {', '.join(known)} or the name "
            "of a published run"
        )


def _rows(family: str) -> list[Row]:
    return [row for row in (*ROWS, *PAPER_ROWS) if row.family == family]


def _row(family: str, wish: Mapping[str, Any]) -> Row:
    """The published run with this variant, lora_init and number of devices; ValueError that lists
    those there are.
    """
    variant, devices = wish.get("variant", "hpsv3"), wish.get("devices", 8)
    rows, there = _rows(family), {}
    # A run that starts from the adapter only, streaming, does so without the word.
    lora_init = wish.get("lora_init", all(row.lora_init for row in rows if row.variant == variant))
    for row in rows:
        if (row.variant, row.devices, row.lora_init) == (variant, devices, lora_init):
            return row
        there.setdefault(row.words, []).append(str(row.devices))
    asked = variant + (",lora_init" if lora_init else "")
    listed = "; ".join(f"{words},devices={'|'.join(counts)}" for words, counts in there.items())
    raise ValueError(
        f"configs/{family}.py: no run {asked},devices={devices} was published; there are {listed}"
    )
