// Probes for the bench and the tests: the peak speeds of this processor, and the exponential.
#include "kernels.h"
#include "matmul.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int CHAINS = 12;  // independent sums: enough to hide the latency of an FMA, few enough for the registers

// Register-only FMA loop. Returns the number of multiplications and additions.
int64_t peak_fma_probe(Dtype dtype, int64_t iterations) {
  int64_t flops = 0;
  with_dot(dtype, [&](auto dot) {
    using Dot = decltype(dot);
    vf x = broadcast(1e-3f), sums[CHAINS];
    for (int c = 0; c < CHAINS; c++) sums[c] = broadcast((float)c);  // not equal, so the compiler does not merge them
    for (int64_t i = 0; i < iterations; i++)
      FLASHATTN_UNROLL for (int c = 0; c < CHAINS; c++) sums[c] = Dot::multiply_add(x, x, sums[c]);
    vf total = sums[0];
    for (int c = 1; c < CHAINS; c++) total += sums[c];
    // Never 0, but the compiler does not know and has to compute the sums.
    flops = sum(total) < 0 ? 0 : iterations * CHAINS * W * 2 * Dot::K_PER_LANE;
  });
  return flops;
}

// y = 2^x as the attention kernels compute it for weights of this dtype.
void exp2_probe(Dtype dtype, const float* x, float* y, int64_t n) {
  with_dot(dtype, [&](auto dot) {
    for (int64_t i = 0; i < n; i += W) {
      float vector[2 * W];
      load_floats(vector, x + i, Dtype::float32, min(W, n - i));
      store(vector, exp2<decltype(dot)::EXP_DEGREE>(load<vf>(vector)));
      store_floats(y + i, vector, Dtype::float32, min(W, n - i));
    }
  });
}

// Read-only loop over memory.
float read_bandwidth_probe(const float* memory, int64_t n) {
  vf sums[8] = {};
  for (int64_t i = 0; i + 8 * W <= n; i += 8 * W)
    FLASHATTN_UNROLL for (int c = 0; c < 8; c++) sums[c] += load<vf>(memory + i + c * W);
  vf total = sums[0];
  for (int c = 1; c < 8; c++) total += sums[c];
  return sum(total);
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
