// The operators of norms and linear layers. They take arguments that Python has checked (flashattn/norm.py, linear.py).
#include <tuple>

#include "dispatch.h"
#include "norm_fields.h"

namespace flashattn {
namespace {

// Row blocks of a norm's backward, each with its own partial sums: at most PARTS, of PART_ROWS rows, because long sums
// are inexact, or of PART_ELEMENTS elements, so that every thread has work.
constexpr int64_t PARTS = 32, PART_ROWS = 32, PART_ELEMENTS = 1 << 16;
int64_t num_parts(const Norm& n) {
  return std::min({PARTS, n.rows, std::max({int64_t{1}, n.rows / PART_ROWS, n.rows * n.width / PART_ELEMENTS})});
}

// x as rows: its leading dimensions merged in row-major order, unused ones last with size 1. If three do not suffice,
// or the last dimension is not contiguous, x becomes a copy.
Rows as_rows(Tensor& x) {
  Rows r = {x.data_ptr(), dtype_of(x)};
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
  if (x.numel() == 0) return r;  // strides of an empty tensor, or of its copy, mean nothing
  int used = 0;
  bool fits = x.stride(-1) == 1 || x.size(-1) == 1;
  for (int64_t i = 0; fits && i + 1 < x.dim(); i++) {
    if (x.size(i) == 1) continue;
    if (used > 0 && strides[used - 1] == x.size(i) * x.stride(i))
      sizes[used - 1] *= x.size(i), strides[used - 1] = x.stride(i);
    else if ((fits = used < 3))
      sizes[used] = x.size(i), strides[used++] = x.stride(i);
  }
  if (!fits) return x = torch::stable::contiguous(x), as_rows(x);
  r.size_1 = sizes[1], r.size_2 = sizes[2];
  r.stride_0 = strides[0], r.stride_1 = strides[1], r.stride_2 = strides[2];
  return r;
}
Rows as_rows(OptionalTensor& x) { return x ? as_rows(*x) : Rows{}; }

// The number of heads with parameters of their own; 1 if all rows share them.
int64_t norm_heads(const OptionalTensor& weight, const OptionalTensor& bias) {
  for (const OptionalTensor& p : {weight, bias})
    if (p && p->dim() == 2) return p->size(0);
  return 1;
}

struct NormArgs {
  FLASHATTN_NORM_FIELDS(FLASHATTN_MEMBER)
};

Norm norm(const Tensor& x, const NormArgs& args) {
  Norm n = {};
  n.width = x.size(-1), n.rows = x.numel() / n.width;
  n.center = args.center, n.eps = static_cast<float>(args.eps);
  n.weight_offset = static_cast<float>(args.weight_offset);
  n.dropout = dropout(args.dropout_p, args.seed);
  return n;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, Tensor> norm_forward(
    Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, ScalarType hidden_dtype,
    bool keep_hidden FLASHATTN_NORM_FIELDS(FLASHATTN_PARAMETER)) {
  Norm n = norm(x, {FLASHATTN_NORM_FIELDS(FLASHATTN_ARGUMENT)});
  Tensor y = new_like(x), rstd = torch::stable::new_empty(x, {n.rows}, ScalarType::Float);
  OptionalTensor hidden, mean;
  if (keep_hidden) hidden = torch::stable::new_empty(x, x.sizes(), hidden_dtype);
  if (center) mean = torch::stable::new_empty(x, {n.rows}, ScalarType::Float);
  n.heads = norm_heads(weight, bias), n.hidden_dtype = dtype_of(hidden_dtype);
  n.x = as_rows(x), n.residual = as_rows(residual), n.y = as_rows(y), n.hidden = as_rows(hidden);
  n.weight = as_float32(weight), n.bias = as_float32(bias);
  n.mean = data_ptr<float>(mean), n.rstd = data_ptr<float>(rstd);
  run(engine().norm_forward, n);
  return {y, hidden, mean, rstd};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> norm_backward(
    Tensor grad_y, OptionalTensor grad_hidden, Tensor hidden, OptionalTensor weight, OptionalTensor bias, Tensor mean,
    Tensor rstd, ScalarType x_dtype,
    std::optional<ScalarType> residual_dtype FLASHATTN_NORM_FIELDS(FLASHATTN_PARAMETER)) {
  Norm n = norm(hidden, {FLASHATTN_NORM_FIELDS(FLASHATTN_ARGUMENT)});
  Tensor grad_x = torch::stable::new_empty(hidden, hidden.sizes(), x_dtype);
  OptionalTensor grad_residual, grad_weight, grad_bias;
  if (residual_dtype) grad_residual = torch::stable::new_empty(hidden, hidden.sizes(), *residual_dtype);
  if (weight) grad_weight = new_like(*weight), n.grad_weight = {grad_weight->data_ptr(), dtype_of(*weight)};
  if (bias) grad_bias = new_like(*bias), n.grad_bias = {grad_bias->data_ptr(), dtype_of(*bias)};
  n.heads = norm_heads(weight, bias), n.parts = num_parts(n);
  n.grad_y = as_rows(grad_y), n.grad_hidden = as_rows(grad_hidden), n.hidden = as_rows(hidden);
  n.grad_x = as_rows(grad_x), n.grad_residual = as_rows(grad_residual);
  n.weight = as_float32(weight);
  n.mean = center ? data_ptr<float>(mean) : nullptr, n.rstd = data_ptr<float>(rstd);
  run(engine().norm_backward, n);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

// ------------------------------------------------------------------------------------------------ linear layers

void linear(Tensor x, Tensor weight, OptionalTensor bias, Tensor y) {
  Linear l = {};
  l.dtype = dtype_of(x);
  l.in = weight.size(1), l.out = weight.size(0), l.stride = weight.stride(0), l.rows = x.numel() / l.in;
  l.x = x.data_ptr(), l.weight = weight.data_ptr(), l.bias = data_ptr<float>(bias), l.y = y.data_ptr();
  run(engine().linear, l);
}

}  // namespace
}  // namespace flashattn

#define NORM_SCHEMA FLASHATTN_NORM_FIELDS(FLASHATTN_SCHEMA)

STABLE_TORCH_LIBRARY_FRAGMENT(flashattn_cpu, m) {
  m.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, ScalarType hidden_dtype, "
      "bool keep_hidden" NORM_SCHEMA
      ") "
      "-> (Tensor y, Tensor? hidden, Tensor? mean, Tensor rstd)");
  m.def(
      "norm_backward(Tensor grad_y, Tensor? grad_hidden, Tensor hidden, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor rstd, ScalarType x_dtype, ScalarType? residual_dtype" NORM_SCHEMA
      ") "
      "-> (Tensor grad_x, Tensor? grad_residual, Tensor? grad_weight, Tensor? grad_bias)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_cpu, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&flashattn::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&flashattn::norm_backward));
  m.impl("linear", TORCH_BOX(&flashattn::linear));
}
