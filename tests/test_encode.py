"""Prompts to embeddings: cleaning, tokenizers on disk, padding."""

import dataclasses
import html
import json
import resource

import ftfy
import jax
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax import encode, sharding
from astrolabe_jax.convert.nets import Net
from astrolabe_jax.models import layers
from astrolabe_jax.models import tokenizer as tokenizers
from astrolabe_jax.models.umt5 import UMT5
from experiments.moving_shapes_base.words import word_tokenizer
from tests.meshes import ONE, mesh_of
from tests.models import tiny
from tests.stand_ins import POINTER

WORDS = ["a", "red", "blue", "circle", "moving", "left"]
PROMPTS = ["a red circle", "a blue circle moving left", "", "red"]
CONFIG = dataclasses.replace(tiny.TEXT, vocab_size=3 + len(WORDS), text_len=7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text(word_tokenizer(WORDS))
    return tokenizers.load_tokenizer(directory)


@pytest.fixture(scope="module")
def model():
    def make():
        return UMT5(CONFIG, nnx.Rngs(0))

    graphdef, _ = layers.graphdef_of(make)
    params = jax.jit(lambda: layers.split(make())[1])()  # one program, not one a parameter
    return Net(graphdef, params, CONFIG)


def test_words_keep_their_order_after_the_special_tokens(tokenizer):
    ids, mask = tokenizers.tokenize(tokenizer, ["left red", "a purple circle"], 6)
    # end 1, unknown 2, padding 0
    np.testing.assert_array_equal(ids, [[8, 4, 1, 0, 0, 0], [3, 2, 6, 1, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])


def test_an_empty_prompt_is_one_end_token(tokenizer):
    ids, mask = tokenizers.tokenize(tokenizer, ["  \n"], 4)
    np.testing.assert_array_equal((ids[0], mask[0]), ([1, 0, 0, 0], [1, 0, 0, 0]))


def test_an_over_long_prompt_is_refused_with_its_index(tokenizer):
    prompts = ["a red circle", "a red circle moving left"]
    tokenizers.tokenize(tokenizer, prompts, 6)
    with pytest.raises(ValueError, match=r"prompt 1 has 6.*a red circle moving left"):
        tokenizers.tokenize(tokenizer, prompts, 5)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\t red\n\n circle ", "a red circle"),
        ("A Red Circle.", "A Red Circle."),
        ("salt &amp;amp; pepper &lt;b&gt;", "salt & pepper <b>"),
        ("a\u3000b\u00a0c", "a b c"),
        ("a \u201cred\u201d one", 'a "red" one'),
        ("caf\u00c3\u00a9", "caf\u00e9"),
    ],
)
def test_cleaning(text, cleaned):
    assert tokenizers.clean(text) == cleaned


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_cleaning_of_ascii_is_that_of_all_text(text):
    """Lists of millions take a short cut."""
    assert tokenizers.clean(text) == " ".join(html.unescape(ftfy.fix_text(text)).split())


def test_embeddings_are_zero_beyond_the_end_token(tokenizer, model):
    got = encode.encode_prompts(model, tokenizer, PROMPTS, ONE)
    assert got.shape == (4, CONFIG.text_len, CONFIG.dim) and got.dtype == np.float32
    lengths = [int(np.flatnonzero(np.any(row != 0, axis=-1))[-1]) + 1 for row in got]
    assert lengths == [4, 6, 1, 2]


def test_an_embedding_depends_on_its_prompt_alone(tokenizer, model):
    many = [PROMPTS[i % 4] for i in range(11)]  # more than one batch, the last one filled up
    got = encode.encode_prompts(model, tokenizer, many, ONE)
    alone = [encode.encode_prompts(model, tokenizer, [prompt], ONE)[0] for prompt in PROMPTS]
    for i, row in enumerate(got):
        np.testing.assert_array_equal(row, alone[i % 4])


