"""What each feature of attention costs on top of the plain call, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from datetime import date
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashattn

from .measure import Pair, max_error, pair
from .report import machine, make_console

CPU = torch.device("cpu")
ALLOWED = 1.25  # times the plain call

# Name to what makes its options of (shape, dtype). None hides a tile: the work of the tiles is that of the plain call.
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


def options_of(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> dict:
    """The arguments of a feature, their tensors on `device`."""
    with device:
        return FEATURES[name](shape, dtype)


class Cost(NamedTuple):
    feature: str
    dtype: str
    forward: float  # times the plain call, median of interleaved pairs
    backward: float
    error: float  # of out and the gradients of q, k and v: the largest difference to float64
    plain_error: float  # likewise of the plain call

    @property
    def correct(self) -> bool:
        """The rule of the tests is held against PyTorch's error; here the plain call's serves, ten times over."""
        return self.error <= 10 * self.plain_error


def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, options: dict) -> tuple[Callable, Callable]:
    """(the forward call, the backward call)"""
    out = flashattn.attention(q, k, v, **options)
    inputs = [q, k, v, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]

    def forward() -> Tensor:
        with torch.no_grad():
            return flashattn.attention(q, k, v, **options)

    return forward, lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def error(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, options: dict) -> float:
    forward, backward = step(q, k, v, grad, options)
    exact = {n: x.detach().double() if is_float(x) and n != "alibi_slopes" else x for n, x in options.items()}
    with flashattn.use_backend("reference"):
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        truth_forward, truth_backward = step(*wide, grad.double(), exact)
        truth = [truth_forward(), *truth_backward()]
    return max(max_error(x, t) for x, t in zip([forward(), *backward()[:3]], truth, strict=True))


def is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of out, the same for every feature."""
    torch.manual_seed(0)
    return [*(torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)), torch.randn(shape).to(dtype)]


@functools.cache
def plain_error(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    return error(*tensors(shape, dtype), {})


def measure(name: str, dtype: torch.dtype, shape: tuple[int, ...], seconds: float) -> Cost:
    q, k, v, grad = tensors(shape, dtype)
    options = options_of(name, shape, dtype)
    with_feature, plain = step(q, k, v, grad, options), step(q, k, v, grad, {})
    # Each pair's ratio is that of the plain call to the one with the feature.
    times: list[Pair] = [pair(a, b, CPU, seconds) for a, b in zip(with_feature, plain, strict=True)]
    return Cost(
        name, str(dtype).removeprefix("torch."), *(1 / t.ratio for t in times),
        error(q, k, v, grad, options), plain_error(shape, dtype),
    )  # fmt: skip


def print_costs(costs: Iterable[Cost], shape: tuple[int, ...]) -> list[Cost]:
    console = make_console(132)
    console.print(f"features on {machine()}; {date.today()}")
    console.print(f"(batch, heads, seq, head_dim) {shape}; times the plain call, median of interleaved pairs;")
    console.print(f"asked for: at most {ALLOWED}x; error: largest difference to float64, with the feature / plain")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("feature", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("forward", "backward", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    done = []
    with console.status("measuring") as status:
        for c in costs:
            done.append(c)
            wrong = "" if c.correct else " WRONG"
            table.add_row(
                c.feature, c.dtype, f"{c.forward:.2f}x", f"{c.backward:.2f}x",
                f"{c.error:.0e}/{c.plain_error:.0e}{wrong}",
            )  # fmt: skip
            status.update(f"measured {c.feature}, {c.dtype}")
    console.print(table)
    return done
