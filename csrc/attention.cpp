// Attention, forward and backward. Queries lie along the vector lanes: with scores as S[key][query], the maximum, the
// exponential and the sum of a softmax are plain vector operations, and a tail of keys needs no mask.
//
//   forward      S = K Q^T,  P = 2^(S - m),  O^T = alpha O^T + V^T P
//   backward q   dP = V dO^T,  dS = P (dP - delta),  dQ^T += K^T dS
//   backward kv  dV += P dO,  dK += dS Q
//
// Dao, "FlashAttention-2" (2023), arXiv:2307.08691. The mathematics of the backward is in kernels/backward.py.
#include "kernels.h"
#include "matmul.h"
#include "score.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t BLOCK_M = 64;  // queries, a multiple of LANES
constexpr int64_t BLOCK_N = 96;  // keys, a multiple of MICRO

// Scratch memory, handed out from the front.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* result = next;
    next += floats;
    return result;
  }
};

static const char* row(const Heads& x, Dtype dtype, int64_t batch, int64_t head, int64_t i) {
  return (const char*)x.data +
         (batch * x.stride_batch + head * x.stride_head + i * x.stride_seq) * element_size(dtype);
}

// Rows begin .. end of a tensor as float32 with strides: in place if that is what they are, else converted.
static Strided load_rows(const Attention& a, const Heads& x, int64_t batch, int64_t head, Range rows, int64_t dim,
                         float* scratch) {
  if (a.dtype == Dtype::float32) return {(const float*)row(x, a.dtype, batch, head, rows.begin), x.stride_seq, 1};
  int64_t width = round_up(dim, W);
  for (int64_t i = rows.begin; i < rows.end; i++)
    load_floats(scratch + (i - rows.begin) * width, row(x, a.dtype, batch, head, i), a.dtype, dim);
  return {scratch, width, 1};
}

// The same, always copied to width columns and padded with zero rows, for use as the right side of a product.
static void pack_rows(const Attention& a, const Heads& x, int64_t batch, int64_t head, Range rows, int64_t dim,
                      int64_t width, int64_t padded_rows, float* out) {
  for (int64_t i = 0; i < padded_rows; i++) {
    float* dst = out + i * width;
    int64_t n = 0;
    if (rows.begin + i < rows.end) {
      load_floats(dst, row(x, a.dtype, batch, head, rows.begin + i), a.dtype, dim);
      n = round_up(dim, W);
    }
    for (; n < width; n++) dst[n] = 0;
  }
}

// out[dim][lanes] = transpose of in[lanes][width] * factor.
static void transpose(const float* in, int64_t width, int64_t dim, int64_t lanes, float factor, float* out) {
  for (int64_t i0 = 0; i0 < lanes; i0 += W)
    for (int64_t d = 0; d < dim; d++) {
      vf v;
      for (int i = 0; i < W; i++) v[i] = in[(i0 + i) * width + d];
      store(out + d * lanes + i0, v * factor);
    }
}

// Write in[dim][lanes] * factor[lane] as rows of a tensor; a query past `valid` gets 0.
static void store_transposed(const Attention& a, const Heads& x, int64_t batch, int64_t head, Range rows, int64_t dim,
                             const float* in, int64_t lanes, const float* factor, int64_t valid, float* scratch) {
  for (int64_t i = rows.begin; i < rows.end; i++) {
    int64_t lane = i - rows.begin;
    for (int64_t d = 0; d < dim; d++) scratch[d] = i < valid ? in[d * lanes + lane] * factor[lane] : 0;
    store_floats((void*)row(x, a.dtype, batch, head, i), scratch, a.dtype, dim);
  }
}

// Which queries (or keys) tile number `index` owns: tiles of one head follow each other, the longest first.
struct Tile {
  int64_t batch, head;
  Range rows;
};
static Tile tile_at(int64_t index, int64_t seq, int64_t heads, int64_t block, bool last_first) {
  int64_t tiles = (seq + block - 1) / block;
  int64_t tile = last_first ? tiles - 1 - index % tiles : index % tiles;
  return {index / tiles / heads, index / tiles % heads, {tile * block, min(seq, (tile + 1) * block)}};
}

