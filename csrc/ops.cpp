// The operators of the CPU engine, on LibTorch's stable ABI: one binary serves every PyTorch from 2.10 on. They take
// checked arguments (flashattn/attention.py, norm.py) and share the tiles out over PyTorch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "engine.h"
#include "norm_fields.h"
#include "score_fields.h"

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace flashattn {

#define FLASHATTN_DECLARE(isa) \
  namespace isa {              \
  extern const Engine engine;  \
  }
FLASHATTN_DECLARE(portable)
#if defined(FLASHATTN_X86)
FLASHATTN_DECLARE(avx2)
FLASHATTN_DECLARE(avx512)
FLASHATTN_DECLARE(avx512bf16)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Isa {
  const char* name;
  const Engine* engine;
  bool supported;
};

// All that were compiled, the best first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
#if defined(FLASHATTN_X86)
    __builtin_cpu_init();
    const bool v4 = __builtin_cpu_supports("x86-64-v4") != 0;
    return std::vector<Isa>{{"avx512bf16", &avx512bf16::engine, v4 && __builtin_cpu_supports("avx512bf16") != 0},
                            {"avx512", &avx512::engine, v4},
                            {"avx2", &avx2::engine, __builtin_cpu_supports("x86-64-v3") != 0},
                            {"portable", &portable::engine, true}};
#else
    return std::vector<Isa>{{"portable", &portable::engine, true}};
#endif
  }();
  return all;
}

// The best the processor has, or the one FLASHATTN_CPU_ISA names (which may only lower it).
const Isa& isa() {
  static const Isa chosen = [] {
    const char* wanted = std::getenv("FLASHATTN_CPU_ISA");
    for (const Isa& i : isas())
      if (i.supported && (!wanted || !*wanted || !std::strcmp(wanted, i.name))) return i;
    return Isa{nullptr, nullptr, false};
  }();
  return chosen;
}

const Engine& engine() {
  STD_TORCH_CHECK(isa().engine,
                  "FLASHATTN_CPU_ISA must be avx512bf16, avx512, avx2 or portable, and one this processor has; got ",
                  std::getenv("FLASHATTN_CPU_ISA"));
  return *isa().engine;
}

using Memory = std::unique_ptr<float, void (*)(void*)>;

Memory allocate(size_t floats) {
  const size_t bytes = (floats * sizeof(float) / 64 + 1) * 64;
  Memory memory(static_cast<float*>(std::aligned_alloc(64, bytes)), std::free);
  STD_TORCH_CHECK(memory, "the CPU engine cannot allocate ", bytes, " bytes");
  return memory;
}

template <class Call>
void run(const Kernel<Call>& kernel, const Call& call) {
  const int64_t tiles = kernel.tiles(call);
  if (tiles == 0) return;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tiles);
  std::atomic<int64_t> next{0};
  // parallel_for splits statically, so it gets one item a thread, and each thread takes the next tile when it is free.
  auto work = [&](int64_t begin, int64_t end) {
    Memory scratch = allocate(kernel.scratch_floats(call));
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t tile; (tile = next.fetch_add(1)) < tiles;) kernel.run(call, tile, scratch.get());
  };
  if (threads == 1) return work(0, 1);
  torch::stable::parallel_for(0, threads, 1, work);
}

template <class Call>
void run(const Operation<Call>& operation, Call call) {
  Memory workspace(nullptr, std::free);
  if (operation.workspace_floats) {
    workspace = allocate(operation.workspace_floats(call));
    call.workspace = workspace.get();
  }
  for (const auto& pass : operation.passes)
    if (pass.run) run(pass, call);
}

Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "the CPU engine takes float32, bfloat16 and float16");
  }
}

