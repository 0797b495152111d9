// Products of few rows with many, where reading the many is what costs time: each is read once for all of the few, its
// numbers along the vector lanes. For decoding and for linear layers.
#pragma once

#include "tiles.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t ROWS_AT_ONCE = 4;                 // rows that share a load
constexpr int64_t KEYS_AT_ONCE = W / ROWS_AT_ONCE;  // so that the sums of their products are one vector

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

// s[row][key] = scale * q[row] . k[key] of ROWS_AT_ONCE rows, which `q` holds as elements, and the n keys of a tile; s
// has room for whole groups of keys. `ahead`: what is read next.
template <class Dot, Dtype DTYPE, class Rows, class Ahead>
static void products(const float* q, int64_t depth, const Rows& k, int64_t n, float scale, float* s, int64_t stride,
                     const Ahead& ahead) {
  for (int64_t j = 0; j < n; j += KEYS_AT_ONCE) {
    const char *rows[KEYS_AT_ONCE], *next[KEYS_AT_ONCE];
    UNROLL for (int64_t i = 0; i < KEYS_AT_ONCE; i++) {
      rows[i] = k.row(min(j + i, n - 1));
      next[i] = ahead.row(min(j + i, n - 1));
    }
    vf sums[W] = {};
    for (int64_t c = 0; c < depth; c += W) {
      vf x[ROWS_AT_ONCE];
      UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) x[r] = load<vf>(q + r * depth + c);
      UNROLL for (int i = 0; i < KEYS_AT_ONCE; i++) {
        __builtin_prefetch(next[i] + c * (Dot::DEPTH == 2 ? 4 : element_size(DTYPE)), 0, 2);
        vf y = Dot::DEPTH == 2 ? load<vf>((const float*)rows[i] + c) : load_numbers<DTYPE>(rows[i], c);
        UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
          sums[r * KEYS_AT_ONCE + i] = Dot::multiply_add(x[r], y, sums[r * KEYS_AT_ONCE + i]);
      }
    }
    float all[W];
    store(all, sum_each(sums) * scale);
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++)
      for (int64_t i = 0; i < KEYS_AT_ONCE; i++) s[r * stride + j + i] = all[r * KEYS_AT_ONCE + i];
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
