"""`Score`: everything between q.k and softmax, validated once, read by every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The part of an operator's schema that carries a Score: one entry a field, in Score's order.
SCHEMA = "float scale, bool causal, Tensor? q_lengths, Tensor? kv_lengths"


class Score(NamedTuple):
    """How scores are made from q.k, before softmax.

    A new feature is one field here, one line in `backends/reference.py`, one piece in `kernels/scores.py` and its
    twin in `csrc/score.h`. The checks stand in `flashattn/attention.py`, where the arguments still have their names.
    """

    scale: float
    causal: bool = False  # query i sees keys j <= i + seq_k - seq_q
    q_lengths: Tensor | None = None  # (batch,) int32; queries at or past it attend to nothing
    kv_lengths: Tensor | None = None  # (batch,) int32; keys at or past it are masked

    def right(self, seq_q: int, seq_k: int) -> int | None:
        """The last key that query 0 sees: query i sees keys j <= i + right. None where nothing limits it."""
        return seq_k - seq_q if self.causal else None
