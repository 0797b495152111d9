// What backward.cpp and hvp.cpp share: how the keys are divided into sections, the queries and keys of a tile as
// operands, the weights, and the loops over tiles of the pass for dK, dV and dQ and of the pass for the bias. What a
// pass does with a tile is an argument. With tangents in the call the operands include theirs.
#pragma once

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

// Whether the call is a product with the Hessian (hvp.cpp).
static inline bool has_tangents(const Attention& a) { return a.tangent.out.data; }

// The workspace: delta, lse, its rest and, with tangents, that of delta, each of the shape of lse; then dQ as (parts,
// query slots, head_dim, BLOCK_M).
static inline int64_t lse_size(const Attention& a) {
  return round_up(a.heads * (a.packing.q_starts ? a.packing.total_q : a.batch * a.seq_q), 16);
}
static inline int64_t stats_floats(const Attention& a) { return (has_tangents(a) ? 4 : 3) * lse_size(a); }
struct RowStats {
  float *delta, *lse, *rest, *tangent_delta;
};
static inline RowStats row_stats(const Attention& a, int64_t batch, int64_t head) {
  float* first = a.workspace + lse_offset(a, batch, head);
  return {first, first + lse_size(a), first + 2 * lse_size(a), first + 3 * lse_size(a)};
}
static inline float* grad_q_tile(const Attention& a, int64_t part, int64_t batch, int64_t head, int64_t query) {
  int64_t tile = part * query_slots(a) + query_slot(a, batch, head, query);
  return a.workspace + stats_floats(a) + tile * a.head_dim * BLOCK_M;
}

// ------------------------------------------------------------------------------------------------ operands

// A tile of queries as operands, and its lse, rest and delta, one query a lane. With tangents, those of q and delta,
// and mu, that of lse.
struct Queries {
  int64_t batch, head;
  Range rows;
  int64_t lanes;
  float *q_t, *grad_t, *lse, *rest, *delta;
  PackedB q, grad;
  float *tangent_q_t, *tangent_delta, *mu;
  PackedB tangent_q;
};

template <class Dot>
static Queries load_queries(const Attention& a, int64_t batch, int64_t head, Range rows, Scratch& scratch) {
  // Always the lanes of the whole tile: the sum of dQ has that shape, whichever queries attend to a section.
  Queries x = {batch, head, rows, round_up(min(BLOCK_M, a.seq_q - rows.begin), W)};
  auto transposed = [&](const Heads& h, int64_t dim) {
    float* to = scratch.take(k_lanes<Dot>(dim) * x.lanes);
    pack_b_transposed<Dot>(matrix(h, a.dtype, dim, batch, head), rows, x.lanes, to);
    return to;
  };
  auto as_rows = [&](const Heads& h, int64_t dim) {
    float* to = scratch.take(BLOCK_M / Dot::K_PER_LANE * round_up(dim, W));
    return pack_b_rows<Dot>(matrix(h, a.dtype, dim, batch, head), rows, to);
  };
  x.q_t = transposed(a.q, a.head_dim), x.grad_t = transposed(a.grad_out, a.head_dim_v);
  x.q = as_rows(a.q, a.head_dim), x.grad = as_rows(a.grad_out, a.head_dim_v);
  x.tangent_q_t = x.q_t, x.tangent_q = x.q;
  if (a.tangent.q.data)
    x.tangent_q_t = transposed(a.tangent.q, a.head_dim), x.tangent_q = as_rows(a.tangent.q, a.head_dim);
  x.lse = scratch.take(BLOCK_M), x.rest = scratch.take(BLOCK_M), x.delta = scratch.take(BLOCK_M);
  x.tangent_delta = scratch.take(BLOCK_M), x.mu = scratch.take(BLOCK_M);
  const RowStats stats = row_stats(a, batch, head);
  const float* mu = has_tangents(a) ? a.tangent.lse + lse_offset(a, batch, head) : nullptr;
  for (int64_t i = 0; i < x.lanes; i++) {
    int64_t query = rows.begin + i;
    bool attends = query < rows.end && stats.lse[query] != NEG_INF;
    x.lse[i] = attends ? stats.lse[query] : __builtin_inff();  // exp(s - inf) = 0
    x.rest[i] = attends ? stats.rest[query] * LOG2E : 0;
    x.delta[i] = attends ? stats.delta[query] : 0;
    if (!has_tangents(a)) continue;
    x.tangent_delta[i] = attends ? stats.tangent_delta[query] : 0;
    x.mu[i] = attends ? mu[query] : 0;
  }
  return x;
}
static inline size_t queries_floats(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W);
  return BLOCK_M * (2 * (d + dv) + (has_tangents(a) ? 2 * d : 0) + 5) + 11 * 16;
}

