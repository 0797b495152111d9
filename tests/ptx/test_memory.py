"""Whose memory a kernel accesses: views, adjacent tensors, tables of pointers, and uninitialised memory."""

import pytest
import torch
import triton
import triton.language as tl

from tests.common import INTERPRETED
from tests.ptx import kernels

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import ptx
from tests.ptx.run_text import expect_fault, run


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request):
    torch.manual_seed(0)
    with ptx.device(request.param) as device:
        yield device


def raises_fault(kind: str, match: str):
    return pytest.raises(ptx.Fault, match=f"(?s)^({kind}): .*{match}")


# ------------------------------------------------------------------------------------------------ tables of pointers


def make_pointer_table(tensors) -> torch.Tensor:
    return torch.tensor([x.data_ptr() for x in tensors])


def test_pointers_kept_in_a_tensor(gpu):
    """As in a grouped GEMM: the tensors of a table are no arguments."""
    groups = [torch.randn(n) for n in (64, 40, 7)]
    out = torch.full((3, 64), float("nan"))
    kernels.copy_by_table[(3,)](make_pointer_table(groups), torch.tensor([64, 40, 7]), out, BLOCK=64, OVER=0)
    for row, x in zip(out, groups, strict=True):
        assert torch.equal(row, torch.nn.functional.pad(x, (0, 64 - len(x))))
    kernels.fill_by_table[(2,)](make_pointer_table(list(out)[:2]), BLOCK=64)
    assert torch.equal(out[:2], torch.arange(2.0)[:, None] + torch.arange(64.0))


def test_a_table_made_before_the_device():
    groups = [torch.randn(64), torch.nn.Parameter(torch.randn(64))]
    pointers, sizes, out = make_pointer_table(groups), torch.tensor([64, 64]), torch.zeros(2, 64)
    with ptx.device("sm_80"):
        kernels.copy_by_table[(2,)](pointers, sizes, out, BLOCK=64, OVER=0)
    assert torch.equal(out, torch.stack([x.detach() for x in groups]))


def test_a_table_into_an_argument_and_its_rest(gpu):
    """One pointer is to a tensor that contains an argument."""
    whole = torch.randn(4, 64)
    out = torch.zeros(2, 64)
    kernels.copy_by_table[(2,)](make_pointer_table([whole[0], whole[3]]), torch.tensor([64, 64]), out, BLOCK=64, OVER=0)
    assert torch.equal(out, whole[[0, 3]])
    kernels.copy_by_table[(1,)](make_pointer_table([whole]), torch.tensor([64]), whole[1:2], BLOCK=64, OVER=0)
    assert torch.equal(whole[1], whole[0])


def test_a_table_of_uninitialised_memory(gpu):
    out, sizes = torch.zeros(2, 64), torch.tensor([64, 64])
    groups = [torch.zeros(64), torch.empty(64)]
    with raises_fault("uninitialised", r"at element \[0\] of a tensor of this process, float32\[64\]"):
        kernels.copy_by_table[(2,)](make_pointer_table(groups), sizes, out, BLOCK=64, OVER=0)
    kernels.fill_by_table[(2,)](make_pointer_table(groups), BLOCK=64)
    kernels.copy_by_table[(2,)](make_pointer_table(groups), sizes, out, BLOCK=64, OVER=0)
    assert torch.equal(out[1], 1 + torch.arange(64.0))


def test_invalid_pointers(gpu):
    x, out, sizes = torch.randn(1 << 16), torch.zeros(1, 64), torch.tensor([64])
    with raises_fault("out of bounds", "before the start of"):
        kernels.copy_by_table[(1,)](torch.tensor([64]), sizes, out, BLOCK=64, OVER=0)
    address = make_pointer_table([x])
    del x
    with raises_fault("out of bounds", ""):
        kernels.copy_by_table[(1,)](address, sizes, out, BLOCK=64, OVER=0)


def test_an_address_as_a_number(gpu):
    x, out = torch.randn(64), torch.zeros(64)
    kernels.copy_by_number[(1,)](x.data_ptr(), out, BLOCK=64)
    assert torch.equal(out, x)


# ------------------------------------------------------------------------------------------------ wrapped tensors


