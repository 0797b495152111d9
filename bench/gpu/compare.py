"""A case: the same work by ours and by others, checked, timed in turns, a row each."""

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

from .context import Call, Context, DoesNotFitError, Times, first_line, poisoned, tensors_of
from .rules import Truth, Verdict, judge

OURS = "flashattn"
PLAIN = "plain"  # ours without the kernels in roles, on the cards that have those


class Comparison(NamedTuple):
    """How one case is measured. `variants` names functions that make a call; what one raises becomes its row."""

    name: str
    settings: dict[str, object]  # of the case, for its rows
    variants: dict[str, Callable[[], Call]]
    touched: int  # bytes that one call touches
    truth: Callable[[], Truth]
    part_of: Callable[[list[Tensor]], list[Tensor]]  # what of a call's results is checked
    flops: float = 0.0
    bytes: float = 0.0  # that the bandwidth is counted by; 0: the row has none
    warm: bool = False
    ours: tuple[str, ...] = (OURS,)  # variants that launch kernels of this project
    compiled: tuple[str, ...] = ()  # variants that torch.compile has to compile
    truths: Mapping[str, Callable[[], Truth]] = MappingProxyType({})  # of variants that compute something else


def compare_all(context: Context, cases: list, comparison: Callable[[Context, object], Comparison]) -> Iterator[dict]:
    """The rows of a part. A case that fails costs no other."""
    context.plan(len(cases))
    for case in cases:
        try:
            yield from compare(context, comparison(context, case))
        except (DoesNotFitError, torch.OutOfMemoryError) as error:
            yield {"case": str(case), "skipped": first_line(error)}
        except Exception as error:
            context.clock.wait()  # raises, and ends the part, where the error was the GPU's: nothing runs after it
            yield {"case": str(case), "variant": OURS, "failed": first_line(error), "correct": False}


def compare(context: Context, comparison: Comparison) -> Iterator[dict]:
    """Check, time, check again; a row for each variant."""
    common = {"case": comparison.name, **comparison.settings}
    calls, before, outputs = {}, {}, {}
    common_truth = comparison.truth()
    truths = {n: comparison.truths[n]() if n in comparison.truths else common_truth for n in comparison.variants}
    for name, prepare in comparison.variants.items():
        try:
            calls[name] = prepare()
            # Only ours: the setting would have torch.compile compile a second time.
            with poisoned() if name in comparison.ours else contextlib.nullcontext():
                outputs[name] = [x.clone() for x in checked_part(comparison, calls[name]())]
            before[name] = judge(outputs[name], truths[name])
        except torch.OutOfMemoryError as error:
            calls.pop(name, None)
            yield common | {"variant": name, "skipped": first_line(error)}
        except Exception as error:
            context.clock.wait()
            calls.pop(name, None)
            yield common | {"variant": name, "failed": first_line(error), "correct": name not in comparison.ours}
    found: dict[str, dict] = {}

    def check(name: str, result: object) -> None:
        again = checked_part(comparison, result)
        same = all(torch.equal(x, y) for x, y in zip(again, outputs[name], strict=True))
        found[name] = checks([before[name], judge(again, truths[name])], same, name in comparison.ours)

    if not calls:
        return
    times = context.measure(calls, comparison.touched, warm=comparison.warm, after=check)
    for name in calls:
        yield common | {"variant": name} | figures(context, comparison, times, name) | found[name]


def checked_part(comparison: Comparison, result: object) -> list[Tensor]:
    return [x.detach() for x in comparison.part_of(tensors_of(result))]


def figures(context: Context, comparison: Comparison, times: dict[str, Times], name: str) -> dict:
    t = times[name]
    row = {
        "us": t.median * 1e6, "us_low": t.low * 1e6, "us_high": t.high * 1e6, "runs": t.runs, "by": t.by,
        "copies": 1 if comparison.warm else context.copies(comparison.touched), "warm": comparison.warm,
    }  # fmt: skip
    for unit, amount, scale in (("tflops", comparison.flops, 1e12), ("gbps", comparison.bytes, 1e9)):
        if amount:
            row[unit] = amount / t.median / scale
            row["share"] = row[unit] / context.ceilings[unit] if unit in context.ceilings else None
    if name != OURS and OURS in times:
        row |= ratio_of(t, times[OURS])
    return row


def ratio_of(theirs: Times, ours: Times) -> dict:
    """Their time / ours, round by round. unsure: the quartiles are further apart than the ratio is from 1."""
    ratios = sorted(a / b for a, b in zip(theirs.samples, ours.samples, strict=True))
    quarter = len(ratios) // 4
    ratio, low, high = statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "unsure": high - low > abs(ratio - 1)}


def checks(verdicts: list[Verdict], same: bool, is_ours: bool) -> dict:
    """The worse of the verdicts before and after timing. The same inputs must give the same bits: if not there is a
    race. Others are checked by the rule too, but make nothing wrong."""
    worse = max(verdicts, key=lambda v: (not v.correct, v.error))
    return {
        "error": worse.error, "allowed": worse.allowed, "in_bounds": worse.correct, "same_bits": same,
        "correct": not is_ours or (worse.correct and same),
    }  # fmt: skip


def in_turn(calls: list[Call]) -> Call:
    """One call after the other, endlessly: each on a copy of the inputs."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def copies_of(context: Context, tensors: list[Tensor], touched: int) -> list[list[Tensor]]:
    """The tensors, and as many clones as make a pass over them exceed the caches."""
    if context.compiling:
        return [tensors]
    more = range(context.copies(touched) - 1)
    return [tensors, *([x.detach().clone().requires_grad_(x.requires_grad) for x in tensors] for _ in more)]


def reference_truth(call: Callable[..., list[Tensor]], inputs: list[Tensor]) -> Truth:
    """call(*inputs) by PyTorch's operations, in float64 and in the inputs' dtype."""
    with flashattn.use_backend("reference"):
        exact, theirs = (
            [x.detach() for x in call(*(x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs))]
            for dtype in (torch.float64, inputs[0].dtype)
        )
    return Truth(exact, theirs)


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
