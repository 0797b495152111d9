"""Gemma 2: norms before and after each sublayer, softcaps of scores and logits, windows in every other layer.

Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size" (2024), arXiv:2408.00118.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Config
from . import llama
from .fields import ACTIVATIONS, find_key, look_up, require
from .llama import IGNORED, PREFIXES

NAMES = llama.NAMES | {
    "blocks.{i}.post_attention_norm.weight": "layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.feed_forward_norm.weight": "layers.{i}.pre_feedforward_layernorm.weight",
    "blocks.{i}.post_feed_forward_norm.weight": "layers.{i}.post_feedforward_layernorm.weight",
}
DEFAULTS = dict(head_dim=256, num_key_value_heads=4, sliding_window=4096, tie_word_embeddings=True)

__all__ = ["IGNORED", "NAMES", "PREFIXES", "config", "to_hf"]


def config(hf: dict) -> Config:
    hf = DEFAULTS | hf
    require({name: bool(value) for name, value in hf.items()}, use_bidirectional_attention=False)
    types = hf.get("layer_types") or ["sliding_attention", "full_attention"] * hf["num_hidden_layers"]
    return replace(
        llama.config(hf),
        family="gemma2",
        windows=llama.read_windows(hf | {"layer_types": types[: hf["num_hidden_layers"]]}),
        activation=look_up(hf, "hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
        scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        softcap=hf.get("attn_logit_softcapping", 50.0),
        logit_softcap=hf.get("final_logit_softcapping", 30.0),
        embedding_scale=hf["hidden_size"] ** 0.5,
        post_norms=True,
        norm_offset=1.0,
    )


def to_hf(config: Config) -> dict:
    activation = find_key(config.activation, ACTIVATIONS)
    return llama.to_hf(
        config, "Gemma2ForCausalLM", hidden_act=activation, hidden_activation=activation,
        query_pre_attn_scalar=round(config.scale**-2), attn_logit_softcapping=config.softcap,
        final_logit_softcapping=config.logit_softcap, **llama.write_windows(config),
    )  # fmt: skip
