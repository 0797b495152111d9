"""Forward mode and second derivatives of norms on every backend, and transforms of them."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

import flashattn
from tests.common import (
    BACKENDS,
    DTYPES,
    INTERPRETED,
    assert_as_exact_as_torch,
    find_device,
    skip_if_wrong_there,
)
from tests.derivatives.cases import make_directions
from tests.derivatives.norm_cases import RICH, bind, check, compute, list_results, plainly
from tests.norm.cases import CASES, VIEWS, Case, Inputs, make_gradients, make_inputs, ours, shrink_blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, RICH], ids=lambda case: case.name)
def test_against_float64(case, dtype, backend, monkeypatch):
    skip_if_wrong_there(backend, dtype)
    shrink_blocks(monkeypatch)
    check(case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "given", [("x",), ("residual",), ("weight",), ("bias",), ("x", "bias"), ("residual", "weight")]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_some_tangents(given, dropout_p, backend):
    moves_hidden = "x" in given or "residual" in given
    check(RICH._replace(dropout_p=dropout_p, prenorm=moves_hidden), torch.float16, backend, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_honoured(view, backend):
    """Of inputs, tangents and gradients: the same bits."""
    case = Case("", (3, 5, 4, 40), per_head=True, residual="same", prenorm=True)
    device = find_device(backend)
    inputs, gradients = make_inputs(case, torch.float32, device), make_gradients(case, torch.float32, device)
    directions = make_directions(inputs)

    def both(change):
        own = Inputs(*map(change, inputs[:2]), *inputs[2:])
        moved = [*map(change, directions[:2]), *directions[2:]]
        return compute(bind(ours, case, own, Inputs._fields), own, [change(g) for g in gradients], moved)

    with flashattn.use_backend(backend):
        for a, b in zip(both(VIEWS[view]), both(lambda x: x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_runs_change_no_bit(threads):
    case = Case("", (500, 63), residual="same", dropout_p=0.2, prenorm=True)
    inputs, gradients = make_inputs(case, torch.bfloat16, "cpu"), make_gradients(case, torch.bfloat16, "cpu")
    directions, before, runs = make_directions(inputs), torch.get_num_threads(), []
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            runs.append(compute(bind(ours, case, inputs, Inputs._fields), inputs, gradients, directions))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [60, 1504])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("far", ["x", "t", "g", "xt", "xg", "tg", "xtg"])
def test_numbers_far_from_zero(far, center, width, backend, monkeypatch):
    """The mean of h, of its tangent and of the gradient is many times their deviation."""
    if INTERPRETED and width > 60 and far != "xtg":
        pytest.skip("takes ten seconds")
    shrink_blocks(monkeypatch)
    rows, device = 20, find_device(backend)
    x, t, g = (100 * (name in far) + torch.randn(rows, width, device=device) for name in "xtg")
    case = Case("", (rows, width), center=center, bias=False)
    weight, tangent_weight = (1 + torch.rand(width, device=device) for _ in range(2))

    def run(call, change):
        own, moved = [change(x), change(weight)], [change(t), change(tangent_weight)]
        function = bind(call, case, Inputs(own[0], None, own[1], None), ("x", "weight"))
        return compute(function, own, [change(g)], moved)

    by_torch, exact = run(plainly, lambda x: x), run(plainly, torch.Tensor.double)
    with flashattn.use_backend(backend):
        found = run(ours, lambda x: x)
    for name, a, b, c in zip(list_results(case, ("x", "weight")), found, by_torch, exact, strict=True):
        # By the weight they sum a rounded mean of each row, the same in all columns: chance, and no number to compare.
        if not name.endswith("weight"):
            assert_as_exact_as_torch(a, b, c, name)


# ------------------------------------------------------------------------------------------------ transforms

X, RESIDUAL, WEIGHT = (torch.linspace(-1, 1, n, dtype=torch.float64).sin() for n in (24, 24, 6))
X, RESIDUAL = X.view(4, 6), RESIDUAL.view(4, 6).cos()
OPTIONS = [
    Case("layer", (4, 6), residual="same", prenorm=True),
    Case("rms", (4, 6), center=False, bias=False, residual="same", dropout_p=0.3, prenorm=True, weight_offset=1.0),
]


def cube(call: Callable, case: Case) -> Callable:
    def total(x, weight):
        y, hidden = call(case, Inputs(x, RESIDUAL, weight, weight.cos() if case.bias else None))
        return y.pow(3).sum() + (hidden.sin() * y).sum()

    return total


TRANSFORMS = {
    "hessian": lambda f: hessian(f, (0, 1))(X, WEIGHT),
    "jacobians_of_reverse": lambda f: torch.func.jacrev(grad(f, (0, 1)), (0, 1))(X, WEIGHT),
    "forward_of_forward": lambda f: jvp(lambda x: jvp(lambda x: f(x, WEIGHT), (x,), (X,))[1], (X,), (RESIDUAL,)),
    "third": lambda f: grad(lambda x: grad(lambda x: grad(f)(x, WEIGHT).pow(2).sum())(x).sum())(X),
    "mapped_tangents": lambda f: vmap(lambda t: jvp(lambda x: f(x, WEIGHT), (X,), (t,)))(torch.stack([X, RESIDUAL])),
    "forward_of_third": lambda f: jvp(grad(lambda x: grad(f)(x, WEIGHT).pow(2).sum()), (X,), (RESIDUAL,)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, case, compiled):
    torch._dynamo.reset()
    run = torch.compile(TRANSFORMS[name], fullgraph=True, backend="aot_eager") if compiled else TRANSFORMS[name]
    torch.testing.assert_close(run(cube(ours, case)), TRANSFORMS[name](cube(plainly, case)))


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
def test_duals_that_need_gradients(case):
    """At one level of autograd, without a transform."""

    def run(call):
        x = X.clone().requires_grad_()
        with forward_ad.dual_level():
            y = cube(call, case)(forward_ad.make_dual(x, RESIDUAL), WEIGHT)
            return torch.autograd.grad(forward_ad.unpack_dual(y).tangent, x)

    torch.testing.assert_close(run(ours), run(plainly))


def test_a_forward_pass_that_kept_no_h():
    """Has the tangent of y, and no gradients."""
    x = torch.randn(3, 8)
    settings = torch.float32, False, True, 1e-5, 0.0, 0.0, None, "cpu"
    with forward_ad.dual_level():
        y = torch.ops.flashattn.norm_forward(forward_ad.make_dual(x, x.cos()), x, None, None, *settings)[0]
        found = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(found, jvp(lambda x: flashattn.layer_norm(x, residual=x.detach()), (x,), (x.cos(),))[1])
    with pytest.raises(RuntimeError, match="without keep_hidden"):
        grad(lambda t: torch.ops.flashattn.norm_jvp(x, x, None, None, t, None, None, None, *settings)[4].sum())(x)
