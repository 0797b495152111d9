"""`Norm`: what LayerNorm and RMSNorm do to a row, read by every backend. What `Score` is to attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The part of an operator's schema that carries a Norm, in the order of `Norm.args`.
SCHEMA = "bool center, float eps, float weight_offset, float dropout_p, Tensor? seed"


@dataclass(frozen=True, slots=True)
class Norm:
    """What is done to a row: the settings every backend reads."""

    center: bool  # subtract the mean: LayerNorm does, RMSNorm does not
    eps: float
    weight_offset: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64

    @property
    def args(self) -> tuple:
        """The fields as an operator takes them."""
        return self.center, self.eps, self.weight_offset, self.dropout_p, self.seed
