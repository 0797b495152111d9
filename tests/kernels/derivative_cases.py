"""What checks the kernels of `jvp` and `hvp` against PyTorch's own derivatives of the formulas in float64."""

import torch

from flashattn.arguments import build_score
from flashattn.backends import triton as backend
from flashattn.protocol import Saved, Tangents
from flashattn.score import Score
from tests.attention.truth import (
    Case,
    compute_weights,
    dropout_multiplier,
    hide_past_lengths,
    list_inputs,
    make_gradients,
    make_inputs,
    torch_attention,
)
from tests.common import assert_as_exact_as_torch, find_device

NAMES = ("q", "k", "v", "bias", "sinks")


def make_score(case: Case, inputs: list[torch.Tensor], options: dict) -> Score:
    given = dict(zip(list_inputs(case), inputs, strict=True))
    others = {name: given[name] for name in ("bias", "sinks") if name in given}
    return build_score(inputs[0], (*case.rows, case.seq_k), **options, **others)


def make_tangents(case: Case, inputs: list[torch.Tensor], given: tuple[str, ...]) -> list[torch.Tensor | None]:
    """Of the inputs with these names, None of the others."""
    return [torch.randn_like(x) if name in given else None for name, x in zip(list_inputs(case), inputs, strict=True)]


def name_tangents(case: Case, tangents: list[torch.Tensor | None]) -> Tangents:
    return Tangents(**(dict.fromkeys(NAMES) | dict(zip(list_inputs(case), tangents, strict=True))))


def double(tensors) -> list[torch.Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


def spoil(case: Case, inputs, tangents, gradients) -> tuple[list, list, list]:
    """Copies with NaN where nothing may be read."""
    copies = [[None if x is None else x.clone() for x in tensors] for tensors in (inputs, tangents, gradients)]
    inputs, tangents, gradients = copies
    hide_past_lengths(case, inputs, gradients)
    hide_past_lengths(case, [x if t is None else t for x, t in zip(inputs, tangents, strict=True)], [])
    return inputs, tangents, gradients


def differentiate(case: Case, options: dict, inputs, tangents) -> list[torch.Tensor]:
    """out, lse and their tangents, by PyTorch's forward mode."""
    tangents = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]
    results = torch.func.jvp(lambda *x: torch_attention(case, options, *x), tuple(inputs), tuple(tangents))
    return [x for pair in results for x in pair]


