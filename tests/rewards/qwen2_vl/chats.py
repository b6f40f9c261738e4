"""A small tokenizer of Qwen2-VL's kind, which learns its words here, and templates of the published
layout.
"""

import functools
from pathlib import Path

import tokenizers

from astrolabe_jax.rewards.qwen2_vl import chat

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
HPSV3 = ("<|Reward|>",)
VIDEOALIGN = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
TEMPLATES = {
    HPSV3: "\nRate this picture.  \nText - {text_prompt}\n\n\n\nThe rating is <|Reward|>\n\nEND\n",
    VIDEOALIGN: (
        "\nRate this video.  \nVisual: <|VQ_reward|>\nEND\nMotion: <|MQ_reward|>\nEND\n"
        "Text - {text_prompt}\nAlignment: <|TA_reward|>\nEND\n"
    ),
}


@functools.cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    words = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["user system assistant rating picture video visual motion"] * 9, words
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer.to_str()


def tokenizer() -> tokenizers.Tokenizer:
    """As published: without reward tokens."""
    return tokenizers.Tokenizer.from_str(_trained())


def rows(tokens: tuple[str, ...]) -> int:
    """Embeddings of a net for this tokenizer with reward tokens."""
    return tokenizer().get_vocab_size() + len(tokens)


def write(directory: Path, tokens: tuple[str, ...]) -> Path:
    """The files of a reward directory that the chat needs."""
    directory.mkdir(parents=True, exist_ok=True)
    with_tokens = tokenizer()
    with_tokens.add_special_tokens(list(tokens))
    with_tokens.save(str(directory / chat.TOKENIZER))
    (directory / chat.TEMPLATE).write_bytes(TEMPLATES[tokens].encode())
    return directory
