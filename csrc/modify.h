// What is done to a tile of scores S[key][query], queries along the lanes: softcap, ALiBi, bias, masks; and what
// dropout does to its weights. The twin of `cap` and `shift` in kernels/scores.py and `kept_weights` in
// kernels/dropout.py.
#pragma once

#include "tiles.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr float NEVER = -__builtin_inff();

// Which scores: `lanes` queries from `query` on, of one head.
struct Spot {
  int64_t batch, head, query, lanes;
};

static inline char* plane_row(const ScoreTensor& x, int64_t size, const Spot& at, int64_t query, int64_t key) {
  int64_t element = at.batch * x.stride_batch + at.head * x.stride_head + query * x.stride_q + key * x.stride_k;
  return (char*)x.data + element * size;
}

// What a tile needs of a bias: [key][lanes]; one key where it is the same for all; [key] where it is for all queries.
static inline void load_bias(const Attention& a, const Spot& at, Range keys, float* out) {
  const ScoreTensor& x = a.score.bias;
  int64_t size = element_size(x.dtype), n = x.stride_k ? keys.end - keys.begin : 1;
  Matrix rows = {plane_row(x, size, at, 0, keys.begin), x.dtype, x.stride_q * size, n};
  if (x.stride_q)
    pack_transposed<Single>(rows, {at.query, min(a.seq_q, at.query + at.lanes)}, at.lanes, out);
  else
    load_floats(out, rows.data, x.dtype, n);
}
static inline vf bias_at(const ScoreTensor& x, const float* bias, int64_t key, int64_t lanes, int64_t lane) {
  if (!x.stride_q) return broadcast(bias[x.stride_k ? key : 0]);
  return load<vf>(bias + (x.stride_k ? key : 0) * lanes + lane);
}

// A byte a key, 0 or not, to a bit a key: first to 0 or 1 (a tensor of bool may be a view of other bytes), then the
// product moves bit 8 i to bit 56 + i.
static inline uint32_t bits_of(const char* bytes, int64_t n) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight = 0;
    if (n - i >= 8)
      __builtin_memcpy(&eight, bytes + i, 8);
    else
      for (int64_t r = i; r < n; r++) eight |= (uint64_t)(uint8_t)bytes[r] << 8 * (r - i);
    constexpr uint64_t low = 0x7F7F7F7F7F7F7F7Fu;
    eight = (((eight & low) + low) | eight) >> 7 & 0x0101010101010101u;
    bits |= (uint32_t)(eight * 0x0102040810204080u >> 56) << i;
  }
  return bits;
}

// What a tile needs of a mask: [key / 32][lanes] words, a bit a key.
static inline void load_mask(const Attention& a, const Spot& at, Range keys, uint32_t* out) {
  const ScoreTensor& x = a.score.mask;
  int64_t queries = min(at.lanes, a.seq_q - at.query);
  for (int64_t j = keys.begin; j < keys.end; j += 32, out += at.lanes)
    for (int64_t i = 0; i < at.lanes; i++) {
      if (i > 0 && (!x.stride_q || i >= queries)) {
        out[i] = out[i - 1];
        continue;
      }
      const char* row = plane_row(x, 1, at, at.query + i, j);
      out[i] = x.stride_k ? bits_of(row, min(32, keys.end - j)) : *row ? ~0u : 0;
    }
}
static inline vi mask_at(const uint32_t* words, int64_t key, int64_t lanes, int64_t lane) {
  return (vi)(load<vu>(words + key / 32 * lanes + lane) << (31 - key % 32)) < 0;
}

// Memory for what a tile needs of both.
struct Planes {
  float* bias;
  uint32_t* mask;
};
static inline Planes take_planes(const Attention& a, Scratch& scratch, int64_t block_n) {
  return {a.score.bias.data ? scratch.take((block_n + W) * BLOCK_M) : nullptr,
          a.score.mask.data ? (uint32_t*)scratch.take((block_n / 32 + 1) * BLOCK_M) : nullptr};
}
static inline size_t planes_floats(const Attention& a, int64_t block_n) {
  return (a.score.bias.data ? (block_n + W) * BLOCK_M + 16 : 0) +
         (a.score.mask.data ? (block_n / 32 + 1) * BLOCK_M + 16 : 0);
}

// Scores, scale * q.k, to what softmax takes, in place: s[key][stride]. `slope`, if given, becomes the derivative of the
// softcap; `m`, where given, the maximum of what it was and the scores.
template <class Dot>
static inline void modify(const Attention& a, const Spot& at, Range keys, bool edge, Planes planes, float* s,
                          int64_t stride, float* slope, float* m) {
  const Score& score = a.score;
  if (planes.bias) load_bias(a, at, keys, planes.bias);
  if (planes.mask) load_mask(a, at, keys, planes.mask);
  const float cap = score.softcap, inverse = score.softcap ? 1 / cap : 0;
  const float alibi = score.alibi_slopes ? score.alibi_slopes[at.batch * score.alibi_slopes_stride + at.head] : 0;
  const vf lane = __builtin_convertvector((vi)lane_numbers(), vf);
  for (int64_t i = 0; i < at.lanes; i += W) {
    vf top = m ? load<vf>(m + i) : vf{};
    for (int64_t j = keys.begin; j < keys.end; j++) {
      int64_t row = j - keys.begin;
      vf x = load<vf>(s + row * stride + i);
      if (score.softcap) {
        vf t = tanh<Dot::EXP_DEGREE>(x * inverse);
        if (slope) store(slope + row * stride + i, 1 - t * t);
        x = t * cap;
      }
      if (score.alibi_slopes) {
        vf distance = lane + (float)(at.query + i + score.diagonal - j);
        x -= (distance < 0 ? -distance : distance) * alibi;
      }
      if (planes.bias) x += bias_at(score.bias, planes.bias, row, at.lanes, i);
      if (planes.mask) x = mask_at(planes.mask, row, at.lanes, i) ? x : vf{} + NEVER;
      if (edge) x = visible(a, at.query + i, j) ? x : vf{} + NEVER;
      store(s + row * stride + i, x);
      top = max(top, x);
    }
    if (m) store(m + i, top);
  }
}

// What dropout multiplies the weights of W queries by, key after key: the four words of Philox, of 7 rounds, at
// (key / 4, query, batch * heads + head) serve four keys.
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
      words = philox<7>(dropout.seed, vu{} + (uint32_t)quarter, queries, head);
    }
    return kept(dropout, words.at[key % 4]);
  }
};

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
