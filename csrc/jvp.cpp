// The forward-mode derivative of attention, in one pass with attention itself. With x = scale q.k, the softcap f and
// dropout multipliers d,
//
//   tangent_x = scale (tangent_q.k + q.tangent_k),  ts = f' tangent_x + tangent_bias
//   mu = tangent_lse = sum_j P ts + p_sink tangent_sink
//   tangent_out = sum_j d P (ts v + tangent_v) - mu out
//
// The sums run online like those of forward.cpp, in its layout: T = K Qt^T + Kt Q^T (t for tangents),
// Ot^T = alpha Ot^T + V^T (P (ts - c)) + Vt^T P. Any c of a query's own gives the same derivative, because the weights
// sum to one; near mu it takes what would cancel out of the rounded weights.
#include "forward_tile.h"
#include "kernels.h"

namespace flashattn {
namespace FLASHATTN_ISA {

// The tangents of a tile of queries, and memory for those of a tile of scores.
struct TangentTile {
  float *q_t, *out_t, *ts, *k_packed, *v_packed, *bias, *softcap;
  float *c, *mu;  // mu: the sum of P (ts - c)
};

template <class Dot>
static TangentTile load_tangents(const Attention& a, const ForwardTile& t, Scratch& scratch) {
  constexpr int64_t KEYS = BLOCK_N * Dot::K_PER_LANE;
  TangentTile x = {};
  x.q_t = scratch.take(round_up(k_lanes<Dot>(a.head_dim), W) * BLOCK_M);
  x.out_t = scratch.take(a.head_dim_v * BLOCK_M);
  x.ts = scratch.take(KEYS * BLOCK_M);
  x.k_packed = scratch.take(KEYS * round_up(k_lanes<Dot>(a.head_dim), W));
  x.v_packed = scratch.take(KEYS / Dot::K_PER_LANE * round_up(a.head_dim_v, W));
  x.bias = take_bias(a.tangent.bias, scratch, KEYS);
  x.softcap = a.score.softcap != 0 ? scratch.take(KEYS * BLOCK_M) : nullptr;
  x.c = scratch.take(BLOCK_M);
  x.mu = scratch.take(BLOCK_M);
  if (a.tangent.q.data)
    pack_b_transposed<Dot>(matrix(a.tangent.q, a.dtype, a.head_dim, t.tile.batch, t.tile.head), t.valid, t.lanes,
                           x.q_t);
  for (int64_t i = 0; i < a.head_dim_v * t.lanes; i++) x.out_t[i] = 0;
  for (int64_t i = 0; i < t.lanes; i++) x.c[i] = x.mu[i] = 0;
  return x;
}

// c of the queries for which this part has the first keys: the mean of its ts under its weights.
static void choose_c(const ForwardTile& t, const Part& part, const TangentTile& x) {
  for (int64_t i = part.from; i < part.from + part.width; i += W) {
    vf m = load<vf>(t.softmax.m + i), m_before = load<vf>(t.softmax.alpha + i), l = {}, sum = {};
    bool has_first = false;
    for (int64_t lane = 0; lane < W; lane++) has_first |= m_before[lane] == NEG_INF;
    if (!has_first) continue;
    for (int64_t at = i; at < (part.keys.end - part.keys.begin) * t.lanes; at += t.lanes) {
      vf p = exp2<4>((load<vf>(t.s + at) - m) * LOG2E);
      l += p;
      sum += p * load<vf>(x.ts + at);
    }
    vf c = m == NEG_INF ? vf{} : sum / l;  // still no key: 0
    store(x.c + i, m_before == NEG_INF ? c : load<vf>(x.c + i));
  }
}

// What online_softmax does to the weights of W queries: besides `drop`, turn ts into d P (ts - c) in place, packed
// along keys as B, and sum P (ts - c).
template <class Dot, class Drop>
struct TangentWeights {
  Drop drop;
  float* ts;
  int64_t lanes, n;
  vf c;
  float* mu;
  vf sums[4] = {}, even = {};

