"""Files of the two language-model rewards and of Qwen2-VL, in their published layouts: they score
as torch does.
"""

import functools
import json
import math
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from astrolabe_jax.convert import engine, nets, store
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.qwen2_vl import convert
from astrolabe_jax.rewards.qwen2_vl.config import (
    HPSV3,
    QWEN2_VL_2B,
    QWEN2_VL_7B,
    VIDEOALIGN,
    Qwen2VLConfig,
)
from astrolabe_jax.rewards.qwen2_vl.linear import quantise
from astrolabe_jax.rewards.qwen2_vl.weights import spec_of
from astrolabe_jax.runtime.files import INDEX, Lazy, write_safetensors
from tests.convert import torch_files
from tests.rewards.qwen2_vl import qwen

GRID, LENGTHS = (2, 4, 4), (17, 22)
RANK, ALPHA = 3, 6
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = convert.Adapter(RANK, ALPHA / RANK)


def published(name: str) -> str:
    """A name of transformers 5 as transformers 4.45 had it, which wrote the files."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def head(kind: str, dim: int) -> torch.nn.Module:
    """HPSv3's ReLU and dropout are counted in the names of its linears."""
    if kind == "videoalign":
        return torch.nn.Linear(dim, 1, bias=False)
    first, second, third = (
        torch.nn.Linear(n_in, n_out) for n_in, n_out in ((dim, 10), (10, 6), (6, 2))
    )
    return torch.nn.Sequential(
        first, torch.nn.ReLU(), torch.nn.Dropout(), second, torch.nn.ReLU(), third
    )


CONFIGS = {"hpsv3": qwen.HPSV3, "videoalign": qwen.VIDEOALIGN}
SPECS = {
    "hpsv3": spec_of("hpsv3", qwen.HPSV3),
    "videoalign": spec_of("videoalign", qwen.VIDEOALIGN, adapted=True),
    "plain": spec_of("plain", qwen.CONFIG),
}


@functools.cache
def oracle(kind: str) -> torch.nn.Module:
    """transformers' model with a head, for VideoAlign with PEFT's explicit LoRA, all of it
    random.
    """
    model = qwen.oracle()
    model.rm_head = head(kind, qwen.CONFIG.dim)
    if kind == "videoalign":
        targets = rf".*language_model\.layers.*\.({'|'.join(TARGETS)})"
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        )
    qwen.random_weights(model)
    return model.eval()


@functools.cache
def tensors(kind: str) -> dict[str, np.ndarray]:
    """What the published file of a kind holds."""
    state = oracle(kind).state_dict()
    return {
        published(name).replace(
            "base_model.model.model.visual", "base_model.model.visual"
        ): weight.numpy()
        for name, weight in state.items()
    }


def inputs(kind: str):
    grid = GRID if kind == "videoalign" else (1, *GRID[1:])
    ids = qwen.ids(LENGTHS, grid, qwen.VIDEO if kind == "videoalign" else qwen.IMAGE)
    behind = [[-6, -4, -1]] if kind == "videoalign" else [[-1]]
    return qwen.patches(2, grid), grid, ids, (np.array(LENGTHS)[:, None] + behind).astype(np.int32)


def their_scores(kind: str) -> np.ndarray:
    patches, grid, ids, where = inputs(kind)
    model, found = oracle(kind), []
    inner = model.base_model.model if kind == "videoalign" else model
    names = (
        ("pixel_values_videos", "video_grid_thw")
        if kind == "videoalign"
        else ("pixel_values", "image_grid_thw")
    )
    for i, length in enumerate(LENGTHS):
        row = torch.from_numpy(ids[i : i + 1, :length]).long()
        with torch.no_grad():
            hidden = inner.model(
                input_ids=row,
                position_ids=torch.arange(length).expand(3, 1, -1),
                mm_token_type_ids=torch.zeros_like(row),
                **dict(
                    zip(names, (torch.from_numpy(patches[i]), torch.tensor([grid])), strict=True)
                ),
            ).last_hidden_state
            found.append(inner.rm_head(hidden[0, where[i]]).reshape(-1).numpy())
    return np.stack(found)


