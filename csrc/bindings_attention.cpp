// The operators of attention, decoding and rotary embedding. They take arguments that Python has checked
// (flashattn/arguments.py).
#include <limits>
#include <tuple>

#include "dispatch.h"
#include "score_fields.h"

namespace flashattn {
namespace {

Heads heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
Heads heads(const OptionalTensor& x) { return x ? heads(*x) : Heads{}; }

// x itself if its last dimension is contiguous, else one copy.
Tensor last_dim_contiguous(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

OptionalTensor last_dim_contiguous(const OptionalTensor& x) {
  if (!x) return {};
  return last_dim_contiguous(*x);
}

OptionalTensor contiguous(const OptionalTensor& x) {
  if (!x) return {};
  return torch::stable::contiguous(*x);
}

ScoreTensor score_tensor(const OptionalTensor& x) {
  if (!x) return {};
  ScoreTensor t = {x->data_ptr()};
  int64_t* sizes[] = {&t.size_batch, &t.size_head, &t.size_q, &t.size_k};
  int64_t* strides[] = {&t.stride_batch, &t.stride_head, &t.stride_q, &t.stride_k};
  for (int i = 0; i < 4; i++) *sizes[i] = x->size(i), *strides[i] = x->size(i) == 1 ? 0 : x->stride(i);
  return t;
}

// Keeps alive the tensors that the kernels read.
struct ScoreArgs {
  FLASHATTN_SCORE_FIELDS(FLASHATTN_MEMBER)

  Score to_score(int64_t seq_q, int64_t seq_k) {
    constexpr int64_t far = int64_t{1} << 60;
    Score s = {};
    s.scale = static_cast<float>(scale), s.diagonal = seq_k - seq_q;
    s.first = left ? s.diagonal - *left : -far, s.last = right ? s.diagonal + *right : far;
    s.q_lengths = data_ptr<int32_t>(q_lengths), s.kv_lengths = data_ptr<int32_t>(kv_lengths);
    s.softcap = static_cast<float>(softcap.value_or(0));
    s.alibi_slopes = data_ptr<float>(alibi_slopes);
    s.alibi_slopes_stride = alibi_slopes && alibi_slopes->size(0) > 1 ? alibi_slopes->size(1) : 0;
    s.mask = score_tensor(mask), s.bias = score_tensor(bias);
    if (bias) s.bias.dtype = dtype_of(*bias);
    s.sinks = as_float32(sinks);
    s.dropout = dropout(dropout_p, seed);
    return s;
  }
};

// Python has checked them too, except in a compiled graph.
void check_starts(const char* side, const int32_t* starts, int64_t batch, int64_t total, int64_t max_seqlen) {
  STD_TORCH_CHECK(starts[0] == 0 && starts[batch] <= total, "cu_seqlens_", side,
                  " must begin with 0 and end at most at ", total, ", got ", starts[0], " and ", starts[batch]);
  for (int64_t b = 0; b < batch; b++)
    STD_TORCH_CHECK(starts[b] <= starts[b + 1] && starts[b + 1] - starts[b] <= max_seqlen, "cu_seqlens_", side,
                    " must never fall, nor rise by more than max_seqlen_", side, " ", max_seqlen, ", got ", starts[b],
                    " before ", starts[b + 1]);
}

Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                    const OptionalTensor& rest, ScoreArgs& score) {
  Attention a = {};
  a.dtype = dtype_of(q);
  a.batch = q.size(0), a.heads = q.size(1), a.seq_q = q.size(2), a.head_dim = q.size(3);
  a.kv_heads = k.size(1), a.seq_k = k.size(2), a.head_dim_v = v.size(3);
  a.q = heads(q), a.k = heads(k), a.v = heads(v), a.out = heads(out);
  a.lse = data_ptr<float>(lse), a.rest = data_ptr<float>(rest);
  if (score.cu_seqlens) {
    const int32_t* starts = data_ptr<int32_t>(score.cu_seqlens);
    a.ragged = true, a.batch = score.cu_seqlens->size(1) - 1;
    check_starts("q", starts, a.batch, a.seq_q, *score.max_seqlen_q);
    check_starts("k", starts + a.batch + 1, a.batch, a.seq_k, *score.max_seqlen_k);
    a.packing = {starts, starts + a.batch + 1, a.seq_q};
    a.seq_q = std::min(a.seq_q, *score.max_seqlen_q), a.seq_k = std::min(a.seq_k, *score.max_seqlen_k);
    for (Heads* x : {&a.q, &a.k, &a.v, &a.out}) x->stride_batch = 0;
  }
  a.score = score.to_score(a.seq_q, a.seq_k);
  return a;
}

// A result with the batch, heads and seq of `like`. Packed sequences are laid out token by token, as the caller's
// tensors are, with 0 past the last.
Tensor new_result(const Tensor& like, int64_t dim, const ScoreArgs& score, bool has_queries) {
  if (!score.cu_seqlens) return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2), dim});
  const int64_t heads = like.size(1), total = like.size(2), batch = score.cu_seqlens->size(1) - 1;
  Tensor x = torch::stable::new_empty(like, {1, total, heads, dim});
  const int64_t used = data_ptr<int32_t>(score.cu_seqlens)[has_queries ? batch : 2 * batch + 1];
  Tensor unused = torch::stable::narrow(x, 1, used, total - used);
  torch::stable::zero_(unused);
  return torch::stable::transpose(x, 1, 2);
}

