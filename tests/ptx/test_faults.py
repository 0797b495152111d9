"""Each kind of fault of the PTX machine, in a small kernel beside its correct twin."""

import re

import pytest
import torch
import triton

from tests.common import INTERPRETED
from tests.ptx import kernels

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import ptx
from tests.ptx.helpers import TILES, compile_matmul, load_text, remove_line, run_matmul
from tests.ptx.run_text import expect_fault, run

COPY = "ld.global.b32 %r10, [%rd5]; st.global.b32 [%rd4], %r10;"


def test_out_of_bounds():
    assert torch.equal(run(COPY), torch.arange(128, dtype=torch.int32))
    fault = expect_fault("out of bounds", COPY, "reads 4 bytes right past the end of argument 1", elements=100)
    assert (fault.thread, fault.tensor) == (100, "argument 1")
    expect_fault("out of bounds", COPY.replace("[%rd5]", "[%rd5+-4]"), "4 bytes before the start of|past the end of")


def test_out_of_bounds_in_triton_names_tensor_and_line():
    x, out = torch.randn(1000), torch.empty(1000)
    with ptx.device("sm_80"):
        kernels.copy[(4,)](x, out, 1000, BLOCK=256, OFFSET=0, STRIDE=1)
        with pytest.raises(ptx.Fault, match="past the end of x, float32") as raised:
            kernels.copy[(4,)](x, out, 1000, BLOCK=256, OFFSET=1, STRIDE=1)
    fault = raised.value
    assert (fault.kind, fault.block, fault.tensor) == ("out of bounds", (3, 0, 0), "x")
    assert re.search(r"ptx/kernels\.py:\d+", str(fault))


def test_bounds_are_the_views():
    """Those of a view, not of the memory that contains it."""
    whole, out = torch.randn(2000), torch.empty(1000)
    with ptx.device("sm_80"):
        kernels.copy[(4,)](whole[500:1500], out, 1000, BLOCK=256, OFFSET=0, STRIDE=1)
        assert torch.equal(out, whole[500:1500])
        with pytest.raises(ptx.Fault, match="out of bounds"):
            kernels.copy[(4,)](whole[500:1500], out, 1000, BLOCK=256, OFFSET=1, STRIDE=1)


VECTOR = """
    setp.lt.u32 %p1, %r1, 16; shl.b32 %r20, %r1, 4; cvt.u64.u32 %rd8, %r20; add.s64 %rd9, %rd2, %rd8;
    @%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd9+OFFSET];
"""


def test_misaligned():
    run(VECTOR.replace("OFFSET", "16"))
    fault = expect_fault("misaligned", VECTOR.replace("OFFSET", "4"), "not a multiple of 16")
    assert fault.tensor == "argument 1"
    expect_fault("misaligned", "ld.shared.b32 %r10, [%r7+2];", "shared address")


EXCHANGE = """
    ld.global.b32 %r10, [%rd5];
    st.shared.b32 [%r7], %r10;
    BARRIER
    xor.b32 %r11, %r6, 508;
    add.s32 %r12, %r5, %r11;
    ld.shared.b32 %r13, [%r12];
    st.global.b32 [%rd4], %r13;
"""


def test_race_on_shared_memory_read():
    good = run(EXCHANGE.replace("BARRIER", "bar.sync 0;"))
    assert torch.equal(good, torch.arange(127, -1, -1, dtype=torch.int32))
    with pytest.raises(ptx.Fault) as raised:
        run(EXCHANGE.replace("BARRIER", ""))
    # A warp that runs first reads uninitialised memory; one that runs last, a write that it has not seen.
    assert raised.value.kind in ("race", "uninitialised")
    first = "st.shared.b32 [%r7], %r3; bar.sync 0;"
    expect_fault("race", first + EXCHANGE.replace("BARRIER", ""), "with no barrier between")


def test_race_on_shared_memory_write():
    """The second exchange overwrites what slower warps still read."""
    twice = (
        EXCHANGE.replace("BARRIER", "bar.sync 0;") + "AGAIN" + "add.s32 %r14, %r13, 1000; st.shared.b32 [%r7], %r14;"
    )
    run(twice.replace("AGAIN", "bar.sync 0;"))
    expect_fault("race", twice.replace("AGAIN", ""), "with no barrier between")


