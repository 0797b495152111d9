// Attention forward for few queries and a long cache, bound by the reading of keys and values: they are read once for
// all query heads that share them, elements of a row along the vector lanes, and the keys are split among the threads
// (split-KV); the splits merge exactly, by their maxima and sums.
//
// Splits are by position, so the result depends neither on the batch nor on the number of threads.
//
// Dao et al., "Flash-Decoding for long-context inference" (2023).
#include "gemv.h"
#include "kernels.h"
#include "schedule.h"
#include "softmax.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t SPLIT = 512;   // keys of a split
constexpr int64_t BLOCK_N = 64;  // keys of a tile

static int64_t group_size(const Attention& a) { return a.heads / a.kv_heads; }
// The queries of all heads of a group, as rows.
static int64_t rows_per_kv_head(const Attention& a) { return group_size(a) * a.seq_q; }
static int64_t num_splits(const Attention& a) { return max(1, (a.seq_k + SPLIT - 1) / SPLIT); }

// The softmax of a row over the keys of a split: maximum, sum, unnormalised output.
struct SplitResult {
  float *m, *l, *out;
};
static SplitResult split_result(const Attention& a, int64_t batch, int64_t kv_head, int64_t row, int64_t split) {
  int64_t at = ((batch * a.kv_heads + kv_head) * rows_per_kv_head(a) + row) * num_splits(a) + split;
  float* begin = a.workspace + at * (16 + round_up(a.head_dim_v, W));
  return {begin, begin + 1, begin + 16};
}
size_t forward_workspace(const Attention& a) {
  return is_decode(a) ? a.batch * a.heads * a.seq_q * num_splits(a) * (16 + round_up(a.head_dim_v, W)) : 0;
}

// COLS vectors of out[row] = alpha[row] out[row] + sum over n keys of p[row][key] v[key], from column c on; prefetches
// `next`.
template <Dtype DTYPE, int COLS, class Rows>
static void weighted_sum_columns(const float* p, const float* alpha, const Rows& v, int64_t n, int64_t c, float* out,
                                 int64_t width, const Rows& next) {
  vf sum[GEMV_ROWS][COLS] = {};
  for (int64_t j = 0; j < n; j++) {
    const char* row = v.row(j);
    vf x[COLS];
    FLASHATTN_UNROLL for (int i = 0; i < COLS; i++) {
      x[i] = load_as_f32<DTYPE>(row, c + i * W);
      __builtin_prefetch(next.row(j) + (c + i * W) * element_size(DTYPE), 0, 2);
    }
    FLASHATTN_UNROLL for (int r = 0; r < GEMV_ROWS; r++) {
      vf y = broadcast(p[r * BLOCK_N + j]);
      FLASHATTN_UNROLL for (int i = 0; i < COLS; i++) sum[r][i] += y * x[i];
    }
  }
  FLASHATTN_UNROLL for (int r = 0; r < GEMV_ROWS; r++) FLASHATTN_UNROLL for (int i = 0; i < COLS; i++) {
    float* at = out + r * width + c + i * W;
    store(at, load<vf>(at) * alpha[r] + sum[r][i]);
  }
}

template <Dtype DTYPE, class Rows>
static void weighted_sum(const float* p, const float* alpha, const Rows& v, int64_t n, float* out, int64_t width,
                         const Rows& next) {
  int64_t c = 0;
  if constexpr (W == 16)
    for (; c + 4 * W <= width; c += 4 * W) weighted_sum_columns<DTYPE, 4>(p, alpha, v, n, c, out, width, next);
  for (; c + 2 * W <= width; c += 2 * W) weighted_sum_columns<DTYPE, 2>(p, alpha, v, n, c, out, width, next);
}

// The address of each key or value of a tile: for pages.
struct RowPointers {
  const char* at[BLOCK_N];
  const char* row(int64_t i) const { return at[i]; }
};
// Rows keys.begin .. keys.begin + BLOCK_N, clamped to the last of keys.
static RowPointers row_pointers(const Attention& a, const Heads& x, int64_t batch, int64_t head, Range keys) {
  RowPointers rows;
  int64_t page = -1;
  for (int64_t i = 0; i < BLOCK_N; i++) {
    int64_t key = min(keys.begin + i, keys.end - 1);
    bool next = key / a.pages.size == page && i > 0;
    rows.at[i] = next ? rows.at[i - 1] + (key == keys.begin + i) * x.stride_seq * element_size(a.dtype)
                      : row_pointer(a.pages, x, a.dtype, batch, head, key);
    page = key / a.pages.size;
  }
  return rows;
}

