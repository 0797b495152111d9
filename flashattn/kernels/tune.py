"""The search for tiles: the neighbours of a row of `configs.py` that fit and do not spill, timed against the row. For
the warp-specialised kernels of Hopper the candidates are rows of `configs.py` too.

Under FLASHATTN_AUTOTUNE=1 the first call of a kind on a GPU searches, for each of its passes, on its own tensors, and
the process remembers the choice; nothing is written to disk. A kind is a pass, the dtype, the head dimensions and the
features (`make_kind`), not the lengths: make that first call at lengths that matter. A search takes a minute or two for
each pass, most of it compiling. Bits depend on the tiles, so they may differ from those of a process that chose others.
There is no search while a CUDA graph is captured, in Triton's interpreter or on the PTX machine.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from ..score import Score
from . import configs
from .configs import Roles, TileConfig
from .precision import choose_input_precision

if TYPE_CHECKING:
    from ..protocol import Tangents

ENABLED = os.environ.get("FLASHATTN_AUTOTUNE") == "1" and not triton.knobs.runtime.interpret
SMALLEST, LARGEST = 16, 256  # of a side of a tile
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
ROUNDS, CALLS = 9, 4  # of a candidate: rounds, in each of which every candidate has a turn, and calls of a turn
HELD_BACK = 2_000_000  # clocks that the GPU waits, so that all calls of a turn are queued when the first one starts
SAME = 8  # units in the last place by which elements of two correct results may differ
SUMMED = 2.0**-20  # the unit if that of the dtype is finer: sums of thousands of terms in float32 keep 20 bits


Row = TileConfig | Roles  # of configs.py


class Times(NamedTuple):
    """Seconds of a call."""

    median: float
    low: float  # quartiles
    high: float


class Found(NamedTuple):
    """The result of a search."""

    best: Row
    times: dict[Row, Times]  # of all candidates that were timed, the row first
    refused: dict[Row, str]  # why the others were not


# --------------------------------------------------------------------------------------------- candidates


def list_neighbours(row: TileConfig) -> list[TileConfig]:
    """Tiles that differ from `row` in one or two of: block_m or block_n halved or doubled, other warps, other stages.
    Those that differ least come first.

    >>> [tiles[:2] for tiles in list_neighbours(TileConfig(16, 256, 4, 1)) if tiles[2:] == (4, 1)]
    [(16, 128), (32, 256), (32, 128)]
    """
    around = [
        TileConfig(m, n, warps, stages)
        for m in (row.block_m, row.block_m // 2, row.block_m * 2)
        for n in (row.block_n, row.block_n // 2, row.block_n * 2)
        for warps in (row.warps, *WARPS)
        for stages in STAGES
        if min(m, n) >= SMALLEST and max(m, n) <= LARGEST
    ]
    changes = {tiles: sum(a != b for a, b in zip(tiles, row, strict=True)) for tiles in around}
    return sorted((tiles for tiles, n in changes.items() if 1 <= n <= 2), key=changes.__getitem__)


@contextlib.contextmanager
def compile_only(note: Callable[[CompiledKernel], object]) -> Iterator[None]:
    """Within the block every Triton launch of this thread compiles and is noted, but not run."""
    launch, thread = JITFunction.run, threading.get_ident()

    def compile_kernel(self, *args, grid, warmup, **kwargs):
        if threading.get_ident() != thread:
            return launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        note(kernel)
        return kernel

    JITFunction.run = compile_kernel
    try:
        yield
    finally:
        JITFunction.run = launch


def compile_call(call: Callable[[], object]) -> list[CompiledKernel]:
    """The kernels that a call launches."""
    kernels: list[CompiledKernel] = []
    with compile_only(kernels.append):
        call()
    return kernels


def rejection_reason(kernel: CompiledKernel) -> str | None:
    """Why a compiled kernel is not worth a launch; None if it is. Loading it launches nothing, but makes Triton check
    its metadata against the card's limits, and the driver report its spills."""
    try:
        kernel._init_handles()
    except OutOfResources as error:
        return f"{error.required:,} of {error.name}, of which there are {error.limit:,}"
    return f"{kernel.n_spills} registers spilled" if kernel.n_spills else None


