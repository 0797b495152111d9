"""The counts of the PTX machine against numbers computed by hand."""

from pathlib import Path

import pytest
import torch
import triton.language as tl

from tests.common import INTERPRETED
from tests.ptx import kernels

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import limit_bytes, ptx
from bench.ptx.driver import run_text
from bench.ptx.rates import GPUS, compute_bounds
from bench.ptx.report import make_record, sum_by_line

HEAD = """.target sm_80
.shared .align 128 .b8 space[8192];
.visible .entry kernel(.param .u64 out, .param .u64 x)
{
    .reg .pred %p<8>; .reg .b32 %r<64>; .reg .b64 %rd<32>;
    ld.param.b64 %rd1, [out]; ld.param.b64 %rd2, [x];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r4, %r2, %r3, %r1;
    mov.b32 %r5, space;
"""


def run(body: str, out: torch.Tensor, x: torch.Tensor, threads: int = 128, blocks: int = 1):
    return run_text(HEAD + body + " ret; }", out, x, grid=(blocks,), threads=threads)


def make_aligned(n: int) -> torch.Tensor:
    """float32 elements, aligned to 128 bytes."""
    whole = torch.randn(n + 32)
    return whole[-whole.data_ptr() % 128 // 4 :][:n]


COPY = """
    mul.lo.s32 %r10, %r4, STRIDE; add.s32 %r10, %r10, OFFSET; mul.wide.u32 %rd3, %r10, 4; add.s64 %rd4, %rd2, %rd3;
    ld.global.b32 %r11, [%rd4];
    mul.wide.u32 %rd5, %r4, 4; add.s64 %rd6, %rd1, %rd5; st.global.b32 [%rd6], %r11;
"""


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [
        (1, 0, 4),  # 32 lanes of 4 bytes: 128 bytes in a row
        (1, 1, 5),  # begins 4 bytes late: one sector more
        (2, 0, 8),  # every second number
        (8, 0, 32),  # a sector for each lane
        (9, 0, 32),
        (0, 0, 1),  # all lanes read one number
    ],
)
def test_vector_copy(stride, offset, sectors):
    """4 blocks of 4 warps: 16 loads and 16 stores; a store is 4 sectors."""
    x, out = make_aligned(512 * max(stride, 1) + 8), make_aligned(512)
    counts = run(COPY.replace("STRIDE", str(stride)).replace("OFFSET", str(offset)), out, x, blocks=4)
    assert torch.equal(out, x[offset:][: 512 * stride : stride] if stride else x[:1].expand(512))
    assert counts.total("global_requests") == 32
    assert counts.total("global_sectors") == 16 * sectors + 16 * 4
    assert counts.total("global_bytes") == 2 * 512 * 4
    touched = {1: 512 // 8 + (offset > 0), 2: 128, 8: 512, 9: 512, 0: 1}[stride]
    assert (counts.read_bytes, counts.written_bytes) == (touched * 32, 512 * 4)
    assert counts.sum_by_pipe()["memory"] == 32
    assert counts.total("issued") == 16 * (7 + 5 + 3 + 1)  # head, load, store, ret


def test_vector_copy_of_triton():
    """2,048 numbers, 4 a lane: one load and one store of 16 bytes a lane, 16 sectors each."""
    x, out = make_aligned(2048), make_aligned(2048)
    with ptx.device("sm_80") as gpu:
        kernels.copy[(4,)](x, out, 2048, BLOCK=512, OFFSET=0, STRIDE=1)
    counts = gpu.launches[0].counts
    assert counts.total("global_requests") == 2 * 16
    assert counts.total("global_sectors") == 2 * 16 * 16
    assert (counts.read_bytes, counts.written_bytes) == (8192, 8192)


def test_traffic_of_each_tensor():
    """Each of 4 blocks reads the same 128 numbers of x and writes its own of out."""
    x, out = make_aligned(128), make_aligned(512)
    body = """
        mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3; ld.global.b32 %r11, [%rd4];
        mul.wide.u32 %rd5, %r4, 4; add.s64 %rd6, %rd1, %rd5; st.global.b32 [%rd6], %r11;
    """
    traffic = {t.name: t for t in run(body, out, x, blocks=4).tensors}
    assert traffic["argument 0"] == ("argument 0", 2048, 2048, 2048)
    assert traffic["argument 1"] == ("argument 1", 512, 4 * 512, 512)


TRANSPOSE = """
    shr.u32 %r10, %r1, 5; and.b32 %r11, %r1, 31;
    mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3; ld.global.b32 %r12, [%rd4];
    mad.lo.s32 %r13, %r10, WIDTH, %r11; shl.b32 %r13, %r13, 2; add.s32 %r13, %r13, %r5; st.shared.b32 [%r13], %r12;
    bar.sync 0;
    mad.lo.s32 %r14, %r11, WIDTH, %r10; shl.b32 %r14, %r14, 2; add.s32 %r14, %r14, %r5; ld.shared.b32 %r15, [%r14];
    add.s64 %rd5, %rd1, %rd3; st.global.b32 [%rd5], %r15;
"""


@pytest.mark.parametrize(("width", "wavefronts"), [(32, 32), (33, 1), (34, 2), (36, 4), (40, 8)])
def test_transpose_through_shared_memory(width, wavefronts):
    """A tile of 32 by 32 elements: those of a column are `width` words apart: in one bank without padding, in all 32
    banks with one word of it."""
    x, out = make_aligned(1024), make_aligned(1024)
    counts = run(TRANSPOSE.replace("WIDTH", str(width)), out, x, threads=1024)
    assert torch.equal(out.view(32, 32), x.view(32, 32).T)
    assert counts.total("shared_requests") == 64
    assert counts.total("shared_wavefronts") == 32 + 32 * wavefronts
    assert counts.total("shared_ideal") == 64
    assert counts.sum_by_opcode()["bar.sync"] == 32


@pytest.mark.parametrize(
    ("access", "wavefronts"),
    [
        ("shl.b32 %r10, %r1, 4; add.s32 %r10, %r10, %r5; st.shared.v4.b32 [%r10], {%r1, %r1, %r1, %r1};", 4),
        ("shl.b32 %r10, %r1, 3; add.s32 %r10, %r10, %r5; st.shared.v2.b32 [%r10], {%r1, %r1};", 2),
        ("shl.b32 %r10, %r1, 1; add.s32 %r10, %r10, %r5; cvt.u16.u32 %rs1, %r1; st.shared.b16 [%r10], %rs1;", 1),
        ("shl.b32 %r10, %r1, 7; add.s32 %r10, %r10, %r5; st.shared.b32 [%r10], %r1;", 32),  # one bank
        ("shl.b32 %r10, %r1, 5; add.s32 %r10, %r10, %r5; st.shared.v4.b32 [%r10], {%r1, %r1, %r1, %r1};", 8),
        ("st.shared.v4.b32 [%r5], {%r3, %r3, %r3, %r3};", 4),  # one place, for 8 lanes at a time
    ],
)
def test_wavefronts(access, wavefronts):
    """One warp: 16-byte accesses are served for 8 lanes at a time, 8-byte accesses for 16."""
    counts = run(".reg .b16 %rs<2>; " + access, make_aligned(32), make_aligned(32), threads=32)
    assert counts.total("shared_requests") == 1
    assert counts.total("shared_wavefronts") == wavefronts


def test_matrix_loads():
    """ldmatrix.x4 takes four matrices of eight rows of 16 bytes: four wavefronts where the rows lie in a row, 32 where
    they all begin in one bank."""
    fill = "shl.b32 %r10, %r1, 4; add.s32 %r10, %r10, %r5; " + " ".join(
        f"st.shared.v4.b32 [%r10+{512 * i}], {{%r1, %r1, %r1, %r1}};" for i in range(8)
    )
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r11];"
    for shift, wavefronts in ((4, 4), (7, 32)):
        place = f"bar.warp.sync -1; shl.b32 %r11, %r1, {shift}; add.s32 %r11, %r11, %r5;"
        counts = run(fill + place + load, make_aligned(32), make_aligned(32), threads=32)
        assert counts.total("shared_wavefronts") == 8 * 4 + wavefronts


