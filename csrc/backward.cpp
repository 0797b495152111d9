// Attention backward, with queries along the vector lanes as in forward.cpp:
//
//   P = exp(K Q^T - lse),  dP = V dO^T,  dS = P (dP - delta)
//   dV += P dO,  dK += dS Q,  dQ^T += K^T dS
//
// With dropout, P is dropped where it meets dO, and dP likewise; with a softcap, dS is multiplied by its derivative.
//
// Three passes, and one more for the gradient of a bias. The first computes delta. In the second a task owns some
// sections of the keys of one key/value head: for each section it goes once over all queries of the group that see it,
// so S and dP are computed once, and adds up dQ in a buffer of its own. The third sums the buffers of the tasks, in
// order. Nothing is atomic, and what is added to what does not depend on the number of threads.
//
// Dao, "FlashAttention-2" (2023), arXiv:2307.08691. The mathematics is in kernels/backward.py.
#include "kernels.h"
#include "modify.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t BLOCK_N = 96;   // keys of a tile
constexpr int64_t SECTION = 480;  // keys whose gradients stay in the second-level cache while the queries go by
constexpr int64_t TASKS = 32;     // about as many tasks as this, where there are too few heads to occupy the threads
constexpr int64_t MAX_PARTS_FLOATS = 4 << 20;  // but not at the price of more memory for dQ than this

// How the keys of a head are shared out: section i belongs to task i % parts, so that causal tasks are about equal.
struct Split {
  int64_t parts, section, sections;
};

static Split split(const Attention& a) {
  int64_t heads = max(1, a.batch * a.kv_heads), grad_q = query_slots(a) * BLOCK_M * a.head_dim;
  int64_t sections = max(1, (a.seq_k + SECTION - 1) / SECTION);
  int64_t parts = min(min(sections, (TASKS + heads - 1) / heads), max(1, MAX_PARTS_FLOATS / max(1, grad_q)));
  sections = round_up(sections, parts);
  int64_t section = round_up((a.seq_k + sections - 1) / sections, BLOCK_N);
  return {parts, section, sections};
}

static int64_t query_tiles(const Attention& a) { return (a.seq_q + BLOCK_M - 1) / BLOCK_M; }

// The workspace: delta, lse and its rest, all of the shape of lse, then dQ as (parts, slots of queries, head_dim,
// BLOCK_M).
static int64_t statistics(const Attention& a) {
  return round_up(a.heads * (a.packing.q_starts ? a.packing.total_q : a.batch * a.seq_q), 16);
}
struct Statistics {
  float *delta, *lse, *rest;
};
static Statistics statistics_of(const Attention& a, int64_t batch, int64_t head) {
  float* first = a.workspace + statistics_at(a, batch, head);
  return {first, first + statistics(a), first + 2 * statistics(a)};
}
static float* grad_q_of(const Attention& a, int64_t part, int64_t batch, int64_t head, int64_t query) {
  int64_t tile = part * query_slots(a) + query_slot(a, batch, head, query);
  return a.workspace + 3 * statistics(a) + tile * a.head_dim * BLOCK_M;
}
size_t backward_workspace(const Attention& a) {
  return 3 * statistics(a) + split(a).parts * query_slots(a) * a.head_dim * BLOCK_M;
}

// ------------------------------------------------------------------------------------------------ statistics

