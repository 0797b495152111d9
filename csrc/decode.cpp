// Attention forward for few queries: a token or some against a long cache. Nothing but the reading of keys and values
// costs time, so they are read once for all query heads that share them, numbers of a row along the vector lanes, the
// keys split among the threads (and merged exactly, by their softmax statistics).
//
// The split is by position, so the answer depends neither on the batch nor on the number of threads.
//
// Dao et al., "Flash-Decoding for long-context inference" (2023).
#include "kernels.h"
#include "rows.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t SPLIT = 512;      // keys of a task
constexpr int64_t BLOCK_N = 64;     // keys of a tile

static int64_t group_of(const Attention& a) { return a.heads / a.kv_heads; }
// Rows of a key/value head: queries of each head of the group.
static int64_t rows_of(const Attention& a) { return group_of(a) * a.seq_q; }
static int64_t splits_of(const Attention& a) { return max(1, (a.seq_k + SPLIT - 1) / SPLIT); }

// What a split says of a row: maximum, sum, unnormalised output.
struct Partial {
  float *m, *l, *out;
};
static Partial partial(const Attention& a, int64_t batch, int64_t kv_head, int64_t row, int64_t split) {
  int64_t at = ((batch * a.kv_heads + kv_head) * rows_of(a) + row) * splits_of(a) + split;
  float* begin = a.workspace + at * (16 + round_up(a.head_dim_v, W));
  return {begin, begin + 1, begin + 16};
}
size_t forward_workspace(const Attention& a) {
  return is_decode(a) ? a.batch * a.heads * a.seq_q * splits_of(a) * (16 + round_up(a.head_dim_v, W)) : 0;
}

// COLS vectors of out[row] = alpha[row] out[row] + sum over n keys of p[row][key] v[key], from column c on.
template <Dtype DTYPE, int COLS, class Rows>
static void weighted_sum_columns(const float* p, const float* alpha, const Rows& v, int64_t n, int64_t c, float* out,
                                 int64_t width, const Rows& ahead) {
  vf sum[ROWS_AT_ONCE][COLS] = {};
  for (int64_t j = 0; j < n; j++) {
    const char* row = v.row(j);
    vf x[COLS];
    UNROLL for (int i = 0; i < COLS; i++) {
      x[i] = load_numbers<DTYPE>(row, c + i * W);
      __builtin_prefetch(ahead.row(j) + (c + i * W) * element_size(DTYPE), 0, 2);
    }
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) {
      vf y = broadcast(p[r * BLOCK_N + j]);
      UNROLL for (int i = 0; i < COLS; i++) sum[r][i] += y * x[i];
    }
  }
  UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
    UNROLL for (int i = 0; i < COLS; i++) {
      float* at = out + r * width + c + i * W;
      store(at, load<vf>(at) * alpha[r] + sum[r][i]);
    }
}

template <Dtype DTYPE, class Rows>
static void weighted_sum(const float* p, const float* alpha, const Rows& v, int64_t n, float* out, int64_t width,
                         const Rows& ahead) {
  int64_t c = 0;
  if constexpr (W == 16)
    for (; c + 4 * W <= width; c += 4 * W) weighted_sum_columns<DTYPE, 4>(p, alpha, v, n, c, out, width, ahead);
  for (; c + 2 * W <= width; c += 2 * W) weighted_sum_columns<DTYPE, 2>(p, alpha, v, n, c, out, width, ahead);
}

// Where the keys or values of a tile are, one by one: in pages.
struct RowPointers {
  const char* at[BLOCK_N];
  const char* row(int64_t i) const { return at[i]; }
};
// Rows keys.begin .. keys.begin + BLOCK_N; the last stands for those past keys.end.
static RowPointers row_pointers(const Attention& a, const Heads& x, int64_t batch, int64_t head, Range keys) {
  RowPointers rows;
  int64_t page = -1;
  for (int64_t i = 0; i < BLOCK_N; i++) {
    int64_t key = min(keys.begin + i, keys.end - 1);
    bool next = key / a.pages.size == page && i > 0;
    rows.at[i] = next ? rows.at[i - 1] + (key == keys.begin + i) * x.stride_seq * element_size(a.dtype)
                      : row_of(a.pages, x, a.dtype, batch, head, key);
    page = key / a.pages.size;
  }
  return rows;
}

