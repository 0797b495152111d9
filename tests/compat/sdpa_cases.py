"""The cases of scaled_dot_product_attention, and what compares one with PyTorch's own."""

import torch
from torch.nn import functional

from flashattn.compat import sdpa
from tests.common import assert_as_exact_as_torch

theirs = functional.scaled_dot_product_attention
CASES = {
    "plain": ((2, 4, 33, 16), (2, 4, 40, 16), None, {}),
    "causal": ((2, 4, 33, 16), (2, 4, 33, 16), None, dict(is_causal=True)),
    "causal_more_keys": ((2, 4, 20, 16), (2, 4, 70, 16), None, dict(is_causal=True)),
    "causal_more_queries": ((2, 4, 70, 16), (2, 4, 20, 16), None, dict(is_causal=True)),
    "grouped": ((2, 6, 33, 16), (2, 2, 40, 16), None, dict(enable_gqa=True, scale=0.3)),
    "three_dimensions": ((3, 33, 16), (3, 40, 16), "qk", {}),
    "two_dimensions": ((33, 16), (40, 16), None, {}),
    "five_dimensions": ((2, 3, 4, 20, 16), (2, 3, 4, 40, 16), "qk", {}),
    "five_dimensions_masked": ((2, 3, 4, 20, 16), (2, 3, 4, 40, 16), "23hqk", {}),
    "five_dimensions_masked_by_four": ((2, 3, 4, 20, 16), (2, 3, 4, 40, 16), "3hqk", {}),
    "five_dimensions_masked_by_some": ((2, 3, 4, 20, 16), (2, 3, 4, 40, 16), "21hqk", {}),
    "five_dimensions_masked_by_one": ((2, 3, 4, 20, 16), (2, 3, 4, 40, 16), "211qk", {}),
    "five_dimensions_masked_by_all": ((2, 3, 4, 20, 16), (2, 3, 4, 40, 16), "111qk", {}),
    "six_dimensions": ((2, 3, 2, 4, 20, 16), (2, 1, 2, 4, 40, 16), "31hqk", {}),
    "five_dimensions_grouped": ((2, 3, 4, 20, 16), (1, 3, 2, 40, 16), "31qk", dict(enable_gqa=True)),
    "key_of_more_dimensions": ((3, 4, 20, 16), (2, 3, 4, 40, 16), None, {}),
    "broadcast": ((2, 4, 33, 16), (1, 4, 40, 16), None, {}),
    "broadcast_heads": ((2, 4, 33, 16), (2, 1, 40, 16), None, {}),
    "masked": ((2, 4, 33, 16), (2, 4, 40, 16), "b1qk", {}),
    "masked_keys": ((2, 4, 33, 16), (2, 4, 40, 16), "b11k", {}),
    "masked_grouped": ((2, 4, 33, 16), (2, 2, 40, 16), "hqk", dict(enable_gqa=True)),
}


def make_mask(pattern: str, q: tuple, k: tuple) -> torch.Tensor:
    sizes = {"b": q[0], "h": q[-3] if len(q) > 2 else 1, "q": q[-2], "k": k[-2], "1": 1, "2": 2, "3": 3}
    return torch.randn([sizes[c] for c in pattern])


def check(name, kind):
    q_shape, k_shape, pattern, options = CASES[name]
    inputs = [torch.randn(q_shape), torch.randn(k_shape), torch.randn(*k_shape[:-1], 24)]
    mask = None if pattern is None else make_mask(pattern, q_shape, k_shape)
    if mask is not None and kind == "float":
        inputs.append(mask)
    elif mask is not None:
        options = {**options, "attn_mask": mask > -0.7}

    def run(function, dtype):
        x = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = function(*x, **options)
        return [out, *torch.autograd.grad(out.square().sum(), x)]

    ours, by_torch = run(sdpa.scaled_dot_product_attention, torch.float32), run(theirs, torch.float32)
    for x, y, t in zip(ours, by_torch, run(theirs, torch.float64), strict=True):
        assert_as_exact_as_torch(x, y, t, name)
