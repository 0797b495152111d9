"""Whether other tiles would be faster than the rows of `configs.py`, on this card.

Of each row that serves the card the neighbours, or on Hopper the candidates that `configs.py` names, are compiled ahead
of time, in as many processes as there are cores. Those that fit in shared memory and spill nothing in a loop over whole
tiles are ordered by the issue slots of other instructions for the tensor work; the first few are checked against
float64 and timed in turn with the row.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch
from torch import Tensor

from flashattn import reference
from flashattn.backends import triton as backend
from flashattn.cache import CacheView
from flashattn.kernels import configs, tune
from flashattn.kernels.configs import Roles
from flashattn.protocol import Saved
from flashattn.score import Score

from ..compiled import Kernel, compile_for
from ..sass import find_full_tile_loops
from .card import cores
from .context import Context, first_line, poisoned, tensors_of
from .kernel_hashes import fix_hashes
from .rules import Truth, judge

TIMED = 6  # candidates of a row, besides the row
NO_TIME = "no time left"
ROW_SECONDS = 4.0  # that a row takes to check and time: none is begun with less left


class Row(NamedTuple):
    """A row of the table: a pass at a head_dim, in 16 bits."""

    direction: str
    head_dim: int


class Size(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int

    def bytes(self, head_dim: int) -> int:
        """Of q, k, v and out."""
        return 4 * self.batch * head_dim * (self.heads * self.seq_q + self.kv_heads * self.seq_k)


class Static(NamedTuple):
    """What the compiler made of a candidate."""

    tiles: tune.Row
    registers: int = 0
    shared_bytes: int = 0
    slots: float | None = None  # issue slots of other instructions for 1,024 tensor FLOPs of a warp; None: not known
    refused: str | None = None


# The most used first: whoever has little time gets those.
ROWS = [
    *(Row(direction, head_dim) for head_dim in (128, 64, 256) for direction in configs.ATTENTION),
    *(Row("decode", head_dim) for head_dim in (128, 256)),
]
REHEARSED = [Row("forward", 64), Row("backward_kv", 64), Row("decode", 128)]
KERNELS = {
    "forward": "attention_forward", "backward_q": "attention_backward_q", "backward_kv": "attention_backward_kv",
    "decode": "attention_decode",
}  # fmt: skip


def sizes(row: Row, rehearse: bool) -> tuple[Size, Size]:
    """(checked, timed). Timed: 16,384 tokens of hidden size 2,048; a token of each of 64 sequences of 4,096."""
    if rehearse:
        tokens = smallest_side(tiles_of(row)) + 2  # more than a tile
        size = Size(1, 2, 1, 1 if row.direction == "decode" else tokens, tokens)
        return size, size
    if row.direction == "decode":
        return Size(2, 8, 2, 1, 600), Size(64, 32, 8, 1, 4096)
    heads = 2048 // row.head_dim
    return Size(2, 4, 2, 300, 300), Size(4, heads, heads, 4096, 4096)


def rows(context: Context) -> Iterator[dict]:
    """One for each row of the table, as far as the time goes."""
    searched = REHEARSED if context.rehearse else ROWS
    context.plan(len(searched))
    if context.remaining() < ROW_SECONDS:
        yield from ({"case": name_of(row), "skipped": NO_TIME} for row in searched)
        return
    most = 2 if context.rehearse else None
    candidates = {row: [tiles, *tune.candidates(*row, tiles)][:most] for row in searched for tiles in [tiles_of(row)]}
    with Compilers(1 if context.rehearse else cores(), candidates) as compilers:
        for row in searched:
            yield {
                "case": name_of(row), "pass": row.direction, "head_dim": row.head_dim,
                "dtype": "bfloat16", "row": text(tiles_of(row)), **result_of(context, row, compilers),
            }  # fmt: skip


def result_of(context: Context, row: Row, compilers: Compilers) -> dict:
    if context.remaining() < ROW_SECONDS:
        return {"skipped": NO_TIME}
    compiled = compilers.wait(row, context.remaining() - ROW_SECONDS)
    return compiled if isinstance(compiled, dict) else search_row(context, row, compiled)


def name_of(row: Row) -> str:
    return f"{row.direction} at head_dim {row.head_dim}"


def tiles_of(row: Row) -> tune.Row:
    if configs.architecture() == "sm_90" and row.direction in configs.HOPPER:
        roles = configs.hopper_roles(row.direction, row.head_dim, changed=False)
        if roles is not None:
            return roles
    return configs.attention_tiles(row.direction, (row.head_dim, row.head_dim), 2)


def smallest_side(tiles: tune.Row) -> int:
    return min(tiles.owned, tiles.block) if isinstance(tiles, Roles) else min(tiles.block_m, tiles.block_n)


def text(tiles: tune.Row) -> str:
    if isinstance(tiles, Roles):
        ways = [", in turns"] * tiles.pingpong + [", persistent"] * tiles.persistent
        return f"{tiles.consumers} consumers, tiles of {tiles.block}, {tiles.stages} stages{''.join(ways)}"
    return f"{tiles.block_m}x{tiles.block_n}, {tiles.warps} warps, {tiles.stages} stages"


def search_row(context: Context, row: Row, compiled: list[Static]) -> dict:
    """Check and time the most promising of those that fit."""
    small, large = sizes(row, context.rehearse)
    right = checker(row, calls(row, small, context.device))
    if reason := right(tiles_of(row)):
        return {"correct": False, "failed": f"the row itself: {reason}"}
    ranked = sorted((static for static in compiled if static.refused is None), key=promise)
    run = calls(row, large, context.device)(backend, torch.bfloat16)
    candidates = [static.tiles for static in ranked if static.tiles != tiles_of(row)][:TIMED]
    changed: set[str] = set()  # what gave another result after the timing

    def measure(found: list[tune.Row]) -> dict[tune.Row, tune.Times]:
        named = {text(tiles): with_tiles(row, tiles, run) for tiles in found}
        expected = named[text(tiles_of(row))]()

        def check(name: str, results: tuple) -> None:
            if not tune.is_same(results, expected):
                changed.add(name)

        times = context.measure(named, large.bytes(row.head_dim), after=check)
        return {tiles: times[text(tiles)] for tiles in found if text(tiles) not in changed or tiles == tiles_of(row)}

    found = tune.search(tiles_of(row), candidates, right, measure)
    return report(row, found, compiled, changed)


def promise(static: Static) -> tuple[bool, float]:
    """Least first. A loop that is not pipelined issues least of all, and waits most: those come last."""
    return static.tiles.stages == 1, float("inf") if static.slots is None else static.slots


def report(row: Row, found: tune.Found, compiled: list[Static], changed: set[str]) -> dict:
    """A result as JSON takes it. gain: the row's median over the best one's."""
    before, after = found.times[tiles_of(row)], found.times[found.best]
    refused = {text(static.tiles): static.refused for static in compiled if static.refused}
    refused |= dict.fromkeys(changed, "another result after the timing")
    return {
        "correct": text(tiles_of(row)) not in changed, "best": text(found.best), "changes": found.best != tiles_of(row),
        "gain": before.median / after.median,
        "seconds": {text(tiles): [x.median, x.low, x.high] for tiles, x in found.times.items()},
        "slots": {text(static.tiles): static.slots for static in compiled if not static.refused},
        "refused": refused | {text(tiles): reason for tiles, reason in found.refused.items()},
    }  # fmt: skip


def summary(results: list[dict]) -> list[str]:
    """The rows that would change come first."""
    searched = sum("best" in result for result in results)
    changed = sum(result.get("changes", False) for result in results)
    late = sum("skipped" in result for result in results)
    ordered = sorted((r for r in results if "skipped" not in r), key=lambda result: not result.get("changes", False))
    title = f"{searched} rows of configs.py searched, {changed} would change; median (quartiles)"
    return [title, *(line(result) for result in ordered), *([f"{late} rows: {NO_TIME}"] if late else [])]


def line(result: dict) -> str:
    if "best" not in result:
        return f"{result['case']}: {result.get('failed')}"
    counts = f"{len(result['seconds']) - 1} timed, {len(result['refused'])} refused"
    if not result["changes"]:
        return f"{result['case']}: {result['row']} stays ({counts})"
    before, after = (microseconds(result["seconds"][result[name]]) for name in ("row", "best"))
    return (
        f"{result['case']}: {result['row']} -> {result['best']}: {result['gain']:.2f}x, {before} -> {after} ({counts})"
    )


def microseconds(seconds: list[float]) -> str:
    median, low, high = (x * 1e6 for x in seconds)
    return f"{median:.1f} us ({low:.1f} to {high:.1f})"


# --------------------------------------------------------------------------------------------- calls


def calls(row: Row, size: Size, device: torch.device) -> Callable[..., Callable[[], tuple]]:
    """Makes, of the verbs of a backend and a dtype, the call whose pass this is, causal, on the same random numbers."""
    generator = torch.Generator(device).manual_seed(0)

    def heads(count: int, seq: int) -> Tensor:
        shape = size.batch, count, seq, row.head_dim
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    tensors = [heads(*of) for of in [(size.heads, size.seq_q)] * 2 + [(size.kv_heads, size.seq_k)] * 2]
    score = Score(row.head_dim**-0.5, right=0)

    def make(verbs, dtype: torch.dtype) -> Callable[[], tuple]:
        q, grad_out, k, v = (x.to(dtype) for x in tensors)
        if row.direction == "decode":
            lengths = torch.full((size.batch,), size.seq_k, dtype=torch.int32, device=device)
            cached = CacheView(k, v, None, lengths - 1, lengths, size.seq_k)
            return lambda: verbs.decode(q, cached, score._replace(kv_lengths=lengths))
        if row.direction == "forward":
            return lambda: verbs.forward(q, k, v, score)[:2]  # the third is what rounding took from the second
        out, lse, rest = verbs.forward(q, k, v, score)
        return lambda: verbs.backward(grad_out, None, Saved(q, k, v, out, lse, rest), score, False, [])

    return make


def with_tiles(row: Row, tiles: tune.Row, run: Callable[[], tuple]) -> Callable[[], tuple]:
    def call():
        with tune.forced(row.direction, tiles):
            return run()

    return call


def checker(row: Row, make: Callable[..., Callable[[], tuple]]) -> Callable[[tune.Row], str | None]:
    """Says what is wrong with the result that tiles give, by the error rule; None if nothing."""
    truth = Truth(*(tensors_of(make(reference, dtype)()) for dtype in (torch.float64, torch.bfloat16)))
    run = make(backend, torch.bfloat16)

    def check(tiles: tune.Row) -> str | None:
        try:
            with poisoned():
                results = tensors_of(with_tiles(row, tiles, run)())
        except Exception as error:  # of the compiler, the driver or the PTX machine
            return first_line(error)
        verdict = judge(results, truth)
        return None if verdict.correct else f"WRONG: error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"

    return check


# --------------------------------------------------------------------------------------------- compiling


class Compilers:
    """Processes that compile the candidates of all rows, in the order of the rows."""

    def __init__(self, processes: int, candidates: dict[Row, list[tune.Row]]):
        self.processes, self.candidates, self.architecture = processes, candidates, configs.architecture()

    def __enter__(self) -> Compilers:
        self.start(self.candidates)
        return self

    def start(self, candidates: dict[Row, list[tune.Row]]) -> None:
        # Not forked: a process with a CUDA context and threads cannot be.
        self.pool = ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn"))
        self.jobs: dict[Row, list[Future]] = {
            row: [self.pool.submit(compile_candidate, self.architecture, row, each) for each in tiles]
            for row, tiles in candidates.items()
        }

    def wait(self, row: Row, seconds: float) -> list[Static] | dict:
        """What is compiled of a row's candidates by then, or why there is nothing."""
        jobs = self.jobs.pop(row)
        done, late = wait(jobs, seconds)
        for job in late:
            job.cancel()
        try:
            return [job.result() for job in jobs if job in done]
        except BrokenProcessPool:  # the compiler took its process down with it: the other rows get new ones
            self.pool.shutdown(cancel_futures=True)
            self.start({other: self.candidates[other] for other in self.jobs})
            return {"failed": "the compiler crashed on a candidate"}

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)