Dtype dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
T* pointer(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// What one field of a list becomes: FLASHATTN_SCORE_FIELDS(FLASHATTN_MEMBER), and so on. A parameter and a schema entry
// begin with a comma, so they follow at least one other.
#define FLASHATTN_MEMBER(type, schema, name) type name;
#define FLASHATTN_PARAMETER(type, schema, name) , type name
#define FLASHATTN_ARGUMENT(type, schema, name) name,
#define FLASHATTN_SCHEMA(type, schema, name) ", " schema " " #name

// ------------------------------------------------------------------------------------------------ attention

Heads heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// x itself if its last dimension is contiguous, else one copy.
Tensor last_dim_contiguous(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

Plane plane(const OptionalTensor& x) {
  if (!x) return {};
  Plane p = {x->data_ptr()};
  int64_t* sizes[] = {&p.size_batch, &p.size_head, &p.size_q, &p.size_k};
  int64_t* strides[] = {&p.stride_batch, &p.stride_head, &p.stride_q, &p.stride_k};
  for (int i = 0; i < 4; i++) *sizes[i] = x->size(i), *strides[i] = x->size(i) == 1 ? 0 : x->stride(i);
  return p;
}

// The threshold is that of dropout_threshold in flashattn/backends/common.py.
Dropout dropout(double p, const OptionalTensor& seed) {
  if (p == 0) return {};
  uint32_t threshold = static_cast<uint32_t>(std::min(p * 2147483648.0, 2147483647.0));
  return {*static_cast<uint64_t*>(seed->data_ptr()), threshold, static_cast<float>(1 / (1 - p))};
}

// Parameters as the kernels read them: float32, contiguous.
const float* floats(OptionalTensor& p) {
  if (!p) return nullptr;
  if (p->scalar_type() != ScalarType::Float) p = torch::stable::to(*p, ScalarType::Float);
  if (!p->is_contiguous()) p = torch::stable::contiguous(*p);
  return pointer<float>(p);
}

// Keeps alive the tensors that the kernels read.
struct ScoreArgs {
  FLASHATTN_SCORE_FIELDS(FLASHATTN_MEMBER)

  Score score(int64_t seq_q, int64_t seq_k) {
    constexpr int64_t far = int64_t{1} << 60;
    Score s = {};
    s.scale = static_cast<float>(scale), s.diagonal = seq_k - seq_q;
    s.first = left ? s.diagonal - *left : -far, s.last = right ? s.diagonal + *right : far;
    s.q_lengths = pointer<int32_t>(q_lengths), s.kv_lengths = pointer<int32_t>(kv_lengths);
    s.softcap = static_cast<float>(softcap.value_or(0));
    s.alibi_slopes = pointer<float>(alibi_slopes);
    s.alibi_slopes_stride = alibi_slopes && alibi_slopes->size(0) > 1 ? alibi_slopes->size(1) : 0;
    s.mask = plane(mask), s.bias = plane(bias);
    if (bias) s.bias.dtype = dtype_of(*bias);
    s.sinks = floats(sinks);
    s.dropout = dropout(dropout_p, seed);
    return s;
  }
};

// Python has checked them, but not where a graph was compiled.
void check_starts(const char* side, const int32_t* starts, int64_t batch, int64_t total, int64_t longest) {
  STD_TORCH_CHECK(starts[0] == 0 && starts[batch] <= total, "cu_seqlens_", side,
                  " must begin with 0 and end at most at ", total, ", got ", starts[0], " and ", starts[batch]);
  for (int64_t b = 0; b < batch; b++)
    STD_TORCH_CHECK(starts[b] <= starts[b + 1] && starts[b + 1] - starts[b] <= longest, "cu_seqlens_", side,
                    " must never fall, nor rise by more than max_seqlen_", side, " ", longest, ", got ", starts[b],
                    " before ", starts[b + 1]);
}

Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                    const OptionalTensor& rest, ScoreArgs& score) {
  Attention a = {};
  a.dtype = dtype_of(q);
  a.batch = q.size(0), a.heads = q.size(1), a.seq_q = q.size(2), a.head_dim = q.size(3);
  a.kv_heads = k.size(1), a.seq_k = k.size(2), a.head_dim_v = v.size(3);
  a.q = heads(q), a.k = heads(k), a.v = heads(v), a.out = heads(out);
  a.lse = pointer<float>(lse), a.rest = pointer<float>(rest);
  if (score.cu_seqlens) {
    const int32_t* starts = pointer<int32_t>(score.cu_seqlens);
    a.ragged = true, a.batch = score.cu_seqlens->size(1) - 1;
    check_starts("q", starts, a.batch, a.seq_q, *score.max_seqlen_q);
    check_starts("k", starts + a.batch + 1, a.batch, a.seq_k, *score.max_seqlen_k);
    a.packing = {starts, starts + a.batch + 1, a.seq_q};
    a.seq_q = std::min(a.seq_q, *score.max_seqlen_q), a.seq_k = std::min(a.seq_k, *score.max_seqlen_k);
    for (Heads* x : {&a.q, &a.k, &a.v, &a.out}) x->stride_batch = 0;
  }
  a.score = score.score(a.seq_q, a.seq_k);
  return a;
}

// A result with q's batch, heads and sequence. Of packed sequences token after token, as the caller's q, and 0 past
// the last.
Tensor result(const Tensor& like, int64_t dim, const ScoreArgs& score, bool of_queries) {
  if (!score.cu_seqlens) return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2), dim});
  const int64_t heads = like.size(1), total = like.size(2), batch = score.cu_seqlens->size(1) - 1;
  Tensor x = torch::stable::new_empty(like, {1, total, heads, dim});
  const int64_t used = pointer<int32_t>(score.cu_seqlens)[of_queries ? batch : 2 * batch + 1];
  Tensor rest = torch::stable::narrow(x, 1, used, total - used);
  torch::stable::zero_(rest);
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
  Tensor out = result(q, v.size(3), score, true), lse = new_lse(q, score), rest = new_like(lse);
  if (score.cu_seqlens) torch::stable::zero_(rest);
  run(engine().attention_forward, attention(q, k, v, out, lse, rest, score));
  return {out, lse, rest};
}

