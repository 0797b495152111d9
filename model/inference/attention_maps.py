"""Attention maps: the weights of every head and their entropy, in memory linear in the sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import flashattn

from ..transformer import Transformer


class AttentionMaps(NamedTuple):
    weights: Tensor  # (layers, heads, rows, columns): weight of a group of keys, mean over a group of queries
    entropy: Tensor  # (layers, heads), in nats, mean over the queries


@torch.inference_mode()
def compute_attention_maps(model: Transformer, tokens: Tensor, size: int = 128) -> AttentionMaps:
    """The maps of one sequence (seq,), of at most `size` rows and columns: longer sequences are split into groups.

    The weights come from attention itself, with all its options: if the value of key j is the unit vector of its group,
    the output of query i is the weight of each group (seq, size). Nothing of size (seq, seq) is allocated.
    """
    if tokens.dim() != 1 or len(tokens) == 0:
        raise ValueError(f"tokens must be (seq,), at least one, got shape {tuple(tokens.shape)}")
    if not 1 <= size <= 256:
        raise ValueError(f"size must be between 1 and 256, the largest head_dim, got {size}")
    seq = len(tokens)
    group = -(-seq // size)
    groups = torch.arange(seq) // group  # of each token
    count = int(groups[-1]) + 1
    units = torch.nn.functional.one_hot(groups, count)
    weights, entropies = [], []

    def observe(layer: int, q: Tensor, k: Tensor, options: dict) -> None:
        v = units.to(k.dtype).expand(*k.shape[:2], seq, count)
        aux = flashattn.AuxRequest(entropy=True)
        out, aux = flashattn.attention(q, k, v, return_aux=aux, **options)
        rows = [part.mean(1) for part in out[0].float().split(group, dim=1)]
        weights.append(torch.stack(rows, 1))
        entropies.append(aux.entropy[0].mean(-1))

    model.encode(tokens[None], observe=observe)
    return AttentionMaps(torch.stack(weights), torch.stack(entropies))
