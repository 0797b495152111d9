"""Sentence embeddings: the mean of the last hidden states, normalised (Reimers and Gurevych, "Sentence-BERT", 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import pack
from .tokenizer import Tokenizer
from .transformer import Transformer


@torch.inference_mode()
def embed(model: Transformer, tokenizer: Tokenizer, sentences: Sequence[str]) -> Tensor:
    """Unit vectors (sentences, width), computed from packed sequences: nothing is padded."""
    if not sentences:
        raise ValueError("sentences must hold at least one, got none")
    tokens, lengths = pack([tokenizer.encode(sentence) for sentence in sentences])
    return F.normalize(mean_of_each(model.encode(tokens, lengths), lengths), dim=-1)


def mean_of_each(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(batch, width): the mean over each of the packed sequences (total, width)."""
    return torch.segment_reduce(hidden, "mean", lengths=lengths)