REDUCTION = """
    mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3; ld.global.b32 %r10, [%rd4];
    STEPS
    and.b32 %r12, %r1, 31; shr.u32 %r13, %r1, 5; shl.b32 %r14, %r13, 2; add.s32 %r14, %r14, %r5;
    setp.eq.b32 %p1, %r12, 0; @%p1 st.shared.b32 [%r14], %r10;
    bar.sync 0;
    setp.ne.b32 %p2, %r1, 0; @%p2 bra OVER;
    ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r5];
    add.f32 %r24, %r20, %r21; add.f32 %r25, %r22, %r23; add.f32 %r26, %r24, %r25; st.global.b32 [%rd1], %r26;
    OVER:
"""


def test_reduction():
    """128 numbers: five shuffles in each of four warps, four partial sums in shared memory, three additions of one
    lane. Only the first warp's branch parts its lanes."""
    steps = " ".join(f"shfl.sync.bfly.b32 %r11, %r10, {n}, 31, -1; add.f32 %r10, %r10, %r11;" for n in (16, 8, 4, 2, 1))
    x, out = make_aligned(128), make_aligned(1)
    counts = run(REDUCTION.replace("STEPS", steps), out, x)
    torch.testing.assert_close(out[0], x.sum())
    opcodes = counts.sum_by_opcode()
    assert opcodes["shfl.sync.bfly.b32"] == 4 * 5
    assert opcodes["add.f32"] == 4 * 5 + 3
    assert counts.total("divergent") == 1
    assert counts.total("shared_requests") == 4 + 1
    assert counts.total("shared_wavefronts") == 4 + 1
    assert counts.total("global_sectors") == 4 * 4 + 1
    assert counts.sum_by_pipe()["fma"] == 4 * (5 + 2) + 3  # with the multiply-add and the wide product of the addresses


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_tensor_product(architecture):
    """64 by 64 by 128 in one block: 2 * 64 * 64 * 128 FLOPs, 4,096 an mma.m16n8k16, 131,072 a wgmma.m64n64k16."""
    a, b, c = torch.randn(64, 128).half(), torch.randn(128, 64).half(), torch.zeros(64, 64).half()
    with ptx.device(architecture) as gpu:
        kernels.matmul[(1,)](a, b, c, 64, 64, 128, 128, 64, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, ACC=tl.float32)
    counts = gpu.launches[0].counts
    flops = 2 * 64 * 64 * 128
    assert counts.total("flops") == flops
    products = flops // 4096 if architecture == "sm_80" else 4 * flops // 131072  # of four warps
    assert counts.sum_by_pipe()["tensor"] == products
    assert (counts.read_bytes, counts.written_bytes) == (2 * 64 * 128 * 2, 64 * 64 * 2)
    tensor = next(b for b in compute_bounds(counts, architecture, 1) if b.name == "tensor cores")
    gpu_rates = GPUS[architecture]
    assert tensor.microseconds == pytest.approx(flops / (gpu_rates.tensor["f16"] * 1e6 / gpu_rates.sms))


