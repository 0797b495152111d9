"""GPT-Neo: a GPT-2 whose every other layer sees the last keys only, as GPT-3 has it, with scores that are not scaled.

Black et al., "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow" (2021).
"""

from __future__ import annotations

from ..config import Config
from . import gpt2
from .gpt2 import PREFIXES

NAMES = gpt2.NAMES | {
    "blocks.{i}.attention.q": "h.{i}.attn.attention.q_proj",
    "blocks.{i}.attention.k": "h.{i}.attn.attention.k_proj",
    "blocks.{i}.attention.v": "h.{i}.attn.attention.v_proj",
    "blocks.{i}.attention.out": "h.{i}.attn.attention.out_proj",
}
IGNORED = ("h.*.attn.attention.bias", "h.*.attn.attention.masked_bias")  # causal masks

__all__ = ["IGNORED", "NAMES", "PREFIXES", "config"]


def config(hf: dict) -> Config:
    kinds = [kind for pattern, times in hf["attention_types"] for kind in pattern * times]
    unknown = set(kinds) - {"global", "local"}
    if unknown:
        raise ValueError(f"attention_types must be global or local, got {min(unknown)!r}")
    return Config(
        family="gpt_neo",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_layers"],
        heads=hf["num_heads"],
        kv_heads=hf["num_heads"],
        head_dim=hf["hidden_size"] // hf["num_heads"],
        hidden=hf.get("intermediate_size") or 4 * hf["hidden_size"],
        context=hf["max_position_embeddings"],
        causal=True,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_first=True,
        activation=gpt2.ACTIVATIONS[hf.get("activation_function", "gelu_new")],
        gated=False,
        positions="learned",
        qkv_bias=False,
        windows=tuple(hf["window_size"] if kind == "local" else None for kind in kinds),
        scale=1.0,
        tied=hf.get("tie_word_embeddings", True),
    )
