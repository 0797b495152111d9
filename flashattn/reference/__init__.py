"""The reference backend: eager PyTorch, on any device that PyTorch runs on. Every other backend is tested against this
one in float64, and it takes every call that others refuse.

Read `naive.py` first: the formulas in one page. `attention.py` computes the same in blocks of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..protocol import Capabilities
from ..score import Score
from .attention import backward, forward
from .caches import append, decode, rotate, store
from .derivatives import hvp, jvp
from .norm import compute_norm_stats, norm_backward, norm_forward, norm_hvp, norm_jvp
from .stats import attention_stats

__all__ = [
    "CAPABILITIES",
    "append",
    "attention_stats",
    "backward",
    "compute_norm_stats",
    "decode",
    "forward",
    "has_rest",
    "hvp",
    "jvp",
    "linear",
    "norm_backward",
    "norm_forward",
    "norm_hvp",
    "norm_jvp",
    "rotate",
    "store",
    "unavailable_reason",
]

CAPABILITIES = Capabilities(refused_dtypes={}, max_head_dim=None)


def unavailable_reason(device: torch.device) -> str | None:
    return None


def has_rest(q: Tensor, score: Score) -> bool:
    return True
