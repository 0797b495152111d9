"""Less common forms of instructions: cache policies, parameters by address, calls with arrays, printf; and properties
of the device."""

import pytest
import torch
import triton

from tests.common import INTERPRETED
from tests.ptx import kernels

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import ptx
from bench.ptx.driver import run_text
from tests.ptx.run_text import expect_fault, run


@pytest.mark.parametrize("store", ["", "evict_first", "evict_last"])
@pytest.mark.parametrize("load", ["", "evict_first", "evict_last"])
def test_eviction_policies(load, store):
    x = torch.randn(300)
    for architecture in ("sm_80", "sm_90"):
        with ptx.device(architecture):
            out = torch.zeros(300)
            kernels.copy_with_hints[(2,)](x, out, 300, BLOCK=256, LOAD=load, STORE=store)
        assert torch.equal(out, x)


@pytest.mark.parametrize("load, store", [(".ca", ".wb"), (".cg", ".cg"), (".cv", ".wt"), ("", ".cs")])
def test_cache_modifiers(load, store):
    x, out = torch.randn(300), torch.zeros(300)
    with ptx.device("sm_90"):
        kernels.copy_with_modifiers[(2,)](x, out, 300, BLOCK=256, LOAD=load, STORE=store)
    assert torch.equal(out, x)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_copies_with_a_policy(architecture):
    a, b, c = torch.randn(64, 128).half(), torch.randn(128, 64).half(), torch.zeros(64, 64)
    with ptx.device(architecture):
        kernels.matmul_with_hints[(1,)](a, b, c, 128, 64, BLOCK=64, BLOCK_K=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)


POLICY = "createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %rd20, 0.5;"


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.b32 %r10, [%rd5], %rd20; st.global.b32 [%rd4], %r10;",
        "ld.global.b32 %r10, [%rd5]; st.global.L2::cache_hint.b32 [%rd4], %r10, %rd20;",
        "ld.global.b32 %r10, [%rd5]; atom.global.add.L2::cache_hint.u32 %r11, [%rd4], %r10, %rd20;",
        "ld.global.b32 %r10, [%rd5]; red.relaxed.gpu.global.add.L2::cache_hint.u32 [%rd4], %r10, %rd20;",
        "cp.async.ca.shared.global.L2::cache_hint [%r7], [%rd5], 4, %rd20; cp.async.wait_all;"
        "ld.shared.b32 %r10, [%r7]; st.global.b32 [%rd4], %r10;",
        "cp.async.ca.shared.global.L2::cache_hint [%r7], [%rd5], 4, 4, %rd20; cp.async.wait_all;"
        "ld.shared.b32 %r10, [%r7]; st.global.b32 [%rd4], %r10;",
        "prefetch.global.L2::evict_last [%rd5]; applypriority.global.L2::evict_normal [%rd5], 128;"
        "ld.global.b32 %r10, [%rd5]; st.global.b32 [%rd4], %r10;",
        "createpolicy.range.global.L2::evict_last.L2::evict_first.b64 %rd21, [%rd2], 256, 512;"
        "ld.global.L2::cache_hint.b32 %r10, [%rd5], %rd21; st.global.b32 [%rd4], %r10;",
    ],
)
def test_instructions_with_a_policy(body):
    assert run(POLICY + body).tolist() == list(range(128))


def test_parameters_by_an_address_in_a_register():
    """Indexed by the thread, as arrays of pointers among the parameters are."""
    text = "mov.b64 %rd8, out; ld.param.b64 %rd9, [%rd8]; ld.param.b64 %rd10, [%rd8+8];"
    copy = "add.s64 %rd11, %rd10, %rd3; ld.global.b32 %r10, [%rd11]; add.s64 %rd12, %rd9, %rd3;"
    assert run(text + copy + "st.global.b32 [%rd12], %r10;").tolist() == list(range(128))
    by_thread = "mov.b32 %r8, out; and.b32 %r9, %r1, 1; shl.b32 %r9, %r9, 3; add.s32 %r8, %r8, %r9;"
    out = run(by_thread + "ld.param.b64 %rd9, [%r8]; sub.s64 %rd9, %rd9, %rd1; st.global.b32 [%rd4], %rd9;")
    assert set(out[0::2].tolist()) == {0}
    assert 0 not in out[1::2].tolist()


@pytest.mark.parametrize("offset", [-8, 12, 16])
def test_parameters_out_of_bounds(offset):
    expect_fault("out of bounds", f"ld.param.b64 %rd9, [out+{offset}];", "of 16 bytes of parameters")


CALL = """
.target sm_80
.func (.param .align 4 .b8 result[8]) swap(.param .align 4 .b8 pair[8], .param .b32 add)
{
    .reg .b32 %r<8>; .reg .b64 %rd<4>;
    ld.param.b32 %r1, [pair]; ld.param.b32 %r2, [pair+4];
    ld.param.b32 %r3, [add];
    add.s32 %r1, %r1, %r3; add.s32 %r2, %r2, %r3;
    st.param.v2.b32 [result], {%r2, %r1};
    ret;
}
.func (.param .b32 result) second(.param .align 4 .b8 pair[8])
{
    .reg .b32 %r<4>; .reg .b64 %rd<4>;
    { .param .align 4 .b8 given[8]; .param .b32 add; .param .align 4 .b8 taken[8];
      ld.param.b32 %r1, [pair]; st.param.b32 [given], %r1;
      mov.b64 %rd1, pair; ld.param.b32 %r2, [%rd1+4]; st.param.b32 [given+4], %r2;
      st.param.b32 [add], 1000;
      call.uni (taken), swap, (given, add);
      ld.param.b32 %r3, [taken+4]; }
    st.param.b32 [result], %r3; ret;
}
.visible .entry kernel(.param .u64 out)
{
    .reg .b32 %r<8>; .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [out]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; add.s32 %r2, %r1, 100;
    { .param .align 4 .b8 pair[8]; .param .b32 add; .param .align 4 .b8 back[8];
      st.param.b32 [pair], %r1; st.param.b32 [pair+4], %r2; st.param.b32 [add], 7;
      call.uni (back), swap, (pair, add);
      ld.param.v2.b32 {%r3, %r4}, [back]; }
    { .param .align 4 .b8 pair[8]; .param .b32 back;
      st.param.v2.b32 [pair], {%r3, %r4};
      call.uni (back), second, (pair);
      ld.param.b32 %r5, [back]; }
    sub.s32 %r6, %r3, %r5; st.global.b32 [%rd2], %r6; ret;
}
"""


