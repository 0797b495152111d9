// What is done to a tile of scores S[key][query], queries along the lanes: softcap, ALiBi, bias, masks; and what dropout
// does to its weights. The twin of `modified` and `kept` in kernels/scores.py.
#pragma once

#include "tiles.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr float NEVER = -__builtin_inff();

// Which scores: `lanes` queries from `query` on, of one head.
struct Spot {
  int64_t batch, head, query, lanes;
};

static inline char* plane_row(const Plane& x, int64_t size, const Spot& at, int64_t query, int64_t key) {
  int64_t element = at.batch * x.stride_batch + at.head * x.stride_head + query * x.stride_q + key * x.stride_k;
  return (char*)x.data + element * size;
}

// W bytes of a mask's row as what is added to scores; those past n are masked.
static inline vf mask_at(const char* row, int64_t n) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  vb bytes = {};
  if (n >= W)
    bytes = load<vb>(row);
  else
    for (int64_t i = 0; i < n; i++) bytes[i] = row[i];
  vu x = __builtin_convertvector(bytes, vu);
  return x != 0 ? vf{} : vf{} + NEVER;
}

// The bias of some keys as out[key][lanes], 0 in lanes past the queries there are.
static inline void load_bias(const Attention& a, const Spot& at, Range keys, float* out) {
  const Plane& x = a.score.bias;
  int64_t size = element_size(x.dtype), n = x.stride_k ? keys.end - keys.begin : 1;
  Matrix rows = {plane_row(x, size, at, 0, keys.begin), x.dtype, x.stride_q * size, n};
  pack_transposed<Single>(rows, {at.query, min(a.seq_q, at.query + at.lanes)}, at.lanes, out);
}

// Likewise of the mask: 0 or -inf.
static inline void load_mask(const Attention& a, const Spot& at, Range keys, float* out) {
  const Plane& x = a.score.mask;
  int64_t n = x.stride_k ? keys.end - keys.begin : 1;
  for (int64_t i = 0; i < at.lanes; i += W)
    for (int64_t c = 0; c < n; c += W) {
      vf block[W];
      for (int64_t r = 0; r < W; r++) {
        int64_t query = at.query + i + r;
        block[r] = query < a.seq_q ? mask_at(plane_row(x, 1, at, query, keys.begin + c * x.stride_k), n - c) : vf{};
      }
      transpose(block);
      for (int64_t r = 0; r < min(W, n - c); r++) store(out + (c + r) * at.lanes + i, block[r]);
    }
}

// Memory for the planes of a tile.
struct Planes {
  float *bias, *mask;
};
static inline Planes take_planes(const Attention& a, Scratch& scratch, int64_t block_n) {
  auto take = [&](const Plane& x) { return x.data ? scratch.take(block_n * BLOCK_M) : nullptr; };
  return {take(a.score.bias), take(a.score.mask)};
}
static inline size_t planes_floats(const Attention& a, int64_t block_n) {
  return ((a.score.bias.data ? 1 : 0) + (a.score.mask.data ? 1 : 0)) * (block_n * BLOCK_M + 16);
}

// Scores in base 2 to what softmax takes, in place: s[key][stride]. `slope`, where given, becomes the derivative of the
// softcap; `m`, where given, the maximum of what it was and the scores.
static inline void modify(const Attention& a, const Spot& at, Range keys, bool edge, Planes planes, float* s,
                          int64_t stride, float* slope, float* m) {
  const Score& score = a.score;
  if (planes.bias) load_bias(a, at, keys, planes.bias);
  if (planes.mask) load_mask(a, at, keys, planes.mask);
  const float cap = score.softcap * LOG2E, inverse = score.softcap ? 1 / cap : 0;
  const float alibi = score.slopes ? score.slopes[at.batch * score.slopes_stride + at.head] * LOG2E : 0;
  const vf lane = __builtin_convertvector((vi)lane_numbers(), vf);
  for (int64_t i = 0; i < at.lanes; i += W) {
    vf top = m ? load<vf>(m + i) : vf{};
    for (int64_t j = keys.begin; j < keys.end; j++) {
      int64_t row = j - keys.begin;
      vf x = load<vf>(s + row * stride + i);
      if (score.softcap) {
        vf t = tanh(x * inverse);
        if (slope) store(slope + row * stride + i, 1 - t * t);
        x = t * cap;
      }
      if (score.slopes) {
        vf distance = lane + (float)(at.query + i + score.diagonal - j);
        x -= (distance < 0 ? -distance : distance) * alibi;
      }
      if (planes.bias) x += load<vf>(planes.bias + (score.bias.stride_k ? row : 0) * at.lanes + i) * LOG2E;
      if (planes.mask) {
        vf hidden = load<vf>(planes.mask + (score.mask.stride_k ? row : 0) * at.lanes + i);
        x = hidden == 0 ? x : hidden;
      }
      if (edge) x = visible(a, at.query + i, j) ? x : vf{} + NEVER;
      store(s + row * stride + i, x);
      top = max(top, x);
    }
    if (m) store(m + i, top);
  }
}

// What dropout multiplies the weights of W queries by, key after key: the four words of Philox at (key / 4, query,
// batch * heads + head) serve four keys.
struct KeptWeights {
  const Dropout& dropout;
  uint32_t head;
  vu queries;
  int64_t quarter = -1;
  Words words;

  KeptWeights(const Attention& a, const Spot& at)
      : dropout(a.score.dropout),
        head((uint32_t)(at.batch * a.heads + at.head)),
        queries(lane_numbers() + (uint32_t)at.query) {}

  vf at(int64_t key) {
    if (key / 4 != quarter) {
      quarter = key / 4;
      words = philox(dropout.seed, vu{} + (uint32_t)quarter, queries, head);
    }
    return kept(dropout, words.at[key % 4]);
  }
};

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
