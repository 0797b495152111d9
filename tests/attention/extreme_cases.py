"""The cases of extreme scores, and what checks them against softmax in float64."""

import torch

import flashattn
from tests.common import assert_as_exact_as_torch

LEAST = torch.finfo(torch.float32).min


def make_bias(seq: int, *rows_and_keys) -> torch.Tensor:
    bias = torch.zeros(seq, seq)
    for rows, keys, value in rows_and_keys:
        bias[rows, keys] = value
    return bias


ALL = slice(None)
# Name: (how large q and k are, keys and queries, bias, options)
CASES = {
    "least": (1, 40, make_bias(40, (ALL, ALL, LEAST)), {}),  # of one score or more: the mean of v
    "some_least": (1, 40, make_bias(40, (ALL, slice(0, 20), LEAST), (3, ALL, LEAST)), {}),
    "least_causal": (1, 40, make_bias(40, (slice(0, 30), ALL, LEAST)), dict(causal=True)),
    "largest": (1, 40, make_bias(40, (ALL, slice(0, None, 3), 3e38)), {}),
    "largest_apart": (1, 40, make_bias(40, (ALL, ALL, 2.5e38), (ALL, 7, 3e38)), {}),
    "largest_softcap": (1, 40, None, dict(softcap=3e38)),
    "minus_1e9": (1, 40, make_bias(40, (ALL, ALL, -1e9)), {}),
    "minus_1e9_window": (1, 40, make_bias(40, (ALL, ALL, -1e9)), dict(window=(5, 3))),
    "thousands": (90, 40, None, {}),
    "thousands_causal": (90, 130, None, dict(causal=True)),
    "thousands_of_few": (90, 3, None, {}),
    "thousands_and_sinks": (90, 40, None, dict(sinks=torch.tensor([8000.0, -8000.0]))),
    "minus_1e9_and_sinks": (1, 40, make_bias(40, (ALL, ALL, -1e9)), dict(sinks=torch.full((2,), -1e9))),
    "ten_thousand_millions": (1e5, 40, None, {}),
    "slopes": (1, 40, None, dict(alibi_slopes=torch.tensor([1e6, 1e4]))),
}


def attend_by_torch(q, k, v, bias, options, dtype):
    """By PyTorch's operations, softmax in `dtype` of the scores that float32 has room for."""
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
    if "alibi_slopes" in options:
        scores = scores - options["alibi_slopes"][:, None, None] * (i - j).abs()
    if bias is not None:
        scores = scores + bias.float()
    scores = scores.to(dtype)
    if options.get("causal"):
        scores = scores.masked_fill(j > i, -torch.inf)
    if "window" in options:
        scores = scores.masked_fill((j < i - 5) | (j > i + 3), -torch.inf)
    if "sinks" in options:
        sinks = options["sinks"].to(dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights @ v.to(dtype)


def sum_magnitudes(q, k, v, bias, options, grad) -> list:
    """How large the terms are whose sums `compute_results` gives: in ds = p (dp - delta), dp and delta may cancel."""
    p = attend_by_torch(q, k, torch.eye(k.shape[2]).expand(1, 2, -1, -1), bias, options, torch.float64)
    dp = grad.double().abs() @ v.double().abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return [0.0, ds @ k.double().abs(), ds.mT @ q.double().abs(), 0.0]


def compute_results(function, inputs, grad):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def check_weights(name, backend):
    size, seq, bias, options = CASES[name]
    q, k, v, grad = (torch.randn(1, 2, seq, 16) for _ in range(4))
    inputs = [q * size, k * size, v]
    truth = compute_results(lambda *x: attend_by_torch(*x, bias, options, torch.float64), inputs, grad)
    theirs = compute_results(lambda *x: attend_by_torch(*x, bias, options, torch.float32), inputs, grad)
    with flashattn.use_backend(backend):
        ours = compute_results(lambda *x: flashattn.attention(*x, bias=bias, **options), inputs, grad)
    names, terms = ("out", "grad_q", "grad_k", "grad_v"), sum_magnitudes(*inputs, bias, options, grad)
    for which, x, y, t, summed in zip(names, ours, theirs, truth, terms, strict=True):
        assert_as_exact_as_torch(x, y, t, which, summed)
    # Whatever rounding did to single scores, the weights of each query sum to one.
    with flashattn.use_backend(backend):
        ones = flashattn.attention(*inputs[:2], torch.ones_like(v), bias=bias, **options)
    if "sinks" not in options:
        torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-6, atol=0)


def check_least_number_as_mask(dtype, backend):
    """What models add to scores to mask them, in 16 bits; a row of it alone is the mean of v."""
    q, k, v, grad = (torch.randn(1, 2, 20, 16).to(dtype) for _ in range(4))
    bias = make_bias(20, (ALL, slice(0, 7), torch.finfo(dtype).min), (3, ALL, torch.finfo(dtype).min)).to(dtype)
    truth = compute_results(lambda *x: attend_by_torch(*x, bias, {}, torch.float64), [q, k, v], grad)
    theirs = compute_results(lambda q, k, v: (q @ k.mT / 4 + bias).softmax(-1) @ v, [q, k, v], grad)
    with flashattn.use_backend(backend):
        ours = compute_results(lambda *x: flashattn.attention(*x, bias=bias), [q, k, v], grad)
    for which, x, y, t in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, truth, strict=True):
        assert_as_exact_as_torch(x, y, t, which)


def check_decoding(backend, size):
    """The splits of a long cache are merged by their maxima."""
    q, k, v = torch.randn(1, 2, 1, 16) * size, torch.randn(1, 2, 1100, 16) * size, torch.randn(1, 2, 1100, 16)
    bias = torch.full((1, 1100), LEAST) if size == 1 else None
    cache = flashattn.KVCache(1, 2, 1100, 16)
    with torch.no_grad(), flashattn.use_backend("cpu"):
        flashattn.decode(torch.zeros(1, 2, 1099, 16), cache, k[:, :, :-1], v[:, :, :-1])
    with torch.no_grad(), flashattn.use_backend(backend):
        out = flashattn.decode(q, cache, k[:, :, -1:], v[:, :, -1:], bias=bias)
    truth = attend_by_torch(q, k, v, bias, {}, torch.float64)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
