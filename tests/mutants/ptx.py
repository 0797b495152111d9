"""Faults of the PTX machine."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "a barrier orders no accesses",
        "bench/ptx/memory/shared_memory.py",
        "self.clocks[blocks] = self.floor[blocks, None]",
        "self.clocks[blocks] = self.clocks[blocks]",
        ("tests/ptx/test_kernels.py",),
    ),
    Mutant(
        "every write counts as seen",
        "bench/ptx/memory/shared_memory.py",
        "return fresh & (stamps != 0)",
        "return fresh & (stamps < 0)",
        ("tests/ptx/test_faults.py",),
    ),
    Mutant(
        "a fence shows writes that its thread has not seen",
        "bench/ptx/memory/shared_memory.py",
        "np.maximum(self.proxy_clocks[block, warp], self.clocks[block, warp])",
        "np.maximum(self.proxy_clocks[block, warp], 1 << 20)",
        ("tests/ptx/test_faults.py::test_faults_in_a_pipelined_product",),
    ),
    Mutant(
        "reads of other warps are not checked",
        "bench/ptx/memory/shared_memory.py",
        "late = reads > self.clocks[block, warp][:, None]",
        "late = reads > 1 << 20",
        ("tests/ptx/test_faults.py",),
    ),
    Mutant(
        "a phase completes without its bytes",
        "bench/ptx/memory/shared_memory.py",
        "if self.pending == 0 and self.tx_bytes == 0:",
        "if self.pending == 0:",
        ("tests/ptx/test_rings.py",),
    ),
]
