"""Marian: the Transformer as it was first, with sinusoidal positions and norms behind, one vocabulary for both sides.

Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762; Junczys-Dowmunt et al., "Marian: Fast Neural
Machine Translation in C++" (2018), arXiv:1804.00344.
"""

from __future__ import annotations

from torch import Tensor

from ..config import Config

LAYER = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross_attention.q": "encoder_attn.q_proj",
    "cross_attention.k": "encoder_attn.k_proj",
    "cross_attention.v": "encoder_attn.v_proj",
    "cross_attention.out": "encoder_attn.out_proj",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
    "feed_forward_norm": "final_layer_norm",
}
NAMES = {"token_embedding.weight": "shared.weight", "head_bias": "final_logits_bias"} | {
    f"{side}.blocks.{{i}}.{ours}": f"{side}.layers.{{i}}.{theirs}"
    for side in ("encoder", "decoder")
    for ours, theirs in LAYER.items()
}
PREFIXES = ("model.",)
IGNORED = ("*.embed_positions.weight", "*.embed_tokens.weight")  # made anew; the shared embedding again
ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu"}


def config(hf: dict) -> Config:
    for name in ("share_encoder_decoder_embeddings", "tie_word_embeddings"):
        if not hf.get(name, True):
            raise ValueError(f"{name} must be true, got {hf[name]}")
    for what in ("attention_heads", "ffn_dim"):
        encoder, decoder = hf[f"encoder_{what}"], hf[f"decoder_{what}"]
        if encoder != decoder:
            raise ValueError(f"decoder_{what} must be the encoder's {encoder}, got {decoder}")
    heads = hf["encoder_attention_heads"]
    return Config(
        family="marian",
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        layers=hf["encoder_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=hf["d_model"] // heads,
        hidden=hf["encoder_ffn_dim"],
        context=hf["max_position_embeddings"],
        causal=False,
        norm="layer",
        norm_eps=1e-5,
        norm_first=False,
        activation=ACTIVATIONS[hf.get("activation_function", "gelu")],
        gated=False,
        positions="sinusoidal",
        embedding_scale=hf["d_model"] ** 0.5 if hf.get("scale_embedding") else 1.0,
        decoder_layers=hf["decoder_layers"],
        start_token=hf["decoder_start_token_id"],
        head_bias=True,
    )


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return {name: x.flatten() if name == "final_logits_bias" else x for name, x in tensors.items()}
