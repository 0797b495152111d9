"""A case: one computation by our kernels and by peers, checked, timed in turns, a row for each."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

import flashattn

from .context import Call, Context, DoesNotFitError, Times, describe_error, list_tensors, poison_memory
from .verdicts import Truth, Verdict, judge

OURS = "flashattn"
PLAIN = "plain"  # our plain kernels, on cards where warp-specialised ones are the default


class Comparison(NamedTuple):
    """A case. `variants` maps names to functions that prepare a call; an exception becomes the row of its variant."""

    name: str
    settings: dict[str, object]  # columns of its rows
    variants: dict[str, Callable[[], Call]]
    bytes_touched: int  # by one call
    truth: Callable[[], Truth]
    select: Callable[[list[Tensor]], list[Tensor]]  # the part of a call's results that is checked
    flops: float = 0.0
    bytes: float = 0.0  # moved, for the bandwidth; 0: the row has none
    warm: bool = False
    ours: tuple[str, ...] = (OURS,)  # variants that launch kernels of this project
    compiled: tuple[str, ...] = ()  # variants that torch.compile has to compile
    truths: Mapping[str, Callable[[], Truth]] = MappingProxyType({})  # of variants with another result


def compare_all(
    context: Context, cases: list, make_comparison: Callable[[Context, object], Comparison]
) -> Iterator[dict]:
    """The rows of a part. If a case fails, the others still run."""
    context.plan(len(cases))
    for case in cases:
        try:
            yield from compare(context, make_comparison(context, case))
        except (DoesNotFitError, torch.OutOfMemoryError) as error:
            yield {"case": str(case), "skipped": describe_error(error)}
        except Exception as error:
            context.clock.wait()  # raises, and ends the part, if the CUDA context is broken
            yield {"case": str(case), "variant": OURS, "failed": describe_error(error), "correct": False}


def compare(context: Context, comparison: Comparison) -> Iterator[dict]:
    """Check, time, check again; a row for each variant."""
    common = {"case": comparison.name, **comparison.settings}
    calls, before, outputs = {}, {}, {}
    common_truth = comparison.truth()
    truths = {n: comparison.truths[n]() if n in comparison.truths else common_truth for n in comparison.variants}
    for name, prepare in comparison.variants.items():
        try:
            calls[name] = prepare()
            # Only ours: under this setting torch.compile would compile a second time.
            with poison_memory() if name in comparison.ours else contextlib.nullcontext():
                outputs[name] = [x.clone() for x in select_checked(comparison, calls[name]())]
            before[name] = judge(outputs[name], truths[name])
        except torch.OutOfMemoryError as error:
            calls.pop(name, None)
            yield common | {"variant": name, "skipped": describe_error(error)}
        except Exception as error:
            context.clock.wait()
            calls.pop(name, None)
            yield common | {"variant": name, "failed": describe_error(error), "correct": name not in comparison.ours}
    found: dict[str, dict] = {}

    def check(name: str, result: object) -> None:
        again = select_checked(comparison, result)
        same = all(torch.equal(x, y) for x, y in zip(again, outputs[name], strict=True))
        found[name] = combine([before[name], judge(again, truths[name])], same, name in comparison.ours)

    if not calls:
        return
    times = context.measure(calls, comparison.bytes_touched, warm=comparison.warm, after=check)
    for name in calls:
        yield common | {"variant": name} | make_figures(context, comparison, times, name) | found[name]


def select_checked(comparison: Comparison, result: object) -> list[Tensor]:
    return [x.detach() for x in comparison.select(list_tensors(result))]


def make_figures(context: Context, comparison: Comparison, times: dict[str, Times], name: str) -> dict:
    t = times[name]
    row = {
        "us": t.median * 1e6, "us_low": t.low * 1e6, "us_high": t.high * 1e6, "runs": t.runs, "by": t.by,
        "copies": 1 if comparison.warm else context.count_copies(comparison.bytes_touched), "warm": comparison.warm,
    }  # fmt: skip
    for unit, amount, scale in (("tflops", comparison.flops, 1e12), ("gbps", comparison.bytes, 1e9)):
        if amount:
            row[unit] = amount / t.median / scale
            row["share"] = row[unit] / context.ceilings[unit] if unit in context.ceilings else None
    if name != OURS and OURS in times:
        row |= compare_times(t, times[OURS])
    return row


def compare_times(theirs: Times, ours: Times) -> dict:
    """The peer's time / ours, round by round. unsure: the quartiles are further apart than the ratio is from 1."""
    ratios = sorted(a / b for a, b in zip(theirs.samples, ours.samples, strict=True))
    quarter = len(ratios) // 4
    ratio, low, high = statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "unsure": high - low > abs(ratio - 1)}


def combine(verdicts: list[Verdict], same: bool, is_ours: bool) -> dict:
    """The worse of the verdicts before and after timing. The same inputs must give the same bits, or there is a race.
    Peers are checked too, but do not make a row wrong."""
    worse = max(verdicts, key=lambda v: (not v.correct, v.error))
    return {
        "error": worse.error, "allowed": worse.allowed, "in_bounds": worse.correct, "same_bits": same,
        "correct": not is_ours or (worse.correct and same),
    }  # fmt: skip


def cycle_calls(calls: list[Call]) -> Call:
    """A call that runs the next of these, cyclically: each has its own copy of the inputs."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def copy_inputs(context: Context, tensors: list[Tensor], bytes_touched: int) -> list[list[Tensor]]:
    """The tensors, and enough clones of them to exceed the caches."""
    if context.compiling:
        return [tensors]
    more = range(context.count_copies(bytes_touched) - 1)
    return [tensors, *([x.detach().clone().requires_grad_(x.requires_grad) for x in tensors] for _ in more)]


def compute_reference(call: Callable[..., list[Tensor]], inputs: list[Tensor]) -> Truth:
    """call(*inputs) on the reference backend, in float64 and in the inputs' dtype."""
    with flashattn.use_backend("reference"):
        exact, theirs = (
            [x.detach() for x in call(*(x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs))]
            for dtype in (torch.float64, inputs[0].dtype)
        )
    return Truth(exact, theirs)


def count_bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
