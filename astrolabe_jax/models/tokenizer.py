"""Text to token ids, as the text encoder of Wan 2.1 takes them (spec/checkpoints.md section 4)."""

import html
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import sentencepiece
import tokenizers

PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2


def clean(text: str) -> str:
    """The cleaning mode `whitespace` of the published tokenizer: case and punctuation stay.

    ftfy repairs mis-decoded characters and straightens curly quotes first, which changes token ids.
    """
    text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


def token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of one prompt, cleaned, with its end token."""
    return tokenizer(clean(prompt), add_special_tokens=True)["input_ids"]


def tokenize(
    tokenizer: Any, prompts: Sequence[str], text_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts -> (ids, mask), both [G, text_len] int32: padded on the right, mask 1 up to the end
    token.

    Raises ValueError naming every prompt that does not fit.
    """
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    sizes = [(i, len(row)) for i, row in enumerate(rows) if len(row) > text_len]
    if sizes:
        culprits = "; ".join(f"prompt {i} has {size}: {prompts[i][:60]!r}" for i, size in sizes)
        raise ValueError(
            f"over-long prompts, {text_len} tokens with the end token are the most; shorten "
            f"{culprits}"
        )
    ids = np.full((len(rows), text_len), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), text_len), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def load_tokenizer(directory: Path | str) -> Any:
    """The tokenizer of a directory that holds tokenizer.json or, failing that, spiece.model; pad id
    0, end id 1.

    Raises FileNotFoundError or ValueError naming the file.
    """
    files = [Path(directory) / name for name in ("tokenizer.json", "spiece.model")]
    path = next((path for path in files if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor spiece.model")
    try:
        tokenizer = _read(path)
        ending = tokenizer("", add_special_tokens=True)["input_ids"]
    except Exception as error:  # the tokenizers library has no class of its own
        made_by = "tokenizers" if path.suffix == ".json" else "sentencepiece"
        raise ValueError(
            f"{path} cannot be read: {error}; expected a whole {path.name} of the library "
            f"{made_by}: copy it again"
        ) from None
    if tokenizer.pad_token_id != 0 or ending != [1]:
        found = f"pad id {tokenizer.pad_token_id}, empty text {ending}"
        raise ValueError(f"{path}: {found}; expected pad id 0 and [1] (the end token), as in UMT5")
    return tokenizer


def _read(path: Path) -> Any:
    """AutoTokenizer is not used: for UMT5 it refuses a bare spiece.model with a misleading
    message.
    """
    import transformers  # seconds to import, and only this function needs it

    special = {"pad_token": PAD_TOKEN, "eos_token": END_TOKEN, "unk_token": UNKNOWN_TOKEN}
    if path.suffix == ".json":
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    # What transformers cannot parse it takes for another format, and an empty file for a vocabulary
    # without words.
    sentencepiece.SentencePieceProcessor(model_file=str(path))
    # else added_tokens.json and more beside it change ids
    with tempfile.TemporaryDirectory() as alone:
        shutil.copy(path, alone)
        return transformers.T5Tokenizer.from_pretrained(alone, **special)


def word_tokenizer(words: Sequence[str]) -> str:
    """tokenizer.json of a closed vocabulary: one id per word, from 3 on in the given order; <pad>
    0, </s> 1, <unk> 2.

    Words are split at white space and punctuation, and </s> ends every text, as in UMT5; so worlds
    with a small vocabulary use the same code path as the published tokenizer.
    """
    vocabulary = [PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN, *words]
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError(
            "words occur twice: "
            f"{sorted({word for word in vocabulary if vocabulary.count(word) > 1})}"
        )
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END_TOKEN}", special_tokens=[(END_TOKEN, ids[END_TOKEN])]
    )
    tokenizer.add_special_tokens([PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN])
    return tokenizer.to_str(pretty=True)
