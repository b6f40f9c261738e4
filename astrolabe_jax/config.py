"""Every field of a run, once, with its meaning; and the check that a run makes sense before anything is compiled.

`configs/*.py` start from `get_config()` and change what their recipe changes. The glossary of the objective is
spec objective.md; where the published code differs from the corrected default, `reference(config)` sets it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults: the corrected behaviour of every switch (spec objective.md section 14)."""
    config = ConfigDict()
    config.name = "run"  # shown in the summary and in TensorBoard
    config.seed = 0  # every random draw derives from it

    # The base model: the name of a shipped one (`moving_shapes`) or a directory with its files.
    config.base = "moving_shapes"

    config.model = ConfigDict()
    config.model.dtype = "float32"  # compute dtype of transformer, text encoder and VAE: float32 or bfloat16
    config.model.param_dtype = "float32"  # storage dtype of the frozen base
    config.model.block = 3  # P, latent frames per block of the rollout
    config.model.window = -1  # attention window in latent frames, sink and current block included; -1: `max_global`
    config.model.max_global = 21  # latent frames that a global window sees
    config.model.sink = 0  # first latent frames that stay visible for ever
    config.model.positions = "absolute"  # rotary positions of a rolled window: absolute or relative
    config.model.remat = True  # recompute each layer in the backward pass
    config.model.attention = "auto"  # attention back end: auto, xla or cudnn

    config.sampler = ConfigDict()
    config.sampler.shift = 5.0  # timestep shift of the schedule
    config.sampler.steps = (1000, 750, 500, 250)  # denoising steps on the unshifted scale
    config.sampler.warp = True  # map the steps through the shifted schedule
    config.sampler.context_noise = 0.0  # timestep of the pass that caches a finished block
    config.sampler.sigma_source = "exact"  # sigma of a timestep: exact (t/1000), or lookup (nearest table entry)
    config.sampler.batch = 32  # videos sampled, decoded and scored at once, over all devices

    config.video = ConfigDict()
    config.video.frames = 33  # pixel frames; 1 modulo 4
    config.video.height = 48  # pixels
    config.video.width = 48
    config.video.fps = 16

    config.prompts = ConfigDict()
    config.prompts.train = "world:moving_shapes/train"  # a text file with one prompt a line, or world:NAME/SPLIT
    config.prompts.test = "world:moving_shapes/test"  # prompts of the evaluation
    config.prompts.groups = 6  # G, prompts per epoch
    config.prompts.candidates = 8  # K, videos per prompt
    config.prompts.repeated = 1  # batches of an epoch that draw the same prompts (1: all groups are distinct)

    # Reward name -> weight; the total of a video is the weighted sum (rewards/__init__.py lists the names).
    config.rewards = ConfigDict()

    config.advantages = ConfigDict()
    config.advantages.std = "global"  # divide by the std of the whole epoch (global) or of each prompt (prompt)
    config.advantages.clip = 5.0  # A_max: advantages are clipped to +-this before they become r
    config.advantages.standardise = False  # divide each reward by its std over the epoch before weighting

    config.loss = ConfigDict()
    config.loss.kind = "astrolabe"  # astrolabe (x0 space) or diffusion_nft (adaptive weight, 1/beta, A_max)
    config.loss.mix_beta = 0.1  # beta of the objective: interpolation between current and behaviour policy
    config.loss.kl_weight = 1e-4  # lambda: weight of the deviation from the reference
    config.loss.context = "clean"  # keys of earlier blocks: clean (a clean stream, as in the rollout) or noisy
    config.loss.timesteps = "warped"  # noise levels of the loss: warped (the rollout's) or raw (the unshifted list)
    config.loss.timestep_draw = "stratified"  # stratified: levels balanced over an epoch; batch: one level a microbatch
    config.loss.mask_block = -1  # frames per block of the training mask; -1: model.block
    config.loss.mask_sink = True  # the training mask keeps the sink visible

    config.kl = ConfigDict()
    config.kl.kind = "uniform"  # uniform, or selective: only samples that the main reward alone likes
    config.kl.main_reward = ""  # name of the main reward, for selective
    config.kl.rank_direction = "paper"  # selective: paper (mask what only the main reward likes) or published
    config.kl.reduction = "epoch"  # selective: divide by the masked samples of the epoch, or of each microbatch
    config.kl.reset_bounds = "corrected"  # adaptation of the reset threshold: corrected or published (inverted)
    config.kl.reset_threshold = 0.15  # mean deviation above which the reference is reset
    config.kl.reset_epochs = 15  # the reference is reset after more epochs than this

    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 16.0  # the adapter's output is scaled by alpha / rank
    config.lora.dtype = "float32"  # master weights of the adapters: float32 or bfloat16
    config.lora.init = ""  # a PEFT directory to start from; empty: fresh

    config.optimiser = ConfigDict()
    config.optimiser.learning_rate = 1e-3
    config.optimiser.b1 = 0.9
    config.optimiser.b2 = 0.999
    config.optimiser.eps = 1e-8
    config.optimiser.weight_decay = 1e-4
    config.optimiser.clip_norm = 1.0  # global gradient norm
    config.optimiser.microbatch = 12  # videos per forward and backward pass, over all devices
    config.optimiser.inner_epochs = 1  # passes over an epoch's samples, each with fresh noise and levels
    config.optimiser.steps_per_pass = 1  # optimiser steps per pass; gradients accumulate in between
    config.optimiser.old_decay = "type1"  # behaviour policy <- d old + (1-d) current: type0, type1, type2 or constant
    config.optimiser.old_decay_constant = 0.9  # d for constant
    config.optimiser.ema_cap = 0.9  # largest decay of the evaluation average

    config.train = ConfigDict()
    config.train.epochs = 40
    config.train.eval_every = 0  # epochs between evaluations besides the first and the last; 0: only those
    config.train.checkpoint_every = 10  # epochs between checkpoints; the last epoch always saves
    config.train.checkpoints_kept = 2

    config.eval = ConfigDict()
    config.eval.videos = 96  # held-out videos per evaluation
    config.eval.policy = "ema"  # adapter that is evaluated and exported: ema or current
    config.eval.ceiling = True  # also score reconstructions of real videos (worlds only)
    config.eval.shown = 8  # prompts on the contact sheet and in samples/

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1: what fsdp leaves
    config.mesh.fsdp = 1  # devices that the parameters are split over
    return config


# The published behaviour, one switch each (objective.md section 14); `--config=FILE:reference` sets all.
REFERENCE_SWITCHES = {
    "context": {"loss.context": "noisy"},
    "timesteps": {"loss.timesteps": "raw"},
    "mask_block": {"loss.mask_block": 1, "loss.mask_sink": False},
    "repeated_prompts": {"prompts.repeated": -1},
    "sigma_source": {"sampler.sigma_source": "lookup"},
    "timestep_draw": {"loss.timestep_draw": "batch"},
    "lora_dtype": {"lora.dtype": "bfloat16"},
    "selective_kl": {
        "kl.rank_direction": "published",
        "kl.reduction": "microbatch",
        "kl.reset_bounds": "published",
    },
}


def with_reference(config: ConfigDict, *switches: str) -> ConfigDict:
    """Sets the published behaviour of the named switches (all of REFERENCE_SWITCHES if none is named)."""
    for switch in switches or REFERENCE_SWITCHES:
        if switch not in REFERENCE_SWITCHES:
            raise ValueError(f"unknown reference switch {switch!r}; expected one of {', '.join(REFERENCE_SWITCHES)}")
        config.update_from_flattened_dict(REFERENCE_SWITCHES[switch])
    return config