std::tuple<Tensor, Tensor, Tensor, OptionalTensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor rest FLASHATTN_SCORE_FIELDS(FLASHATTN_PARAMETER), bool with_grad_bias) {
  q = last_dim_contiguous(q), k = last_dim_contiguous(k), v = last_dim_contiguous(v);
  grad_out = last_dim_contiguous(grad_out);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  ScoreArgs score = {FLASHATTN_SCORE_FIELDS(FLASHATTN_ARGUMENT)};
  Tensor grad_q = result(q, q.size(3), score, true), grad_k = result(k, k.size(3), score, false);
  Tensor grad_v = result(v, v.size(3), score, false);
  OptionalTensor grad_bias;
  if (with_grad_bias) grad_bias = torch::stable::new_empty(q, bias->sizes(), ScalarType::Float);
  Attention a = attention(q, k, v, out, lse, rest, score);
  a.grad_out = heads(grad_out), a.grad_q = heads(grad_q), a.grad_k = heads(grad_k), a.grad_v = heads(grad_v);
  if (a.packing.q_starts)
    for (Heads* x : {&a.grad_out, &a.grad_q, &a.grad_k, &a.grad_v}) x->stride_batch = 0;
  a.grad_bias = plane(grad_bias);
  a.grad_lse = pointer<float>(grad_lse);
  run(engine().attention_backward, a);
  return {grad_q, grad_k, grad_v, grad_bias};
}

// Against a cache: keys 0 .. kv_lengths[b] of each batch row, in pages where there is a table.
std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k, Tensor v, OptionalTensor page_table,
                                            int64_t longest FLASHATTN_SCORE_FIELDS(FLASHATTN_PARAMETER)) {
  q = last_dim_contiguous(q);
  ScoreArgs score = {FLASHATTN_SCORE_FIELDS(FLASHATTN_ARGUMENT)};
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), v.size(3)});  // token after token
  out = torch::stable::transpose(out, 1, 2);
  Tensor lse = new_lse(q, score);
  Attention a = attention(q, k, v, out, lse, {}, score);
  a.ragged = true, a.seq_k = longest;
  a.score = score.score(a.seq_q, a.seq_k);
  if (page_table) a.pages = {pointer<int32_t>(page_table), page_table->size(1), k.size(2)};
  run(engine().attention_forward, a);
  return {out, lse};
}

// x (batch, heads, seq, dim), rotated where there are tables, to `to`: another such tensor, or with `append` a cache.
void rotate_and_store(Tensor x, Tensor to, OptionalTensor page_table, Tensor starts, OptionalTensor counts,
                      OptionalTensor cos, OptionalTensor sin, bool interleaved, bool append) {
  x = last_dim_contiguous(x);
  Rotary r = {dtype_of(x), Dtype::float32, x.size(0), x.size(1), x.size(2), x.size(3)};
  r.interleaved = interleaved, r.append = append;
  r.x = heads(x), r.to = heads(to);
  if (page_table) r.pages = {pointer<int32_t>(page_table), page_table->size(1), to.size(2)};
  r.starts = pointer<int32_t>(starts), r.counts = pointer<int32_t>(counts);
  if (cos) {
    cos = torch::stable::contiguous(*cos), sin = torch::stable::contiguous(*sin);
    r.pairs = cos->size(1), r.table_dtype = dtype_of(*cos);
    r.cos = pointer<char>(cos), r.sin = pointer<char>(sin);
  }
  run(engine().rotary, r);
}

