"""The Triton backend on Hopper (sm_90): which calls go to the warp-specialised kernels (`kernels/hopper.py`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..kernels import configs, hopper_backward, hopper_forward, tune
from ..kernels.backward import StatsPointers
from ..kernels.configs import Roles
from ..kernels.tiles import Heads
from ..score import Score
from .setting import Setting

# FLASHATTN_HOPPER=0 selects the plain kernels, to compare, or if these are at fault.
ENABLED = Setting(os.environ.get("FLASHATTN_HOPPER") != "0")


# The layouts of tiles, and of queries' statistics, in shared memory.
TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
STATS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


@contextlib.contextmanager
def use_plain_kernels() -> Iterator[None]:
    """Within the block, in every thread, the plain kernels replace these: to compare them."""
    with ENABLED.override(False):
        yield


def choose_roles(direction: str, q: Tensor, k: Tensor, v: Tensor, score: Score, *others: Tensor) -> Roles | None:
    """How a pass divides its work; None for the plain kernel. `others`: further tensors that it copies in bulk."""
    if not ENABLED.value or q.element_size() != 2 or configs.find_architecture() != "sm_90":
        return None
    if not all(can_copy(x) for x in (q, k, v, *others)):
        return None
    usual = configs.choose_hopper_roles(direction, max(q.shape[-1], v.shape[-1]), has_tile_changes(score))
    row = tune.choose_row(direction, q, v, score, usual)
    if not isinstance(row, Roles):
        return None
    blocks = score.block_mask
    sides = (row.block, row.owned) if direction == "backward_kv" else (row.owned, row.block)
    if blocks is not None and (blocks.block_q % sides[0] or blocks.block_k % sides[1]):
        return None  # a tile must lie in one block
    return row


def has_tile_changes(score: Score) -> bool:
    """Whether a tile's scores or weights change by more than a scale and positions."""
    return score.has_score_changes() or score.mask is not None or score.dropout_p > 0


def can_copy(x: Tensor) -> bool:
    """Whether bulk copies can read x (batch, heads, seq, dim): it starts at a multiple of 16 bytes, and rows, heads and
    batch rows follow at multiples of 16 bytes."""
    pieces = 16 // x.element_size()
    steps = [stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(step and step % pieces == 0 for step in steps)


def make_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """x (batch, heads, seq, dim) as bulk copies read it: tiles of `rows` rows of a head, with as many columns as a
    product reads; elements outside are 0."""
    cols = count_columns(x)
    # The stride of a dimension of one is not used, but must be valid.
    strides = [stride if size > 1 else cols for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, rows, cols], TILE_LAYOUT)


def count_columns(x: Tensor) -> int:
    """The columns of a tile: at least those of one swizzled row, 128 bytes."""
    return max(64, configs.next_power_of_2(x.shape[-1]))


def make_stats_descriptor(rows: Tensor, count: int) -> TensorDescriptor:
    """Statistics (2 or 4, batch * heads, stride) of queries as bulk copies read them: all those of `count` queries."""
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [rows.shape[0], 1, count], STATS_LAYOUT)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Heads, lse: Tensor, rest: Tensor | None, args: tuple, row: Roles
) -> None:
    """Fill out, lse and its rest. `args`: those that all attention kernels share."""
    _, batches, heads, _, seq_q, _ = args
    programs = configs.cdiv(seq_q, row.owned) * heads * batches
    if row.persistent:
        programs = min(programs, configs.count_multiprocessors(q.device))
    launch(
        hopper_forward.attention_forward_hopper, programs, row,
        make_descriptor(q, 64), make_descriptor(k, row.block), make_descriptor(v, row.block), out, lse, rest, *args,
        HEAD_DIM_V=v.shape[-1], PINGPONG=row.pingpong, PERSISTENT=row.persistent,
    )  # fmt: skip


def backward_q(
    q: Tensor, k: Tensor, v: Tensor, out: Heads, grad_out: Tensor, lse: Tensor, rest: Tensor | None,
    grad_lse: Tensor | None, grad_q: Heads, rows: StatsPointers, args: tuple, row: Roles,
) -> None:  # fmt: skip
    """Fill grad_q and the queries' statistics."""
    _, batches, heads, _, seq_q, _ = args
    programs = configs.cdiv(seq_q, row.owned) * heads * batches
    launch(
        hopper_backward.attention_backward_q_hopper, programs, row,
        make_descriptor(q, 64), make_descriptor(k, row.block), make_descriptor(v, row.block), out,
        make_descriptor(grad_out, 64), lse, rest, grad_lse, grad_q, rows, *args,
        HEAD_DIM=q.shape[-1], HEAD_DIM_V=v.shape[-1],
    )  # fmt: skip


def backward_kv(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, rows: Tensor, grad_k: Heads,
    grad_v: Heads, args: tuple, row: Roles,
) -> None:  # fmt: skip
    """Fill grad_k and grad_v. `rows`: the queries' statistics, (2 or 4, batch * heads, stride)."""
    _, batches, _, kv_heads, _, seq_k = args
    programs = configs.cdiv(seq_k, row.owned) * kv_heads * batches
    launch(
        hopper_backward.attention_backward_kv_hopper, programs, row,
        make_descriptor(q, row.block), make_descriptor(k, 64), make_descriptor(v, 64),
        make_descriptor(grad_out, row.block), make_stats_descriptor(rows, row.block), grad_k, grad_v, *args,
        HEAD_DIM=q.shape[-1], HEAD_DIM_V=v.shape[-1], SHARED=row.shared,
    )  # fmt: skip


def launch(kernel, programs: int, row: Roles, *args, **constants) -> None:
    if programs:
        kernel[(programs,)](
            *args, **constants, STAGES=row.stages, CONSUMERS=row.consumers, REGISTERS=row.registers, num_warps=4
        )
