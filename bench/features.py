"""The cost of each feature of attention relative to a call without features, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from datetime import date
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashattn

from .environment import describe_environment
from .measure import Pair, compute_max_error, measure_pair
from .table import collect, make_console, make_table

CPU = torch.device("cpu")
TARGET = 1.25  # times the plain call

# Options of each feature by (shape, dtype). No tile is fully masked: the tiles are those of the plain call.
FEATURES: dict[str, Callable[[tuple[int, ...], torch.dtype], dict]] = {
    "window as wide as the sequence": lambda s, d: dict(window=(s[2], s[2])),
    "kv_lengths, all full": lambda s, d: dict(kv_lengths=torch.full((s[0],), s[2])),
    "softcap": lambda s, d: dict(softcap=20.0),
    "alibi_slopes": lambda s, d: dict(alibi_slopes=torch.rand(s[1])),
    "mask (seq_q, seq_k)": lambda s, d: dict(mask=torch.rand(s[2], s[2]) > 0.1),
    "mask (batch, 1, 1, seq_k)": lambda s, d: dict(mask=torch.rand(s[0], 1, 1, s[2]) > 0.1),
    "bias (heads, seq_q, seq_k)": lambda s, d: dict(bias=torch.randn(s[1], s[2], s[2]).to(d)),
    "bias (seq_k,)": lambda s, d: dict(bias=torch.randn(s[2]).to(d)),
    "the same, with its gradient": lambda s, d: dict(bias=torch.randn(s[2]).to(d).requires_grad_()),
    "sinks, with their gradient": lambda s, d: dict(sinks=torch.randn(s[1]).to(d).requires_grad_()),
    "dropout_p": lambda s, d: dict(dropout_p=0.1, seed=1),
    "block_mask, none left out": lambda s, d: dict(
        block_mask=create_block_mask(
            lambda b, h, i, j: i - j < s[2], None, None, s[2], s[2], torch.get_default_device()
        )
    ),
    "score_mod": lambda s, d: dict(score_mod=lambda score, b, h, i, j: score - (i - j).abs() * 0.01),
}


def make_options(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> dict:
    """The keyword arguments of a feature, with tensors on `device`."""
    with device:
        return FEATURES[name](shape, dtype)


class Cost(NamedTuple):
    feature: str
    dtype: str
    forward: float  # times the plain call, median of interleaved pairs
    backward: float
    error: float  # largest difference to float64, of out and the gradients of q, k and v
    plain_error: float  # likewise, of the plain call

    @property
    def correct(self) -> bool:
        """At most ten times the plain call's error. (The rule of the tests compares with PyTorch's error.)"""
        return self.error <= 10 * self.plain_error


def make_calls(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, options: dict) -> tuple[Callable, Callable]:
    """(the forward call, the backward call)"""
    out = flashattn.attention(q, k, v, **options)
    inputs = [q, k, v, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]

    def forward() -> Tensor:
        with torch.no_grad():
            return flashattn.attention(q, k, v, **options)

    return forward, lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def measure_error(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, options: dict) -> float:
    forward, backward = make_calls(q, k, v, grad, options)
    exact = {n: x.detach().double() if is_float(x) and n != "alibi_slopes" else x for n, x in options.items()}
    with flashattn.use_backend("reference"):
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        truth_forward, truth_backward = make_calls(*wide, grad.double(), exact)
        truth = [truth_forward(), *truth_backward()]
    return max(compute_max_error(x, t) for x, t in zip([forward(), *backward()[:3]], truth, strict=True))


def is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of out: equal for all features."""
    torch.manual_seed(0)
    return [*(torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)), torch.randn(shape).to(dtype)]


@functools.cache
def measure_plain_error(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    return measure_error(*make_inputs(shape, dtype), {})


def measure(name: str, dtype: torch.dtype, shape: tuple[int, ...], seconds: float) -> Cost:
    q, k, v, grad = make_inputs(shape, dtype)
    options = make_options(name, shape, dtype)
    with_feature, plain = make_calls(q, k, v, grad, options), make_calls(q, k, v, grad, {})
    # Each pair's ratio is that of the plain call to the one with the feature.
    times: list[Pair] = [measure_pair(a, b, CPU, seconds) for a, b in zip(with_feature, plain, strict=True)]
    return Cost(
        name, str(dtype).removeprefix("torch."), *(1 / t.ratio for t in times),
        measure_error(q, k, v, grad, options), measure_plain_error(shape, dtype),
    )  # fmt: skip


def print_costs(costs: Iterable[Cost], shape: tuple[int, ...]) -> list[Cost]:
    console = make_console(132)
    console.print(f"features on {describe_environment()}; {date.today()}")
    console.print(f"(batch, heads, seq, head_dim) {shape}; times the plain call, median of interleaved pairs;")
    console.print(f"target: at most {TARGET}x; error: largest difference to float64, with the feature / plain")
    done = collect(console, costs, lambda cost: f"{cost.feature}, {cost.dtype}")
    console.print(make_table(["feature", "dtype"], ["forward", "backward", "error"], map(format_cost, done)))
    return done


def format_cost(c: Cost) -> list[str]:
    wrong = "" if c.correct else " WRONG"
    error = f"{c.error:.0e}/{c.plain_error:.0e}{wrong}"
    return [c.feature, c.dtype, f"{c.forward:.2f}x", f"{c.backward:.2f}x", error]
