// y = x W^T + bias for few rows of x, as a step of generation has them: as fast as W can be read.
#include "kernels.h"
#include "rows.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t OUTPUTS = 64;  // columns of y, rows of W, that a tile owns

// Numbers of a tile's rows of W that are padded to whole vectors.
static int64_t copied(const Linear& l) { return l.in % (2 * W) ? OUTPUTS * round_up(l.in, 2 * W) : 0; }

template <class Dot, Dtype DTYPE>
static void linear(const Linear& l, int64_t begin, Scratch scratch) {
  int64_t depth = round_up(l.in, 2 * W) / Dot::DEPTH, n = min(OUTPUTS, l.out - begin);
  float* x = scratch.take(ROWS_AT_ONCE * depth);
  float* y = scratch.take(ROWS_AT_ONCE * OUTPUTS);
  float* copy = scratch.take(copied(l));
  Matrix from = {(char*)l.x, DTYPE, l.in * element_size(DTYPE), l.in};
  Matrix to = {(char*)l.y, DTYPE, l.out * element_size(DTYPE), l.out};
  Matrix weight = {(char*)l.weight, DTYPE, l.stride * element_size(DTYPE), l.in};
  Matrix rows = whole_vectors(weight, {begin, begin + n}, copy);
  for (int64_t row = 0; row < l.rows; row += ROWS_AT_ONCE) {
    int64_t count = min(ROWS_AT_ONCE, l.rows - row);
    for (int64_t i = 0; i < ROWS_AT_ONCE * depth; i += W) {
      int64_t r = i / depth;
      store(x + i, r < count ? elements_along<Dot>(from.row(row + r), from, i - r * depth) : vf{});
    }
    if (count == 1)
      products<1, Dot, DTYPE>(x, depth, rows, n, 1, y, OUTPUTS, Nothing{});
    else
      products<ROWS_AT_ONCE, Dot, DTYPE>(x, depth, rows, n, 1, y, OUTPUTS, Nothing{});
    for (int64_t r = 0; r < count; r++) {
      for (int64_t j = 0; l.bias && j < n; j++) y[r * OUTPUTS + j] += l.bias[begin + j];
      store_floats(to.row(row + r) + begin * element_size(DTYPE), y + r * OUTPUTS, DTYPE, n);
    }
  }
}

int64_t linear_tiles(const Linear& l) { return (l.out + OUTPUTS - 1) / OUTPUTS; }

size_t linear_scratch(const Linear& l) {
  return ROWS_AT_ONCE * (round_up(l.in, 2 * W) + OUTPUTS) + copied(l) + 3 * 16;
}

void linear_tile(const Linear& l, int64_t tile, float* memory) {
  with_dot_and_dtype(l.dtype, [&](auto dot, auto dtype) {
    linear<decltype(dot), decltype(dtype)::value>(l, tile * OUTPUTS, {memory});
  });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