// ------------------------------------------------------------------------------------------------ norms

// Row blocks of a norm's backward, each with partial sums of its own: at most PARTS, of PART_ROWS rows, lest the sums
// become long and inexact, or of PART_NUMBERS numbers, so that there is work for every thread.
constexpr int64_t PARTS = 32, PART_ROWS = 32, PART_NUMBERS = 1 << 16;
int64_t parts_of(const Norm& n) {
  return std::min({PARTS, n.rows, std::max({int64_t{1}, n.rows / PART_ROWS, n.rows * n.width / PART_NUMBERS})});
}

// x as rows: its leading dimensions merged in row-major order, those not needed of size 1 and last. Where three are not
// enough, or the last is not contiguous, x becomes a copy.
Rows rows(Tensor& x) {
  Rows r = {x.data_ptr(), dtype_of(x)};
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
  if (x.numel() == 0) return r;  // its strides may be anything, those of a copy as well
  int used = 0;
  bool fits = x.stride(-1) == 1 || x.size(-1) == 1;
  for (int64_t i = 0; fits && i + 1 < x.dim(); i++) {
    if (x.size(i) == 1) continue;
    if (used > 0 && strides[used - 1] == x.size(i) * x.stride(i))
      sizes[used - 1] *= x.size(i), strides[used - 1] = x.stride(i);
    else if ((fits = used < 3))
      sizes[used] = x.size(i), strides[used++] = x.stride(i);
  }
  if (!fits) return x = torch::stable::contiguous(x), rows(x);
  r.size_1 = sizes[1], r.size_2 = sizes[2];
  r.stride_0 = strides[0], r.stride_1 = strides[1], r.stride_2 = strides[2];
  return r;
}
Rows rows(OptionalTensor& x) { return x ? rows(*x) : Rows{}; }

// Heads that have parameters of their own; 1 where all rows share them.
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
  n.x = rows(x), n.residual = rows(residual), n.y = rows(y), n.hidden = rows(hidden);
  n.weight = floats(weight), n.bias = floats(bias);
  n.mean = pointer<float>(mean), n.rstd = pointer<float>(rstd);
  run(engine().norm_forward, n);
  return {y, hidden, mean, rstd};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> norm_backward(
    Tensor grad_y, OptionalTensor grad_hidden, Tensor hidden, OptionalTensor weight, OptionalTensor bias, Tensor mean,
    Tensor rstd, ScalarType x_dtype, std::optional<ScalarType> residual_dtype FLASHATTN_NORM_FIELDS(
                                         FLASHATTN_PARAMETER)) {
  Norm n = norm(hidden, {FLASHATTN_NORM_FIELDS(FLASHATTN_ARGUMENT)});
  Tensor grad_x = torch::stable::new_empty(hidden, hidden.sizes(), x_dtype);
  OptionalTensor grad_residual, grad_weight, grad_bias;
  if (residual_dtype) grad_residual = torch::stable::new_empty(hidden, hidden.sizes(), *residual_dtype);
  if (weight) grad_weight = new_like(*weight), n.grad_weight = {grad_weight->data_ptr(), dtype_of(*weight)};
  if (bias) grad_bias = new_like(*bias), n.grad_bias = {grad_bias->data_ptr(), dtype_of(*bias)};
  n.heads = norm_heads(weight, bias), n.parts = parts_of(n);
  n.grad_y = rows(grad_y), n.grad_hidden = rows(grad_hidden), n.hidden = rows(hidden);
  n.grad_x = rows(grad_x), n.grad_residual = rows(grad_residual);
  n.weight = floats(weight);
  n.mean = center ? pointer<float>(mean) : nullptr, n.rstd = pointer<float>(rstd);
  run(engine().norm_backward, n);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

// ------------------------------------------------------------------------------------------------ linear layers

void linear(Tensor x, Tensor weight, OptionalTensor bias, Tensor y) {
  Linear l = {};
  l.dtype = dtype_of(x);
  l.in = weight.size(1), l.out = weight.size(0), l.stride = weight.stride(0), l.rows = x.numel() / l.in;
  l.x = x.data_ptr(), l.weight = weight.data_ptr(), l.bias = pointer<float>(bias), l.y = y.data_ptr();
  run(engine().linear, l);
}

// ------------------------------------------------------------------------------------------------ probes

void exp2_of(Tensor x, Tensor y, ScalarType dtype) {
  engine().exp2_of(dtype_of(dtype), pointer<float>(x), pointer<float>(y), x.numel());
}

// Both run on every thread, and return the work done: multiplications and additions, or bytes.
int64_t spin(Tensor like, int64_t iterations) {
  const Dtype dtype = dtype_of(like);
  std::atomic<int64_t> work{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) work += engine().spin(dtype, iterations);
  });
  return work;
}

