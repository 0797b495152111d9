"""A pipelined matrix product, whose compiled PTX the tests change."""

import re

import torch
import triton.language as tl

from bench import ptx
from bench.ptx.driver import run_text
from bench.ptx.faults import Judge
from bench.ptx.frontend.parse import parse
from bench.ptx.frontend.program import Program
from tests.ptx import kernels

TILES = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)


def compile_matmul(architecture: str) -> tuple[str, int]:
    """(PTX, bytes of shared memory) of the pipelined matrix product."""
    with ptx.device(architecture):
        a = torch.zeros(64, 128, dtype=torch.float16)
        compiled = kernels.matmul.warmup(
            a, a, a, 64, 64, 128, 128, 64, 64, **TILES, ACC=tl.float32, grid=(1,), num_warps=4
        )
        return compiled.asm["ptx"], compiled.metadata.shared


def run_matmul(text: str, shared: int, on_fault: str | dict = "raise") -> list[ptx.Fault]:
    """Runs a matrix product of depth 128, in four iterations of its loop; returns the faults noted."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 128).half(), torch.randn(128, 64).half()
    c = torch.zeros(64, 64, dtype=torch.float16)
    text = text.replace("global_smem[]", f"global_smem[{shared}]")
    judge = Judge(on_fault)
    run_text(text, a, b, c, 64, 64, 128, 128, 64, 64, 0, 0, threads=128, judge=judge)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=2e-3, atol=2e-2)
    return judge.notes


def remove_line(text: str, pattern: str, which: int) -> str:
    """The text without the line of the n-th match."""
    found = list(re.finditer(rf"^.*{pattern}.*$", text, re.M))[which]
    return text[: found.start()] + text[found.end() :]


def load_text(compiled, text: str):
    """The program of a changed PTX text for a compiled kernel."""
    module = parse(text)
    return Program(module.kernels[compiled.metadata.name], module, compiled.metadata.shared)