def test_reinterpreted_tensors(gpu):
    x = (torch.randn(300) * 3).to(torch.float8_e5m2)
    out = torch.zeros(300)
    kernels.cast[(1,)](triton.reinterpret(x.view(torch.uint8), tl.float8e5), out, 300, BLOCK=512)
    assert torch.equal(out, x.float())
    back = torch.zeros(300, dtype=torch.uint8)
    kernels.cast[(1,)](x.float(), triton.reinterpret(back, tl.float8e5), 300, BLOCK=512)
    assert torch.equal(back.view(torch.float8_e5m2).float(), x.float())
    with raises_fault("out of bounds", r"of x, uint8\[300\]"):
        kernels.cast[(1,)](triton.reinterpret(x.view(torch.uint8), tl.float8e5), out, 301, BLOCK=512)


def test_a_tensor_by_its_address_alone(gpu):
    """An argument with nothing but data_ptr."""

    class Pointer:
        dtype = torch.float32

        def __init__(self, tensor):
            self.data_ptr = tensor.data_ptr

    x, out = torch.randn(300), torch.zeros(300)
    kernels.copy[(2,)](Pointer(x), out, 300, BLOCK=256, OFFSET=0, STRIDE=1)
    assert torch.equal(out, x)


# ------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize(
    "offset, match",
    [
        (1, r"right past the end of x, float32\[1000\], at element \[0\] of out"),
        (-1, r"4 bytes before the start of x, .* at element \[999\] of "),
    ],
)
def test_past_one_argument_into_another(gpu, offset, match):
    """They are adjacent in one allocation."""
    whole = torch.randn(3000)
    first, x, out = whole[:1000], whole[1000:2000], whole[2000:]
    kernels.apply_two[(4,)](first, x, out, 1000, FUNCTION=kernels.maximum, BLOCK=256)
    assert torch.equal(out, torch.maximum(first, x))
    with raises_fault("out of view", match) as raised:
        kernels.copy_beside[(4,)](x, first, out, 1000, OFFSET=offset, BLOCK=256)
    assert (raised.value.tensor, raised.value.kernel) == ("x", "copy_beside")


def test_a_write_past_one_argument_into_another():
    whole = torch.zeros(200)
    with ptx.device("sm_80"), raises_fault("out of view", r"writes 4 bytes right past the end of out, .* of x, "):
        kernels.copy[(1,)](whole[99:], whole[:100], 101, BLOCK=128, OFFSET=0, STRIDE=1)


def test_gaps_of_a_strided_view(gpu):
    """Columns outside of the view lie between its first and last element."""
    whole, out = torch.randn(4, 128), torch.zeros(4, 64)
    kernels.copy_rows[(4,)](whole[:, :64], out, 128, COLS=64)
    assert torch.equal(out, whole[:, :64])
    match = r"between the elements of x, float32\[4, 60\] with strides \[128, 1\]"
    with raises_fault("out of view", match) as raised:
        kernels.copy_rows[(3,)](whole[:, :60], out, 128, COLS=64)
    assert raised.value.element is None
    out = torch.zeros(8, 64)
    with raises_fault("out of view", "writes .* between the elements of out"):
        kernels.copy_rows[(3,)](whole, out[::2], 128, COLS=64)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:1].expand(16, 16),
        lambda x: x.as_strided((12, 16), (8, 1)),  # rows that overlap
        lambda x: x[:, None, :, None],
    ],
)
def test_views_without_gaps(view):
    x, out = torch.randn(16, 16), torch.zeros(256)
    n = view(x).numel() if view(x).stride()[0] else 16
    n = 11 * 8 + 16 if view(x).shape == (12, 16) else n
    with ptx.device("sm_80"):
        kernels.copy[(1,)](view(x), out, n, BLOCK=256, OFFSET=0, STRIDE=1)
    assert torch.equal(out[:n], x.flatten()[:n])


