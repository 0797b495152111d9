"""Llama: rotary positions, RMSNorm, pre-norm, SwiGLU, grouped-query attention.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023), arXiv:2302.13971.
"""

from __future__ import annotations

from ..config import Config
from .fields import ACTIVATIONS, find_key, look_up, read, read_dropout, require, write
from .rope_fields import read_rope, write_rope

NAMES = {
    "token_embedding.weight": "embed_tokens.weight",
    "blocks.{i}.attention_norm.weight": "layers.{i}.input_layernorm.weight",
    "blocks.{i}.attention.q": "layers.{i}.self_attn.q_proj",
    "blocks.{i}.attention.k": "layers.{i}.self_attn.k_proj",
    "blocks.{i}.attention.v": "layers.{i}.self_attn.v_proj",
    "blocks.{i}.attention.out": "layers.{i}.self_attn.o_proj",
    "blocks.{i}.feed_forward_norm.weight": "layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.feed_forward.gate": "layers.{i}.mlp.gate_proj",
    "blocks.{i}.feed_forward.up": "layers.{i}.mlp.up_proj",
    "blocks.{i}.feed_forward.down": "layers.{i}.mlp.down_proj",
    "norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
PREFIXES = ("model.",)
IGNORED = ("rotary_emb.*",)
FIELDS = dict(
    vocab_size="vocab_size", width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads",
    kv_heads="num_key_value_heads", head_dim="head_dim", ffn_width="intermediate_size",
    context="max_position_embeddings", norm_eps="rms_norm_eps", tie_word_embeddings="tie_word_embeddings",
)  # fmt: skip


def config(hf: dict) -> Config:
    require(hf, attention_bias=False, mlp_bias=False)
    heads = hf["num_attention_heads"]
    hf = {"tie_word_embeddings": False} | hf
    hf["num_key_value_heads"] = hf.get("num_key_value_heads") or heads
    hf["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // heads
    return Config(
        family="llama",
        causal=True,
        norm="rms",
        norm_first=True,
        activation=look_up(hf, "hidden_act", "silu", ACTIVATIONS),
        gated=True,
        positions="rope",
        bias=False,
        **read_dropout(hf.get("resid_pdrop", 0.0), hf.get("attention_dropout") or 0.0),
        **(read(hf, FIELDS) | read_rope(hf)),
    )


def to_hf(config: Config, architecture: str = "LlamaForCausalLM", **more) -> dict:
    hf = dict(hidden_act=find_key(config.activation, ACTIVATIONS), attention_dropout=config.attention_dropout_p)
    if config.dropout:  # transformers has no field for it in a Llama
        hf["resid_pdrop"] = config.dropout
    return write(config, FIELDS, architecture, **(hf | write_rope(config) | more))


def read_windows(hf: dict) -> tuple[int | None, ...]:
    """Our field `windows` from `layer_types`; without these all layers have the `sliding_window`, if there is one."""
    types = hf.get("layer_types") or ["sliding_attention"] * hf["num_hidden_layers"]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types must be sliding_attention or full_attention, got {min(unknown)!r}")
    return tuple(hf.get("sliding_window") if kind == "sliding_attention" else None for kind in types)


def write_windows(config: Config) -> dict:
    """The reverse of `read_windows`; all windows have one size."""
    kinds = ["full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.layers)]
    return dict(sliding_window=next(filter(None, config.windows), None), layer_types=kinds)
