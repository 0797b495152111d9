"""A machine for compiled PTX, in NumPy: runs, checks and counts what Triton makes of a kernel, where there is no GPU.

It models results, the order of accesses, and counts: the ISA's memory model as far as barriers, mbarriers, acquire and
release, asynchronous groups and proxy fences go, every warp of a block on its own, blocks in any order. It models no
time: no latencies, caches, occupancy or scheduling, so its bounds are limits, not forecasts. Instructions are those of
PTX, before the assembler: registers and spills are in `python -m bench compiled`. Tensor cores round once
where the hardware truncates; approximations (ex2, lg2 …) are closer to the truth than the hardware's.

A wgmma is done for its whole warp group once one warp of it has waited. Where nothing waits for its result the
assembler does (ptxas says so: C7514, C7517), so that is only noted. The fence that shows an mbarrier's init to bulk
copies is not asked for: Triton's own loops have none.

An access is held to the elements of the view whose address the kernel was given and derived its own from, as the text
tells (`origins.py`): not to memory in between, nor to another argument beside it. Addresses that were loaded from
memory (tables of pointers), or came as numbers, may be in any tensor of the process. Of what `torch.empty` and its
like give while a device is active, the machine knows what nothing has written (`uninitialised.py`).

To write the value that is there already is no race: Triton's redundant threads do. Where such threads add up the same
sum in different orders, it is noted. Atomics do not race with each other, nor do volatile, acquire and release
accesses of global memory; of the blocks' order an acquire sees the whole past of the block that released. Lanes and
warps of one block are not checked for races in global memory. A block that waits for a later one that does not run
beside it (8192 threads do) counts as endless. Clusters and tcgen05 are not modelled.
"""

from .driver import Device, device, run_text
from .faults import CHOICES, Fault
from .machine.counts import Launch

__all__ = ["CHOICES", "Device", "Fault", "Launch", "device", "run_text"]
