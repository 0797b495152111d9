"""The device of the tests of this folder: a GPU, or a rehearsal, in which the PTX machine executes Triton's launches on
CPU tensors. `Rehearsal` lacks the methods that only tests on a GPU call."""

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
    runs = 20  # with the same bits
    replays = 2  # of a graph, each on new data

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def use_stream(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream)

    def sleep(self) -> None:
        """Keep the current stream busy, so that a launch that does not wait for it runs too early."""
        torch.cuda._sleep(SLEEP)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def forbid_waiting(self) -> Iterator[None]:
        """Within the block waiting for the GPU is an error."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capturing(self) -> contextlib.AbstractContextManager:
        return torch.cuda.graph(torch.cuda.CUDAGraph())

    def capture(self, function: Callable[[], list]) -> tuple[list, Callable[[], None]]:
        """(results, replay): the tensors that the function returned in the capture, and a call that recomputes them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
        return results, graph.replay

    def allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, so poisoned. Waits while parallel tests hold the memory."""
        need = elements * dtype.itemsize
        for _ in range(30):
            free, whole = torch.cuda.mem_get_info()
            if free > need + 2**31:
                return torch.empty(elements, dtype=dtype, device=self.device)
            time.sleep(1)
        pytest.skip(f"needs {need >> 30} GiB of GPU memory, {free >> 30} of {whole >> 30} are free")

    def release_memory(self) -> None:
        if torch.cuda.memory_reserved() > 2**30:
            torch.cuda.empty_cache()

    def measure_peak(self, function: Callable[[], object]) -> int:
        """Peak bytes that the function allocates."""
        gc.collect()  # otherwise leftovers of the compilation would be freed in between
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

    def use_stream(self, stream: None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def sleep(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def forbid_waiting(self) -> contextlib.AbstractContextManager:
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

    def allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """The system provides only the pages that are accessed."""
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)