// Turn n scores of one row into weights; what is past them up to BLOCK_N becomes 0. Returns the factor by which what
// was summed before is rescaled.
static float row_softmax(float* s, Range sees, float* m, float* l) {
  for (int64_t i = 0; i < sees.begin; i++) s[i] = -__builtin_inff();
  for (int64_t i = sees.end; i < BLOCK_N; i++) s[i] = -__builtin_inff();
  vf top = load<vf>(s);
  for (int64_t i = W; i < BLOCK_N; i += W) top = max(top, load<vf>(s + i));
  float m_new = *m;
  for (int i = 0; i < W; i++) m_new = m_new > top[i] ? m_new : top[i];
  float shift = m_new == -__builtin_inff() ? 0 : m_new;
  float alpha = exp2(broadcast((*m - shift) * LOG2E))[0];
  vf total = {};
  for (int64_t i = 0; i < BLOCK_N; i += W) {
    vf p = exp2((load<vf>(s + i) - shift) * LOG2E);
    store(s + i, p);
    total += p;
  }
  *m = m_new;
  *l = *l * alpha + sum(total);
  return alpha;
}

template <class Dot, Dtype DTYPE>
static void decode(const Attention& all, int64_t batch, int64_t kv_head, int64_t split, Scratch scratch) {
  const Attention a = sequence(all, batch);
  int64_t seq_q = all.seq_q, rows = rows_of(all), padded_rows = round_up(rows, ROWS_AT_ONCE), group = group_of(a);
  int64_t depth = round_up(a.head_dim, 2 * W) / Dot::DEPTH, width = round_up(a.head_dim_v, 2 * W);
  float* q = scratch.take(padded_rows * depth);
  float* out = scratch.take(padded_rows * width);
  float* s = scratch.take(ROWS_AT_ONCE * BLOCK_N);
  float* gathered = a.pages.table ? scratch.take(BLOCK_N * (a.head_dim + a.head_dim_v)) : nullptr;
  float* k_copy = scratch.take(BLOCK_N * round_up(a.head_dim, 2 * W));
  float* v_copy = scratch.take(BLOCK_N * width);
  float *m = scratch.take(padded_rows), *l = scratch.take(padded_rows);
  for (int64_t i = 0; i < padded_rows * depth; i++) q[i] = 0;
  for (int64_t i = 0; i < padded_rows * width; i++) out[i] = 0;
  for (int64_t i = 0; i < padded_rows; i++) m[i] = -__builtin_inff(), l[i] = 0;
  Range queries = {0, min(a.seq_q, query_end(a, batch))};  // the others read nothing
  for (int64_t row = 0; row < rows; row++) {
    if (row % seq_q >= queries.end) continue;
    Matrix x = matrix(a.q, a.dtype, a.head_dim, batch, kv_head * group + row / seq_q);
    for (int64_t c = 0; c < depth; c += W)
      store(q + row * depth + c, elements_along<Dot>(x.row(row % seq_q), x, c));
  }

  Range seen = visible_keys(a, queries, batch);
  seen = {max(seen.begin, split * SPLIT), min(seen.end, (split + 1) * SPLIT)};
  for (int64_t start = seen.begin; start < seen.end; start += BLOCK_N) {
    Range keys = {start, min(seen.end, start + BLOCK_N)};
    int64_t n = keys.end - keys.begin;
    // Values are fetched while the products run, the next keys while the values are summed.
    auto attend = [&](const auto& k, const auto& v, const auto& next_v, const auto& next_k) {
      for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
        products<ROWS_AT_ONCE, Dot, DTYPE>(q + row * depth, depth, k, n, a.score.scale, s, BLOCK_N, next_v);
        float alpha[ROWS_AT_ONCE];
        for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
          int64_t query = (row + r) % seq_q;
          Range sees = {0, 0};
          if (row + r < rows && query < queries.end) sees = visible_keys(a, {query, query + 1}, batch);
          sees = {max(0, min(BLOCK_N, sees.begin - start)), max(0, min(keys.end, sees.end) - start)};
          alpha[r] = row_softmax(s + r * BLOCK_N, sees, m + row + r, l + row + r);
        }
        weighted_sum<DTYPE>(s, alpha, v, n, out + row * width, width, next_k);
      }
    };
    if (a.pages.table && a.head_dim % (2 * W) == 0 && a.head_dim_v % (2 * W) == 0) {
      RowPointers k = row_pointers(a, a.k, batch, kv_head, keys), v = row_pointers(a, a.v, batch, kv_head, keys);
      Range next = keys.end < seen.end ? Range{keys.end, seen.end} : keys;
      attend(k, v, v, row_pointers(a, a.k, batch, kv_head, next));
      continue;
    }
    Matrix k = dense_rows(a, a.k, a.head_dim, batch, kv_head, keys, gathered);
    Matrix v = dense_rows(a, a.v, a.head_dim_v, batch, kv_head, keys, gathered + BLOCK_N * a.head_dim);
    Matrix next_k = {k.row(n), k.dtype, k.stride, k.dim};
    attend(whole_vectors(k, {0, n}, k_copy), whole_vectors(v, {0, n}, v_copy), v, next_k);
  }
  for (int64_t row = 0; row < rows; row++) {
    Partial to = partial(all, batch, kv_head, row, split);
    *to.m = m[row], *to.l = l[row];
    for (int64_t c = 0; c < a.head_dim_v; c += W) store(to.out + c, load<vf>(out + row * width + c));
  }
}

