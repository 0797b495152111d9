"""An emulator for compiled PTX, in NumPy: executes, checks and counts the kernels that Triton compiles, without a GPU.

It models results, memory ordering and counts: the PTX memory model as far as barriers, mbarriers, acquire and release,
asynchronous groups and proxy fences go. Every warp of a block (CTA) runs on its own, blocks run in any order. It does
not model time: there are no latencies, caches, occupancy or scheduling, so its bounds are lower bounds, not forecasts.
It executes PTX, before the assembler: `python -m bench compiled` reports registers and spills. Tensor cores round once
where the hardware truncates; approximations (ex2, lg2 …) are more accurate than the hardware's.

A wgmma completes for its whole warp group once one of its warps has waited. Where the kernel does not wait for a result
the assembler inserts the wait (ptxas warns: C7514, C7517), so that is only noted. The fence that makes the
initialisation of an mbarrier visible to bulk copies is not required: Triton's own loops have none.

An access must stay within the elements of the view from whose address the kernel derived its own
(`frontend/provenance.py`): the gaps of a strided view and other arguments are out of it. Addresses that were loaded
from memory (tables of pointers) or passed as integers may be in any tensor of the process. The machine tracks which
memory from `torch.empty` and its like has never been written while a device is active (`memory/uninitialised.py`).

Writing the value that is already there is no race: Triton's redundant threads do it. Where such threads sum the same
terms in different orders, that is noted. Atomics do not race with each other, nor do volatile, acquire and release
accesses to global memory; an acquire sees everything that the releasing block did before. Threads of one block are not
checked for races in global memory. A block that waits for a later one that does not run beside it (8192 threads run at
a time) counts as an endless loop. Clusters and tcgen05 are not modelled.
"""

from .driver import Device, device, run_text
from .faults import CHOICES, Fault
from .machine.counts import Launch

__all__ = ["CHOICES", "Device", "Fault", "Launch", "device", "run_text"]