// Of few queries decode.cpp summed the products in another order: the lse of the sums as the passes here form them.
template <class Dot>
static void sum_weights(const Attention& a, const Tile& tile, const Statistics& to, Scratch scratch) {
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W);
  Range rows = {tile.rows.begin, min(tile.rows.end, query_end(a, tile.batch))};
  float* q_t = scratch.take(elements<Dot>(a.head_dim) * lanes);
  float* s = scratch.take(BLOCK_N * lanes);
  float* packed = scratch.take(BLOCK_N * round_up(a.head_dim, W));
  pack_transposed<Dot>(matrix(a.q, a.dtype, a.head_dim, tile.batch, tile.head), rows, lanes, q_t);
  Matrix k = matrix(a.k, a.dtype, a.head_dim, tile.batch, tile.head / (a.heads / a.kv_heads));
  float m[BLOCK_M], l[BLOCK_M];
  for (int64_t i = 0; i < lanes; i++) m[i] = -__builtin_inff(), l[i] = 0;
  Range all = rows.begin < rows.end ? visible_keys(a, rows, tile.batch) : Range{0, 0};
  for (int64_t start = all.begin; start < all.end; start += BLOCK_N) {
    Range keys = {start, min(all.end, start + BLOCK_N)};
    int64_t n = keys.end - keys.begin;
    matmul<Dot>(left_rows<Dot>(k, keys, packed), q_t, lanes, n, lanes, elements<Dot>(a.head_dim), store_to(s, lanes));
    for (int64_t i = 0; i < lanes; i += W) {
      vf top = load<vf>(m + i), before = top, sum = {};
      for (int64_t j = 0; j < n; j++) {
        vf x = load<vf>(s + j * lanes + i) * a.score.scale;
        x = visible(a, rows.begin + i, keys.begin + j) ? x : vf{} + NEVER;
        store(s + j * lanes + i, x);
        top = max(top, x);
      }
      vf shift = top == NEVER ? vf{} : top;
      for (int64_t j = 0; j < n; j++) sum += exp2((load<vf>(s + j * lanes + i) - shift) * LOG2E);
      store(l + i, load<vf>(l + i) * exp2((before - shift) * LOG2E) + sum);
      store(m + i, top);
    }
  }
  Attention results = a;
  results.lse = to.lse, results.rest = to.rest;
  for (int64_t i = 0; i < tile.rows.end - tile.rows.begin; i++) {
    float sum = tile.rows.begin + i < rows.end ? l[i] : 0;
    if (a.score.sinks) join_sink(a.score.sinks[tile.head], m[i], sum);
    store_lse(results, tile.rows.begin + i, m[i], sum);
  }
}

// delta = rowsum(grad_out * out) - grad_lse, for the queries of one tile. Summed in the order the matrix product sums
// grad_out v, so that where one key has all the weight, and out is v, the two cancel exactly.
template <class Dot>
static void backward_delta(const Attention& a, const Tile& tile, Scratch scratch) {
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W), depth = elements<Dot>(a.head_dim_v);
  float* grad_t = scratch.take(depth * lanes);
  float* out_t = scratch.take(depth * lanes);
  pack_transposed<Dot>(matrix(a.grad_out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, lanes, grad_t);
  pack_transposed<Dot>(matrix(a.out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, lanes, out_t);
  const Statistics to = statistics_of(a, tile.batch, tile.head);
  const float* grad_lse = a.grad_lse ? a.grad_lse + statistics_at(a, tile.batch, tile.head) : nullptr;
  for (int64_t i = 0; i < lanes; i += W) {
    vf total = {};
    for (int64_t d = 0; d < depth; d++)
      total = Dot::multiply_add(load<vf>(out_t + d * lanes + i), load<vf>(grad_t + d * lanes + i), total);
    int64_t query = tile.rows.begin + i;
    for (int64_t lane = 0; lane < min(W, tile.rows.end - query); lane++)
      to.delta[query + lane] = total[lane] - (grad_lse ? grad_lse[query + lane] : 0);
  }
  if (is_decode(a)) return sum_weights<Dot>(a, tile, to, scratch);  // so is_modified(a) is false
  const int64_t at = statistics_at(a, tile.batch, tile.head);
  for (int64_t i = tile.rows.begin; i < tile.rows.end; i++) {
    to.lse[i] = a.lse[at + i];
    to.rest[i] = a.rest ? a.rest[at + i] : 0;
  }
}

int64_t backward_delta_tiles(const Attention& a) { return query_slots(a); }
size_t backward_delta_scratch(const Attention& a) {
  return 2 * a.head_dim_v * BLOCK_M + (a.head_dim + BLOCK_N) * BLOCK_M + BLOCK_N * round_up(a.head_dim, W) + 5 * 16;
}
void backward_delta_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  const Attention a = sequence(all, tile.batch);
  with_dot(a.dtype, [&](auto dot) { backward_delta<decltype(dot)>(a, tile, {memory}); });
}

