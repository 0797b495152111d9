// Everything between q.k and softmax: which tiles to visit, which scores to keep. The twin of kernels/scores.py.
#pragma once

#include "simd.h"

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

// The keys that queries begin .. end look at.
static inline Range visible_keys(const Attention& a, Range queries, int64_t batch) {
  int64_t end = queries.begin < query_end(a, batch) ? key_end(a, batch) : 0;
  if (a.score.has_right) end = max(0, min(end, queries.end + a.score.right));
  return {0, end};
}

// The queries that look at keys begin .. end.
static inline Range visible_queries(const Attention& a, Range keys, int64_t batch) {
  int64_t end = query_end(a, batch);
  int64_t begin = a.score.has_right ? min(end, max(0, keys.begin - a.score.right)) : 0;
  return {begin, end};
}

// Whether some pair of a tile is masked by position, so that `mask` has work to do. What lies past a length is not
// in the tile at all.
static inline bool is_edge(const Attention& a, Range queries, Range keys) {
  return a.score.has_right && keys.end - 1 > queries.begin + a.score.right;
}

// Set the masked scores of an edge tile, scores[key][lane], to `value`. Lane i is query queries.begin + i.
static inline void mask(const Attention& a, float* scores, int64_t lanes, Range queries, Range keys, float value) {
  for (int64_t j = keys.begin; j < keys.end; j++) {
    // Query i sees key j from i = j - right on.
    int64_t hidden = min(lanes, max(0, j - a.score.right - queries.begin));
    float* row = scores + (j - keys.begin) * lanes;
    for (int64_t i = 0; i < hidden; i++) row[i] = value;
  }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