Tensor new_lse(const Tensor& q, const ScoreArgs& score) {
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (score.cu_seqlens) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  return lse;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(Tensor q, Tensor k,
                                                     Tensor v FLASHATTN_SCORE_FIELDS(FLASHATTN_PARAMETER)) {
  q = last_dim_contiguous(q), k = last_dim_contiguous(k), v = last_dim_contiguous(v);
  ScoreArgs score = {FLASHATTN_SCORE_FIELDS(FLASHATTN_ARGUMENT)};
  Tensor out = new_result(q, v.size(3), score, true), lse = new_lse(q, score), rest = new_like(lse);
  if (score.cu_seqlens) torch::stable::zero_(rest);
  run(engine().attention_forward, attention(q, k, v, out, lse, rest, score));
  return {out, lse, rest};
}

// Gradients by q, k, v and, with_grad_bias, the bias, and what they are computed from.
struct GradientArgs {
  Tensor grad_out;
  OptionalTensor grad_lse;
  Tensor grad_q, grad_k, grad_v;
  OptionalTensor grad_bias;

  GradientArgs(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
               const Tensor& v, const ScoreArgs& score, bool with_grad_bias)
      : grad_out(last_dim_contiguous(grad_out)),
        grad_lse(contiguous(grad_lse)),
        grad_q(new_result(q, q.size(3), score, true)),
        grad_k(new_result(k, k.size(3), score, false)),
        grad_v(new_result(v, v.size(3), score, false)) {
    if (with_grad_bias) grad_bias = torch::stable::new_empty(q, score.bias->sizes(), ScalarType::Float);
  }

  void add_to(Attention& a) const {
    a.grad_out = heads(grad_out), a.grad_q = heads(grad_q), a.grad_k = heads(grad_k), a.grad_v = heads(grad_v);
    if (a.packing.q_starts)
      for (Heads* x : {&a.grad_out, &a.grad_q, &a.grad_k, &a.grad_v}) x->stride_batch = 0;
    a.grad_bias = score_tensor(grad_bias);
    a.grad_lse = data_ptr<float>(grad_lse);
  }
};

std::tuple<Tensor, Tensor, Tensor, OptionalTensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor rest FLASHATTN_SCORE_FIELDS(FLASHATTN_PARAMETER), bool with_grad_bias) {
  q = last_dim_contiguous(q), k = last_dim_contiguous(k), v = last_dim_contiguous(v);
  ScoreArgs score = {FLASHATTN_SCORE_FIELDS(FLASHATTN_ARGUMENT)};
  const GradientArgs grad(grad_out, grad_lse, q, k, v, score, with_grad_bias);
  Attention a = attention(q, k, v, out, lse, rest, score);
  grad.add_to(a);
  run(engine().attention_backward, a);
  return {grad.grad_q, grad.grad_k, grad.grad_v, grad.grad_bias};
}

