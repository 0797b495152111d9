"""How FLOPs, bytes, times and errors are counted: stated once, and printed with the results."""

from __future__ import annotations

TEXT = """\
FLOP: attention forward 4 x batch x heads x pairs x head_dim, pairs = seq_q x seq_k, half of them causal (of packed
  sequences: summed over sequences); backward 2.5 x forward, whatever is recomputed. A matrix product: 2 x M x N x K.
bytes: what a call must read and write once. decode: keys and values up to each length, q, out. Norms: forward x and y,
  backward grad_y, x and grad_x; parameters are left out. A copy: read and written.
time: CUDA events around batches of launches; calls below 100 us, and those that take longer to queue than to run, as a
  CUDA graph of the batch. Variants of a case take turns; median and quartiles of the rounds. Calls cycle through copies
  of the inputs that exceed three times the L2, except in rows that say warm. Ratio: the peer's time / ours, round by
  round; ~ where its quartiles are further apart than it is from 1.
data: random, normal, the same in each copy; never zeros. share: of the ceiling measured in this run.
error: root mean square against float64 on batch row 0 and its first key/value head (norms: the first rows; features:
  all heads, without the gradients of their own tensors), before timing into memory filled with NaN and again after
  timing. Wrong: more than twice the error of PyTorch's operations (the reference backend) in the same dtype plus one
  unit in the last place; or a single element off by ten times their largest error; or other bits after timing than
  before."""


def count_attention_flops(heads: int, head_dim: int, pairs: float, causal: bool, backward: bool) -> float:
    """pairs: of a query and a key, of all sequences of the batch, as if nothing were masked."""
    return 4.0 * heads * head_dim * pairs * (0.5 if causal else 1) * (2.5 if backward else 1)
