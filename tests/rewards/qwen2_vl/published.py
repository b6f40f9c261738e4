"""The published files of the rewards on Qwen2-VL, tiny: weights, tokenizer, and a package that
holds the template.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.weights import read_weights
from astrolabe_jax.rewards.directory import PublishedFiles
from astrolabe_jax.rewards.qwen2_vl import chat, convert
from astrolabe_jax.rewards.qwen2_vl.weights import HPSV3, VIDEOALIGN, table
from astrolabe_jax.rewards.templates import sha256
from astrolabe_jax.runtime.files import write_safetensors
from tests.convert import torch_files
from tests.rewards.qwen2_vl import chats, qwen

TEMPLATES = {
    HPSV3.name: dict(
        zip(
            convert.HPSV3_TEXT.constants,
            chats.TEMPLATES[chats.HPSV3].split("\n\n\n\n"),
            strict=True,
        )
    ),
    VIDEOALIGN.name: {
        name: chats.TEMPLATES[chats.VIDEOALIGN] for name in convert.VIDEOALIGN_TEXT.constants
    },
}
TEMPLATES[HPSV3.name]["INSTRUCTION"] += "\n\n\n\n"
RANK, ALPHA = 2, 4
SETTINGS = {
    "data_config": {
        "fps": 2.0,
        "max_frame_pixels": 200704,
        "num_frames": None,
        "sample_type": "uniform",
        "prompt_template_type": "detailed_special",
        "eval_dim": ["VQ", "MQ", "TA"],
    },
    "model_config": {},
    "peft_lora_config": {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA},
    "inference_config": {
        "VQ_mean": 3.6757,
        "VQ_std": 2.2476,
        "MQ_mean": 1.1646,
        "MQ_std": 1.3811,
        "TA_mean": 2.8105,
        "TA_std": 2.5121,
    },
}


def stand_in(monkeypatch) -> None:
    """The templates of the tests, and widths that no tensor tells, in place of the published
    ones.
    """
    for name, kind, config in (
        ("HPSV3", HPSV3.name, qwen.HPSV3),
        ("VIDEOALIGN", VIDEOALIGN.name, qwen.VIDEOALIGN),
    ):
        spec = dataclasses.replace(getattr(convert, name), published=config)
        monkeypatch.setattr(convert, name, spec)
        constants = {variable: sha256(text) for variable, text in TEMPLATES[kind].items()}
        text = getattr(convert, f"{name}_TEXT")._replace(constants=constants)
        monkeypatch.setattr(convert, f"{name}_TEXT", text)


def net(kind: str):
    """(config, graph definition, parameters) of the net that the files hold."""
    tokens, config = {
        HPSV3.name: (chats.HPSV3, qwen.HPSV3),
        VIDEOALIGN.name: (chats.VIDEOALIGN, qwen.VIDEOALIGN),
    }[kind]
    words = chats.tokenizer()
    config = dataclasses.replace(
        config,
        vocab_size=chats.rows(tokens),
        image_token=words.token_to_id(chat.IMAGE),
        video_token=words.token_to_id(chat.VIDEO),
    )
    return config, *qwen.net(config)


def write(folder: Path, kind: str) -> PublishedFiles:
    """What a user has of one kind."""
    config, _, params = net(kind)
    tensors = engine.save(table(config), params)
    package, words = folder / "package" / "data", folder / "words"
    for made in (package, words):
        made.mkdir(parents=True)
    lines = [f"{name} = {text!r}\n" for name, text in TEMPLATES[kind].items()]
    module = convert.HPSV3_TEXT.file if kind == HPSV3.name else convert.VIDEOALIGN_TEXT.file
    (package / module).write_text("raise SystemExit('this ran')\n" + "".join(lines))
    chats.tokenizer().save(str(words / "tokenizer.json"))
    if kind == HPSV3.name:
        file = folder / "HPSv3.safetensors"
        tensors = {_hugging_face(name): tensor for name, tensor in tensors.items()}
        write_safetensors(file, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
        return PublishedFiles((file,), words, folder / "package")
    file = folder / "checkpoint-11352" / "model.pth"
    file.parent.mkdir()
    (folder / "model_config.json").write_text(json.dumps(SETTINGS))
    words.rename(file.parent / "tokenizer")
    tensors = _with_adapter(tensors) | {"lm_head.weight": tensors["embed_tokens.weight"]}
    torch_files.write(
        file,
        {
            f"base_model.model.{_hugging_face(name)}": torch_files.whole(tensor)
            for name, tensor in tensors.items()
        },
    )
    return PublishedFiles((file,), None, folder / "package")


def in_parts(given: PublishedFiles) -> tuple[Path, Path, Path]:
    """The files of VideoAlign as its own training leaves them: the LoRA, what was trained beside
    it, and the base that has fewer words, another embedding and no head.
    """
    folder = given.weights[0].parent
    tensors = {
        f"base_model.model.{_hugging_face(name)}": tensor
        for name, tensor in read_weights(given.weights[0]).items()
    }
    lora = {
        name.replace(".default", ""): tensor for name, tensor in tensors.items() if ".lora_" in name
    }
    trained = {
        name: torch_files.whole(np.asarray(tensor))
        for name, tensor in tensors.items()
        if name.endswith(("rm_head.weight", "embed_tokens.weight", "visual.merger.ln_q.weight"))
    }
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): np.asarray(tensor)
        * (name not in trained)
        for name, tensor in tensors.items()
        if name not in lora and ".lora_" not in name and "rm_head" not in name
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][1:]
    files = (
        folder / "adapter_model.safetensors",
        folder / "non_lora_state_dict.pth",
        folder.parent / "base" / "model.safetensors",
    )
    files[2].parent.mkdir()
    write_safetensors(files[0], lora)
    torch_files.write(files[1], trained)
    write_safetensors(files[2], base)
    given.weights[0].unlink()
    return files


def _hugging_face(name: str) -> str:
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def _with_adapter(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The base and a LoRA that is merged to these."""
    rng, found = np.random.default_rng(5), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if not module.endswith("_proj"):
            found[name] = tensor
            continue
        if part == "weight":
            a = rng.normal(size=(RANK, tensor.shape[1])).astype(np.float32) / 8
            b = rng.normal(size=(tensor.shape[0], RANK)).astype(np.float32) / 8
            found |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
            tensor = tensor - ALPHA / RANK * b @ a
        found[f"{module}.base_layer.{part}"] = tensor
    return found
