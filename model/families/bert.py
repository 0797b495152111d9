"""BERT: an encoder with its norms behind, learned positions, token types, GELU.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018), arXiv:1810.04805.
"""

from __future__ import annotations

from torch import Tensor

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
    "task_head.dense": "cls.predictions.transform.dense",
    "task_head.norm": "cls.predictions.transform.LayerNorm",
    "task_head.bias": "cls.predictions.bias",
    "task_head.pooler": "pooler.dense",
    "task_head.out": "classifier",
}
PREFIXES = ("bert.",)
IGNORED = ("embeddings.position_ids", "cls.predictions.decoder.*", "cls.seq_relationship.*")  # the decoder is tied

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
TASKS = {
    "ForMaskedLM": "masked", "ForPreTraining": "masked", "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag", "ForQuestionAnswering": "answer",
}  # fmt: skip
PROBLEMS = {
    "single_label_classification": "single", "multi_label_classification": "multi", "regression": "regression",
}  # fmt: skip


def task_values(hf: dict) -> dict:
    """The config's fields for the head that `architectures` names; none for a bare encoder."""
    architecture = (hf.get("architectures") or [""])[0]
    task = next((task for name, task in TASKS.items() if architecture.endswith(name)), None)
    if task not in ("classify", "tag"):
        return dict(task=task)
    labels = hf.get("id2label") or {i: f"LABEL_{i}" for i in range(2)}
    if sorted(int(i) for i in labels) != list(range(len(labels))):
        raise ValueError(f"id2label must number the labels from 0 on, got {', '.join(map(str, labels))}")
    labels = tuple(labels[i] for i in sorted(labels, key=int))
    kind = hf.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    if kind not in PROBLEMS:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEMS)}, got {kind!r}")
    return dict(task=task, labels=labels, problem=PROBLEMS[kind])


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The head for spans gets the name of the others, and a pooler that no head uses is dropped."""
    tensors = {name.replace("qa_outputs", "classifier"): x for name, x in tensors.items()}
    if config.task == "classify":
        return tensors
    return {name: x for name, x in tensors.items() if not name.startswith("pooler.")}


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
        **task_values(hf),
    )
