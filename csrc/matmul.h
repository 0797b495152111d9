// The matrix product of all attention kernels, C[M][N] = A[M][K] B[K][N] with float32 sums. Its operands are 32-bit
// lanes of K_PER_LANE elements that are neighbours along K: one float32 or, where the processor has a dot instruction,
// two bfloat16.
//
// A lane of A is broadcast from memory at any row and column stride, so that a matrix and its transpose are the same
// call and keys and values can be read in place. B is vectors of lanes.
#pragma once

#include "simd.h"

namespace flashattn {
namespace FLASHATTN_ISA {

struct F32Fma {
  static constexpr int K_PER_LANE = 1;
  static constexpr int EXP_DEGREE = 6;
  static vf broadcast(const char* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return FLASHATTN_ISA::broadcast(x);
  }
  static vf multiply_add(vf a, vf b, vf c) { return c + a * b; }
};

#if defined(__AVX512BF16__)
struct Bf16Dot2 {
  static constexpr int K_PER_LANE = 2;
  static constexpr int EXP_DEGREE = 4;  // weights are rounded to bfloat16
  static vf broadcast(const char* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return (vf)_mm512_set1_epi32(x);
  }
  // Lane i is even[i] and odd[i], rounded to bfloat16.
  static vf pack_pairs(vf even, vf odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vf)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
  }
  // 2 W elements of each of two rows as lanes.
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

// Call f(F32Fma{}) or f(Bf16Dot2{}), whichever multiplies elements of this dtype.
template <class F>
static inline void with_dot(Dtype dtype, F f) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bfloat16) return f(Bf16Dot2{});
#endif
  f(F32Fma{});
}

// The operand A, packed or in place. Strides in bytes.
struct PackedA {
  const char* data;
  int64_t row, col;
};

// The operand B: b[k lane][ld].
struct PackedB {
  const float* data;
  int64_t ld;
};

// A tile of C in registers. Registers have no addresses, so all loops over it are unrolled.
template <int ROWS_, int VECS_>
struct Accumulators {
  static constexpr int ROWS = ROWS_, VECS = VECS_;
  vf at[ROWS][VECS];

  // f(row, vector, value) for each vector.
  template <class F>
  void for_each(F f) const {
    FLASHATTN_UNROLL for (int v = 0; v < VECS; v++) FLASHATTN_UNROLL for (int r = 0; r < ROWS; r++) f(r, v, at[r][v]);
  }
};

// The largest tile, MR rows and NR columns: with NR_VECS vectors of B and a broadcast of A it fills the registers.
constexpr int MR = 6;
constexpr int NR_VECS = W == 16 ? 4 : 2;
constexpr int NR = NR_VECS * W;

// C += A B for `depth` lanes of K. Per lane: a load of each vector of B, a broadcast of A for each row, ROWS * VECS
// multiply-adds.
template <class Dot, int ROWS, int VECS>
FLASHATTN_INLINE void add_product(Accumulators<ROWS, VECS>& c, PackedA a, const float* b, int64_t ldb, int64_t depth) {
  for (; depth > 0; depth--, a.data += a.col, b += ldb) {
    vf x[VECS];
    FLASHATTN_UNROLL for (int v = 0; v < VECS; v++) x[v] = load<vf>(b + v * W);
    FLASHATTN_UNROLL for (int r = 0; r < ROWS; r++) {
      vf y = Dot::broadcast(a.data + r * a.row);
      FLASHATTN_UNROLL for (int v = 0; v < VECS; v++) c.at[r][v] = Dot::multiply_add(y, x[v], c.at[r][v]);
    }
  }
}

// A product A B over `depth` lanes of K; without lanes it is 0, and its operands are not read.
struct Product {
  PackedA a;
  PackedB b;
  int64_t depth;
};

template <class Dot, int ROWS, int VECS, class Epilogue, class... Products>
FLASHATTN_INLINE void microkernel(int64_t row, int64_t col, Epilogue epilogue, const Products&... products) {
  Accumulators<ROWS, VECS> c = {};
  (add_product<Dot>(c, {products.a.data + row * products.a.row, products.a.row, products.a.col}, products.b.data + col,
                    products.b.ld, products.depth),
   ...);
  epilogue(c, row, col);
}

// Columns of C beginning at col, VECS vectors of them, for all rows.
template <class Dot, int VECS, class Epilogue, class... Products>
static void panel(int64_t rows, int64_t col, Epilogue epilogue, Products... products) {
  int64_t row = 0;
  for (; rows - row >= MR && rows - row != 8; row += MR)  // 8 rows are faster as 4 + 4 than as 6 + 2
    microkernel<Dot, MR, VECS>(row, col, epilogue, products...);
  for (; rows - row >= 4; row += 4) microkernel<Dot, 4, VECS>(row, col, epilogue, products...);
  for (; rows - row >= 2; row += 2) microkernel<Dot, 2, VECS>(row, col, epilogue, products...);
  if (row < rows) microkernel<Dot, 1, VECS>(row, col, epilogue, products...);
}

// C = the sum of products, for `cols` columns, a multiple of W. The epilogue gets C tile by tile, in registers:
// epilogue(accumulators, row, col).
template <class Dot, class Epilogue, class... Products>
static void matmul_sum(int64_t rows, int64_t cols, Epilogue epilogue, Products... products) {
  int64_t col = 0;
  for (; cols - col >= NR; col += NR)  // outermost: one panel of B stays in the first-level cache
    panel<Dot, NR_VECS>(rows, col, epilogue, products...);
  if constexpr (NR_VECS > 2)
    for (; cols - col >= 2 * W; col += 2 * W) panel<Dot, 2>(rows, col, epilogue, products...);
  if (col < cols) panel<Dot, 1>(rows, col, epilogue, products...);
}

// C = A B, for `depth` lanes along K.
template <class Dot, class Epilogue>
static void matmul(PackedA a, const float* b, int64_t ldb, int64_t rows, int64_t cols, int64_t depth,
                   Epilogue epilogue) {
  matmul_sum<Dot>(rows, cols, epilogue, Product{a, {b, ldb}, depth});
}

// Common epilogues. add_to adds after the sum over K: a sum of tile sums is more exact than one long sum.
static inline auto store_to(float* c, int64_t ldc) {
  return [=](auto& tile, int64_t row, int64_t col) {
    tile.for_each([=](int r, int v, vf x) { store(c + (row + r) * ldc + col + v * W, x); });
  };
}
static inline auto store_scaled_to(float* c, int64_t ldc, float scale) {
  return [=](auto& tile, int64_t row, int64_t col) {
    tile.for_each([=](int r, int v, vf x) { store(c + (row + r) * ldc + col + v * W, x * scale); });
  };
}
static inline auto add_to(float* c, int64_t ldc) {
  return [=](auto& tile, int64_t row, int64_t col) {
    tile.for_each([=](int r, int v, vf x) {
      float* at = c + (row + r) * ldc + col + v * W;
      store(at, load<vf>(at) + x);
    });
  };
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
