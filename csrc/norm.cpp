// LayerNorm and RMSNorm, forward and backward. The mathematics is in kernels/norm.py. A row is brought to float32 in
// scratch memory, padded with zeros to whole vectors, so the loops below have no tails.
#include "kernels.h"
#include "philox.h"
#include "simd.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int64_t ROWS_PER_TILE = 8;

static char* row_at(const Rows& x, int64_t r) {
  int64_t inner = r % x.size_2, outer = r / x.size_2;
  int64_t offset = inner * x.stride_2 + outer % x.size_1 * x.stride_1 + outer / x.size_1 * x.stride_0;
  return (char*)x.data + offset * element_size(x.dtype);
}

static void load_row(float* dst, const Rows& x, int64_t r, int64_t width) {
  load_floats(dst, row_at(x, r), x.dtype, width);
}

static void store_row(const Rows& x, int64_t r, const float* src, int64_t width) {
  store_floats(row_at(x, r), src, x.dtype, width);
}

static void dropout(const Norm& n, float* x, int64_t r) {
  for (int64_t c = 0; c < n.width; c++) {
    bool keep = philox(n.seed, (uint32_t)r, (uint32_t)c) >> 1 >= n.dropout_threshold;
    x[c] = keep ? x[c] * n.dropout_scale : 0;
  }
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

// Four sums side by side: shorter chains of additions, so faster and more exact.
template <class F>
static float sum_over(int64_t padded, F f) {
  vf total[4] = {};
  int64_t c = 0;
  for (; c + 4 * W <= padded; c += 4 * W)
    for (int i = 0; i < 4; i++) total[i] += f(c + i * W);
  for (; c < padded; c += W) total[0] += f(c);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

static void center(float* x, float mean, int64_t width, int64_t padded) {
  for (int64_t c = 0; c < padded; c += W) store(x + c, load<vf>(x + c) - mean);
  for (int64_t c = width; c < padded; c++) x[c] = 0;
}

// A row of parameters as whole vectors: in place but for its last vector, which would run past it.
static vf parameter(const float* p, int64_t c, int64_t width) {
  if (c + W <= width) return load<vf>(p + c);
  vf v = {};
  for (int64_t i = c; i < width; i++) v[i - c] = p[i];
  return v;
}

// ------------------------------------------------------------------------------------------------ forward

int64_t norm_forward_tiles(const Norm& n) { return (n.rows + ROWS_PER_TILE - 1) / ROWS_PER_TILE; }

size_t norm_forward_scratch(const Norm& n) { return 2 * round_up(n.width, W); }

static void forward_row(const Norm& n, int64_t r, float* h, float* other) {
  int64_t padded = round_up(n.width, W);
  load_row(h, n.x, r, n.width);
  if (n.dropout) dropout(n, h, r);
  if (n.residual.data) {
    load_row(other, n.residual, r, n.width);
    for (int64_t c = 0; c < padded; c += W) store(h + c, load<vf>(h + c) + load<vf>(other + c));
  }
  round_to(n.hidden_dtype, h, n.width);
  if (n.hidden.data) store_row(n.hidden, r, h, n.width);

  if (n.center) {
    float mean = sum_over(padded, [&](int64_t c) { return load<vf>(h + c); }) / n.width;
    center(h, mean, n.width, padded);
    n.mean[r] = mean;
  }
  float squares = sum_over(padded, [&](int64_t c) { return load<vf>(h + c) * load<vf>(h + c); });
  float rstd = 1 / __builtin_sqrtf(squares / n.width + n.eps);
  n.rstd[r] = rstd;

  const float* weight = n.weight ? n.weight + r % n.heads * n.width : nullptr;
  const float* bias = n.bias ? n.bias + r % n.heads * n.width : nullptr;
  for (int64_t c = 0; c < padded; c += W) {
    vf y = load<vf>(h + c) * rstd;
    if (weight) y = y * (parameter(weight, c, n.width) + n.weight_offset);
    if (bias) y = y + parameter(bias, c, n.width);
    store(h + c, y);
  }
  store_row(n.y, r, h, n.width);
}

void norm_forward_tile(const Norm& n, int64_t tile, float* scratch) {
  int64_t end = min(n.rows, (tile + 1) * ROWS_PER_TILE);
  for (int64_t r = tile * ROWS_PER_TILE; r < end; r++) forward_row(n, r, scratch, scratch + round_up(n.width, W));
}

// ------------------------------------------------------------------------------------------------ backward

int64_t norm_backward_tiles(const Norm& n) { return n.parts; }

size_t norm_backward_scratch(const Norm& n) { return 4 * round_up(n.width, W); }

static void backward_row(const Norm& n, int64_t r, float* part_weight, float* part_bias, float* scratch) {
  int64_t padded = round_up(n.width, W);
  float *grad = scratch, *xhat = grad + padded, *g = xhat + padded, *other = g + padded;
  float rstd = n.rstd[r];
  load_row(grad, n.grad_y, r, n.width);
  load_row(xhat, n.hidden, r, n.width);
  if (n.center) center(xhat, n.mean[r], n.width, padded);
  const float* weight = n.weight ? n.weight + r % n.heads * n.width : nullptr;
  for (int64_t c = 0; c < padded; c += W) {
    store(xhat + c, load<vf>(xhat + c) * rstd);
    vf y = load<vf>(grad + c);
    store(g + c, weight ? y * (parameter(weight, c, n.width) + n.weight_offset) : y);
  }
  float mean_gx = sum_over(padded, [&](int64_t c) { return load<vf>(g + c) * load<vf>(xhat + c); }) / n.width;
  float mean_g = n.center ? sum_over(padded, [&](int64_t c) { return load<vf>(g + c); }) / n.width : 0;

  for (int64_t c = 0; c < n.width; c++) {
    if (part_weight) part_weight[c] += grad[c] * xhat[c];
    if (part_bias) part_bias[c] += grad[c];
  }
  if (n.grad_hidden.data) load_row(other, n.grad_hidden, r, n.width);
  for (int64_t c = 0; c < padded; c += W) {
    vf h = (load<vf>(g + c) - mean_g - load<vf>(xhat + c) * mean_gx) * rstd;
    if (n.grad_hidden.data) h += load<vf>(other + c);
    store(g + c, h);
  }
  if (n.grad_residual.data) store_row(n.grad_residual, r, g, n.width);
  if (n.dropout) dropout(n, g, r);
  store_row(n.grad_x, r, g, n.width);
}

// One block of rows: they are added up in order, into sums of the block's own, so the result does not depend on the
// number of threads.
void norm_backward_tile(const Norm& n, int64_t part, float* scratch) {
  int64_t size = n.heads * n.width;
  float* weight = n.weight_parts ? n.weight_parts + part * size : nullptr;
  float* bias = n.bias_parts ? n.bias_parts + part * size : nullptr;
  for (int64_t i = 0; i < size; i++) {
    if (weight) weight[i] = 0;
    if (bias) bias[i] = 0;
  }
  for (int64_t r = n.rows * part / n.parts; r < n.rows * (part + 1) / n.parts; r++) {
    int64_t head = r % n.heads * n.width;
    backward_row(n, r, weight ? weight + head : nullptr, bias ? bias + head : nullptr, scratch);
  }
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
