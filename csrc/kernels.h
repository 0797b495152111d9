// The kernels of one instruction set, by name, for the table in engine.cpp.
#pragma once

#include "engine.h"

namespace flashattn {
namespace FLASHATTN_ISA {

int64_t forward_tiles(const Attention&);
size_t forward_scratch(const Attention&);
void forward_tile(const Attention&, int64_t tile, float* scratch);

size_t backward_workspace(const Attention&);
int64_t backward_delta_tiles(const Attention&);
size_t backward_delta_scratch(const Attention&);
void backward_delta_tile(const Attention&, int64_t tile, float* scratch);
int64_t backward_tiles(const Attention&);
size_t backward_scratch(const Attention&);
void backward_tile(const Attention&, int64_t tile, float* scratch);
int64_t backward_q_tiles(const Attention&);
size_t backward_q_scratch(const Attention&);
void backward_q_tile(const Attention&, int64_t tile, float* scratch);

int64_t norm_forward_tiles(const Norm&);
size_t norm_forward_scratch(const Norm&);
void norm_forward_tile(const Norm&, int64_t tile, float* scratch);

int64_t norm_backward_tiles(const Norm&);
size_t norm_backward_scratch(const Norm&);
void norm_backward_tile(const Norm&, int64_t tile, float* scratch);

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