def test_a_descriptor_of_more_than_its_tensor(gpu):
    """The shape in the descriptor is larger than the tensor, and an argument follows it in memory."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    whole = torch.randn(12, 16, 32)
    x, out = whole[:3], whole[3:]
    rights = TensorDescriptor(x, [4, 20, 32], [16 * 32, 32, 1], [2, 16, 16])
    with raises_fault("out of view|out of bounds", "past the end of x"):
        kernels.copy_box[(1,)](rights, TensorDescriptor.from_tensor(out, [2, 16, 16]))


def test_one_of_two_tensors(gpu):
    """An address that may derive from either may be in both."""
    whole = torch.randn(384)
    x, y, which, out = whole[:128], whole[256:], torch.arange(128) % 2, torch.zeros(128)
    kernels.copy_one_of[(1,)](x, y, which, out, BLOCK=128)
    assert torch.equal(out, torch.where(which != 0, x, y))
    with raises_fault("out of view|out of bounds", "past the end of"):
        kernels.copy_one_of[(2,)](x, whole[128:200], torch.zeros(256), torch.zeros(256), BLOCK=128)


def test_a_pointer_that_advances(gpu):
    whole, out = torch.randn(1024), torch.zeros(64)
    kernels.walk[(1,)](whole[:512], out, 512, BLOCK=64)
    torch.testing.assert_close(out, whole[:512].view(8, 64).sum(0))
    with raises_fault("out of bounds", "past the end of x"):
        kernels.walk[(1,)](whole[:512], out, 576, BLOCK=64)
    with raises_fault("out of view", "past the end of x"):
        kernels.walk[(1,)](whole[:512], whole[512:], 576, BLOCK=64)


def test_the_element_is_named(gpu):
    x, out = torch.randn(8, 32), torch.zeros(8, 32)
    with raises_fault("out of view", r"writes 4 bytes at byte \d+ between the elements of out") as raised:
        kernels.copy_rows[(4,)](x, out[:, :16], 32, COLS=32)
    assert (raised.value.tensor, raised.value.element) == ("out", None)
    fault = expect_fault("global race", "add.s32 %r10, %r4, 1; st.global.b32 [%rd1+8], %r10;", threads=32, blocks=2)
    assert fault.element == (2,)
    assert "at element [2] of argument 0, int32[64]" in str(fault)
    assert "\n  kernel kernel, block (" in str(fault)


# ------------------------------------------------------------------------------------------------ never written


EMPTY = {
    "empty": lambda n: torch.empty(n),
    "empty_like": lambda n: torch.empty_like(torch.zeros(n)),
    "new_empty": lambda n: torch.zeros(1).new_empty(n),
    "empty_strided": lambda n: torch.empty_strided((n,), (1,)),
    "a view": lambda n: torch.empty(2, n)[1],
    "out": lambda n: torch.empty(n, out=torch.zeros(n)),
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_uninitialised_memory(gpu, make):
    x = torch.randn(300)
    out = make(300)
    kernels.copy[(2,)](x, out, 300, BLOCK=256, OFFSET=0, STRIDE=1)  # now it is written
    kernels.add_to[(2,)](x, out, 300, BLOCK=256)
    assert torch.equal(out, 2 * x)
    with raises_fault("uninitialised", r"at element \[0\] of out, .* which was never written") as raised:
        kernels.add_to[(2,)](x, make(300), 300, BLOCK=256)
    assert (raised.value.tensor, raised.value.element, raised.value.kernel) == ("out", (0,), "add_to")


WRITES = {
    "zero_": lambda x: x.zero_(),
    "copy_": lambda x: x.copy_(torch.randn_like(x)),
    "numpy": lambda x: x.numpy().fill(1),
    "a view": lambda x: x.view(2, -1).uniform_(),
    "a part": lambda x: x[::2].fill_(3),  # of every sixteen bytes
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_memory_that_the_host_wrote(gpu, write):
    x, out = torch.randn(300), torch.empty(300)
    write(out)
    before = out.clone()
    kernels.add_to[(2,)](x, out, 300, BLOCK=256)
    torch.testing.assert_close(out, before + x, equal_nan=True)


def test_memory_that_a_kernel_wrote_in_part(gpu):
    """To the element, over several launches."""
    x, out = torch.randn(300), torch.empty(300)
    kernels.copy[(1,)](x, out, 101, BLOCK=256, OFFSET=0, STRIDE=1)
    kernels.add_to[(1,)](x, out, 101, BLOCK=256)
    with raises_fault("uninitialised", r"at element \[101\] of out"):
        kernels.add_to[(1,)](x, out, 102, BLOCK=256)
    out[100:].zero_()
    kernels.add_to[(2,)](x, out, 300, BLOCK=256)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int8, torch.bool], ids=str)
def test_dtypes_of_uninitialised_memory(dtype):
    with ptx.device("sm_80"):
        x, out = torch.empty(64, dtype=dtype), torch.zeros(64, dtype=dtype)
        with raises_fault("uninitialised", r"at element \[0\] of x"):
            kernels.copy[(1,)](x, out, 64, BLOCK=64, OFFSET=0, STRIDE=1)
        kernels.copy[(1,)](out, x, 64, BLOCK=64, OFFSET=0, STRIDE=1)
        kernels.copy[(1,)](x, out, 64, BLOCK=64, OFFSET=0, STRIDE=1)


def test_an_uninitialised_counter():
    with ptx.device("sm_80"):
        counter = torch.empty(1, dtype=torch.int32)
        with raises_fault("uninitialised", r"updates 4 bytes at element \[0\] of out"):
            kernels.count[(3,)](counter)
        counter.zero_()
        kernels.count[(3,)](counter)
        assert counter.item() == 3


def test_copies_of_uninitialised_memory():
    """cp.async and bulk copies read too."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tiles, blocks = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32), ([64, 32], [32, 64], [64, 64])
    for architecture in ("sm_80", "sm_90"):
        with ptx.device(architecture):
            a, b, c = torch.empty(64, 128).half(), torch.empty(128, 64, dtype=torch.float16), torch.zeros(64, 64).half()
            with raises_fault("uninitialised", "copies 16 bytes .* of b"):
                kernels.matmul[(1,)](a, b, c, 64, 64, 128, 128, 64, 64, **tiles)
        kind = {"sm_80": "uninitialised", "sm_90": "uninitialised copy"}[architecture]
        with ptx.device(architecture, on_fault="raise"):
            b = torch.empty(128, 64, dtype=torch.float16)
            maps = [TensorDescriptor.from_tensor(x, block) for x, block in zip((a, b, c), blocks, strict=True)]
            with raises_fault(kind, " of b, .* which was never written"):
                kernels.matmul_descriptors[(1,)](*maps, 128, **tiles)


