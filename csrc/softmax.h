// The online softmax of a tile of scores S[key][query], sinks, and the logsumexp of a row.
#pragma once

#include "matmul.h"

namespace flashattn {
namespace FLASHATTN_ISA {

// The running softmax of a tile of queries, one query a lane: maximum, sum, and the factor that rescales earlier sums.
struct Softmax {
  float *m, *l, *alpha;
  Softmax from(int64_t lane) const { return {m + lane, l + lane, alpha + lane}; }
};

// Turn scores S[n][lanes], the first `width` lanes of them, into weights in place, packed along keys as B. On entry
// softmax.m is the new maximum and softmax.alpha the old one; alpha becomes the rescale factor. use(i), i the lane, is
// called with each weight, its key and which of four sums it has been added to, and returns what to store; at the end
// finish(alpha).
template <class Dot, class Use>
FLASHATTN_INLINE void online_softmax(float* s, int64_t n, int64_t lanes, int64_t width, Softmax softmax, Use use) {
  for (int64_t i = 0; i < width; i += W) {
    vf m = load<vf>(softmax.m + i);
    vf row_max = m == NEG_INF ? vf{} : m;  // no key yet: weights 0, not NaN
    vf alpha = exp2((load<vf>(softmax.alpha + i) - row_max) * LOG2E);
    vf l[4] = {};  // four short sums are more exact than one long one
    float* at = s + i;
    auto use_weight = use(i);
    auto weight = [&](float* score, int64_t j, int r) {
      vf p = exp2<Dot::EXP_DEGREE>((load<vf>(score) - row_max) * LOG2E);
      l[r] += p;
      return use_weight(p, j, r);
    };
    int64_t j = 0;
    if constexpr (Dot::K_PER_LANE == 1) {
      for (; j + 4 <= n; j += 4)
        FLASHATTN_UNROLL for (int r = 0; r < 4; r++, at += lanes) store(at, weight(at, j + r, r));
      for (; j < n; j++, at += lanes) store(at, weight(at, j, 0));
    } else {
      float* to = at;
      for (; j + 4 <= n; j += 4) FLASHATTN_UNROLL for (int r = 0; r < 4; r += 2, at += 2 * lanes, to += lanes) {
          vf even = weight(at, j + r, r);
          store(to, Dot::pack_pairs(even, weight(at + lanes, j + r + 1, r + 1)));
        }
      for (; j < n; j += 2, at += 2 * lanes, to += lanes) {
        vf even = weight(at, j, 0);
        store(to, Dot::pack_pairs(even, j + 1 < n ? weight(at + lanes, j + 1, 1) : vf{}));
      }
    }
    store(softmax.l + i, load<vf>(softmax.l + i) * alpha + ((l[0] + l[1]) + (l[2] + l[3])));
    store(softmax.alpha + i, alpha);
    use_weight.finish(alpha);
  }
}

// Add a row's sink to its softmax denominator: update m and l. Returns the factor that rescales the output.
static inline float add_sink(float sink, float& m, float& l) {
  if (l == 0) return 1;  // fully masked
  float m_new = sink > m ? sink : m, factor = __builtin_expf(m - m_new);
  l = l * factor + __builtin_expf(sink - m_new);
  m = m_new;
  return factor;
}

// lse = log(exp(m) l), and rest, its rounding error: with scores of thousands a weight exp(s - lse) would be off by
// 1e-3, with scores of -1e9 by any factor, and the weights would not sum to one.
static inline void store_lse(const Attention& a, int64_t at, float m, float l) {
  double log = __builtin_log((double)l);
  float lse = l == 0 ? NEG_INF : (float)(m + log);
  a.lse[at] = lse;
  if (a.rest) a.rest[at] = l == 0 ? 0 : (float)(log - ((double)lse - m));
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
