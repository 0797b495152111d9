"""Clocks: CUDA events and graphs on a GPU, and a substitute with the same methods for a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SPIN = 0.5e-3  # seconds that the GPU is kept busy, minimum
CLOCK = 2e9  # GPU cycles per second, about


class GpuClock:
    """Works on the current stream, which must not be the default one: that cannot be captured."""

    batch_seconds = 2e-3  # of launches between two events, minimum
    rounds = (5, 15)  # minimum, maximum
    seconds = 0.03  # for the rounds of one variant, about
    host_calls = 100  # a GPU's queue takes some 1,000 launches before the host has to wait

    def time(self, run: Callable[[], object], host_seconds: float = 0.0) -> float:
        """GPU seconds of the launches of `run`. The GPU is kept busy while the host queues them for `host_seconds`, so
        that the time excludes these."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(max(SPIN, 1.5 * host_seconds) * CLOCK))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        """(GPU seconds of one call, host seconds until it is queued), after a warm-up."""
        self.time(call)
        host = self.time_host(lambda: [call() for _ in range(3)])
        return self.time(lambda: [call() for _ in range(3)], host) / 3, host / 3

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Capture the launches of `run` in a CUDA graph; returns its replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
        return graph.replay

    def time_host(self, run: Callable[[], object]) -> float:
        """Host seconds until `run` has queued everything, on an idle GPU."""
        self.wait()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.wait()
        return seconds

    def wait(self) -> None:
        torch.cuda.synchronize()


class RehearsalClock:
    """Times mean nothing here: each call runs as few times as possible, on the CPU."""

    batch_seconds = 0.0
    rounds = (1, 1)
    seconds = 0.0
    host_calls = 1

    def time(self, run: Callable[[], object], host_seconds: float = 0.0) -> float:
        return self.time_host(run)

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        return 1e-6, 0.0  # so short that it is captured

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        return run

    def time_host(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def wait(self) -> None:
        pass