def test_lines_add_up():
    """Every count is on a line of the source, and the line of the dot product has the FLOPs."""
    a, c = torch.randn(64, 64).half(), torch.zeros(64, 64).half()
    with ptx.device("sm_80") as gpu:
        kernels.matmul[(1,)](a, a, c, 64, 64, 64, 64, 64, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
    launch = gpu.launches[0]
    lines = sum_by_line(launch.counts)
    for field in launch.counts.FIELDS:
        assert sum(sums[field] for sums in lines.values()) == launch.counts.total(field)
    (where,) = [place for place, sums in lines.items() if sums["flops"]]
    source = Path(kernels.__file__).read_text(encoding="utf-8").splitlines()
    assert where[0] == kernels.__file__
    assert "tl.dot(x, y, acc" in source[where[1] - 1]
    x, out = torch.randn(4, 100), torch.empty(4, 100)
    with ptx.device("sm_80") as gpu:
        kernels.softmax[(4,)](x, out, 100, BLOCK=128)  # its max and sum are functions of Triton's library
    assert {Path(file).name for file, _ in sum_by_line(gpu.launches[0].counts)} == {"kernels.py"}
    found = make_record(launch)
    assert found["flops"] == 2 * 64**3
    assert found["bounds_us"][found["bound"]] == max(found["bounds_us"].values())


@pytest.mark.parametrize("page_size", [None, 16])
def test_decoding_moves_the_cache_once(page_size):
    """Each key and value once, in whole sectors, 16 bytes a lane. Besides, the workspace: of each of 32 splits and 4
    rows 130 numbers, written and read."""
    launches, needed = limit_bytes.run_decode(16384, page_size)
    attend, merge = (launch.counts for launch in launches)
    copies = [row for instruction, row in attend.rows() if instruction.op == "cp.async.cg.shared.global"]
    assert sum(row["global_bytes"] for row in copies) == 2 * 16384 * 128 * 2
    assert sum(row["global_sectors"] for row in copies) == 2 * 16384 * 128 * 2 // 32
    assert sum(row["global_requests"] for row in copies) == 2 * 16384 * 128 * 2 // 512
    workspace = 32 * 4 * 130 * 4
    assert attend.written_bytes == workspace
    table = 0 if page_size is None else 1024 * 4
    moved = sum(counts.read_bytes + counts.written_bytes for counts in (attend, merge))
    assert needed + 2 * workspace + table <= moved <= needed + 2 * workspace + table + 4 * 32
    assert moved <= 1.02 * needed


def test_a_page_table_is_read_once_a_row():
    """And not once for each of its columns: 4 bytes for each key of a tile."""
    (attend, _), _ = limit_bytes.run_decode(512, 16)
    entries = [row for instruction, row in attend.counts.rows() if instruction.op == "cp.async.ca.shared.global"]
    assert sum(row["global_bytes"] for row in entries) == 512 * 4


def test_programs_past_the_end_of_a_row_cost_nothing():
    """A grid from the capacity, as a CUDA graph has it."""
    (tight, *_), _ = limit_bytes.run_decode(512, None)
    (roomy, merge), _ = limit_bytes.run_decode(512, None, 100_000)
    assert (tight.grid[0], roomy.grid[0]) == (2, 32)
    assert roomy.counts.read_bytes == tight.counts.read_bytes
    stored, also_stored = (
        sum(row["global_bytes"] for instruction, row in launch.counts.rows() if instruction.op.startswith("st.global"))
        for launch in (tight, roomy)
    )
    assert stored == also_stored == 2 * 4 * 130 * 4
    left = (roomy.counts.total("issued") - tight.counts.total("issued")) / (30 * 4)
    assert left < 60  # instructions of a warp that leaves
    assert merge.counts.read_bytes <= 2 * 4 * 130 * 4 + 16 * 32
