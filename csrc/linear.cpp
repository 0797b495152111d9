// y = x W^T + bias for few rows of x, as in a decode step: as fast as W can be read.
#include "gemv.h"
#include "kernels.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t OUTPUTS = 64;  // columns of y, rows of W, that a tile owns

// Floats for the rows of W that have to be padded to whole vectors.
static int64_t padded_floats(const Linear& l) { return l.in % (2 * W) ? OUTPUTS * round_up(l.in, 2 * W) : 0; }

template <class Dot, Dtype DTYPE>
static void linear(const Linear& l, int64_t begin, Scratch scratch) {
  int64_t depth = round_up(l.in, 2 * W) / Dot::K_PER_LANE, n = min(OUTPUTS, l.out - begin);
  float* x = scratch.take(GEMV_ROWS * depth);
  float* y = scratch.take(GEMV_ROWS * OUTPUTS);
  float* padded = scratch.take(padded_floats(l));
  Matrix from = {(char*)l.x, DTYPE, l.in * element_size(DTYPE), l.in};
  Matrix to = {(char*)l.y, DTYPE, l.out * element_size(DTYPE), l.out};
  Matrix weight = {(char*)l.weight, DTYPE, l.stride * element_size(DTYPE), l.in};
  Matrix rows = pad_rows_to_vectors(weight, {begin, begin + n}, padded);
  for (int64_t row = 0; row < l.rows; row += GEMV_ROWS) {
    int64_t count = min(GEMV_ROWS, l.rows - row);
    for (int64_t i = 0; i < GEMV_ROWS * depth; i += W) {
      int64_t r = i / depth;
      store(x + i, r < count ? load_k_lanes<Dot>(from.row(row + r), from, i - r * depth) : vf{});
    }
    if (count == 1)
      gemv<1, Dot, DTYPE>(x, depth, rows, n, 1, y, OUTPUTS, NoPrefetch{});
    else
      gemv<GEMV_ROWS, Dot, DTYPE>(x, depth, rows, n, 1, y, OUTPUTS, NoPrefetch{});
    for (int64_t r = 0; r < count; r++) {
      for (int64_t j = 0; l.bias && j < n; j++) y[r * OUTPUTS + j] += l.bias[begin + j];
      store_floats(to.row(row + r) + begin * element_size(DTYPE), y + r * OUTPUTS, DTYPE, n);
    }
  }
}

int64_t linear_tiles(const Linear& l) { return (l.out + OUTPUTS - 1) / OUTPUTS; }

size_t linear_scratch(const Linear& l) {
  return GEMV_ROWS * (round_up(l.in, 2 * W) + OUTPUTS) + padded_floats(l) + 3 * 16;
}

void linear_tile(const Linear& l, int64_t tile, float* memory) {
  with_dot_and_dtype(l.dtype, [&](auto dot, auto dtype) {
    linear<decltype(dot), decltype(dtype)::value>(l, tile * OUTPUTS, {memory});
  });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
