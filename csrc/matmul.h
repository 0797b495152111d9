// The one matrix product all attention kernels are made of: C[M][N] (+)= A[M][K] B[K][N], float32.
// A has any row and column stride, so that a matrix and its transpose are the same call; N is a multiple of LANES.
#pragma once

#include "simd.h"

namespace flashattn {
namespace FLASHATTN_ISA {

struct Strided {
  const float* data;
  int64_t row, col;
};

// ROWS x LANES of C, all in registers: per k one load of 2 vectors of B, ROWS broadcasts of A, 2 * ROWS FMAs. What is
// added to comes in at the end: a sum of tile sums is more exact than one long sum.
template <int ROWS>
static inline void microkernel(float* c, int64_t ldc, Strided a, const float* b, int64_t ldb, int64_t k, bool add) {
  vf acc[ROWS][2] = {};
  for (int64_t i = 0; i < k; i++) {
    vf b0 = load<vf>(b + i * ldb), b1 = load<vf>(b + i * ldb + W);
    for (int r = 0; r < ROWS; r++) {
      vf x = broadcast(a.data[r * a.row + i * a.col]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < 2; n++) {
      float* at = c + r * ldc + n * W;
      store(at, add ? load<vf>(at) + acc[r][n] : acc[r][n]);
    }
}

// The microkernel of `rows` rows, for the last rows of a matrix.
template <int ROWS>
static inline void microkernel_of(
    int64_t rows, float* c, int64_t ldc, Strided a, const float* b, int64_t ldb, int64_t k, bool add) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      microkernel<ROWS>(c, ldc, a, b, ldb, k, add);
    else
      microkernel_of<ROWS - 1>(rows, c, ldc, a, b, ldb, k, add);
  }
}

static void matmul(float* c, int64_t ldc, Strided a, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
                   bool add) {
  for (int64_t col = 0; col < n; col += LANES) {  // outermost: one panel of B stays in the first-level cache
    for (int64_t row = 0; row < m; row += MICRO) {
      Strided rows = {a.data + row * a.row, a.row, a.col};
      microkernel_of<MICRO>(min(MICRO, m - row), c + row * ldc + col, ldc, rows, b + col, ldb, k, add);
    }
  }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
