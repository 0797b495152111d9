"""The environment of a part: the device, the time left, random data and timers."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flashattn

from . import results
from .card import Card
from .clock import GpuClock, RehearsalClock

GRAPH_BELOW = 100e-6  # GPU seconds of a call
MAX_COPIES = 64  # of small inputs: more would time the allocator
MAX_LAUNCHES = 400  # of a batch

Call = Callable[[], object]


class DoesNotFitError(RuntimeError):
    """A case is too large for the card's memory."""


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float  # quartiles
    high: float
    runs: int  # rounds, each a batch of calls
    by: str  # "graph" or "events"
    samples: tuple[float, ...]  # of each round, in order; variants measured together share rounds


class Batch(NamedTuple):
    """Several launches of a call, timed as one."""

    run: Callable[[], None]
    launches: int
    seconds: float  # of one call, about
    host_seconds: float  # to queue them all
    by: str
    last: list  # what the last call returned


class Settings(NamedTuple):
    """The settings that the parent process passes to a part's process."""

    part: str
    chosen: tuple[str, ...]  # names of all parts of this run
    out: Path
    card: Card
    rehearse: bool
    begin: float  # of time.monotonic(), the same in all processes
    deadline: float


class Context:
    def __init__(self, settings: Settings, compiling: bool = False):
        """compiling: nothing is launched, tensors are empty and lie on the CPU."""
        self.settings, self.compiling = settings, compiling
        self.rehearse, self.card, self.out = settings.rehearse, settings.card, settings.out
        self.device = torch.device("cpu" if self.rehearse or compiling else "cuda")
        self.clock = RehearsalClock() if self.rehearse else GpuClock()

    def seconds_left(self) -> float:
        """Seconds left of this part's budget, after which the parent kills the process."""
        return self.settings.deadline - time.monotonic()

    def plan(self, cases: int) -> None:
        """Record how many cases the part has, for the line "stopped after N of M"."""
        results.append(self.out, "plan", self.settings.part, {"cases": cases})

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if self.compiling:
            return torch.empty(shape, dtype=dtype)
        return torch.randn(shape, device=self.device, dtype=torch.float32 if self.rehearse else dtype).to(dtype)

    def require_memory(self, size: int) -> None:
        """Raise DoesNotFitError unless 1.1 times so many bytes are free on the card."""
        if self.device.type == "cpu":
            return
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if 1.1 * size > free:
            raise DoesNotFitError(f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} are free")

    def count_copies(self, bytes_touched: int) -> int:
        """How many copies of the inputs together exceed three times the L2."""
        return max(1, min(MAX_COPIES, -(-3 * self.card.l2_bytes // max(1, bytes_touched))))

    @functools.cached_property
    def ceilings(self) -> dict[str, float]:
        """This run's ceilings as far as measured: TFLOP/s and GB/s by "tflops" and "gbps"."""
        rows = results.read(self.out, "row", "ceilings")
        return {unit: row[unit] for row in rows for unit in ("tflops", "gbps") if row.get(unit)}

    def measure(
        self,
        calls: dict[str, Call],
        bytes_touched: int = 0,
        *,
        warm: bool = False,
        after: Callable[[str, object], None] | None = None,
    ) -> dict[str, Times]:
        """Time calls without arguments, in turns. A call that touches less than three times the L2 should cycle through
        copies of its inputs (`count_copies` of them), so that each batch reads all of them; warm: it does not.

        after: called with each name and the result of its last call once the timing is over; a graph is replayed
        into memory filled with NaN before.
        """
        passes = 1 if warm else self.count_copies(bytes_touched)
        batches = {name: self._batch(call, passes) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in batches}
        names = list(batches)
        once = sum(batch.launches * batch.seconds + 1.5 * batch.host_seconds for batch in batches.values())
        least, most = self.clock.rounds
        for turn in range(max(least, min(most, int(self.clock.seconds * len(names) / once)))):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                batch = batches[name]
                samples[name].append(self.clock.time(batch.run, batch.host_seconds) / batch.launches)
        if after is not None:
            for name, batch in batches.items():
                if batch.by == "graph":
                    fill_with_nan(batch.last[0])
                    batch.run()
                    self.clock.wait()
                after(name, batch.last[0])
        return {name: summarise_samples(samples[name], batch.by) for name, batch in batches.items()}

    def measure_host(self, call: Call) -> Times:
        """Host seconds of one call, without waiting for the GPU or a full queue."""
        calls = self.clock.host_calls
        for _ in range(calls // 10):  # a warm-up
            call()
        return self._rounds(lambda: self.clock.time_host(lambda: [call() for _ in range(calls)]) / calls, "host")

    def measure_graph(self, call: Call) -> tuple[Times, Times]:
        """(GPU seconds, host seconds) of one call in a CUDA graph of many."""
        calls = self.clock.host_calls
        replay = self.clock.capture(lambda: [call() for _ in range(calls)])
        replay()
        gpu = self._rounds(lambda: self.clock.time(replay) / calls, "graph")
        return gpu, self._rounds(lambda: self.clock.time_host(replay) / calls, "host")

    def _rounds(self, seconds: Callable[[], float], by: str) -> Times:
        return summarise_samples([seconds() for _ in range(self.clock.rounds[1])], by)

    def _batch(self, call: Call, passes: int) -> Batch:
        seconds, host_seconds = self.clock.estimate(call)
        launches = max(passes, min(MAX_LAUNCHES, int(self.clock.batch_seconds / seconds) + 1))
        last: list = [None]

        def run() -> None:
            for _ in range(launches):
                last[0] = call()

        one_by_one = Batch(run, launches, seconds, launches * host_seconds, "events", last)
        if seconds >= max(GRAPH_BELOW, host_seconds):
            return one_by_one
        try:
            return Batch(self.clock.capture(run), launches, seconds, 0.0, "graph", last)
        except Exception as error:  # not capturable: launched one by one, and the row says so
            self.clock.wait()
            return one_by_one._replace(by=f"events, not captured: {describe_error(error)}")


def summarise_samples(samples: list[float], by: str) -> Times:
    ordered = sorted(samples)
    quarter = len(ordered) // 4
    return Times(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], len(ordered), by, tuple(samples))


def describe_error(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def list_tensors(outputs) -> list[Tensor]:
    """The tensors among the results of a call."""
    return [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if isinstance(x, Tensor)]


def fill_with_nan(outputs) -> None:
    for x in list_tensors(outputs):
        x.detach().fill_(float("nan"))


@contextlib.contextmanager
def poison_memory() -> Iterator[None]:
    """Within the block uninitialised memory is filled with NaN, so that elements that a kernel does not write show."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def prepare_device(context: Context) -> Iterator[None]:
    """Within the block flashattn runs on Triton: on the GPU, on a stream that can be captured; in a rehearsal, on the
    PTX machine."""
    with contextlib.ExitStack() as stack:
        if context.rehearse:
            from .. import ptx

            stack.enter_context(ptx.device(context.card.architecture))
        else:
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        stack.enter_context(flashattn.use_backend("triton"))
        yield
