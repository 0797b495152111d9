// The kernels of one instruction set, for the table in engine.cpp.
#pragma once

#include "engine.h"

namespace flashattn {
namespace FLASHATTN_ISA {

size_t forward_workspace(const Attention&);
size_t backward_workspace(const Attention&);
size_t norm_backward_workspace(const Norm&);
int64_t peak_fma_probe(Dtype, int64_t iterations);
float read_bandwidth_probe(const float* memory, int64_t n);
void exp2_probe(Dtype, const float* x, float* y, int64_t n);

#define DECLARE_KERNEL(name, Call)    \
  int64_t name##_tiles(const Call&);  \
  size_t name##_scratch(const Call&); \
  void name##_tile(const Call&, int64_t tile, float* scratch);

DECLARE_KERNEL(forward, Attention)
DECLARE_KERNEL(decode, Attention)
DECLARE_KERNEL(merge, Attention)
DECLARE_KERNEL(backward_delta, Attention)
DECLARE_KERNEL(backward, Attention)
DECLARE_KERNEL(backward_q, Attention)
DECLARE_KERNEL(backward_bias, Attention)
DECLARE_KERNEL(jvp, Attention)
DECLARE_KERNEL(hvp, Attention)
DECLARE_KERNEL(hvp_bias, Attention)
DECLARE_KERNEL(norm_forward, Norm)
DECLARE_KERNEL(norm_backward, Norm)
DECLARE_KERNEL(norm_parameters, Norm)
DECLARE_KERNEL(linear, Linear)
DECLARE_KERNEL(rotary, Rotary)

#undef DECLARE_KERNEL

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
