// Counter-based random bits: Philox-4x32 at counter (c0, c1, head, 0). The twin of kernels/dropout.py.
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): 7 rounds pass every statistical test, 10
// leave a margin.
#pragma once

#include "simd.h"

namespace flashattn {
namespace FLASHATTN_ISA {

typedef uint64_t vl __attribute__((vector_size(W * 4)));  // half as many lanes of 64 bits

// The high and low words of x * multiplier, lane by lane.
static inline void multiply_wide(vu x, uint32_t multiplier, vu& high, vu& low) {
  vl even = ((vl)x & 0xFFFFFFFFu) * (uint64_t)multiplier, odd = ((vl)x >> 32) * (uint64_t)multiplier;
  const vl upper = vl{} + 0xFFFFFFFF00000000u;
  high = (vu)((even >> 32) | (odd & upper));
  low = (vu)((even & ~upper) | (odd << 32));
}

struct Words {
  vu word[4];
};

template <int ROUNDS>
static inline Words philox(uint64_t seed, vu c0, vu c1, uint32_t head) {
  uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
  vu c2 = vu{} + head, c3 = {};
  for (int round = 0; round < ROUNDS; round++) {
    vu high_0, low_0, high_2, low_2;
    multiply_wide(c0, 0xD2511F53u, high_0, low_0);
    multiply_wide(c2, 0xCD9E8D57u, high_2, low_2);
    c0 = high_2 ^ c1 ^ key_0, c1 = low_2, c2 = high_0 ^ c3 ^ key_1, c3 = low_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 0 where the random bits drop an element, else the scale of kept ones.
static inline vf dropout_multiplier(const Dropout& dropout, vu bits) {
  return (vi)(bits >> 1) >= (vi)(vu{} + dropout.threshold) ? broadcast(dropout.scale) : vf{};
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
