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

// The inputs of a norm and memory for its results, or the tangents of these.
struct ForwardTensors {
  OptionalTensor x, residual, weight, bias, y, hidden;
};

NormTensors as_rows(ForwardTensors& t) {
  return {as_rows(t.x), as_rows(t.residual), as_rows(t.y), as_rows(t.hidden), as_float32(t.weight), as_float32(t.bias)};
}

OptionalTensor new_hidden(const Tensor& x, ScalarType dtype, bool keep) {
  return keep ? OptionalTensor(torch::stable::new_empty(x, x.sizes(), dtype)) : std::nullopt;
}

// Fills the results, and returns mean and rstd. tangents: null without forward mode.
std::tuple<OptionalTensor, Tensor> forward(Norm n, ScalarType hidden_dtype, ForwardTensors& t,
                                           ForwardTensors* tangents) {
  Tensor rstd = torch::stable::new_empty(*t.x, {n.rows}, ScalarType::Float);
  OptionalTensor mean;
  if (n.center) mean = torch::stable::new_empty(*t.x, {n.rows}, ScalarType::Float);
  n.heads = norm_heads(t.weight, t.bias), n.hidden_dtype = dtype_of(hidden_dtype);
  static_cast<NormTensors&>(n) = as_rows(t);
  if (tangents) n.tangent = as_rows(*tangents);
  n.mean = data_ptr<float>(mean), n.rstd = data_ptr<float>(rstd);
  run(engine().norm_forward, n);
  return {mean, rstd};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, Tensor> norm_forward(
    Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, ScalarType hidden_dtype,
    bool keep_hidden FLASHATTN_NORM_FIELDS(FLASHATTN_PARAMETER)) {
  Norm n = norm(x, {FLASHATTN_NORM_FIELDS(FLASHATTN_ARGUMENT)});
  ForwardTensors t = {x, residual, weight, bias, new_like(x), new_hidden(x, hidden_dtype, keep_hidden)};
  auto [mean, rstd] = forward(n, hidden_dtype, t, nullptr);
  return {*t.y, t.hidden, mean, rstd};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, Tensor, Tensor, OptionalTensor> norm_jvp(
    Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, OptionalTensor tangent_x,
    OptionalTensor tangent_residual, OptionalTensor tangent_weight, OptionalTensor tangent_bias,
    ScalarType hidden_dtype, bool keep_hidden FLASHATTN_NORM_FIELDS(FLASHATTN_PARAMETER)) {
  Norm n = norm(x, {FLASHATTN_NORM_FIELDS(FLASHATTN_ARGUMENT)});
  ForwardTensors t = {x, residual, weight, bias, new_like(x), new_hidden(x, hidden_dtype, keep_hidden)};
  ForwardTensors tangents = {tangent_x,    tangent_residual, tangent_weight,
                             tangent_bias, new_like(x),      new_hidden(x, hidden_dtype, keep_hidden)};
  auto [mean, rstd] = forward(n, hidden_dtype, t, &tangents);
  return {*t.y, t.hidden, mean, rstd, *tangents.y, tangents.hidden};
}

// The gradients, or their tangents, of what has a dtype. Those of parameters that are there are summed.
struct Gradients {
  Tensor x;
  OptionalTensor residual, weight, bias;
};

Gradients new_gradients(const Tensor& hidden, ScalarType x_dtype, std::optional<ScalarType> residual_dtype,
                        const OptionalTensor& weight, const OptionalTensor& bias) {
  Gradients g = {torch::stable::new_empty(hidden, hidden.sizes(), x_dtype)};
  if (residual_dtype) g.residual = torch::stable::new_empty(hidden, hidden.sizes(), *residual_dtype);
  if (weight) g.weight = new_like(*weight);
  if (bias) g.bias = new_like(*bias);
  return g;
}

ParameterGrad parameter_grad(OptionalTensor& p) {
  return p ? ParameterGrad{p->data_ptr(), dtype_of(*p)} : ParameterGrad{};
}

// n has what is read, but for the parameters.
void backward(Norm n, OptionalTensor weight, Gradients& g) {
  n.heads = norm_heads(g.weight, g.bias), n.parts = num_parts(n);
  n.grad_x = as_rows(g.x), n.grad_residual = as_rows(g.residual);
  n.grad_weight = parameter_grad(g.weight), n.grad_bias = parameter_grad(g.bias);
  n.weight = as_float32(weight);
  run(engine().norm_backward, n);
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> norm_backward(
    Tensor grad_y, OptionalTensor grad_hidden, Tensor hidden, OptionalTensor weight, OptionalTensor bias, Tensor mean,
    Tensor rstd, ScalarType x_dtype,
    std::optional<ScalarType> residual_dtype FLASHATTN_NORM_FIELDS(FLASHATTN_PARAMETER)) {
  Norm n = norm(hidden, {FLASHATTN_NORM_FIELDS(FLASHATTN_ARGUMENT)});
  Gradients g = new_gradients(hidden, x_dtype, residual_dtype, weight, bias);
  n.grad_y = as_rows(grad_y), n.grad_hidden = as_rows(grad_hidden), n.hidden = as_rows(hidden);
  n.mean = center ? data_ptr<float>(mean) : nullptr, n.rstd = data_ptr<float>(rstd);
  backward(n, weight, g);
  return {g.x, g.residual, g.weight, g.bias};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> norm_hvp(
    Tensor grad_y, Tensor hidden, OptionalTensor weight, Tensor mean, Tensor rstd, Tensor tangent_hidden,
    OptionalTensor tangent_weight, ScalarType x_dtype,
    std::optional<ScalarType> residual_dtype FLASHATTN_NORM_FIELDS(FLASHATTN_PARAMETER)) {
  Norm n = norm(hidden, {FLASHATTN_NORM_FIELDS(FLASHATTN_ARGUMENT)});
  Gradients g = new_gradients(hidden, x_dtype, residual_dtype, weight, std::nullopt);
  n.grad_y = as_rows(grad_y), n.hidden = as_rows(hidden);
  n.tangent.hidden = as_rows(tangent_hidden), n.tangent.weight = as_float32(tangent_weight);
  n.mean = center ? data_ptr<float>(mean) : nullptr, n.rstd = data_ptr<float>(rstd);
  backward(n, weight, g);
  return {g.x, g.residual, g.weight};
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
  m.def(
      "norm_jvp(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? tangent_x, Tensor? tangent_residual, "
      "Tensor? tangent_weight, Tensor? tangent_bias, ScalarType hidden_dtype, bool keep_hidden" NORM_SCHEMA
      ") "
      "-> (Tensor y, Tensor? hidden, Tensor? mean, Tensor rstd, Tensor tangent_y, Tensor? tangent_hidden)");
  m.def(
      "norm_hvp(Tensor grad_y, Tensor hidden, Tensor? weight, Tensor mean, Tensor rstd, Tensor tangent_hidden, "
      "Tensor? tangent_weight, ScalarType x_dtype, ScalarType? residual_dtype" NORM_SCHEMA
      ") "
      "-> (Tensor grad_x, Tensor? grad_residual, Tensor? grad_weight)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_cpu, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&flashattn::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&flashattn::norm_backward));
  m.impl("norm_jvp", TORCH_BOX(&flashattn::norm_jvp));
  m.impl("norm_hvp", TORCH_BOX(&flashattn::norm_hvp));
  m.impl("linear", TORCH_BOX(&flashattn::linear));
}