@pytest.mark.parametrize("writer", [0, 3])
def test_race_of_one_warp_with_those_that_read(writer):
    """Whether the writing warp runs before or after the reading ones."""
    text = """
        st.shared.b32 [%r7], %r1; bar.sync 0;
        ld.shared.b32 %r10, [%r5]; BARRIER
        shr.u32 %r11, %r1, 5; setp.eq.b32 %p1, %r11, WRITER; and.b32 %r12, %r1, 31; setp.eq.and.b32 %p2, %r12, 0, %p1;
        @%p2 st.shared.b32 [%r5], 77;
    """.replace("WRITER", str(writer))
    run(text.replace("BARRIER", "bar.sync 0;"))
    expect_fault("race", text.replace("BARRIER", ""), "with no barrier between")


def test_warps_run_in_more_than_one_order():
    """A ticket for each warp in each of two intervals between barriers."""
    tickets = run("""
        and.b32 %r10, %r1, 31; setp.eq.b32 %p1, %r10, 0;
        @%p1 atom.global.add.u32 %r11, [%rd1+508], 1;
        bar.sync 0;
        @%p1 atom.global.add.u32 %r12, [%rd1+508], 1;
        @%p1 st.global.b32 [%rd4], %r11; @%p1 st.global.b32 [%rd4+4], %r12;
    """)
    first, second = tickets[0:128:32].tolist(), [x - 4 for x in tickets[1:128:32].tolist()]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3]
    assert first == second[::-1]


@pytest.mark.parametrize("distance", [32, 64])
def test_warps_that_communicate_in_global_memory(distance):
    """Each thread increments its element once, even if the launch restarts, and then reads another warp's. Without a
    barrier some read it too early."""
    text = f"""
        ld.global.b32 %r10, [%rd4]; add.s32 %r11, %r10, 1; st.global.b32 [%rd4], %r11; BARRIER
        xor.b32 %r20, %r1, {distance}; mul.wide.u32 %rd8, %r20, 4; add.s64 %rd9, %rd1, %rd8;
        ld.global.b32 %r12, [%rd9]; bar.sync 0; add.s32 %r13, %r11, %r12; st.global.b32 [%rd4], %r13;
    """
    assert run(text.replace("BARRIER", "bar.sync 0;")).tolist() == [2] * 128
    assert set(run(text.replace("BARRIER", "")).tolist()) == {1, 2}


@pytest.mark.parametrize("distance", [32, 64])
def test_warps_that_overwrite_what_others_read(distance):
    """Each thread reads another warp's element and then writes its own; without a barrier some read the new value."""
    text = f"""
        xor.b32 %r20, %r1, {distance}; mul.wide.u32 %rd8, %r20, 4; add.s64 %rd9, %rd1, %rd8;
        ld.global.b32 %r12, [%rd9]; BARRIER add.s32 %r13, %r12, 1; st.global.b32 [%rd4], %r13;
    """
    assert run(text.replace("BARRIER", "bar.sync 0;")).tolist() == [1] * 128
    assert set(run(text.replace("BARRIER", "")).tolist()) == {1, 2}


def test_race_between_lanes_of_one_store():
    expect_fault("race", "st.shared.b32 [%r5], %r1;", "writes shared address 0")
    run("st.shared.b32 [%r5], %r3;")  # the same value from all of them


def test_race_within_a_warp():
    """Lanes do not run in lockstep: bar.warp.sync orders them."""
    neighbour = """
        st.shared.b32 [%r7], %r1; MEET
        xor.b32 %r11, %r6, 4; add.s32 %r12, %r5, %r11; ld.shared.b32 %r13, [%r12]; st.global.b32 [%rd4], %r13;
    """
    assert run(neighbour.replace("MEET", "bar.warp.sync -1;"))[:4].tolist() == [1, 0, 3, 2]
    expect_fault("race", neighbour.replace("MEET", ""))


def test_shared_memory_never_written():
    run("st.shared.b32 [%r7], %r1; bar.sync 0; ld.shared.b32 %r10, [%r7];")
    fault = expect_fault("uninitialised", "ld.shared.b32 %r10, [%r7+512];", "was never written")
    assert fault.tensor == "shared memory"
    expect_fault("out of bounds", "ld.shared.b32 %r10, [%r7+4096];", "of 4096 bytes of shared memory")


