"""The machine code of the attention kernels against its design goals: no local memory in loops over full tiles, few
instructions that do not multiply, exponentials beside products, registers by role."""

import pytest
import torch

from tests.common import INTERPRETED
from tests.planting import plant

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import limits, sass
from bench.compiled import Kernel, compile_for
from bench.descriptors import find_lost_descriptors
from flashattn.backends import triton as backend
from flashattn.backends import triton_hopper
from flashattn.kernels import configs, hopper_backward, hopper_forward
from flashattn.protocol import Saved
from flashattn.score import Score
from tests.kernels.compile_cases import CANDIDATES

CONSUMER, PRODUCER = 240, 24  # registers of a thread


@pytest.mark.parametrize("limit", limits.LIMITS, ids=lambda x: f"{x.direction}-{x.architecture}-{x.head_dim}")
def test_limits(limit):
    assert limits.is_met(limit, limits.measure(limit))


@pytest.mark.parametrize("limit", limits.LIMITS[::3], ids=lambda x: f"{x.direction}-{x.architecture}-{x.head_dim}")
def test_a_causal_mask_costs_whole_tiles_nothing(limit):
    assert limits.is_met(limit, limits.measure(limit, causal=True))


def in_roles(head_dim: int) -> dict[str, Kernel]:
    found = limits.compile_kernels("sm_90", head_dim)
    return {name: kernel for name, kernel in found.items() if kernel.name.endswith("_hopper")}


def full_tile_code(kernel: Kernel) -> list[list[sass.Instruction]]:
    """The instructions of each loop over whole tiles."""
    code = sass.parse(kernel.code)[0]
    starts = {x.address: number for number, x in enumerate(code)}
    loops = sass.find_full_tile_loops(kernel.code)
    return [code[starts[loop.start] :][: loop.instructions] for loop in loops]


def find_faults(kernel: Kernel) -> set[str]:
    """What is wrong with the loops over whole tiles."""
    found = set()
    for loop in full_tile_code(kernel):
        names = [x.name for x in loop]
        waits = [n for n, x in enumerate(loop) if x.name.startswith("WARPGROUP.DEPBAR")]
        exponentials = [n for n, name in enumerate(names) if name.startswith("MUFU.EX2")]
        if waits[1] < exponentials[-1]:
            found.add("the wait for the second product comes before exponentials")
        if any(name.startswith("PRMT") for name in names):
            found.add("weights are unpacked and packed")
        if any(name.startswith(("LDL", "STL")) for name in names):
            found.add("local memory")
    return found


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_loops_in_roles(head_dim):
    kernels = in_roles(head_dim)
    assert len(kernels) == 3
    for kernel in kernels.values():
        assert len(full_tile_code(kernel)) == 2  # a loop of each consumer
        assert find_faults(kernel) == set()
        assert not find_lost_descriptors(kernel.code)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_registers_by_role(head_dim):
    for kernel in in_roles(head_dim).values():
        parts = sass.split_roles(kernel.code)
        consumers = [x for x in parts if any(i.name.startswith("HGMMA") for i in x)]
        producers = [x for x in parts if any(i.name.startswith("UTMALDG") for i in x)]
        assert len(consumers) == 2
        assert len(producers) == 1
        assert max(map(sass.find_max_register, consumers)) < CONSUMER
        assert sass.find_max_register(producers[0]) < PRODUCER


@pytest.mark.parametrize("direction, head_dim, row", CANDIDATES[2::5], ids=str)  # `make roles` checks all results
def test_candidates(direction, head_dim, row, monkeypatch):
    monkeypatch.setitem(configs.HOPPER[direction], head_dim, row)
    q = torch.empty(1, 4, 1024, head_dim, dtype=torch.bfloat16)
    score = Score(head_dim**-0.5, right=0)
    with compile_for("sm_90") as kernels:
        if direction == "forward":
            backend.forward(q, q, q, score)
        else:
            saved = Saved(q, q, q, q, torch.empty(1, 4, 1024), None)
            backend.backward(q, None, saved, score, False, [])
    (kernel,) = (kernel for kernel in kernels if kernel.name == f"attention_{direction}_hopper")
    assert kernel.shared_bytes <= configs.SHARED_MEMORY["sm_90"]
    assert not any("local" in loop.mix for loop in sass.find_full_tile_loops(kernel.code))


PLANTED = {
    "the wait for the second product comes before exponentials": (
        "    wait_full(rings.v, number)\n    acc, p, weights = warpgroup_mma_wait(0, deps=(acc, p, weights))\n",
        "    acc, p, weights = warpgroup_mma_wait(0, deps=(acc, p, weights))\n    wait_full(rings.v, number)\n",
    ),
}