// The online softmax of one row: turn its BLOCK_N scores into weights, 0 outside `attended`, and update m and l.
// Returns the factor that rescales earlier sums.
static float online_softmax_row(float* s, Range attended, float* m, float* l) {
  for (int64_t i = 0; i < attended.begin; i++) s[i] = NEG_INF;
  for (int64_t i = attended.end; i < BLOCK_N; i++) s[i] = NEG_INF;
  vf top = load<vf>(s);
  for (int64_t i = W; i < BLOCK_N; i += W) top = max(top, load<vf>(s + i));
  float m_new = *m;
  for (int i = 0; i < W; i++) m_new = m_new > top[i] ? m_new : top[i];
  float row_max = m_new == NEG_INF ? 0 : m_new;
  float alpha = exp2(broadcast((*m - row_max) * LOG2E))[0];
  vf total = {};
  for (int64_t i = 0; i < BLOCK_N; i += W) {
    vf p = exp2((load<vf>(s + i) - row_max) * LOG2E);
    store(s + i, p);
    total += p;
  }
  *m = m_new;
  *l = *l * alpha + sum(total);
  return alpha;
}

template <class Dot, Dtype DTYPE>
static void decode(const Attention& all, int64_t batch, int64_t kv_head, int64_t split, Scratch scratch) {
  const Attention a = batch_row_view(all, batch);
  int64_t seq_q = all.seq_q, rows = rows_per_kv_head(all), padded_rows = round_up(rows, GEMV_ROWS);
  int64_t group = group_size(a);
  int64_t depth = round_up(a.head_dim, 2 * W) / Dot::K_PER_LANE, width = round_up(a.head_dim_v, 2 * W);
  float* q = scratch.take(padded_rows * depth);
  float* out = scratch.take(padded_rows * width);
  float* s = scratch.take(GEMV_ROWS * BLOCK_N);
  float* page_copy = a.pages.table ? scratch.take(BLOCK_N * (a.head_dim + a.head_dim_v)) : nullptr;
  float* k_padded = scratch.take(BLOCK_N * round_up(a.head_dim, 2 * W));
  float* v_padded = scratch.take(BLOCK_N * width);
  float *m = scratch.take(padded_rows), *l = scratch.take(padded_rows);
  for (int64_t i = 0; i < padded_rows * depth; i++) q[i] = 0;
  for (int64_t i = 0; i < padded_rows * width; i++) out[i] = 0;
  for (int64_t i = 0; i < padded_rows; i++) m[i] = NEG_INF, l[i] = 0;
  Range queries = {0, min(a.seq_q, query_end(a, batch))};  // padding reads nothing
  for (int64_t row = 0; row < rows; row++) {
    if (row % seq_q >= queries.end) continue;
    Matrix x = matrix(a.q, a.dtype, a.head_dim, batch, kv_head * group + row / seq_q);
    for (int64_t c = 0; c < depth; c += W) store(q + row * depth + c, load_k_lanes<Dot>(x.row(row % seq_q), x, c));
  }

  Range all_keys = key_range(a, queries, batch);
  all_keys = {max(all_keys.begin, split * SPLIT), min(all_keys.end, (split + 1) * SPLIT)};
  for (int64_t start = all_keys.begin; start < all_keys.end; start += BLOCK_N) {
    Range keys = {start, min(all_keys.end, start + BLOCK_N)};
    int64_t n = keys.end - keys.begin;
    // Values are prefetched during the products with keys, the next keys during the sums of values.
    auto attend_tile = [&](const auto& k, const auto& v, const auto& next_v, const auto& next_k) {
      for (int64_t row = 0; row < rows; row += GEMV_ROWS) {
        gemv<GEMV_ROWS, Dot, DTYPE>(q + row * depth, depth, k, n, a.score.scale, s, BLOCK_N, next_v);
        float alpha[GEMV_ROWS];
        for (int64_t r = 0; r < GEMV_ROWS; r++) {
          int64_t query = (row + r) % seq_q;
          Range attended = {0, 0};
          if (row + r < rows && query < queries.end) attended = key_range(a, {query, query + 1}, batch);
          attended = {max(0, min(BLOCK_N, attended.begin - start)), max(0, min(keys.end, attended.end) - start)};
          alpha[r] = online_softmax_row(s + r * BLOCK_N, attended, m + row + r, l + row + r);
        }
        weighted_sum<DTYPE>(s, alpha, v, n, out + row * width, width, next_k);
      }
    };
    if (a.pages.table && a.head_dim % (2 * W) == 0 && a.head_dim_v % (2 * W) == 0) {
      RowPointers k = row_pointers(a, a.k, batch, kv_head, keys), v = row_pointers(a, a.v, batch, kv_head, keys);
      Range next = keys.end < all_keys.end ? Range{keys.end, all_keys.end} : keys;
      attend_tile(k, v, v, row_pointers(a, a.k, batch, kv_head, next));
      continue;
    }
    Matrix k = gather_rows(a, a.k, a.head_dim, batch, kv_head, keys, page_copy);
    Matrix v = gather_rows(a, a.v, a.head_dim_v, batch, kv_head, keys, page_copy + BLOCK_N * a.head_dim);
    Matrix next_k = {k.row(n), k.dtype, k.stride, k.dim};
    attend_tile(pad_rows_to_vectors(k, {0, n}, k_padded), pad_rows_to_vectors(v, {0, n}, v_padded), v, next_k);
  }
  for (int64_t row = 0; row < rows; row++) {
    SplitResult to = split_result(all, batch, kv_head, row, split);
    *to.m = m[row], *to.l = l[row];
    for (int64_t c = 0; c < a.head_dim_v; c += W) store(to.out + c, load<vf>(out + row * width + c));
  }
}

