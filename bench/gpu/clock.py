"""The clocks: CUDA events and graphs on a GPU, a stand-in with the same few verbs for a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SPIN = 0.5e-3  # seconds that the GPU is kept busy, at least
CLOCK = 2e9  # its cycles in a second, about


class GpuClock:
    """Works on the current stream, which must not be the default one: that cannot be captured."""

    batch_seconds = 2e-3  # of launches between two events, at least
    rounds = (5, 15)
    seconds = 0.03  # for the rounds of one variant, about
    host_calls = 100  # a GPU's queue takes some 1,000 launches before the host has to wait

    def time(self, run: Callable[[], object], host_seconds: float = 0.0) -> float:
        """Seconds that the GPU takes for what `run` launches. It is kept busy while the host takes its `host_seconds`
        to queue that, so that these are not in it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(max(SPIN, 1.5 * host_seconds) * CLOCK))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of one call of the GPU, and of the host until it is queued, after a warm-up."""
        self.time(call)
        host = self.host_time(lambda: [call() for _ in range(3)])
        return self.time(lambda: [call() for _ in range(3)], host) / 3, host / 3

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """What `run` launches as a CUDA graph; returns its replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
        return graph.replay

    def host_time(self, run: Callable[[], object]) -> float:
        """Seconds until `run` has launched everything, on a GPU that is idle before."""
        self.wait()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.wait()
        return seconds

    def wait(self) -> None:
        torch.cuda.synchronize()


class RehearsalClock:
    """Times mean nothing here: launches run as seldom as they can, and take what the CPU takes."""

    batch_seconds = 0.0
    rounds = (1, 1)
    seconds = 0.0
    host_calls = 1

    def time(self, run: Callable[[], object], host_seconds: float = 0.0) -> float:
        return self.host_time(run)

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        return 1e-6, 0.0  # so short that it is captured

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        return run

    def host_time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def wait(self) -> None:
        pass
