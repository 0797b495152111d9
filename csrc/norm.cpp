// LayerNorm and RMSNorm, forward and backward. See kernels/norm.py for the math. The fast path reads and writes in
// place rows of one dtype and whole vectors; the generic path converts rows to float32 in scratch memory, padded with
// zeros, so that the loops have no tails.
#include "kernels.h"
#include "philox.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t TILE_ELEMENTS = 1 << 16;  // enough for a thread to stream, few enough to balance threads

static char* row_pointer(const Rows& x, int64_t r) {
  int64_t inner = r % x.size_2, outer = r / x.size_2;
  int64_t offset = inner * x.stride_2 + outer % x.size_1 * x.stride_1 + outer / x.size_1 * x.stride_0;
  return (char*)x.data + offset * element_size(x.dtype);
}

static void store_row(const Rows& x, int64_t r, const float* src, int64_t width) {
  store_floats(row_pointer(x, r), src, x.dtype, width);
}

// x is readable and writable up to whole vectors.
static void apply_dropout(const Norm& n, float* x, int64_t r) {
  for (int64_t c = 0; c < n.width; c += W) {
    vu bits = philox<10>(n.dropout.seed, iota() + (uint32_t)c, vu{} + (uint32_t)r, 0).word[0];
    store(x + c, load<vf>(x + c) * dropout_multiplier(n.dropout, bits));
  }
}

// Round to the dtype in which h is saved, so that backward normalises the same numbers.
static void round_to(Dtype dtype, float* x, int64_t width) {
  if (dtype == Dtype::float32) return;
  for (int64_t c = 0; c < width; c += W) {
    uint16_t rounded[W];
    store_floats(rounded, x + c, dtype, W);
    load_floats(x + c, rounded, dtype, W);
  }
}

// Sums of N values over a row, each in four parts: shorter chains of additions, so faster and more exact.
template <int N>
struct Sums {
  vf parts[4][N] = {};
  float of(int i) const { return sum((parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i])); }
};

// Call f(c, sums) for each vector of a row; f adds to sums[0 .. N - 1].
template <int N, class F>
static Sums<N> sum_over(int64_t padded, F f) {
  Sums<N> s;
  int64_t c = 0;
  for (; c + 4 * W <= padded; c += 4 * W) FLASHATTN_UNROLL for (int i = 0; i < 4; i++) f(c + i * W, s.parts[i]);
  for (; c < padded; c += W) f(c, s.parts[0]);
  return s;
}

// W parameters of a row; its last vector may be incomplete.
__attribute__((noinline, cold)) static vf load_last_parameters(const float* p, int64_t n) {
  vf v = {};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
}
FLASHATTN_INLINE vf load_parameters(const float* p, int64_t c, int64_t width) {
  return c + W <= width ? load<vf>(p + c) : load_last_parameters(p + c, width - c);
}

// ------------------------------------------------------------------------------------------------ forward

static int64_t rows_per_tile(const Norm& n) { return max(1, TILE_ELEMENTS / n.width); }

int64_t norm_forward_tiles(const Norm& n) { return (n.rows + rows_per_tile(n) - 1) / rows_per_tile(n); }

size_t norm_forward_scratch(const Norm& n) { return 2 * round_up(n.width, W); }

// Sums over a row of h - mean and of its squares.
struct Deviations {
  float sum, squares;
};
template <Dtype DTYPE>
static Deviations deviations(const char* h, int64_t width, float mean) {
  auto total = sum_over<2>(width / W * W, [=](int64_t c, vf* total) {
    vf x = load_as_f32<DTYPE>(h, c) - mean;
    total[0] += x;
    total[1] += x * x;
  });
  Deviations d = {total.of(0), total.of(1)};
  for (int64_t c = width / W * W; c < width; c++) {  // without the padding, which would count as 0 - mean
    float x = ((const float*)h)[c] - mean;
    d.sum += x, d.squares += x * x;
  }
  return d;
}

