// Attention forward. Queries lie along the vector lanes: with scores as S[key][query], the maximum, the exponential
// and the sum of a softmax are plain vector operations, and a tail of keys needs no mask. Keys and values stay in their
// natural layout; of a tile of queries only q is transposed, once.
//
//   S = K Q^T,  P = exp(S - m),  O^T = alpha O^T + V^T P
//
// Dao, "FlashAttention-2" (2023), arXiv:2307.08691.
#include <type_traits>

#include "kernels.h"
#include "score_mods.h"
#include "softmax.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t BLOCK_N = 96;           // 32-bit lanes along the keys of a tile
constexpr int64_t PARTIAL_LANES = 2 * W;  // queries of a partial tile that are computed together

template <class Dot>
static void forward(const Attention& a, const Tile& tile, Scratch scratch) {
  constexpr int64_t KEYS = BLOCK_N * Dot::K_PER_LANE;
  int64_t kv_head = tile.head / (a.heads / a.kv_heads);
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W);
  float* q_t = scratch.take(round_up(k_lanes<Dot>(a.head_dim), W) * BLOCK_M);
  float* out_t = scratch.take(a.head_dim_v * BLOCK_M);
  float* s = scratch.take(KEYS * BLOCK_M);
  float* k_packed = scratch.take(KEYS * round_up(k_lanes<Dot>(a.head_dim), W));
  float* v_packed = scratch.take(KEYS / Dot::K_PER_LANE * round_up(a.head_dim_v, W));
  float* page_copy = a.pages.table ? scratch.take(KEYS * max(a.head_dim, a.head_dim_v)) : nullptr;
  Softmax softmax = {scratch.take(BLOCK_M), scratch.take(BLOCK_M), scratch.take(BLOCK_M)};
  BiasMask bias_mask = take_bias_mask(a, scratch, KEYS);

  Range valid = {tile.rows.begin, min(tile.rows.end, query_end(a, tile.batch))};
  pack_b_transposed<Dot>(matrix(a.q, a.dtype, a.head_dim, tile.batch, tile.head), valid, lanes, q_t);
  for (int64_t i = 0; i < a.head_dim_v * lanes; i++) out_t[i] = 0;
  for (int64_t i = 0; i < lanes; i++) softmax.m[i] = NEG_INF, softmax.l[i] = 0;

  const float scale = a.score.scale;
  const bool has_mods = has_score_mods(a);
  // Lanes from .. from + width of the tile attend to some keys.
  auto attend_tile = [&](Range keys, int64_t from, int64_t width, bool partial) {
    int64_t n = keys.end - keys.begin;
    float* scores = s + from;
    Softmax part = {softmax.m + from, softmax.l + from, softmax.alpha + from};
    for (int64_t i = 0; i < width; i++) part.alpha[i] = part.m[i];
    Matrix k = gather_rows(a, a.k, a.head_dim, tile.batch, kv_head, keys, page_copy);
    matmul<Dot>(pack_a_rows<Dot>(k, {0, n}, k_packed), q_t + from, lanes, n, width, k_lanes<Dot>(a.head_dim),
                [=](auto& c, int64_t row, int64_t col) {
                  constexpr int VECS = std::remove_reference_t<decltype(c)>::VECS;
                  vf top[VECS];
                  FLASHATTN_UNROLL for (int i = 0; i < VECS; i++) top[i] = load<vf>(part.m + col + i * W);
                  c.for_each([&](int r, int i, vf x) {
                    x *= scale;
                    top[i] = max(top[i], x);
                    store(scores + (row + r) * lanes + col + i * W, x);
                  });
                  if (partial || has_mods) return;  // apply_score_mods computes the maximum
                  FLASHATTN_UNROLL for (int i = 0; i < VECS; i++) store(part.m + col + i * W, top[i]);
                });
    if (partial || has_mods) {
      TileCoord at = {tile.batch, tile.head, tile.rows.begin + from, width};
      apply_score_mods<Dot>(a, at, keys, partial, bias_mask, scores, lanes, nullptr, part.m);
    }
    if (a.score.dropout.scale == 0)
      online_softmax<Dot>(scores, n, lanes, width, part, [](int64_t) { return [](vf p, int64_t) { return p; }; });
    else
      online_softmax<Dot>(scores, n, lanes, width, part, [&](int64_t i) {
        DropoutMultipliers multipliers(a, {tile.batch, tile.head, tile.rows.begin + from + i, W});
        return [multipliers, keys](vf p, int64_t j) mutable { return p * multipliers.at(keys.begin + j); };
      });
    Matrix v = gather_rows(a, a.v, a.head_dim_v, tile.batch, kv_head, keys, page_copy);
    matmul<Dot>(pack_a_transposed<Dot>(v, {0, n}, v_packed), scores, lanes, a.head_dim_v, width, k_lanes<Dot>(n),
                [=](auto& c, int64_t row, int64_t col) {
                  c.for_each([=](int r, int i, vf x) {
                    float* at = out_t + (row + r) * lanes + from + col + i * W;
                    store(at, load<vf>(at) * load<vf>(part.alpha + col + i * W) + x);
                  });
                });
  };

  Range all = key_range(a, tile.rows, tile.batch);
  for (int64_t start = all.begin; start < all.end; start += KEYS) {
    Range keys = {start, min(all.end, start + KEYS)};
    if (!is_partial(a, tile.rows, keys)) {
      attend_tile(keys, 0, lanes, false);
      continue;
    }
    // Of a partial tile, narrow groups of lanes skip the keys that none of their queries attends to.
    for (int64_t from = 0; from < lanes; from += PARTIAL_LANES) {
      int64_t width = min(PARTIAL_LANES, lanes - from);
      Range queries = {tile.rows.begin + from, tile.rows.begin + from + width};
      Range attended = key_range(a, queries, tile.batch);
      attended = {max(keys.begin, attended.begin), min(keys.end, attended.end)};
      if (attended.begin < attended.end) attend_tile(attended, from, width, true);
    }
  }

  int64_t first = lse_offset(a, tile.batch, tile.head) + tile.rows.begin;
  for (int64_t i = 0; i < tile.rows.end - tile.rows.begin; i++) {
    float l = tile.rows.begin + i < valid.end ? softmax.l[i] : 0;
    float factor = a.score.sinks ? add_sink(a.score.sinks[tile.head], softmax.m[i], l) : 1;
    softmax.alpha[i] = l > 0 || l != l ? factor / l : 0;
    store_lse(a, first + i, softmax.m[i], l);
  }
  store_transposed(matrix(a.out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, valid.end, out_t, lanes,
                   softmax.alpha);
}

int64_t forward_tiles(const Attention& a) { return is_decode(a) ? 0 : query_slots(a); }

size_t forward_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), n = BLOCK_N * MAX_K_PER_LANE;
  return BLOCK_M * (d + dv + n) + n * d + BLOCK_N * dv + 3 * BLOCK_M + bias_mask_floats(a, n) + 9 * 16 +
         (a.pages.table ? n * max(a.head_dim, a.head_dim_v) : 0);
}

void forward_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  if (tile.rows.begin >= tile.rows.end) return;
  const Attention a = batch_row_view(all, tile.batch);
  with_dot(a.dtype, [&](auto dot) { forward<decltype(dot)>(a, tile, {memory}); });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
