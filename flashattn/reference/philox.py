"""Philox-4x32: random numbers that depend on a seed and a position alone."""

from __future__ import annotations

import torch
from torch import Tensor


def philox(seed: int | Tensor, *counter: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of Philox-4x32 under key `seed` at a counter of up to four words, the others 0: int64 in [0, 2**32).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    mask = 0xFFFFFFFF
    key_0, key_1 = seed & mask, seed >> 32 & mask
    words = list(torch.broadcast_tensors(*(c & mask for c in counter)))
    c_0, c_1, c_2, c_3 = words + [torch.zeros_like(words[0])] * (4 - len(words))
    for _ in range(rounds):
        product_0, product_2 = c_0 * 0xD2511F53, c_2 * 0xCD9E8D57  # wraps, but keeps the low 64 bits
        c_0, c_1, c_2, c_3 = (
            (product_2 >> 32 & mask) ^ c_1 ^ key_0,
            product_2 & mask,
            (product_0 >> 32 & mask) ^ c_3 ^ key_1,
            product_0 & mask,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & mask, (key_1 + 0xBB67AE85) & mask
    return c_0, c_1, c_2, c_3
