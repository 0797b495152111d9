"""Warp-specialised kernels on the PTX machine: the correct one runs, and each typical fault is found where it is."""

import linecache
import re

import pytest
import torch

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import ptx
from tests.ptx import rings
from tests.ptx.helpers import load_text
from tests.ptx.run_text import STRICT, expect_fault
from tests.ptx.run_text import run as run_body


def read_lines(text: str) -> str:
    """The Python lines that a fault or a location names."""
    return "\n".join(linecache.getline(file, int(line)) for file, line in re.findall(r"([^\s,]+\.py):(\d+)", text))


def run(**options):
    with ptx.device("sm_90", on_fault=STRICT):
        return rings.run(**options)


def find_fault(fault: str, **options) -> ptx.Fault:
    with pytest.raises(ptx.Fault) as raised:
        run(tiles=5, fault=fault, **options)
    return raised.value


# Tiles, slots of a ring, whether K is loaded ahead of V, programs.
ORDERS = [(1, 2, 1, 1), (2, 2, 0, 1), (5, 2, 1, 3), (3, 1, 1, 1), (4, 1, 0, 1), (7, 3, 1, 1), (6, 3, 0, 2)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_ring(order):
    tiles, slots, ahead, programs = order
    _, out, right = run(tiles=tiles, slots=slots, ahead=ahead, programs=programs)
    assert torch.equal(out, right)


def test_descriptors_made_in_the_kernel():
    """Rows past the end of a tensor read as zeros."""
    with ptx.device("sm_90"):
        out, right = rings.run_made(queries=200, keys=150)
    assert torch.equal(out, right)


# The fault, its kind, a part of the message and of a Python line that it names.
FAULTS = [
    ("no wait for K", "pending copy", "has not delivered", "warpgroup_mma(q_tile, k_tile"),
    ("no wait for V", "pending copy", "has not delivered", "warpgroup_mma(p, v_ring"),
    ("no wait for empty", "barrier", "more arrivals than the 1", "mbarrier.expect(ring.full"),
    ("wrong parity", "barrier", "never completes: 1 of 1 arrivals", "wait_full(v_ring"),
    ("wrong reader count", "barrier", "never completes: 1 of 1 arrivals", "wait_full(k_ring"),
    ("wrong turn", "barrier", "never completes: 1 of 1 arrivals", "wait_full(k_ring"),
    ("no wait for the first product", "pending wgmma", "has not been waited for", "gl.max(scores"),
    ("K released early", "race", "which a wgmma of warps 0 to 3 may still read", "fill(k_ring"),
    ("a column between pieces of 16 bytes", "misaligned", "starts 8 bytes into a row", "async_load("),
    ("V released early", "race", "which a wgmma of warps 0 to 3 may still read", "fill(v_ring"),
]


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case[0])
def test_faults(case):
    name, kind, message, line = case
    fault = find_fault(name)
    assert fault.kind == kind, str(fault)
    assert message in fault.message
    assert line in read_lines(str(fault))


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("tile", ["K", "V"])
def test_early_release_names_the_reader(tile, slots):
    """Of either consumer, and of rings of any length."""
    fault = find_fault(f"{tile} released early", slots=slots)
    assert fault.instruction.op.startswith("cp.async.bulk.tensor")
    assert fault.other.op.startswith("wgmma.mma_async")
    assert {"K": "k_tile", "V": "v_ring.tiles"}[tile] in read_lines(str(fault.other.location))
    assert f"PTX line {fault.other.line}: wgmma" in str(fault)


def test_a_deadlock_says_where_all_wait():
    fault = find_fault("wrong turn")
    assert re.search(r"warps \[0, 1, 2, 3\] wait at \S+ptx/rings.py", fault.message)
    assert re.search(r"warps \[10\] wait at \S+ptx/rings.py", fault.message)


# ------------------------------------------------------------------------------------------------ no faults


def test_early_release_of_k_after_a_wait_for_v():
    """A producer that loads V of each tile before K of the next has by then waited for the slot of V, released after
    the wait for both products."""
    _, out, right = run(tiles=5, ahead=0, fault="K released early")
    assert torch.equal(out, right)
    assert find_fault("V released early", ahead=0).kind == "race"


def test_weights_that_are_not_kept(monkeypatch):
    """The compiler reuses none of their registers while a product reads them. A write to one is found."""
    compiled, out, right = run(tiles=5, fault="P not kept")
    assert torch.equal(out, right)
    text = compiled.asm["ptx"]
    product = re.search(r"wgmma\.mma_async[^;]*\}, \{(%r\d+),[^;]*;", text)
    assert len(re.findall(rf"^\s*\S+\s+{product[1]},", text, re.M)) == 1  # written once, before it
    program = load_text(compiled, text.replace(product[0], f"{product[0]} mov.b32 {product[1]}, 0;", 1))
    monkeypatch.setattr("bench.ptx.driver.load_program", lambda *_: program)
    assert find_fault("P not kept").kind == "pending wgmma"


def test_mbarriers_without_a_fence_after_their_init():
    """Triton itself emits none: the code differs by the one fence. The producer must see the initialisation, by the
    barrier before the roles, as any write."""
    compiled, out, right = run(tiles=5, fault="no fence after init")
    assert torch.equal(out, right)
    fenced, _, _ = run(tiles=5)
    fences = [x.asm["ptx"].count("fence.proxy.async") for x in (compiled, fenced)]
    assert fences == [0, 1]


# ------------------------------------------------------------------------------------------------ ordinary accesses

# Warp 1 reads what warp 0 overwrites after waiting for an mbarrier.
RELEASE = """
    setp.eq.b32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [space+2048], 2; @%p1 st.shared.b32 [%r5], 7; bar.sync 0;
    setp.eq.b32 %p3, %r1, 32; setp.lt.u32 %p2, %r1, 32; @%p2 bra WRITE;
    BEFORE
    @%p3 mbarrier.arrive.shared.b64 _, [space+2048], 2;
    AFTER
    bra OVER;
    WRITE: mbarrier.try_wait.parity.shared.b64 %p4, [space+2048], 0;
    @%p1 st.shared.b32 [%r5], 8;
    OVER:
"""
READ = "ld.shared.b32 %r10, [%r5]; bar.warp.sync -1;"


def test_early_release_of_an_ordinary_read():
    run_body(RELEASE.replace("BEFORE", READ).replace("AFTER", ""), threads=64)
    expect_fault("race", RELEASE.replace("BEFORE", "").replace("AFTER", READ), "which warp 1 reads", threads=64)


def test_what_arrives_in_a_later_phase_is_not_seen_in_an_earlier_one():
    """Warp 0 waits for the first phase only, although the second arrival, after the read, has come too."""
    again = READ + "@%p3 mbarrier.arrive.shared.b64 _, [space+2048], 1;"
    expect_fault("race", RELEASE.replace("BEFORE", "").replace("AFTER", again), "which warp 1 reads", threads=64)


def test_an_mbarrier_that_others_have_not_seen_initialised():
    init = "setp.eq.b32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [space+2048], 2; SEEN"
    arrive = "and.b32 %r10, %r1, 31; setp.eq.b32 %p2, %r10, 0; @%p2 mbarrier.arrive.shared.b64 _, [space+2048];"
    run_body(init.replace("SEEN", "bar.sync 0;") + arrive, threads=64)
    expect_fault("race", init.replace("SEEN", "") + arrive, "which thread 0 wrote", threads=64)
