"""Part "host": the overhead of calls with short kernels, in microseconds. eager_us: Python and the driver, until all is
queued; us: GPU time of one of many such calls in a CUDA graph; replay_us: host time of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import flashattn
from flashattn.cache import KVCache

from .compare import OURS, Comparison
from .context import Call, Context, describe_error
from .tables import group_by_case
from .verdicts import Truth

TORCH = "torch"


class Case(NamedTuple):
    name: str
    seq: int  # tokens, or rows of a norm
    head_dim: int  # or columns


def list_cases(rehearse: bool) -> list[Case]:
    if rehearse:
        return [Case("rms_norm", 5, 100), Case("decode", 16, 16)]
    names = ("attention", "attention, forward and backward", "layer_norm", "rms_norm", "decode")
    return [Case(name, 128, 1024 if name.endswith("norm") else 64) for name in names]


def run(context: Context) -> Iterator[dict]:
    every = list_cases(context.rehearse)
    context.plan(len(every))
    for case in every:
        for name, prepare in make_comparison(context, case).variants.items():
            row = {"case": case.name, "variant": name}
            try:
                yield row | measure(context, prepare())
            except Exception as error:
                yield row | {"failed": describe_error(error), "correct": name != OURS}


def summarise(rows: list[dict]) -> list[str]:
    lines = [f"{case:<32} " + "; ".join(map(format_figures, of)) for case, of in group_by_case(rows).items()]
    return ["us until a call is queued; us of the GPU in a CUDA graph", *lines]


def format_figures(row: dict) -> str:
    if row.get("failed"):
        return f"{row['variant']} failed"
    graph = f"{row['us']:.1f} us in a graph" if row["us"] is not None else row["by"][:60]
    return f"{row['variant']} {row['eager_us']:.1f} us, {graph}"


def measure(context: Context, call: Call) -> dict:
    eager = context.measure_host(call)
    row = {"eager_us": eager.median * 1e6, "eager_low": eager.low * 1e6, "eager_high": eager.high * 1e6}
    try:
        times, replay = context.measure_graph(call)
    except (RuntimeError, ValueError) as error:  # a call that cannot be captured
        context.clock.wait()
        return row | {"us": None, "replay_us": None, "by": f"not captured: {describe_error(error)}"}
    return row | {"us": times.median * 1e6, "replay_us": replay.median * 1e6, "by": "graph"}


def make_comparison(context: Context, case: Case) -> Comparison:
    """For the preparation and precompilation only: these are not timed like other cases."""
    prepare = {
        "attention": prepare_attention, "attention, forward and backward": prepare_attention_backward,
        "layer_norm": prepare_norm, "rms_norm": prepare_norm, "decode": prepare_decode,
    }[case.name]  # fmt: skip
    return Comparison(case.name, {}, prepare(context, case), 0, lambda: Truth([], []), lambda results: results)


def make_qkv(context: Context, case: Case) -> list[Tensor]:
    return [context.randn(1, 8, case.seq, case.head_dim) for _ in range(3)]


def prepare_attention(context: Context, case: Case) -> dict[str, Callable[[], Call]]:
    x = make_qkv(context, case)
    theirs = functional.scaled_dot_product_attention
    return {OURS: lambda: lambda: flashattn.attention(*x), TORCH: lambda: lambda: theirs(*x)}


def prepare_attention_backward(context: Context, case: Case) -> dict[str, Callable[[], Call]]:
    x = [t.requires_grad_() for t in make_qkv(context, case)]
    grad = torch.ones_like(x[0])
    theirs = functional.scaled_dot_product_attention
    return {
        OURS: lambda: lambda: torch.autograd.grad(flashattn.attention(*x), x, grad),
        TORCH: lambda: lambda: torch.autograd.grad(theirs(*x), x, grad),
    }


def prepare_norm(context: Context, case: Case) -> dict[str, Callable[[], Call]]:
    x, *parameters = (
        context.randn(*shape)
        for shape in [(case.seq, case.head_dim), *[(case.head_dim,)] * (2 if case.name == "layer_norm" else 1)]
    )
    ours, theirs = (getattr(module, case.name) for module in (flashattn, functional))
    return {
        OURS: lambda: lambda: ours(x, *parameters),
        TORCH: lambda: lambda: theirs(x, (case.head_dim,), *parameters),
    }


def prepare_decode(context: Context, case: Case) -> dict[str, Callable[[], Call]]:
    """Append one token to a cache and attend to all."""
    q, k, v = (context.randn(1, heads, 1, case.head_dim) for heads in (8, 2, 2))
    cache = KVCache(1, 2, case.seq, case.head_dim, dtype=q.dtype, device=context.device)
    before = [context.randn(1, heads, case.seq - 1, case.head_dim) for heads in (8, 2, 2)]
    with flashattn.use_backend("reference"):
        flashattn.decode(before[0], cache, *before[1:])

    def call() -> Tensor:
        out = flashattn.decode(q, cache, k, v)
        cache.truncate([case.seq - 1])
        return out

    return {OURS: lambda: call}
