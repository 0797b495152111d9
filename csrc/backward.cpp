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
#include "kernels.h"
#include "score_mods.h"
#include "softmax.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t BLOCK_N = 96;                // keys of a tile
constexpr int64_t SECTION = 480;               // keys whose gradients stay in the L2 cache while the queries pass
constexpr int64_t TASKS = 32;                  // the keys of a head are divided until there are about as many tasks,
constexpr int64_t MAX_PARTS_FLOATS = 4 << 20;  // unless the buffers for dQ would need more memory than this

// How the keys of a head are divided: section i belongs to task i % parts, so that causal tasks are about equal.
struct KeySections {
  int64_t parts, section, sections;
};

static KeySections key_sections(const Attention& a) {
  int64_t heads = max(1, a.batch * a.kv_heads), grad_q = query_slots(a) * BLOCK_M * a.head_dim;
  int64_t sections = max(1, (a.seq_k + SECTION - 1) / SECTION);
  int64_t parts = min(min(sections, (TASKS + heads - 1) / heads), max(1, MAX_PARTS_FLOATS / max(1, grad_q)));
  sections = round_up(sections, parts);
  int64_t section = round_up((a.seq_k + sections - 1) / sections, BLOCK_N);
  return {parts, section, sections};
}

static int64_t query_tiles(const Attention& a) { return (a.seq_q + BLOCK_M - 1) / BLOCK_M; }

