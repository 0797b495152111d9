"""Which faults are raised, noted or ignored: the caller's choices, and cases that are right on a GPU."""

import re
import subprocess

import pytest
import torch
import triton

from tests.common import INTERPRETED
from tests.ptx import kernels

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import ptx
from tests.ptx.helpers import compile_matmul, remove_line, run_matmul
from tests.ptx.run_text import expect_fault, run

# ------------------------------------------------------------------------------------------------ choices


def run_overrun(**options) -> tuple[ptx.Device, torch.Tensor]:
    """Copies 300 elements of 200; (device, result)."""
    x, out = torch.full((400,), 7.0)[:200], torch.full((300,), float("nan"))  # what follows x is no other tensor's
    x.copy_(torch.arange(200.0))
    with ptx.device("sm_80", **options) as gpu:
        kernels.copy[(2,)](x, out, 300, BLOCK=256, OFFSET=0, STRIDE=1)
    return gpu, out


@pytest.mark.parametrize("on_fault", ["note", {"out of bounds": "note"}])
def test_noted_faults(on_fault, capsys):
    """An out-of-bounds read gives 0. One note for each instruction, in any block and thread."""
    gpu, out = run_overrun(on_fault=on_fault)
    assert torch.equal(out, torch.cat([torch.arange(200.0), torch.zeros(100)]))
    assert len(gpu.notes) == len({note.instruction.line for note in gpu.notes})
    for note in gpu.notes:
        assert (note.kind, note.tensor, note.kernel) == ("out of bounds", "x", "copy")
    gpu.show()
    assert "noted: out of bounds: reads" in capsys.readouterr().out


def test_ignored_faults():
    gpu, out = run_overrun(on_fault={"out of bounds": "ignore"})
    assert gpu.notes == []
    assert out.nan_to_num(-1).min() == 0


def test_raised_faults():
    with pytest.raises(ptx.Fault, match="out of bounds"):
        run_overrun()
    with pytest.raises(ptx.Fault, match="out of bounds"):
        run_overrun(on_fault={"race": "note"})


def test_noted_writes_out_of_bounds():
    """They are not performed."""
    whole = torch.zeros(300)
    with ptx.device("sm_80", on_fault="note") as gpu:
        kernels.copy[(2,)](torch.ones(300), whole[:200], 300, BLOCK=256, OFFSET=0, STRIDE=1)
    assert {(note.kind, note.tensor) for note in gpu.notes} == {("out of bounds", "out")}
    assert (whole.sum(), whole[200:].sum()) == (200, 0)


NOTED = {
    "race": "st.shared.b32 [%r7], %r3; bar.sync 0; st.shared.b32 [%r7], %r1; xor.b32 %r11, %r6, 508;"
    "add.s32 %r12, %r5, %r11; ld.shared.b32 %r13, [%r12];",
    "global race": "add.s32 %r10, %r4, 1; st.global.b32 [%rd1], %r10;",
    "uninitialised": "ld.shared.b32 %r10, [%r7];",
    "pending copy": "cp.async.ca.shared.global [%r7], [%rd5], 4; ld.shared.b32 %r10, [%r7];",
}


@pytest.mark.parametrize("kind", NOTED)
def test_kinds_that_are_noted(kind):
    from bench.ptx.faults import Judge

    expect_fault(kind, NOTED[kind], blocks=2)
    judge = Judge({kind: "note"})
    run(NOTED[kind], blocks=2, judge=judge)
    assert {note.kind for note in judge.notes} == {kind}


def test_faults_that_are_always_raised():
    with pytest.raises(ptx.Fault, match="misaligned"):
        run("ld.global.b64 %rd8, [%rd1+4];", judge=None)
    with ptx.device("sm_80", on_fault="ignore"), pytest.raises(ptx.Fault, match="device_assert"):
        kernels.asserts[(4,)](torch.full((1000,), 11.0), 1000, BLOCK=256, debug=True)


