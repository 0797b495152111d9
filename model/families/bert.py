"""BERT: a post-norm encoder, learned positions, token types, GELU.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018), arXiv:1810.04805.
"""

from __future__ import annotations

from torch import Tensor

from ..config import Config
from .fields import ACTIVATIONS, find_key, look_up, read, read_dropout, require, write

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

TASKS = {
    "ForMaskedLM": "masked", "ForPreTraining": "masked", "LMHeadModel": "masked",
    "ForSequenceClassification": "classify", "ForTokenClassification": "tag", "ForQuestionAnswering": "answer",
}  # fmt: skip


def read_task(hf: dict) -> dict:
    """Our fields of the head that `architectures` names; none for a bare encoder."""
    architecture = (hf.get("architectures") or [""])[0]
    task = next((task for name, task in TASKS.items() if architecture.endswith(name)), None)
    if task == "masked":
        require(hf, tie_word_embeddings=True)
    if task not in ("classify", "tag"):
        return dict(task=task)
    count = hf.get("num_labels", 2)
    labels = hf.get("id2label") or {}
    if not labels or len(labels) != hf.get("num_labels", len(labels)):  # num_labels has precedence, as in transformers
        labels = {i: f"LABEL_{i}" for i in range(count)}
    if sorted(int(i) for i in labels) != list(range(len(labels))):
        raise ValueError(f"id2label must number the labels from 0 on, got {', '.join(map(str, labels))}")
    labels = tuple(labels[i] for i in sorted(labels, key=int))
    kind = hf.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    p = hf["hidden_dropout_prob"] if hf["classifier_dropout"] is None else hf["classifier_dropout"]
    return dict(task=task, labels=labels, problem_type=kind, classifier_dropout=p)


def prepare(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The head for answers gets the name of the others, and an unused pooler is dropped."""
    tensors = {name.replace("qa_outputs", "classifier"): x for name, x in tensors.items()}
    if config.task == "classify":
        return tensors
    return {name: x for name, x in tensors.items() if not name.startswith("pooler.")}


def write_task(config: Config, name: str) -> dict:
    """The reverse of `read_task`."""
    task = find_key(config.task, TASKS) if config.task else "Model"
    labels = dict(enumerate(config.labels))
    numbers = {label: i for i, label in labels.items()}
    problem = dict(problem_type=config.problem_type) if config.task == "classify" else {}
    if labels:
        problem |= dict(id2label=labels, label2id=numbers, classifier_dropout=config.classifier_dropout)
    return dict(architectures=[name + task]) | problem


FIELDS = dict(
    vocab_size="vocab_size", width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads",
    kv_heads="num_attention_heads", ffn_width="intermediate_size", context="max_position_embeddings",
    norm_eps="layer_norm_eps", token_types="type_vocab_size",
)  # fmt: skip
DEFAULTS = dict(
    layer_norm_eps=1e-12, type_vocab_size=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    classifier_dropout=None, is_decoder=False,
)  # fmt: skip


def config(hf: dict) -> Config:
    require(hf, position_embedding_type="absolute", add_cross_attention=False)
    hf = DEFAULTS | hf
    return Config(
        family="bert",
        head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        causal=bool(hf["is_decoder"]),
        norm="layer",
        norm_first=False,
        activation=look_up(hf, "hidden_act", "gelu", ACTIVATIONS),
        gated=False,
        positions="learned",
        embedding_norm=True,
        lm_head=False,
        **read_dropout(hf["hidden_dropout_prob"], hf["attention_probs_dropout_prob"]),
        **read(hf, FIELDS),
        **read_task(hf),
    )


def to_hf(config: Config, name: str = "Bert") -> dict:
    hf = write(
        config, FIELDS, "", hidden_act=find_key(config.activation, ACTIVATIONS), hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout_p, is_decoder=config.causal,
    )  # fmt: skip
    return hf | write_task(config, name)


def restore(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The reverse of `prepare`."""
    if config.task != "answer":
        return tensors
    return {name.replace("classifier", "qa_outputs"): x for name, x in tensors.items()}
