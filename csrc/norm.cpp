// LayerNorm and RMSNorm, forward and backward. The mathematics is in kernels/norm.py. The usual row, of one dtype and
// whole vectors, is read and written where it lies; any other goes by way of float32 in scratch memory, padded with
// zeros, so that the loops have no tails.
#include "kernels.h"
#include "philox.h"
#include "simd.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t TILE_NUMBERS = 1 << 16;  // long enough for a thread to stream, short enough to share out

static char* row_at(const Rows& x, int64_t r) {
  int64_t inner = r % x.size_2, outer = r / x.size_2;
  int64_t offset = inner * x.stride_2 + outer % x.size_1 * x.stride_1 + outer / x.size_1 * x.stride_0;
  return (char*)x.data + offset * element_size(x.dtype);
}

static void store_row(const Rows& x, int64_t r, const float* src, int64_t width) {
  store_floats(row_at(x, r), src, x.dtype, width);
}

// x is readable and writable to whole vectors.
static void dropout(const Norm& n, float* x, int64_t r) {
  for (int64_t c = 0; c < n.width; c += W)
    store(x + c, load<vf>(x + c) * kept(n.dropout, philox<10>(n.dropout.seed, lane_numbers() + (uint32_t)c,
                                                          vu{} + (uint32_t)r, 0).at[0]));
}

// Round to the dtype h is kept in, so that what is normalised is what is kept.
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
  for (; c + 4 * W <= padded; c += 4 * W)
    UNROLL for (int i = 0; i < 4; i++) f(c + i * W, s.parts[i]);
  for (; c < padded; c += W) f(c, s.parts[0]);
  return s;
}

// A row of parameters as whole vectors: in place but for its last vector, which would run past it.
__attribute__((noinline, cold)) static vf last_parameters(const float* p, int64_t n) {
  vf v = {};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
}
INLINE vf parameter(const float* p, int64_t c, int64_t width) {
  return c + W <= width ? load<vf>(p + c) : last_parameters(p + c, width - c);
}

// ------------------------------------------------------------------------------------------------ forward

static int64_t rows_per_tile(const Norm& n) { return max(1, TILE_NUMBERS / n.width); }

int64_t norm_forward_tiles(const Norm& n) { return (n.rows + rows_per_tile(n) - 1) / rows_per_tile(n); }

size_t norm_forward_scratch(const Norm& n) { return 2 * round_up(n.width, W); }

// Sums over a row of h - mean and of its squares.
struct Deviations {
  float sum, squares;
};
template <Dtype DTYPE>
static Deviations deviations(const char* h, int64_t width, float mean) {
  auto total = sum_over<2>(width / W * W, [=](int64_t c, vf* total) {
    vf x = load_numbers<DTYPE>(h, c) - mean;
    total[0] += x;
    total[1] += x * x;
  });
  Deviations d = {total.of(0), total.of(1)};
  for (int64_t c = width / W * W; c < width; c++) {  // not of the zeros past the end: they are not 0 - mean
    float x = ((const float*)h)[c] - mean;
    d.sum += x, d.squares += x * x;
  }
  return d;
}

// y = (h - mean) rstd weight + bias, of rows that are whole vectors.
template <Dtype DTYPE>
static void normalise(const Norm& n, int64_t r, const char* h, char* y) {
  const int64_t width = n.width, padded = round_up(width, W);
  const float offset = n.weight_offset;
  float mean = 0;
  if (n.center)
    mean = sum_over<1>(padded, [=](int64_t c, vf* total) { total[0] += load_numbers<DTYPE>(h, c); }).of(0) / width;
  Deviations d = deviations<DTYPE>(h, width, mean);
  if (n.center) {
    // The mean of what is left corrects a sum that was rounded: of equal numbers the mean is that number. Where that
    // shift makes up much of the squares, they are summed anew.
    float shift = d.sum / width;
    n.mean[r] = mean += shift;
    if (d.sum * shift > d.squares * 0x1p-10f) d = deviations<DTYPE>(h, width, mean);
    else d.squares -= d.sum * shift;
  }
  const float rstd = 1 / __builtin_sqrtf(d.squares / width + n.eps);
  n.rstd[r] = rstd;

  const float* weight = n.weight ? n.weight + r % n.heads * width : nullptr;
  const float* bias = n.bias ? n.bias + r % n.heads * width : nullptr;
  for (int64_t c = 0; c < padded; c += W) {
    vf x = (load_numbers<DTYPE>(h, c) - mean) * rstd;
    if (weight) x = x * (parameter(weight, c, width) + offset);
    if (bias) x = x + parameter(bias, c, width);
    store_numbers<DTYPE>(y, c, x);
  }
}

// h = residual + x of rows that are whole vectors of the same dtype, rounded to it.
template <Dtype DTYPE>
static void add_residual(const char* x, const char* residual, char* h, int64_t width) {
  for (int64_t c = 0; c < width; c += W)
    store_numbers<DTYPE>(h, c, load_numbers<DTYPE>(x, c) + load_numbers<DTYPE>(residual, c));
}

