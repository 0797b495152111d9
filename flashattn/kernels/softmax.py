"""The online softmax. Scores and their maxima stay in natural units, so that a difference of two is as exact as they
are and none near the end of float32 becomes infinite: e^(s - m) = 2^((s - m) log2(e)). Raw scores, q.k of 16-bit
tensors, are scaled to base 2 in the exponent: one multiply-add and one exp2 a score."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e)
LN2 = tl.constexpr(0.6931471805599453)  # ln(2)
# The largest base-2 maximum of a row. Its rounding is a factor of all weights of the row, 1/16 to 16 here, by which
# forward divides.
LARGEST_RAW = tl.constexpr(2.0**26)
# The largest base-2 lse of a backward, which does not: weights are off by 0.3%, the rounding of bfloat16.
LARGEST_RAW_LSE = tl.constexpr(2.0**16)


@triton.jit
def exp_or_exp2(x, RAW: tl.constexpr):
    """e^x, or 2^x where scores are raw and so their maxima in base 2."""
    if not RAW:
        x *= LOG2E
    return tl.exp2(x)


@triton.jit
def online_softmax(scores, factor, m_i, l_i, RAW: tl.constexpr, EMPTY: tl.constexpr):
    """Fold one tile of scores s into the running maximum m_i and sum l_i of each row.

        m' = max(m, rowmax(s));         p = e^(s - m');         l' = e^(m - m') l + rowsum(p)
        m' = max(m, factor rowmax(s));  p = 2^(factor s - m');  l' = 2^(m - m') l + rowsum(p)      (RAW)

    Returns (p, alpha, m', l'), where alpha = e^(m - m') or 2^(m - m') rescales the accumulators. EMPTY: a row may have
    seen no key yet. The factor is positive, and rounding keeps order, so m' is the largest of the rounded
    products. Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), arXiv:1805.02867.
    """
    largest = tl.max(scores, 1)
    if RAW:
        largest *= factor
    m_new = tl.maximum(m_i, largest)
    base = m_new
    if EMPTY:
        # A row that has seen no key has m = -inf; against 0 its weights come out 0, not NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    if RAW:
        p = tl.exp2(scores * factor - base[:, None])
    else:
        p = tl.exp2((scores - base[:, None]) * LOG2E)
    alpha = exp_or_exp2(m_i - base, RAW)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def is_empty(m_i, l_i):
    """Whether a row is fully masked. A maximum ignores NaN, a sum does not."""
    return (m_i == float("-inf")) & (l_i == 0.0)


@triton.jit
def add_sink(m_i, l_i, sink, RAW: tl.constexpr):
    """Add a sink, a natural logarithm, to the sums. Returns (m, l, the factor of the accumulators); a fully masked row
    stays as it is."""
    sink = sink.to(tl.float32)
    if RAW:
        sink *= LOG2E
    empty = is_empty(m_i, l_i)
    m_new = tl.where(empty, m_i, tl.maximum(m_i, sink))
    alpha = tl.where(empty, 1.0, exp_or_exp2(m_i - m_new, RAW))
    return m_new, tl.where(empty, 0.0, l_i * alpha + exp_or_exp2(sink - m_new, RAW)), alpha


@triton.jit
def logsumexp(m_i, l_i, RAW: tl.constexpr):
    """(lse, rest) of a row: the natural logarithm of its sum, -inf where it is fully masked, and its rounding error,
    with which e^(s - lse - rest) sums to one however large the scores are. Raw scores have no rest."""
    log = tl.log2(l_i)
    if RAW:
        lse = (m_i + log) * LN2
        rest = log  # never read
    else:
        log *= LN2
        lse = m_i + log
        rest = log - (lse - m_i)
    empty = is_empty(m_i, l_i)
    return tl.where(empty, float("-inf"), lse), tl.where(empty, 0.0, rest)
