// Matrices packed as operands of the matrix product (matmul.h), and results stored back.
#pragma once

#include "matmul.h"
#include "matrix.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t MAX_K_PER_LANE = 2;

// The 32-bit lanes that hold some elements along K.
template <class Dot>
static inline int64_t k_lanes(int64_t elements) {
  return (elements + Dot::K_PER_LANE - 1) / Dot::K_PER_LANE;
}

// W elements of a row from column c on as float32; 0 past its end.
static inline vf load_f32_at(const char* row, const Matrix& x, int64_t c) {
  if (c + W <= x.dim) {
    if (x.dtype == Dtype::float32) return load<vf>((const float*)row + c);
    return widen(load<vh>((const uint16_t*)row + c), x.dtype);
  }
  float tail[W] = {};  // possibly all of it: a row may be padded by more than a vector
  load_floats(tail, row + c * element_size(x.dtype), x.dtype, x.dim - c);
  return load<vf>(tail);
}

// W lanes along a row, from lane c on; 0 past its end.
template <class Dot>
static inline vf load_k_lanes(const char* row, const Matrix& x, int64_t c) {
  if constexpr (Dot::K_PER_LANE == 1) return load_f32_at(row, x, c);
  int64_t begin = c * 2;
  if (begin + 2 * W <= x.dim) return load<vf>((const uint16_t*)row + begin);
  uint16_t tail[2 * W] = {};
  for (int64_t i = begin; i < x.dim; i++) tail[i - begin] = ((const uint16_t*)row)[i];
  return load<vf>(tail);
}

// W 16-bit elements of a row as integers; 0 past its end.
static inline vu load_bits_at(const char* row, const Matrix& x, int64_t c) {
  const uint16_t* at = (const uint16_t*)row + c;
  if (c + W <= x.dim) return extend(load<vh>(at));
  vu bits = {};
  for (int64_t i = c; i < x.dim; i++) bits[i - c] = at[i - c];
  return bits;
}

// Rows with K along seq: out[k_lanes(rows)][round_up(dim, W)], as float32, or two rows interleaved in the lanes of one.
template <class Dot>
static inline void pack_along_rows(const Matrix& x, Range rows, float* out) {
  for (int64_t i = rows.begin; i < rows.end; i += Dot::K_PER_LANE) {
    int64_t c = 0;
    if constexpr (Dot::K_PER_LANE == 2) {
      const uint16_t *even = (const uint16_t*)x.row(i), *odd = (const uint16_t*)x.row(i + 1);
      for (; i + 1 < rows.end && c + 2 * W <= x.dim; c += 2 * W, out += 2 * W) Dot::interleave(even + c, odd + c, out);
    }
    for (; c < x.dim; c += W, out += W) {
      if constexpr (Dot::K_PER_LANE == 1) {
        store(out, load_f32_at(x.row(i), x, c));
      } else {
        vu pair = load_bits_at(x.row(i), x, c);
        if (i + 1 < rows.end) pair |= load_bits_at(x.row(i + 1), x, c) << 16;
        store(out, pair);
      }
    }
  }
}

// Rows as B of a product that sums along seq; in place where possible, like A below.
template <class Dot>
static PackedB pack_b_rows(const Matrix& x, Range rows, float* scratch) {
  if (Dot::K_PER_LANE == 1 && x.dtype == Dtype::float32 && x.dim % W == 0)
    return {(const float*)x.row(rows.begin), x.stride / 4};
  pack_along_rows<Dot>(x, rows, scratch);
  return {scratch, round_up(x.dim, W)};
}

// Rows as A of a product that sums along dim.
template <class Dot>
static PackedA pack_a_rows(const Matrix& x, Range rows, float* scratch) {
  if (Dot::K_PER_LANE == 2 ? x.dim % 2 == 0 : x.dtype == Dtype::float32) return {x.row(rows.begin), x.stride, 4};
  int64_t width = round_up(k_lanes<Dot>(x.dim), W);
  for (int64_t i = rows.begin; i < rows.end; i++)
    for (int64_t c = 0; c < width; c += W)
      store(scratch + (i - rows.begin) * width + c, load_k_lanes<Dot>(x.row(i), x, c));
  return {(const char*)scratch, width * 4, 4};
}

// The transpose of rows as A of a product that sums along seq.
template <class Dot>
static PackedA pack_a_transposed(const Matrix& x, Range rows, float* scratch) {
  if (Dot::K_PER_LANE == 1 && x.dtype == Dtype::float32) return {x.row(rows.begin), 4, x.stride};
  pack_along_rows<Dot>(x, rows, scratch);
  return {(const char*)scratch, 4, round_up(x.dim, W) * 4};
}

// The transpose of rows as B of a product that sums along dim: out[k_lanes(dim)][lanes]. Lanes past the rows are 0.
template <class Dot>
static inline void pack_b_transposed(const Matrix& x, Range rows, int64_t lanes, float* out) {
  int64_t depth = k_lanes<Dot>(x.dim);
  for (int64_t i = 0; i < lanes; i += W)
    for (int64_t c = 0; c < depth; c += W) {
      vf block[W];
      int64_t n = rows.end - rows.begin - i;
      FLASHATTN_UNROLL for (int64_t r = 0; r < W; r++) block[r] =
          r < n ? load_k_lanes<Dot>(x.row(rows.begin + i + r), x, c) : vf{};
      transpose(block);
      for (int64_t r = 0; r < min(W, depth - c); r++) store(out + (c + r) * lanes + i, block[r]);
    }
}

// Write in[dim][lanes] * factor[lane] as rows; a row at or past `valid` gets 0.
static inline void store_transposed(const Matrix& x, Range rows, int64_t valid, const float* in, int64_t lanes,
                                    const float* factor) {
  for (int64_t i = 0; i < rows.end - rows.begin; i += W)
    for (int64_t c = 0; c < x.dim; c += W) {
      vf block[W];
      int64_t n = min(W, x.dim - c);
      FLASHATTN_UNROLL for (int64_t r = 0; r < W; r++) block[r] =
          r < n ? load<vf>(in + (c + r) * lanes + i) * load<vf>(factor + i) : vf{};
      transpose(block);
      for (int64_t r = 0; r < min(W, rows.end - rows.begin - i); r++) {
        int64_t at = rows.begin + i + r;
        float elements[2 * W];  // W suffice, but the compiler does not see that n <= W
        store(elements, at < valid ? block[r] : vf{});
        store_floats(x.row(at) + c * element_size(x.dtype), elements, x.dtype, n);
      }
    }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
