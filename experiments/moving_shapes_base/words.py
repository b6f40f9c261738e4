"""The tokenizer of the base model's world, whose vocabulary is closed."""

from collections.abc import Sequence

import tokenizers

from astrolabe_jax.models.tokenizer import END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN


def word_tokenizer(words: Sequence[str]) -> str:
    """Return the content of a tokenizer.json for a closed vocabulary.

    <pad> has id 0, </s> 1, <unk> 2, and `words` have ids from 3 on, in their order. Text is split
    at white space and punctuation, and </s> ends it, as in UMT5: worlds with a small vocabulary use
    the code path of the published tokenizer.
    """
    vocabulary = [PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN, *words]
    repeated = {word for word in vocabulary if vocabulary.count(word) > 1}
    if repeated:
        raise ValueError(f"words occur twice: {sorted(repeated)}")
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END_TOKEN}",
        special_tokens=[(END_TOKEN, ids[END_TOKEN])],
    )
    tokenizer.add_special_tokens([PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN])
    return tokenizer.to_str(pretty=True)
