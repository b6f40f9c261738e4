"""The command that writes reward directories, as users run it on files of the published layout."""

import hashlib
import json
import re

import jax
import numpy as np
import pytest

from astrolabe_jax.convert import engine, nets, store
from astrolabe_jax.convert.__main__ import main
from astrolabe_jax.convert.weights import read_weights
from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.clip.weights import AESTHETIC, HPSV2
from astrolabe_jax.rewards.flow.weights import SEA_RAFT
from astrolabe_jax.rewards.qwen2_vl import chat
from astrolabe_jax.rewards.qwen2_vl.weights import HPSV3, VIDEOALIGN
from astrolabe_jax.runtime.files import write_safetensors
from tests.convert import torch_files
from tests.meshes import ONE
from tests.rewards.clip import clips
from tests.rewards.clip.test_weights import predictor, torch_tree
from tests.rewards.flow import rafts
from tests.rewards.qwen2_vl import chats, published

KINDS = (HPSV3.name, VIDEOALIGN.name)
TOKENS = {HPSV3.name: chat.HPSV3_TOKENS, VIDEOALIGN.name: chat.VIDEOALIGN_TOKENS}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    published.stand_in(monkeypatch)


def arguments(kind, given, to, **changed):
    given = given._replace(**changed)
    options = {"--tokenizer": given.tokenizer, "--template": given.template}
    more = [str(part) for pair in options.items() if pair[1] for part in pair]
    return ["reward", kind, "--weights", *map(str, given.weights), "--to", str(to), *more]


