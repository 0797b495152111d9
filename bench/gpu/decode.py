"""Part "decode": one new token of each sequence against a cache, 32 query heads on 8 key heads of 128: the kernels
alone, as in a CUDA graph. The part "host" has the overhead of a call of `flashattn.decode`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashattn.backends import BACKENDS
from flashattn.cache import CacheView
from flashattn.score import Score

from .compare import OURS, Comparison, compare_all, copy_inputs, count_bytes, cycle_calls
from .context import Call, Context
from .peers import prepare_sdpa
from .tables import COMPARED, make_grid
from .verdicts import Truth


class Case(NamedTuple):
    batch: int
    keys: int
    page: int | None  # None: a contiguous cache
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    warm: bool = False


def list_cases(rehearse: bool) -> list[Case]:
    if rehearse:
        return [Case(2, 70, page, 4, 2, 16) for page in (None, 16)]
    layouts = (None, 16, 256)
    every = [Case(batch, keys, page) for batch in (1, 8, 64) for keys in (1024, 4096, 16384, 65536) for page in layouts]
    every.sort(key=lambda case: case.batch * case.keys)
    # Batch 8 with 16k keys, then the ends of the range, then the rest.
    order = [(8, 16384), (1, 4096), (64, 4096), (1, 65536), (64, 65536), (1, 1024)]
    every.sort(key=lambda case: order.index((case.batch, case.keys)) if (case.batch, case.keys) in order else 99)
    return [*every, Case(1, 4096, None, warm=True)]


def run(context: Context) -> Iterator[dict]:
    yield from compare_all(context, list_cases(context.rehearse), make_comparison)


def summarise(rows: list[dict]) -> list[str]:
    def format_label(row: dict) -> str:
        layout = f"pages of {row['page']}" if row["page"] else "contiguous"
        return f"batch {row['batch']}, {layout}{', warm' if row['warm'] else ''}"

    return [f"GB/s by keys, {COMPARED}", *make_grid(rows, format_label, "keys")]


def make_comparison(context: Context, case: Case) -> Comparison:
    cache_bytes = 2 * 2 * case.batch * case.kv_heads * case.keys * case.head_dim
    copies = 1 if case.warm else context.count_copies(cache_bytes)
    context.require_memory(cache_bytes * copies)
    q, cached = make_inputs(context, case)
    sets = [[q, cached.k, cached.v]] if case.warm else copy_inputs(context, [q, cached.k, cached.v], cache_bytes)
    score = Score(case.head_dim**-0.5, right=0, kv_lengths=cached.lengths)

    def ours() -> Call:
        return cycle_calls([make_call(q, cached._replace(k=k, v=v), score) for q, k, v in sets])

    def peer(name: str) -> Call:
        attend = prepare_sdpa(name, False, context.rehearse)
        return cycle_calls([lambda q=q, k=k, v=v: attend(q, k, v) for q, k, v in sets])

    variants = {OURS: ours}
    if case.page is None:
        variants |= {name: lambda name=name: peer(name) for name in ("cudnn", "flash")}
    group = case.heads // case.kv_heads
    return Comparison(
        name_case(case), {**case._asdict(), "dtype": "bfloat16"}, variants, cache_bytes,
        truth=lambda: compute_truth(case, q, cached, score), select=lambda results: [results[0][:1, :group]],
        bytes=cache_bytes + 2 * count_bytes([q]), warm=case.warm,
    )  # fmt: skip


def make_call(q: Tensor, cached: CacheView, score: Score) -> Call:
    return lambda: BACKENDS["triton"].decode(q, cached, score)


def name_case(case: Case) -> str:
    layout = "contiguous" if case.page is None else f"pages of {case.page}"
    return f"{case.batch} x {case.keys} keys, {layout}" + (", warm" if case.warm else "")


def make_inputs(context: Context, case: Case) -> tuple[Tensor, CacheView]:
    """q and a full cache, with its pages in random order."""
    q = context.randn(case.batch, case.heads, 1, case.head_dim)
    lengths = torch.full((case.batch,), case.keys, dtype=torch.int32, device=context.device)
    starts = lengths - 1
    if case.page is None:
        shape, table = (case.batch, case.kv_heads, case.keys, case.head_dim), None
    else:
        pages = math.ceil(case.keys / case.page)
        shape = (case.batch * pages, case.kv_heads, case.page, case.head_dim)
        table = torch.randperm(case.batch * pages, device=context.device).int().view(case.batch, pages)
    k, v = context.randn(*shape), context.randn(*shape)
    return q, CacheView(k, v, table, starts, lengths, case.keys)


def compute_truth(case: Case, q: Tensor, cached: CacheView, score: Score) -> Truth:
    """Of batch row 0 and its first key/value head, its pages gathered."""
    k, v = (gather_first_row(x, cached.page_table)[:, :1, : case.keys] for x in (cached.k, cached.v))
    q = q[:1, : case.heads // case.kv_heads]
    one = CacheView(k, v, None, cached.starts[:1], cached.lengths[:1], case.keys)
    score = score._replace(kv_lengths=one.lengths)
    exact, theirs = (
        BACKENDS["reference"].decode(q.to(dtype), one._replace(k=k.to(dtype), v=v.to(dtype)), score)[0]
        for dtype in (torch.float64, q.dtype)
    )
    return Truth([exact], [theirs])


def gather_first_row(x: Tensor, page_table: Tensor | None) -> Tensor:
    """(1, kv_heads, keys, head_dim) of batch row 0."""
    if page_table is None:
        return x[:1]
    return x[page_table[0].long()].transpose(0, 1).flatten(1, 2)[None]