def test_bytes_that_the_program_does_not_use():
    """Four words are loaded, three were written; the pragma tells which bytes are used."""
    text = """
        shl.b32 %r20, %r1, 4; add.s32 %r21, %r5, %r20;
        st.shared.v2.b32 [%r21], {%r1, %r1}; st.shared.b32 [%r21+8], %r1;
        PRAGMA ld.shared.v4.b32 {%r22, %r23, %r24, %r25}, [%r21];
        st.global.b32 [%rd4], %r24;
    """
    used = '.pragma "used_bytes_mask {}";'
    assert torch.equal(run(text.replace("PRAGMA", used.format("0xfff"))), torch.arange(128, dtype=torch.int32))
    run(text.replace("PRAGMA", used.format("0xf0f")))
    expect_fault("uninitialised", text.replace("PRAGMA", used.format("0x1000")), "was never written")
    expect_fault("uninitialised", text.replace("PRAGMA", ""))
    expect_fault("uninitialised", text.replace("PRAGMA", used.format("0xfff") + "ld.shared.b32 %r26, [%r21];"))


def test_branch_by_index():
    """Lanes of one warp branch to different targets; an inner declaration shadows an outer one."""
    text = """
        and.b32 %r20, %r1, MASK; mov.b32 %r21, 7;
        TABLE: .branchtargets OUT; {
        TABLE: .branchtargets ZERO, ONE,
            OUT;
        @PREDICATE brx.idx %r20, TABLE; }
        bra OUT;
        ZERO: mov.b32 %r21, 10; bra OUT;
        ONE: mov.b32 %r21, 11;
        OUT: st.global.b32 [%rd4], %r21;
    """.replace("@PREDICATE", "setp.lt.u32 %p1, %r1, 64; @%p1")
    out = run(text.replace("MASK", "1"))
    assert out.tolist() == [10, 11] * 32 + [7] * 64
    expect_fault("out of bounds", text.replace("MASK", "3"), "index 3 of a table of 3 branch targets")
    with pytest.raises(ptx.Fault, match="no label TABLE"):
        run("brx.idx %r1, TABLE;")


def test_address_of_a_parameter():
    """In the param space, 32 or 64 bits wide, and converted to a generic address."""
    load = "cvta.param.u64 %rd9, %rd8; ld.b64 %rd10, [%rd9]; st.global.b32 [%rd10], 5;"
    assert run("mov.b64 %rd8, out;" + load)[0] == 5
    assert run("mov.b32 %r10, out; cvt.u64.u32 %rd8, %r10;" + load)[0] == 5


@pytest.mark.parametrize("style", ["comment", "inlined_at"])
def test_lines_of_inlined_code(style):
    """As Triton emits them before 3.8 and since."""
    text = {
        "comment": ".loc 1 7 5 // a.py:7:5 @[ b.py:20:3 @[ b.py:30:1 ] ]\n",
        "inlined_at": ".loc 2 30 1 // b.py:30:1\n .loc 2 20 3, function_name $x, inlined_at 2 30 1 // b.py:20:3\n"
        ".loc 1 7 5, function_name $y, inlined_at 2 20 3 // a.py:7:5\n",
    }[style]
    fault = expect_fault("race", f'.file 1 "/x/a.py";\n .file 2 "/x/b.py";\n {text} st.shared.b32 [%r5], %r1;')
    assert "/x/a.py:7, called at /x/b.py:20, called at /x/b.py:30" in str(fault)


ASYNC = """
    cp.async.ca.shared.global [%r7], [%rd5], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r7+512], [%rd5], 4;
    cp.async.commit_group;
    WAIT
    bar.sync 0;
    ld.shared.b32 %r10, [%r7+PLACE];
    st.global.b32 [%rd4], %r10;
"""


@pytest.mark.parametrize("place", ["0", "512"])
def test_copy_without_its_wait(place):
    text = ASYNC.replace("PLACE", place)
    assert torch.equal(run(text.replace("WAIT", "cp.async.wait_group 0;")), torch.arange(128, dtype=torch.int32))
    expect_fault("pending copy", text.replace("WAIT", ""), "not delivered")
    one = text.replace("WAIT", "cp.async.wait_group 1;")
    if place == "0":
        run(one)
    else:
        expect_fault("pending copy", one)


def test_copy_over_what_others_read():
    text = """
        st.shared.b32 [%r7], %r1; bar.sync 0;
        xor.b32 %r11, %r6, 508; add.s32 %r12, %r5, %r11; ld.shared.b32 %r13, [%r12];
    """
    copy = "cp.async.ca.shared.global [%r7], [%rd5], 4; cp.async.wait_all;"
    run(text + "bar.sync 0;" + copy)
    expect_fault("race", text + copy)