// The usual row: one dtype throughout, whole vectors, no dropout. Nothing is copied.
template <Dtype DTYPE>
static void forward_row_in_place(const Norm& n, int64_t r, char* scratch) {
  const char* h = row_at(n.x, r);
  if (n.residual.data) {
    char* sum = n.hidden.data ? row_at(n.hidden, r) : scratch;
    add_residual<DTYPE>(h, row_at(n.residual, r), sum, n.width);
    h = sum;
  }
  normalise<DTYPE>(n, r, h, row_at(n.y, r));
}

static bool is_usual(const Norm& n) {
  bool same = n.hidden_dtype == n.x.dtype && (!n.residual.data || n.residual.dtype == n.x.dtype);
  return same && n.dropout.scale == 0 && n.width % W == 0 && !(n.hidden.data && !n.residual.data);
}

// Any row, by way of float32: h = residual + dropout(x), rounded to the dtype it is kept in, and normalised.
static void forward_row_by_float(const Norm& n, int64_t r, float* h) {
  int64_t padded = round_up(n.width, W);
  float* other = h + padded;
  load_floats(h, row_at(n.x, r), n.x.dtype, n.width);
  if (n.dropout.scale != 0) dropout(n, h, r);
  if (n.residual.data) {
    load_floats(other, row_at(n.residual, r), n.residual.dtype, n.width);
    for (int64_t c = 0; c < padded; c += W) store(h + c, load<vf>(h + c) + load<vf>(other + c));
  }
  round_to(n.hidden_dtype, h, n.width);
  if (n.hidden.data) store_row(n.hidden, r, h, n.width);
  normalise<Dtype::float32>(n, r, (const char*)h, (char*)other);
  store_row(n.y, r, other, n.width);
}

static void forward_row(const Norm& n, int64_t r, float* scratch) {
  if (!is_usual(n)) return forward_row_by_float(n, r, scratch);
  with_dtype(n.x.dtype, [&](auto dtype) { forward_row_in_place<decltype(dtype)::value>(n, r, (char*)scratch); });
}

void norm_forward_tile(const Norm& n, int64_t tile, float* scratch) {
  int64_t end = min(n.rows, (tile + 1) * rows_per_tile(n));
  for (int64_t r = tile * rows_per_tile(n); r < end; r++) forward_row(n, r, scratch);
}

// ------------------------------------------------------------------------------------------------ backward

constexpr int AT_ONCE = 4;  // rows whose share in the gradients of the parameters is added up in registers

// Rows of one dtype, whole vectors each.
struct Inputs {
  const char *grad, *h, *more;  // grad_y, h, grad_hidden or null
  char* to;
};

// What a part of the rows adds to the gradients of the parameters, (heads, width) each, or null.
struct Gradients {
  float *weight, *bias;
};

static void add_to(float* to, int64_t c, int64_t width, vf x) {
  if (c + W <= width) return store(to + c, load<vf>(to + c) + x);
  for (int64_t i = c; i < width; i++) to[i] += x[i - c];
}

// g = weight grad_y, rounded, so that g - mean(g) is 0 where all are equal.
INLINE vf scaled(const float* weight, int64_t c, int64_t width, float offset, vf y) {
  return weight ? rounded(y * (parameter(weight, c, width) + offset)) : y;
}

// With g = weight grad_y:  grad_h = rstd (g - mean(g) - xhat mean(g xhat)) + grad_hidden, of ROWS rows.
template <Dtype DTYPE, int ROWS>
static void backward_rows(const Norm& n, int64_t r, const Inputs* rows, Gradients sums) {
  const int64_t width = n.width, padded = round_up(width, W);
  const float* weight = n.weight ? n.weight + r % n.heads * width : nullptr;
  const float offset = n.weight_offset;
  float mean[ROWS], rstd[ROWS], mean_gx[ROWS], mean_g[ROWS];
  for (int i = 0; i < ROWS; i++) {
    const char *grad = rows[i].grad, *h = rows[i].h;
    const float m = n.center ? n.mean[r + i] : 0;
    auto total = sum_over<2>(padded, [=](int64_t c, vf* total) {
      vf g = scaled(weight, c, width, offset, load_numbers<DTYPE>(grad, c));
      total[0] += g * (load_numbers<DTYPE>(h, c) - m);
      total[1] += g;
    });
    mean[i] = m, rstd[i] = n.rstd[r + i];
    mean_gx[i] = total.of(0) * rstd[i] / width, mean_g[i] = n.center ? total.of(1) / width : 0;
  }
  for (int64_t c = 0; c < padded; c += W) {
    vf sum_weight = {}, sum_bias = {};
    UNROLL for (int i = 0; i < ROWS; i++) {
      vf y = load_numbers<DTYPE>(rows[i].grad, c), xhat = (load_numbers<DTYPE>(rows[i].h, c) - mean[i]) * rstd[i];
      sum_weight += y * xhat;
      sum_bias += y;
      vf grad_h = (scaled(weight, c, width, offset, y) - mean_g[i] - xhat * mean_gx[i]) * rstd[i];
      if (rows[0].more) grad_h += load_numbers<DTYPE>(rows[i].more, c);
      store_numbers<DTYPE>(rows[i].to, c, grad_h);
    }
    if (sums.weight) add_to(sums.weight, c, width, sum_weight);
    if (sums.bias) add_to(sums.bias, c, width, sum_bias);
  }
}

