"""Heads of an encoder: masked tokens, a class of the text, a label of each token, the span of an answer.

Devlin et al., "BERT" (2018), arXiv:1810.04805, section 4 and appendix A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import PROBLEM_TYPES, Config
from .layers import ACTIVATIONS, Linear


class MaskedLMHead(nn.Module):
    """Logits (batch, seq, vocab_size) of every token: a linear layer and a norm, then the token embedding and a
    bias."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.embedding_width or config.width
        self.dense = Linear(config.width, width)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(self.norm(self.activation(self.dense(hidden))), embedding, self.bias)


class ClassificationHead(nn.Module):
    """Logits (batch, labels) from the first token. By the config's `problem_type`: for a softmax, for a sigmoid each,
    or numbers."""

    def __init__(self, config: Config):
        super().__init__()
        self.pooler = Linear(config.width, config.width)
        self.out = Linear(config.width, len(config.labels))
        self.dropout = config.classifier_dropout

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.out(F.dropout(torch.tanh(self.pooler(hidden[:, 0])), self.dropout, self.training))


class TaggingHead(nn.Module):
    """Logits (batch, seq, labels) of every token."""

    def __init__(self, config: Config):
        super().__init__()
        self.out = Linear(config.width, len(config.labels))
        self.dropout = config.classifier_dropout

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.out(F.dropout(hidden, self.dropout, self.training))


class AnswerHead(nn.Module):
    """Logits (batch, seq, 2) of an answer that starts, and that ends, at each token."""

    def __init__(self, config: Config):
        super().__init__()
        self.out = Linear(config.width, 2)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.out(hidden)


HEADS = {"masked": MaskedLMHead, "classify": ClassificationHead, "tag": TaggingHead, "answer": AnswerHead}


def compute_loss(config: Config, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The training loss: the mean over the targets. Targets of -100 are ignored, except in regression.

    A language model, masked, tag: targets (batch, seq), or (total,) packed. classify: labels (batch,); for several
    labels (batch, labels) of 0 and 1; for regression numbers of the logits' shape, or (batch,). answer: (batch, 2), its
    first and last token.

    Raises:
        ValueError: for label_smoothing without classes to smooth over: several labels, regression.
    """
    return sum_losses(config, logits, targets, label_smoothing) / count_targets(config, targets)


def count_targets(config: Config, targets: Tensor) -> int:
    if is_regression(config):
        return targets.numel()
    return int((targets != -100).sum())


def sum_losses(config: Config, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """0 if all targets are ignored."""
    if config.task == "classify" and config.problem_type != PROBLEM_TYPES[0] and label_smoothing:
        raise ValueError(f"label_smoothing must be 0 for problem_type {config.problem_type!r}, got {label_smoothing}")
    if is_regression(config):
        return F.mse_loss(logits.reshape(targets.shape), targets.to(logits), reduction="sum")
    if config.task == "classify" and config.problem_type == "multi_label_classification":
        each = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none")
        return each.masked_fill(targets == -100, 0).sum()
    if config.task == "answer":
        logits = logits.transpose(1, 2)  # (batch, 2, seq): classes are the tokens
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", label_smoothing=label_smoothing)


def is_regression(config: Config) -> bool:
    """Whether targets are numbers, which may be -100."""
    return config.task == "classify" and config.problem_type == "regression"