int64_t read(Tensor memory) {
  const float* data = pointer<float>(memory);
  const int64_t n = memory.numel(), threads = torch::stable::get_num_threads();
  std::atomic<int64_t> numbers{0};  // a NaN would not be counted, so the sums must be used
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      const int64_t from = n * thread / threads, to = n * (thread + 1) / threads;
      const float sum = engine().read(data + from, to - from);
      if (sum == sum) numbers += to - from;
    }
  });
  return numbers * sizeof(float);
}

std::string cpu_isa() { return isa().name ? isa().name : ""; }

bool supports(std::string name) {
  for (const Isa& i : isas())
    if (name == i.name) return i.supported;
  return false;
}

}  // namespace
}  // namespace flashattn

STABLE_TORCH_LIBRARY(flashattn_cpu, m) {
  m.def("isa() -> str");
  m.def("supports(str isa) -> bool");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()");
  m.def("spin(Tensor like, int iterations) -> int");
  m.def("read(Tensor memory) -> int");
  m.def("exp2(Tensor x, Tensor(a!) y, ScalarType dtype) -> ()");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v" FLASHATTN_SCORE_FIELDS(FLASHATTN_SCHEMA)
      ") -> (Tensor out, Tensor lse, Tensor rest)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? rest" FLASHATTN_SCORE_FIELDS(FLASHATTN_SCHEMA) ", bool with_grad_bias) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? grad_bias)");
  m.def(
      "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? page_table, int longest"
      FLASHATTN_SCORE_FIELDS(FLASHATTN_SCHEMA) ") -> (Tensor out, Tensor lse)");
  m.def(
      "rotate_and_store(Tensor x, Tensor(a!) to, Tensor? page_table, Tensor starts, Tensor? counts, Tensor? cos, "
      "Tensor? sin, bool interleaved, bool append) -> ()");
  m.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, ScalarType hidden_dtype, "
      "bool keep_hidden" FLASHATTN_NORM_FIELDS(FLASHATTN_SCHEMA) ") "
      "-> (Tensor y, Tensor? hidden, Tensor? mean, Tensor rstd)");
  m.def(
      "norm_backward(Tensor grad_y, Tensor? grad_hidden, Tensor hidden, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor rstd, ScalarType x_dtype, ScalarType? residual_dtype" FLASHATTN_NORM_FIELDS(FLASHATTN_SCHEMA) ") "
      "-> (Tensor grad_x, Tensor? grad_residual, Tensor? grad_weight, Tensor? grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&flashattn::cpu_isa));
  m.impl("supports", TORCH_BOX(&flashattn::supports));
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&flashattn::attention_forward));
  m.impl("rotate_and_store", TORCH_BOX(&flashattn::rotate_and_store));
  m.impl("attention_decode", TORCH_BOX(&flashattn::attention_decode));
  m.impl("attention_backward", TORCH_BOX(&flashattn::attention_backward));
  m.impl("norm_forward", TORCH_BOX(&flashattn::norm_forward));
  m.impl("linear", TORCH_BOX(&flashattn::linear));
  m.impl("spin", TORCH_BOX(&flashattn::spin));
  m.impl("read", TORCH_BOX(&flashattn::read));
  m.impl("exp2", TORCH_BOX(&flashattn::exp2_of));
  m.impl("norm_backward", TORCH_BOX(&flashattn::norm_backward));
}

// `import flashattn._C` loads the library, which registers the operators above; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