// The usual rows: one dtype throughout, whole vectors, no dropout. Nothing is copied.
template <Dtype DTYPE, int ROWS>
static void backward_in_place(const Norm& n, int64_t r, Gradients sums) {
  Inputs rows[ROWS];
  for (int i = 0; i < ROWS; i++)
    rows[i] = {row_at(n.grad_y, r + i), row_at(n.hidden, r + i),
               n.grad_hidden.data ? row_at(n.grad_hidden, r + i) : nullptr, row_at(n.grad_x, r + i)};
  backward_rows<DTYPE, ROWS>(n, r, rows, sums);
}

static bool is_usual_backward(const Norm& n) {
  Dtype dtype = n.grad_x.dtype;
  bool same = n.hidden.dtype == dtype && n.grad_y.dtype == dtype;
  if (n.grad_hidden.data) same = same && n.grad_hidden.dtype == dtype;
  return same && n.dropout.scale == 0 && !n.grad_residual.data && n.width % W == 0;
}

// Any row, by way of float32.
static void backward_by_float(const Norm& n, int64_t r, Gradients sums, float* scratch) {
  int64_t padded = round_up(n.width, W);
  float *grad = scratch, *h = grad + padded, *more = h + padded;
  load_floats(grad, row_at(n.grad_y, r), n.grad_y.dtype, n.width);
  load_floats(h, row_at(n.hidden, r), n.hidden.dtype, n.width);
  if (n.grad_hidden.data) load_floats(more, row_at(n.grad_hidden, r), n.grad_hidden.dtype, n.width);
  Inputs row = {(char*)grad, (char*)h, n.grad_hidden.data ? (char*)more : nullptr, (char*)h};
  backward_rows<Dtype::float32, 1>(n, r, &row, sums);
  if (n.grad_residual.data) store_row(n.grad_residual, r, h, n.width);
  if (n.dropout.scale != 0) dropout(n, h, r);
  store_row(n.grad_x, r, h, n.width);
}

// The sums of a part of the rows, in the workspace.
static Gradients sums_of(const Norm& n, int64_t part) {
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

// One block of rows: they are added up in order, into sums of the block's own, so the result does not depend on the
// number of threads.
void norm_backward_tile(const Norm& n, int64_t part, float* scratch) {
  Gradients all = sums_of(n, part);
  for (int64_t i = 0; i < n.heads * n.width; i++) {
    if (all.weight) all.weight[i] = 0;
    if (all.bias) all.bias[i] = 0;
  }
  auto head_of = [&](int64_t r) {
    int64_t at = r % n.heads * n.width;
    return Gradients{all.weight ? all.weight + at : nullptr, all.bias ? all.bias + at : nullptr};
  };
  int64_t r = n.rows * part / n.parts, end = n.rows * (part + 1) / n.parts;
  if (!is_usual_backward(n)) {
    for (; r < end; r++) backward_by_float(n, r, head_of(r), scratch);
    return;
  }
  with_dtype(n.grad_x.dtype, [&](auto dtype) {
    constexpr Dtype DTYPE = decltype(dtype)::value;
    // Rows of different heads have different parameters.
    for (; n.heads == 1 && r + AT_ONCE <= end; r += AT_ONCE) backward_in_place<DTYPE, AT_ONCE>(n, r, all);
    for (; r < end; r++) backward_in_place<DTYPE, 1>(n, r, head_of(r));
  });
}

// ------------------------------------------------------------------------------------------------ parameters, summed

constexpr int64_t COLS = 512;  // parameters of a tile

int64_t norm_parameters_tiles(const Norm& n) {
  return n.grad_weight.data || n.grad_bias.data ? (n.heads * n.width + COLS - 1) / COLS : 0;
}
size_t norm_parameters_scratch(const Norm&) { return COLS; }

// The sum of the parts, in order, of some parameters.
void norm_parameters_tile(const Norm& n, int64_t tile, float* sum) {
  int64_t begin = tile * COLS, count = min(COLS, n.heads * n.width - begin);
  auto add_up = [&](const Parameters& to, float* Gradients::*which) {
    if (!to.data) return;
    for (int64_t c = 0; c < count; c += W) {
      vf total = {};
      for (int64_t part = 0; part < n.parts; part++) total += load<vf>(sums_of(n, part).*which + begin + c);
      store(sum + c, total);
    }
    store_floats((char*)to.data + begin * element_size(to.dtype), sum, to.dtype, count);
  };
  add_up(n.grad_weight, &Gradients::weight);
  add_up(n.grad_bias, &Gradients::bias);
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
