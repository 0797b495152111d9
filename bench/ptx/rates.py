"""Peak rates of GPUs, and the lower bounds on a launch's time that follow.

The rates of a multiprocessor (SM) are warp instructions or bytes a clock. NVIDIA, "CUDA C++ Programming Guide", table
"Throughput of Native Arithmetic Instructions" (results a clock of an SM, divided by 32 lanes). Tensor rates, clocks,
SMs and memory bandwidths: the architecture whitepapers "NVIDIA A100 Tensor Core GPU" (2020), "NVIDIA H100 Tensor Core
GPU" (2022), "NVIDIA Ada GPU Architecture" (2022) and "NVIDIA Blackwell Architecture Technical Brief" (2024), dense,
at boost clock. Shared memory: 128 bytes a clock, a wavefront.
"""

from __future__ import annotations

from typing import NamedTuple

from .machine.counts import Counts


class Gpu(NamedTuple):
    name: str
    sms: int
    clock: float  # GHz, boost
    issue: float  # warp instructions a clock of an SM
    fma: float
    alu: float
    special: float
    memory: float  # load and store instructions of 32 lanes
    tensor: dict[str, float]  # dense TFLOP/s of the chip, by the type of the factors
    bandwidth: float  # GB/s


# By architecture. sm_100 is for readers of the compiled report: the machine does not execute it.
GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 108, 1.41, 4, 2, 2, 0.5, 1,
                 {"f16": 312, "bf16": 312, "tf32": 156, "f64": 19.5, "s8": 624, "u8": 624}, 2039),
    "sm_89": Gpu("RTX 4090", 128, 2.52, 4, 4, 2, 0.5, 1,
                 {"f16": 165.2, "bf16": 165.2, "tf32": 82.6, "e4m3": 330.3, "e5m2": 330.3, "s8": 660.6, "u8": 660.6},
                 1008),
    "sm_90": Gpu("H100 SXM", 132, 1.83, 4, 4, 2, 0.5, 1,
                 {"f16": 989.4, "bf16": 989.4, "tf32": 494.7, "f64": 66.9, "e4m3": 1978.9, "e5m2": 1978.9, "s8": 1978.9,
                  "u8": 1978.9}, 3350),
    "sm_100": Gpu("B200", 148, 1.85, 4, 4, 2, 0.5, 1,
                  {"f16": 2250, "bf16": 2250, "tf32": 1120, "f64": 37, "e4m3": 4500, "e5m2": 4500, "s8": 4500,
                   "u8": 4500}, 8000),
}  # fmt: skip
# Architectures of the same family, whose rates are used.
SAME_RATES = {"sm_86": "sm_89", "sm_87": "sm_80"}


class Bound(NamedTuple):
    """A lower bound: of which resource, for how much work, in microseconds."""

    name: str
    work: str
    microseconds: float


def compute_bounds(counts: Counts, architecture: str, blocks: int) -> list[Bound]:
    """The lower bounds on the time of a launch by each resource, the longest first.

    Work inside an SM is that of the fullest one if the blocks are distributed evenly: a launch of one block cannot use
    two. Memory: the bytes that must move at least once. Latencies are not modelled: a real launch takes longer. The
    instructions are those of PTX, from which the assembler makes fewer or more; moves, which it mostly removes, do not
    count.
    """
    gpu = find_gpu(architecture)
    share = -(-blocks // gpu.sms) / max(blocks, 1)  # of all work, on the fullest SM
    clock = gpu.clock * 1e3  # clocks in a microsecond
    pipes = counts.sum_by_pipe()
    issued = counts.total("issued") - pipes["move"]
    found = [Bound("issue", f"{issued:,} warp instructions", issued * share / gpu.issue / clock)]
    for name in ("fma", "alu", "special", "memory"):
        found.append(
            Bound(name, f"{pipes[name]:,} warp instructions", pipes[name] * share / getattr(gpu, name) / clock)
        )
    wavefronts = counts.total("shared_wavefronts")
    found.append(Bound("shared memory", f"{wavefronts:,} wavefronts", wavefronts * share / clock))
    time, flops = 0.0, 0
    for instruction, done in zip(counts.instructions, counts.flops.tolist(), strict=True):
        if done:
            rate = find_tensor_rate(gpu, instruction.parts)
            time += done * share * gpu.sms / (rate * 1e6)
            flops += done
    found.append(Bound("tensor cores", f"{flops:,} FLOP", time))
    moved = counts.read_bytes + counts.written_bytes
    found.append(Bound("DRAM", f"{moved:,} bytes", moved / (gpu.bandwidth * 1e3)))
    return sorted(found, key=lambda bound: -bound.microseconds)


def find_gpu(architecture: str) -> Gpu:
    return GPUS[SAME_RATES.get(architecture, architecture)]


def find_tensor_rate(gpu: Gpu, parts: tuple[str, ...]) -> float:
    """TFLOP/s for the type of A: the third last part of mma's name, the second last of wgmma's."""
    kind = parts[-3] if parts[0] == "mma" else parts[-2]
    return gpu.tensor.get(kind, gpu.tensor["f16"])