def refusal(capsys, *command):
    with pytest.raises(SystemExit) as error:
        main(list(command))
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and not captured.out
    return captured.err


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_directory_holds_all_that_a_scorer_needs(tmp_path, kind):
    given, to = published.write(tmp_path / "given", kind), tmp_path / "reward"
    main(arguments(kind, given, to))
    config, _, params = published.net(kind)

    content = json.loads((to / "config.json").read_text())
    assert content["kind"] == kind and content["dtypes"] == ["float32"]
    assert (content["net"]["vocab_size"], content["net"]["dim"], content["net"]["num_layers"]) == (
        config.vocab_size,
        config.dim,
        config.num_layers,
    )
    assert content["net"]["image_token"] == chats.tokenizer().token_to_id("<|image_pad|>")
    weights = given.weights[0]
    assert content["sources"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert len(content["sources"]) == (2 if kind == HPSV3.name else 3)
    template = (to / "template.txt").read_bytes()
    assert template.decode() == chats.TEMPLATES[TOKENS[kind]]
    assert content["facts"]["template"] == hashlib.sha256(template).hexdigest()
    if kind == VIDEOALIGN.name:
        assert content["facts"].items() >= published.SETTINGS["inference_config"].items()
        assert (content["facts"]["fps"], content["facts"]["max_frame_pixels"]) == (2.0, 200704)

    chat.load(to, TOKENS[kind], chat.IMAGE, config.vocab_size)
    leaves = store.open_leaves(to / "weights")
    wanted = {".".join(map(str, path)): leaf for path, leaf in engine.flatten(params).items()}
    assert set(leaves) == set(wanted)
    for name, leaf in wanted.items():  # the LoRA of VideoAlign is in its base again
        np.testing.assert_allclose(np.asarray(leaves[name]), leaf, atol=1e-5, err_msg=name)
    assert directory.identity(to) == hashlib.sha256((to / "config.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("options", "kernel"), [(["--dtype", "bfloat16"], "bfloat16"), (["--quantised"], "int8")]
)
def test_smaller_weights(tmp_path, options, kernel):
    given, to = published.write(tmp_path / "given", HPSV3.name), tmp_path / "reward"
    main([*arguments(HPSV3.name, given, to), *options])
    leaves = store.open_leaves(to / "weights")
    assert (
        leaves["language.blocks.q.kernel"].dtype == kernel
        and leaves["head.linears.0.kernel"].dtype == "float32"
    )
    assert json.loads((to / "config.json").read_text())["net"]["quantised"] == (kernel == "int8")


def test_what_is_there_is_kept(tmp_path, capsys):
    given, to = published.write(tmp_path / "given", HPSV3.name), tmp_path / "reward"
    main(arguments(HPSV3.name, given, to))
    before = (to / "config.json").read_bytes()
    capsys.readouterr()
    told = refusal(capsys, *arguments(HPSV3.name, given, to))
    assert f"{to} holds a reward already; remove it or give another --to" in told
    assert (to / "config.json").read_bytes() == before


def test_what_is_missing_is_asked_for(tmp_path, capsys):
    given, to = published.write(tmp_path / "given", HPSV3.name), tmp_path / "reward"
    told = refusal(capsys, *arguments(HPSV3.name, given, to, tokenizer=None))
    assert (
        "hpsv3 needs --tokenizer: the tokenizer.json of the Qwen2-VL-Instruct that it is made of"
        in told
    )
    told = refusal(capsys, *arguments(HPSV3.name, given, to, template=None))
    assert (
        "hpsv3 needs --template: the folder of its official package, or data_collator_qwen.py of it"
        in told
    )
    told = refusal(capsys, *arguments(HPSV3.name, given, to, weights=given.weights * 2))
    assert "--weights has 2 files; expected one, for shards their safetensors.index.json" in told
    told = refusal(capsys, *arguments("hpsv4", given, to))
    assert "invalid choice: 'hpsv4'" in told and "hpsv3" in told
    told = refusal(capsys, *arguments(HPSV3.name, given, to, tokenizer=tmp_path))
    assert f"no {tmp_path / 'tokenizer.json'}; expected the tokenizer.json of Qwen2-VL" in told
    assert not to.exists()


def test_another_template_is_refused(tmp_path, capsys):
    given, to = published.write(tmp_path / "given", HPSV3.name), tmp_path / "reward"
    module = next((tmp_path / "given" / "package").rglob("*.py"))
    module.write_text(module.read_text().replace("Rate", "rate"))
    assert f"{module}: INSTRUCTION has the sha256 " in refusal(
        capsys, *arguments(HPSV3.name, given, to)
    )
    assert not to.exists()


def test_another_net_is_refused(tmp_path, capsys):
    given, to = published.write(tmp_path / "given", VIDEOALIGN.name), tmp_path / "reward"
    weights = published.write(tmp_path / "other", HPSV3.name).weights
    (weights[0].parent / "model_config.json").write_text(json.dumps(published.SETTINGS))
    words = given.weights[0].parent / "tokenizer"
    told = refusal(capsys, *arguments(VIDEOALIGN.name, given, to, weights=weights, tokenizer=words))
    assert (
        f"error: {weights[0]}: " in told
        and "missing tensor: " in told
        and len(told.splitlines()) == 12  # cut short
        and not to.exists()
    )


@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        (
            "inference_config",
            "MQ_std",
            0.0,
            "MQ_std is 0.0; expected a number, positive unless it is a mean",
        ),
        ("inference_config", "TA_mean", "2", "TA_mean is '2'; expected a number"),
        ("data_config", "fps", None, "fps is None; expected a number"),
        (
            "data_config",
            "prompt_template_type",
            "none",
            "data_config is of another model: .*'prompt_template_type'",
        ),
        ("data_config", "num_frames", 8, "data_config is of another model: .*'num_frames': 8"),
        ("data_config", None, None, "has no data_config; expected that of VideoReward"),
        ("inference_config", None, None, "has no inference_config; expected that of VideoReward"),
        ("peft_lora_config", "lora_r", 0, "peft_lora_config has lora_r 0"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, capsys, section, field, value, told):
    given = published.write(tmp_path / "given", VIDEOALIGN.name)
    path = tmp_path / "given" / "model_config.json"
    content = json.loads(path.read_text())
    content[section] = content[section] | {field: value} if field else None
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(arguments(VIDEOALIGN.name, given, tmp_path / "reward"))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and not (tmp_path / "reward").exists()
    assert re.search(told, error), error


def test_settings_lie_beside_the_weights_or_above(tmp_path, capsys):
    given = published.write(tmp_path / "given", VIDEOALIGN.name)
    path = tmp_path / "given" / "model_config.json"
    beside = given.weights[0].parent / "model_config.json"
    path.rename(beside)
    main(arguments(VIDEOALIGN.name, given, tmp_path / "reward"))
    beside.unlink()
    capsys.readouterr()
    told = refusal(capsys, *arguments(VIDEOALIGN.name, given, tmp_path / "another"))
    assert f"no {beside} or {path}, which VideoReward has beside its weights" in told


def base_only_names(name):
    return re.sub(r"^(layers|embed_tokens|norm)\b", r"model.language_model.\1", name)


@pytest.mark.parametrize("form", ["files", "folders", "newer names", "no base"])
def test_a_videoalign_that_was_trained_as_a_lora_is_put_together(tmp_path, form):
    given = published.write(tmp_path / "given", VIDEOALIGN.name)
    lora, trained, base = published.in_parts(given)
    if form == "newer names":
        tensors = {base_only_names(n): np.asarray(t) for n, t in read_weights(base).items()}
        write_safetensors(base, tensors)
    weights = (base.parent, lora.parent) if form == "folders" else (trained, base, lora)
    if form == "no base":  # all but the LoRA was saved as trained
        rest = read_weights(base) | read_weights(trained)
        torch_files.write(
            trained,
            {
                f"base_model.model.model.{n}": torch_files.whole(np.asarray(t))
                for n, t in rest.items()
            },
        )
        weights = (lora.parent,)
    to = tmp_path / "reward"
    main(arguments(VIDEOALIGN.name, given, to, weights=weights))
    sources = json.loads((to / "config.json").read_text())["sources"]
    assert {path.name for path in (lora, trained, base)} - set(sources) <= (
        {base.name} if form == "no base" else set()
    )
    _, _, params = published.net(VIDEOALIGN.name)
    leaves = store.open_leaves(to / "weights")
    for path, leaf in engine.flatten(params).items():
        name = ".".join(map(str, path))
        np.testing.assert_allclose(np.asarray(leaves[name]), leaf, atol=1e-5, err_msg=name)


def test_parts_of_a_videoalign_that_do_not_make_one(tmp_path, capsys):
    given, to = published.write(tmp_path / "given", VIDEOALIGN.name), tmp_path / "reward"
    lora, trained, base = published.in_parts(given)
    for weights in ((lora,), (lora.parent,), (lora, trained), (lora, base)):
        told = refusal(capsys, *arguments(VIDEOALIGN.name, given, to, weights=weights))
        assert told.startswith(f"error: {lora} is the LoRA of a VideoReward that was trained anew")
        assert "BASE is the model.safetensors.index.json of the Qwen2-VL-2B-Instruct" in told
        assert told.count("\n") == 1
    told = refusal(capsys, *arguments(VIDEOALIGN.name, given, to, weights=(tmp_path,)))
    assert f"{tmp_path} holds none of model.pth, adapter_model.safetensors" in told
    tensors = {name: np.asarray(tensor) for name, tensor in read_weights(lora).items()}
    name = "layers.0.mlp.up_proj.lora_A.weight"
    for change, fault in (
        ({name: np.zeros((5, 7), np.float32)}, f"changed shape: {name} is [5, 7]"),
        ({"rope.lora_A.weight": np.zeros((2, 2), np.float32)}, "unused tensor: rope.lora_A.weight"),
    ):
        write_safetensors(lora, tensors | change)
        whole = (lora, trained, base)
        told = refusal(capsys, *arguments(VIDEOALIGN.name, given, to, weights=whole))
        assert f"{lora}: 1 mismatches" in told and fault in told
    assert not to.exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(files, tokenizer) of each kind that has no template."""
    folder = tmp_path_factory.mktemp("plain")
    hps, openai, raft = (
        folder / name for name in ("HPS.pt", "openai.safetensors", "raft.safetensors")
    )
    torch_files.write(
        hps, {"state_dict": torch_tree(clips.open_clip(clips.tensors(clips.model(clips.OPEN))))}
    )
    write_safetensors(openai, clips.tensors(clips.model(clips.OPENAI)))
    torch_files.write(folder / "sac.pth", torch_tree(predictor(clips.OPENAI.embed_dim)))
    shapes = rafts.published(rafts.TINIEST)
    write_safetensors(raft, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    words = clips.write_vocabulary(folder)
    return {
        "hpsv2": ([hps], words),
        "aesthetic": ([openai, folder / "sac.pth"], None),
        "sea_raft": ([raft], None),
    }


@pytest.mark.parametrize("kind", ["hpsv2", "aesthetic", "sea_raft"])
def test_kinds_without_a_template(tmp_path, plain, kind, capsys):
    files, words = plain[kind]
    more = ["--tokenizer", str(words)] if words else []
    main(["reward", kind, "--weights", *map(str, files), "--to", str(tmp_path / "x"), *more])
    content = json.loads((tmp_path / "x" / "config.json").read_text())
    texts = [words / name for name in ("vocab.json", "merges.txt")] if words else []
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in [*files, *texts]}
    assert (content["kind"], content["sources"]) == (kind, hashes)
    assert all((tmp_path / "x" / path.name).read_bytes() == path.read_bytes() for path in texts)
    made = {"hpsv2": HPSV2, "aesthetic": AESTHETIC, "sea_raft": SEA_RAFT}[kind]
    net = directory.read(tmp_path / "x", made, ONE, "float32")
    wanted = nets.stacks(nets.open_files(made, files))
    jax.tree.map(np.testing.assert_array_equal, net.params, engine.nested(wanted.items()))
    capsys.readouterr()
    told = refusal(
        capsys,
        "reward",
        kind,
        "--weights",
        *map(str, files),
        "--to",
        str(tmp_path / "y"),
        *more,
        "--template",
        "x",
    )
    assert f"{kind} takes no --template" in told
    if words:
        told = refusal(
            capsys, "reward", kind, "--weights", *map(str, files), "--to", str(tmp_path / "y")
        )
        assert "hpsv2 needs --tokenizer: tokenizer.json, or the folder of it, of CLIP" in told