GLOBAL = """
    xor.b32 %r20, %r4, MASK; mul.wide.u32 %rd8, %r20, 4; add.s64 %rd9, %rd1, %rd8;
    st.global.b32 [%rd4], %r4;
    ld.global.b32 %r10, [%rd9];
"""


def test_race_between_blocks():
    run(GLOBAL.replace("MASK", "0"), blocks=2)
    fault = expect_fault("global race", GLOBAL.replace("MASK", "128"), r"which block \(\d, 0, 0\) wrote", blocks=2)
    assert fault.tensor == "argument 0"
    expect_fault("global race", "st.global.b32 [%rd1], %r4;", threads=32, blocks=2)
    run("st.global.b32 [%rd1], %r3;", blocks=2)  # the same value
    expect_fault(
        "global race", "ld.global.b32 %r10, [%rd1]; add.s32 %r11, %r10, 1; st.global.b32 [%rd1], %r11;", blocks=2
    )
    run("atom.global.add.u32 %r10, [%rd1], 1;", blocks=2)
    expect_fault("global race", "atom.global.add.u32 %r10, [%rd1], 1; ld.global.b32 %r11, [%rd1];", blocks=2)
    run("atom.global.add.u32 %r10, [%rd1], 1; ld.volatile.global.b32 %r11, [%rd1];", blocks=2)


def test_release_and_acquire_order_blocks():
    """The second of two blocks to increment a counter reads what the other wrote."""
    text = """
        add.s32 %r20, %r4, 1; st.global.b32 [%rd5], %r20; bar.sync 0;
        setp.eq.b32 %p1, %r1, 0; @!%p1 bra OVER;
        atom.global.SEM.gpu.add.u32 %r10, [%rd1], 1; setp.ne.b32 %p2, %r10, 1; @%p2 bra OVER;
        ld.global.b32 %r11, [%rd2]; ld.global.b32 %r12, [%rd2+512]; add.s32 %r13, %r11, %r12;
        st.global.b32 [%rd1+4], %r13;
        OVER:
    """
    assert run(text.replace("SEM", "acq_rel"), blocks=2)[1] == 130
    expect_fault("global race", text.replace("SEM", "relaxed"), "wrote", blocks=2)


def test_race_between_blocks_of_different_waves():
    """Blocks of different waves could run together on a GPU."""
    expect_fault("global race", "st.global.b32 [%rd1], %r2;", threads=1024, blocks=20)


def test_barrier_divergence():
    some = "setp.lt.u32 %p1, %r1, {n}; @%p1 bra AT; bra OVER; AT: bar.sync 0; OVER:"
    run(some.format(n=128))
    fault = expect_fault("barrier", some.format(n=64), "64 threads of the block wait here and 64 never arrive")
    assert fault.thread < 64
    expect_fault("barrier", some.format(n=16), "never arrive|execute together")
    two = "setp.lt.u32 %p1, %r1, 64; @%p1 bra AT; bar.sync 0; bra OVER; AT: bar.sync 0; OVER:"
    expect_fault("barrier", two, "different barriers")
    named = "setp.lt.u32 %p1, %r1, 64; @%p1 bra AT; bar.sync 1, 64; bra OVER; AT: bar.sync 2, 64; OVER: bar.sync 0;"
    run(named)


def test_lanes_missing_from_a_shuffle():
    shuffle = "setp.lt.u32 %p1, %r1, {n}; @!%p1 bra OVER; shfl.sync.bfly.b32 %r10, %r1, 1, 31, -1; OVER:"
    run(shuffle.format(n=64))
    expect_fault("barrier", shuffle.format(n=50) + "bar.sync 0;", "execute together")


