// Attention forward. Queries lie along the vector lanes: with scores as S[key][query], the maximum, the exponential
// and the sum of a softmax are plain vector operations, and a tail of keys needs no mask. Keys and values stay in their
// natural layout; of a tile of queries only q is transposed, once.
//
//   S = K Q^T,  P = exp(S - m),  O^T = alpha O^T + V^T P
//
// Dao, "FlashAttention-2" (2023), arXiv:2307.08691.
#include "forward_tile.h"
#include "kernels.h"

namespace flashattn {
namespace FLASHATTN_ISA {

template <class Dot>
static void forward(const Attention& a, const Tile& tile, Scratch scratch) {
  ForwardTile t = load_forward_tile<Dot>(a, tile, scratch);
  for_each_part<Dot>(a, t, [&](const Part& part) {
    int64_t n = part.keys.end - part.keys.begin;
    float* scores = t.s + part.from;
    Softmax softmax = t.softmax.from(part.from);
    Matrix k = gather_rows(a, a.k, a.head_dim, tile.batch, t.kv_head, part.keys, t.page_copy);
    compute_scores<Dot>(a, t, part, pack_a_rows<Dot>(k, {0, n}, t.k_packed), {});
    with_dropout(a, t, part, [&](auto drop) { online_softmax<Dot>(scores, n, t.lanes, part.width, softmax, drop); });
    Matrix v = gather_rows(a, a.v, a.head_dim_v, tile.batch, t.kv_head, part.keys, t.page_copy);
    matmul<Dot>(pack_a_transposed<Dot>(v, {0, n}, t.v_packed), scores, t.lanes, a.head_dim_v, part.width,
                k_lanes<Dot>(n), rescale_and_add(t.out_t + part.from, t.lanes, softmax.alpha));
  });
  finish_softmax(a, t);
  store_output(a, t, a.out, t.out_t);
}

int64_t forward_tiles(const Attention& a) { return is_decode(a) ? 0 : query_slots(a); }

size_t forward_scratch(const Attention& a) { return forward_tile_floats(a); }

void forward_tile(const Attention& all, int64_t slot, float* memory) {
  Tile tile = query_tile(all, slot);
  if (tile.rows.begin >= tile.rows.end) return;
  const Attention a = batch_row_view(all, tile.batch);
  with_dot(a.dtype, [&](auto dot) { forward<decltype(dot)>(a, tile, {memory}); });
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
