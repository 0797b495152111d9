// Tiles of (batch, heads, seq, dim) tensors brought into the two forms the matrix product takes, and results put back.
// An element is what Dot multiplies: a float32 number, or a pair of bfloat16 that are neighbours along K.
#pragma once

#include "matmul.h"
#include "score.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t BLOCK_M = 64;          // queries of a tile
constexpr int64_t FORWARD_BLOCK_N = 96;  // elements along the keys of a tile
constexpr int64_t MAX_DEPTH = 2;         // numbers in an element

// Whether decode.cpp takes the call: more queries than these fill the lanes of forward.cpp, which does what is done to
// scores.
static inline bool is_decode(const Attention& a) {
  return a.seq_q <= 8 && !is_modified(a) && a.score.dropout.scale == 0;
}

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
  int64_t stride, dim;  // bytes, numbers
  char* row(int64_t i) const { return data + i * stride; }
};

static inline Matrix matrix(const Heads& x, Dtype dtype, int64_t dim, int64_t batch, int64_t head) {
  int64_t size = element_size(dtype);
  return {(char*)x.data + (batch * x.stride_batch + head * x.stride_head) * size, dtype, x.stride_seq * size, dim};
}

// A row of a tensor, which may be a cache in pages.
static inline char* row_of(const Pages& pages, const Heads& x, Dtype dtype, int64_t batch, int64_t head, int64_t row) {
  if (pages.table) {
    batch = pages.table[batch * pages.stride + row / pages.size];
    row %= pages.size;
  }
  return (char*)x.data + (batch * x.stride_batch + head * x.stride_head + row * x.stride_seq) * element_size(dtype);
}

template <class Dot>
static inline int64_t elements(int64_t numbers) {
  return (numbers + Dot::DEPTH - 1) / Dot::DEPTH;
}

// W numbers of a row from column c on as float32; 0 past its end.
static inline vf numbers_at(const char* row, const Matrix& x, int64_t c) {
  if (c + W <= x.dim) {
    if (x.dtype == Dtype::float32) return load<vf>((const float*)row + c);
    return widen(load<vh>((const uint16_t*)row + c), x.dtype);
  }
  float tail[W] = {};  // all of it past the end, where a row is padded to more than a vector
  load_floats(tail, row + c * element_size(x.dtype), x.dtype, x.dim - c);
  return load<vf>(tail);
}

// W elements along a row, from element c on.
template <class Dot>
static inline vf elements_along(const char* row, const Matrix& x, int64_t c) {
  if constexpr (Dot::DEPTH == 1) return numbers_at(row, x, c);
  int64_t begin = c * 2;
  if (begin + 2 * W <= x.dim) return load<vf>((const uint16_t*)row + begin);
  uint16_t tail[2 * W] = {};
  for (int64_t i = begin; i < x.dim; i++) tail[i - begin] = ((const uint16_t*)row)[i];
  return load<vf>(tail);
}

// W 16-bit numbers of a row as integers; 0 past its end.
static inline vu bits_at(const char* row, const Matrix& x, int64_t c) {
  const uint16_t* at = (const uint16_t*)row + c;
  if (c + W <= x.dim) return extend(load<vh>(at));
  vu bits = {};
  for (int64_t i = c; i < x.dim; i++) bits[i - c] = at[i - c];
  return bits;
}

// Element rows of K along seq, out[elements(n)][round_up(dim, W)]: numbers as float32, or rows interleaved in pairs.
template <class Dot>
static inline void pack_rows(const Matrix& x, Range rows, float* out) {
  for (int64_t i = rows.begin; i < rows.end; i += Dot::DEPTH) {
    int64_t c = 0;
    if constexpr (Dot::DEPTH == 2) {
      const uint16_t *even = (const uint16_t*)x.row(i), *odd = (const uint16_t*)x.row(i + 1);
      for (; i + 1 < rows.end && c + 2 * W <= x.dim; c += 2 * W, out += 2 * W) Dot::interleave(even + c, odd + c, out);
    }
    for (; c < x.dim; c += W, out += W) {
      if constexpr (Dot::DEPTH == 1) {
        store(out, numbers_at(x.row(i), x, c));
      } else {
        vu pair = bits_at(x.row(i), x, c);
        if (i + 1 < rows.end) pair |= bits_at(x.row(i + 1), x, c) << 16;
        store(out, pair);
      }
    }
  }
}

// A packed right side: b[elements][ld].
struct Right {
  const float* data;
  int64_t ld;
};

// Rows as the right side of a product that sums along seq: in place if they can be.
template <class Dot>
static Right right_rows(const Matrix& x, Range rows, float* scratch) {
  if (Dot::DEPTH == 1 && x.dtype == Dtype::float32 && x.dim % W == 0)
    return {(const float*)x.row(rows.begin), x.stride / 4};
  pack_rows<Dot>(x, rows, scratch);
  return {scratch, round_up(x.dim, W)};
}

// Rows as the left side of a product that sums along dim.
template <class Dot>
static Left left_rows(const Matrix& x, Range rows, float* scratch) {
  if (Dot::DEPTH == 2 ? x.dim % 2 == 0 : x.dtype == Dtype::float32) return {x.row(rows.begin), x.stride, 4};
  int64_t width = round_up(elements<Dot>(x.dim), W);
  for (int64_t i = rows.begin; i < rows.end; i++)
    for (int64_t c = 0; c < width; c += W)
      store(scratch + (i - rows.begin) * width + c, elements_along<Dot>(x.row(i), x, c));
  return {(const char*)scratch, width * 4, 4};
}

