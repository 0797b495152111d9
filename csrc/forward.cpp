// Attention forward. Queries lie along the vector lanes: with scores as S[key][query], the maximum, the exponential
// and the sum of a softmax are plain vector operations, and a tail of keys needs no mask. Keys and values stay in their
// natural layout; of a tile of queries only q is transposed, once.
//
//   S = K Q^T,  P = exp(S - m),  O^T = alpha O^T + V^T P
//
// Dao, "FlashAttention-2" (2023), arXiv:2307.08691.
#include "kernels.h"
#include "modify.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t GROUP = 2 * W;  // lanes of an edge tile that are treated together

// The running softmax of a tile of queries, one number a lane.
struct Softmax {
  float *m, *l, *alpha;
};

// Turn scores S[n][lanes], of which `width` lanes count, into weights, elements along keys, in place. softmax.m holds
// the new maximum, softmax.alpha the old one; it becomes the factor by which what was summed before is rescaled.
// A weight goes through drop(i)(weight, key), i its lane, once it has been added to the sum.
template <class Dot, class Drop>
INLINE void online_softmax(float* s, int64_t n, int64_t lanes, int64_t width, Softmax softmax, Drop drop) {
  for (int64_t i = 0; i < width; i += W) {
    vf m = load<vf>(softmax.m + i);
    vf shift = m == -__builtin_inff() ? vf{} : m;  // no key yet: weights 0, not NaN
    vf alpha = exp2((load<vf>(softmax.alpha + i) - shift) * LOG2E);
    vf l[4] = {};  // four short sums are more exact than one long one
    float* at = s + i;
    auto dropped = drop(i);
    auto weight = [&](float* score, int64_t j, vf& sum) {
      vf p = exp2<Dot::EXP_DEGREE>((load<vf>(score) - shift) * LOG2E);
      sum += p;
      return dropped(p, j);
    };
    int64_t j = 0;
    if constexpr (Dot::DEPTH == 1) {
      for (; j + 4 <= n; j += 4)
        UNROLL for (int r = 0; r < 4; r++, at += lanes) store(at, weight(at, j + r, l[r]));
      for (; j < n; j++, at += lanes) store(at, weight(at, j, l[0]));
    } else {
      float* to = at;
      for (; j + 4 <= n; j += 4)
        UNROLL for (int r = 0; r < 4; r += 2, at += 2 * lanes, to += lanes) {
          vf even = weight(at, j + r, l[r]);
          store(to, Dot::of(even, weight(at + lanes, j + r + 1, l[r + 1])));
        }
      for (; j < n; j += 2, at += 2 * lanes, to += lanes) {
        vf even = weight(at, j, l[0]);
        store(to, Dot::of(even, j + 1 < n ? weight(at + lanes, j + 1, l[1]) : vf{}));
      }
    }
    store(softmax.l + i, load<vf>(softmax.l + i) * alpha + ((l[0] + l[1]) + (l[2] + l[3])));
    store(softmax.alpha + i, alpha);
  }
}