// Keys and values as operands, and, with tangents, theirs.
struct Keys {
  Range keys;
  PackedA k, v, k_t, tangent_k, tangent_v, tangent_k_t;
};

template <class Dot>
static Keys load_keys(const Attention& a, int64_t batch, int64_t kv_head, Range keys, Scratch& scratch) {
  int64_t length = keys.end - keys.begin;
  auto rows = [&](const Heads& h, int64_t dim) {
    return pack_a_rows<Dot>(matrix(h, a.dtype, dim, batch, kv_head), keys, scratch.take(length * round_up(dim, W)));
  };
  auto transposed = [&](const Heads& h, const PackedA& packed) {
    if (Dot::K_PER_LANE == 1) return PackedA{packed.data, packed.col, packed.row};
    float* to = scratch.take(round_up(length, 2) / 2 * round_up(a.head_dim, W));
    return pack_a_transposed<Dot>(matrix(h, a.dtype, a.head_dim, batch, kv_head), keys, to);
  };
  Keys x = {keys, rows(a.k, a.head_dim), rows(a.v, a.head_dim_v)};
  x.k_t = transposed(a.k, x.k);
  x.tangent_k = x.k, x.tangent_v = x.v, x.tangent_k_t = x.k_t;
  if (a.tangent.k.data)
    x.tangent_k = rows(a.tangent.k, a.head_dim), x.tangent_k_t = transposed(a.tangent.k, x.tangent_k);
  if (a.tangent.v.data) x.tangent_v = rows(a.tangent.v, a.head_dim_v);
  return x;
}

// The operands of some of the keys.
template <class Dot>
static Keys slice_keys(const Keys& x, Range keys) {
  int64_t at = keys.begin - x.keys.begin;
  auto rows = [at](const PackedA& packed) { return PackedA{packed.data + at * packed.row, packed.row, packed.col}; };
  auto cols = [at](const PackedA& packed) {
    return PackedA{packed.data + at / Dot::K_PER_LANE * packed.col, packed.row, packed.col};
  };
  return {keys, rows(x.k), rows(x.v), cols(x.k_t), rows(x.tangent_k), rows(x.tangent_v), cols(x.tangent_k_t)};
}
static inline size_t keys_floats(const Attention& a, int64_t length) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W);
  return (has_tangents(a) ? 2 : 1) * ((length + 1) * (2 * d + dv) + 3 * 16);
}

// ------------------------------------------------------------------------------------------------ weights

// P and dS of a tile of scores, [key][query]. As B of a product their lanes are packed along keys, as A along queries.
// In float32 the two are the same, except that P as A has dropout applied.
struct Weights {
  float *p, *ds;  // float32: first S and dP, then P and dS
  float *p_a, *ds_a, *ds_b;
  float* dropout;  // the multipliers, or null
  SoftcapDerivatives softcap;
  BiasMask bias_mask;
  float *ts, *tds, *tds_a, *tds_b, *tangent_bias;  // with tangents
};