def compile_candidate(architecture: str, row: Row, tiles: tune.Row) -> Static:
    """Compile one pass with these tiles, and leave it in Triton's cache."""
    torch.set_num_threads(1)
    fix_hashes()
    run = calls(row, sizes(row, rehearse=False)[0], torch.device("cpu"))
    try:
        with compile_for(architecture) as kernels, tune.forced(row.direction, tiles):
            run(backend, torch.bfloat16)()
    except Exception as error:  # Triton raises what its passes raise
        return Static(tiles, refused=f"does not compile: {first_line(error)}")
    name = KERNELS[row.direction] + ("_hopper" if isinstance(tiles, Roles) else "")
    return inspect(tiles, next(kernel for kernel in kernels if kernel.name == name))


def inspect(tiles: tune.Row, kernel: Kernel) -> Static:
    """A compiled candidate, with its loops of tensor instructions over whole tiles."""
    loops = find_full_tile_loops(kernel.code) if kernel.architecture.startswith("sm_") else []
    local = sum(loop.mix.get("local", 0) for loop in loops) if loops else kernel.spills
    limit = configs.SHARED_MEMORY[kernel.architecture]
    refused = None
    if kernel.shared_bytes > limit:
        refused = f"{kernel.shared_bytes:,} bytes of shared memory, of which there are {limit:,}"
    elif local:
        refused = f"{local} accesses to local memory in its loops"
    slots = min((loop.overhead for loop in loops if loop.overhead is not None), default=None)
    return Static(tiles, kernel.registers, kernel.shared_bytes, slots, refused)
