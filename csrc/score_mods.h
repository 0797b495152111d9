// Softcap, ALiBi, bias and masks of a tile of scores S[key][query], queries along the lanes, and dropout of its
// weights. The twin of kernels/scores.py and kernels/dropout.py.
#pragma once

#include "pack.h"
#include "philox.h"
#include "schedule.h"

namespace flashattn {
namespace FLASHATTN_ISA {

// The scores of one head from `query` on, `lanes` of them.
struct TileCoord {
  int64_t batch, head, query, lanes;
};

static inline char* score_tensor_row(const ScoreTensor& x, int64_t size, const TileCoord& at, int64_t query,
                                     int64_t key) {
  int64_t element = at.batch * x.stride_batch + at.head * x.stride_head + query * x.stride_q + key * x.stride_k;
  return (char*)x.data + element * size;
}

// The bias of a tile: [key][lanes], one key if it is broadcast along keys; [key] if it is broadcast along queries.
static inline void load_bias(const Attention& a, const ScoreTensor& x, const TileCoord& at, Range keys, float* out) {
  int64_t size = element_size(x.dtype), n = x.stride_k ? keys.end - keys.begin : 1;
  Matrix rows = {score_tensor_row(x, size, at, 0, keys.begin), x.dtype, x.stride_q * size, n};
  if (x.stride_q)
    pack_b_transposed<F32Fma>(rows, {at.query, min(a.seq_q, at.query + at.lanes)}, at.lanes, out);
  else
    load_floats(out, rows.data, x.dtype, n);
}
static inline vf load_bias_lanes(const ScoreTensor& x, const float* bias, int64_t key, int64_t lanes, int64_t lane) {
  if (!x.stride_q) return broadcast(bias[x.stride_k ? key : 0]);
  return load<vf>(bias + (x.stride_k ? key : 0) * lanes + lane);
}

// One byte per key to one bit per key. Bytes become 0 or 1 first (a tensor of bool may be a view of other bytes), then
// a product moves bit 8 i to bit 56 + i.
static inline uint32_t pack_bits(const char* bytes, int64_t n) {
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

// The mask of a tile: [key / 32][lanes] words, one bit per key.
static inline void load_mask(const Attention& a, const TileCoord& at, Range keys, uint32_t* out) {
  const ScoreTensor& x = a.score.mask;
  int64_t queries = min(at.lanes, a.seq_q - at.query);
  for (int64_t j = keys.begin; j < keys.end; j += 32, out += at.lanes)
    for (int64_t i = 0; i < at.lanes; i++) {
      if (i > 0 && (!x.stride_q || i >= queries)) {
        out[i] = out[i - 1];
        continue;
      }
      const char* row = score_tensor_row(x, 1, at, at.query + i, j);
      out[i] = x.stride_k ? pack_bits(row, min(32, keys.end - j)) : *row ? ~0u : 0;
    }
}
static inline vi is_unmasked(const uint32_t* words, int64_t key, int64_t lanes, int64_t lane) {
  return (vi)(load<vu>(words + key / 32 * lanes + lane) << (31 - key % 32)) < 0;
}

// Scratch memory for the bias and the mask of a tile, or null.
struct BiasMask {
  float* bias;
  uint32_t* mask;
};
static inline float* take_bias(const ScoreTensor& bias, Scratch& scratch, int64_t block_n) {
  return bias.data ? scratch.take((block_n + W) * BLOCK_M) : nullptr;
}
static inline BiasMask take_bias_mask(const Attention& a, Scratch& scratch, int64_t block_n) {
  return {take_bias(a.score.bias, scratch, block_n),
          a.score.mask.data ? (uint32_t*)scratch.take((block_n / 32 + 1) * BLOCK_M) : nullptr};
}
static inline size_t bias_floats(const ScoreTensor& bias, int64_t block_n) {
  return bias.data ? (block_n + W) * BLOCK_M + 16 : 0;
}
static inline size_t bias_mask_floats(const Attention& a, int64_t block_n) {
  return bias_floats(a.score.bias, block_n) + (a.score.mask.data ? (block_n / 32 + 1) * BLOCK_M + 16 : 0);
}

// Where the derivatives of the softcap go, or null: with t = tanh(x / cap), 1 - t^2 and -2 t (1 - t^2) / cap.
struct SoftcapDerivatives {
  float *first = nullptr, *second = nullptr;
};

// Apply softcap, ALiBi, bias and masks to scores s[key][stride] = scale * q.k, in place. `m`, if given, is raised to
// the maximum of the scores.
template <class Dot>
static inline void apply_score_mods(const Attention& a, const TileCoord& at, Range keys, bool partial,
                                    BiasMask bias_mask, float* s, int64_t stride, SoftcapDerivatives softcap,
                                    float* m) {
  const Score& score = a.score;
  if (bias_mask.bias) load_bias(a, score.bias, at, keys, bias_mask.bias);
  if (bias_mask.mask) load_mask(a, at, keys, bias_mask.mask);
  const float cap = score.softcap, inverse = score.softcap ? 1 / cap : 0;
  const float slope = score.alibi_slopes ? score.alibi_slopes[at.batch * score.alibi_slopes_stride + at.head] : 0;
  const vf lane = __builtin_convertvector((vi)iota(), vf);
  for (int64_t i = 0; i < at.lanes; i += W) {
    vf top = m ? load<vf>(m + i) : vf{};
    for (int64_t j = keys.begin; j < keys.end; j++) {
      int64_t row = j - keys.begin;
      vf x = load<vf>(s + row * stride + i);
      if (score.softcap) {
        vf t = tanh<Dot::EXP_DEGREE>(x * inverse);
        if (softcap.first) store(softcap.first + row * stride + i, 1 - t * t);
        if (softcap.second) store(softcap.second + row * stride + i, t * (1 - t * t) * (-2 * inverse));
        x = t * cap;
      }
      if (score.alibi_slopes) {
        vf distance = lane + (float)(at.query + i + score.diagonal - j);
        x -= (distance < 0 ? -distance : distance) * slope;
      }
      if (bias_mask.bias) x += load_bias_lanes(score.bias, bias_mask.bias, row, at.lanes, i);
      if (bias_mask.mask) x = is_unmasked(bias_mask.mask, row, at.lanes, i) ? x : vf{} + NEG_INF;
      if (partial) x = in_window(a, at.query + i, j) ? x : vf{} + NEG_INF;
      store(s + row * stride + i, x);
      top = max(top, x);
    }
    if (m) store(m + i, top);
  }
}

// Turn the tangents tangent_x of scale * q.k into those of the scores, f' tangent_x + tangent_bias, in place, and f''
// into f'' tangent_x. `s`, if given, are the scores: where one is masked, its tangent is 0.
static inline void apply_tangent_mods(const Attention& a, const TileCoord& at, Range keys, float* bias, const float* s,
                                      float* ts, int64_t stride, SoftcapDerivatives softcap) {
  const ScoreTensor& tangent_bias = a.tangent.bias;
  if (bias) load_bias(a, tangent_bias, at, keys, bias);
  for (int64_t j = 0; j < keys.end - keys.begin; j++)
    for (int64_t i = 0; i < at.lanes; i += W) {
      int64_t element = j * stride + i;
      vf x = load<vf>(ts + element);
      if (softcap.second) store(softcap.second + element, load<vf>(softcap.second + element) * x);
      if (softcap.first) x *= load<vf>(softcap.first + element);
      if (bias) x += load_bias_lanes(tangent_bias, bias, j, at.lanes, i);
      if (s) x = load<vf>(s + element) == NEG_INF ? vf{} : x;
      store(ts + element, x);
    }
}

// The dropout multipliers of the weights of W queries, for keys in ascending order: the four words of 7-round Philox at
// (key / 4, query, batch * heads + head) are those of four keys.
struct DropoutMultipliers {
  const Dropout& dropout;
  uint32_t head;
  vu queries;
  int64_t quarter = -1;
  Words words;

  DropoutMultipliers(const Attention& a, const TileCoord& at)
      : dropout(a.score.dropout),
        head((uint32_t)(at.batch * a.heads + at.head)),
        queries(iota() + (uint32_t)at.query) {}

  vf at(int64_t key) {
    if (key / 4 != quarter) {
      quarter = key / 4;
      words = philox<7>(dropout.seed, vu{} + (uint32_t)quarter, queries, head);
    }
    return dropout_multiplier(dropout, words.word[key % 4]);
  }
};

// What online_softmax (softmax.h) does to the weights of W queries without dropout and with it.
struct KeepWeights {
  vf operator()(vf p, int64_t, int) const { return p; }
  void finish(vf) const {}
};
struct DropWeights {
  DropoutMultipliers multipliers;
  int64_t first_key;
  vf operator()(vf p, int64_t j, int) { return p * multipliers.at(first_key + j); }
  void finish(vf) const {}
};

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