template <class Dot>
static Weights take_weights(const Attention& a, Scratch& scratch) {
  auto take = [&](bool wanted) { return wanted ? scratch.take(BLOCK_N * BLOCK_M) : nullptr; };
  bool tangents = has_tangents(a);
  Weights w = {take(true), take(true)};
  w.softcap = {take(a.score.softcap != 0), take(a.score.softcap != 0 && tangents)};
  w.dropout = take(a.score.dropout.scale != 0);
  w.p_a = Dot::K_PER_LANE == 2 || w.dropout || tangents ? take(true) : w.p;
  w.ds_a = Dot::K_PER_LANE == 2 ? take(true) : w.ds;
  w.ds_b = w.ds;
  w.bias_mask = take_bias_mask(a, scratch, BLOCK_N);
  w.ts = take(tangents), w.tds = take(tangents);
  w.tds_a = Dot::K_PER_LANE == 2 ? take(tangents) : w.tds;
  w.tds_b = w.tds;
  w.tangent_bias = take_bias(a.tangent.bias, scratch, BLOCK_N);
  return w;
}
static inline size_t weights_floats(const Attention& a) {
  return (has_tangents(a) ? 10 : 6) * (BLOCK_N * BLOCK_M + 16) + bias_mask_floats(a, BLOCK_N) +
         bias_floats(a.tangent.bias, BLOCK_N);
}

// P = exp(s - lse) from products q.k, in place; use(p, at, i) gets those of lanes i .. i + W, at element `at`, without
// dropout. Scores are rounded as in the forward pass, not fused into the difference: the weights sum to one only if the
// scores have the same bits.
template <class Dot, class Use>
FLASHATTN_INLINE void compute_weights(const Attention& a, const Weights& w, const Queries& x, Range keys, Use use) {
  bool partial = is_partial(a, x.rows, keys);
  float scale = a.score.scale;
  if (has_score_mods(a)) {
    for (int64_t i = 0; i < (keys.end - keys.begin) * x.lanes; i += W) store(w.p + i, load<vf>(w.p + i) * scale);
    TileCoord at = {x.batch, x.head, x.rows.begin, x.lanes};
    apply_score_mods<Dot>(a, at, keys, partial, w.bias_mask, w.p, x.lanes, w.softcap, nullptr);
    if (w.ts) apply_tangent_mods(a, at, keys, w.tangent_bias, nullptr, w.ts, x.lanes, w.softcap);
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
      use(p, at, i);
    }
}

// Store W numbers as A of a product.
template <class Dot>
FLASHATTN_INLINE void store_as_a(float* a, int64_t at, vf x) {
  if constexpr (Dot::K_PER_LANE == 2)
    store((uint16_t*)a + at, float_to_bfloat16(x));
  else
    store(a + at, x);
}

// ------------------------------------------------------------------------------------------------ dK, dV, dQ

// The sums of dK and dV for the keys of a tile, and of dQ^T for its queries.
struct Sums {
  float *k, *v, *q_t;
};

// A section of the keys of one head: Pass::accumulate<Dot>(a, w, queries, keys, sums) adds the gradients of a tile.
template <class Pass, class Dot>
static void section_gradients(const Attention& a, int64_t batch, int64_t kv_head, int64_t part, Range rows,
                              Scratch scratch) {
  Matrix grad_k = matrix(a.grad_k, a.dtype, a.head_dim, batch, kv_head);
  Matrix grad_v = matrix(a.grad_v, a.dtype, a.head_dim_v, batch, kv_head);
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), length = rows.end - rows.begin;
  float *sum_k = scratch.take(length * d), *sum_v = scratch.take(length * dv);
  for (int64_t i = 0; i < length * d; i++) sum_k[i] = 0;
  for (int64_t i = 0; i < length * dv; i++) sum_v[i] = 0;

  // Keys past the length are not read; their gradient is 0.
  const Range range = {rows.begin, min(rows.end, key_end(a, batch))};
  Range attending = range.begin < range.end ? query_range(a, range, batch) : Range{0, 0};
  if (attending.begin < attending.end) {
    const Weights w = take_weights<Dot>(a, scratch);
    const Keys keys = load_keys<Dot>(a, batch, kv_head, range, scratch);
    int64_t group = a.heads / a.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t start = attending.begin / BLOCK_M * BLOCK_M; start < attending.end; start += BLOCK_M) {
        Scratch tile_scratch = scratch;
        Queries x = load_queries<Dot>(a, batch, head, {start, min(attending.end, start + BLOCK_M)}, tile_scratch);
        Range attended = key_range(a, x.rows, batch);
        for (int64_t from = range.begin; from < min(range.end, attended.end); from += BLOCK_N) {
          Range tile = {from, min(min(range.end, attended.end), from + BLOCK_N)};
          if (tile.end <= attended.begin) continue;
          int64_t at = from - range.begin;
          Sums sums = {sum_k + at * d, sum_v + at * dv, grad_q_tile(a, part, batch, head, start)};
          Pass::template accumulate<Dot>(a, w, x, slice_keys<Dot>(keys, tile), sums);
        }
      }
  }
  for (int64_t j = 0; j < length; j++) {
    float* row = sum_k + j * d;
    for (int64_t c = 0; c < d; c += W) store(row + c, load<vf>(row + c) * a.score.scale);
    store_floats(grad_k.row(rows.begin + j), row, a.dtype, a.head_dim);
    store_floats(grad_v.row(rows.begin + j), sum_v + j * dv, a.dtype, a.head_dim_v);
  }
}