// The workspace: delta, lse and its rest, each of the shape of lse, then dQ as (parts, query slots, head_dim, BLOCK_M).
static int64_t lse_size(const Attention& a) {
  return round_up(a.heads * (a.packing.q_starts ? a.packing.total_q : a.batch * a.seq_q), 16);
}
struct RowStats {
  float *delta, *lse, *rest;
};
static RowStats row_stats(const Attention& a, int64_t batch, int64_t head) {
  float* first = a.workspace + lse_offset(a, batch, head);
  return {first, first + lse_size(a), first + 2 * lse_size(a)};
}
static float* grad_q_tile(const Attention& a, int64_t part, int64_t batch, int64_t head, int64_t query) {
  int64_t tile = part * query_slots(a) + query_slot(a, batch, head, query);
  return a.workspace + 3 * lse_size(a) + tile * a.head_dim * BLOCK_M;
}
size_t backward_workspace(const Attention& a) {
  return 3 * lse_size(a) + key_sections(a).parts * query_slots(a) * a.head_dim * BLOCK_M;
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
// grad_out v: if one key has all the weight, so that out is v, the two cancel exactly.
template <class Dot>
static void backward_delta(const Attention& a, const Tile& tile, Scratch scratch) {
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W), depth = k_lanes<Dot>(a.head_dim_v);
  float* grad_t = scratch.take(depth * lanes);
  float* out_t = scratch.take(depth * lanes);
  pack_b_transposed<Dot>(matrix(a.grad_out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, lanes, grad_t);
  pack_b_transposed<Dot>(matrix(a.out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, lanes, out_t);
  const RowStats stats = row_stats(a, tile.batch, tile.head);
  const float* grad_lse = a.grad_lse ? a.grad_lse + lse_offset(a, tile.batch, tile.head) : nullptr;
  for (int64_t i = 0; i < lanes; i += W) {
    vf total = {};
    for (int64_t d = 0; d < depth; d++)
      total = Dot::multiply_add(load<vf>(out_t + d * lanes + i), load<vf>(grad_t + d * lanes + i), total);
    int64_t query = tile.rows.begin + i;
    for (int64_t lane = 0; lane < min(W, tile.rows.end - query); lane++)
      stats.delta[query + lane] = total[lane] - (grad_lse ? grad_lse[query + lane] : 0);
  }
  if (is_decode(a)) return recompute_lse<Dot>(a, tile, stats, scratch);  // without score mods
  const int64_t at = lse_offset(a, tile.batch, tile.head);
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

// ------------------------------------------------------------------------------------------------ dK, dV, dQ

// A tile of queries as operands, and its lse, rest and delta, one query a lane.
struct Queries {
  int64_t batch, head;
  Range rows;
  int64_t lanes;
  float *q_t, *grad_t, *lse, *rest, *delta;
  PackedB q, grad;
};

template <class Dot>
static Queries load_queries(const Attention& a, int64_t batch, int64_t head, Range rows, Scratch& scratch) {
  // Always the lanes of the whole tile: the sum of dQ has that shape, whichever queries attend to a section.
  Queries x = {batch, head, rows, round_up(min(BLOCK_M, a.seq_q - rows.begin), W)};
  Matrix q = matrix(a.q, a.dtype, a.head_dim, batch, head);
  Matrix grad = matrix(a.grad_out, a.dtype, a.head_dim_v, batch, head);
  x.q_t = scratch.take(k_lanes<Dot>(a.head_dim) * x.lanes);
  x.grad_t = scratch.take(k_lanes<Dot>(a.head_dim_v) * x.lanes);
  pack_b_transposed<Dot>(q, rows, x.lanes, x.q_t);
  pack_b_transposed<Dot>(grad, rows, x.lanes, x.grad_t);
  x.q = pack_b_rows<Dot>(q, rows, scratch.take(BLOCK_M / Dot::K_PER_LANE * round_up(a.head_dim, W)));
  x.grad = pack_b_rows<Dot>(grad, rows, scratch.take(BLOCK_M / Dot::K_PER_LANE * round_up(a.head_dim_v, W)));
  x.lse = scratch.take(BLOCK_M);
  x.rest = scratch.take(BLOCK_M);
  x.delta = scratch.take(BLOCK_M);
  const RowStats stats = row_stats(a, batch, head);
  for (int64_t i = 0; i < x.lanes; i++) {
    int64_t query = rows.begin + i;
    bool attends = query < rows.end && stats.lse[query] != NEG_INF;
    x.lse[i] = attends ? stats.lse[query] : __builtin_inff();  // exp(s - inf) = 0
    x.rest[i] = attends ? stats.rest[query] * LOG2E : 0;
    x.delta[i] = attends ? stats.delta[query] : 0;
  }
  return x;
}

// P and dS of a tile of scores, [key][query]. As B of a product their lanes are packed along keys, as A along queries.
// In float32 the two are the same, except that P as A has dropout applied.
struct Weights {
  float *p, *ds;  // float32: first S and dP, then P and dS
  float *p_a, *ds_a, *ds_b;
  float *dscore, *dropout;  // the derivative of the softcap and the multipliers of dropout, or null
  BiasMask bias_mask;
};

template <class Dot>
static Weights take_weights(const Attention& a, Scratch& scratch) {
  auto take = [&](bool wanted) { return wanted ? scratch.take(BLOCK_N * BLOCK_M) : nullptr; };
  Weights w = {take(true), take(true)};
  w.dscore = take(a.score.softcap != 0), w.dropout = take(a.score.dropout.scale != 0);
  w.p_a = Dot::K_PER_LANE == 2 || w.dropout ? take(true) : w.p;
  w.ds_a = Dot::K_PER_LANE == 2 ? take(true) : w.ds;
  w.ds_b = w.ds;
  w.bias_mask = take_bias_mask(a, scratch, BLOCK_N);
  return w;
}
static size_t weights_floats(const Attention& a) { return 6 * (BLOCK_N * BLOCK_M + 16) + bias_mask_floats(a, BLOCK_N); }

// P = exp(s - lse) from products q.k, in place. Scores are rounded as in the forward pass, not fused into the
// difference: the weights sum to one only if the scores have the same bits.
template <class Dot>
static void compute_weights(const Attention& a, const Weights& w, const Queries& x, Range keys) {
  bool partial = is_partial(a, x.rows, keys);
  float scale = a.score.scale;
  if (has_score_mods(a)) {
    for (int64_t i = 0; i < (keys.end - keys.begin) * x.lanes; i += W) store(w.p + i, load<vf>(w.p + i) * scale);
    TileCoord at = {x.batch, x.head, x.rows.begin, x.lanes};
    apply_score_mods<Dot>(a, at, keys, partial, w.bias_mask, w.p, x.lanes, {w.dscore}, nullptr);
    partial = false, scale = 1;  // both are applied
  }
  if (w.dropout)
    for (int64_t i = 0; i < x.lanes; i += W) {
      DropoutMultipliers multipliers(a, {x.batch, x.head, x.rows.begin + i, W});
      float* to = w.dropout + i;
      for (int64_t j = keys.begin; j < keys.end; j++, to += x.lanes) store(to, multipliers.at(j));
    }
  for (int64_t j = keys.begin; j < keys.end; j++)
    for (int64_t i = 0; i < x.lanes; i += W) {
      int64_t at = (j - keys.begin) * x.lanes + i;
      vf difference = round_product(load<vf>(w.p + at) * scale) - load<vf>(x.lse + i);
      vf p = exp2<Dot::EXP_DEGREE>(difference * LOG2E - load<vf>(x.rest + i));
      if (partial) p = in_window(a, x.rows.begin + i, j) ? p : vf{};
      store(w.p + at, p);
      if (w.dropout) p *= load<vf>(w.dropout + at);
      if constexpr (Dot::K_PER_LANE == 2)
        store((uint16_t*)w.p_a + at, float_to_bfloat16(p));
      else if (w.dropout)
        store(w.p_a + at, p);
    }
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
    if (w.dscore) ds *= load<vf>(w.dscore + at);
    if constexpr (Dot::K_PER_LANE == 1)
      store(w.ds + at, ds);
    else
      store((uint16_t*)w.ds_a + at, float_to_bfloat16(ds));
    return ds;
  };
  for (int64_t j = 0; j < n; j += Dot::K_PER_LANE)
    for (int64_t i = 0; i < x.lanes; i += W) {
      vf even = gradient(j, i);
      if constexpr (Dot::K_PER_LANE == 2)
        store(w.ds_b + j / 2 * x.lanes + i, Dot::pack_pairs(even, j + 1 < n ? gradient(j + 1, i) : vf{}));
    }
}

// The keys of a section as operands, the sums of their gradients, and memory for a tile of scores.
struct Section {
  Range keys;
  PackedA k, v, k_t;
  float *grad_k, *grad_v;
  Weights w;
};

// Add the contribution of the queries x and some keys of the section to dK, dV and dQ.
template <class Dot>
static void accumulate_tile(const Attention& a, const Section& section, const Queries& x, Range keys, float* grad_q) {
  const Weights& w = section.w;
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W);
  int64_t at = keys.begin - section.keys.begin, n = keys.end - keys.begin;
  int64_t queries = k_lanes<Dot>(x.rows.end - x.rows.begin), row = x.lanes * 4 / Dot::K_PER_LANE;
  auto rows_from = [at](PackedA packed) { return PackedA{packed.data + at * packed.row, packed.row, packed.col}; };
  matmul<Dot>(rows_from(section.k), x.q_t, x.lanes, n, x.lanes, k_lanes<Dot>(a.head_dim), store_to(w.p, x.lanes));
  compute_weights<Dot>(a, w, x, keys);
  matmul<Dot>(rows_from(section.v), x.grad_t, x.lanes, n, x.lanes, k_lanes<Dot>(a.head_dim_v), store_to(w.ds, x.lanes));
  compute_score_gradients<Dot>(w, x, n);
  matmul<Dot>(PackedA{(const char*)w.p_a, row, 4}, x.grad.data, x.grad.ld, n, dv, queries,
              add_to(section.grad_v + at * dv, dv));
  matmul<Dot>(PackedA{(const char*)w.ds_a, row, 4}, x.q.data, x.q.ld, n, d, queries,
              add_to(section.grad_k + at * d, d));
  PackedA k_t = {section.k_t.data + at / Dot::K_PER_LANE * section.k_t.col, section.k_t.row, section.k_t.col};
  matmul<Dot>(k_t, w.ds_b, x.lanes, a.head_dim, x.lanes, k_lanes<Dot>(n), add_to(grad_q, x.lanes));
}

template <class Dot>
static void backward_section(const Attention& a, int64_t batch, int64_t kv_head, int64_t part, Range rows,
                             Scratch scratch) {
  Matrix k = matrix(a.k, a.dtype, a.head_dim, batch, kv_head), v = matrix(a.v, a.dtype, a.head_dim_v, batch, kv_head);
  Matrix grad_k = matrix(a.grad_k, a.dtype, a.head_dim, batch, kv_head);
  Matrix grad_v = matrix(a.grad_v, a.dtype, a.head_dim_v, batch, kv_head);
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), length = rows.end - rows.begin;
  Section section = {};
  section.grad_k = scratch.take(length * d);
  section.grad_v = scratch.take(length * dv);
  float* k_packed = scratch.take(length * d);
  float* v_packed = scratch.take(length * dv);
  float* kt_packed = Dot::K_PER_LANE == 1 ? k_packed : scratch.take(round_up(length, 2) / 2 * d);
  section.w = take_weights<Dot>(a, scratch);
  for (int64_t i = 0; i < length * d; i++) section.grad_k[i] = 0;
  for (int64_t i = 0; i < length * dv; i++) section.grad_v[i] = 0;

  // Keys past the length are not read; their gradient is 0.
  const Range keys = {rows.begin, min(rows.end, key_end(a, batch))};
  section.keys = keys;
  Range attending = keys.begin < keys.end ? query_range(a, keys, batch) : Range{0, 0};
  if (attending.begin < attending.end) {
    section.k = pack_a_rows<Dot>(k, keys, k_packed), section.v = pack_a_rows<Dot>(v, keys, v_packed);
    section.k_t = Dot::K_PER_LANE == 1 ? PackedA{section.k.data, section.k.col, section.k.row}
                                       : pack_a_transposed<Dot>(k, keys, kt_packed);
    int64_t group = a.heads / a.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t start = attending.begin / BLOCK_M * BLOCK_M; start < attending.end; start += BLOCK_M) {
        Scratch tile_scratch = scratch;
        Queries x = load_queries<Dot>(a, batch, head, {start, min(attending.end, start + BLOCK_M)}, tile_scratch);
        Range attended = key_range(a, x.rows, batch);
        for (int64_t from = keys.begin; from < min(keys.end, attended.end); from += BLOCK_N) {
          Range tile = {from, min(min(keys.end, attended.end), from + BLOCK_N)};
          if (tile.end > attended.begin)
            accumulate_tile<Dot>(a, section, x, tile, grad_q_tile(a, part, batch, head, start));
        }
      }
  }
  for (int64_t j = 0; j < length; j++) {
    float* row = section.grad_k + j * d;
    for (int64_t c = 0; c < d; c += W) store(row + c, load<vf>(row + c) * a.score.scale);
    store_floats(grad_k.row(rows.begin + j), row, a.dtype, a.head_dim);
    store_floats(grad_v.row(rows.begin + j), section.grad_v + j * dv, a.dtype, a.head_dim_v);
  }
}

