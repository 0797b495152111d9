// The queries and keys of a batch row, and which of its scores are kept by position. The twin of kernels/scores.py.
#pragma once

#include "matrix.h"

namespace flashattn {
namespace FLASHATTN_ISA {

static inline int64_t query_end(const Attention& a, int64_t batch) {
  return a.score.q_lengths ? max(0, min(a.seq_q, a.score.q_lengths[batch])) : a.seq_q;
}
static inline int64_t key_end(const Attention& a, int64_t batch) {
  return a.score.kv_lengths ? max(0, min(a.seq_k, a.score.kv_lengths[batch])) : a.seq_k;
}

// The call for one batch row: its own lengths, diagonal and window, and pointers to its rows.
static inline Attention batch_row_view(Attention a, int64_t batch) {
  if (!a.ragged) return a;
  if (a.packing.q_starts) {
    const int32_t *q = a.packing.q_starts + batch, *k = a.packing.k_starts + batch;
    a.seq_q = q[1] - q[0], a.seq_k = k[1] - k[0];
    auto move_to = [&](Heads& x, int64_t rows) {
      if (x.data) x.data = (char*)x.data + rows * x.stride_seq * (a.dtype == Dtype::float32 ? 4 : 2);
    };
    move_to(a.q, q[0]), move_to(a.out, q[0]), move_to(a.grad_out, q[0]), move_to(a.grad_q, q[0]);
    move_to(a.k, k[0]), move_to(a.v, k[0]), move_to(a.grad_k, k[0]), move_to(a.grad_v, k[0]);
    move_to(a.tangent.q, q[0]), move_to(a.tangent.out, q[0]);
    move_to(a.tangent.k, k[0]), move_to(a.tangent.v, k[0]);
  } else {
    a.seq_k = key_end(a, batch);
  }
  int64_t moved = a.seq_k - query_end(a, batch) - a.score.diagonal;
  a.score.diagonal += moved, a.score.first += moved, a.score.last += moved;
  return a;
}

// The offset of a head's queries in lse and in tensors of its shape.
static inline int64_t lse_offset(const Attention& a, int64_t batch, int64_t head) {
  if (a.packing.q_starts) return head * a.packing.total_q + a.packing.q_starts[batch];
  return (batch * a.heads + head) * a.seq_q;
}

// The keys that any of the queries attends to by position and length.
static inline Range key_range(const Attention& a, Range queries, int64_t batch) {
  int64_t end = queries.begin < query_end(a, batch) ? key_end(a, batch) : 0;
  end = max(0, min(end, queries.end + a.score.last));
  return {min(end, max(0, queries.begin + a.score.first)), end};
}

// The queries that attend to any of the keys.
static inline Range query_range(const Attention& a, Range keys, int64_t batch) {
  int64_t end = max(0, min(query_end(a, batch), keys.end - a.score.first));
  return {min(end, max(0, keys.begin - a.score.last)), end};
}

// Whether in_window masks any pair of a tile. Queries and keys past a length are not in the tile at all.
static inline bool is_partial(const Attention& a, Range queries, Range keys) {
  return keys.end - 1 > queries.begin + a.score.last || keys.begin < queries.end - 1 + a.score.first;
}

// Of W queries from `query` on, which have `key` in their window: all bits of a lane set, or none.
static inline vi in_window(const Attention& a, int64_t query, int64_t key) {
  vi i = (vi)iota();
  // Lanes first .. last do: query + i + first <= key <= query + i + last.
  int32_t first = (int32_t)max(-1, min(W, key - a.score.last - query));
  int32_t last = (int32_t)max(-1, min(W, key - a.score.first - query));
  return (i >= first) & (i <= last);
}

// Whether anything but the window changes the scores scale * q.k.
static inline bool has_score_mods(const Attention& a) {
  return a.score.softcap != 0 || a.score.alibi_slopes || a.score.mask.data || a.score.bias.data;
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