int64_t decode_tiles(const Attention& a) { return is_decode(a) ? a.batch * a.kv_heads * splits_of(a) : 0; }

size_t decode_scratch(const Attention& a) {
  int64_t rows = round_up(rows_of(a), ROWS_AT_ONCE);
  int64_t d = round_up(a.head_dim, 2 * W), dv = round_up(a.head_dim_v, 2 * W);
  int64_t gathered = a.pages.table ? BLOCK_N * (a.head_dim + a.head_dim_v) : 0;
  return rows * (d + dv + 2) + BLOCK_N * (ROWS_AT_ONCE + d + dv) + gathered + 8 * 16;
}

void decode_tile(const Attention& a, int64_t index, float* memory) {
  int64_t split = index % splits_of(a), head = index / splits_of(a);
  int64_t batch = head / a.kv_heads, kv_head = head % a.kv_heads;
  with_dot_and_dtype(a.dtype, [&](auto dot, auto dtype) {
    decode<decltype(dot), decltype(dtype)::value>(a, batch, kv_head, split, {memory});
  });
}

// ------------------------------------------------------------------------------------------------ merging the splits

int64_t merge_tiles(const Attention& a) { return is_decode(a) ? a.batch * a.heads : 0; }
size_t merge_scratch(const Attention& a) { return round_up(a.head_dim_v, W); }

void merge_tile(const Attention& all, int64_t index, float* sum) {
  int64_t batch = index / all.heads, head = index % all.heads, kv_head = head / group_of(all);
  const Attention a = sequence(all, batch);
  Matrix out = matrix(a.out, a.dtype, a.head_dim_v, batch, head);
  for (int64_t query = 0; query < a.seq_q; query++) {
    Partial first = partial(all, batch, kv_head, head % group_of(all) * all.seq_q + query, 0);
    int64_t stride = 16 + round_up(a.head_dim_v, W);  // from split to split
    float m = -__builtin_inff(), l = 0;
    for (int64_t i = 0; i < splits_of(all); i++) m = m > first.m[i * stride] ? m : first.m[i * stride];
    float shift = m == -__builtin_inff() ? 0 : m;
    for (int64_t c = 0; c < a.head_dim_v; c += W) store(sum + c, vf{});
    for (int64_t i = 0; i < splits_of(all); i++) {
      vf factor = exp2(broadcast((first.m[i * stride] - shift) * LOG2E));
      l += first.l[i * stride] * factor[0];
      for (int64_t c = 0; c < a.head_dim_v; c += W)
        store(sum + c, load<vf>(sum + c) + load<vf>(first.out + i * stride + c) * factor);
    }
    float scale = a.score.sinks ? join_sink(a.score.sinks[head], m, l) : 1;
    float inverse = l > 0 || l != l ? scale / l : 0;
    for (int64_t c = 0; c < a.head_dim_v; c += W) store(sum + c, load<vf>(sum + c) * inverse);
    store_floats(out.row(query), sum, a.dtype, a.head_dim_v);
    store_lse(a, statistics_at(a, batch, head) + query, m, l);
  }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
