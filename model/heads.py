"""What stands on an encoder for a task: masked words, a class for a text, a label for each token, a span of an answer.

Devlin et al., "BERT" (2018), arXiv:1810.04805, section 4 and appendix A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config
from .layers import ACTIVATIONS, Linear


class Masked(nn.Module):
    """Logits (batch, seq, vocab_size) of every token: a layer of its own, then the token embedding and a bias."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.embedding_width or config.width
        self.dense = Linear(config.width, width)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(self.norm(self.activation(self.dense(hidden))), embedding, self.bias)


class Classify(nn.Module):
    """Logits (batch, labels) from the first token. Their meaning is the config's `problem`: softmax over them, a
    sigmoid of each, or a number."""

    def __init__(self, config: Config):
        super().__init__()
        self.pooler = Linear(config.width, config.width)
        self.out = Linear(config.width, len(config.labels))
        self.dropout = config.head_dropout

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.out(F.dropout(torch.tanh(self.pooler(hidden[:, 0])), self.dropout, self.training))


class Tag(nn.Module):
    """Logits (batch, seq, labels) of every token."""

    def __init__(self, config: Config):
        super().__init__()
        self.out = Linear(config.width, len(config.labels))
        self.dropout = config.head_dropout

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.out(F.dropout(hidden, self.dropout, self.training))


class Answer(nn.Module):
    """Logits (batch, seq, 2): that an answer starts, and that it ends, at each token."""

    def __init__(self, config: Config):
        super().__init__()
        self.out = Linear(config.width, 2)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.out(hidden)


HEADS = {"masked": Masked, "classify": Classify, "tag": Tag, "answer": Answer}


def loss(config: Config, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """What a model is trained on; targets of -100 do not count.

    A language model, masked, tag: targets (batch, seq), or (total,) packed. classify: (batch,) of labels; of "multi"
    (batch, labels) of 0 and 1; of "regression" numbers of the logits' shape, or (batch,). answer: (batch, 2), where it
    starts and ends.
    """
    if config.task == "answer":
        starts, ends = logits.unbind(-1)
        return (F.cross_entropy(starts, targets[:, 0]) + F.cross_entropy(ends, targets[:, 1])) / 2
    if config.task == "classify" and config.problem == "multi":
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits))
    if config.task == "classify" and config.problem == "regression":
        return F.mse_loss(logits.reshape(targets.shape), targets.to(logits))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)
