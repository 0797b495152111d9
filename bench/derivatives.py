"""What derivatives of attention and norms cost: forward mode, second derivatives and vmap; their memory and error."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashattn

from .cpu_figures import measure_peak_mib
from .environment import describe_environment
from .measure import compute_max_error, measure_pair
from .table import collect, make_console, make_table

CPU = torch.device("cpu")
SMALL = (1, 1, 16, 16)  # of each call under vmap: little work beside what a call costs
CALLS = 64
REPEATS = 8  # mapped calls in a row: they take as long as the loop, in which all calls but the first find a warm cache
LONG = 32_768


class Cost(NamedTuple):
    name: str
    dtype: str
    value: float
    unit: str
    target: float | None  # at least, or at most where the unit is a limit
    aim: float | None
    is_limit: bool
    error: float | None = None  # the largest difference to float64, over the largest number there
    allowed: float | None = None

    @property
    def correct(self) -> bool:
        return self.error is None or self.allowed is None or self.error <= self.allowed


class Inputs(NamedTuple):
    """q, k, v, their tangents, and the gradient of out."""

    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]
    grad_out: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        primals, tangents = (tuple(x.to(dtype) for x in xs) for xs in self[:2])
        return Inputs(primals, tangents, self.grad_out.to(dtype))


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    numbers = [torch.randn(shape).to(dtype) for _ in range(7)]
    return Inputs(tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6])


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    return flashattn.attention(q, k, v, causal=causal)


def attend_by_math(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """PyTorch's attention in its own operations, which alone has these derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


# ------------------------------------------------------------------------------------------------ calls


def make_jvp(function: Callable, x: Inputs) -> Callable[[], tuple]:
    return lambda: torch.func.jvp(function, x.primals, x.tangents)


def make_forward(function: Callable, x: Inputs) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return function(*x.primals)

    return run


def make_backwards(function: Callable, x: Inputs) -> tuple[Callable[[], tuple], Callable[[], tuple]]:
    """(the first backward pass, that of its results along the tangents, by the inputs and grad_out)"""
    inputs = [p.detach().clone().requires_grad_() for p in x.primals]
    grad_out = x.grad_out.clone().requires_grad_()
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, grad_out, create_graph=True)

    def first():
        return torch.autograd.grad(out, inputs, x.grad_out, retain_graph=True)

    def second():
        return torch.autograd.grad(gradients, [*inputs, grad_out], x.tangents, retain_graph=True)

    return first, second


# ------------------------------------------------------------------------------------------------ figures


def measure(shape: tuple[int, ...], dtype: torch.dtype, seconds: float) -> Iterator[Cost]:
    name = str(dtype).removeprefix("torch.")
    x = make_inputs(shape, dtype)
    exact = x.to(torch.float64)

    def compare(mine: Callable, other: Callable) -> float:
        """How many times as long the first takes, the median of pairs."""
        return 1 / measure_pair(mine, other, CPU, seconds).ratio

    jvp, by_math = make_jvp(attend, x), make_jvp(attend_by_math, x)
    errors = measure_errors(jvp(), by_math(), make_jvp(attend_by_math, exact)())
    limit = 2.6 if dtype == torch.float32 else 2.8
    yield Cost("jvp / forward", name, compare(jvp, make_forward(attend, x)), "x", limit, 2.2, True, *errors)
    yield Cost("jvp of PyTorch's math / ours", name, compare(by_math, jvp), "x", 4, None, False)
    ours, theirs = (make_jvp(functools.partial(f, causal=True), x) for f in (attend, attend_by_math))
    yield Cost("the same, causal", name, compare(theirs, ours), "x", 4, None, False)
    first, second = make_backwards(attend, x)
    _, second_by_math = make_backwards(attend_by_math, x)
    _, second_exact = make_backwards(attend_by_math, exact)
    errors = measure_errors(second(), second_by_math(), second_exact())
    yield Cost("second derivative / first backward", name, compare(second, first), "x", 4, 3, True, *errors)
    yield Cost("that of PyTorch's math / ours", name, compare(second_by_math, second), "x", None, None, False)
    yield from measure_score_mod(shape, dtype, compare)
    yield from measure_norms(shape, dtype, compare)