// y = (h - mean) rstd weight + bias, of a row of whole vectors.
template <Dtype DTYPE>
static void normalise(const Norm& n, int64_t r, const char* h, char* y) {
  const int64_t width = n.width, padded = round_up(width, W);
  const float offset = n.weight_offset;
  float mean = 0;
  if (n.center)
    mean = sum_over<1>(padded, [=](int64_t c, vf* total) { total[0] += load_as_f32<DTYPE>(h, c); }).of(0) / width;
  Deviations d = deviations<DTYPE>(h, width, mean);
  if (n.center) {
    // The mean of the deviations corrects the rounding of the mean: of equal elements the mean is that element. If this
    // correction is a large part of the squares, sum them again.
    float delta = d.sum / width;
    n.mean[r] = mean += delta;
    if (d.sum * delta > d.squares * 0x1p-10f)
      d = deviations<DTYPE>(h, width, mean);
    else
      d.squares -= d.sum * delta;
  }
  const float rstd = 1 / __builtin_sqrtf(d.squares / width + n.eps);
  n.rstd[r] = rstd;

  const float* weight = n.weight ? n.weight + r % n.heads * width : nullptr;
  const float* bias = n.bias ? n.bias + r % n.heads * width : nullptr;
  for (int64_t c = 0; c < padded; c += W) {
    vf x = (load_as_f32<DTYPE>(h, c) - mean) * rstd;
    if (weight) x = x * (load_parameters(weight, c, width) + offset);
    if (bias) x = x + load_parameters(bias, c, width);
    store_from_f32<DTYPE>(y, c, x);
  }
}

// h = residual + x of rows of whole vectors and one dtype, rounded to it.
template <Dtype DTYPE>
static void add_residual(const char* x, const char* residual, char* h, int64_t width) {
  for (int64_t c = 0; c < width; c += W)
    store_from_f32<DTYPE>(h, c, load_as_f32<DTYPE>(x, c) + load_as_f32<DTYPE>(residual, c));
}

// One dtype throughout, whole vectors, no dropout: nothing is copied.
template <Dtype DTYPE>
static void forward_row_fast(const Norm& n, int64_t r, char* scratch) {
  const char* h = row_pointer(n.x, r);
  if (n.residual.data) {
    char* sum = n.hidden.data ? row_pointer(n.hidden, r) : scratch;
    add_residual<DTYPE>(h, row_pointer(n.residual, r), sum, n.width);
    h = sum;
  }
  normalise<DTYPE>(n, r, h, row_pointer(n.y, r));
}

static bool is_fast_path(const Norm& n) {
  bool same = n.hidden_dtype == n.x.dtype && (!n.residual.data || n.residual.dtype == n.x.dtype);
  return same && n.dropout.scale == 0 && n.width % W == 0 && !(n.hidden.data && !n.residual.data);
}

// Any row, in float32: h = residual + dropout(x), rounded to the dtype in which it is saved, and normalised.
static void forward_row_generic(const Norm& n, int64_t r, float* h) {
  int64_t padded = round_up(n.width, W);
  float* other = h + padded;
  load_floats(h, row_pointer(n.x, r), n.x.dtype, n.width);
  if (n.dropout.scale != 0) apply_dropout(n, h, r);
  if (n.residual.data) {
    load_floats(other, row_pointer(n.residual, r), n.residual.dtype, n.width);
    for (int64_t c = 0; c < padded; c += W) store(h + c, load<vf>(h + c) + load<vf>(other + c));
  }
  round_to(n.hidden_dtype, h, n.width);
  if (n.hidden.data) store_row(n.hidden, r, h, n.width);
  normalise<Dtype::float32>(n, r, (const char*)h, (char*)other);
  store_row(n.y, r, other, n.width);
}

static void forward_row(const Norm& n, int64_t r, float* scratch) {
  if (!is_fast_path(n)) return forward_row_generic(n, r, scratch);
  with_dtype(n.x.dtype, [&](auto dtype) { forward_row_fast<decltype(dtype)::value>(n, r, (char*)scratch); });
}

void norm_forward_tile(const Norm& n, int64_t tile, float* scratch) {
  int64_t end = min(n.rows, (tile + 1) * rows_per_tile(n));
  for (int64_t r = tile * rows_per_tile(n); r < end; r++) forward_row(n, r, scratch);
}

// ------------------------------------------------------------------------------------------------ backward

constexpr int ROWS_AT_ONCE = 4;  // rows whose parts of the parameter gradients are summed in registers