int64_t decode_tiles(const Attention& a) { return is_decode(a) ? a.batch * a.kv_heads * num_splits(a) : 0; }

size_t decode_scratch(const Attention& a) {
  int64_t rows = round_up(rows_per_kv_head(a), GEMV_ROWS);
  int64_t d = round_up(a.head_dim, 2 * W), dv = round_up(a.head_dim_v, 2 * W);
  int64_t page_copy = a.pages.table ? BLOCK_N * (a.head_dim + a.head_dim_v) : 0;
  return rows * (d + dv + 2) + BLOCK_N * (GEMV_ROWS + d + dv) + page_copy + 8 * 16;
}

void decode_tile(const Attention& a, int64_t index, float* memory) {
  int64_t split = index % num_splits(a), head = index / num_splits(a);
  int64_t batch = head / a.kv_heads, kv_head = head % a.kv_heads;
  with_dot_and_dtype(a.dtype, [&](auto dot, auto dtype) {
    decode<decltype(dot), decltype(dtype)::value>(a, batch, kv_head, split, {memory});
  });
}

// ------------------------------------------------------------------------------------------------ merging splits

int64_t merge_tiles(const Attention& a) { return is_decode(a) ? a.batch * a.heads : 0; }
size_t merge_scratch(const Attention& a) { return round_up(a.head_dim_v, W); }

void merge_tile(const Attention& all, int64_t index, float* sum) {
  int64_t batch = index / all.heads, head = index % all.heads, kv_head = head / group_size(all);
  const Attention a = batch_row_view(all, batch);
  Matrix out = matrix(a.out, a.dtype, a.head_dim_v, batch, head);
  for (int64_t query = 0; query < a.seq_q; query++) {
    SplitResult first = split_result(all, batch, kv_head, head % group_size(all) * all.seq_q + query, 0);
    int64_t stride = 16 + round_up(a.head_dim_v, W);  // from split to split
    float m = NEG_INF, l = 0;
    for (int64_t i = 0; i < num_splits(all); i++) m = m > first.m[i * stride] ? m : first.m[i * stride];
    float row_max = m == NEG_INF ? 0 : m;
    for (int64_t c = 0; c < a.head_dim_v; c += W) store(sum + c, vf{});
    for (int64_t i = 0; i < num_splits(all); i++) {
      vf factor = exp2(broadcast((first.m[i * stride] - row_max) * LOG2E));
      l += first.l[i * stride] * factor[0];
      for (int64_t c = 0; c < a.head_dim_v; c += W)
        store(sum + c, load<vf>(sum + c) + load<vf>(first.out + i * stride + c) * factor);
    }
    float sink_factor = a.score.sinks ? add_sink(a.score.sinks[head], m, l) : 1;
    float inverse = l > 0 || l != l ? sink_factor / l : 0;
    for (int64_t c = 0; c < a.head_dim_v; c += W) store(sum + c, load<vf>(sum + c) * inverse);
    store_floats(out.row(query), sum, a.dtype, a.head_dim_v);
    store_lse(a, lse_offset(a, batch, head) + query, m, l);
  }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
