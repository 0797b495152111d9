// Shared by the bindings: the choice of an instruction set, how work is run on PyTorch's threads, and helpers for
// tensors. On LibTorch's stable ABI: one binary serves every PyTorch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "engine.h"

// Expansions of a field of a list: FLASHATTN_SCORE_FIELDS(FLASHATTN_MEMBER) and so on. A parameter and a schema entry
// begin with a comma, so they follow at least one other.
#define FLASHATTN_MEMBER(type, schema, name) type name;
#define FLASHATTN_PARAMETER(type, schema, name) , type name
#define FLASHATTN_ARGUMENT(type, schema, name) name,
#define FLASHATTN_SCHEMA(type, schema, name) ", " schema " " #name

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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ------------------------------------------------------------------------------------------------ instruction sets

struct Isa {
  const char* name;
  const Engine* engine;
  bool supported;  // by this processor
};

// All that were compiled, the best first.
inline const std::vector<Isa>& compiled_isas() {
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

// The best that the processor supports, or the one that FLASHATTN_CPU_ISA names; without a name where that is none.
inline const Isa& selected_isa() {
  static const Isa selected = [] {
    const char* wanted = std::getenv("FLASHATTN_CPU_ISA");
    for (const Isa& isa : compiled_isas())
      if (isa.supported && (!wanted || !*wanted || !std::strcmp(wanted, isa.name))) return isa;
    return Isa{nullptr, nullptr, false};
  }();
  return selected;
}

inline const Engine& engine() {
  STD_TORCH_CHECK(selected_isa().engine,
                  "FLASHATTN_CPU_ISA must be avx512bf16, avx512, avx2 or portable, and one this processor has; got ",
                  std::getenv("FLASHATTN_CPU_ISA"));
  return *selected_isa().engine;
}

// ------------------------------------------------------------------------------------------------ running

using Memory = std::unique_ptr<float, void (*)(void*)>;

inline Memory allocate(size_t floats) {
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

// ------------------------------------------------------------------------------------------------ tensors

inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "the CPU engine takes float32, bfloat16 and float16");
  }
}
inline Dtype dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

template <class T>
T* data_ptr(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
T* data_ptr(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

inline Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

// Parameters as the kernels read them: contiguous float32. A conversion replaces p, which keeps the memory alive.
inline const float* as_float32(OptionalTensor& p) {
  if (!p) return nullptr;
  if (p->scalar_type() != ScalarType::Float) p = torch::stable::to(*p, ScalarType::Float);
  if (!p->is_contiguous()) p = torch::stable::contiguous(*p);
  return data_ptr<float>(p);
}

// The threshold is that of dropout_threshold in flashattn/tensors.py.
inline Dropout dropout(double p, const OptionalTensor& seed) {
  if (p == 0) return {};
  uint32_t threshold = static_cast<uint32_t>(std::min(p * 2147483648.0, 2147483647.0));
  return {*static_cast<uint64_t*>(seed->data_ptr()), threshold, static_cast<float>(1 / (1 - p))};
}

}  // namespace flashattn
