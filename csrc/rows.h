// Products of few rows with many, where reading the many is what costs time: each is read once for all of the few, its
// numbers along the vector lanes. For decoding and for linear layers.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t ROWS_AT_ONCE = 4;  // rows that share a load
constexpr int64_t PART = 64 * W;     // elements that are summed before their sum joins the others: rounds less

// Lane i becomes the sum of v[i].
template <int STEP = W / 2>
static inline vf sum_each(vf (&v)[W]) {
  if constexpr (STEP > 0) {
    UNROLL for (int i = 0; i < STEP; i++) {
      exchange<STEP>(v[i], v[i + STEP], Lanes{});
      v[i] += v[i + STEP];
    }
    return sum_each<STEP / 2>(v);
  }
  return v[0];
}

// The rows of a tile as a matrix of whole vectors: in place, or copied and padded with zeros.
static inline Matrix whole_vectors(const Matrix& x, Range keys, float* scratch) {
  constexpr int64_t NUMBERS = 2 * W;
  Matrix tile = {x.row(keys.begin), x.dtype, x.stride, round_up(x.dim, NUMBERS)};
  if (tile.dim == x.dim) return tile;
  tile.data = (char*)scratch, tile.stride = tile.dim * element_size(x.dtype);
  for (int64_t i = keys.begin; i < keys.end; i++) {
    char* to = tile.row(i - keys.begin);
    __builtin_memset(to, 0, tile.stride);
    __builtin_memcpy(to, x.row(i), x.dim * element_size(x.dtype));
  }
  return tile;
}

struct Nothing {};  // is to be fetched

// s[row][key] = scale * q[row] . k[key] of ROWS rows, which `q` holds as elements, and the n keys of a tile; s has room
// for n rounded up to W. As many keys are read at once as make the sums of their products one vector, and they lie far
// apart: the processor reads ahead in each page it sees walked through, so the more pages, the more it reads at once.
// `ahead`: what is read next; Nothing where that reading ahead does, since fetches by name take the places of loads.
template <int64_t ROWS, class Dot, Dtype DTYPE, class Keys, class Ahead>
static void products(const float* q, int64_t depth, const Keys& k, int64_t n, float scale, float* s, int64_t stride,
                     const Ahead& ahead) {
  constexpr int64_t KEYS = W / ROWS;
  constexpr bool FETCH = !std::is_same_v<Ahead, Nothing>;
  int64_t apart = (n + KEYS - 1) / KEYS;
  for (int64_t j = 0; j < apart; j++) {
    const char *keys[KEYS], *next[KEYS];
    UNROLL for (int64_t i = 0; i < KEYS; i++) {
      keys[i] = k.row(min(j + i * apart, n - 1));
      if constexpr (FETCH) next[i] = ahead.row(min(j + i * apart, n - 1));
    }
    vf total = {};
    for (int64_t part = 0; part < depth; part += PART) {
      vf sums[W] = {};
      for (int64_t c = part; c < min(depth, part + PART); c += W) {
        vf x[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) x[r] = load<vf>(q + r * depth + c);
        UNROLL for (int i = 0; i < KEYS; i++) {
          if constexpr (FETCH) __builtin_prefetch(next[i] + c * (Dot::DEPTH == 2 ? 4 : element_size(DTYPE)), 0, 2);
          vf y = Dot::DEPTH == 2 ? load<vf>((const float*)keys[i] + c) : load_numbers<DTYPE>(keys[i], c);
          UNROLL for (int r = 0; r < ROWS; r++) sums[r * KEYS + i] = Dot::multiply_add(x[r], y, sums[r * KEYS + i]);
        }
      }
      total += sum_each(sums);
    }
    float all[W];
    store(all, total * scale);
    for (int64_t r = 0; r < ROWS; r++)
      for (int64_t i = 0; i < KEYS; i++) s[r * stride + j + i * apart] = all[r * KEYS + i];
  }
}

// Call f(dot, dtype) with both as types.
template <class F>
static inline void with_dot_and_dtype(Dtype dtype, F f) {
  with_dot(dtype, [&](auto dot) {
    if constexpr (decltype(dot)::DEPTH == 2)
      f(dot, Constant<Dtype::bfloat16>{});  // pairs are of bfloat16
    else
      with_dtype(dtype, [&](auto constant) { f(dot, constant); });
  });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
