// Shared by the bindings (compiled once) and the kernels (compiled once per instruction set): plain structs and a table
// of functions. The kernels include no torch header: they get pointers, sizes and strides.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace flashattn {

enum class Dtype { float32, bfloat16, float16 };

// A (batch, heads, seq, dim) tensor. Strides in elements; the last dimension is contiguous.
struct Heads {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_seq = 0;
};

// A (batch, heads, seq_q, seq_k) mask or bias, or null. Its own sizes are 1 where it is broadcast, and strides 0 there.
// Strides in elements; the last is 0 or 1.
struct ScoreTensor {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;  // of a bias; a mask has bytes
  int64_t size_batch = 1, size_head = 1, size_q = 1, size_k = 1;
  int64_t stride_batch = 0, stride_head = 0, stride_q = 0, stride_k = 0;
};

// All 0 without dropout.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // an element is dropped if 31 random bits are below it
  float scale;         // of kept elements
};

// Everything between q.k and softmax: flashattn/score.py. A new option is a line in score_fields.h, a field here, its
// conversion in ScoreArgs (bindings_attention.cpp), and its meaning in score.h (masks by position) or score_mods.h
// (scores).
struct Score {
  float scale;
  int64_t first, last;          // query i attends to keys i + first <= j <= i + last
  int64_t diagonal;             // seq_k - seq_q
  const int32_t* q_lengths;     // (batch,) or null
  const int32_t* kv_lengths;    // (batch,) or null
  float softcap;                // 0: none
  const float* alibi_slopes;    // (batch, heads) or null
  int64_t alibi_slopes_stride;  // from batch to batch
  ScoreTensor mask, bias;
  const float* sinks;  // (heads,) or null
  Dropout dropout;
};

// Sequences packed back to back: batch row b is tokens starts[b] .. starts[b + 1] of tensors without a batch dimension.
struct Packing {
  const int32_t *q_starts, *k_starts;  // (batch + 1,) or null: not packed
  int64_t total_q;                     // tokens in q
};

// Keys and values in pages: key j of a batch row b is row j % size of page table[b][j / size]. The page takes the place
// of the batch row in the strides of k and v.
struct Pages {
  const int32_t* table;  // (batch, stride) or null
  int64_t stride, size;
};

// A direction for derivatives: tangents of the inputs, each absent where it is 0, and those of the results.
struct Tangents {
  Heads q, k, v, out;
  ScoreTensor bias;    // of the shape of the bias
  const float* sinks;  // (heads,) or null
  float* lse;
};

struct Attention {
  Dtype dtype;
  int64_t batch, heads, kv_heads, seq_q, seq_k, head_dim, head_dim_v;  // seq: of the longest batch row
  bool ragged;  // the diagonal of each batch row depends on its own lengths
  Packing packing;
  Pages pages;
  Score score;
  Heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  ScoreTensor grad_bias;  // float32, contiguous
  float* lse;             // (batch, heads, seq_q); packed (heads, total_q)
  float* rest;            // likewise, or null: the rounding error of lse, whose exact value is lse + rest
  const float* grad_lse;  // likewise, or null
  Tangents tangent;
  float* workspace;
};

// A tensor of up to three leading dimensions as rows; the last dimension is contiguous.
struct Rows {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t size_1 = 1, size_2 = 1, stride_0 = 0, stride_1 = 0, stride_2 = 0;
};

// The gradient of parameters (heads, width), in their dtype, or null.
struct ParameterGrad {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

// What forward passes of norms read and write; each null where it is absent.
struct NormTensors {
  Rows x, residual, y, hidden;
  const float *weight, *bias;  // (heads, width)
};

struct Norm : NormTensors {
  int64_t rows, width, heads, parts;  // parts: row blocks of the backward, each with its own partial sums
  bool center;
  float eps, weight_offset;
  Rows grad_y, grad_hidden, grad_x, grad_residual;
  Dtype hidden_dtype;
  float *mean, *rstd;  // (rows,)
  ParameterGrad grad_weight, grad_bias;
  float* workspace;
  Dropout dropout;
  // A direction for derivatives: tangents of the inputs, each absent where it is 0, and those of the results. With a y
  // the forward pass computes tangents too, with a hidden the backward pass the tangents of gradients instead of these.
  NormTensors tangent;
};

// y (rows, out) = x (rows, in) weight^T + bias; x and y contiguous, the weight's rows `stride` apart.
struct Linear {
  Dtype dtype;
  int64_t rows, in, out, stride;
  const void *x, *weight;
  const float* bias;  // or null
  void* y;
  float* workspace;
};

// Rotates tokens (batch, heads, seq, dim) and stores them in another tensor, or at their positions in a cache.
struct Rotary {
  Dtype dtype, table_dtype;
  int64_t batch, heads, seq, dim, pairs;  // pairs: how many are rotated; 0: none
  bool interleaved, append;
  Heads x, to;
  Pages pages;            // of `to`
  const int32_t* starts;  // (batch,): the position of the first token
  const int32_t* counts;  // (batch,): the number of tokens; or null
  const char *cos, *sin;  // (positions, pairs), contiguous
  float* workspace;
};

// A kernel computes independent tiles. A thread that is free takes the next one, and has scratch memory of its own.
template <class Call>
struct Kernel {
  int64_t (*tiles)(const Call&);
  size_t (*scratch_floats)(const Call&);
  void (*run)(const Call&, int64_t tile, float* scratch);
};

// Passes in order, with a common workspace; a pass without tiles is skipped.
template <class Call>
struct Operation {
  size_t (*workspace_floats)(const Call&);
  Kernel<Call> passes[4];
};

struct Engine {
  Operation<Attention> attention_forward, attention_backward, attention_jvp, attention_hvp;
  Operation<Norm> norm_forward, norm_backward;
  Operation<Linear> linear;
  Operation<Rotary> rotary;
  int64_t (*peak_fma_probe)(Dtype, int64_t iterations);
  float (*read_bandwidth_probe)(const float*, int64_t n);
  void (*exp2_probe)(Dtype, const float* x, float* y, int64_t n);
};

}  // namespace flashattn