def measure_errors(ours, by_math, exact) -> tuple[float, float]:
    """(the largest error over the largest number, what is allowed: twice that of PyTorch's math and a unit in the last
    place), of the result where they come nearest."""
    pairs = []
    for x, y, t in zip(ours, by_math, exact, strict=True):
        size = t.abs().max().item()
        allowed = 2 * compute_max_error(y, t) + torch.finfo(x.dtype).eps * size
        pairs.append((compute_max_error(x, t) / size, allowed / size))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def measure_score_mod(shape: tuple[int, ...], dtype: torch.dtype, compare: Callable) -> Iterator[Cost]:
    """On the CPU the reference, in PyTorch's operations, serves callables; here of a quarter of the tokens."""
    x = make_inputs((*shape[:2], shape[2] // 4, shape[3]), dtype)

    def attend_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashattn.attention(q, k, v, causal=True, score_mod=lambda s, b, h, i, j: 20 * torch.tanh(s / 20))

    yield from measure_passes("score_mod", attend_capped, x, compare)


def measure_norms(shape: tuple[int, ...], dtype: torch.dtype, compare: Callable) -> Iterator[Cost]:
    """Of rows as wide as all heads together."""
    batch, heads, seq, head_dim = shape
    torch.manual_seed(0)
    row, tangent, grad_y = (torch.randn(batch * seq, heads * head_dim).to(dtype) for _ in range(3))
    weight = torch.ones(heads * head_dim).to(dtype)
    x = Inputs((row, weight), (tangent, weight), grad_y)
    for norm in (flashattn.layer_norm, flashattn.rms_norm):
        yield from measure_passes(norm.__name__, norm, x, compare)


def measure_passes(what: str, function: Callable, x: Inputs, compare: Callable) -> Iterator[Cost]:
    """Its jvp and its second derivative, over the passes that they follow."""
    dtype = str(x.grad_out.dtype).removeprefix("torch.")
    jvp = compare(make_jvp(function, x), make_forward(function, x))
    yield Cost(f"{what}, jvp / forward", dtype, jvp, "x", None, None, True)
    first, second = make_backwards(function, x)
    yield Cost(f"{what}, second / first backward", dtype, compare(second, first), "x", None, None, True)


def repeat(call: Callable[[], object]) -> Callable[[], None]:
    def run():
        for _ in range(REPEATS):
            call()

    return run


def measure_vmap(dtype: torch.dtype, seconds: float) -> Iterator[Cost]:
    x = make_inputs((CALLS, *SMALL), dtype)

    def gradients(q, k, v):
        return torch.func.grad(lambda q: attend(q, k, v).square().sum())(q)

    for name, call in (("vmap", attend), ("vmap of grad", gradients)):

        def mapped(call=call):
            return torch.vmap(call)(*x.primals)

        def loop(call=call):
            return torch.stack([call(*(p[n] for p in x.primals)) for n in range(CALLS)])

        torch.testing.assert_close(mapped(), loop(), rtol=1e-2, atol=1e-2)
        ratio = measure_pair(repeat(mapped), loop, CPU, seconds).ratio * REPEATS
        target = 10 if name == "vmap" else None
        dtype_name = str(dtype).removeprefix("torch.")
        yield Cost(f"a loop of {CALLS} calls / {name}", dtype_name, ratio, "x", target, None, False)


def measure_memory() -> Iterator[Cost]:
    """In new processes: the peak of this one may be higher already."""
    for name, call in (("jvp", run_jvp), ("double backward", run_double_backward)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            mebibytes = pool.submit(measure_peak_mib, LONG, call).result()
        yield Cost(f"memory, {LONG:,} tokens, {name}", "float32", mebibytes, "MiB", 200, None, True)


def run_jvp(q: Tensor, k: Tensor, v: Tensor) -> object:
    with torch.no_grad():
        return torch.func.jvp(attend, (q, k, v), (q, k, v))


def run_double_backward(q: Tensor, k: Tensor, v: Tensor) -> object:
    gradients = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v), create_graph=True)
    return torch.autograd.grad(gradients, (q, k, v), (q, k, v))


# ------------------------------------------------------------------------------------------------ the table


def run(shape: tuple[int, ...], dtypes: list[str], seconds: float) -> Iterator[Cost]:
    for dtype in dtypes:
        yield from measure(shape, getattr(torch, dtype), seconds)
        yield from measure_vmap(getattr(torch, dtype), seconds)
    yield from measure_memory()


def print_costs(costs: Iterable[Cost], shape: tuple[int, ...]) -> list[Cost]:
    console = make_console(132)
    console.print(f"derivatives on {describe_environment()}; {date.today()}")
    console.print(f"(batch, heads, seq, head_dim) {shape}, under vmap {SMALL} a call; medians of interleaved pairs;")
    console.print("error: the largest difference to float64 over the largest number / what is allowed")
    done = collect(console, costs, lambda cost: f"{cost.name}, {cost.dtype}")
    console.print(make_table(["what", "dtype"], ["measured", "target", "aim", "error"], map(format_cost, done)))
    return done


def format_cost(c: Cost) -> list[str]:
    bound = "at most" if c.is_limit else "at least"
    missed = c.target is not None and (c.value > c.target if c.is_limit else c.value < c.target)
    digits = 0 if c.unit == "MiB" else 2
    value = f"{c.value:.{digits}f}{' ' * (c.unit == 'MiB')}{c.unit}{' MISSED' if missed else ''}"
    error = "" if c.error is None else f"{c.error:.0e}/{c.allowed:.0e}{'' if c.correct else ' WRONG'}"
    target = "" if c.target is None else f"{bound} {c.target:g}"
    return [c.name, c.dtype, value, target, "" if c.aim is None else f"{c.aim:g}", error]