// exp(s - lse) of base-2 scores S[rows][lanes] in place; lse is natural, one number a lane. Its product with log2(e) is
// left to a fused multiply-add: rounded on its own it would cost as much accuracy as lse itself has.
static void softmax_weights(float* s, int64_t rows, int64_t lanes, const float* lse) {
  for (int64_t i = 0; i < lanes; i += W) {
    vf shift = load<vf>(lse + i);
    for (int64_t j = 0; j < rows; j++) store(s + j * lanes + i, exp2(load<vf>(s + j * lanes + i) - shift * LOG2E));
  }
}

// ------------------------------------------------------------------------------------------------ forward

int64_t forward_tiles(const Attention& a) { return (a.seq_q + BLOCK_M - 1) / BLOCK_M * a.heads * a.batch; }

size_t forward_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, LANES), dv = round_up(a.head_dim_v, LANES);
  return BLOCK_M * (2 * d + dv) + BLOCK_N * (BLOCK_M + d + dv) + 4 * BLOCK_M + dv;
}

// The running softmax of a tile of queries, one number a lane.
struct Softmax {
  float *m, *l, *alpha;
};

// Fold scores S[n][lanes] into the softmax and turn them into weights. Returns whether any lane must be rescaled.
static bool online_softmax(float* s, int64_t n, int64_t lanes, Softmax softmax) {
  bool rescale = false;
  for (int64_t i = 0; i < lanes; i += W) {
    vf m = load<vf>(softmax.m + i), m_new = m;
    for (int64_t j = 0; j < n; j++) m_new = max(m_new, load<vf>(s + j * lanes + i));
    vf shift = m_new == -__builtin_inff() ? vf{} : m_new;  // no key yet: weights 0, not NaN
    vf alpha = exp2(m - shift), l[4] = {};  // four short sums are more exact than one long one
    for (int64_t j = 0; j < n; j++) {
      vf p = exp2(load<vf>(s + j * lanes + i) - shift);
      store(s + j * lanes + i, p);
      l[j % 4] += p;
    }
    store(softmax.m + i, m_new);
    store(softmax.l + i, load<vf>(softmax.l + i) * alpha + ((l[0] + l[1]) + (l[2] + l[3])));
    store(softmax.alpha + i, alpha);
    vi changed = alpha != 1.0f;
    for (int lane = 0; lane < W; lane++) rescale |= changed[lane] != 0;
  }
  return rescale;
}