@pytest.mark.parametrize("data, fsdp", [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4)])
def test_eight_devices_encode_the_same(tokenizer, model, data, fsdp):
    """Prompts are split over all devices, large parameters over fsdp; eleven prompts fill two calls
    of eight.
    """
    many = [PROMPTS[i % 4] for i in range(11)]
    mesh = mesh_of(data, fsdp)
    placed = sharding.shard_params(mesh, model.params)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed)) == (fsdp > 1)
    with jax.set_mesh(mesh):
        got = encode.encode_prompts(model._replace(params=placed), tokenizer, many, mesh)
        ids_mask = sharding.place_batch(tokenizers.tokenize(tokenizer, many[:8], CONFIG.text_len))
        spec = encode.embed(model.graphdef, placed, *ids_mask).sharding
    np.testing.assert_allclose(got, encode.encode_prompts(model, tokenizer, many, ONE), atol=2e-6)
    assert spec.is_equivalent_to(sharding.batch_sharding(mesh), 3)


def test_no_prompts_give_an_empty_batch(tokenizer, model):
    assert encode.encode_prompts(model, tokenizer, [], ONE).shape == (
        0,
        CONFIG.text_len,
        CONFIG.dim,
    )


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor spiece.model"):
        tokenizers.load_tokenizer(tmp_path)


def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path):
    text = word_tokenizer(WORDS).replace('"<pad>": 0', '"<pad>": 99')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="expected pad id 0"):
        tokenizers.load_tokenizer(tmp_path)


def changed_tokenizer(**fields):
    return json.dumps(json.loads(word_tokenizer(WORDS)) | fields)


# What makes the library end its process, and raise what is no Exception.
_VAST = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
_VAST |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
_TORN = {"type": "Precompiled", "precompiled_charsmap": ""}


@pytest.mark.parametrize(
    ("name", "content", "made_by"),
    [
        ("tokenizer.json", "{}", "tokenizers"),
        ("tokenizer.json", word_tokenizer(WORDS)[:-20], "tokenizers"),
        ("tokenizer.json", changed_tokenizer(padding=_VAST), "tokenizers"),  # aborts
        ("tokenizer.json", changed_tokenizer(normalizer=_TORN), "tokenizers"),  # panics
        ("spiece.model", "corrupt", "sentencepiece"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path, capfd, name, content, made_by):
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ValueError, match=f"{name} cannot be read: .*; expected a whole {name} of .* {made_by}:"
    ) as caught:
        tokenizers.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("limit", "text", "error", "expected"),
    [
        (
            16 << 20,
            word_tokenizer(WORDS),
            MemoryError,
            "tokenizer.json could not be read in the 16",
        ),
        (1 << 30, "{}", ValueError, "tokenizer.json cannot be read: "),
    ],
)
def test_too_little_memory_is_not_the_fault_of_the_file(
    tmp_path, monkeypatch, limit, text, error, expected
):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(error, match=expected):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_what_stands_in_the_place_of_a_tokenizer_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer, not the file itself"):
        tokenizers.load_tokenizer(tmp_path)
    path.write_text("")
    with pytest.raises(ValueError, match=f"{name} is an empty file"):
        tokenizers.load_tokenizer(tmp_path)


def test_a_word_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="red"):
        word_tokenizer(["red", "blue", "red"])


def test_a_sentencepiece_model_is_read_alone(tmp_path):
    """What transformers would read beside it, and let change ids, is not part of a base's
    identity.
    """
    (tmp_path / "corpus.txt").write_text(
        "\n".join(["a red circle moving left", "a blue circle moving right"] * 20)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=24,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (tmp_path / "added_tokens.json").write_text('{"red": 24}')
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    ids, mask = tokenizers.tokenize(tokenizer, ["a red circle"], 30)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert ids[0, : mask.sum()].tolist() == [*pieces.encode("a red circle"), 1]


def test_an_encoder_on_the_host_is_on_the_devices_only_while_it_encodes(tokenizer, model):
    mesh = mesh_of(2, 4)
    params = sharding.shard_params(mesh, jax.tree.map(np.asarray, model.params))
    placed = model._replace(params=params)
    expected = encode.encode_prompts(placed, tokenizer, PROMPTS, mesh)
    moved = model._replace(params=sharding.moved_to_host(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    before = {id(leaf) for leaf in jax.live_arrays() if leaf.sharding.memory_kind == "device"}
    np.testing.assert_array_equal(encode.encode_prompts(moved, tokenizer, PROMPTS, mesh), expected)
    left = [leaf for leaf in jax.live_arrays() if id(leaf) not in before]
    assert not [leaf for leaf in left if leaf.sharding.memory_kind == "device"]
