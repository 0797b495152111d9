// Everything between q.k and softmax: which tiles to visit, which scores to keep. The twin of kernels/scores.py.
#pragma once

#include "philox.h"

namespace flashattn {
namespace FLASHATTN_ISA {

struct Range {
  int64_t begin, end;
};

static inline int64_t query_end(const Attention& a, int64_t batch) {
  return a.score.q_lengths ? max(0, min(a.seq_q, a.score.q_lengths[batch])) : a.seq_q;
}
static inline int64_t key_end(const Attention& a, int64_t batch) {
  return a.score.kv_lengths ? max(0, min(a.seq_k, a.score.kv_lengths[batch])) : a.seq_k;
}

// The call as one batch row sees it: its own sizes, diagonal and rows.
static inline Attention sequence(Attention a, int64_t batch) {
  if (!a.ragged) return a;
  if (a.packing.q_starts) {
    const int32_t *q = a.packing.q_starts + batch, *k = a.packing.k_starts + batch;
    a.seq_q = q[1] - q[0], a.seq_k = k[1] - k[0];
    auto move = [&](Heads& x, int64_t rows) {
      if (x.data) x.data = (char*)x.data + rows * x.stride_seq * (a.dtype == Dtype::float32 ? 4 : 2);
    };
    move(a.q, q[0]), move(a.out, q[0]), move(a.grad_out, q[0]), move(a.grad_q, q[0]);
    move(a.k, k[0]), move(a.v, k[0]), move(a.grad_k, k[0]), move(a.grad_v, k[0]);
  } else {
    a.seq_k = key_end(a, batch);
  }
  int64_t moved = a.seq_k - query_end(a, batch) - a.score.diagonal;
  a.score.diagonal += moved, a.score.first += moved, a.score.last += moved;
  return a;
}

// Where the statistics of the queries of a head are, in lse and what has its shape.
static inline int64_t statistics_at(const Attention& a, int64_t batch, int64_t head) {
  if (a.packing.q_starts) return head * a.packing.total_q + a.packing.q_starts[batch];
  return (batch * a.heads + head) * a.seq_q;
}

// The keys that some of the queries see.
static inline Range visible_keys(const Attention& a, Range queries, int64_t batch) {
  int64_t end = queries.begin < query_end(a, batch) ? key_end(a, batch) : 0;
  end = max(0, min(end, queries.end + a.score.last));
  return {min(end, max(0, queries.begin + a.score.first)), end};
}

// The queries that see some of the keys.
static inline Range visible_queries(const Attention& a, Range keys, int64_t batch) {
  int64_t end = max(0, min(query_end(a, batch), keys.end - a.score.first));
  return {min(end, max(0, keys.begin - a.score.last)), end};
}

// Whether some pair of a tile is masked by position, so that `visible` has work to do. What lies past a length is not
// in the tile at all.
static inline bool is_edge(const Attention& a, Range queries, Range keys) {
  return keys.end - 1 > queries.begin + a.score.last || keys.begin < queries.end - 1 + a.score.first;
}

// Of the W queries from `query` on, which see `key`: all bits set, or none.
static inline vi visible(const Attention& a, int64_t query, int64_t key) {
  vi i = (vi)lane_numbers();
  // Lanes first .. last see it: query + i + first <= key <= query + i + last.
  int32_t first = (int32_t)max(-1, min(W, key - a.score.last - query));
  int32_t last = (int32_t)max(-1, min(W, key - a.score.first - query));
  return (i >= first) & (i <= last);
}

// Whether scores become anything else than scale * q.k, apart from what `visible` masks.
static inline bool is_modified(const Attention& a) {
  return a.score.softcap != 0 || a.score.alibi_slopes || a.score.mask.data || a.score.bias.data;
}

// 1 / x to 2e-7.
static inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y * (2 - x * y);
#else
  return 1 / x;
#endif
}

// tanh = 1 - 2 / (e^2x + 1). DEGREE 6: an odd polynomial near 0, where that cancels; largest error 3e-7, relative.
// DEGREE 4, for scores of bfloat16 numbers: 3e-6, absolute.
template <int DEGREE>
static inline vf tanh(vf x) {
  vf magnitude = x < 0 ? -x : x, bounded = magnitude < 20 ? magnitude : vf{} + 20.0f;
  vf large = 1 - 2 * reciprocal(exp2<DEGREE>(bounded * (2 * LOG2E)) + 1);
  large = x == x ? (x < 0 ? -large : large) : x;
  if constexpr (DEGREE < 6) return large;
  vf square = x * x;
  vf p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  return magnitude < 0.625f ? p * square * x + x : large;
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