// ------------------------------------------------------------------------------------------------ dK, dV, dQ

// A tile of queries in the forms the products take, and its softmax statistics, one a lane.
struct Queries {
  Range rows;
  int64_t lanes;
  float *q_t, *grad_t, *lse, *rest, *delta;
  Right q, grad;
};

template <class Dot>
static Queries load_queries(const Attention& a, int64_t batch, int64_t head, Range rows, Scratch& scratch) {
  // Always the lanes of the whole tile: the sum of dQ has that shape, whichever of its queries a section sees.
  Queries x = {rows, round_up(min(BLOCK_M, a.seq_q - rows.begin), W)};
  Matrix q = matrix(a.q, a.dtype, a.head_dim, batch, head);
  Matrix grad = matrix(a.grad_out, a.dtype, a.head_dim_v, batch, head);
  x.q_t = scratch.take(elements<Dot>(a.head_dim) * x.lanes);
  x.grad_t = scratch.take(elements<Dot>(a.head_dim_v) * x.lanes);
  pack_transposed<Dot>(q, rows, x.lanes, x.q_t);
  pack_transposed<Dot>(grad, rows, x.lanes, x.grad_t);
  x.q = right_rows<Dot>(q, rows, scratch.take(BLOCK_M / Dot::DEPTH * round_up(a.head_dim, W)));
  x.grad = right_rows<Dot>(grad, rows, scratch.take(BLOCK_M / Dot::DEPTH * round_up(a.head_dim_v, W)));
  x.lse = scratch.take(BLOCK_M);
  x.rest = scratch.take(BLOCK_M);
  x.delta = scratch.take(BLOCK_M);
  const Statistics of = statistics_of(a, batch, head);
  for (int64_t i = 0; i < x.lanes; i++) {
    int64_t query = rows.begin + i;
    bool attends = query < rows.end && of.lse[query] != -__builtin_inff();
    x.lse[i] = attends ? of.lse[query] : __builtin_inff();  // exp(s - inf) = 0
    x.rest[i] = attends ? of.rest[query] * LOG2E : 0;
    x.delta[i] = attends ? of.delta[query] : 0;
  }
  return x;
}

// P and dS of a tile of scores. As right side of a product they are [key][query] elements along keys, as left side
// [key][query] elements along queries; of float32 numbers the two are the same, but for what dropout drops of P.
struct Weights {
  float *p, *ds;          // float32: first S and dP, then P and dS
  float *p_left, *ds_left, *ds_right;
  float *slope, *kept;    // the derivative of the softcap, what dropout multiplies by; or null
  Planes planes;
};

template <class Dot>
static Weights take_weights(const Attention& a, Scratch& scratch) {
  auto take = [&](bool wanted) { return wanted ? scratch.take(BLOCK_N * BLOCK_M) : nullptr; };
  Weights w = {take(true), take(true)};
  w.slope = take(a.score.softcap != 0), w.kept = take(a.score.dropout.scale != 0);
  w.p_left = Dot::DEPTH == 2 || w.kept ? take(true) : w.p;
  w.ds_left = Dot::DEPTH == 2 ? take(true) : w.ds;
  w.ds_right = w.ds;
  w.planes = take_planes(a, scratch, BLOCK_N);
  return w;
}
static size_t weights_floats(const Attention& a) { return 6 * (BLOCK_N * BLOCK_M + 16) + planes_floats(a, BLOCK_N); }