@pytest.mark.parametrize(
    "on_fault, match",
    [({"gap": "note"}, r"takes the kinds 'out of bounds', .*, got 'gap'"), ({"race": "print"}, "'raise', 'note' or"),
     ("warn", "got 'warn'"), ({"misaligned": "note"}, "got 'misaligned'")],
)  # fmt: skip
def test_invalid_choices(on_fault, match):
    with pytest.raises(ValueError, match=match), ptx.device("sm_80", on_fault=on_fault):
        pass


def test_notes_of_a_restarted_launch():
    """If warps communicate through global memory the launch restarts, one warp to a unit: nothing is noted twice."""
    from bench.ptx.faults import Judge

    judge = Judge("note")
    run("ld.shared.b32 %r10, [%r7]; add.s32 %r10, %r4, 1; st.global.b32 [%rd1], %r10; xor.b32 %r20, %r1, 64;"
        "mul.wide.u32 %rd8, %r20, 4; add.s64 %rd9, %rd1, %rd8; ld.global.b32 %r12, [%rd9];", judge=judge)  # fmt: skip
    assert [note.kind for note in judge.notes] == ["uninitialised"]


# ------------------------------------------------------------------------------------------------ last bits


@pytest.mark.parametrize("shape", [(32, 4), (16, 8), (64, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stores_that_differ_only_by_rounding(shape, dtype):
    """Within one instruction: several lanes compute and store each sum."""
    torch.manual_seed(0)
    x, weight, out = (
        torch.randn(shape, dtype=dtype),
        torch.randn(shape[1], dtype=dtype),
        torch.zeros(shape[0], dtype=dtype),
    )
    for architecture in ("sm_80", "sm_90"):
        with ptx.device(architecture) as gpu:
            kernels.dot_rows[(1,)](x, weight, out, *shape, num_warps=4)
        torch.testing.assert_close(out, x @ weight)
        assert {note.kind for note in gpu.notes} <= {"last bits"}
        if dtype == torch.float32:
            assert "differs only by rounding" in gpu.notes[0].message
            with ptx.device(architecture, on_fault="raise"), pytest.raises(ptx.Fault, match="last bits"):
                kernels.dot_rows[(1,)](x, weight, out, *shape, num_warps=4)


STORE_SUM = """
    cvt.rn.f32.u32 %f1, %r1; mul.f32 %f1, %f1, FACTOR; add.f32 %f1, %f1, 0f3F800000;
    KIND st.shared.b32 [%r5], %f2;
"""


def test_stores_that_differ_by_more():
    """Floats that differ by more than rounding, and integers that differ by one bit, race."""
    from bench.ptx.faults import Judge

    near = STORE_SUM.replace("FACTOR", "0f2E000000").replace("KIND", "mov.b32 %f2, %f1;")  # 128 of 2 ** -35
    run(near)
    near = STORE_SUM.replace("FACTOR", "0f32000000").replace("KIND", "mov.b32 %f2, %f1;")  # 2 ** -27: an ulp in all
    judge = Judge()
    run(near, judge=judge)
    assert [note.kind for note in judge.notes] == ["last bits"]
    expect_fault("race", STORE_SUM.replace("FACTOR", "0f3A000000").replace("KIND", "mov.b32 %f2, %f1;"))
    whole = "mov.b32 %r10, %f1; and.b32 %r10, %r10, -1; mov.b32 %f2, %r10;"  # not from a floating-point instruction
    expect_fault("race", STORE_SUM.replace("FACTOR", "0f32000000").replace("KIND", whole))
    expect_fault("race", "add.s32 %r10, %r1, 8388608; st.shared.b32 [%r5], %r10;")


# ------------------------------------------------------------------------------------------------ wgmma


def run_ptxas(text: str) -> str:
    """The messages of ptxas about a text for sm_90a."""
    run = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, "-v", "-arch", "sm_90a", "-o", "/dev/null", "/dev/stdin"],
        input=text, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stderr


@pytest.mark.parametrize("which", ["the last wait", "every wait"])
def test_results_that_the_assembler_waits_for(which):
    """ptxas warns that it inserts a wait (C7514, C7517), and so does the machine."""
    text, shared = compile_matmul("sm_90")
    assert not re.search("C75", run_ptxas(text))
    last = len(re.findall(r"wgmma\.wait_group", text)) - 1
    changed = remove_line(text, r"wgmma\.wait_group", last)
    if which == "every wait":
        changed = re.sub(r"^.*wgmma\.wait_group.*$", "", text, flags=re.M)
    assert re.search("C7514|C7517", run_ptxas(changed))
    if which == "the last wait":
        (note,) = run_matmul(changed, shared, on_fault={})
        assert note.kind == "pending wgmma"
        assert "wgmma" in note.message
    with pytest.raises(ptx.Fault, match=r"pending wgmma|may still read"):
        run_matmul(changed, shared)


# ------------------------------------------------------------------------------------------------ endless loops


def test_a_loop_that_returns_to_the_same_state():
    x = torch.zeros(1, dtype=torch.int32)
    with ptx.device("sm_80") as gpu:
        x.fill_(1)
        kernels.endless[(1,)](x)
        x.fill_(0)
        with pytest.raises(ptx.Fault, match="loops forever") as raised:
            kernels.endless[(1,)](x)
        with pytest.raises(ptx.Fault, match="loops forever"):
            kernels.take_lock_twice[(1,)](x)
    assert len(gpu.launches) == 1
    assert (raised.value.kind, raised.value.kernel) == ("endless", "endless")
    assert "ptx/kernels.py" in str(raised.value)
    expect_fault("endless", "LOOP: bra LOOP;", "loops forever")
    expect_fault("endless", "LOOP: xor.b32 %r10, %r10, 1; add.s32 %r11, %r10, 1; bra LOOP;", "loops forever")
    some = "setp.eq.b32 %p1, %r1, 77; LOOP: @%p1 bra LOOP; bar.sync 0;"
    assert expect_fault("endless", some, "loops forever").thread == 77


def test_loops_without_end_that_change_something():
    x = torch.zeros(1, dtype=torch.int32)
    with ptx.device("sm_80", max_instructions=4000):
        with pytest.raises(ptx.Fault, match="1000 instructions without a memory access"):
            kernels.count_past[(1,)](x, 5, STEP=2)
        with pytest.raises(ptx.Fault, match="more than 4000 instructions"):
            kernels.count_in_memory[(1,)](x)


def test_long_loops_that_end():
    x, out = torch.ones(1), torch.zeros(1)
    with ptx.device("sm_80"):
        kernels.halve[(1,)](x, out, 1500)
        flags = torch.zeros(20, dtype=torch.int32)
        kernels.wait_for_next[(20,)](flags, 20)
    assert flags.tolist() == [1] * 20
    torch.testing.assert_close(out.item(), 1000 - 999 * 0.999**1500, rtol=1e-4, atol=1e-2)


SPIN = """
    setp.eq.b32 %p1, %r1, SETTER; @%p1 st.volatile.global.b32 [%rd1+4], 7; @%p1 bra OVER;
    setp.ne.b32 %p2, %r1, 64; @%p2 bra OVER;
    LOOP: ld.volatile.global.b32 %r10, [%rd1+4]; setp.eq.b32 %p3, %r10, 0; @%p3 bra LOOP;
    st.global.b32 [%rd4], %r10;
    OVER:
"""


@pytest.mark.parametrize("setter", ["0", "96"])
def test_a_warp_that_waits_for_another(setter):
    """Whichever runs first."""
    assert run(SPIN.replace("SETTER", setter))[64] == 7
    expect_fault("endless", SPIN.replace("SETTER", "1000"), "loops forever")