  vf operator()(vf p, int64_t j, int r) {
    vf t = load<vf>(ts + j * lanes) - c;
    sums[r] += p * t;
    p = drop(p, j, r);
    if constexpr (Dot::K_PER_LANE == 1)
      store(ts + j * lanes, p * t);
    else if (r % 2 == 0)
      even = p * t;
    else
      store(ts + j / 2 * lanes, Dot::pack_pairs(even, p * t));
    return p;
  }
  void finish(vf alpha) const {
    if constexpr (Dot::K_PER_LANE == 2)
      if (n % 2) store(ts + n / 2 * lanes, Dot::pack_pairs(even, vf{}));
    store(mu, load<vf>(mu) * alpha + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
};

template <class Dot>
static void attend(const Attention& a, const ForwardTile& t, const TangentTile& x, const Part& part) {
  const Tangents& tangent = a.tangent;
  int64_t n = part.keys.end - part.keys.begin, lanes = t.lanes, from = part.from;
  int64_t depth = k_lanes<Dot>(a.head_dim), keys = k_lanes<Dot>(n);
  Softmax softmax = t.softmax.from(from);
  auto rows = [&](const Heads& h, int64_t dim) { return matrix(h, a.dtype, dim, t.tile.batch, t.kv_head); };

  PackedA k = pack_a_rows<Dot>(rows(a.k, a.head_dim), part.keys, t.k_packed), k_tangent = k;
  if (tangent.k.data) k_tangent = pack_a_rows<Dot>(rows(tangent.k, a.head_dim), part.keys, x.k_packed);
  SoftcapDerivatives softcap = {x.softcap ? x.softcap + from : nullptr};
  compute_scores<Dot>(a, t, part, k, softcap);
  float* ts = x.ts + from;
  matmul_sum<Dot>(n, part.width, store_scaled_to(ts, lanes, a.score.scale),
                  Product{k, {x.q_t + from, lanes}, tangent.q.data ? depth : 0},
                  Product{k_tangent, {t.q_t + from, lanes}, tangent.k.data ? depth : 0});
  TileCoord at = {t.tile.batch, t.tile.head, t.tile.rows.begin + from, part.width};
  if (part.partial || has_score_mods(a)) apply_tangent_mods(a, at, part.keys, x.bias, t.s + from, ts, lanes, softcap);

  choose_c(t, part, x);
  with_dropout(a, t, part, [&](auto drop) {
    online_softmax<Dot>(t.s + from, n, lanes, part.width, softmax, [&](int64_t i) {
      vf c = load<vf>(x.c + from + i);
      return TangentWeights<Dot, decltype(drop(i))>{drop(i), ts + i, lanes, n, c, x.mu + from + i};
    });
  });
  PackedA v = pack_a_transposed<Dot>(rows(a.v, a.head_dim_v), part.keys, t.v_packed), v_tangent = v;
  if (tangent.v.data) v_tangent = pack_a_transposed<Dot>(rows(tangent.v, a.head_dim_v), part.keys, x.v_packed);
  matmul<Dot>(v, t.s + from, lanes, a.head_dim_v, part.width, keys,
              rescale_and_add(t.out_t + from, lanes, softmax.alpha));
  bool has_score_tangents = tangent.q.data || tangent.k.data || tangent.bias.data;
  matmul_sum<Dot>(a.head_dim_v, part.width, rescale_and_add(x.out_t + from, lanes, softmax.alpha),
                  Product{v, {ts, lanes}, has_score_tangents ? keys : 0},
                  Product{v_tangent, {t.s + from, lanes}, tangent.v.data ? keys : 0});
}

// tangent_lse = mu, and Ot^T -= (mu - c) O^T.
static void finish_tangents(const Attention& a, const ForwardTile& t, const TangentTile& x) {
  float* tangent_lse = a.tangent.lse + lse_offset(a, t.tile.batch, t.tile.head) + t.tile.rows.begin;
  for (int64_t i = 0; i < t.tile.rows.end - t.tile.rows.begin; i++) {
    float mu = x.mu[i] * t.softmax.alpha[i], l = t.softmax.l[i];  // of ts - c
    if (a.score.sinks && l != 0) {
      float tangent = a.tangent.sinks ? a.tangent.sinks[t.tile.head] : 0;
      mu += __builtin_expf(a.score.sinks[t.tile.head] - t.softmax.m[i]) / l * (tangent - x.c[i]);
    }
    x.mu[i] = mu;
    tangent_lse[i] = l == 0 ? 0 : mu + x.c[i];
  }
  for (int64_t c = 0; c < a.head_dim_v; c++)
    for (int64_t i = 0; i < t.lanes; i += W) {
      float* at = x.out_t + c * t.lanes + i;
      store(at, load<vf>(at) - load<vf>(x.mu + i) * load<vf>(t.out_t + c * t.lanes + i));
    }
}

template <class Dot>
static void jvp(const Attention& a, const Tile& tile, Scratch scratch) {
  ForwardTile t = load_forward_tile<Dot>(a, tile, scratch);
  TangentTile x = load_tangents<Dot>(a, t, scratch);
  for_each_part<Dot>(a, t, [&](const Part& part) { attend<Dot>(a, t, x, part); });
  finish_softmax(a, t);
  finish_tangents(a, t, x);
  store_output(a, t, a.out, t.out_t);
  store_output(a, t, a.tangent.out, x.out_t);
}

int64_t jvp_tiles(const Attention& a) { return query_slots(a); }

size_t jvp_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), n = BLOCK_N * MAX_K_PER_LANE;
  return forward_tile_floats(a) + BLOCK_M * (d + dv + n) + n * d + BLOCK_N * dv + 2 * BLOCK_M + 9 * 16 +
         (a.tangent.bias.data ? (n + W) * BLOCK_M : 0) + (a.score.softcap != 0 ? n * BLOCK_M : 0);
}

void jvp_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  if (tile.rows.begin >= tile.rows.end) return;
  const Attention a = batch_row_view(all, tile.batch);
  with_dot(a.dtype, [&](auto dot) { jvp<decltype(dot)>(a, tile, {memory}); });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
