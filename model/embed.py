"""Sentence embeddings: the mean of the last hidden states, normalised (Reimers and Gurevych, "Sentence-BERT", 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokenizer import Tokenizer
from .transformer import Transformer


@torch.inference_mode()
def embed(model: Transformer, tokenizer: Tokenizer, sentences: Sequence[str]) -> Tensor:
    """Unit vectors (sentences, width)."""
    if not sentences:
        raise ValueError("sentences must hold at least one, got none")
    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    lengths = torch.tensor([len(e) for e in encoded], dtype=torch.int32)
    if int(lengths.max()) > model.config.context:
        raise ValueError(f"sentences must fit the context of {model.config.context} tokens, got {int(lengths.max())}")
    tokens = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.long)
    for row, e in zip(tokens, encoded, strict=True):
        row[: len(e)] = torch.tensor(e)
    hidden = model.encode(tokens, lengths)
    exists = torch.arange(tokens.shape[1]) < lengths[:, None]
    mean = torch.where(exists[..., None], hidden, 0).sum(1) / lengths[:, None]
    return F.normalize(mean, dim=-1)
