"""`Norm`: what LayerNorm and RMSNorm do to a row, read by every backend. What `Score` is to attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The part of an operator's schema that carries a Norm, in Norm's order.
SCHEMA = "bool center, float eps, float weight_offset, float dropout_p, Tensor? seed"


class Norm(NamedTuple):
    """What is done to a row: the settings every backend reads."""

    center: bool  # subtract the mean: LayerNorm does, RMSNorm does not
    eps: float
    weight_offset: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64
