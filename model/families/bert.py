"""BERT: an encoder with its norms behind, learned positions, token types, GELU.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018), arXiv:1810.04805.
"""

from __future__ import annotations

from ..config import Config

NAMES = {
    "token_embedding.weight": "embeddings.word_embeddings.weight",
    "position_embedding.weight": "embeddings.position_embeddings.weight",
    "type_embedding.weight": "embeddings.token_type_embeddings.weight",
    "embedding_norm": "embeddings.LayerNorm",
    "blocks.{i}.attention.q": "encoder.layer.{i}.attention.self.query",
    "blocks.{i}.attention.k": "encoder.layer.{i}.attention.self.key",
    "blocks.{i}.attention.v": "encoder.layer.{i}.attention.self.value",
    "blocks.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
    "blocks.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "blocks.{i}.feed_forward.up": "encoder.layer.{i}.intermediate.dense",
    "blocks.{i}.feed_forward.down": "encoder.layer.{i}.output.dense",
    "blocks.{i}.feed_forward_norm": "encoder.layer.{i}.output.LayerNorm",
}
PREFIXES = ("bert.",)
IGNORED = ("embeddings.position_ids", "pooler.*", "cls.*")  # the encoder is what is loaded; its heads are not

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


def config(hf: dict) -> Config:
    kind = hf.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"position_embedding_type must be 'absolute', got {kind!r}")
    heads = hf["num_attention_heads"]
    return Config(
        family="bert",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=hf["hidden_size"] // heads,
        hidden=hf["intermediate_size"],
        context=hf["max_position_embeddings"],
        causal=False,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        norm_first=False,
        activation=ACTIVATIONS[hf.get("hidden_act", "gelu")],
        gated=False,
        positions="learned",
        token_types=hf.get("type_vocab_size", 2),
        embedding_norm=True,
        head=False,
    )
