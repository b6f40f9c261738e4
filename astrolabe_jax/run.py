"""From a config and a directory to a run: everything is read and checked before compilation."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import checkpoint, sharding
from astrolabe_jax.config_checks import error_prefix
from astrolabe_jax.convert import base as bases
from astrolabe_jax.geometry import numerics, rules_of, scene_reader
from astrolabe_jax.models.lora import init_adapter
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.preflight import check
from astrolabe_jax.rewards import panel, registry
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.runtime import backend, files, multihost
from astrolabe_jax.streaming import scenes
from astrolabe_jax.types import Policy, RngStream, Timeline


class Run(NamedTuple):
    """What stays the same from the first epoch to the last.

    A run that is only planned (plan.py) has shapes in place of arrays, and no prompts.
    """

    config: ConfigDict
    workdir: Path
    fingerprint: dict[str, Any]  # what makes two runs the same, see checkpoint.claim
    base: bases.Base  # with its parameters on the mesh
    layout: Layout  # blocks, window, sink
    sampler: Sampler  # denoising steps
    mesh: Any  # Mesh, or AbstractMesh if it is only planned
    latent_shape: tuple[int, int, int, int]  # (F, C, H, W), F to the end of the last window
    train_prompts: tuple[str, ...]
    test_prompts: tuple[str, ...]
    adapter: Any  # of every policy before the first epoch, on the host; None: merged in the base
    starts: tuple[int, ...]  # latent frames at which a trained window may begin; whole videos: 0
    reward_runner: panel.RewardRunner  # the rewards, ready to score

    @property
    def lora_scale(self) -> float:
        """alpha / R."""
        return self.config.lora.alpha / self.config.lora.rank

    @property
    def window(self) -> int:
        """Latent frames that an epoch trains on: the window, or the whole video."""
        return self.config.streaming.window or self.latent_shape[0]

    def policy(self, adapter: dict | None) -> Policy:
        """Return what videos are sampled from."""
        net = self.base.transformer
        return Policy(
            net.params,
            adapter,
            net.graphdef,
            net.config,
            self.layout,
            self.sampler,
            self.lora_scale,
        )


def prepare(config: ConfigDict, workdir: Path | str) -> Run:
    """Check the config, the base model, the prompts and the directory, and load what a run needs.

    All processes of a run call it, and read the same files.

    Raises:
      ValueError, OSError: naming the field, file or line at fault, and the next step; on all
        processes, if on one.
    """
    with error_prefix("workdir"):
        # absolute, as a reward may change the current directory
        directory = multihost.on_all(lambda: files.local_directory(workdir).absolute())
    run = multihost.on_all(lambda: _read(config, directory))
    multihost.refuse_differences(run.fingerprint | {"workdir": str(workdir)})
    holder = multihost.on_primary(lambda: checkpoint.claim(run.workdir, run.fingerprint))
    multihost.on_all(lambda: checkpoint.check_shared(run.workdir, holder))
    return run


def _read(config: ConfigDict, workdir: Path) -> Run:
    """Do all of `prepare` but for the working directory, without the other processes."""
    checked = check(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    base = load_base(config, mesh)
    adapter = checked.adapter or fresh_adapter(config, base.transformer.config)
    reward_runner = load_rewards(config, mesh)
    return Run(
        config,
        workdir,
        {"base": base.fingerprint} | checked.fingerprint | reward_runner.identity,
        base,
        checked.layout,
        checked.sampler,
        mesh,
        checked.latent_shape,
        checked.prompts["train"],
        checked.prompts["test"],
        adapter,
        checked.starts,
        reward_runner,
    )


def load_rewards(config: ConfigDict, mesh: jax.sharding.Mesh) -> panel.RewardRunner:
    """Return the rewards of a config, their weights on the mesh.

    Raises:
      ValueError, OSError: naming the reward and what is at fault.
    """
    scoring = config.scoring
    if scoring.overlap == "all" and jax.process_count() > 1:
        raise ValueError(
            "config.scoring.overlap is 'all' with several processes, which must start programs in "
            "one order; expected host or none"
        )
    return panel.RewardRunner(
        registry.load(config.rewards, registry.Setting(mesh, config.video.fps)),
        scoring.overlap,
        scoring.weights,
        scoring.timeout,
    )


def load_base(
    config: ConfigDict,
    mesh: sharding.AnyMesh,
    change: bases.PlaceLeaf | None = None,
) -> bases.Base:
    """Return the base model of a config, with its parameters on the mesh.

    `change` may change each leaf of a part before it is placed.

    Raises:
      ValueError, OSError: naming the field and the file at fault.
    """
    with error_prefix(
        "config.base and config.transformer" if config.transformer else "config.base"
    ):
        return bases.load_base(
            config.base,
            size=config.model.size,
            transformer=config.transformer,
            place=lambda part, path, leaf: _place(
                config, mesh, part, path, change(part, path, leaf) if change else leaf
            ),
            **numerics(config),
        )


def _place(
    config: ConfigDict, mesh: sharding.AnyMesh, part: str, path: tuple, leaf: np.ndarray
) -> jax.Array:
    """Place a leaf of the base on the mesh.

    Those of the VAE are whole on every device; the large nets are split over `fsdp`.
    """
    if part == "vae":
        return sharding.replicate(mesh, leaf)
    placed = sharding.shard_param(mesh, path, leaf)
    away = part == "text_encoder" and encoder_on_host(config)
    return sharding.moved_to_host(placed) if away else placed


def encoder_on_host(config: ConfigDict) -> bool:
    """Return whether the text encoder is on the devices only while it encodes."""
    place = config.prompts.encoder
    return place == "host" or (place == "auto" and backend.current() != "cpu")


def timeline_of(run: Run, prompt: str, frames: int) -> Timeline:
    """Return the timeline of the first `frames` latent frames of a video of `prompt`.

    Where windows are trained, a prompt may have scenes; elsewhere it is taken literally.
    """
    read = scene_reader(run.config, run.layout, run.base.vae.config)
    return scenes.timeline_of(read(prompt), frames, run.layout, rules_of(run.config))


def fresh_adapter(config: ConfigDict, net: Any) -> dict:
    """Return the adapter that every policy starts from where none is given."""
    key = jax.random.fold_in(jax.random.key(config.seed), RngStream.ADAPTER)
    adapter = init_adapter(net, config.lora.rank, key, jnp.dtype(config.lora.dtype))
    return jax.tree.map(np.asarray, adapter)