def differentiate_gradients(case: Case, options: dict, inputs, tangents, gradients) -> list[torch.Tensor]:
    """The tangents of the gradients of q, k, v and the bias: the gradients of their product with the tangents, since a
    Hessian is symmetric."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outs = torch_attention(case, options, *inputs)
    grads = [grad.to(x) for grad, x in zip(gradients, outs, strict=True)]
    first = torch.autograd.grad(outs, inputs, grads, create_graph=True)
    pairs = [(x, t) for x, t in zip(first, tangents, strict=True) if t is not None]
    of, along = ([pair[n] for pair in pairs] for n in range(2))
    second = torch.autograd.grad(of, inputs, along, allow_unused=True, materialize_grads=True)
    return list(second)[: 3 + (case.bias is not None)]


def sum_magnitudes(case: Case, options: dict, inputs, tangents, gradients) -> dict[str, torch.Tensor]:
    """How large the float32 terms are whose sums the results are, as in `truth.sum_magnitudes`: the formulas with every
    number positive."""
    tangents = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]
    q, k, v, *biases = (x.double().abs() for x in inputs)
    tangent_q, tangent_k, tangent_v, *tangent_biases = (x.double().abs() for x in tangents)
    grad_out, grad_lse = (x.double().abs() for x in gradients)
    group, scale = case.heads // case.kv_heads, abs(case.head_dim**-0.5 if case.scale is None else case.scale)
    k, v, tangent_k, tangent_v = (x.repeat_interleave(group, 1) for x in (k, v, tangent_k, tangent_v))
    p = compute_weights(case, options, inputs)
    dropped = p * dropout_multiplier(case, q.device)
    tangent = (tangent_q @ k.mT + q @ tangent_k.mT) * scale
    tangent = tangent + (tangent_biases[0] if case.bias is not None else 0)
    tangent_lse = (p * tangent).sum(-1, keepdim=True) + (tangent_biases[-1].view(-1, 1, 1) if case.sinks else 0)
    tangent_out = (dropped * tangent) @ v + dropped @ tangent_v + tangent_lse * (dropped @ v)
    kept = torch.where(p > 0, dropped / p, 0)
    dp, tangent_dp = grad_out @ v.mT * kept, grad_out @ tangent_v.mT * kept
    inner = dp + (grad_out * (dropped @ v)).sum(-1, keepdim=True) + grad_lse[..., None]
    log = tangent + tangent_lse
    ds, tangent_ds = p * inner, p * (log * inner + tangent_dp + (grad_out * tangent_out).sum(-1, keepdim=True))

    def of_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    terms = dict(tangent_out=tangent_out, tangent_lse=tangent_lse[..., 0])
    terms["grad_q"] = (tangent_ds @ k + ds @ tangent_k) * scale
    terms["grad_k"] = of_heads(tangent_ds.mT @ q + ds.mT @ tangent_q) * scale
    terms["grad_v"] = of_heads((dropped * log).mT @ grad_out)
    if case.bias is not None:
        terms["grad_bias"] = tangent_ds.sum_to_size(biases[0].shape)
    return terms


def assert_exact(case: Case, results: dict, by_torch: list, exact: list, terms: dict) -> None:
    for (name, x), y, t in zip(results.items(), by_torch, exact, strict=True):
        assert_as_exact_as_torch(x, y, t, f"{case.name} {name}", terms.get(name, 0.0))


def check_jvp(case: Case, dtype: torch.dtype, given: tuple[str, ...] = NAMES) -> None:
    device = find_device("triton")
    inputs, options = make_inputs(case, dtype, device)
    tangents = make_tangents(case, inputs, given)
    gradients = make_gradients(case, options, dtype, device)
    exact = differentiate(case, options, double(inputs), double(tangents))
    by_torch = differentiate(case, options, inputs, tangents)
    terms = sum_magnitudes(case, options, inputs, tangents, gradients)
    inputs, tangents, _ = spoil(case, inputs, tangents, gradients)
    score = make_score(case, inputs, options)
    out, lse, rest, tangent_out, tangent_lse = backend.jvp(*inputs[:3], score, name_tangents(case, tangents))
    assert (rest is not None) == backend.has_rest(inputs[0], score)
    assert_exact(case, dict(out=out, lse=lse, tangent_out=tangent_out, tangent_lse=tangent_lse), by_torch, exact, terms)


def check_hvp(case: Case, dtype: torch.dtype, given: tuple[str, ...] = NAMES) -> None:
    device = find_device("triton")
    inputs, options = make_inputs(case, dtype, device)
    tangents = make_tangents(case, inputs, given)
    gradients = make_gradients(case, options, dtype, device)
    exact = differentiate_gradients(case, options, double(inputs), double(tangents), double(gradients))
    by_torch = differentiate_gradients(case, options, inputs, tangents, gradients)
    terms = sum_magnitudes(case, options, inputs, tangents, gradients)
    inputs, tangents, gradients = spoil(case, inputs, tangents, gradients)
    score, named = make_score(case, inputs, options), name_tangents(case, tangents)
    out, lse, rest, *moved = backend.jvp(*inputs[:3], score, named)
    results = backend.hvp(*gradients, Saved(*inputs[:3], out, lse, rest), score, named, *moved, True, [])
    names = ["grad_q", "grad_k", "grad_v", *["grad_bias"] * (case.bias is not None)]
    assert (results[3] is None) == (case.bias is None)
    assert_exact(case, dict(zip(names, results, strict=False)), by_torch, exact, terms)