int64_t backward_tiles(const Attention& a) { return key_sections(a).parts * a.batch * a.kv_heads; }

size_t backward_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), section = key_sections(a).section;
  return section * (3 * d + 2 * dv) + weights_floats(a) + BLOCK_M * 2 * (d + dv) + 3 * BLOCK_M + 17 * 16;
}

void backward_tile(const Attention& all, int64_t index, float* memory) {
  KeySections s = key_sections(all);
  int64_t heads = all.batch * all.kv_heads, part = index / heads, group = all.heads / all.kv_heads;
  int64_t batch = index % heads / all.kv_heads, kv_head = index % all.kv_heads;
  const Attention a = batch_row_view(all, batch);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
    float* sum_q = grad_q_tile(a, part, batch, head, 0);
    for (int64_t i = 0; i < query_tiles(a) * a.head_dim * BLOCK_M; i++) sum_q[i] = 0;
  }
  for (int64_t i = part; i < s.sections; i += s.parts) {
    Range section = {min(a.seq_k, i * s.section), min(a.seq_k, (i + 1) * s.section)};
    with_dot(a.dtype, [&](auto dot) {
      if (section.begin < section.end) backward_section<decltype(dot)>(a, batch, kv_head, part, section, {memory});
    });
  }
}

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

// ------------------------------------------------------------------------------------------------ dbias