// exp(s - lse) of products q.k in place. The scores are rounded as in the forward pass, not fused into the difference:
// the weights sum to one where they are the same to the bit.
template <class Dot>
static void softmax_weights(const Attention& a, const Weights& w, const Queries& x, int64_t batch, int64_t head,
                            Range keys) {
  bool edge = is_edge(a, x.rows, keys);
  float scale = a.score.scale;
  if (is_modified(a)) {
    for (int64_t i = 0; i < (keys.end - keys.begin) * x.lanes; i += W) store(w.p + i, load<vf>(w.p + i) * scale);
    modify<Dot>(a, {batch, head, x.rows.begin, x.lanes}, keys, edge, w.planes, w.p, x.lanes, w.slope, nullptr);
    edge = false, scale = 1;  // both are done
  }
  if (w.kept)
    for (int64_t i = 0; i < x.lanes; i += W) {
      KeptWeights kept(a, {batch, head, x.rows.begin + i, W});
      for (int64_t j = keys.begin; j < keys.end; j++) store(w.kept + (j - keys.begin) * x.lanes + i, kept.at(j));
    }
  for (int64_t j = keys.begin; j < keys.end; j++)
    for (int64_t i = 0; i < x.lanes; i += W) {
      int64_t at = (j - keys.begin) * x.lanes + i;
      vf difference = rounded(load<vf>(w.p + at) * scale) - load<vf>(x.lse + i);
      vf p = exp2<Dot::EXP_DEGREE>(difference * LOG2E - load<vf>(x.rest + i));
      if (edge) p = visible(a, x.rows.begin + i, j) ? p : vf{};
      store(w.p + at, p);
      if (w.kept) p *= load<vf>(w.kept + at);
      if constexpr (Dot::DEPTH == 2)
        store((uint16_t*)w.p_left + at, float_to_bfloat16(p));
      else if (w.kept)
        store(w.p_left + at, p);
    }
}

// The gradient of W scores as softmax takes them.
INLINE vf score_gradient(const Weights& w, const Queries& x, int64_t at, int64_t i) {
  vf dp = load<vf>(w.ds + at);
  if (w.kept) dp *= load<vf>(w.kept + at);
  return load<vf>(w.p + at) * (dp - load<vf>(x.delta + i));
}

template <class Dot>
static void score_gradients(const Weights& w, const Queries& x, int64_t n) {
  auto gradient = [&](int64_t j, int64_t i) {
    int64_t at = j * x.lanes + i;
    vf ds = score_gradient(w, x, at, i);
    if (w.slope) ds *= load<vf>(w.slope + at);
    if constexpr (Dot::DEPTH == 1)
      store(w.ds + at, ds);
    else
      store((uint16_t*)w.ds_left + at, float_to_bfloat16(ds));
    return ds;
  };
  for (int64_t j = 0; j < n; j += Dot::DEPTH)
    for (int64_t i = 0; i < x.lanes; i += W) {
      vf even = gradient(j, i);
      if constexpr (Dot::DEPTH == 2)
        store(w.ds_right + j / 2 * x.lanes + i, Dot::of(even, j + 1 < n ? gradient(j + 1, i) : vf{}));
    }
}

// The keys of a section in the forms the products take.
struct Keys {
  Left k, v, k_t;
};

