// Counter-based random bits: first word of Philox-4x32-10 at counter (col, row, 0, 0). The twin of kernels/dropout.py.
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <stdint.h>

#include "engine.h"

namespace flashattn {
namespace FLASHATTN_ISA {

static inline uint32_t philox(uint64_t seed, uint32_t row, uint32_t col) {
  uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
  uint32_t c0 = col, c1 = row, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    uint64_t product_0 = (uint64_t)c0 * 0xD2511F53u, product_2 = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(product_2 >> 32) ^ c1 ^ key_0;
    c1 = (uint32_t)product_2;
    c2 = (uint32_t)(product_0 >> 32) ^ c3 ^ key_1;
    c3 = (uint32_t)product_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
