"""What checks forward mode and second derivatives of a norm against PyTorch's of the same mathematics in its own
operations: those of its layer_norm are wrong for reverse over forward mode."""

from collections.abc import Callable

import torch
from torch.func import grad, jvp, vjp

import flashattn
from tests.common import Truth, assert_as_exact_as_torch, find_device, once_per_case
from tests.derivatives.cases import Function, forward_mode, make_directions, second_derivatives
from tests.norm.cases import Case, Inputs, make_gradients, make_inputs, ours, run_torch

RICH = Case("rich", (3, 2, 63), per_head=True, residual="float32", dropout_p=0.2, prenorm=True, weight_offset=1.0)


def normalize(case: Case, hidden: torch.Tensor) -> torch.Tensor:
    """xhat by PyTorch's operations, statistics in float32."""
    h = hidden if hidden.dtype == torch.float64 else hidden.float()
    if case.center:
        h = h - h.mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + (1e-5 if case.center else 1e-6))).to(hidden.dtype)


def bind(call: Callable, case: Case, inputs: Inputs, given: tuple[str, ...]) -> Function:
    """`call` of the inputs with these names; the others are constants. All results in a tuple."""

    def function(*own):
        results = call(case, inputs._replace(**dict(zip(given, own, strict=True))))
        return results if case.prenorm else (results,)

    return function


def list_given(inputs: Inputs) -> tuple[str, ...]:
    return tuple(name for name, x in zip(Inputs._fields, inputs, strict=True) if x is not None)


def reverse_over_forward(function: Function, inputs, gradients, directions) -> list[torch.Tensor]:
    """The gradients of all results and tangents, by the inputs and by the directions."""

    def weigh(inputs, directions):
        results, moved = jvp(function, inputs, directions)
        weights = (*gradients, *(g.flip(0) for g in gradients))
        return sum((g * y).sum() for g, y in zip(weights, (*moved, *results), strict=True))

    return [x for xs in grad(weigh, (0, 1))(tuple(inputs), tuple(directions)) for x in xs]


def forward_over_reverse(function: Function, inputs, gradients, directions) -> list[torch.Tensor]:
    """The tangents of the gradients, along those of the inputs and of the gradients of the results."""

    def differentiate(inputs, gradients):
        return vjp(function, *inputs)[1](gradients)

    moved = tuple(directions), tuple(g.roll(1, 0) for g in gradients)
    return list(jvp(differentiate, (tuple(inputs), tuple(gradients)), moved)[1])


def compute(function: Function, inputs, gradients, directions) -> list[torch.Tensor]:
    gradients = [g.to(y.dtype) for g, y in zip(gradients, function(*inputs), strict=False)]
    return [
        *forward_mode(function, inputs, directions),
        *second_derivatives(function, inputs, gradients, directions),
        *reverse_over_forward(function, inputs, gradients, directions),
        *forward_over_reverse(function, inputs, gradients, directions),
    ]


def list_results(case: Case, given: tuple[str, ...]) -> list[str]:
    outs = ["y", *["hidden"] * case.prenorm]
    return [
        *outs,
        *(f"tangent_{name}" for name in outs),
        *(f"second_{name}" for name in (*given, *(f"grad_{name}" for name in outs))),
        *(f"reverse_over_forward_{name}" for name in (*given, *(f"tangent_{name}" for name in given))),
        *(f"forward_over_reverse_{name}" for name in given),
    ]


def plainly(case: Case, inputs: Inputs):
    return run_torch(case, inputs, normalize)


@once_per_case
def compute_truth(case: Case, dtype: torch.dtype, device: torch.device, given: tuple[str, ...] | None) -> Truth:
    inputs, gradients = make_inputs(case, dtype, device), make_gradients(case, dtype, device)
    given = given or list_given(inputs)
    directions = make_directions([getattr(inputs, name) for name in given])

    def run(change):
        wide = inputs.map(change)
        function, own = bind(plainly, case, wide, given), [getattr(wide, name) for name in given]
        return compute(function, own, [change(g) for g in gradients], [change(d) for d in directions])

    exact, theirs = run(torch.Tensor.double), run(lambda x: x)
    return Truth(inputs, {}, [*gradients, *directions], exact, theirs, [0.0] * len(theirs))


def check(case: Case, dtype: torch.dtype, backend: str, given: tuple[str, ...] | None = None) -> None:
    truth = compute_truth(case, dtype, find_device(backend), given)
    inputs, _, gradients = truth.fresh()
    inputs, given = Inputs(*inputs), given or list_given(Inputs(*inputs))
    with flashattn.use_backend(backend):
        own = [getattr(inputs, name) for name in given]
        results = compute(bind(ours, case, inputs, given), own, gradients[:2], gradients[2:])
    for name, x, y, t in zip(list_results(case, given), results, truth.by_torch, truth.exact, strict=True):
        assert x.dtype == y.dtype, name
        assert_as_exact_as_torch(x, y, t, name)