// A row of whole vectors and one dtype.
struct NormRow {
  const char *grad_y, *h, *grad_hidden;  // grad_hidden may be null
  char* grad_h;
};

// The gradients of the parameters summed over a part of the rows, (heads, width) each, or null.
struct ParameterSums {
  float *weight, *bias;
};

static void add_to(float* to, int64_t c, int64_t width, vf x) {
  if (c + W <= width) return store(to + c, load<vf>(to + c) + x);
  for (int64_t i = c; i < width; i++) to[i] += x[i - c];
}

// g = weight grad_y, rounded, so that g - mean(g) is 0 where all are equal.
FLASHATTN_INLINE vf apply_weight(const float* weight, int64_t c, int64_t width, float offset, vf y) {
  return weight ? round_product(y * (load_parameters(weight, c, width) + offset)) : y;
}

// With g = weight grad_y:  grad_h = rstd (g - mean(g) - xhat mean(g xhat)) + grad_hidden, of ROWS rows.
template <Dtype DTYPE, int ROWS>
static void backward_rows(const Norm& n, int64_t r, const NormRow* rows, ParameterSums sums) {
  const int64_t width = n.width, padded = round_up(width, W);
  const float* weight = n.weight ? n.weight + r % n.heads * width : nullptr;
  const float offset = n.weight_offset;
  float mean[ROWS], rstd[ROWS], mean_gx[ROWS], mean_g[ROWS];
  for (int i = 0; i < ROWS; i++) {
    const char *grad = rows[i].grad_y, *h = rows[i].h;
    const float m = n.center ? n.mean[r + i] : 0;
    auto total = sum_over<2>(padded, [=](int64_t c, vf* total) {
      vf g = apply_weight(weight, c, width, offset, load_as_f32<DTYPE>(grad, c));
      total[0] += g * (load_as_f32<DTYPE>(h, c) - m);
      total[1] += g;
    });
    mean[i] = m, rstd[i] = n.rstd[r + i];
    mean_gx[i] = total.of(0) * rstd[i] / width, mean_g[i] = n.center ? total.of(1) / width : 0;
  }
  for (int64_t c = 0; c < padded; c += W) {
    vf sum_weight = {}, sum_bias = {};
    FLASHATTN_UNROLL for (int i = 0; i < ROWS; i++) {
      vf y = load_as_f32<DTYPE>(rows[i].grad_y, c), xhat = (load_as_f32<DTYPE>(rows[i].h, c) - mean[i]) * rstd[i];
      sum_weight += y * xhat;
      sum_bias += y;
      vf grad_h = (apply_weight(weight, c, width, offset, y) - mean_g[i] - xhat * mean_gx[i]) * rstd[i];
      if (rows[0].grad_hidden) grad_h += load_as_f32<DTYPE>(rows[i].grad_hidden, c);
      store_from_f32<DTYPE>(rows[i].grad_h, c, grad_h);
    }
    if (sums.weight) add_to(sums.weight, c, width, sum_weight);
    if (sums.bias) add_to(sums.bias, c, width, sum_bias);
  }
}

// One dtype throughout, whole vectors, no dropout: nothing is copied.
template <Dtype DTYPE, int ROWS>
static void backward_rows_fast(const Norm& n, int64_t r, ParameterSums sums) {
  NormRow rows[ROWS];
  for (int i = 0; i < ROWS; i++)
    rows[i] = {row_pointer(n.grad_y, r + i), row_pointer(n.hidden, r + i),
               n.grad_hidden.data ? row_pointer(n.grad_hidden, r + i) : nullptr, row_pointer(n.grad_x, r + i)};
  backward_rows<DTYPE, ROWS>(n, r, rows, sums);
}

static bool is_fast_path_backward(const Norm& n) {
  Dtype dtype = n.grad_x.dtype;
  bool same = n.hidden.dtype == dtype && n.grad_y.dtype == dtype;
  if (n.grad_hidden.data) same = same && n.grad_hidden.dtype == dtype;
  return same && n.dropout.scale == 0 && !n.grad_residual.data && n.width % W == 0;
}

