"""GPT-Neo: a GPT-2 with a window in every other layer, as in GPT-3, and unscaled scores.

Black et al., "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow" (2021).
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Config
from . import gpt2
from .fields import require
from .gpt2 import PREFIXES

NAMES = gpt2.NAMES | {
    "blocks.{i}.attention.q": "h.{i}.attn.attention.q_proj",
    "blocks.{i}.attention.k": "h.{i}.attn.attention.k_proj",
    "blocks.{i}.attention.v": "h.{i}.attn.attention.v_proj",
    "blocks.{i}.attention.out": "h.{i}.attn.attention.out_proj",
}
OWN_NAMES = dict(
    n_embd="hidden_size", n_layer="num_layers", n_head="num_heads", n_positions="max_position_embeddings",
    n_inner="intermediate_size", resid_pdrop="resid_dropout",
    embd_pdrop="embed_dropout", attn_pdrop="attention_dropout",
)  # fmt: skip
NEEDED = ("hidden_size", "num_layers", "num_heads", "max_position_embeddings")
IGNORED = ("h.*.attn.attention.bias", "h.*.attn.attention.masked_bias")  # causal masks

DEFAULT_TYPES = [[["global", "local"], 12]]

__all__ = ["IGNORED", "NAMES", "PREFIXES", "config", "to_hf"]


def config(hf: dict) -> Config:
    patterns = hf.get("attention_types") or DEFAULT_TYPES
    kinds = hf.get("attention_layers") or [kind for pattern, times in patterns for kind in pattern * times]
    unknown = set(kinds) - {"global", "local"}
    if unknown:
        raise ValueError(f"attention_types must be global or local, got {min(unknown)!r}")
    if len(kinds) != hf["num_layers"]:
        raise ValueError(f"attention_types must be of the {hf['num_layers']} layers, got {len(kinds)}")
    require({"embed_dropout": 0.0} | hf, embed_dropout=hf.get("resid_dropout", 0.0))
    own = {gpt2_name: hf[name] for gpt2_name, name in OWN_NAMES.items() if name in hf or name in NEEDED}
    values = gpt2.config(dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) | hf | own)
    windows = tuple(hf.get("window_size", 256) if kind == "local" else None for kind in kinds)
    return replace(values, family="gpt_neo", qkv_bias=False, windows=windows, scale=1.0)


def to_hf(config: Config) -> dict:
    hf = gpt2.to_hf(replace(config, windows=(None,))) | dict(architectures=["GPTNeoForCausalLM"], model_type="gpt_neo")
    hf = {OWN_NAMES.get(name, name): value for name, value in hf.items()}
    kinds = ["global" if config.window(i) is None else "local" for i in range(config.layers)]
    window = next(filter(None, config.windows), 256)
    return hf | dict(attention_types=[[kinds, 1]], attention_layers=kinds, window_size=window)