# --------------------------------------------------------------------------------------------- search


def search(
    row: Row,
    candidates: Iterable[Row],
    refusal: Callable[[Row], str | None],
    measure: Callable[[list[Row]], dict[Row, Times]],
) -> Found:
    """Time the row and the candidates that are not refused. The candidate with the least median wins if its upper
    quartile is below the row's lower one, else the row."""
    reasons = {tiles: refusal(tiles) for tiles in candidates}
    times = measure([row, *(tiles for tiles, reason in reasons.items() if reason is None)])
    best = min(times, key=lambda tiles: times[tiles].median)
    if times[best].high >= times[row].low:
        best = row
    return Found(best, times, {tiles: reason for tiles, reason in reasons.items() if reason is not None})


_forced: ContextVar[dict[str, Row]] = ContextVar("forced", default={})  # noqa: B039  (nothing changes it in place)


@contextlib.contextmanager
def force_tiles(direction: str, tiles: Row) -> Iterator[None]:
    """Within the block, in this thread, launches of this pass use these tiles."""
    token = _forced.set({**_forced.get(), direction: tiles})
    try:
        yield
    finally:
        _forced.reset(token)


def search_call(
    call: Callable[[], tuple[Tensor | None, ...]], direction: str, row: Row, candidates: Sequence[Row], expected: tuple
) -> Found:
    """The best tiles of one pass of a call, whose results with the row are `expected`."""

    def with_tiles(tiles: Row) -> Callable[[], tuple[Tensor | None, ...]]:
        def run():
            with force_tiles(direction, tiles):
                return call()

        return run

    known = {kernel.hash for kernel in compile_call(with_tiles(row))}

    def refusal(tiles: Row) -> str | None:
        run = with_tiles(tiles)
        try:
            kernels = {kernel.hash: kernel for kernel in compile_call(run)}
            new = [kernel for hash, kernel in kernels.items() if hash not in known]
            known.update(kernels)
            reasons = [rejection_reason(kernel) for kernel in new] or ["compiles to a kernel that was there already"]
            return next(filter(None, reasons), None) or (None if is_same(run(), expected) else "another result")
        except Exception as error:  # Triton raises whatever its passes raise; a search must not fail the call
            return f"{type(error).__name__}: {error}"

    return search(row, candidates, refusal, lambda found: measure({tiles: with_tiles(tiles) for tiles in found}))


def is_same(results: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> bool:
    """Whether two results differ only by rounding, in every element: of itself and of the tensor's root mean square,
    since a tile left out or read too early is off by as much. Infinities must be in the same places; NaN is wrong."""
    pairs = zip(results, expected, strict=True)
    return all(y is None or (x is not None and is_close(x, y)) for x, y in pairs)


def is_close(x: Tensor, y: Tensor) -> bool:
    finite = y.nan_to_num(posinf=0.0, neginf=0.0)
    root_mean_square = torch.linalg.vector_norm(finite, dtype=torch.float32) / max(1, y.numel()) ** 0.5
    allowed = SAME * max(torch.finfo(y.dtype).eps, SUMMED) * (finite.abs() + root_mean_square.to(y.dtype))
    return bool(((x == y) | ((x - y).abs() <= allowed)).all())


def measure(calls: dict[Row, Callable[[], object]]) -> dict[Row, Times]:
    """Calls on the current GPU in turn, by CUDA events."""
    turns: dict[Row, list] = {tiles: [] for tiles in calls}
    for _ in range(ROUNDS):
        for tiles, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HELD_BACK)
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            turns[tiles].append((start, end))
    torch.cuda.synchronize()
    return {
        tiles: compute_quartiles([start.elapsed_time(end) / CALLS / 1e3 for start, end in events])
        for tiles, events in turns.items()
    }