// Any row, in float32.
static void backward_row_generic(const Norm& n, int64_t r, ParameterSums sums, float* scratch) {
  int64_t padded = round_up(n.width, W);
  float *grad = scratch, *h = grad + padded, *grad_hidden = h + padded;
  load_floats(grad, row_pointer(n.grad_y, r), n.grad_y.dtype, n.width);
  load_floats(h, row_pointer(n.hidden, r), n.hidden.dtype, n.width);
  if (n.grad_hidden.data) load_floats(grad_hidden, row_pointer(n.grad_hidden, r), n.grad_hidden.dtype, n.width);
  NormRow row = {(char*)grad, (char*)h, n.grad_hidden.data ? (char*)grad_hidden : nullptr, (char*)h};
  backward_rows<Dtype::float32, 1>(n, r, &row, sums);
  if (n.grad_residual.data) store_row(n.grad_residual, r, h, n.width);
  if (n.dropout.scale != 0) apply_dropout(n, h, r);
  store_row(n.grad_x, r, h, n.width);
}

// The sums of a part of the rows, in the workspace.
static ParameterSums part_sums(const Norm& n, int64_t part) {
  int64_t size = n.heads * n.width;
  float* weight = n.workspace + part * size;
  float* bias = weight + (n.grad_weight.data ? n.parts : 0) * size;
  return {n.grad_weight.data ? weight : nullptr, n.grad_bias.data ? bias : nullptr};
}

size_t norm_backward_workspace(const Norm& n) {
  return ((n.grad_weight.data ? 1 : 0) + (n.grad_bias.data ? 1 : 0)) * n.parts * n.heads * n.width + W;
}

int64_t norm_backward_tiles(const Norm& n) { return n.parts; }

size_t norm_backward_scratch(const Norm& n) { return 3 * round_up(n.width, W); }

// One part of the rows, summed in order into its own sums, so that the result does not depend on the number of threads.
void norm_backward_tile(const Norm& n, int64_t part, float* scratch) {
  ParameterSums all = part_sums(n, part);
  for (int64_t i = 0; i < n.heads * n.width; i++) {
    if (all.weight) all.weight[i] = 0;
    if (all.bias) all.bias[i] = 0;
  }
  auto head_sums = [&](int64_t r) {
    int64_t at = r % n.heads * n.width;
    return ParameterSums{all.weight ? all.weight + at : nullptr, all.bias ? all.bias + at : nullptr};
  };
  int64_t r = n.rows * part / n.parts, end = n.rows * (part + 1) / n.parts;
  if (!is_fast_path_backward(n)) {
    for (; r < end; r++) backward_row_generic(n, r, head_sums(r), scratch);
    return;
  }
  with_dtype(n.grad_x.dtype, [&](auto dtype) {
    constexpr Dtype DTYPE = decltype(dtype)::value;
    // Rows of different heads have different parameters.
    for (; n.heads == 1 && r + ROWS_AT_ONCE <= end; r += ROWS_AT_ONCE)
      backward_rows_fast<DTYPE, ROWS_AT_ONCE>(n, r, all);
    for (; r < end; r++) backward_rows_fast<DTYPE, 1>(n, r, head_sums(r));
  });
}

// ------------------------------------------------------------------------------------------------ parameter gradients

constexpr int64_t COLS = 512;  // parameters of a tile

int64_t norm_parameters_tiles(const Norm& n) {
  return n.grad_weight.data || n.grad_bias.data ? (n.heads * n.width + COLS - 1) / COLS : 0;
}
size_t norm_parameters_scratch(const Norm&) { return COLS; }

// Sum the parts of some parameters, in order.
void norm_parameters_tile(const Norm& n, int64_t tile, float* sum) {
  int64_t begin = tile * COLS, count = min(COLS, n.heads * n.width - begin);
  auto sum_parts = [&](const ParameterGrad& to, float* ParameterSums::* which) {
    if (!to.data) return;
    for (int64_t c = 0; c < count; c += W) {
      vf total = {};
      for (int64_t part = 0; part < n.parts; part++) total += load<vf>(part_sums(n, part).*which + begin + c);
      store(sum + c, total);
    }
    store_floats((char*)to.data + begin * element_size(to.dtype), sum, to.dtype, count);
  };
  sum_parts(n.grad_weight, &ParameterSums::weight);
  sum_parts(n.grad_bias, &ParameterSums::bias);
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
