"""Counter-based dropout: what is dropped depends on the seed and the position alone, so every backend, tile size
and pass drops the same.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Philox-4x32-10, first word.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class DropoutArgs(NamedTuple):
    seed: tl.tensor  # pointer to one int64
    threshold: tl.tensor  # int: dropped where 31 random bits are below it, p * 2**31
    scale: tl.tensor  # float: 1 / (1 - p), what is kept is multiplied by


@triton.jit
def dropout(value, args, rows, cols):
    """`value` with some elements dropped and the others scaled. `rows` and `cols` broadcast to its shape."""
    seed = tl.load(args.seed)
    cols, rows = tl.broadcast(cols, rows)
    bits, _, _, _ = tl.philox(seed, cols, rows, 0, 0)
    keep = (bits >> 1).to(tl.int32, bitcast=True) >= args.threshold
    return tl.where(keep, value * args.scale, 0.0)


@triton.jit
def random_words(args, head, queries, quarters):
    """Four words for the weights of four keys each: the words of Philox, of 7 rounds, at (key // 4, query, head, 0).
    `queries` and `quarters` broadcast; `head` counts batch * heads + head."""
    quarters, rows = tl.broadcast(quarters, queries)
    return tl.philox(tl.load(args.seed), quarters, rows, head, 0, n_rounds=7)


@triton.jit
def kept(args, bits):
    """What to multiply a weight by: 0 or the scale."""
    return tl.where((bits >> 1).to(tl.int32, bitcast=True) >= args.threshold, args.scale, 0.0)


@triton.jit
def kept_weights(args, head, queries, start_n, BLOCK_N: tl.constexpr):
    """What to multiply the weights (queries, BLOCK_N keys) of a head by."""
    quarters = start_n // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    a, b, c, d = random_words(args, head, queries[:, None], quarters)
    return kept(args, tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))
