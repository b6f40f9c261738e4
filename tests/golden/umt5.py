"""e_*: the UMT5 encoder."""

import functools
from collections.abc import Iterator

import jax

from astrolabe_jax.convert.base import load_net
from astrolabe_jax.models import layers
from astrolabe_jax.models.umt5 import UMT5Config, relative_buckets
from tests.golden.entry import EXACT, FORWARD, Entry, Unsupported
from tests.golden.files import GoldenFile


def entries(file: GoldenFile) -> Iterator[Entry]:
    config = _config(file.config)
    weights = file.under("weights/")
    ids, mask = file["ids"], file["mask"]

    @functools.cache
    def run(method: str):
        graphdef, params, _ = load_net("text_encoder", weights, config)
        return jax.jit(lambda params: getattr(layers.merge(graphdef, params), method)(ids, mask))(
            params
        )

    yield Entry("hidden", lambda: run("__call__"), FORWARD)
    yield Entry("prompt_embeds", lambda: run("embed"), FORWARD)
    yield Entry("relative_buckets", lambda: relative_buckets(config, ids.shape[1]), EXACT)


def _config(stored: dict) -> UMT5Config:
    if stored["shared_pos"]:
        raise Unsupported(
            "one position table shared by all layers (shared_pos): that is T5, not UMT5"
        )
    return UMT5Config(
        vocab_size=stored["vocab"],
        dim=stored["dim"],
        dim_attn=stored["dim_attn"],
        dim_ffn=stored["dim_ffn"],
        num_heads=stored["num_heads"],
        num_layers=stored["num_layers"],
        num_buckets=stored["num_buckets"],
        max_distance=stored["max_dist"],
        text_len=stored["seq_len"],
        dtype="float32",
        param_dtype="float32",
    )