// Tangents of the inputs; they keep alive what the kernels read.
struct TangentArgs {
  OptionalTensor q, k, v, bias, sinks;

  Tangents to_tangents(const Tensor& out, const Tensor& lse, const ScoreArgs& score) {
    for (OptionalTensor* x : {&q, &k, &v, &bias}) *x = last_dim_contiguous(*x);
    Tangents t = {
        heads(q), heads(k), heads(v), heads(out), score_tensor(bias), as_float32(sinks), data_ptr<float>(lse)};
    if (bias) t.bias.dtype = dtype_of(*bias);
    if (score.cu_seqlens)
      for (Heads* x : {&t.q, &t.k, &t.v, &t.out}) x->stride_batch = 0;
    return t;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_jvp(
    Tensor q, Tensor k, Tensor v, OptionalTensor tangent_q, OptionalTensor tangent_k, OptionalTensor tangent_v,
    OptionalTensor tangent_bias, OptionalTensor tangent_sinks FLASHATTN_SCORE_FIELDS(FLASHATTN_PARAMETER)) {
  q = last_dim_contiguous(q), k = last_dim_contiguous(k), v = last_dim_contiguous(v);
  ScoreArgs score = {FLASHATTN_SCORE_FIELDS(FLASHATTN_ARGUMENT)};
  Tensor out = new_result(q, v.size(3), score, true), tangent_out = new_result(q, v.size(3), score, true);
  Tensor lse = new_lse(q, score), rest = new_like(lse), tangent_lse = new_like(lse);
  if (score.cu_seqlens) torch::stable::zero_(rest), torch::stable::zero_(tangent_lse);
  TangentArgs tangents = {tangent_q, tangent_k, tangent_v, tangent_bias, tangent_sinks};
  Attention a = attention(q, k, v, out, lse, rest, score);
  a.tangent = tangents.to_tangents(tangent_out, tangent_lse, score);
  run(engine().attention_jvp, a);
  return {out, lse, rest, tangent_out, tangent_lse};
}

std::tuple<Tensor, Tensor, Tensor, OptionalTensor> attention_hvp(
    Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor rest,
    OptionalTensor tangent_q, OptionalTensor tangent_k, OptionalTensor tangent_v, OptionalTensor tangent_bias,
    Tensor tangent_out, Tensor tangent_lse FLASHATTN_SCORE_FIELDS(FLASHATTN_PARAMETER), bool with_grad_bias) {
  q = last_dim_contiguous(q), k = last_dim_contiguous(k), v = last_dim_contiguous(v);
  tangent_out = last_dim_contiguous(tangent_out), tangent_lse = torch::stable::contiguous(tangent_lse);
  ScoreArgs score = {FLASHATTN_SCORE_FIELDS(FLASHATTN_ARGUMENT)};
  const GradientArgs grad(grad_out, grad_lse, q, k, v, score, with_grad_bias);
  TangentArgs tangents = {tangent_q, tangent_k, tangent_v, tangent_bias};
  Attention a = attention(q, k, v, out, lse, rest, score);
  a.tangent = tangents.to_tangents(tangent_out, tangent_lse, score);
  grad.add_to(a);
  run(engine().attention_hvp, a);
  return {grad.grad_q, grad.grad_k, grad.grad_v, grad.grad_bias};
}

// Attention to a cache: keys 0 .. kv_lengths[b] of each batch row, in pages if there is a table.
std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k, Tensor v, OptionalTensor page_table,
                                            int64_t max_kv_length FLASHATTN_SCORE_FIELDS(FLASHATTN_PARAMETER)) {
  q = last_dim_contiguous(q);
  ScoreArgs score = {FLASHATTN_SCORE_FIELDS(FLASHATTN_ARGUMENT)};
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), v.size(3)});  // token by token
  out = torch::stable::transpose(out, 1, 2);
  Tensor lse = new_lse(q, score);
  Attention a = attention(q, k, v, out, lse, {}, score);
  a.ragged = true, a.seq_k = max_kv_length;
  a.score = score.to_score(a.seq_q, a.seq_k);
  if (page_table) a.pages = {data_ptr<int32_t>(page_table), page_table->size(1), k.size(2)};
  run(engine().attention_forward, a);
  return {out, lse};
}