// A tile owns a block of the bias and visits all batch rows, heads, queries and keys that share it. It recomputes S and
// dP, so they need no memory, and the order of the sum is fixed.

static int64_t bias_query_tiles(const Attention& a) { return (a.grad_bias.size_q + BLOCK_M - 1) / BLOCK_M; }
static int64_t bias_key_tiles(const Attention& a) { return (a.grad_bias.size_k + BLOCK_N - 1) / BLOCK_N; }

int64_t backward_bias_tiles(const Attention& a) {
  const ScoreTensor& x = a.grad_bias;
  return x.data ? x.size_batch * x.size_head * bias_query_tiles(a) * bias_key_tiles(a) : 0;
}

size_t backward_bias_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W);
  return BLOCK_N * (d + dv + BLOCK_M) + weights_floats(a) + BLOCK_M * 2 * (d + dv) + 3 * BLOCK_M + 17 * 16;
}

// Add the gradients of one tile of scores to sum[key, or 0][query].
template <class Dot>
static void add_bias_gradient(const Attention& a, int64_t batch, int64_t head, Range rows, Range keys,
                              int64_t first_key, float* sum, Scratch scratch) {
  int64_t kv_head = head / (a.heads / a.kv_heads), n = keys.end - keys.begin;
  Queries x = load_queries<Dot>(a, batch, head, rows, scratch);
  float* k_packed = scratch.take(BLOCK_N * round_up(a.head_dim, W));
  float* v_packed = scratch.take(BLOCK_N * round_up(a.head_dim_v, W));
  Weights w = take_weights<Dot>(a, scratch);
  Matrix k = matrix(a.k, a.dtype, a.head_dim, batch, kv_head), v = matrix(a.v, a.dtype, a.head_dim_v, batch, kv_head);
  matmul<Dot>(pack_a_rows<Dot>(k, keys, k_packed), x.q_t, x.lanes, n, x.lanes, k_lanes<Dot>(a.head_dim),
              store_to(w.p, x.lanes));
  compute_weights<Dot>(a, w, x, keys);
  matmul<Dot>(pack_a_rows<Dot>(v, keys, v_packed), x.grad_t, x.lanes, n, x.lanes, k_lanes<Dot>(a.head_dim_v),
              store_to(w.ds, x.lanes));
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = 0; i < x.lanes; i += W) {
      float* to = sum + (a.grad_bias.size_k == 1 ? 0 : keys.begin + j - first_key) * BLOCK_M + i;
      store(to, load<vf>(to) + score_gradient(w, x, j * x.lanes + i, i));
    }
}

