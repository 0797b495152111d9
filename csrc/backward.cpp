// Attention backward, with queries along the vector lanes as in forward.cpp:
//
//   P = exp(K Q^T - lse),  dP = V dO^T,  dS = P (dP - delta)
//   dV += P dO,  dK += dS Q,  dQ^T += K^T dS
//
// Dropout applies to P in dV and to dP; with a softcap, dS is multiplied by its derivative.
//
// Three passes, and one more for the gradient of a bias. The first computes delta. In the second a task owns some
// sections of the keys of one key/value head: for each section it visits once all queries of the group that attend to
// it, so S and dP are computed once, and sums dQ in its own buffer. The third adds the buffers of the tasks, in order.
// There are no atomics, and the order of additions does not depend on the number of threads.
//
// Dao, "FlashAttention-2" (2023), arXiv:2307.08691. See kernels/backward.py for the math.
#include "backward_passes.h"
#include "kernels.h"

namespace flashattn {
namespace FLASHATTN_ISA {

size_t backward_workspace(const Attention& a) {
  return stats_floats(a) + key_sections(a).parts * query_slots(a) * a.head_dim * BLOCK_M;
}

// ------------------------------------------------------------------------------------------------ delta and lse

// decode.cpp sums the products q.k in another order. Recompute lse from products in the order of the passes below, so
// that the weights sum to one.
template <class Dot>
static void recompute_lse(const Attention& a, const Tile& tile, const RowStats& stats, Scratch scratch) {
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W);
  Range rows = {tile.rows.begin, min(tile.rows.end, query_end(a, tile.batch))};
  float* q_t = scratch.take(k_lanes<Dot>(a.head_dim) * lanes);
  float* s = scratch.take(BLOCK_N * lanes);
  float* packed = scratch.take(BLOCK_N * round_up(a.head_dim, W));
  pack_b_transposed<Dot>(matrix(a.q, a.dtype, a.head_dim, tile.batch, tile.head), rows, lanes, q_t);
  Matrix k = matrix(a.k, a.dtype, a.head_dim, tile.batch, tile.head / (a.heads / a.kv_heads));
  float m[BLOCK_M], l[BLOCK_M];
  for (int64_t i = 0; i < lanes; i++) m[i] = NEG_INF, l[i] = 0;
  Range all = rows.begin < rows.end ? key_range(a, rows, tile.batch) : Range{0, 0};
  for (int64_t start = all.begin; start < all.end; start += BLOCK_N) {
    Range keys = {start, min(all.end, start + BLOCK_N)};
    int64_t n = keys.end - keys.begin;
    matmul<Dot>(pack_a_rows<Dot>(k, keys, packed), q_t, lanes, n, lanes, k_lanes<Dot>(a.head_dim), store_to(s, lanes));
    for (int64_t i = 0; i < lanes; i += W) {
      vf top = load<vf>(m + i), before = top, sum = {};
      for (int64_t j = 0; j < n; j++) {
        vf x = load<vf>(s + j * lanes + i) * a.score.scale;
        x = in_window(a, rows.begin + i, keys.begin + j) ? x : vf{} + NEG_INF;
        store(s + j * lanes + i, x);
        top = max(top, x);
      }
      vf row_max = top == NEG_INF ? vf{} : top;
      for (int64_t j = 0; j < n; j++) sum += exp2((load<vf>(s + j * lanes + i) - row_max) * LOG2E);
      store(l + i, load<vf>(l + i) * exp2((before - row_max) * LOG2E) + sum);
      store(m + i, top);
    }
  }
  Attention results = a;
  results.lse = stats.lse, results.rest = stats.rest;
  for (int64_t i = 0; i < tile.rows.end - tile.rows.begin; i++) {
    float sum = tile.rows.begin + i < rows.end ? l[i] : 0;
    if (a.score.sinks) add_sink(a.score.sinks[tile.head], m[i], sum);
    store_lse(results, tile.rows.begin + i, m[i], sum);
  }
}

// delta = rowsum(grad_out * out) - grad_lse, for the queries of one tile, summed in the order in which matmul sums
// grad_out v: if one key has all the weight, so that out is v, the two cancel exactly. With tangents also that of
// delta, rowsum(grad_out * tangent_out).
template <class Dot>
static void backward_delta(const Attention& a, const Tile& tile, Scratch scratch) {
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W), depth = k_lanes<Dot>(a.head_dim_v);
  float* grad_t = scratch.take(depth * lanes);
  float* out_t = scratch.take(depth * lanes);
  pack_b_transposed<Dot>(matrix(a.grad_out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, lanes, grad_t);
  auto sum_rows = [&](const Heads& out, const float* grad_lse, float* delta) {
    pack_b_transposed<Dot>(matrix(out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, lanes, out_t);
    for (int64_t i = 0; i < lanes; i += W) {
      vf total = {};
      for (int64_t d = 0; d < depth; d++)
        total = Dot::multiply_add(load<vf>(out_t + d * lanes + i), load<vf>(grad_t + d * lanes + i), total);
      int64_t query = tile.rows.begin + i;
      for (int64_t lane = 0; lane < min(W, tile.rows.end - query); lane++)
        delta[query + lane] = total[lane] - (grad_lse ? grad_lse[query + lane] : 0);
    }
  };
  const RowStats stats = row_stats(a, tile.batch, tile.head);
  const int64_t at = lse_offset(a, tile.batch, tile.head);
  sum_rows(a.out, a.grad_lse ? a.grad_lse + at : nullptr, stats.delta);
  if (has_tangents(a)) sum_rows(a.tangent.out, nullptr, stats.tangent_delta);
  if (is_decode(a)) return recompute_lse<Dot>(a, tile, stats, scratch);  // without score mods
  for (int64_t i = tile.rows.begin; i < tile.rows.end; i++) {
    stats.lse[i] = a.lse[at + i];
    stats.rest[i] = a.rest ? a.rest[at + i] : 0;
  }
}

int64_t backward_delta_tiles(const Attention& a) { return query_slots(a); }
size_t backward_delta_scratch(const Attention& a) {
  return 2 * a.head_dim_v * BLOCK_M + (a.head_dim + BLOCK_N) * BLOCK_M + BLOCK_N * round_up(a.head_dim, W) + 5 * 16;
}
void backward_delta_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  const Attention a = batch_row_view(all, tile.batch);
  with_dot(a.dtype, [&](auto dot) { backward_delta<decltype(dot)>(a, tile, {memory}); });
}

// ------------------------------------------------------------------------------------------------ a tile of scores

struct Backward {
  // P, and dP in place of dS.
  template <class Dot>
  static void compute_tile(const Attention& a, const Weights& w, const Queries& x, const Keys& keys) {
    int64_t n = keys.keys.end - keys.keys.begin;
    matmul<Dot>(keys.k, x.q_t, x.lanes, n, x.lanes, k_lanes<Dot>(a.head_dim), store_to(w.p, x.lanes));
    compute_weights<Dot>(a, w, x, keys.keys, [&](vf p, int64_t at, int64_t) {
      if (w.dropout) p *= load<vf>(w.dropout + at);
      if (Dot::K_PER_LANE == 2 || w.dropout) store_as_a<Dot>(w.p_a, at, p);
    });
    matmul<Dot>(keys.v, x.grad_t, x.lanes, n, x.lanes, k_lanes<Dot>(a.head_dim_v), store_to(w.ds, x.lanes));
  }