static inline int64_t sections_tiles(const Attention& a) { return key_sections(a).parts * a.batch * a.kv_heads; }

static inline size_t sections_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), section = key_sections(a).section;
  return section * (d + dv) + 2 * 16 + keys_floats(a, section) + weights_floats(a) + queries_floats(a);
}

// A task: its sections, one after the other.
template <class Pass>
static void sections_tile(const Attention& all, int64_t index, float* memory) {
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
      if (section.begin < section.end)
        section_gradients<Pass, decltype(dot)>(a, batch, kv_head, part, section, {memory});
    });
  }
}

// ------------------------------------------------------------------------------------------------ dbias

// A tile owns a block of the bias and visits all batch rows, heads, queries and keys that share it. It recomputes the
// gradients of the scores, so they need no memory, and the order of the sum is fixed: Pass::compute_tile<Dot>(a, w,
// queries, keys), then Pass::score_gradient(w, queries, element, lane) of W scores.

static inline int64_t bias_query_tiles(const Attention& a) { return (a.grad_bias.size_q + BLOCK_M - 1) / BLOCK_M; }
static inline int64_t bias_key_tiles(const Attention& a) { return (a.grad_bias.size_k + BLOCK_N - 1) / BLOCK_N; }

static inline int64_t bias_tiles(const Attention& a) {
  const ScoreTensor& x = a.grad_bias;
  return x.data ? x.size_batch * x.size_head * bias_query_tiles(a) * bias_key_tiles(a) : 0;
}

static inline size_t bias_scratch(const Attention& a) {
  return BLOCK_N * BLOCK_M + keys_floats(a, BLOCK_N) + weights_floats(a) + queries_floats(a);
}

// Add the gradients of one tile of scores to sum[key, or 0][query].
template <class Pass, class Dot>
static void add_bias_gradient(const Attention& a, int64_t batch, int64_t head, Range rows, Range range,
                              int64_t first_key, float* sum, Scratch scratch) {
  const Queries x = load_queries<Dot>(a, batch, head, rows, scratch);
  const Keys keys = load_keys<Dot>(a, batch, head / (a.heads / a.kv_heads), range, scratch);
  const Weights w = take_weights<Dot>(a, scratch);
  Pass::template compute_tile<Dot>(a, w, x, keys);
  for (int64_t j = range.begin; j < range.end; j++)
    for (int64_t i = 0; i < x.lanes; i += W) {
      float* to = sum + (a.grad_bias.size_k == 1 ? 0 : j - first_key) * BLOCK_M + i;
      store(to, load<vf>(to) + Pass::score_gradient(w, x, (j - range.begin) * x.lanes + i, i));
    }
}

template <class Pass, class Dot>
static void bias_block(const Attention& all, int64_t batch, int64_t head, int64_t query_tile, int64_t key_tile,
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
          if (keys.begin < keys.end) add_bias_gradient<Pass, Dot>(a, b, h, rows, keys, j * BLOCK_N, sum, scratch);
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

template <class Pass>
static void bias_tile(const Attention& a, int64_t index, float* memory) {
  int64_t key_tile = index % bias_key_tiles(a);
  index /= bias_key_tiles(a);
  int64_t query_tile = index % bias_query_tiles(a);
  index /= bias_query_tiles(a);
  with_dot(a.dtype, [&](auto dot) {
    bias_block<Pass, decltype(dot)>(a, index / a.grad_bias.size_head, index % a.grad_bias.size_head, query_tile,
                                    key_tile, {memory});
  });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