def test_calls_with_arrays():
    """swap(t, t + 100) + 7 = (t + 107, t + 7); the second of its swap is t + 107 + 1000."""
    out = torch.zeros(64, dtype=torch.int32)
    run_text(CALL, out, threads=64)
    assert out.tolist() == [-1000] * 64


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_calls_of_functions_not_inlined(architecture):
    x, y, out = torch.randint(-9, 9, (9,)), torch.randint(-9, 9, (9,)), torch.zeros(9, dtype=torch.int64)
    with ptx.device(architecture):
        kernels.calls_a_function[(9,)](x, y, out)
    total, product = x + y, x * y
    assert torch.equal(out, total + product - total * product)


def test_device_print(capsys):
    x = torch.tensor([1.5, -2.0, 3.0, 4.0] * 32)
    with ptx.device("sm_80"):
        kernels.prints[(2,)](x, 77, BLOCK=64, num_warps=1)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line for line in lines if "value" in line) == sorted(
        f"pid ({i // 64}, 0, 0) idx ({i % 64:2}) value: {x[i]:f}" for i in range(128)
    )
    assert sum("only text" in line for line in lines) == 64
    assert "pid (1, 0, 0) idx (63) hexed: 0x0000007f" in lines
    assert "pid (1, 0, 0) idx () n: 77" in lines
    assert f"pid (1, 0, 0) idx ( 0) long: {64 - (1 << 40)}" in lines


def test_printf_of_every_conversion(capsys):
    """As in C, including %s, %c and %%."""
    text = """
    .target sm_80
    .extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);
    .global .align 1 .b8 word[3] = {104, 105, 0};
    .global .align 1 .b8 form[30] = {FORM};
    .visible .entry kernel(.param .u64 out)
    { .local .align 8 .b8 buffer[32]; .reg .b64 %rd<9>; .reg .b32 %r<9>;
      mov.b64 %rd1, buffer; cvta.local.u64 %rd2, %rd1; mov.b64 %rd3, word;
      st.local.b64 [%rd1], %rd3; st.local.b32 [%rd1+8], 65; st.local.b32 [%rd1+12], -3;
      st.local.b64 [%rd1+16], 0d3FF8000000000000; st.local.b64 [%rd1+24], -9;
      mov.b64 %rd4, form;
      { .param .b64 p0; .param .b64 p1; .param .b32 r0;
        st.param.b64 [p0], %rd4; st.param.b64 [p1], %rd2;
        call.uni (r0), vprintf, (p0, p1); ld.param.b32 %r1, [r0]; }
      ret; }"""
    form = b"%s %c%% %-4d| %.2e %lli\n\0"
    run_text(text.replace("FORM", ", ".join(map(str, form))), torch.zeros(1), threads=32)
    assert capsys.readouterr().out.splitlines() == ["hi A% -3  | 1.50e+00 -9"] * 32


def test_an_unknown_external_function_is_named():
    text = """.target sm_80
    .extern .func (.param .b32 r) elsewhere(.param .b64 a);
    .visible .entry kernel(.param .u64 out)
    { .reg .b64 %rd<9>; { .param .b64 p0; .param .b32 r0; st.param.b64 [p0], %rd1;
      call.uni (r0), elsewhere, (p0); } ret; }"""
    with pytest.raises(ptx.Fault, match="call of elsewhere"):
        run_text(text, torch.zeros(1))


def test_registers_of_a_kernel():
    """Kernels that choose their grid by occupancy read it: the maximum for a thread, since ptxas has not run."""
    with ptx.device("sm_90"):
        properties = triton.runtime.driver.active.utils.get_device_properties(0)
        x, out = torch.randn(300), torch.zeros(300)
        compiled = kernels.copy[(2,)](x, out, 300, BLOCK=256, OFFSET=0, STRIDE=1, num_warps=8)
        assert (compiled.n_regs, compiled.n_spills) == (255, 0)
        bounded = kernels.copy[(2,)](x, out, 300, BLOCK=256, OFFSET=0, STRIDE=1, num_warps=8, maxnreg=64)
        assert bounded.n_regs == 64
        many = kernels.copy[(2,)](x, out, 300, BLOCK=256, OFFSET=0, STRIDE=1, num_warps=16)
        assert many.n_regs == 128
    assert properties["max_num_regs"] == 65536
    assert properties["max_num_regs"] // (compiled.n_regs * properties["warpSize"] * 8) == 1
    assert set(properties) >= {
        "max_shared_mem",
        "multiprocessor_count",
        "sm_clock_rate",
        "mem_clock_rate",
        "mem_bus_width",
    }