def compute_quartiles(seconds: list[float]) -> Times:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Times(median, low, high)


# --------------------------------------------------------------------------------------------- calls


class Unknown(NamedTuple):
    """A kind without a choice: its row, and the candidates."""

    row: Row
    candidates: Sequence[Row]


_chosen: dict[tuple, Row] = {}  # by kind
_unknown: ContextVar[dict[tuple, Unknown] | None] = ContextVar("unknown", default=None)  # kinds in the current call
_searching = threading.Lock()  # one search at a time: others would share the GPU with it


@overload
def choose_row(
    direction: str, q: Tensor, v: Tensor, score: Score, row: TileConfig, tangents: Tangents | None = None
) -> TileConfig: ...
@overload
def choose_row(direction: str, q: Tensor, v: Tensor, score: Score, row: Roles) -> Row: ...
def choose_row(direction: str, q: Tensor, v: Tensor, score: Score, row: Row, tangents: Tangents | None = None) -> Row:
    """The row for a pass: forced by a search, or chosen by one, else that of the table. A forced TileConfig selects the
    plain kernel; where the plain kernel runs anyway, a forced row of HOPPER is ignored."""
    found = _forced.get().get(direction)
    if found is not None:
        return row if isinstance(found, Roles) and isinstance(row, TileConfig) else found
    if not ENABLED:
        return row
    kind, unknown = (*make_kind(direction, q, v, score, tangents), type(row)), _unknown.get()
    if unknown is not None and kind not in _chosen:
        unknown[kind] = Unknown(row, list_candidates(direction, max(q.shape[-1], v.shape[-1]), row))
    return _chosen.get(kind, row)


def list_candidates(direction: str, head_dim: int, row: Row) -> Sequence[Row]:
    """The rows to time against a row."""
    if isinstance(row, TileConfig):
        return list_neighbours(row)
    has_changes = row != configs.choose_hopper_roles(direction, head_dim, False)
    return configs.list_hopper_candidates(direction, head_dim, has_changes)


def make_kind(direction: str, q: Tensor, v: Tensor, score: Score, tangents: Tangents | None = None) -> tuple:
    """The key by which calls share tiles: everything that the kernel is compiled for, so that tiles that fit one call
    fit all."""
    *fields, score_mod, block_mask = score
    blocks = block_mask and (block_mask.mask.graph, block_mask.block_q, block_mask.block_k)
    features = tuple(describe_operand(x) for x in (*fields, *(score_mod.captured if score_mod else ())))
    mod = score_mod and score_mod.graph
    if tangents is not None:
        *inputs, captured = tangents
        features += tuple(describe_operand(x) for x in (*inputs, *captured))
    dtype = q.dtype, choose_input_precision(q, v, tangents is not None)
    return direction, q.device, dtype, q.shape[-1], v.shape[-1], score.dropout_p > 0, features, mod, blocks


def describe_operand(x) -> tuple | bool:
    """A tensor's dtype and broadcast dimensions; for a number, whether it is given."""
    return (x.dtype, *(size == 1 for size in x.shape)) if isinstance(x, Tensor) else x is not None


def call(verb: Callable, *args):
    """verb(*args) on the current GPU, after a search for each of its passes whose kind is new."""
    if not ENABLED or _unknown.get() is not None or torch.cuda.is_current_stream_capturing():
        return verb(*args)
    unknown: dict[tuple, Unknown] = {}
    token = _unknown.set(unknown)
    try:
        results = verb(*args)
        with _searching:
            for kind, (row, others) in unknown.items():
                _chosen[kind] = row  # remains if memory does not suffice for a search
                with contextlib.suppress(torch.OutOfMemoryError):
                    _chosen[kind] = search_call(lambda: verb(*args), kind[0], row, others, results).best
    finally:
        _unknown.reset(token)
    return verb(*args) if unknown else results
