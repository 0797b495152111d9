"""The table of parts, in the order they run: most worth first.

A part is a module with `rows(context)`, a generator of dicts for results.jsonl, and `summary(rows)`, its lines in the
table at the end. In a row `case` names what was measured, and `correct` False makes the run fail. What also has
`cases(rehearse)` and `comparison(context, case)` (compare.py) is compiled beforehand.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    name: str
    # Of the budget, beside the other chosen parts': about the seconds it takes on an H200. The last three get the rest.
    share: float
    help: str
    module: str = ""  # with `rows(context)`; this package's of the same name by default

    @property
    def path(self) -> str:
        return self.module or f"{__package__}.{self.name}"


PARTS = {
    part.name: part
    for part in (
        Part("ceilings", 6, "what this card does at most: a large bf16 product, a large copy, an empty launch"),
        Part("precompile", 20, "compiles what the chosen parts below launch, on all cores (always runs before them)"),
        Part("check", 105, "what pytest -m gpu runs, on all cores; a row for each test"),
        Part("attention", 72, "forward and backward in TFLOP/s, against SDPA's backends, FlexAttention, flash_attn"),
        Part("decode", 9, "one new token against a cache, contiguous and in pages, in GB/s"),
        Part("varlen", 3, "packed sequences of different lengths, forward and backward, in TFLOP/s"),
        Part("norms", 9, "LayerNorm and RMSNorm, forward and backward, in GB/s, against PyTorch's and compiled ones"),
        Part("features", 19, "what each feature of attention costs on top of the plain call"),
        Part("host", 7, "microseconds a call takes before its kernel starts, eager and in a CUDA graph"),
        Part("tune", 4, "neighbours of the tile sizes in configs.py, best first"),
        Part("counters", 2, "what Nsight Compute counts beside what the PTX machine counts"),
        Part("profile", 1, "a trace of one training step of a small Llama, and the kernels' share of it"),
    )
}
# Parts whose launches are compiled beforehand.
PRECOMPILED = ("attention", "decode", "varlen", "norms", "features", "host")


def choose(only: list[str] | None) -> list[Part]:
    """The parts to run, in the table's order; none named: all. What is compiled beforehand is compiled for them."""
    names = set(only or PARTS)
    if names & set(PRECOMPILED):
        names.add("precompile")
    return [part for name, part in PARTS.items() if name in names]
