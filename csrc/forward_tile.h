// What forward.cpp and jvp.cpp share: the queries of a tile against the keys they attend to, a tile at a time.
#pragma once

#include <type_traits>

#include "score_mods.h"
#include "softmax.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t BLOCK_N = 96;           // 32-bit lanes along the keys of a tile
constexpr int64_t PARTIAL_LANES = 2 * W;  // queries of a partial tile that are computed together

// A tile of queries: q as an operand, the running softmax and output O^T, and memory for a tile of scores.
struct ForwardTile {
  Tile tile;
  Range valid;  // the queries before the length
  int64_t kv_head, lanes;
  float *q_t, *out_t, *s, *k_packed, *v_packed, *page_copy;
  Softmax softmax;
  BiasMask bias_mask;
};

template <class Dot>
static ForwardTile load_forward_tile(const Attention& a, const Tile& tile, Scratch& scratch) {
  constexpr int64_t KEYS = BLOCK_N * Dot::K_PER_LANE;
  ForwardTile t = {tile, {tile.rows.begin, min(tile.rows.end, query_end(a, tile.batch))}};
  t.kv_head = tile.head / (a.heads / a.kv_heads);
  t.lanes = round_up(tile.rows.end - tile.rows.begin, W);
  t.q_t = scratch.take(round_up(k_lanes<Dot>(a.head_dim), W) * BLOCK_M);
  t.out_t = scratch.take(a.head_dim_v * BLOCK_M);
  t.s = scratch.take(KEYS * BLOCK_M);
  t.k_packed = scratch.take(KEYS * round_up(k_lanes<Dot>(a.head_dim), W));
  t.v_packed = scratch.take(KEYS / Dot::K_PER_LANE * round_up(a.head_dim_v, W));
  t.page_copy = a.pages.table ? scratch.take(KEYS * max(a.head_dim, a.head_dim_v)) : nullptr;
  t.softmax = {scratch.take(BLOCK_M), scratch.take(BLOCK_M), scratch.take(BLOCK_M)};
  t.bias_mask = take_bias_mask(a, scratch, KEYS);
  pack_b_transposed<Dot>(matrix(a.q, a.dtype, a.head_dim, tile.batch, tile.head), t.valid, t.lanes, t.q_t);
  for (int64_t i = 0; i < a.head_dim_v * t.lanes; i++) t.out_t[i] = 0;
  for (int64_t i = 0; i < t.lanes; i++) t.softmax.m[i] = NEG_INF, t.softmax.l[i] = 0;
  return t;
}

static inline size_t forward_tile_floats(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), n = BLOCK_N * MAX_K_PER_LANE;
  return BLOCK_M * (d + dv + n) + n * d + BLOCK_N * dv + 3 * BLOCK_M + bias_mask_floats(a, n) + 9 * 16 +
         (a.pages.table ? n * max(a.head_dim, a.head_dim_v) : 0);
}

// Lanes from .. from + width of a tile of queries, and a tile of keys, some of which they attend to.
struct Part {
  Range keys;
  int64_t from, width;
  bool partial;  // in_window masks some pairs
};

template <class Dot, class F>
FLASHATTN_INLINE void for_each_part(const Attention& a, const ForwardTile& t, F attend) {
  constexpr int64_t KEYS = BLOCK_N * Dot::K_PER_LANE;
  const Tile& tile = t.tile;
  Range all = key_range(a, tile.rows, tile.batch);
  for (int64_t start = all.begin; start < all.end; start += KEYS) {
    Range keys = {start, min(all.end, start + KEYS)};
    if (!is_partial(a, tile.rows, keys)) {
      attend(Part{keys, 0, t.lanes, false});
      continue;
    }
    // Of a partial tile, narrow groups of lanes skip the keys that none of their queries attends to.
    for (int64_t from = 0; from < t.lanes; from += PARTIAL_LANES) {
      int64_t width = min(PARTIAL_LANES, t.lanes - from);
      Range queries = {tile.rows.begin + from, tile.rows.begin + from + width};
      Range attended = key_range(a, queries, tile.batch);
      attended = {max(keys.begin, attended.begin), min(keys.end, attended.end)};
      if (attended.begin < attended.end) attend(Part{attended, from, width, true});
    }
  }
}