// The transpose of rows as the left side of a product that sums along seq.
template <class Dot>
static Left left_columns(const Matrix& x, Range rows, float* scratch) {
  if (Dot::DEPTH == 1 && x.dtype == Dtype::float32) return {x.row(rows.begin), 4, x.stride};
  pack_rows<Dot>(x, rows, scratch);
  return {(const char*)scratch, 4, round_up(x.dim, W) * 4};
}

// The transpose of rows as the right side of a product that sums along dim: out[elements(dim)][lanes]. Lanes past the
// rows are 0.
template <class Dot>
static inline void pack_transposed(const Matrix& x, Range rows, int64_t lanes, float* out) {
  int64_t depth = elements<Dot>(x.dim);
  for (int64_t i = 0; i < lanes; i += W)
    for (int64_t c = 0; c < depth; c += W) {
      vf block[W];
      int64_t n = rows.end - rows.begin - i;
      UNROLL for (int64_t r = 0; r < W; r++)
        block[r] = r < n ? elements_along<Dot>(x.row(rows.begin + i + r), x, c) : vf{};
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
      UNROLL for (int64_t r = 0; r < W; r++)
        block[r] = r < n ? load<vf>(in + (c + r) * lanes + i) * load<vf>(factor + i) : vf{};
      transpose(block);
      for (int64_t r = 0; r < min(W, rows.end - rows.begin - i); r++) {
        int64_t at = rows.begin + i + r;
        float numbers[2 * W];  // the compiler does not see that n is at most W
        store(numbers, at < valid ? block[r] : vf{});
        store_floats(x.row(at) + c * element_size(x.dtype), numbers, x.dtype, n);
      }
    }
}

// Let a row's sink join its sum: m and l become those with the sink. Returns the factor of what was summed.
static inline float join_sink(float sink, float& m, float& l) {
  if (l == 0) return 1;  // nothing to attend to
  float with = sink > m ? sink : m, factor = __builtin_expf(m - with);
  l = l * factor + __builtin_expf(sink - with);
  m = with;
  return factor;
}

// The logarithm of a row's sum, exp(m) l, and what rounding took from it: beside scores of thousands a weight
// exp(s - lse) would be off by 1e-3, beside -1e9 by any factor, and the weights would not sum to one.
static inline void store_lse(const Attention& a, int64_t at, float m, float l) {
  double log = __builtin_log((double)l);
  float lse = l == 0 ? -__builtin_inff() : (float)(m + log);
  a.lse[at] = lse;
  if (a.rest) a.rest[at] = l == 0 ? 0 : (float)(log - ((double)lse - m));
}

// Which queries of which head a tile owns.
struct Tile {
  int64_t batch, head;
  Range rows;
};

// Tiles of queries are numbered head after head. Packed sequences share out the slots of a head: batch row b has those
// from q_starts[b] / BLOCK_M + b on, which is room enough, and the last of them may stay empty.
static inline int64_t slots_of_head(const Attention& a) {
  return a.packing.q_starts ? a.packing.total_q / BLOCK_M + a.batch : (a.seq_q + BLOCK_M - 1) / BLOCK_M;
}
static inline int64_t first_slot(const Attention& a, int64_t batch) {
  return a.packing.q_starts ? a.packing.q_starts[batch] / BLOCK_M + batch : 0;
}
static inline int64_t query_slots(const Attention& a) {
  return slots_of_head(a) * a.heads * (a.packing.q_starts ? 1 : a.batch);
}
static inline int64_t query_slot(const Attention& a, int64_t batch, int64_t head, int64_t query) {
  int64_t heads_before = a.packing.q_starts ? head : batch * a.heads + head;
  return heads_before * slots_of_head(a) + first_slot(a, batch) + query / BLOCK_M;
}

// The tile of a slot; without rows where it is empty. The last tiles of a sequence come first: under a causal mask they
// are the longest, and threads shall end together.
static inline Tile query_tile(const Attention& a, int64_t slot) {
  int64_t slots = slots_of_head(a), head = slot / slots, tile = slot % slots;
  if (!a.packing.q_starts) {
    tile = (slots - 1 - tile) * BLOCK_M;
    return {head / a.heads, head % a.heads, {tile, min(a.seq_q, tile + BLOCK_M)}};
  }
  int64_t batch = 0;  // the last whose first slot is not behind this one
  for (int64_t step = a.batch; step > 0; step /= 2)
    while (batch + step < a.batch && first_slot(a, batch + step) <= tile) batch += step;
  int64_t seq_q = a.packing.q_starts[batch + 1] - a.packing.q_starts[batch];
  tile = ((seq_q + BLOCK_M - 1) / BLOCK_M - 1 - (tile - first_slot(a, batch))) * BLOCK_M;
  if (tile < 0) return {batch, head, {0, 0}};
  return {batch, head, {tile, min(seq_q, tile + BLOCK_M)}};
}

// Rows of keys or values where they are, or, of pages, copied one behind the other.
static inline Matrix dense_rows(const Attention& a, const Heads& x, int64_t dim, int64_t batch, int64_t head,
                                Range rows, float* copy) {
  if (!a.pages.table) {
    Matrix m = matrix(x, a.dtype, dim, batch, head);
    m.data = m.row(rows.begin);
    return m;
  }
  int64_t bytes = dim * element_size(a.dtype);
  Matrix dense = {(char*)copy, a.dtype, bytes, dim};
  for (int64_t i = rows.begin; i < rows.end; i++)
    __builtin_memcpy(dense.row(i - rows.begin), row_of(a.pages, x, a.dtype, batch, head, i), bytes);
  return dense;
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