def test_empty_tensors_outside_of_a_device():
    before = torch.empty, torch.Tensor.new_empty
    x = torch.empty(64)
    with ptx.device("sm_80"):
        kernels.copy[(1,)](x, torch.zeros(64), 64, BLOCK=64, OFFSET=0, STRIDE=1)
        assert torch.compile(lambda: torch.empty(3).zero_() + 1, backend="eager", fullgraph=True)().tolist() == [1] * 3
    assert (torch.empty, torch.Tensor.new_empty) == before


# --------------------------------------------------------------------------------------------- writes without a change


def test_a_write_without_a_change_before_another_block_reads(gpu):
    flag, out = torch.full((1,), 7, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
    kernels.set_and_read[(20,)](flag, out, 7)
    assert out.tolist() == [7] * 20
    with raises_fault("global race", r"at element \[0\] of flag"):
        kernels.set_and_read[(20,)](flag, out, 8)


def test_a_write_without_a_change_beside_one_with():
    """The result depends on the order."""
    text = "setp.eq.b32 %p1, %r2, CHANGES; mov.b32 %r10, 0; @%p1 mov.b32 %r10, 5; st.global.b32 [%rd1], %r10;"
    for block in ("0", "1"):
        expect_fault("global race", text.replace("CHANGES", block), threads=32, blocks=2)
        expect_fault("global race", text.replace("CHANGES", block), threads=1024, blocks=20)
    run(text.replace("CHANGES", "7"), threads=32, blocks=2)


def test_a_write_without_a_change_before_another_warp_reads():
    """In shared memory, where a first write is always a change."""
    text = """
        st.shared.b32 [%r5], VALUE; bar.sync 0;
        st.shared.b32 [%r5], 9; ld.shared.b32 %r10, [%r5]; st.global.b32 [%rd4], %r10;
    """
    assert run(text.replace("VALUE", "9")).tolist() == [9] * 128
    expect_fault("race", text.replace("VALUE", "8"), "with no barrier between")
    first = "setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r5], 0; @!%p1 ld.shared.b32 %r10, [%r5];"
    with pytest.raises(ptx.Fault, match=r"race|uninitialised"):
        run(first)
