// What the bench and the tests look at from outside: the speeds this processor can reach at most, and the exponential.
#include "kernels.h"
#include "matmul.h"

namespace flashattn {
namespace FLASHATTN_ISA {

constexpr int CHAINS = 12;  // independent sums: enough to hide the latency of a multiply-add, few enough for registers

// Nothing but multiply-adds, on registers. Returns how many multiplications and additions that were.
int64_t peak_fma_probe(Dtype dtype, int64_t iterations) {
  int64_t flops = 0;
  with_dot(dtype, [&](auto dot) {
    using Dot = decltype(dot);
    vf x = broadcast(1e-3f), sums[CHAINS];
    for (int c = 0; c < CHAINS; c++) sums[c] = broadcast((float)c);  // all different, lest they become one
    for (int64_t i = 0; i < iterations; i++)
      UNROLL for (int c = 0; c < CHAINS; c++) sums[c] = Dot::multiply_add(x, x, sums[c]);
    vf total = sums[0];
    for (int c = 1; c < CHAINS; c++) total += sums[c];
    flops = sum(total) < 0 ? 0 : iterations * CHAINS * W * 2 * Dot::DEPTH;  // never 0: the sums must be used
  });
  return flops;
}

// y = 2^x as the attention kernels compute it for weights that are kept in this dtype.
void exp2_probe(Dtype dtype, const float* x, float* y, int64_t n) {
  with_dot(dtype, [&](auto dot) {
    for (int64_t i = 0; i < n; i += W) {
      float numbers[2 * W];
      load_floats(numbers, x + i, Dtype::float32, min(W, n - i));
      store(numbers, exp2<decltype(dot)::EXP_DEGREE>(load<vf>(numbers)));
      store_floats(y + i, numbers, Dtype::float32, min(W, n - i));
    }
  });
}

// Nothing but reading.
float read_bandwidth_probe(const float* memory, int64_t n) {
  vf sums[8] = {};
  for (int64_t i = 0; i + 8 * W <= n; i += 8 * W)
    UNROLL for (int c = 0; c < 8; c++) sums[c] += load<vf>(memory + i + c * W);
  vf total = sums[0];
  for (int c = 1; c < 8; c++) total += sums[c];
  return sum(total);
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
