"""LoRA adapters: PEFT files <-> the adapter tree {module: {'a': [layers, in, R], 'b': [layers, R, out]}}.

Source: spec/checkpoints.md sections 5.1 to 5.3. A directory written here loads in PEFT 0.10.0 and later; one written
by PEFT loads here only if it holds exactly the ten adapted linears of every block.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.engine import LINEAR, Rule
from astrolabe_jax.convert.files import read_json, read_safetensors, write_atomic
from astrolabe_jax.models.lora import TARGETS

PREFIX = "base_model.model.blocks.{i}"

TABLE = [
    Rule(f"{PREFIX}.{module}.lora_{half.upper()}.weight", f"{module}.{half}", LINEAR)
    for module in TARGETS
    for half in "ab"
]


def from_peft(tensors: Mapping[str, np.ndarray], expected: dict) -> dict:
    """PEFT state dict (lora_A [R, in], lora_B [out, R]) -> the adapter tree `expected`, in its dtypes.

    Raises engine.ConversionError unless the names and shapes match exactly: PEFT itself ignores misspelt names.
    """
    return engine.load(TABLE, tensors, expected)


def to_peft(adapter: dict) -> dict[str, np.ndarray]:
    """The exact inverse of `from_peft`."""
    return engine.save(TABLE, adapter)


def save_peft(adapter: dict, directory: Path | str, rank: int, alpha: float) -> None:
    """Write adapter_model.safetensors and adapter_config.json, each replaced atomically, the config last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    layers = next(iter(adapter.values()))["a"].shape[0]
    targets = [f"blocks.{i}.{module}" for i in range(layers) for module in TARGETS]
    # PEFT's own files carry {'format': 'pt'}, and its loader asks for it.
    payload = safetensors.numpy.save(to_peft(adapter), metadata={"format": "pt"})
    write_atomic(directory / "adapter_model.safetensors", payload)
    config = json.dumps(peft_config(rank, alpha, targets), indent=2, sort_keys=True)
    write_atomic(directory / "adapter_config.json", config.encode())


def load_peft(directory: Path | str, expected: dict) -> tuple[dict, float]:
    """Read a PEFT directory -> (adapter tree like `expected`, scale alpha/R).

    Raises, naming the file: ValueError for one that cannot be read or holds a variant of LoRA that the adapter tree
    cannot hold, engine.ConversionError for tensors that do not fit `expected`, and FileNotFoundError.
    """
    described, weights = (Path(directory) / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    for path in (described, weights):
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; expected a PEFT directory with {described.name} and {weights.name}")
    config = read_json(described)
    plain = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
    plain |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    odd = {key: config[key] for key, value in plain.items() if config.get(key, value) != value}
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{described}: not a plain LoRA adapter: peft_type {config.get('peft_type')}, {odd}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(
            f"{described} has r {rank!r} and lora_alpha {alpha!r}; expected the rank, a whole number, and a number"
        )
    wanted = next(iter(expected.values()))["a"].shape[-1]
    if rank != wanted:  # one line, where the tensors would give one each
        raise ValueError(f"{described} has r {rank}; expected rank {wanted}: set the rank of this run to {rank}")
    try:
        return from_peft(read_safetensors(weights), expected), alpha / rank
    except engine.ConversionError as error:
        raise engine.ConversionError(f"{weights}: {error}") from None


def peft_config(rank: int, alpha: float, target_modules: list[str]) -> dict:
    """The fields of PEFT 0.10.0 and no other: it refuses files with newer ones (spec/checkpoints.md 5.3)."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": False,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": target_modules,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