def our_scores(kind: str, config: Qwen2VLConfig, stacks: dict) -> np.ndarray:
    patches, grid, ids, where = inputs(kind)
    params = engine.nested((path, np.asarray(stack)) for path, stack in stacks.items())
    graphdef = qwen.shapes(config).graphdef
    run = jax.jit(lambda params: layers.merge(graphdef, params)(patches, grid, ids, where))
    return np.asarray(run(params))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def renamed(change, content):
    return {change(name): tensor for name, tensor in content.items()}


def torch_tree(content):
    return {name: torch_files.whole(tensor) for name, tensor in content.items()}


def newer(name: str) -> str:
    """As transformers 5 names what the published file has."""
    inside = re.sub(
        r"^(base_model\.model\.)?model\.(?=layers|norm|embed)", r"\1model.language_model.", name
    )
    return re.sub(r"^(base_model\.model\.)?visual\.", r"\1model.visual.", inside)


def flat(path, content):
    write_safetensors(path, content)


def wrapped(path, content):
    torch_files.write(path, {"model": torch_tree(content)})


def state(path, content):
    torch_files.write(path, torch_tree(content))


# kind, name of the file, writer, change of the published names
LAYOUTS = {
    "hpsv3": ("hpsv3", "HPSv3.safetensors", flat, lambda name: name),
    "hpsv3_wrapped": ("hpsv3", "HPSv3.pt", wrapped, lambda name: name),
    "hpsv3_newer": ("hpsv3", "HPSv3.safetensors", flat, newer),
    "videoalign": ("videoalign", "model.pth", state, lambda name: name),
    "videoalign_newer": ("videoalign", "model.pth", state, newer),
}


def opened_file(path, spec, adapter=convert.NO_ADAPTER, **options):
    tensors = nets.read_tensors([path])
    with nets.naming_files(path):
        return convert.assemble(tensors, spec, adapter, **options)


