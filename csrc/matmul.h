// The matrix product all attention kernels are made of, C[M][N] = A[M][K] B[K][N] with float32 sums, and what it
// multiplies: float32 numbers or, where the processor has a dot instruction, pairs of bfloat16.
//
// An element of A is 32 bits, broadcast from memory at any row and column stride, so that a matrix and its transpose
// are the same call and keys and values are read where they lie. B is packed: vectors of 32-bit elements. A pair holds
// two neighbours along K.
#pragma once

#include "simd.h"

namespace flashattn {
namespace FLASHATTN_ISA {

struct Single {
  static constexpr int DEPTH = 1;  // numbers along K in an element
  static constexpr int EXP_DEGREE = 6;
  static vf broadcast(const char* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return FLASHATTN_ISA::broadcast(x);
  }
  static vf multiply_add(vf a, vf b, vf c) { return c + a * b; }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int DEPTH = 2;
  static constexpr int EXP_DEGREE = 4;  // weights are rounded to bfloat16
  static vf broadcast(const char* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return (vf)_mm512_set1_epi32(x);
  }
  // Lane i holds even[i] and odd[i], rounded to bfloat16.
  static vf of(vf even, vf odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vf)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
  }
  // 2 W numbers of two rows as elements.
  static void interleave(const uint16_t* even, const uint16_t* odd, float* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(W));
    __m512i a = load<__m512i>(even), b = load<__m512i>(odd);
    store(out, _mm512_permutex2var_epi16(a, low, b));
    store(out + W, _mm512_permutex2var_epi16(a, high, b));
  }
  static vf multiply_add(vf a, vf b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
#endif

// Call f(Single{}) or f(Pair{}), whichever multiplies numbers of this dtype.
template <class F>
static inline void with_dot(Dtype dtype, F f) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bfloat16) return f(Pair{});
#endif
  f(Single{});
}

// The left side of a product. Strides in bytes.
struct Left {
  const char* data;
  int64_t row, col;
};

// A tile of C while it is in registers. They have no addresses, so it is visited by loops that are unrolled.
template <int ROWS_, int VECS_>
struct Accumulators {
  static constexpr int ROWS = ROWS_, VECS = VECS_;
  vf at[ROWS][VECS];

  // f(row, vector, value) for each vector.
  template <class F>
  void each(F f) const {
    UNROLL for (int v = 0; v < VECS; v++)
      UNROLL for (int r = 0; r < ROWS; r++) f(r, v, at[r][v]);
  }
};

// The largest tile: with VECS vectors of B and a broadcast of A it fills the registers.
constexpr int ROWS = 6;
constexpr int VECS = W == 16 ? 4 : 2;
constexpr int PANEL = VECS * W;

// Per element of K: a load of each vector of B, a broadcast of A for each row, ROWS * VECS multiply-adds.
template <class Dot, int ROWS, int VECS, class Finish>
INLINE void microkernel(Left a, const float* b, int64_t ldb, int64_t depth, int64_t row, int64_t col,
                               Finish finish) {
  Accumulators<ROWS, VECS> c = {};
  for (; depth > 0; depth--, a.data += a.col, b += ldb) {
    vf x[VECS];
    UNROLL for (int v = 0; v < VECS; v++) x[v] = load<vf>(b + v * W);
    UNROLL for (int r = 0; r < ROWS; r++) {
      vf y = Dot::broadcast(a.data + r * a.row);
      UNROLL for (int v = 0; v < VECS; v++) c.at[r][v] = Dot::multiply_add(y, x[v], c.at[r][v]);
    }
  }
  finish(c, row, col);
}

// Columns of C beginning at col, VECS vectors of them, for all rows.
template <class Dot, int VECS, class Finish>
static void panel(Left a, const float* b, int64_t ldb, int64_t rows, int64_t depth, int64_t col, Finish finish) {
  auto left = [&](int64_t row) { return Left{a.data + row * a.row, a.row, a.col}; };
  int64_t row = 0;
  for (; rows - row >= ROWS && rows - row != 8; row += ROWS)  // 8 is better 4 + 4 than 6 + 2
    microkernel<Dot, ROWS, VECS>(left(row), b, ldb, depth, row, col, finish);
  for (; rows - row >= 4; row += 4) microkernel<Dot, 4, VECS>(left(row), b, ldb, depth, row, col, finish);
  for (; rows - row >= 2; row += 2) microkernel<Dot, 2, VECS>(left(row), b, ldb, depth, row, col, finish);
  if (row < rows) microkernel<Dot, 1, VECS>(left(row), b, ldb, depth, row, col, finish);
}

// C = A B, for `cols` columns, a multiple of W; depth counts elements. What becomes of C is up to `finish`, which gets
// it tile by tile, in registers: finish(accumulators, row, col).
template <class Dot, class Finish>
static void matmul(Left a, const float* b, int64_t ldb, int64_t rows, int64_t cols, int64_t depth, Finish finish) {
  int64_t col = 0;
  for (; cols - col >= PANEL; col += PANEL)  // outermost: one panel of B stays in the first-level cache
    panel<Dot, VECS>(a, b + col, ldb, rows, depth, col, finish);
  if constexpr (VECS > 2)
    for (; cols - col >= 2 * W; col += 2 * W) panel<Dot, 2>(a, b + col, ldb, rows, depth, col, finish);
  if (col < cols) panel<Dot, 1>(a, b + col, ldb, rows, depth, col, finish);
}

// The usual ends of a product. What C is added to comes in after the sum over K: a sum of tile sums is more exact than
// one long sum.
static inline auto store_to(float* c, int64_t ldc) {
  return [=](auto& tile, int64_t row, int64_t col) {
    tile.each([=](int r, int v, vf x) { store(c + (row + r) * ldc + col + v * W, x); });
  };
}
static inline auto add_to(float* c, int64_t ldc) {
  return [=](auto& tile, int64_t row, int64_t col) {
    tile.each([=](int r, int v, vf x) {
      float* at = c + (row + r) * ldc + col + v * W;
      store(at, load<vf>(at) + x);
    });
  };
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
