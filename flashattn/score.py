"""`Score`: everything between q.k and softmax, validated once, read by every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .score_mod import BlockMask, Traced

# The part of an operator's schema that carries a Score: one entry a field, in Score's order, up to bias. Bias and sinks
# get gradients, so operators take them beside q, k and v. Those of `flex.py` take callables too, as text.
SCHEMA = (
    "float scale, SymInt? left, SymInt? right, Tensor? q_lengths, Tensor? kv_lengths, float? softcap, Tensor? slopes, "
    "Tensor? mask, float dropout_p, Tensor? seed, Tensor? cu_seqlens, SymInt? max_seqlen_q, SymInt? max_seqlen_k"
)


class Score(NamedTuple):
    """How weights are made from q.k:

        s = scale * q.k;  s = softcap * tanh(s / softcap);  s += bias - slope * distance;  s = -inf where masked
        p = exp(s) / (sum(exp(s)) + exp(sink)), then dropout

    A new feature is one field here, one line in `backends/reference.py`, one piece in `kernels/scores.py` and its
    twin in `csrc/score.h`. The checks stand in `flashattn/attention.py`, where the arguments still have their names.
    """

    scale: float
    left: int | None = None  # query i sees keys i - left <= j + seq_q - seq_k <= i + right, None = all on that side;
    right: int | None = None  # causal is right = 0
    q_lengths: Tensor | None = None  # (batch,) int32; queries at or past it attend to nothing
    kv_lengths: Tensor | None = None  # (batch,) int32; keys at or past it are masked
    softcap: float | None = None
    slopes: Tensor | None = None  # (batch or 1, heads) float32: of ALiBi
    mask: Tensor | None = None  # bool, four dimensions, each that of the scores or 1; True = attend
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64
    cu_seqlens: Tensor | None = None  # (2, batch + 1) int32: where packed sequences begin and end, in q and in k
    max_seqlen_q: int | None = None  # of the longest of them
    max_seqlen_k: int | None = None
    bias: Tensor | None = None  # floating, four dimensions, each that of the scores or 1
    sinks: Tensor | None = None  # (heads,) floating
    score_mod: Traced | None = None  # what is done to scores behind the bias
    block_mask: BlockMask | None = None

    def tensors(self) -> list[Tensor]:
        """Those that no gradient goes to. Autograd saves them, not for their contents, but because it notices then
        where one is changed between forward and backward. One of inference mode it cannot save."""
        fields = (self.q_lengths, self.kv_lengths, self.slopes, self.mask, self.seed, self.cu_seqlens)
        captured = () if self.block_mask is None else self.block_mask.mask.captured
        return [x for x in (*fields, *captured) if x is not None and not x.is_inference()]

    def sizes(self, q: Tensor, k: Tensor) -> tuple[int, int, int]:
        """(batch, seq_q, seq_k): of packed sequences how many there are and the longest that can be."""
        if self.cu_seqlens is None:
            return q.shape[0], q.shape[2], k.shape[2]
        longest = min(self.max_seqlen_q, q.shape[2]), min(self.max_seqlen_k, k.shape[2])
        return self.cu_seqlens.shape[1] - 1, *longest

    def bounds(self, seq_q: int, seq_k: int) -> tuple[int | None, int | None]:
        """(first, last): query i sees keys i + first <= j <= i + last. None where nothing limits them."""
        diagonal = seq_k - seq_q
        return (
            None if self.left is None else diagonal - self.left,
            None if self.right is None else diagonal + self.right,
        )