template <class Dot>
static void forward(const Attention& a, const Tile& tile, Scratch scratch) {
  constexpr int64_t BLOCK_N = FORWARD_BLOCK_N * Dot::DEPTH;
  int64_t kv_head = tile.head / (a.heads / a.kv_heads);
  int64_t lanes = round_up(tile.rows.end - tile.rows.begin, W);
  float* q_t = scratch.take(round_up(elements<Dot>(a.head_dim), W) * BLOCK_M);
  float* out_t = scratch.take(a.head_dim_v * BLOCK_M);
  float* s = scratch.take(BLOCK_N * BLOCK_M);
  float* k_packed = scratch.take(BLOCK_N * round_up(elements<Dot>(a.head_dim), W));
  float* v_packed = scratch.take(BLOCK_N / Dot::DEPTH * round_up(a.head_dim_v, W));
  float* copy = a.pages.table ? scratch.take(BLOCK_N * max(a.head_dim, a.head_dim_v)) : nullptr;
  Softmax softmax = {scratch.take(BLOCK_M), scratch.take(BLOCK_M), scratch.take(BLOCK_M)};
  Planes planes = take_planes(a, scratch, BLOCK_N);

  Range valid = {tile.rows.begin, min(tile.rows.end, query_end(a, tile.batch))};
  pack_transposed<Dot>(matrix(a.q, a.dtype, a.head_dim, tile.batch, tile.head), valid, lanes, q_t);
  for (int64_t i = 0; i < a.head_dim_v * lanes; i++) out_t[i] = 0;
  for (int64_t i = 0; i < lanes; i++) softmax.m[i] = -__builtin_inff(), softmax.l[i] = 0;

  const float scale = a.score.scale;
  const bool modified = is_modified(a);
  // Lanes from .. from + width of the tile look at some keys.
  auto step = [&](Range keys, int64_t from, int64_t width, bool edge) {
    int64_t n = keys.end - keys.begin;
    float* scores = s + from;
    Softmax part = {softmax.m + from, softmax.l + from, softmax.alpha + from};
    for (int64_t i = 0; i < width; i++) part.alpha[i] = part.m[i];
    Matrix k = dense_rows(a, a.k, a.head_dim, tile.batch, kv_head, keys, copy);
    matmul<Dot>(left_rows<Dot>(k, {0, n}, k_packed), q_t + from, lanes, n, width, elements<Dot>(a.head_dim),
                [=](auto& c, int64_t row, int64_t col) {
                  vf top[c.VECS];
                  UNROLL for (int i = 0; i < c.VECS; i++) top[i] = load<vf>(part.m + col + i * W);
                  c.each([&](int r, int i, vf x) {
                    x *= scale;
                    top[i] = max(top[i], x);
                    store(scores + (row + r) * lanes + col + i * W, x);
                  });
                  if (edge || modified) return;  // the maximum is that of what the scores become
                  UNROLL for (int i = 0; i < c.VECS; i++) store(part.m + col + i * W, top[i]);
                });
    if (edge || modified) {
      Spot at = {tile.batch, tile.head, tile.rows.begin + from, width};
      modify<Dot>(a, at, keys, edge, planes, scores, lanes, nullptr, part.m);
    }
    if (a.score.dropout.scale == 0)
      online_softmax<Dot>(scores, n, lanes, width, part, [](int64_t) { return [](vf p, int64_t) { return p; }; });
    else
      online_softmax<Dot>(scores, n, lanes, width, part, [&](int64_t i) {
        KeptWeights kept(a, {tile.batch, tile.head, tile.rows.begin + from + i, W});
        return [kept, keys](vf p, int64_t j) mutable { return p * kept.at(keys.begin + j); };
      });
    Matrix v = dense_rows(a, a.v, a.head_dim_v, tile.batch, kv_head, keys, copy);
    matmul<Dot>(left_columns<Dot>(v, {0, n}, v_packed), scores, lanes, a.head_dim_v, width, elements<Dot>(n),
                [=](auto& c, int64_t row, int64_t col) {
                  c.each([=](int r, int i, vf x) {
                    float* at = out_t + (row + r) * lanes + from + col + i * W;
                    store(at, load<vf>(at) * load<vf>(part.alpha + col + i * W) + x);
                  });
                });
  };

  Range all = visible_keys(a, tile.rows, tile.batch);
  for (int64_t start = all.begin; start < all.end; start += BLOCK_N) {
    Range keys = {start, min(all.end, start + BLOCK_N)};
    if (!is_edge(a, tile.rows, keys)) {
      step(keys, 0, lanes, false);
      continue;
    }
    // Of an edge tile, narrow groups of lanes skip the keys that none of their queries sees.
    for (int64_t from = 0; from < lanes; from += GROUP) {
      int64_t width = min(GROUP, lanes - from);
      Range queries = {tile.rows.begin + from, tile.rows.begin + from + width};
      Range sees = visible_keys(a, queries, tile.batch);
      sees = {max(keys.begin, sees.begin), min(keys.end, sees.end)};
      if (sees.begin < sees.end) step(sees, from, width, true);
    }
  }

  int64_t first = statistics_at(a, tile.batch, tile.head) + tile.rows.begin;
  for (int64_t i = 0; i < tile.rows.end - tile.rows.begin; i++) {
    float l = tile.rows.begin + i < valid.end ? softmax.l[i] : 0;
    float factor = a.score.sinks ? join_sink(a.score.sinks[tile.head], softmax.m[i], l) : 1;
    softmax.alpha[i] = l > 0 || l != l ? factor / l : 0;
    store_lse(a, first + i, softmax.m[i], l);
  }
  store_transposed(matrix(a.out, a.dtype, a.head_dim_v, tile.batch, tile.head), tile.rows, valid.end, out_t, lanes,
                   softmax.alpha);
}

int64_t forward_tiles(const Attention& a) {
  return is_decode(a) ? 0 : query_slots(a);
}

size_t forward_scratch(const Attention& a) {
  int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), n = FORWARD_BLOCK_N * MAX_DEPTH;
  return BLOCK_M * (d + dv + n) + n * d + FORWARD_BLOCK_N * dv + 3 * BLOCK_M + planes_floats(a, n) + 9 * 16 +
         (a.pages.table ? n * max(a.head_dim, a.head_dim_v) : 0);
}

void forward_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  if (tile.rows.begin >= tile.rows.end) return;
  const Attention a = sequence(all, tile.batch);
  with_dot(a.dtype, [&](auto dot) { forward<decltype(dot)>(a, tile, {memory}); });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