def opened(tmp_path, layout, change=lambda content: content, **options):
    kind, name, write, names = LAYOUTS[layout]
    write(tmp_path / name, renamed(names, change(tensors(kind))))
    adapter = ADAPTER if kind == "videoalign" else convert.NO_ADAPTER
    return opened_file(tmp_path / name, SPECS[kind], adapter, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_file_scores_as_torch_does(tmp_path, layout):
    config, stacks = opened(tmp_path, layout)
    kind = LAYOUTS[layout][0]
    assert config == CONFIGS[kind]
    names = {path[-1] for path in stacks}
    assert names == {"kernel", "bias", "scale", "embedding"}
    if layout == kind:
        close(our_scores(kind, config, stacks), their_scores(kind))
    else:
        (tmp_path / "plain").mkdir()  # the same leaves as under the published names
        for path, stack in opened(tmp_path / "plain", kind)[1].items():
            np.testing.assert_array_equal(np.asarray(stacks[path]), np.asarray(stack))


def test_the_published_names_are_those_of_the_spec():
    names = set(tensors("videoalign"))
    for name in (
        "base_model.model.visual.patch_embed.proj.weight",
        "base_model.model.visual.merger.mlp.2.bias",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.layers.2.self_attn.q_proj.base_layer.bias",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.input_layernorm.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.rm_head.weight",
    ):
        assert name in names
    for name in (
        "visual.blocks.1.attn.qkv.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "rm_head.5.bias",
    ):
        assert name in tensors("hpsv3")


def test_a_merged_weight_is_w_plus_scale_b_a_rounded_once(tmp_path):
    half = {name: weight.astype(jnp.bfloat16) for name, weight in tensors("videoalign").items()}
    module = "base_model.model.model.layers.1.mlp.up_proj"
    w, a, b = (
        half[f"{module}.{part}.weight"].astype(np.float64)
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    for dtype, ulp in (("", 2**-8), ("float32", 2**-22)):
        _, stacks = opened(tmp_path, "videoalign", lambda _: half, dtype=dtype)
        leaf = stacks["language", "blocks", "up", "kernel"]
        assert leaf.dtype == (dtype or jnp.bfloat16)
        want = (w + 2 * b @ a).T
        np.testing.assert_allclose(leaf[1].astype(np.float64), want, rtol=ulp, atol=1e-6)
        assert stacks["head", "linears", 0, "kernel"].dtype == (
            np.float32 if dtype else jnp.bfloat16
        )


@pytest.mark.parametrize("names", [lambda name: name, newer])
def test_shards_of_the_plain_model(tmp_path, names):
    content = renamed(
        names, {name: t for name, t in tensors("hpsv3").items() if not name.startswith("rm_head")}
    )
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(content)}
    for shard in set(where.values()):
        write_safetensors(
            tmp_path / shard, {name: content[name] for name in content if where[name] == shard}
        )
    (tmp_path / f"model{INDEX}").write_text(json.dumps({"weight_map": where}))
    config, stacks = opened_file(tmp_path / f"model{INDEX}", SPECS["plain"])
    assert config == qwen.CONFIG
    _, whole = convert.assemble(
        renamed(lambda name: name.removeprefix("model."), tensors("hpsv3")), SPECS["hpsv3"]
    )
    assert set(whole) - set(stacks) == {path for path in whole if path[0] == "head"}
    for path, stack in stacks.items():
        np.testing.assert_array_equal(np.asarray(stack), np.asarray(whole[path]))


def without(culprit):
    return lambda content: {name: tensor for name, tensor in content.items() if name != culprit}


def replaced(culprit, change):
    return lambda content: content | {culprit: change(content[culprit])}


def added(culprit, like):
    return lambda content: content | {culprit: content[like]}


BASE, QUERY = "base_model.model.", "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("hpsv3", without("model.norm.weight"), "missing tensor: norm.weight"),
        ("hpsv3", without("rm_head.3.bias"), "missing tensor: rm_head.3.bias"),
        ("hpsv3", added("model.norm.bias", "model.norm.weight"), "unused tensor: norm.bias"),
        (
            "hpsv3",
            replaced("visual.blocks.1.attn.qkv.weight", np.transpose),
            "changed shape: visual.blocks.1.attn.qkv",
        ),
        ("hpsv3", replaced("lm_head.weight", lambda x: x[1:]), "changed shape: lm_head.weight"),
        (
            "videoalign",
            without(f"{QUERY}.lora_B.default.weight"),
            r"missing tensor: .*1.*q_proj.lora_B.default.weight",
        ),
        (
            "videoalign",
            without(f"{QUERY}.base_layer.weight"),
            r"missing tensor: .*q_proj.base_layer.weight",
        ),
        (
            "videoalign",
            added(f"{QUERY}.weight", f"{QUERY}.base_layer.weight"),
            "unused tensor: .*1.*q_proj.weight",
        ),
        (
            "videoalign",
            added(f"{QUERY}.lora_A.other.weight", f"{QUERY}.lora_A.default.weight"),
            "unused .*A.other",
        ),
        (
            "videoalign",
            replaced(f"{QUERY}.lora_A.default.weight", lambda x: x[1:]),
            "changed shape: .*lora_A.default",
        ),
        (
            "videoalign",
            added(f"{BASE}visual.merger.mlp.0.lora_A.default.weight", f"{BASE}rm_head.weight"),
            "unused",
        ),
        ("videoalign", without(f"{BASE}rm_head.weight"), "missing tensor: rm_head.weight"),
    ],
)
def test_a_tensor_at_fault_is_named(tmp_path, kind, change, fault):
    with pytest.raises(engine.ConversionError, match=fault) as error:
        opened(tmp_path, kind, change)
    assert str(error.value).startswith(f"{tmp_path}/{LAYOUTS[kind][1]}: 1 mismatches")


def test_a_file_of_the_other_reward_is_refused(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", tensors("hpsv3"))
    with pytest.raises(engine.ConversionError, match="missing tensor: .*base_layer"):
        opened_file(tmp_path / "a.safetensors", SPECS["videoalign"], ADAPTER)
    with pytest.raises(engine.ConversionError, match="unused tensor: rm_head.0.weight"):
        opened_file(tmp_path / "a.safetensors", SPECS["plain"])


def test_the_adapter_is_that_of_model_config(tmp_path):
    path = tmp_path / "model_config.json"
    described = {
        "lora_enable": True,
        "vision_lora": False,
        "lora_r": 64,
        "lora_alpha": 128,
        "use_rslora": False,
    }
    path.write_text(json.dumps({"peft_lora_config": described}))
    assert convert.read_adapter(path) == (64, 2.0)
    for changes in (
        {"lora_r": None},
        {"lora_alpha": "128"},
        {"use_rslora": True},
        {"lora_enable": False},
    ):
        path.write_text(json.dumps({"peft_lora_config": described | changes}))
        with pytest.raises(ValueError, match=f"{path}: peft_lora_config .*{next(iter(changes))}"):
            convert.read_adapter(path)
    path.write_text(json.dumps({"other": 1}))
    with pytest.raises(ValueError, match="lora_r None"):
        convert.read_adapter(path)


@pytest.mark.parametrize("layout", CONFIGS)
def test_int8_kernels_are_stored_with_their_scales(tmp_path, layout):
    config, plain = opened(tmp_path, layout)
    int8_config, int8 = opened(tmp_path, layout, quantised=True)
    assert int8_config.quantised and not config.quantised
    store.save(tmp_path / "weights", int8)
    leaves = store.tree(store.open_leaves(tmp_path / "weights"), qwen.shapes(int8_config).params)
    kernels = 0
    for path, leaf in engine.flatten(leaves).items():
        above, last = path[:-1], path[-1]
        if (*above, "scale") in int8 and (*above, "kernel") in int8:
            whole, scale = quantise(np.asarray(plain[*above, "kernel"]), np)
            want = {"kernel": whole, "scale": scale}.get(last)
            want = np.asarray(plain[path]) if want is None else want
            kernels += last == "kernel"
        else:
            want = np.asarray(plain[path])
        assert leaf.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(leaf), want)
    # four of a vision block, two of the merger, seven of a block of the decoder
    assert kernels == 13