template <class Dot>
static void backward_bias(const Attention& all, int64_t batch, int64_t head, int64_t query_tile, int64_t key_tile,
                          Scratch scratch) {
  const ScoreTensor& x = all.grad_bias;
  auto reduction_range = [](int64_t size, int64_t at, int64_t all) {
    return size == 1 ? Range{0, all} : Range{at, at + 1};
  };
  Range batches = reduction_range(x.size_batch, batch, all.batch),
        heads = reduction_range(x.size_head, head, all.heads);
  Range tiles = reduction_range(x.size_q, query_tile, query_tiles(all));
  Range key_tiles = reduction_range(x.size_k, key_tile, (all.seq_k + BLOCK_N - 1) / BLOCK_N);
  float* sum = scratch.take(BLOCK_N * BLOCK_M);
  for (int64_t i = 0; i < BLOCK_N * BLOCK_M; i++) sum[i] = 0;
  for (int64_t b = batches.begin; b < batches.end; b++) {
    const Attention a = batch_row_view(all, b);
    for (int64_t h = heads.begin; h < heads.end; h++)
      for (int64_t tile = tiles.begin; tile < tiles.end; tile++) {
        Range rows = {tile * BLOCK_M, min(query_end(a, b), (tile + 1) * BLOCK_M)};
        if (rows.begin >= rows.end) continue;
        Range attended = key_range(a, rows, b);
        for (int64_t j = key_tiles.begin; j < key_tiles.end; j++) {
          Range keys = {max(attended.begin, j * BLOCK_N), min(attended.end, (j + 1) * BLOCK_N)};
          if (keys.begin < keys.end) add_bias_gradient<Dot>(a, b, h, rows, keys, j * BLOCK_N, sum, scratch);
        }
      }
  }
  Range rows = {query_tile * BLOCK_M, min(x.size_q, (query_tile + 1) * BLOCK_M)};
  Range keys = {key_tile * BLOCK_N, min(x.size_k, (key_tile + 1) * BLOCK_N)};
  for (int64_t i = rows.begin; i < rows.end; i++)
    for (int64_t j = keys.begin; j < keys.end; j++) {
      const float* from = sum + (j - keys.begin) * BLOCK_M;
      float total = from[i - rows.begin];
      for (int64_t lane = 1; x.size_q == 1 && lane < BLOCK_M; lane++) total += from[lane];
      ((float*)x.data)[((batch * x.size_head + head) * x.size_q + i) * x.size_k + j] = total;
    }
}

void backward_bias_tile(const Attention& a, int64_t index, float* memory) {
  int64_t key_tile = index % bias_key_tiles(a);
  index /= bias_key_tiles(a);
  int64_t query_tile = index % bias_query_tiles(a);
  index /= bias_query_tiles(a);
  with_dot(a.dtype, [&](auto dot) {
    backward_bias<decltype(dot)>(a, index / a.grad_bias.size_head, index % a.grad_bias.size_head, query_tile, key_tile,
                                 {memory});
  });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
