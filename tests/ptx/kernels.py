"""Ordinary Triton kernels, written for the tests of the PTX machine."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr, OFFSET: tl.constexpr, STRIDE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * STRIDE + OFFSET, i < n), i < n)


@triton.jit
def softmax(x, out, cols, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * cols + i, i < cols, other=-float("inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * cols + i, value / tl.sum(value, 0), i < cols)


@triton.jit
def matmul(
    a, b, c, M, N, K, stride_a, stride_b, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr = tl.float32,
):  # fmt: skip
    """A pipelined loop: three stages of asynchronous copies."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(a + rows[:, None] * stride_a + k, (rows[:, None] < M) & (k < K), other=0.0)
        y = tl.load(b + k[:, None] * stride_b + cols, (k[:, None] < K) & (cols < N), other=0.0)
        acc = tl.dot(x, y, acc, out_dtype=ACC)
    tl.store(c + rows[:, None] * stride_c + cols, acc.to(c.dtype.element_ty), (rows[:, None] < M) & (cols < N))


@triton.jit
def matmul_descriptors(a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=3):
        acc = tl.dot(a.load([row, k]), b.load([k, col]), acc)
    c.store([row, col], acc.to(c.dtype))


@triton.jit
def matmul_made_descriptors(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tensor maps are made on the device, in a workspace."""
    a = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    c = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    matmul_descriptors(a, b, c, K, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def matmul_specialised(a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """On sm_90 one warp group copies and two multiply; mbarriers synchronise them."""
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=2, warp_specialize=True):
        acc = tl.dot(a.load([row, k]), b.load([k, col]), acc)
    c.store([row, col], acc.to(c.dtype))


@triton.jit
def copy_box(x, out):
    out.store([0, 0, 0], x.load([1, 2, 4]))  # of float32: 16 bytes into a row


@triton.jit
def copy_after_another_launch(x, out, BLOCK: tl.constexpr):
    """Programmatic dependent launch: griddepcontrol."""
    i = tl.arange(0, BLOCK)
    tl.extra.cuda.gdc_wait()
    value = tl.load(x + i)
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + i, value)


@triton.jit
def histogram(x, bins, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(bins + tl.load(x + i, i < n), 1, i < n)


@triton.jit
def histogram_shared(x, bins, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(bins + tl.arange(0, BINS), tl.histogram(tl.load(x + i, i < n, other=0), BINS, mask=i < n))


@triton.jit
def scan(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.cumsum(tl.load(x + i), 0))


@triton.jit
def sort(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.sort(tl.load(x + i)))


@triton.jit
def argmax(x, out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out + row, tl.argmax(tl.load(x + row * BLOCK + tl.arange(0, BLOCK)), 0))


@triton.jit
def dropout(x, out, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n)
    tl.store(out + i, tl.where(tl.rand(seed, i) > p, value / (1 - p), 0.0), i < n)


@triton.jit
def transpose(x, out, N, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(x + rows[:, None] * N + cols)
    tl.store(out + cols[:, None] * N + rows, tl.trans(tile))


@triton.jit
def sum_columns(x, out, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
    tl.store(out + c, tl.sum(tl.load(x + r[:, None] * cols + c), 0))


@triton.jit
def gather(x, index, out, BLOCK: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.gather(tl.load(x + tl.arange(0, BLOCK)), tl.load(index + i), 0))


@triton.jit
def cast(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n).to(out.dtype.element_ty), i < n)


@triton.jit
def apply(x, out, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, FUNCTION(tl.load(x + i, i < n)), i < n)


@triton.jit
def apply_two(x, y, out, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, FUNCTION(tl.load(x + i, i < n), tl.load(y + i, i < n, other=1)), i < n)


@triton.jit
def atomics(x, maximum, minimum, total, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n)
    tl.atomic_max(maximum + i % 8, value, i < n)
    tl.atomic_min(minimum + i % 8, value, i < n)
    tl.atomic_add(total + i % 8, value, i < n)


@triton.jit
def count_under_lock(lock, out):
    """Blocks spin on a lock and update a number with plain loads and stores."""
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(out, tl.load(out) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def endless(x):
    while tl.load(x) == 0:
        tl.store(x, 0)


@triton.jit
def asserts(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.device_assert(tl.load(x + i, i < n, other=0) < 10, "too big")


# Functions for `apply`; test_kernels.py has the NumPy equivalents.
@triton.jit
def sin_cos(x):
    return tl.sin(x) + 2 * tl.cos(x)


@triton.jit
def exponentials(x):
    return tl.exp(x) + tl.exp2(x) + libdevice.expm1(x)


@triton.jit
def logarithms(x):
    x = tl.abs(x) + 0.01
    return tl.log(x) + tl.log2(x) + libdevice.log1p(x)


@triton.jit
def roots(x):
    x = tl.abs(x)
    return tl.sqrt(x) + tl.rsqrt(x + 1) + tl.sqrt_rn(x) + tl.div_rn(x, 3.0)


@triton.jit
def error_function(x):
    return tl.erf(x) + libdevice.tanh(x) + libdevice.pow(tl.abs(x), 1.5)


@triton.jit
def roundings(x):
    return tl.floor(x) + 2 * tl.ceil(x) + 4 * libdevice.rint(x) + libdevice.round(x)


@triton.jit
def double_mathematics(x):
    return tl.sin(x) + tl.exp(x) + tl.sqrt(tl.abs(x)) + tl.floor(x) + x / 3.0


@triton.jit
def integers(x, y):
    return (
        x * y
        + x // (y | 1)
        + x % (y | 1)
        + (x >> 3)
        + (x << 2)
        + (x ^ y)
        + (x & y)
        + tl.minimum(x, y)
        + tl.maximum(x, y)
    )


@triton.jit
def high_product(x, y):
    return tl.umulhi(x, y)


# ------------------------------------------------------------------------------------------------ forms of instructions


@triton.jit
def copy_with_hints(x, out, n, BLOCK: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n, eviction_policy=LOAD)
    tl.store(out + i, value, i < n, eviction_policy=STORE)


@triton.jit
def copy_with_modifiers(x, out, n, BLOCK: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n, cache_modifier=LOAD), i < n, cache_modifier=STORE)


@triton.jit
def matmul_with_hints(a, b, c, K, N, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Asynchronous copies with a cache policy."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(a + rows[:, None] * K + k, eviction_policy="evict_last")
        y = tl.load(b + k[:, None] * N + cols, eviction_policy="evict_first")
        acc = tl.dot(x, y, acc)
    tl.store(c + rows[:, None] * N + cols, acc)


@triton.jit
def prints(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.device_print("value", value)
    tl.device_print("only text")
    if tl.program_id(0) == 1:
        tl.device_print("hexed", i, hex=True)
        tl.device_print("n", n)
        tl.device_print("long", i.to(tl.int64) - (1 << 40))


@triton.jit(noinline=True)
def sum_and_product(x, y):
    return x + y, x * y


@triton.jit
def calls_a_function(x, y, out):
    """A function that is not inlined and returns a pair, as an array of bytes."""
    i = tl.program_id(0)
    total, product = sum_and_product(tl.load(x + i), tl.load(y + i))
    total, product = sum_and_product(total, product)
    tl.store(out + i, total - product)


# ------------------------------------------------------------------------------------------------ provenance


@triton.jit
def copy_by_table(pointers, sizes, out, BLOCK: tl.constexpr, OVER: tl.constexpr):
    """Each program copies from the next pointer of a table. OVER: excess elements."""
    group, i = tl.program_id(0), tl.arange(0, BLOCK)
    source = tl.load(pointers + group).to(tl.pointer_type(tl.float32))
    n = tl.load(sizes + group) + OVER
    tl.store(out + group * BLOCK + i, tl.load(source + i, i < n, other=0.0))


@triton.jit
def fill_by_table(pointers, BLOCK: tl.constexpr):
    group, i = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(tl.load(pointers + group).to(tl.pointer_type(tl.float32)) + i, group + i * 1.0)


@triton.jit
def copy_by_number(address, out, BLOCK: tl.constexpr):
    """The address is passed as an integer."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(address.to(tl.pointer_type(tl.float32)) + i))


@triton.jit
def copy_rows(x, out, stride, COLS: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, COLS)
    tl.store(out + row * COLS + i, tl.load(x + row * stride + i))


@triton.jit
def copy_one_of(x, y, which, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.where(tl.load(which + i) != 0, x + i, y + i)
    tl.store(out + i, tl.load(source))


@triton.jit
def walk(x, out, n, BLOCK: tl.constexpr):
    """A pointer that a loop advances."""
    total = tl.zeros((BLOCK,), tl.float32)
    pointer = x + tl.arange(0, BLOCK)
    for _ in range(0, n, BLOCK):
        total += tl.load(pointer)
        pointer += BLOCK
    tl.store(out + tl.arange(0, BLOCK), total)


@triton.jit
def add_to(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(out + i, i < n) + tl.load(x + i, i < n), i < n)


@triton.jit
def count(out):
    tl.atomic_add(out, 1)


@triton.jit
def set_and_read(flag, out, value):
    """Each program writes the flag and reads it."""
    tl.store(flag, value)
    tl.store(out + tl.program_id(0), tl.load(flag))


@triton.jit
def copy_beside(x, y, out, n, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + OFFSET, i < n) + tl.load(y + i, i < n), i < n)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


# ------------------------------------------------------------------------------------------------ endless loops


@triton.jit
def count_past(out, n, STEP: tl.constexpr):
    """A counter that skips the number at which it would stop."""
    i = tl.load(out)
    while i != n:
        i += STEP
    tl.store(out, i)


@triton.jit
def count_in_memory(out):
    while tl.load(out) >= 0:
        tl.store(out, tl.load(out) + 1)


@triton.jit
def take_lock_twice(lock):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass


@triton.jit
def wait_for_next(flags, n):
    """Each program but the last waits for the next one."""
    i = tl.program_id(0)
    if i < n - 1:
        while tl.atomic_add(flags + i + 1, 0) == 0:
            pass
    tl.atomic_xchg(flags + i, 1)


@triton.jit
def halve(x, out, n):
    """A long loop of arithmetic."""
    value = tl.load(x)
    for _ in range(n):
        value = value * 0.999 + 1.0
    tl.store(out, value)


# ------------------------------------------------------------------------------------------------ last bits


@triton.jit
def dot_rows(x, weight, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One element a thread: each adds its own product, fused, to the rounded product of another."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
    tl.store(out + r, tl.sum(tl.load(x + r[:, None] * COLS + c) * tl.load(weight + c), 1))