void forward_tile(const Attention& a, int64_t index, float* memory) {
  Tile tile = tile_at(index, a.seq_q, a.heads, BLOCK_M, a.score.has_right);
  int64_t kv_head = tile.head / (a.heads / a.kv_heads);
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, LANES);
  int64_t d = round_up(a.head_dim, LANES), dv = round_up(a.head_dim_v, LANES);
  Scratch scratch = {memory};
  float* q_rows = scratch.take(BLOCK_M * d);
  float* q_t = scratch.take(d * BLOCK_M);
  float* out_t = scratch.take(dv * BLOCK_M);
  float* s = scratch.take(BLOCK_N * BLOCK_M);
  float* k_rows = scratch.take(BLOCK_N * d);
  float* v_rows = scratch.take(BLOCK_N * dv);
  Softmax softmax = {scratch.take(BLOCK_M), scratch.take(BLOCK_M), scratch.take(BLOCK_M)};
  float* inverse = scratch.take(BLOCK_M);
  float* out_row = scratch.take(dv);

  Range valid = {tile.rows.begin, min(tile.rows.end, query_end(a, tile.batch))};
  pack_rows(a, a.q, tile.batch, tile.head, valid, a.head_dim, d, lanes, q_rows);
  transpose(q_rows, d, a.head_dim, lanes, a.score.scale * LOG2E, q_t);
  for (int64_t i = 0; i < a.head_dim_v * lanes; i++) out_t[i] = 0;
  for (int64_t i = 0; i < lanes; i++) softmax.m[i] = -__builtin_inff(), softmax.l[i] = 0;

  Range all = visible_keys(a, tile.rows, tile.batch);
  for (int64_t start = all.begin; start < all.end; start += BLOCK_N) {
    Range keys = {start, min(all.end, start + BLOCK_N)};
    int64_t n = keys.end - keys.begin;
    Strided k = load_rows(a, a.k, tile.batch, kv_head, keys, a.head_dim, k_rows);
    matmul(s, lanes, k, q_t, lanes, n, lanes, a.head_dim, false);
    if (is_edge(a, tile.rows, keys)) mask(a, s, lanes, tile.rows, keys, -__builtin_inff());
    if (online_softmax(s, n, lanes, softmax))
      for (int64_t r = 0; r < a.head_dim_v; r++)
        for (int64_t i = 0; i < lanes; i += W)
          store(out_t + r * lanes + i, load<vf>(out_t + r * lanes + i) * load<vf>(softmax.alpha + i));
    Strided v = load_rows(a, a.v, tile.batch, kv_head, keys, a.head_dim_v, v_rows);
    Strided v_t = {v.data, v.col, v.row};
    matmul(out_t, lanes, v_t, s, lanes, a.head_dim_v, lanes, n, true);
  }

  float* lse = a.lse + (tile.batch * a.heads + tile.head) * a.seq_q + tile.rows.begin;
  for (int64_t i = 0; i < tile.rows.end - tile.rows.begin; i++) {
    float l = tile.rows.begin + i < valid.end ? softmax.l[i] : 0;
    inverse[i] = l > 0 || l != l ? 1 / l : 0;
    lse[i] = l == 0 ? -__builtin_inff() : softmax.m[i] * LN2 + __builtin_logf(l);
  }
  store_transposed(a, a.out, tile.batch, tile.head, tile.rows, a.head_dim_v, out_t, lanes, inverse, valid.end,
                   out_row);
}

// ------------------------------------------------------------------------------------------------ backward

// A tile of queries as the backward passes use it: q and grad_out, as rows and transposed, lse, delta.
struct Queries {
  float *q, *q_t, *grad, *grad_t, *lse, *delta;
  int64_t lanes;
};

static int64_t queries_floats(int64_t d, int64_t dv) { return 2 * BLOCK_M * (d + dv) + 2 * BLOCK_M; }

static Queries load_queries(const Attention& a, int64_t batch, int64_t head, Range rows, int64_t d, int64_t dv,
                            Scratch& scratch) {
  Queries x = {scratch.take(BLOCK_M * d),  scratch.take(BLOCK_M * d), scratch.take(BLOCK_M * dv),
               scratch.take(BLOCK_M * dv), scratch.take(BLOCK_M),     scratch.take(BLOCK_M),
               round_up(rows.end - rows.begin, LANES)};
  Range valid = {rows.begin, min(rows.end, query_end(a, batch))};
  pack_rows(a, a.q, batch, head, valid, a.head_dim, d, x.lanes, x.q);
  pack_rows(a, a.grad_out, batch, head, valid, a.head_dim_v, dv, x.lanes, x.grad);
  transpose(x.q, d, a.head_dim, x.lanes, a.score.scale * LOG2E, x.q_t);
  transpose(x.grad, dv, a.head_dim_v, x.lanes, 1, x.grad_t);
  const float* lse = a.lse + (batch * a.heads + head) * a.seq_q;
  for (int64_t i = 0; i < x.lanes; i++) {
    bool attends = rows.begin + i < valid.end && lse[rows.begin + i] != -__builtin_inff();
    x.lse[i] = attends ? lse[rows.begin + i] : __builtin_inff();  // exp(s - inf) = 0
  }
  return x;
}