template <class Dot>
static void backward_section(const Attention& a, int64_t batch, int64_t kv_head, int64_t part, Range section,
                             Scratch scratch) {
  Matrix k = matrix(a.k, a.dtype, a.head_dim, batch, kv_head), v = matrix(a.v, a.dtype, a.head_dim_v, batch, kv_head);
  Matrix grad_k = matrix(a.grad_k, a.dtype, a.head_dim, batch, kv_head);
  Matrix grad_v = matrix(a.grad_v, a.dtype, a.head_dim_v, batch, kv_head);
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), length = section.end - section.begin;
  float* sum_k = scratch.take(length * d);
  float* sum_v = scratch.take(length * dv);
  float* k_packed = scratch.take(length * d);
  float* v_packed = scratch.take(length * dv);
  float* kt_packed = Dot::DEPTH == 1 ? k_packed : scratch.take(round_up(length, 2) / 2 * d);
  Weights w = take_weights<Dot>(a, scratch);
  for (int64_t i = 0; i < length * d; i++) sum_k[i] = 0;
  for (int64_t i = 0; i < length * dv; i++) sum_v[i] = 0;

  // Keys past the length are not read, and keep a gradient of 0.
  Range keys = {section.begin, min(section.end, key_end(a, batch))};
  Range seen = keys.begin < keys.end ? visible_queries(a, keys, batch) : Range{0, 0};
  if (seen.begin < seen.end) {
    Left left_k = left_rows<Dot>(k, keys, k_packed), left_v = left_rows<Dot>(v, keys, v_packed);
    Left left_kt = Dot::DEPTH == 1 ? Left{left_k.data, left_k.col, left_k.row} : left_columns<Dot>(k, keys, kt_packed);
    int64_t group = a.heads / a.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t start = seen.begin / BLOCK_M * BLOCK_M; start < seen.end; start += BLOCK_M) {
        Scratch rest = scratch;
        Queries x = load_queries<Dot>(a, batch, head, {start, min(seen.end, start + BLOCK_M)}, rest);
        float* sum_q = grad_q_of(a, part, batch, head, start);
        Range sees = visible_keys(a, x.rows, batch);
        int64_t queries = elements<Dot>(x.rows.end - x.rows.begin);
        for (int64_t from = keys.begin; from < min(keys.end, sees.end); from += BLOCK_N) {
          Range tile = {from, min(min(keys.end, sees.end), from + BLOCK_N)};
          if (tile.end <= sees.begin) continue;
          int64_t at = from - keys.begin, n = tile.end - tile.begin;
          auto rows_from = [at](Left left) { return Left{left.data + at * left.row, left.row, left.col}; };
          matmul<Dot>(rows_from(left_k), x.q_t, x.lanes, n, x.lanes, elements<Dot>(a.head_dim), store_to(w.p, x.lanes));
          softmax_weights<Dot>(a, w, x, batch, head, tile);
          matmul<Dot>(rows_from(left_v), x.grad_t, x.lanes, n, x.lanes, elements<Dot>(a.head_dim_v),
                      store_to(w.ds, x.lanes));
          score_gradients<Dot>(w, x, n);
          int64_t row = x.lanes * 4 / Dot::DEPTH;
          matmul<Dot>(Left{(const char*)w.p_left, row, 4}, x.grad.data, x.grad.ld, n, dv, queries,
                      add_to(sum_v + at * dv, dv));
          matmul<Dot>(Left{(const char*)w.ds_left, row, 4}, x.q.data, x.q.ld, n, d, queries, add_to(sum_k + at * d, d));
          Left kt = {left_kt.data + at / Dot::DEPTH * left_kt.col, left_kt.row, left_kt.col};
          matmul<Dot>(kt, w.ds_right, x.lanes, a.head_dim, x.lanes, elements<Dot>(n), add_to(sum_q, x.lanes));
        }
      }
  }
  for (int64_t j = 0; j < length; j++) {
    float* row = sum_k + j * d;
    for (int64_t c = 0; c < d; c += W) store(row + c, load<vf>(row + c) * a.score.scale);
    store_floats(grad_k.row(section.begin + j), row, a.dtype, a.head_dim);
    store_floats(grad_v.row(section.begin + j), sum_v + j * dv, a.dtype, a.head_dim_v);
  }
}

int64_t backward_tiles(const Attention& a) { return split(a).parts * a.batch * a.kv_heads; }

size_t backward_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), section = split(a).section;
  return section * (3 * d + 2 * dv) + weights_floats(a) + BLOCK_M * 2 * (d + dv) + 3 * BLOCK_M + 17 * 16;
}

