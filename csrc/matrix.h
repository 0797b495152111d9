// One head of a tensor as a (seq, dim) matrix, whose rows may be in the pages of a cache; and scratch memory.
#pragma once

#include "simd.h"

namespace flashattn {
namespace FLASHATTN_ISA {

struct Range {
  int64_t begin, end;
};

// Scratch memory, handed out from the front in whole cache lines.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* result = next;
    next += round_up(floats, 16);
    return result;
  }
};

// The (seq, dim) matrix of one head.
struct Matrix {
  char* data;
  Dtype dtype;
  int64_t stride, dim;  // in bytes, in elements
  char* row(int64_t i) const { return data + i * stride; }
};

static inline Matrix matrix(const Heads& x, Dtype dtype, int64_t dim, int64_t batch, int64_t head) {
  int64_t size = element_size(dtype);
  return {(char*)x.data + (batch * x.stride_batch + head * x.stride_head) * size, dtype, x.stride_seq * size, dim};
}

// A row of a tensor, or of a cache in pages.
static inline char* row_pointer(const Pages& pages, const Heads& x, Dtype dtype, int64_t batch, int64_t head,
                                int64_t row) {
  if (pages.table) {
    batch = pages.table[batch * pages.stride + row / pages.size];
    row %= pages.size;
  }
  return (char*)x.data + (batch * x.stride_batch + head * x.stride_head + row * x.stride_seq) * element_size(dtype);
}

// Rows of keys or values: in place, or copied from their pages to contiguous memory.
static inline Matrix gather_rows(const Attention& a, const Heads& x, int64_t dim, int64_t batch, int64_t head,
                                 Range rows, float* page_copy) {
  if (!a.pages.table) {
    Matrix m = matrix(x, a.dtype, dim, batch, head);
    m.data = m.row(rows.begin);
    return m;
  }
  int64_t bytes = dim * element_size(a.dtype);
  Matrix dense = {(char*)page_copy, a.dtype, bytes, dim};
  for (int64_t i = rows.begin; i < rows.end; i++)
    __builtin_memcpy(dense.row(i - rows.begin), row_pointer(a.pages, x, a.dtype, batch, head, i), bytes);
  return dense;
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
