// Matrix-vector products for decoding and linear layers: a few vectors times many rows, bound by the reading of the
// rows. Each row is read once for all vectors, its elements along the vector lanes.
#pragma once

#include <type_traits>

#include "pack.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t GEMV_ROWS = 4;     // vectors that share the load of a row
constexpr int64_t K_BLOCK = 64 * W;  // lanes along K of a partial sum: sums of partial sums round less

// Lane i of the result is the sum of v[i].
template <int STEP = W / 2>
static inline vf sum_each(vf (&v)[W]) {
  if constexpr (STEP > 0) {
    FLASHATTN_UNROLL for (int i = 0; i < STEP; i++) {
      exchange<STEP>(v[i], v[i + STEP], AllLanes{});
      v[i] += v[i + STEP];
    }
    return sum_each<STEP / 2>(v);
  }
  return v[0];
}

// Rows whose length is a multiple of 2 W elements: in place, or copied and padded with zeros.
static inline Matrix pad_rows_to_vectors(const Matrix& x, Range rows, float* scratch) {
  Matrix tile = {x.row(rows.begin), x.dtype, x.stride, round_up(x.dim, 2 * W)};
  if (tile.dim == x.dim) return tile;
  tile.data = (char*)scratch, tile.stride = tile.dim * element_size(x.dtype);
  for (int64_t i = rows.begin; i < rows.end; i++) {
    char* to = tile.row(i - rows.begin);
    __builtin_memset(to, 0, tile.stride);
    __builtin_memcpy(to, x.row(i), x.dim * element_size(x.dtype));
  }
  return tile;
}

struct NoPrefetch {};

// s[row][key] = scale * q[row] . k[key] of ROWS vectors q[row][depth], in lanes, and the n keys of a tile; s has room
// for n rounded up to W. As many keys are read at once as their sums fill one vector, at addresses far apart: the
// hardware prefetcher follows one stream per page, so more pages are more streams. `next` are the rows to prefetch in
// software; NoPrefetch where the hardware suffices, because prefetches take the slots of loads.
template <int64_t ROWS, class Dot, Dtype DTYPE, class Keys, class Next>
static void gemv(const float* q, int64_t depth, const Keys& k, int64_t n, float scale, float* s, int64_t stride,
                 const Next& next) {
  constexpr int64_t KEYS = W / ROWS;
  constexpr bool PREFETCH = !std::is_same_v<Next, NoPrefetch>;
  int64_t apart = (n + KEYS - 1) / KEYS;
  for (int64_t j = 0; j < apart; j++) {
    const char *keys[KEYS], *next_keys[KEYS];
    FLASHATTN_UNROLL for (int64_t i = 0; i < KEYS; i++) {
      keys[i] = k.row(min(j + i * apart, n - 1));
      if constexpr (PREFETCH) next_keys[i] = next.row(min(j + i * apart, n - 1));
    }
    vf total = {};
    for (int64_t part = 0; part < depth; part += K_BLOCK) {
      vf sums[W] = {};
      for (int64_t c = part; c < min(depth, part + K_BLOCK); c += W) {
        vf x[ROWS];
        FLASHATTN_UNROLL for (int r = 0; r < ROWS; r++) x[r] = load<vf>(q + r * depth + c);
        FLASHATTN_UNROLL for (int i = 0; i < KEYS; i++) {
          if constexpr (PREFETCH)
            __builtin_prefetch(next_keys[i] + c * (Dot::K_PER_LANE == 2 ? 4 : element_size(DTYPE)), 0, 2);
          vf y = Dot::K_PER_LANE == 2 ? load<vf>((const float*)keys[i] + c) : load_as_f32<DTYPE>(keys[i], c);
          FLASHATTN_UNROLL for (int r = 0; r < ROWS; r++) sums[r * KEYS + i] =
              Dot::multiply_add(x[r], y, sums[r * KEYS + i]);
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
    if constexpr (decltype(dot)::K_PER_LANE == 2)
      f(dot, DtypeTag<Dtype::bfloat16>{});  // it multiplies bfloat16 only
    else
      with_dtype(dtype, [&](auto tag) { f(dot, tag); });
  });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