void backward_tile(const Attention& all, int64_t index, float* memory) {
  Split s = split(all);
  int64_t heads = all.batch * all.kv_heads, part = index / heads, group = all.heads / all.kv_heads;
  int64_t batch = index % heads / all.kv_heads, kv_head = index % all.kv_heads;
  const Attention a = sequence(all, batch);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
    float* sum_q = grad_q_of(a, part, batch, head, 0);
    for (int64_t i = 0; i < query_tiles(a) * a.head_dim * BLOCK_M; i++) sum_q[i] = 0;
  }
  for (int64_t i = part; i < s.sections; i += s.parts) {
    Range section = {min(a.seq_k, i * s.section), min(a.seq_k, (i + 1) * s.section)};
    with_dot(a.dtype, [&](auto dot) {
      if (section.begin < section.end) backward_section<decltype(dot)>(a, batch, kv_head, part, section, {memory});
    });
  }
}

// ------------------------------------------------------------------------------------------------ dQ, summed

int64_t backward_q_tiles(const Attention& a) { return query_slots(a); }
size_t backward_q_scratch(const Attention& a) { return a.head_dim * BLOCK_M + BLOCK_M; }

void backward_q_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  const Attention a = sequence(all, tile.batch);
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W), parts = split(all).parts;
  float *sum = memory, *factor = memory + a.head_dim * BLOCK_M;
  for (int64_t i = 0; i < a.head_dim * lanes; i += W) {
    vf total = {};
    for (int64_t part = 0; part < parts; part++)
      total += load<vf>(grad_q_of(a, part, tile.batch, tile.head, tile.rows.begin) + i);
    store(sum + i, total);
  }
  for (int64_t i = 0; i < lanes; i++) factor[i] = a.score.scale;
  store_transposed(matrix(a.grad_q, a.dtype, a.head_dim, tile.batch, tile.head), tile.rows, tile.rows.end, sum, lanes,
                   factor);
}

// ------------------------------------------------------------------------------------------------ dbias

// A tile owns a block of the bias and goes over all batch rows, heads, queries and keys that share it: S and dP are
// computed once more, so that nothing has to be kept, and the sum has one order.

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
  matmul<Dot>(left_rows<Dot>(k, keys, k_packed), x.q_t, x.lanes, n, x.lanes, elements<Dot>(a.head_dim),
              store_to(w.p, x.lanes));
  softmax_weights<Dot>(a, w, x, batch, head, keys);
  matmul<Dot>(left_rows<Dot>(v, keys, v_packed), x.grad_t, x.lanes, n, x.lanes, elements<Dot>(a.head_dim_v),
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
  auto shared = [](int64_t size, int64_t at, int64_t all) { return size == 1 ? Range{0, all} : Range{at, at + 1}; };
  Range batches = shared(x.size_batch, batch, all.batch), heads = shared(x.size_head, head, all.heads);
  Range tiles = shared(x.size_q, query_tile, query_tiles(all));
  Range key_tiles = shared(x.size_k, key_tile, (all.seq_k + BLOCK_N - 1) / BLOCK_N);
  float* sum = scratch.take(BLOCK_N * BLOCK_M);
  for (int64_t i = 0; i < BLOCK_N * BLOCK_M; i++) sum[i] = 0;
  for (int64_t b = batches.begin; b < batches.end; b++) {
    const Attention a = sequence(all, b);
    for (int64_t h = heads.begin; h < heads.end; h++)
      for (int64_t tile = tiles.begin; tile < tiles.end; tile++) {
        Range rows = {tile * BLOCK_M, min(query_end(a, b), (tile + 1) * BLOCK_M)};
        if (rows.begin >= rows.end) continue;
        Range sees = visible_keys(a, rows, b);
        for (int64_t j = key_tiles.begin; j < key_tiles.end; j++) {
          Range keys = {max(sees.begin, j * BLOCK_N), min(sees.end, (j + 1) * BLOCK_N)};
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