  // dS of W scores, before the derivative of the softcap.
  FLASHATTN_INLINE vf score_gradient(const Weights& w, const Queries& x, int64_t at, int64_t i) {
    vf dp = load<vf>(w.ds + at);
    if (w.dropout) dp *= load<vf>(w.dropout + at);
    return load<vf>(w.p + at) * (dp - load<vf>(x.delta + i));
  }

  template <class Dot>
  static void compute_score_gradients(const Weights& w, const Queries& x, int64_t n) {
    auto gradient = [&](int64_t j, int64_t i) {
      int64_t at = j * x.lanes + i;
      vf ds = score_gradient(w, x, at, i);
      if (w.softcap.first) ds *= load<vf>(w.softcap.first + at);
      store_as_a<Dot>(w.ds_a, at, ds);
      return ds;
    };
    for (int64_t j = 0; j < n; j += Dot::K_PER_LANE)
      for (int64_t i = 0; i < x.lanes; i += W) {
        vf even = gradient(j, i);
        if constexpr (Dot::K_PER_LANE == 2)
          store(w.ds_b + j / 2 * x.lanes + i, Dot::pack_pairs(even, j + 1 < n ? gradient(j + 1, i) : vf{}));
      }
  }

  template <class Dot>
  static void accumulate(const Attention& a, const Weights& w, const Queries& x, const Keys& keys, const Sums& sums) {
    int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), n = keys.keys.end - keys.keys.begin;
    int64_t queries = k_lanes<Dot>(x.rows.end - x.rows.begin), row = x.lanes * 4 / Dot::K_PER_LANE;
    compute_tile<Dot>(a, w, x, keys);
    compute_score_gradients<Dot>(w, x, n);
    matmul<Dot>(PackedA{(const char*)w.p_a, row, 4}, x.grad.data, x.grad.ld, n, dv, queries, add_to(sums.v, dv));
    matmul<Dot>(PackedA{(const char*)w.ds_a, row, 4}, x.q.data, x.q.ld, n, d, queries, add_to(sums.k, d));
    matmul<Dot>(keys.k_t, w.ds_b, x.lanes, a.head_dim, x.lanes, k_lanes<Dot>(n), add_to(sums.q_t, x.lanes));
  }
};

int64_t backward_tiles(const Attention& a) { return sections_tiles(a); }
size_t backward_scratch(const Attention& a) { return sections_scratch(a); }
void backward_tile(const Attention& a, int64_t index, float* memory) { sections_tile<Backward>(a, index, memory); }

int64_t backward_bias_tiles(const Attention& a) { return bias_tiles(a); }
size_t backward_bias_scratch(const Attention& a) { return bias_scratch(a); }
void backward_bias_tile(const Attention& a, int64_t index, float* memory) { bias_tile<Backward>(a, index, memory); }

// ------------------------------------------------------------------------------------------------ sum of dQ

int64_t backward_q_tiles(const Attention& a) { return query_slots(a); }
size_t backward_q_scratch(const Attention& a) { return a.head_dim * BLOCK_M + BLOCK_M; }

void backward_q_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  const Attention a = batch_row_view(all, tile.batch);
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W), parts = key_sections(all).parts;
  float *sum = memory, *factor = memory + a.head_dim * BLOCK_M;
  for (int64_t i = 0; i < a.head_dim * lanes; i += W) {
    vf total = {};
    for (int64_t part = 0; part < parts; part++)
      total += load<vf>(grad_q_tile(a, part, tile.batch, tile.head, tile.rows.begin) + i);
    store(sum + i, total);
  }
  for (int64_t i = 0; i < lanes; i++) factor[i] = a.score.scale;
  store_transposed(matrix(a.grad_q, a.dtype, a.head_dim, tile.batch, tile.head), tile.rows, tile.rows.end, sum, lanes,
                   factor);
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
