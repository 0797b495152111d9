"""Shared by the attention tests: a case, its inputs, and its truth by PyTorch's own operations."""

from typing import NamedTuple

import torch

import flashattn
from flashattn.reference import naive
from flashattn.reference.philox import philox
from tests.common import randn


class Case(NamedTuple):
    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    seq_q: int = 63
    seq_k: int = 63
    head_dim: int = 16
    head_dim_v: int = 16
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    scale: float | None = None
    softcap: float | None = None
    slopes: str | None = None  # the dimensions of each tensor, of "bhqk"; one that is missing is broadcast
    mask: str | None = None
    bias: str | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    first_batch: int = 0  # of a sequence of its own: which batch row it is for dropout

    @property
    def rows(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.seq_q

    def shape(self, dimensions: str) -> list[int]:
        sizes = zip("bhqk", (*self.rows, self.seq_k), strict=True)
        return [size if name in dimensions else 1 for name, size in sizes]


SEED = 2**40 + 17


def make_inputs(case: Case, dtype: torch.dtype, device) -> tuple[list[torch.Tensor], dict]:
    """The inputs that get gradients (q, k, v and, where the case has them, bias and sinks) and the other options."""
    inputs = [
        randn(case.batch, case.heads, case.seq_q, case.head_dim, dtype=dtype, device=device),
        randn(case.batch, case.kv_heads, case.seq_k, case.head_dim, dtype=dtype, device=device),
        randn(case.batch, case.kv_heads, case.seq_k, case.head_dim_v, dtype=dtype, device=device),
    ]
    if case.bias is not None:
        inputs.append(randn(*case.shape(case.bias), dtype=dtype, device=device))
    if case.sinks:
        inputs.append(randn(case.heads, dtype=dtype, device=device))
    lengths = {
        name: None if value is None else torch.tensor(value, device=device)
        for name, value in (("q_lengths", case.q_lengths), ("kv_lengths", case.kv_lengths))
    }
    options = dict(causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap, **lengths)
    if case.slopes is not None:
        options["alibi_slopes"] = torch.rand(*case.shape(case.slopes)[2 - len(case.slopes) : 2], device=device)
    if case.mask is not None:
        options["mask"] = torch.rand(*case.shape(case.mask), device=device) > 0.3
    if case.dropout_p:
        options |= dict(dropout_p=case.dropout_p, seed=SEED)
    return inputs, options


def list_inputs(case: Case) -> list[str]:
    return ["q", "k", "v", *["bias"] * (case.bias is not None), *["sinks"] * case.sinks]


def ours(case: Case, options: dict):
    """flashattn.attention as a function of the inputs alone."""
    names = list_inputs(case)
    return lambda *x: flashattn.attention(
        *x[:3], return_lse=True, **options, **dict(zip(names[3:], x[3:], strict=True))
    )


def make_naive_options(case: Case, options: dict, device) -> dict:
    """The options of `naive.attention`, without dropout."""
    lengths = {
        name: None if value is None else torch.tensor(value, device=device)
        for name, value in (("q_lengths", case.q_lengths), ("kv_lengths", case.kv_lengths))
    }
    own = dict(causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap, **lengths)
    return own | {name: options[name] for name in ("alibi_slopes", "mask") if name in options}


def dropout_multiplier(case: Case, device) -> torch.Tensor | float:
    """The dropout multipliers of the weights, from their definition: word key % 4 of Philox at (key // 4, query,
    batch * heads + head)."""
    if not case.dropout_p:
        return 1.0
    head = torch.arange(case.batch * case.heads).view(case.batch, case.heads, 1, 1) + case.first_batch * case.heads
    i, j = torch.arange(case.seq_q)[:, None], torch.arange(case.seq_k)
    words = torch.stack(philox(SEED, j // 4, i, head, rounds=7))
    bits = words.gather(0, (j % 4).expand(words.shape[1:])[None])[0]
    return ((bits >> 1) >= int(case.dropout_p * 2**31)).double().to(device) / (1 - case.dropout_p)


def torch_attention(case: Case, options: dict, q, k, v, *others):
    """(out, lse) by PyTorch's own operations in the inputs' dtype; a fully masked row gives 0 and -inf."""
    others = dict(zip(list_inputs(case)[3:], others, strict=True))
    options = make_naive_options(case, options, q.device)
    return naive.attention(q, k, v, **options, **others, dropout=dropout_multiplier(case, q.device))


def run(function, inputs, grad_out, grad_lse):
    """out, lse and the gradients of the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    gradients = torch.autograd.grad((out, lse), inputs, (grad_out.to(out), grad_lse.to(lse)))
    return [out, lse, *gradients]


def make_gradients(case: Case, options: dict, dtype: torch.dtype, device):
    grad_out = randn(case.batch, case.heads, case.seq_q, case.head_dim_v, dtype=dtype, device=device)
    grad_lse = randn(case.batch, case.heads, case.seq_q, dtype=torch.float32, device=device)
    options = make_naive_options(case, options, device)
    masks = (options.get(name) for name in ("causal", "window", "mask", "q_lengths", "kv_lengths"))
    some = naive.attend_mask(naive.diagonal_distance(case.seq_q, case.seq_k, device), *masks).any(-1)
    return grad_out, torch.where(some.expand_as(grad_lse), grad_lse, 0)  # lse is constant -inf elsewhere


def hide_past_lengths(case: Case, inputs, gradients) -> None:
    """NaN where nothing may be read."""
    q, k, v = inputs[:3]
    for b in range(case.batch):
        if case.q_lengths is not None:
            for x in (q, *gradients):
                x[b, :, case.q_lengths[b] :] = torch.nan
        if case.kv_lengths is not None:
            k[b, :, case.kv_lengths[b] :] = torch.nan
            v[b, :, case.kv_lengths[b] :] = torch.nan


def compute_weights(case: Case, options: dict, inputs) -> torch.Tensor:
    """The weights before dropout, in float64: the gradient of lse by a bias of every score."""
    q, k, v, *others = (x.double() for x in inputs)
    with torch.enable_grad():
        every = torch.zeros(*case.rows, case.seq_k, dtype=torch.float64, device=q.device).requires_grad_()
        plain = case._replace(bias="bhqk", dropout_p=0.0)
        bias = every + (others[0] if case.bias is not None else 0)
        sinks = [others[-1]] if case.sinks else []
        _, lse = torch_attention(plain, options, q, k, v, bias, *sinks)
        (p,) = torch.autograd.grad(lse[lse.isfinite()].sum(), every)
    return p


def sum_magnitudes(case: Case, options: dict, inputs, grad_out, grad_lse) -> list[torch.Tensor | float]:
    """How large the float32 terms are whose sums `run` returns: in ds = p (dp - delta), dp and delta may cancel."""
    q, k, v, *others = (x.double() for x in inputs)
    grad_out, grad_lse = grad_out.double(), grad_lse.double()
    p = compute_weights(case, options, [q, k, v, *others])
    group, scale = case.heads // case.kv_heads, abs(case.head_dim**-0.5 if case.scale is None else case.scale)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    keep = dropout_multiplier(case, q.device)
    dp = grad_out.abs() @ v.abs().mT * keep
    ds = p * (dp + (p * dp).sum(-1, keepdim=True) + grad_lse.abs()[..., None])
    grad_k = (ds.mT @ q.abs()).unflatten(1, (-1, group)).sum(2)
    terms = [0.0, 0.0, ds @ k.abs() * scale, grad_k * scale, 0.0]
    if case.bias is not None:
        terms.append(ds.sum_to_size(inputs[3].shape))
    if case.sinks:
        out = torch.matmul(p, v.abs())
        terms.append(((grad_out.abs() * out).sum(-1) + grad_lse.abs()).sum((0, 2)))
    return terms
