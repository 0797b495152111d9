// Which kernel computes a forward pass, and the order of its tiles of queries.
#pragma once

#include "score.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t BLOCK_M = 64;  // queries of a tile

// Whether decode.cpp computes the call. More queries fill the lanes of forward.cpp, which alone applies score mods and
// dropout.
static inline bool is_decode(const Attention& a) {
  return a.seq_q <= 8 && !has_score_mods(a) && a.score.dropout.scale == 0;
}

// The queries of a head that a tile owns.
struct Tile {
  int64_t batch, head;
  Range rows;
};

// Slots number the tiles of queries, head after head. Packed sequences share the slots of a head: those of batch row b
// begin at q_starts[b] / BLOCK_M + b, which leaves room for all its tiles, and the last may stay empty.
static inline int64_t slots_of_head(const Attention& a) {
  return a.packing.q_starts ? a.packing.total_q / BLOCK_M + a.batch : (a.seq_q + BLOCK_M - 1) / BLOCK_M;
}
static inline int64_t first_slot(const Attention& a, int64_t batch) {
  return a.packing.q_starts ? a.packing.q_starts[batch] / BLOCK_M + batch : 0;
}
static inline int64_t query_slots(const Attention& a) {
  return slots_of_head(a) * a.heads * (a.packing.q_starts ? 1 : a.batch);
}
static inline int64_t query_slot(const Attention& a, int64_t batch, int64_t head, int64_t query) {
  int64_t heads_before = a.packing.q_starts ? head : batch * a.heads + head;
  return heads_before * slots_of_head(a) + first_slot(a, batch) + query / BLOCK_M;
}

// The tile of a slot, without rows if the slot is empty. The last tiles of a sequence come first: under a causal mask
// they take longest, and threads should finish together.
static inline Tile query_tile(const Attention& a, int64_t slot) {
  int64_t slots = slots_of_head(a), head = slot / slots, tile = slot % slots;
  if (!a.packing.q_starts) {
    tile = (slots - 1 - tile) * BLOCK_M;
    return {head / a.heads, head % a.heads, {tile, min(a.seq_q, tile + BLOCK_M)}};
  }
  int64_t batch = 0;  // the last whose first slot is at or before this one
  for (int64_t step = a.batch; step > 0; step /= 2)
    while (batch + step < a.batch && first_slot(a, batch + step) <= tile) batch += step;
  int64_t seq_q = a.packing.q_starts[batch + 1] - a.packing.q_starts[batch];
  tile = ((seq_q + BLOCK_M - 1) / BLOCK_M - 1 - (tile - first_slot(a, batch))) * BLOCK_M;
  if (tile < 0) return {batch, head, {0, 0}};
  return {batch, head, {tile, min(seq_q, tile + BLOCK_M)}};
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