def test_diverged_lanes_reconverge():
    """Lanes of a warp run loops of different lengths and reconverge for a shuffle."""
    out = run("""
        and.b32 %r20, %r1, 7; mov.b32 %r21, 0; setp.eq.b32 %p1, %r20, 0; @%p1 bra DONE;
        LOOP: add.s32 %r21, %r21, %r20; add.s32 %r20, %r20, -1; setp.ne.b32 %p2, %r20, 0; @%p2 bra LOOP;
        DONE: shfl.sync.down.b32 %r22, %r21, 1, 31, -1; st.global.b32 [%rd4], %r22;
    """)
    expected = torch.tensor([n % 8 * (n % 8 + 1) // 2 for n in range(32)])
    assert out[:31].tolist() == expected[1:].tolist()
    assert out[31] == expected[31]


def test_device_assert():
    with ptx.device("sm_80"):
        kernels.asserts[(4,)](torch.zeros(1000), 1000, BLOCK=256, debug=True)
        with pytest.raises(ptx.Fault, match="device_assert"):
            kernels.asserts[(4,)](torch.full((1000,), 11.0), 1000, BLOCK=256, debug=True)


def test_unknown_instruction():
    text = "wmma.load.a.sync.aligned.m16n16k16.row.f16 {%r1}, [%rd1];"
    with pytest.raises(ptx.Fault, match=r"unknown instruction: wmma\.load") as raised:
        run(text)
    assert raised.value.instruction.line > 0


# ------------------------------------------------------------------------------------------------ the compiler's code


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_faults_in_a_pipelined_product(architecture):
    """The compiler's own code without one line: a barrier, a wait for the copies, a wait for the product."""
    text, shared = compile_matmul(architecture)
    run_matmul(text, shared)
    with pytest.raises(ptx.Fault) as raised:
        run_matmul(remove_line(text, r"cp\.async\.wait_group", 0), shared)
    assert raised.value.kind == "pending copy"
    with pytest.raises(ptx.Fault) as raised:
        run_matmul(remove_line(text, r"bar\.sync", 1), shared)  # the first protects nothing
    assert raised.value.kind in ("race", "pending copy", "uninitialised")
    if architecture == "sm_90":
        waits = len(re.findall(r"wgmma\.wait_group", text))
        with pytest.raises(ptx.Fault) as raised:
            run_matmul(remove_line(text, r"wgmma\.wait_group", waits - 1), shared)
        assert raised.value.kind == "pending wgmma"
        without = text.replace("fence.proxy.async.shared::cta;", "")
        before_copies = re.sub(r"^.*%tid\.x;", r"\g<0> fence.proxy.async;", without, count=1, flags=re.M)
        for changed in (without, before_copies):
            with pytest.raises(ptx.Fault, match=r"fence\.proxy\.async"):
                run_matmul(changed, shared)
        less = text.replace("wgmma.wait_group.sync.aligned 1", "wgmma.wait_group.sync.aligned 7")
        if less != text:  # the next copy overwrites what a product still reads
            with pytest.raises(ptx.Fault, match="may still read"):
                run_matmul(less, shared)


def test_warps_reconverge_for_a_wgmma():
    """Two of four take a branch to code after the others', as libdevice's functions do."""
    text, shared = compile_matmul("sm_90")
    way = "mov.u32 %way0, %tid.x;\nsetp.ge.u32 %goes0, %way0, 64;\n@%goes0 bra $WAY;\n$BACK:\n"
    text = re.sub(r"^.*wgmma\.mma_async", lambda found: way + found.group(), text, count=1, flags=re.M)
    text = re.sub(r"^.*\.reg \.pred", lambda x: f".reg .pred %goes<1>; .reg .b32 %way<1>;\n{x.group()}", text, count=1,
                  flags=re.M)  # fmt: skip
    end = text.rindex("ret;") + len("ret;")
    run_matmul(f"{text[:end]}\n$WAY:\nbra.uni $BACK;\n{text[end:]}", shared)


def test_a_bulk_copy_without_its_wait(monkeypatch):
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, c = torch.randn(64, 64).half(), torch.zeros(64, 64).half()
    blocks = ([64, 32], [32, 64], [64, 64])
    with ptx.device("sm_90"):
        maps = [TensorDescriptor.from_tensor(x, block) for x, block in zip((a, a, c), blocks, strict=True)]
        compiled = kernels.matmul_descriptors[(1,)](*maps, 64, **TILES)
        torch.testing.assert_close(c.double(), a.double() @ a.double(), rtol=2e-3, atol=2e-2)
    text = compiled.asm["ptx"]
    assert "mbarrier.try_wait" in text
    open_text = re.sub(r"mbarrier\.try_wait[^;]*;", "setp.eq.b32 complete, 0, 0;", text)
    program = load_text(compiled, open_text)
    monkeypatch.setattr("bench.ptx.driver.load_program", lambda *_: program)
    with ptx.device("sm_90"), pytest.raises(ptx.Fault) as raised:
        kernels.matmul_descriptors[(1,)](*maps, 64, **TILES)
    assert raised.value.kind in ("pending copy", "uninitialised")


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="architecture must be one of"), ptx.device("sm_75"):
        pass


def test_the_driver_is_put_back():
    before = triton.runtime.driver._active
    with ptx.device("sm_80"):
        assert triton.runtime.driver.active is not before
    assert triton.runtime.driver._active is before
