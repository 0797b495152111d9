// LayerNorm and RMSNorm, forward and backward, and the tangents of both. See kernels/norm.py and norm_derivatives.py
// for the math. The fast path reads and writes in place rows of one dtype and whole vectors; the generic path converts
// rows to float32 in scratch memory, padded with zeros, so that the loops have no tails.
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

// What row r has of parameters (heads, width), or null.
static const float* head_parameters(const Norm& n, const float* parameters, int64_t r) {
  return parameters ? parameters + r % n.heads * n.width : nullptr;
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

size_t norm_forward_scratch(const Norm& n) { return (n.tangent.y.data ? 4 : 2) * round_up(n.width, W); }

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

struct NormStats {
  float mean, rstd;
};

// Of a row of whole vectors; stored for backward.
template <Dtype DTYPE>
FLASHATTN_INLINE NormStats compute_stats(const Norm& n, int64_t r, const char* h) {
  const int64_t width = n.width, padded = round_up(width, W);
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
  return {mean, rstd};
}

// y = (h - mean) rstd weight + bias, of a row of whole vectors.
template <Dtype DTYPE>
static void normalise(const Norm& n, int64_t r, const char* h, char* y) {
  const int64_t width = n.width, padded = round_up(width, W);
  const float offset = n.weight_offset;
  const auto [mean, rstd] = compute_stats<DTYPE>(n, r, h);
  const float *weight = head_parameters(n, n.weight, r), *bias = head_parameters(n, n.bias, r);
  for (int64_t c = 0; c < padded; c += W) {
    vf x = (load_as_f32<DTYPE>(h, c) - mean) * rstd;
    if (weight) x = x * (load_parameters(weight, c, width) + offset);
    if (bias) x = x + load_parameters(bias, c, width);
    store_from_f32<DTYPE>(y, c, x);
  }
}

// A value and its tangent.
struct Dual {
  vf value, tangent;
};

// Rows of whole vectors of h and of its tangent t, and what makes xhat and its tangent of them.
struct DualRow {
  const char *h, *t;  // t is null where it is 0
  NormStats stats;
  float mean_t = 0, mean_tx = 0;  // mean(t) of LayerNorm, mean(t xhat)
};

// xhat and its tangent rstd (t - mean(t) - xhat mean(t xhat)).
template <Dtype DTYPE>
FLASHATTN_INLINE Dual load_xhat(const DualRow& row, int64_t c) {
  vf xhat = (load_as_f32<DTYPE>(row.h, c) - row.stats.mean) * row.stats.rstd;
  vf t = row.t ? load_as_f32<DTYPE>(row.t, c) : vf{};
  return {xhat, (t - row.mean_t - xhat * row.mean_tx) * row.stats.rstd};
}

// x in the columns from c on that a row has; 0 past its end.
FLASHATTN_INLINE vf zero_past_end(vf x, int64_t c, int64_t width) {
  return (vi)iota() < (int32_t)(width - c) ? x : vf{};
}

// Of LayerNorm, products with xhat are of x - mean(x): xhat has a mean of 0 but for rounding, which a large mean of x
// would multiply.
template <Dtype DTYPE>
static DualRow make_dual_row(const Norm& n, const char* h, const char* t, NormStats stats) {
  DualRow row = {h, t, stats};
  if (!t) return row;
  const int64_t width = n.width, padded = round_up(width, W);
  if (n.center)
    row.mean_t = sum_over<1>(padded, [=](int64_t c, vf* total) { total[0] += load_as_f32<DTYPE>(t, c); }).of(0) / width;
  auto total = sum_over<2>(padded, [=](int64_t c, vf* total) {
    vf x = zero_past_end(load_as_f32<DTYPE>(t, c) - row.mean_t, c, width);
    total[0] += x;
    total[1] += x * (load_as_f32<DTYPE>(h, c) - stats.mean);
  });
  if (n.center) row.mean_t += total.of(0) / width;  // corrects the rounding of the mean
  row.mean_tx = total.of(1) * stats.rstd / width;
  return row;
}

// Where a row of h and y is, or of their tangents.
struct HiddenAndY {
  const char* h;
  char* y;
};

// y and its tangent, xhat' weight + xhat tangent_weight + tangent_bias.
template <Dtype DTYPE>
static void normalise_dual(const Norm& n, int64_t r, HiddenAndY value, HiddenAndY tangent) {
  const int64_t width = n.width, padded = round_up(width, W);
  const float offset = n.weight_offset;
  const DualRow row = make_dual_row<DTYPE>(n, value.h, tangent.h, compute_stats<DTYPE>(n, r, value.h));
  const float *weight = head_parameters(n, n.weight, r), *bias = head_parameters(n, n.bias, r);
  const float *tangent_weight = head_parameters(n, n.tangent.weight, r),
              *tangent_bias = head_parameters(n, n.tangent.bias, r);
  for (int64_t c = 0; c < padded; c += W) {
    auto [xhat, moved] = load_xhat<DTYPE>(row, c);
    vf y = xhat;
    if (weight) {
      vf factor = load_parameters(weight, c, width) + offset;
      y = y * factor, moved = moved * factor;
    }
    if (bias) y = y + load_parameters(bias, c, width);
    if (tangent_weight) moved = moved + xhat * load_parameters(tangent_weight, c, width);
    if (tangent_bias) moved = moved + load_parameters(tangent_bias, c, width);
    store_from_f32<DTYPE>(value.y, c, y);
    store_from_f32<DTYPE>(tangent.y, c, moved);
  }
}

// h = residual + x of rows of whole vectors and one dtype, rounded to it.
template <Dtype DTYPE>
static void add_residual(const char* x, const char* residual, char* h, int64_t width) {
  for (int64_t c = 0; c < width; c += W)
    store_from_f32<DTYPE>(h, c, load_as_f32<DTYPE>(x, c) + load_as_f32<DTYPE>(residual, c));
}

// The row of h: that of x, or their sum, in memory of the caller where h is not kept.
template <Dtype DTYPE>
static const char* find_hidden(const NormTensors& t, int64_t r, int64_t width, char* scratch) {
  const char* x = row_pointer(t.x, r);
  if (!t.residual.data) return x;
  char* h = t.hidden.data ? row_pointer(t.hidden, r) : scratch;
  add_residual<DTYPE>(x, row_pointer(t.residual, r), h, width);
  return h;
}

// One dtype throughout, whole vectors, no dropout: nothing is copied.
template <Dtype DTYPE>
static void forward_row_fast(const Norm& n, int64_t r, char* scratch) {
  const char* h = find_hidden<DTYPE>(n, r, n.width, scratch);
  if (!n.tangent.y.data) return normalise<DTYPE>(n, r, h, row_pointer(n.y, r));
  const char* t = find_hidden<DTYPE>(n.tangent, r, n.width, scratch + n.width * element_size(DTYPE));
  normalise_dual<DTYPE>(n, r, {h, row_pointer(n.y, r)}, {t, row_pointer(n.tangent.y, r)});
}

static bool is_fast_path(const Norm& n) {
  bool same = n.hidden_dtype == n.x.dtype && (!n.residual.data || n.residual.dtype == n.x.dtype);
  if (n.tangent.y.data) same = same && n.tangent.x.data && !n.tangent.residual.data == !n.residual.data;
  return same && n.dropout.scale == 0 && n.width % W == 0 && !(n.hidden.data && !n.residual.data);
}

// h = residual + dropout(x), rounded to the dtype in which it is saved, or its tangent, in float32 with room for whole
// vectors; what is absent is 0.
static void make_hidden(const Norm& n, const NormTensors& t, int64_t r, float* h, float* other) {
  int64_t padded = round_up(n.width, W);
  for (int64_t c = 0; !t.x.data && c < padded; c++) h[c] = 0;
  if (t.x.data) load_floats(h, row_pointer(t.x, r), t.x.dtype, n.width);
  if (n.dropout.scale != 0) apply_dropout(n, h, r);
  if (t.residual.data) {
    load_floats(other, row_pointer(t.residual, r), t.residual.dtype, n.width);
    for (int64_t c = 0; c < padded; c += W) store(h + c, load<vf>(h + c) + load<vf>(other + c));
  }
  round_to(n.hidden_dtype, h, n.width);
  if (t.hidden.data) store_row(t.hidden, r, h, n.width);
}

// Any row, in float32.
static void forward_row_generic(const Norm& n, int64_t r, float* h) {
  int64_t padded = round_up(n.width, W);
  float *y = h + padded, *t = y + padded, *tangent_y = t + padded;
  make_hidden(n, n, r, h, y);
  if (n.tangent.y.data) {
    make_hidden(n, n.tangent, r, t, tangent_y);
    normalise_dual<Dtype::float32>(n, r, {(char*)h, (char*)y}, {(char*)t, (char*)tangent_y});
    store_row(n.tangent.y, r, tangent_y, n.width);
  } else {
    normalise<Dtype::float32>(n, r, (char*)h, (char*)y);
  }
  store_row(n.y, r, y, n.width);
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
  const char *grad_y, *h, *grad_hidden, *t;  // grad_hidden may be null; t: the tangent of h, if there is one
  char* grad_h;                              // or its tangent
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
  const float* weight = head_parameters(n, n.weight, r);
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

// What the tangent of grad_h is made of: g = weight grad_y, its tangent u = tangent_weight grad_y, and means over a
// row.
struct DualGradient {
  const char* grad_y;
  const float *weight, *tangent_weight;    // or null
  float mean_g = 0, mean_u = 0;            // of LayerNorm
  float mean_gx = 0, tangent_mean_gx = 0;  // mean(g xhat) and its tangent mean(u xhat + g xhat')
};

// g and its tangent u.
template <Dtype DTYPE>
FLASHATTN_INLINE Dual load_g(const Norm& n, const DualGradient& d, int64_t c) {
  vf y = load_as_f32<DTYPE>(d.grad_y, c);
  return {apply_weight(d.weight, c, n.width, n.weight_offset, y),
          d.tangent_weight ? y * load_parameters(d.tangent_weight, c, n.width) : vf{}};
}

template <Dtype DTYPE>
static DualGradient make_dual_gradient(const Norm& n, int64_t r, const char* grad_y, const DualRow& row) {
  DualGradient gradient = {grad_y, head_parameters(n, n.weight, r), head_parameters(n, n.tangent.weight, r)};
  const int64_t width = n.width, padded = round_up(width, W);
  if (n.center) {
    auto total = sum_over<2>(padded, [&](int64_t c, vf* total) {
      auto [g, u] = load_g<DTYPE>(n, gradient, c);
      total[0] += g;
      total[1] += u;
    });
    gradient.mean_g = total.of(0) / width, gradient.mean_u = total.of(1) / width;
  }
  auto total = sum_over<4>(padded, [&](int64_t c, vf* total) {
    auto [g, u] = load_g<DTYPE>(n, gradient, c);
    auto [xhat, moved] = load_xhat<DTYPE>(row, c);
    g = zero_past_end(g - gradient.mean_g, c, width), u = zero_past_end(u - gradient.mean_u, c, width);
    total[0] += g;
    total[1] += u;
    total[2] += g * xhat;
    total[3] += u * xhat + g * moved;
  });
  if (n.center) gradient.mean_g += total.of(0) / width, gradient.mean_u += total.of(1) / width;
  gradient.mean_gx = total.of(2) / width, gradient.tangent_mean_gx = total.of(3) / width;
  return gradient;
}

// The tangent of grad_h for constant grad_y and grad_hidden, of ROWS rows:
// rstd (u - mean(u) - xhat' mean(g xhat) - xhat mean(u xhat + g xhat') - mean(t xhat) (grad_h - grad_hidden))
template <Dtype DTYPE, int ROWS>
static void hvp_rows(const Norm& n, int64_t r, const NormRow* rows, ParameterSums sums) {
  DualRow row[ROWS];
  DualGradient gradient[ROWS];
  for (int i = 0; i < ROWS; i++) {
    row[i] = make_dual_row<DTYPE>(n, rows[i].h, rows[i].t, {n.center ? n.mean[r + i] : 0, n.rstd[r + i]});
    gradient[i] = make_dual_gradient<DTYPE>(n, r + i, rows[i].grad_y, row[i]);
  }
  for (int64_t c = 0; c < round_up(n.width, W); c += W) {
    vf sum_weight = {};
    FLASHATTN_UNROLL for (int i = 0; i < ROWS; i++) {
      const DualGradient& d = gradient[i];
      const float rstd = row[i].stats.rstd;
      auto [xhat, moved] = load_xhat<DTYPE>(row[i], c);
      auto [g, u] = load_g<DTYPE>(n, d, c);
      sum_weight += load_as_f32<DTYPE>(d.grad_y, c) * moved;
      vf grad_h = (g - d.mean_g - xhat * d.mean_gx) * rstd;
      vf tangent = u - d.mean_u - moved * d.mean_gx - xhat * d.tangent_mean_gx - grad_h * row[i].mean_tx;
      store_from_f32<DTYPE>(rows[i].grad_h, c, tangent * rstd);
    }
    if (sums.weight) add_to(sums.weight, c, n.width, sum_weight);
  }
}

// grad_h, or its tangent in the direction that there is.
template <Dtype DTYPE, int ROWS>
static void differentiate_rows(const Norm& n, int64_t r, const NormRow* rows, ParameterSums sums) {
  if (rows[0].t) return hvp_rows<DTYPE, ROWS>(n, r, rows, sums);
  backward_rows<DTYPE, ROWS>(n, r, rows, sums);
}

// One dtype throughout, whole vectors, no dropout: nothing is copied.
template <Dtype DTYPE, int ROWS>
static void backward_rows_fast(const Norm& n, int64_t r, ParameterSums sums) {
  auto find = [&](const Rows& x, int i) { return x.data ? row_pointer(x, r + i) : nullptr; };
  NormRow rows[ROWS];
  for (int i = 0; i < ROWS; i++)
    rows[i] = {find(n.grad_y, i), find(n.hidden, i), find(n.grad_hidden, i), find(n.tangent.hidden, i),
               find(n.grad_x, i)};
  differentiate_rows<DTYPE, ROWS>(n, r, rows, sums);
}

static bool is_fast_path_backward(const Norm& n) {
  Dtype dtype = n.grad_x.dtype;
  bool same = n.hidden.dtype == dtype && n.grad_y.dtype == dtype;
  if (n.grad_hidden.data) same = same && n.grad_hidden.dtype == dtype;
  if (n.tangent.hidden.data) same = same && n.tangent.hidden.dtype == dtype;
  return same && n.dropout.scale == 0 && !n.grad_residual.data && n.width % W == 0;
}

// Any row, in float32.
static void backward_row_generic(const Norm& n, int64_t r, ParameterSums sums, float* scratch) {
  int64_t padded = round_up(n.width, W);
  auto load = [&](const Rows& x, int place) {
    float* row = scratch + place * padded;
    if (!x.data) return (char*)nullptr;
    load_floats(row, row_pointer(x, r), x.dtype, n.width);
    return (char*)row;
  };
  float* h = scratch;  // and grad_h
  NormRow row = {load(n.grad_y, 1), load(n.hidden, 0), load(n.grad_hidden, 2), load(n.tangent.hidden, 2), (char*)h};
  differentiate_rows<Dtype::float32, 1>(n, r, &row, sums);
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
