"""The online softmax, in base 2: one multiply-add and one exp2 a score."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e)
LN2 = tl.constexpr(0.6931471805599453)  # ln(2)


@triton.jit
def online_softmax(scores, factor, m_i, l_i, EMPTY: tl.constexpr):
    """Fold one tile of scores, times `factor` base-2 scores, into the running maximum m_i and sum l_i of each row.

        m' = max(m, factor rowmax(s));  p = 2^(factor s - m');  l' = 2^(m - m') l + rowsum(p)

    Returns (p, alpha, m', l'), where alpha = 2^(m - m') rescales what was accumulated before. EMPTY: a row may have
    seen no key yet. The factor is positive, and rounding keeps order, so m' is the largest of the rounded products.
    Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), arXiv:1805.02867.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1) * factor)
    base = m_new
    if EMPTY:
        # A row that has seen no key has m = -inf; against 0 its weights come out 0, not NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores * factor - base[:, None])
    alpha = tl.exp2(m_i - base)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def join_sink(m_i, l_i, sink):
    """Let a sink, a natural logarithm, join the sums. Returns (m, l, the factor of what was accumulated); a row with
    nothing to attend to stays as it is."""
    sink = sink.to(tl.float32) * LOG2E
    m_new = tl.where(l_i == 0.0, m_i, tl.maximum(m_i, sink))
    alpha = tl.where(l_i == 0.0, 1.0, tl.exp2(m_i - m_new))
    return m_new, tl.where(l_i == 0.0, 0.0, l_i * alpha + tl.exp2(sink - m_new)), alpha


@triton.jit
def logsumexp(m_i, l_i):
    """Natural-log lse of a row from its base-2 maximum and sum; -inf where nothing was attended to."""
    return tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
