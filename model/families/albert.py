"""ALBERT: a BERT with one block shared by all layers, and narrower embeddings.

Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations" (2019), arXiv:1909.11942.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Config
from . import bert
from .bert import prepare, restore
from .fields import require

LAYER = "encoder.albert_layer_groups.0.albert_layers.0."
NAMES = {
    "token_embedding.weight": "embeddings.word_embeddings.weight",
    "position_embedding.weight": "embeddings.position_embeddings.weight",
    "type_embedding.weight": "embeddings.token_type_embeddings.weight",
    "embedding_norm": "embeddings.LayerNorm",
    "embedding_projection": "encoder.embedding_hidden_mapping_in",
    "blocks.{i}.attention.q": LAYER + "attention.query",
    "blocks.{i}.attention.k": LAYER + "attention.key",
    "blocks.{i}.attention.v": LAYER + "attention.value",
    "blocks.{i}.attention.out": LAYER + "attention.dense",
    "blocks.{i}.attention_norm": LAYER + "attention.LayerNorm",
    "blocks.{i}.feed_forward.up": LAYER + "ffn",
    "blocks.{i}.feed_forward.down": LAYER + "ffn_output",
    "blocks.{i}.feed_forward_norm": LAYER + "full_layer_layer_norm",
    "task_head.dense": "predictions.dense",
    "task_head.norm": "predictions.LayerNorm",
    "task_head.bias": "predictions.bias",
    "task_head.pooler": "pooler",
    "task_head.out": "classifier",
}
PREFIXES = ("albert.",)
IGNORED = ("embeddings.position_ids", "predictions.decoder.*", "sop_classifier.*")
DEFAULTS = dict(
    hidden_act="gelu_new", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.1,
    embedding_size=128,
)  # fmt: skip

__all__ = ["IGNORED", "NAMES", "PREFIXES", "config", "prepare", "restore", "to_hf"]


def config(hf: dict) -> Config:
    require(hf, num_hidden_groups=1, inner_group_num=1)
    hf = DEFAULTS | hf
    values = bert.config(hf | dict(classifier_dropout=hf["classifier_dropout_prob"], is_decoder=False))
    return replace(values, family="albert", shared_layers=True, embedding_width=hf["embedding_size"])


def to_hf(config: Config) -> dict:
    hf = bert.to_hf(config, "Albert") | dict(embedding_size=config.embedding_width, num_hidden_groups=1)
    if "classifier_dropout" in hf:
        hf["classifier_dropout_prob"] = hf.pop("classifier_dropout")
    return hf
