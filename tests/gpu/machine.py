"""What the tests in test_gpu.py run on: a GPU, or its rehearsal, in which the PTX machine takes Triton's launches on
CPU tensors. Only what the two do differently is here."""

import contextlib
import gc
import mmap
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import flashattn

SLEEP = 50_000_000  # cycles: some 30 ms


class Gpu:
    """The current CUDA device."""

    rehearsed = False
    runs = 20  # that must give the same bits
    replays = 2  # of a graph, each on other data

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def on(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream)

    def sleep(self) -> None:
        """Keep the current stream busy, so that whoever does not wait for it is early."""
        torch.cuda._sleep(SLEEP)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Within the block it is an error to wait for the GPU."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capturing(self) -> contextlib.AbstractContextManager:
        return torch.cuda.graph(torch.cuda.CUDAGraph())

    def capture(self, function: Callable[[], list]) -> tuple[list, Callable[[], None]]:
        """(results, replay): tensors that the function returned in the capture, and what computes them anew."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
        return results, graph.replay

    def memory(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, so poisoned. Tests beside this one may have to give theirs back first."""
        need = elements * dtype.itemsize
        for _ in range(30):
            free, whole = torch.cuda.mem_get_info()
            if free > need + 2**31:
                return torch.empty(elements, dtype=dtype, device=self.device)
            time.sleep(1)
        pytest.skip(f"needs {need >> 30} GiB of GPU memory, {free >> 30} of {whole >> 30} are free")

    def give_memory_back(self) -> None:
        if torch.cuda.memory_reserved() > 2**30:
            torch.cuda.empty_cache()

    def peak(self, function: Callable[[], object]) -> int:
        """Bytes that the function allocates at most at a time."""
        gc.collect()  # what compiling left behind would be given back in between
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before


class Rehearsal:
    """CPU tensors on the PTX machine. Streams do nothing; a graph is replayed by calling its function again."""

    rehearsed = True
    runs = 2
    replays = 1

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.device = torch.device("cpu")
        self.monkeypatch = monkeypatch

    def stream(self) -> None:
        return None

    def on(self, stream: None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def sleep(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def without_waiting(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        with self.monkeypatch.context() as patched:
            patched.setattr(flashattn.tracing, "is_capturing", lambda: True)
            yield

    def capture(self, function: Callable[[], list]) -> tuple[list, Callable[[], None]]:
        function()

        def record():
            with self.capturing():
                return function()

        def replay():
            for x, new in zip(results, record(), strict=True):
                x.data.copy_(new)

        results = record()
        return results, replay

    def memory(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Of the system's memory only what is touched."""
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)