def unread(shapes: dict[str, tuple]) -> dict[str, Lazy]:
    """Tensors of real shapes that take memory only when they are read."""
    bfloat16 = np.dtype(jnp.bfloat16)
    return {
        name: Lazy(shape, bfloat16, functools.partial(np.zeros, shape, bfloat16))
        for name, shape in shapes.items()
    }


def real_shapes(config: Qwen2VLConfig, rank: int = 0) -> dict[str, tuple]:
    """Names and shapes of transformers' own model at real sizes, as published; with a LoRA of the
    decoder if rank.
    """
    with torch.device("meta"):
        model = qwen.oracle(config)
    shapes = {
        published(name).removeprefix("model."): tuple(t.shape)
        for name, t in model.state_dict().items()
    }
    if len(config.head) == 1:
        shapes["rm_head.weight"] = (1, config.dim)
    for name, (n_in, n_out) in zip(
        ("0", "3", "5"), [(config.dim, 1024), (1024, 16), (16, 2)], strict=True
    ):
        if len(config.head) == 3:
            shapes |= {f"rm_head.{name}.weight": (n_out, n_in), f"rm_head.{name}.bias": (n_out,)}
    for name, shape in list(shapes.items()) if rank else []:
        module, _, leaf = name.rpartition(".")
        if module.endswith(TARGETS):
            shapes[f"{module}.base_layer.{leaf}"] = shapes.pop(name)
            if leaf == "weight":
                shapes[f"{module}.lora_A.default.weight"] = (rank, shape[1])
                shapes[f"{module}.lora_B.default.weight"] = (shape[0], rank)
    return shapes


@pytest.mark.parametrize(
    ("config", "adapter", "parameters"),
    [
        (HPSV3, convert.NO_ADAPTER, 8_292_152_882),
        (VIDEOALIGN, convert.Adapter(64, 2.0), 2_515_372_032),
        (QWEN2_VL_7B, convert.NO_ADAPTER, 8_291_375_616),
        # the state dict has the shared tensor twice
        (QWEN2_VL_2B, convert.NO_ADAPTER, 2_208_985_600 + 151_936 * 1536),
    ],
)
def test_real_shapes_are_read_layer_by_layer(config, adapter, parameters):
    shapes = real_shapes(config, adapter.rank)
    assert sum(map(math.prod, shapes.values())) == parameters
    # Sizes that no tensor tells are as published, all others as in the tensors.
    told = Qwen2VLConfig(head_dim=config.head_dim, head=config.head)
    spec = spec_of("real", told, adapted=adapter.rank > 0)
    found, stacks = convert.assemble(unread(shapes), spec, adapter)
    assert found == config
    expected = engine.flatten(qwen.shapes(config).params)
    assert {path: stack.shape for path, stack in stacks.items()} == {
        path: leaf.shape for path, leaf in expected.items()
    }
    tracemalloc.start()
    layer = stacks["language", "blocks", "down", "kernel"][3]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert layer.shape == (config.dim_ffn, config.dim)
    # A product and a sum in float32 beside the weight, where LoRA is merged.
    assert peak < (8 if adapter.rank else 1) * layer.nbytes + 5e6