// Writes x (batch, heads, seq, dim), rotated if there are tables, to `to`: a tensor of that shape, or, with `append`, a
// cache.
void rotate_and_store(Tensor x, Tensor to, OptionalTensor page_table, Tensor starts, OptionalTensor counts,
                      OptionalTensor cos, OptionalTensor sin, bool interleaved, bool append) {
  x = last_dim_contiguous(x);
  Rotary r = {dtype_of(x), Dtype::float32, x.size(0), x.size(1), x.size(2), x.size(3)};
  r.interleaved = interleaved, r.append = append;
  r.x = heads(x), r.to = heads(to);
  if (page_table) r.pages = {data_ptr<int32_t>(page_table), page_table->size(1), to.size(2)};
  r.starts = data_ptr<int32_t>(starts), r.counts = data_ptr<int32_t>(counts);
  if (cos) {
    cos = torch::stable::contiguous(*cos), sin = torch::stable::contiguous(*sin);
    r.pairs = cos->size(1), r.table_dtype = dtype_of(*cos);
    r.cos = data_ptr<char>(cos), r.sin = data_ptr<char>(sin);
  }
  run(engine().rotary, r);
}

}  // namespace
}  // namespace flashattn

#define SCORE_SCHEMA FLASHATTN_SCORE_FIELDS(FLASHATTN_SCHEMA)

STABLE_TORCH_LIBRARY_FRAGMENT(flashattn_cpu, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v" SCORE_SCHEMA ") -> (Tensor out, Tensor lse, Tensor rest)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? rest" SCORE_SCHEMA
      ", bool with_grad_bias) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? grad_bias)");
  m.def(
      "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? tangent_q, Tensor? tangent_k, Tensor? tangent_v, "
      "Tensor? tangent_bias, Tensor? tangent_sinks" SCORE_SCHEMA
      ") -> (Tensor out, Tensor lse, Tensor rest, Tensor tangent_out, Tensor tangent_lse)");
  m.def(
      "attention_hvp(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? rest, Tensor? tangent_q, Tensor? tangent_k, Tensor? tangent_v, Tensor? tangent_bias, "
      "Tensor tangent_out, Tensor tangent_lse" SCORE_SCHEMA
      ", bool with_grad_bias) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? grad_bias)");
  m.def("attention_decode(Tensor q, Tensor k, Tensor v, Tensor? page_table, int max_kv_length" SCORE_SCHEMA
        ") -> (Tensor out, Tensor lse)");
  m.def(
      "rotate_and_store(Tensor x, Tensor(a!) to, Tensor? page_table, Tensor starts, Tensor? counts, Tensor? cos, "
      "Tensor? sin, bool interleaved, bool append) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&flashattn::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&flashattn::attention_backward));
  m.impl("attention_jvp", TORCH_BOX(&flashattn::attention_jvp));
  m.impl("attention_hvp", TORCH_BOX(&flashattn::attention_hvp));
  m.impl("attention_decode", TORCH_BOX(&flashattn::attention_decode));
  m.impl("rotate_and_store", TORCH_BOX(&flashattn::rotate_and_store));
}