// P and dS of one tile, [key][query].
static void weights_and_gradients(const Attention& a, Strided k, Strided v, const Queries& x, Range queries,
                                  Range keys, float* p, float* ds) {
  int64_t n = keys.end - keys.begin;
  matmul(p, x.lanes, k, x.q_t, x.lanes, n, x.lanes, a.head_dim, false);
  softmax_weights(p, n, x.lanes, x.lse);
  if (is_edge(a, queries, keys)) mask(a, p, x.lanes, queries, keys, 0);
  matmul(ds, x.lanes, v, x.grad_t, x.lanes, n, x.lanes, a.head_dim_v, false);
  for (int64_t i = 0; i < x.lanes; i += W) {
    vf delta = load<vf>(x.delta + i);
    for (int64_t j = 0; j < n; j++) {
      float* at = ds + j * x.lanes + i;
      store(at, load<vf>(p + j * x.lanes + i) * (load<vf>(at) - delta));
    }
  }
}

// delta = rowsum(grad_out * out) - grad_lse, for the queries of one tile. Summed in the order the microkernel sums
// grad_out v, so that where one key has all the weight, and out is v, the two cancel exactly.
static void write_delta(const Attention& a, int64_t batch, int64_t head, Range rows, const Queries& x, float* out,
                        float* out_t, int64_t dv) {
  pack_rows(a, a.out, batch, head, rows, a.head_dim_v, dv, x.lanes, out);
  transpose(out, dv, a.head_dim_v, x.lanes, 1, out_t);
  for (int64_t i = 0; i < x.lanes; i += W) {
    vf total = {};
    for (int64_t d = 0; d < a.head_dim_v; d++)
      total += load<vf>(out_t + d * x.lanes + i) * load<vf>(x.grad_t + d * x.lanes + i);
    store(x.delta + i, total);
  }
  int64_t at = (batch * a.heads + head) * a.seq_q + rows.begin;
  for (int64_t i = 0; i < rows.end - rows.begin; i++) {
    if (a.grad_lse) x.delta[i] -= a.grad_lse[at + i];
    a.delta[at + i] = x.delta[i];
  }
}

static void read_delta(const Attention& a, int64_t batch, int64_t head, Range rows, const Queries& x) {
  const float* delta = a.delta + (batch * a.heads + head) * a.seq_q;
  for (int64_t i = 0; i < x.lanes; i++) x.delta[i] = rows.begin + i < rows.end ? delta[rows.begin + i] : 0;
}

int64_t backward_q_tiles(const Attention& a) { return forward_tiles(a); }

size_t backward_q_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, LANES), dv = round_up(a.head_dim_v, LANES);
  return queries_floats(d, dv) + BLOCK_M * (d + 2 * dv) + BLOCK_N * (2 * BLOCK_M + d + dv) + BLOCK_M + d;
}

void backward_q_tile(const Attention& a, int64_t index, float* memory) {
  Tile tile = tile_at(index, a.seq_q, a.heads, BLOCK_M, a.score.has_right);
  int64_t kv_head = tile.head / (a.heads / a.kv_heads);
  int64_t d = round_up(a.head_dim, LANES), dv = round_up(a.head_dim_v, LANES);
  Scratch scratch = {memory};
  float* grad_t = scratch.take(d * BLOCK_M);
  float* p = scratch.take(BLOCK_N * BLOCK_M);
  float* ds = scratch.take(BLOCK_N * BLOCK_M);
  float* k_rows = scratch.take(BLOCK_N * d);
  float* v_rows = scratch.take(BLOCK_N * dv);
  float* factor = scratch.take(BLOCK_M);
  float* grad_row = scratch.take(d);

  float* out = scratch.take(BLOCK_M * dv);
  float* out_t = scratch.take(BLOCK_M * dv);

  Queries x = load_queries(a, tile.batch, tile.head, tile.rows, d, dv, scratch);
  write_delta(a, tile.batch, tile.head, tile.rows, x, out, out_t, dv);
  for (int64_t i = 0; i < a.head_dim * x.lanes; i++) grad_t[i] = 0;
  for (int64_t i = 0; i < x.lanes; i++) factor[i] = a.score.scale;

  Range all = visible_keys(a, tile.rows, tile.batch);
  for (int64_t start = all.begin; start < all.end; start += BLOCK_N) {
    Range keys = {start, min(all.end, start + BLOCK_N)};
    Strided k = load_rows(a, a.k, tile.batch, kv_head, keys, a.head_dim, k_rows);
    Strided v = load_rows(a, a.v, tile.batch, kv_head, keys, a.head_dim_v, v_rows);
    weights_and_gradients(a, k, v, x, tile.rows, keys, p, ds);
    Strided k_t = {k.data, k.col, k.row};
    matmul(grad_t, x.lanes, k_t, ds, x.lanes, a.head_dim, x.lanes, keys.end - keys.begin, true);
  }
  store_transposed(a, a.grad_q, tile.batch, tile.head, tile.rows, a.head_dim, grad_t, x.lanes, factor,
                   query_end(a, tile.batch), grad_row);
}

