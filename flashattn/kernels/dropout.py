"""Counter-based dropout: whether an element is dropped depends on the seed and its position alone, so every backend,
tile size and pass drops the same ones.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Philox-4x32. Norms use the first word of 10
rounds; attention uses the four words of 7 rounds for four keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ..tensors import dropout_threshold
from . import compiler

WIDENS_JOINS = tl.constexpr(compiler.WIDENS_JOINS)


class DropoutArgs(NamedTuple):
    seed: tl.tensor  # pointer to one int64
    threshold: tl.tensor  # int: dropped where 31 random bits are below it, p * 2**31
    scale: tl.tensor  # float: 1 / (1 - p), the factor of elements that are kept


def dropout_arg(dropout_p: float, seed: torch.Tensor | None) -> DropoutArgs | None:
    if dropout_p == 0:
        return None
    return DropoutArgs(seed, dropout_threshold(dropout_p), 1 / (1 - dropout_p))


@triton.jit
def apply_dropout(value, args, rows, cols):
    """`value` with some elements dropped and the others scaled, for norms. `rows` and `cols` broadcast to its shape."""
    seed = tl.load(args.seed)
    cols, rows = tl.broadcast(cols, rows)
    bits, _, _, _ = tl.philox(seed, cols, rows, 0, 0)
    keep = (bits >> 1).to(tl.int32, bitcast=True) >= args.threshold
    return tl.where(keep, value * args.scale, 0.0)


@triton.jit
def draw_words(args, head, queries, quarters):
    """Four words for the weights of four keys each: the words of Philox, of 7 rounds, at (key // 4, query, head, 0).
    `queries` and `quarters` broadcast; `head` counts batch * heads + head."""
    quarters, rows = tl.broadcast(quarters, queries)
    return tl.philox(tl.load(args.seed), quarters, rows, head, 0, n_rounds=7)


@triton.jit
def bits_to_multipliers(args, bits):
    """The factor of a weight: 0 or the scale."""
    return tl.where((bits >> 1).to(tl.int32, bitcast=True) >= args.threshold, args.scale, 0.0)


@triton.jit
def hide_join(x):
    """x, by way of an operation that Triton does not look past for a join (`compiler.py`)."""
    return tl.max(x[:, :, None], 2)


@triton.jit
def dropout_multipliers(score, head, queries, start_n, BLOCK_N: tl.constexpr, K: tl.constexpr):
    """The factors of the weights (queries, BLOCK_N keys) of a head, which are summed along K of either in products."""
    args = score.dropout
    quarters = start_n // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    a, b, c, d = draw_words(args, head, queries[:, None], quarters)
    multipliers = bits_to_multipliers(args, tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))
    LOADS_BYTES: tl.constexpr = score.mask is not None or score.score_mod is not None or score.blocks is not None
    if WIDENS_JOINS and is_cuda() and LOADS_BYTES and K < 32:
        multipliers = hide_join(multipliers)
    return multipliers
