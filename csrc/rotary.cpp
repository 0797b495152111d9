// Rotary position embedding, and the appending of keys and values to a cache. The twin of kernels/rotary.py.
//
// Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.
#include "kernels.h"
#include "matrix.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t TOKENS = 64;  // tokens of a tile

// y = x with its first 2 n elements rotated, in pairs (i, i + n) or (2 i, 2 i + 1).
static void rotate(const float* x, const float* cos, const float* sin, int64_t n, bool interleaved, float* y) {
  if (interleaved)
    for (int64_t i = 0; i < n; i++) {
      y[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
      y[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
    }
  else
    for (int64_t i = 0; i < n; i++) {
      y[i] = x[i] * cos[i] - x[i + n] * sin[i];
      y[i + n] = x[i + n] * cos[i] + x[i] * sin[i];
    }
}

int64_t rotary_tiles(const Rotary& r) { return (r.seq + TOKENS - 1) / TOKENS * r.heads * r.batch; }
size_t rotary_scratch(const Rotary& r) { return 2 * round_up(r.dim, W) + 2 * round_up(r.pairs, W); }

void rotary_tile(const Rotary& r, int64_t index, float* memory) {
  int64_t tiles = (r.seq + TOKENS - 1) / TOKENS, head = index / tiles % r.heads, batch = index / tiles / r.heads;
  int64_t begin = index % tiles * TOKENS, end = min(r.counts ? r.counts[batch] : r.seq, begin + TOKENS);
  int64_t table_size = element_size(r.table_dtype), bytes = r.dim * element_size(r.dtype);
  float *x = memory, *y = x + round_up(r.dim, W), *cos = y + round_up(r.dim, W), *sin = cos + round_up(r.pairs, W);
  for (int64_t token = begin; token < min(end, r.seq); token++) {
    int64_t position = r.starts[batch] + token;
    const char* from = row_pointer({}, r.x, r.dtype, batch, head, token);
    char* to = row_pointer(r.pages, r.to, r.dtype, batch, head, r.append ? position : token);
    if (r.pairs == 0) {
      __builtin_memcpy(to, from, bytes);
      continue;
    }
    load_floats(x, from, r.dtype, r.dim);
    load_floats(cos, r.cos + position * r.pairs * table_size, r.table_dtype, r.pairs);
    load_floats(sin, r.sin + position * r.pairs * table_size, r.table_dtype, r.pairs);
    rotate(x, cos, sin, r.pairs, r.interleaved, y);
    for (int64_t i = 2 * r.pairs; i < r.dim; i++) y[i] = x[i];
    store_floats(to, y, r.dtype, r.dim);
  }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