// The scores of a part. The maxima of the softmax are raised to theirs, and the old ones are left in alpha.
template <class Dot>
FLASHATTN_INLINE void compute_scores(const Attention& a, const ForwardTile& t, const Part& part, PackedA k,
                                     SoftcapDerivatives softcap) {
  int64_t lanes = t.lanes;
  float *scores = t.s + part.from, *m = t.softmax.m + part.from, *alpha = t.softmax.alpha + part.from;
  const float scale = a.score.scale;
  const bool has_mods = part.partial || has_score_mods(a);
  for (int64_t i = 0; i < part.width; i++) alpha[i] = m[i];
  matmul<Dot>(k, t.q_t + part.from, lanes, part.keys.end - part.keys.begin, part.width, k_lanes<Dot>(a.head_dim),
              [=](auto& c, int64_t row, int64_t col) {
                constexpr int VECS = std::remove_reference_t<decltype(c)>::VECS;
                vf top[VECS];
                FLASHATTN_UNROLL for (int i = 0; i < VECS; i++) top[i] = load<vf>(m + col + i * W);
                c.for_each([&](int r, int i, vf x) {
                  x *= scale;
                  top[i] = max(top[i], x);
                  store(scores + (row + r) * lanes + col + i * W, x);
                });
                if (has_mods) return;  // apply_score_mods computes the maximum
                FLASHATTN_UNROLL for (int i = 0; i < VECS; i++) store(m + col + i * W, top[i]);
              });
  if (!has_mods) return;
  TileCoord at = {t.tile.batch, t.tile.head, t.tile.rows.begin + part.from, part.width};
  apply_score_mods<Dot>(a, at, part.keys, part.partial, t.bias_mask, scores, lanes, softcap, m);
}

// f(drop), where drop(i) is what dropout does to the weights of lanes i .. i + W of a part.
template <class F>
FLASHATTN_INLINE void with_dropout(const Attention& a, const ForwardTile& t, const Part& part, F f) {
  if (a.score.dropout.scale == 0) return f([](int64_t) { return KeepWeights{}; });
  f([&](int64_t i) {
    TileCoord at = {t.tile.batch, t.tile.head, t.tile.rows.begin + part.from + i, W};
    return DropWeights{DropoutMultipliers(a, at), part.keys.begin};
  });
}

// An epilogue: C^T = alpha C^T + the product, alpha for each lane.
static inline auto rescale_and_add(float* c_t, int64_t lanes, const float* alpha) {
  return [=](auto& tile, int64_t row, int64_t col) {
    tile.for_each([=](int r, int i, vf x) {
      float* at = c_t + (row + r) * lanes + col + i * W;
      store(at, load<vf>(at) * load<vf>(alpha + col + i * W) + x);
    });
  };
}

// Add the sink, store lse, and leave the sum l of each query, 0 if it attends to nothing, and in alpha the factor of
// its output.
static inline void finish_softmax(const Attention& a, const ForwardTile& t) {
  const Softmax& softmax = t.softmax;
  int64_t first = lse_offset(a, t.tile.batch, t.tile.head) + t.tile.rows.begin;
  for (int64_t i = 0; i < t.tile.rows.end - t.tile.rows.begin; i++) {
    float l = t.tile.rows.begin + i < t.valid.end ? softmax.l[i] : 0;
    float factor = a.score.sinks ? add_sink(a.score.sinks[t.tile.head], softmax.m[i], l) : 1;
    softmax.l[i] = l;
    softmax.alpha[i] = l > 0 || l != l ? factor / l : 0;
    store_lse(a, first + i, softmax.m[i], l);
  }
}

// Write a running sum like O^T, times the factors in alpha, as rows of x.
static inline void store_output(const Attention& a, const ForwardTile& t, const Heads& x, const float* out_t) {
  store_transposed(matrix(x, a.dtype, a.head_dim_v, t.tile.batch, t.tile.head), t.tile.rows, t.valid.end, out_t,
                   t.lanes, t.softmax.alpha);
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
