"""The parts, in the order they run: the most valuable first.

A part is a module with `run(context)`, a generator of dicts for results.jsonl, and `summarise(rows)`, its lines in the
summary. In a row `case` names the measurement, and `correct` False makes the run fail. The kernels of parts with
`list_cases(rehearse)` and `make_comparison(context, case)` (compare.py) are compiled beforehand.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    name: str
    # Of the budget, relative to the other parts: about its seconds on an H200. The last three get the rest.
    share: float
    help: str
    module: str = ""  # default: the module of this package with the same name

    @property
    def path(self) -> str:
        return self.module or f"{__package__}.{self.name}"


PARTS = {
    part.name: part
    for part in (
        Part("ceilings", 6, "the card's peak: a large bf16 product, a large copy, an empty launch"),
        Part("precompile", 20, "compiles the kernels of the parts below, on all cores (always runs before them)"),
        Part("check", 105, "the tests of pytest -m gpu, on all cores; a row for each test"),
        Part("attention", 72, "forward and backward in TFLOP/s, against SDPA's backends, FlexAttention, flash_attn"),
        Part("decode", 9, "one new token against a cache, contiguous and paged, in GB/s"),
        Part("varlen", 3, "packed sequences of different lengths, forward and backward, in TFLOP/s"),
        Part("norms", 9, "LayerNorm and RMSNorm, forward and backward, in GB/s, against PyTorch's, eager and compiled"),
        Part("features", 19, "the cost of each feature of attention relative to a call without features"),
        Part("host", 7, "microseconds of overhead before a kernel starts, eager and in a CUDA graph"),
        Part("tune", 4, "searches tile sizes next to those in configs.py, most promising first"),
        Part("counters", 2, "Nsight Compute's counters compared with the PTX machine's"),
        Part("profile", 1, "a trace of a training step of a small Llama, and the kernels' shares of its time"),
    )
}
# Parts whose kernels are compiled beforehand.
PRECOMPILED = ("attention", "decode", "varlen", "norms", "features", "host")


def choose(only: list[str] | None) -> list[Part]:
    """The named parts, in their order; all if none is named. "precompile" is added where it is needed."""
    names = set(only or PARTS)
    if names & set(PRECOMPILED):
        names.add("precompile")
    return [part for name, part in PARTS.items() if name in names]
