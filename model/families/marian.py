"""Marian: the original Transformer: sinusoidal positions, post-norm, one vocabulary for both sides.

Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762; Junczys-Dowmunt et al., "Marian: Fast Neural
Machine Translation in C++" (2018), arXiv:1804.00344.
"""

from __future__ import annotations

from torch import Tensor

from ..config import Config
from .fields import ACTIVATIONS, find_key, look_up, read, read_dropout, require, write

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
NAMES = {"token_embedding.weight": "shared.weight", "lm_head_bias": "final_logits_bias"} | {
    f"{side}.blocks.{{i}}.{ours}": f"{side}.layers.{{i}}.{theirs}"
    for side in ("encoder", "decoder")
    for ours, theirs in LAYER.items()
}
PREFIXES = ("model.",)
IGNORED = ("*.embed_positions.weight", "*.embed_tokens.weight")  # computed; copies of the shared embedding
FIELDS = dict(
    vocab_size="vocab_size", width="d_model", layers="encoder_layers", heads="encoder_attention_heads",
    kv_heads="encoder_attention_heads", ffn_width="encoder_ffn_dim", context="max_position_embeddings",
    decoder_layers="decoder_layers", decoder_start_token="decoder_start_token_id",
)  # fmt: skip


def config(hf: dict) -> Config:
    require(hf, share_encoder_decoder_embeddings=True, tie_word_embeddings=True)
    require(hf, decoder_attention_heads=hf["encoder_attention_heads"], decoder_ffn_dim=hf["encoder_ffn_dim"])
    require(hf, encoder_layerdrop=0.0, decoder_layerdrop=0.0)
    if hf.get("decoder_vocab_size") is not None:
        require(hf, decoder_vocab_size=hf["vocab_size"])
    return Config(
        family="marian",
        head_dim=hf["d_model"] // hf["encoder_attention_heads"],
        causal=False,
        norm="layer",
        norm_eps=1e-5,
        norm_first=False,
        activation=look_up(hf, "activation_function", "gelu", ACTIVATIONS),
        gated=False,
        positions="sinusoidal",
        embedding_scale=hf["d_model"] ** 0.5 if hf.get("scale_embedding") else 1.0,
        lm_head_bias=True,
        activation_dropout=hf.get("activation_dropout", 0.0),
        **read_dropout(hf.get("dropout", 0.1), hf.get("attention_dropout", 0.0)),
        **read(hf, FIELDS),
    )


def to_hf(config: Config) -> dict:
    return write(
        config, FIELDS, "MarianMTModel", activation_function=find_key(config.activation, ACTIVATIONS),
        decoder_attention_heads=config.heads, decoder_ffn_dim=config.ffn_width, dropout=config.dropout,
        attention_dropout=config.attention_dropout_p, activation_dropout=config.activation_dropout,
        scale_embedding=config.embedding_scale != 1, pad_token_id=config.decoder_start_token, is_encoder_decoder=True,
    )  # fmt: skip


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return {name: x.flatten() if name == "final_logits_bias" else x for name, x in tensors.items()}


def restore(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The reverse of `prepare`."""
    return {name: x[None] if name == "final_logits_bias" else x for name, x in tensors.items()}