int64_t backward_kv_tiles(const Attention& a) { return (a.seq_k + BLOCK_N - 1) / BLOCK_N * a.kv_heads * a.batch; }

size_t backward_kv_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, LANES), dv = round_up(a.head_dim_v, LANES);
  return queries_floats(d, dv) + BLOCK_N * (2 * BLOCK_M + 2 * d + 2 * dv);
}

void backward_kv_tile(const Attention& a, int64_t index, float* memory) {
  Tile tile = tile_at(index, a.seq_k, a.kv_heads, BLOCK_N, false);
  int64_t d = round_up(a.head_dim, LANES), dv = round_up(a.head_dim_v, LANES);
  Scratch scratch = {memory};
  float* p = scratch.take(BLOCK_N * BLOCK_M);
  float* ds = scratch.take(BLOCK_N * BLOCK_M);
  float* k_rows = scratch.take(BLOCK_N * d);
  float* v_rows = scratch.take(BLOCK_N * dv);
  float* grad_k = scratch.take(BLOCK_N * d);
  float* grad_v = scratch.take(BLOCK_N * dv);
  for (int64_t i = 0; i < BLOCK_N * d; i++) grad_k[i] = 0;
  for (int64_t i = 0; i < BLOCK_N * dv; i++) grad_v[i] = 0;

  // Keys past the length are not read, and keep a gradient of 0.
  Range keys = {tile.rows.begin, min(tile.rows.end, key_end(a, tile.batch))};
  int64_t n = max(0, keys.end - keys.begin);
  Strided k = {}, v = {};
  if (n > 0) {
    k = load_rows(a, a.k, tile.batch, tile.head, keys, a.head_dim, k_rows);
    v = load_rows(a, a.v, tile.batch, tile.head, keys, a.head_dim_v, v_rows);
  }
  Range all = n > 0 ? visible_queries(a, keys, tile.batch) : Range{0, 0};
  int64_t group = a.heads / a.kv_heads;
  for (int64_t head = tile.head * group; head < (tile.head + 1) * group; head++)
    for (int64_t start = all.begin / BLOCK_M * BLOCK_M; start < all.end; start += BLOCK_M) {
      Range queries = {start, min(all.end, start + BLOCK_M)};
      Scratch rest = scratch;
      Queries x = load_queries(a, tile.batch, head, queries, d, dv, rest);
      read_delta(a, tile.batch, head, queries, x);
      weights_and_gradients(a, k, v, x, queries, keys, p, ds);
      matmul(grad_v, dv, {p, x.lanes, 1}, x.grad, dv, n, dv, x.lanes, true);
      matmul(grad_k, d, {ds, x.lanes, 1}, x.q, d, n, d, x.lanes, true);
    }
  for (int64_t j = tile.rows.begin; j < tile.rows.end; j++) {
    float* gk = grad_k + (j - tile.rows.begin) * d;
    for (int64_t c = 0; c < d; c++) gk[c] *= a.score.scale;
    store_floats((void*)row(a.grad_k, a.dtype, tile.batch, tile.head, j), gk, a.dtype, a.head_dim);
    store_floats((void*)row(a.grad_v, a.dtype, tile.batch, tile.head, j), grad_v + (j - tile.rows.begin) * dv, a.dtype,
                 a.head_dim_v);
  }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
