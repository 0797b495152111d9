"""Part "tune": searches for tiles that are faster on this card than the rows of `configs.py`.

For each row that the card uses, the neighbours, or on Hopper the candidates that `configs.py` lists, are compiled ahead
of time, in one process per core. Those that fit in shared memory and do not spill in a loop over full tiles are ordered
by the issue slots of other instructions per tensor FLOP; the first few are checked against float64 and timed in turns
with the row.
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
from .card import count_cores
from .context import Context, describe_error, list_tensors, poison_memory
from .kernel_hashes import fix_hashes
from .verdicts import Truth, judge

MAX_TIMED = 6  # candidates of a row, besides the row
NO_TIME = "no time left"
ROW_SECONDS = 4.0  # to check and time a row: none is started with less time left


class Row(NamedTuple):
    """A row of `configs.py`: a pass at a head_dim, in 16 bits."""

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


class Candidate(NamedTuple):
    """A compiled candidate, or why it is refused."""

    tiles: tune.Row
    registers: int = 0
    shared_bytes: int = 0
    slots: float | None = None  # issue slots of other instructions per 1,024 tensor FLOPs of a warp; None: unknown
    refused: str | None = None


# The most used first, for small budgets.
ROWS = [
    *(Row(direction, head_dim) for head_dim in (128, 64, 256) for direction in configs.ATTENTION),
    *(Row("decode", head_dim) for head_dim in (128, 256)),
]
REHEARSAL_ROWS = [Row("forward", 64), Row("backward_kv", 64), Row("decode", 128)]
KERNELS = {
    "forward": "attention_forward", "backward_q": "attention_backward_q", "backward_kv": "attention_backward_kv",
    "decode": "attention_decode",
}  # fmt: skip


def choose_sizes(row: Row, rehearse: bool) -> tuple[Size, Size]:
    """(checked, timed). Timed: 16,384 tokens of hidden size 2,048; a token of each of 64 sequences of 4,096."""
    if rehearse:
        tokens = find_min_side(find_tiles(row)) + 2  # more than a tile
        size = Size(1, 2, 1, 1 if row.direction == "decode" else tokens, tokens)
        return size, size
    if row.direction == "decode":
        return Size(2, 8, 2, 1, 600), Size(64, 32, 8, 1, 4096)
    heads = 2048 // row.head_dim
    return Size(2, 4, 2, 300, 300), Size(4, heads, heads, 4096, 4096)


def run(context: Context) -> Iterator[dict]:
    """A result for each row of `configs.py` until the time is up."""
    searched = REHEARSAL_ROWS if context.rehearse else ROWS
    context.plan(len(searched))
    if context.seconds_left() < ROW_SECONDS:
        yield from ({"case": name_row(row), "skipped": NO_TIME} for row in searched)
        return
    most = 2 if context.rehearse else None
    candidates = {
        row: [tiles, *tune.list_candidates(*row, tiles)][:most] for row in searched for tiles in [find_tiles(row)]
    }
    with CompilerPool(1 if context.rehearse else count_cores(), candidates) as compilers:
        for row in searched:
            yield {
                "case": name_row(row), "pass": row.direction, "head_dim": row.head_dim,
                "dtype": "bfloat16", "row": describe_tiles(find_tiles(row)), **measure_row(context, row, compilers),
            }  # fmt: skip


def measure_row(context: Context, row: Row, compilers: CompilerPool) -> dict:
    if context.seconds_left() < ROW_SECONDS:
        return {"skipped": NO_TIME}
    compiled = compilers.wait(row, context.seconds_left() - ROW_SECONDS)
    return compiled if isinstance(compiled, dict) else search_row(context, row, compiled)


def name_row(row: Row) -> str:
    return f"{row.direction} at head_dim {row.head_dim}"


def find_tiles(row: Row) -> tune.Row:
    if configs.find_architecture() == "sm_90" and row.direction in configs.HOPPER:
        roles = configs.choose_hopper_roles(row.direction, row.head_dim, changes_tiles=False)
        if roles is not None:
            return roles
    return configs.choose_tiles(row.direction, (row.head_dim, row.head_dim), 2)


def find_min_side(tiles: tune.Row) -> int:
    return min(tiles.owned, tiles.block) if isinstance(tiles, Roles) else min(tiles.block_m, tiles.block_n)


def describe_tiles(tiles: tune.Row) -> str:
    if isinstance(tiles, Roles):
        ways = [", ping-pong"] * tiles.pingpong + [", persistent"] * tiles.persistent
        return f"{tiles.consumers} consumers, tiles of {tiles.block}, {tiles.stages} stages{''.join(ways)}"
    return f"{tiles.block_m}x{tiles.block_n}, {tiles.warps} warps, {tiles.stages} stages"


def search_row(context: Context, row: Row, compiled: list[Candidate]) -> dict:
    """Check and time the most promising candidates that fit."""
    small, large = choose_sizes(row, context.rehearse)
    right = make_checker(row, make_calls(row, small, context.device))
    if reason := right(find_tiles(row)):
        return {"correct": False, "failed": f"the row itself: {reason}"}
    ranked = sorted((candidate for candidate in compiled if candidate.refused is None), key=rank)
    run = make_calls(row, large, context.device)(backend, torch.bfloat16)
    candidates = [candidate.tiles for candidate in ranked if candidate.tiles != find_tiles(row)][:MAX_TIMED]
    changed: set[str] = set()  # tiles with another result after the timing

    def measure(found: list[tune.Row]) -> dict[tune.Row, tune.Times]:
        named = {describe_tiles(tiles): force_tiles(row, tiles, run) for tiles in found}
        expected = named[describe_tiles(find_tiles(row))]()

        def check(name: str, results: tuple) -> None:
            if not tune.is_same(results, expected):
                changed.add(name)

        times = context.measure(named, large.bytes(row.head_dim), after=check)
        return {
            tiles: times[describe_tiles(tiles)]
            for tiles in found
            if describe_tiles(tiles) not in changed or tiles == find_tiles(row)
        }

    found = tune.search(find_tiles(row), candidates, right, measure)
    return report(row, found, compiled, changed)


def rank(candidate: Candidate) -> tuple[bool, float]:
    """Fewest slots first. A loop that is not pipelined has the fewest and waits the longest: those come last."""
    return candidate.tiles.stages == 1, float("inf") if candidate.slots is None else candidate.slots


def report(row: Row, found: tune.Found, compiled: list[Candidate], changed: set[str]) -> dict:
    """A result for JSON. gain: the row's median / the best one's."""
    tiles = find_tiles(row)
    before, after = found.times[tiles], found.times[found.best]
    refused = {describe_tiles(candidate.tiles): candidate.refused for candidate in compiled if candidate.refused}
    refused |= dict.fromkeys(changed, "another result after the timing")
    return {
        "correct": describe_tiles(tiles) not in changed, "best": describe_tiles(found.best),
        "changes": found.best != tiles, "gain": before.median / after.median,
        "seconds": {describe_tiles(each): [x.median, x.low, x.high] for each, x in found.times.items()},
        "slots": {describe_tiles(candidate.tiles): candidate.slots for candidate in compiled if not candidate.refused},
        "refused": refused | {describe_tiles(each): reason for each, reason in found.refused.items()},
    }  # fmt: skip


def summarise(results: list[dict]) -> list[str]:
    """Rows that would change come first."""
    searched = sum("best" in result for result in results)
    changed = sum(result.get("changes", False) for result in results)
    late = sum("skipped" in result for result in results)
    ordered = sorted((r for r in results if "skipped" not in r), key=lambda result: not result.get("changes", False))
    title = f"{searched} rows of configs.py searched, {changed} would change; median (quartiles)"
    return [title, *(format_line(result) for result in ordered), *([f"{late} rows: {NO_TIME}"] if late else [])]


def format_line(result: dict) -> str:
    if "best" not in result:
        return f"{result['case']}: {result.get('failed')}"
    counts = f"{len(result['seconds']) - 1} timed, {len(result['refused'])} refused"
    if not result["changes"]:
        return f"{result['case']}: {result['row']} stays ({counts})"
    before, after = (format_us(result["seconds"][result[name]]) for name in ("row", "best"))
    return (
        f"{result['case']}: {result['row']} -> {result['best']}: {result['gain']:.2f}x, {before} -> {after} ({counts})"
    )


def format_us(seconds: list[float]) -> str:
    median, low, high = (x * 1e6 for x in seconds)
    return f"{median:.1f} us ({low:.1f} to {high:.1f})"


# --------------------------------------------------------------------------------------------- calls


def make_calls(row: Row, size: Size, device: torch.device) -> Callable[..., Callable[[], tuple]]:
    """A function that makes the causal call of this pass from a backend and a dtype, on the same random data."""
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
            return lambda: verbs.forward(q, k, v, score)[:2]  # the third is the rounding error of the second
        out, lse, rest = verbs.forward(q, k, v, score)
        return lambda: verbs.backward(grad_out, None, Saved(q, k, v, out, lse, rest), score, False, [])

    return make


def force_tiles(row: Row, tiles: tune.Row, run: Callable[[], tuple]) -> Callable[[], tuple]:
    def call():
        with tune.force_tiles(row.direction, tiles):
            return run()

    return call


def make_checker(row: Row, make: Callable[..., Callable[[], tuple]]) -> Callable[[tune.Row], str | None]:
    """A function that checks tiles by the error rule: the error, or None if the result is right."""
    truth = Truth(*(list_tensors(make(reference, dtype)()) for dtype in (torch.float64, torch.bfloat16)))
    run = make(backend, torch.bfloat16)

    def check(tiles: tune.Row) -> str | None:
        try:
            with poison_memory():
                results = list_tensors(force_tiles(row, tiles, run)())
        except Exception as error:  # of the compiler, the driver or the PTX machine
            return describe_error(error)
        verdict = judge(results, truth)
        return None if verdict.correct else f"WRONG: error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"

    return check


# --------------------------------------------------------------------------------------------- compiling


class CompilerPool:
    """Processes that compile the candidates of all rows, in order."""

    def __init__(self, processes: int, candidates: dict[Row, list[tune.Row]]):
        self.processes, self.candidates, self.architecture = processes, candidates, configs.find_architecture()

    def __enter__(self) -> CompilerPool:
        self.start(self.candidates)
        return self

    def start(self, candidates: dict[Row, list[tune.Row]]) -> None:
        # Not forked: a process with a CUDA context and threads cannot be.
        self.pool = ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn"))
        self.jobs: dict[Row, list[Future]] = {
            row: [self.pool.submit(compile_candidate, self.architecture, row, each) for each in tiles]
            for row, tiles in candidates.items()
        }

    def wait(self, row: Row, seconds: float) -> list[Candidate] | dict:
        """A row's candidates that are compiled by then, or a result that says why there are none."""
        jobs = self.jobs.pop(row)
        done, late = wait(jobs, seconds)
        for job in late:
            job.cancel()
        try:
            return [job.result() for job in jobs if job in done]
        except BrokenProcessPool:  # the compiler crashed: the other rows get new processes
            self.pool.shutdown(cancel_futures=True)
            self.start({other: self.candidates[other] for other in self.jobs})
            return {"failed": "the compiler crashed on a candidate"}

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)


