// The module flashattn._C, and the operators that say and measure what the engine runs on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>

#include "dispatch.h"

namespace flashattn {
namespace {

std::string isa() { return selected_isa().name ? selected_isa().name : ""; }

bool supports(std::string name) {
  for (const Isa& isa : compiled_isas())
    if (name == isa.name) return isa.supported;
  return false;
}

void exp2(Tensor x, Tensor y, ScalarType dtype) {
  engine().exp2_probe(dtype_of(dtype), data_ptr<float>(x), data_ptr<float>(y), x.numel());
}

// Both probes run on every thread, and return the work done: multiplications and additions, or bytes.
int64_t peak_fma_probe(Tensor like, int64_t iterations) {
  const Dtype dtype = dtype_of(like);
  std::atomic<int64_t> work{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) work += engine().peak_fma_probe(dtype, iterations);
  });
  return work;
}

int64_t read_bandwidth_probe(Tensor memory) {
  const float* data = data_ptr<float>(memory);
  const int64_t n = memory.numel(), threads = torch::stable::get_num_threads();
  std::atomic<int64_t> elements{0};  // a NaN would not be counted, so the compiler must compute the sums
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      const int64_t from = n * thread / threads, to = n * (thread + 1) / threads;
      const float sum = engine().read_bandwidth_probe(data + from, to - from);
      if (sum == sum) elements += to - from;
    }
  });
  return elements * sizeof(float);
}

}  // namespace
}  // namespace flashattn

STABLE_TORCH_LIBRARY(flashattn_cpu, m) {
  m.def("isa() -> str");
  m.def("supports(str isa) -> bool");
  m.def("exp2(Tensor x, Tensor(a!) y, ScalarType dtype) -> ()");
  m.def("peak_fma_probe(Tensor like, int iterations) -> int");
  m.def("read_bandwidth_probe(Tensor memory) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&flashattn::isa));
  m.impl("supports", TORCH_BOX(&flashattn::supports));
}

STABLE_TORCH_LIBRARY_IMPL(flashattn_cpu, CPU, m) {
  m.impl("exp2", TORCH_BOX(&flashattn::exp2));
  m.impl("peak_fma_probe", TORCH_BOX(&flashattn::peak_fma_probe));
  m.impl("read_bandwidth_probe", TORCH_BOX(&flashattn::read_bandwidth_probe));
}

// `import flashattn._C` loads the library, which registers the operators; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