def compiled_forward(head_dim: int) -> Kernel:
    q = torch.empty(1, 4, 1024, head_dim, dtype=torch.bfloat16)
    with compile_for("sm_90") as kernels:
        backend.forward(q, q, q, Score(head_dim**-0.5))
    return kernels[0]


def compiled_backward(head_dim: int) -> list[Kernel]:
    """dQ, then dK and dV."""
    q = torch.empty(1, 4, 1024, head_dim, dtype=torch.bfloat16)
    with compile_for("sm_90") as kernels:
        saved = Saved(q, q, q, q, torch.empty(1, 4, 1024), None)
        backend.backward(q, None, saved, Score(head_dim**-0.5), False, [])
    return kernels


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault, monkeypatch, tmp_path):
    monkeypatch.setattr(triton_hopper, "hopper_forward", plant(hopper_forward, tmp_path, PLANTED[fault]))
    assert fault in find_faults(compiled_forward(128))


DROPOUT = (
    "    if score.dropout is not None:\n        head = at.batch * at.heads + at.head\n"
    "        keep = dropout_multipliers(score.dropout, head, start_m, start_n, 64, weights.shape[1])\n"
    "        weights *= gl.convert_layout(keep, weights.type.layout)\n"
)
SINK = (
    "    if score.sinks is not None:\n        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]\n"
)
BLOCKS = (
    "    if score.blocks is not None:  # no tile may be active: then the first has no key\n"
    "        key_end = gl.where(block_is_active(score, at, work.start_m, start_n), key_end, 0)\n"
)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_absent_features_cost_nothing(head_dim, monkeypatch, tmp_path):
    """The opcodes are those of a kernel that does not know of them."""
    expected = opcodes(compiled_forward(head_dim))
    pieces = [(piece, "") for piece in (DROPOUT, SINK, BLOCKS)]
    monkeypatch.setattr(triton_hopper, "hopper_forward", plant(hopper_forward, tmp_path, *pieces))
    assert opcodes(compiled_forward(head_dim)) == expected


BACKWARD_PIECES = [
    "    if score.dropout is not None:\n"
    "        keep = dropout_multipliers(score.dropout, at.batch * at.heads + at.head, "
    "own.start, start_n, 64, BLOCK_N)\n"
    "        dp *= gl.convert_layout(keep, LAYOUT)\n",
    "    if score.q_lengths is not None:  # q and grad_out may be NaN past the length\n"
    "        grad = gl.where(is_before_end(grad, start_m, seq.query_end), grad, 0.0)\n",
    "    if outputs.grad_lse is not None:\n"
    "        delta -= gl.load(outputs.grad_lse + row + queries, mask=exists, other=0.0)\n",
    "    if score.dropout is not None:\n"
    "        keep = dropout_multipliers(score.dropout, at.batch * at.heads + at.head, "
    "start_m, own.start, BLOCK_M, 64)\n"
    "        keep = gl.convert_layout(keep.permute((1, 0)), LAYOUT)\n"
    "        dropped = p * keep\n",
    "        if score.dropout is not None:\n            dp *= keep\n",
]


def test_absent_features_cost_nothing_backward(monkeypatch, tmp_path):
    expected = [opcodes(kernel) for kernel in compiled_backward(64)]
    pieces = [(piece, "") for piece in BACKWARD_PIECES]
    monkeypatch.setattr(triton_hopper, "hopper_backward", plant(hopper_backward, tmp_path, *pieces))
    assert [opcodes(kernel) for kernel in compiled_backward(64)] == expected


def opcodes(kernel: Kernel) -> list[str]:
    return [x.name for x in sass.parse(kernel.code)[0]]


def test_a_spill_is_found(monkeypatch):
    """Two consumers of 64 queries with 128 registers a thread cannot hold their accumulators."""
    row = configs.HOPPER["forward"][128]._replace(registers=128)
    monkeypatch.setitem(configs.HOPPER["forward"], 128, row)
    assert "local memory" in find_faults(compiled_forward(128))


def test_backward_waits_are_found(monkeypatch, tmp_path):
    change = (
        "    wait_full(rings.v, number)  # ends a block of code: the wait for the second product stays after the "
        "exponentials\n",
        "",
    )
    monkeypatch.setattr(triton_hopper, "hopper_backward", plant(hopper_backward, tmp_path, change))
    assert "the wait for the second product comes before exponentials" in find_faults(compiled_backward(128)[0])
