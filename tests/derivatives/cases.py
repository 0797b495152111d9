"""What checks the derivatives of a case beyond its first gradients against PyTorch's of the same mathematics, in
float64 or by the error rule."""

from collections.abc import Callable

import torch
from torch import Tensor

import flashattn
from tests.attention.truth import (
    Case,
    dropout_multiplier,
    list_inputs,
    make_gradients,
    make_inputs,
    ours,
    torch_attention,
)
from tests.common import Truth, assert_as_exact_as_torch, find_device, once_per_case

Function = Callable[..., tuple[Tensor, ...]]


def forward_mode(function: Function, inputs, tangents) -> list[Tensor]:
    """(out, lse) and their tangents."""
    results, moved = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    return [*results, *moved]


def second_derivatives(function: Function, inputs, gradients, directions) -> list[Tensor]:
    """The gradients, by the inputs and by the gradients of (out, lse), of the first gradients times `directions`."""
    inputs, gradients = ([x.detach().clone().requires_grad_() for x in xs] for xs in (inputs, gradients))
    results = function(*inputs)
    gradients = [g.to(r.dtype) for g, r in zip(gradients, results, strict=True)]
    first = torch.autograd.grad(results, inputs, gradients, create_graph=True)
    return list(torch.autograd.grad(first, [*inputs, *gradients], directions, materialize_grads=True))


def make_directions(inputs) -> list[Tensor]:
    return [torch.randn_like(x) for x in inputs]


def list_results(case: Case) -> dict[str, list[str]]:
    names = list_inputs(case)
    return {
        "forward": ["out", "lse", "tangent_out", "tangent_lse"],
        "second": [f"second_{name}" for name in (*names, "grad_out", "grad_lse")],
    }


def compute(function: Function, inputs, gradients, directions) -> dict[str, list[Tensor]]:
    return {
        "forward": forward_mode(function, inputs, directions),
        "second": second_derivatives(function, inputs, gradients, directions),
    }


def make_truth(case: Case, dtype: torch.dtype, device: torch.device) -> Truth:
    inputs, options = make_inputs(case, dtype, device)
    gradients, directions = make_gradients(case, options, dtype, device), make_directions(inputs)

    def theirs(*x):
        return torch_attention(case, options, *x)

    def wide(xs):
        return [x.double() for x in xs]

    exact = compute(theirs, wide(inputs), wide(gradients), wide(directions))
    by_torch = compute(theirs, inputs, gradients, directions)
    terms = sum_forward_magnitudes(case, options, *map(wide, (inputs, directions)), exact["forward"])
    if case.sinks:
        terms["second_sinks"] = sum_sink_magnitudes(inputs, exact["forward"], gradients, directions)
    if case.bias is not None:
        terms["second_bias"] = sum_bias_magnitudes(case, options, *map(wide, (inputs, gradients, directions)))
    return Truth(inputs, options, (*gradients, *directions), exact, by_torch, terms)


def sum_forward_magnitudes(case: Case, options: dict, inputs, directions, forward) -> dict[str, Tensor]:
    """How large the terms are that the tangents sum: p (tangent of s) over the keys, and that less p tangent_lse, times
    v. The weights p are the gradient of lse by a bias of every score, before dropout; their tangent is
    p (tangent of s - tangent_lse)."""
    every = torch.zeros(*case.rows, case.seq_k, dtype=torch.float64, device=inputs[0].device)
    plain = case._replace(bias="bhqk", dropout_p=0.0)

    def weigh(*inputs):
        def sum_lse(every):
            bias = every + (inputs[3] if case.bias is not None else 0)
            _, lse = torch_attention(plain, options, *inputs[:3], bias, *inputs[-1:] * case.sinks)
            return torch.where(lse == -torch.inf, 0, lse).sum()

        return torch.func.grad(sum_lse)(every)

    p, moved = torch.func.jvp(weigh, tuple(inputs), tuple(directions))
    of_lse = forward[3][..., None]
    p_tangent = (moved + of_lse * p).abs()
    kept, group = dropout_multiplier(case, p.device), case.heads // case.kv_heads
    v, tangent_v = (x[2].abs().repeat_interleave(group, 1) for x in (inputs, directions))
    of_out = ((p_tangent + of_lse.abs() * p) * kept) @ v + (p * kept) @ tangent_v
    of_lse = p_tangent.sum(-1)
    # The gradients by grad_out and grad_lse are the tangents of out and lse.
    return {"tangent_out": of_out, "tangent_lse": of_lse, "second_grad_out": of_out, "second_grad_lse": of_lse}


def sum_bias_magnitudes(case: Case, options: dict, inputs, gradients, directions) -> Tensor:
    """How large the terms are that the second derivative by a bias sums: those of a bias for each score."""
    own = [[*xs[:3], xs[3].expand(*case.rows, case.seq_k), *xs[4:]] for xs in (inputs, directions)]
    every = case._replace(bias="bhqk")
    of_scores = second_derivatives(lambda *x: torch_attention(every, options, *x), own[0], gradients, own[1])[3]
    return of_scores.abs().sum_to_size(inputs[3].shape)


def sum_sink_magnitudes(inputs, forward, gradients, directions) -> Tensor:
    """How large the terms are that the second derivative by a sink sums: of each query, with the sink's weight p,
    p ((its tangent - tangent_lse) (grad_out . out - grad_lse) + grad_out . tangent_out)."""
    out, lse, tangent_out, tangent_lse = forward
    grad_out, grad_lse = (x.double().abs() for x in gradients)
    p = torch.exp(inputs[-1].double()[:, None] - lse)
    moved = directions[-1].double().abs()[:, None] + tangent_lse.abs()
    delta, tangent_delta = ((grad_out * x.abs()).sum(-1) for x in (out, tangent_out))
    terms = p * (moved * (delta + grad_lse) + tangent_delta)
    return torch.where(lse == -torch.inf, 0, terms).sum((0, 2))


compute_truth = once_per_case(make_truth)


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    truth = compute_truth(case, dtype, find_device(backend))
    inputs, options, gradients = truth.fresh()
    gradients, directions = gradients[:2], gradients[2:]
    with flashattn.use_backend(backend):
        found = compute(ours(case, options), inputs, gradients, directions)
    for kind, names in list_results(case).items():
        for name, x, y, t in zip(names, found[kind], truth.by_torch[kind], truth.exact[kind], strict=True):
            assert_as_exact_as_torch(x, y, t, name, truth.terms.get(name, 0.0))