def compile_candidate(architecture: str, row: Row, tiles: tune.Row) -> Candidate:
    """Compile one pass with these tiles, into Triton's cache."""
    torch.set_num_threads(1)
    fix_hashes()
    run = make_calls(row, choose_sizes(row, rehearse=False)[0], torch.device("cpu"))
    try:
        with compile_for(architecture) as kernels, tune.force_tiles(row.direction, tiles):
            run(backend, torch.bfloat16)()
    except Exception as error:  # Triton raises what its passes raise
        return Candidate(tiles, refused=f"does not compile: {describe_error(error)}")
    name = KERNELS[row.direction] + ("_hopper" if isinstance(tiles, Roles) else "")
    return inspect(tiles, next(kernel for kernel in kernels if kernel.name == name))


def inspect(tiles: tune.Row, kernel: Kernel) -> Candidate:
    """The candidate of a compiled kernel, by its loops over full tiles."""
    loops = find_full_tile_loops(kernel.code) if kernel.architecture.startswith("sm_") else []
    local = sum(loop.mix.get("local", 0) for loop in loops) if loops else kernel.spills
    limit = configs.SHARED_MEMORY[kernel.architecture]
    refused = None
    if kernel.shared_bytes > limit:
        refused = f"{kernel.shared_bytes:,} bytes of shared memory, over the limit of {limit:,}"
    elif local:
        refused = f"{local} accesses to local memory in its loops"
    slots = min((loop.overhead for loop in loops if loop.overhead is not None), default=None)
    return Candidate(tiles, kernel.registers, kernel.shared_bytes, slots, refused)
