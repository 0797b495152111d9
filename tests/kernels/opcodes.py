"""What every kernel of the project compiles to, in representative configurations: a hash of its opcodes, its registers,
spills and shared memory. `record_opcodes.py` writes the table, `test_opcodes.py` holds kernels to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from bench import sass
from bench.compiled import Kernel, compile_for
from bench.gpu.kernel_hashes import fix_hashes
from flashattn.backends import triton_hopper
from flashattn.cache import Rotary
from flashattn.kernels import tune
from flashattn.kernels.configs import Roles

TABLE = Path(__file__).parent / "opcodes.json"
ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
AMD_OPCODE = re.compile(r"^\t([a-z]\w+)", re.M)
BF16 = torch.bfloat16


class Code(NamedTuple):
    """Of a compiled kernel. spills: instructions that store to or load from local memory."""

    opcodes: int
    hash: str
    registers: int
    spills: int
    shared_bytes: int


class Case(NamedTuple):
    run: Callable[[], object]
    architectures: tuple[str, ...] = ARCHITECTURES


def summarise_code(kernel: Kernel) -> Code:
    if kernel.architecture.startswith("sm_"):
        names = [instruction.name for instruction in sass.parse(kernel.code)[0]]
    else:
        names = AMD_OPCODE.findall(kernel.code)
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
    return Code(len(names), digest, kernel.registers, kernel.spills, kernel.shared_bytes)


def compile_case(name: str, architecture: str) -> dict[str, Code]:
    """The kernels that a case launches."""
    fix_hashes()  # so that an earlier compilation is found whatever this process compiled before
    torch.use_deterministic_algorithms(False)
    with compile_for(architecture) as kernels, flashattn.use_backend("triton"):
        CASES[name].run()
    return {kernel.name: summarise_code(kernel) for kernel in kernels}


def read_table() -> dict[str, dict[str, dict[str, Code]]]:
    """By case, architecture and kernel; empty where it was recorded with another version of Triton."""
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        return {}
    return {
        case: {arch: {name: Code(*code) for name, code in kernels.items()} for arch, kernels in archs.items()}
        for case, archs in table["cases"].items()
    }


def write_table(cases: dict[str, dict[str, dict[str, Code]]]) -> None:
    """A line for each kernel, so that a diff shows which changed."""
    lines = [f'{{"triton": "{triton.__version__}",', f' "fields": {json.dumps(Code._fields)},', ' "cases": {']
    for case, archs in cases.items():
        lines.append(f"  {json.dumps(case)}: {{")
        for arch, kernels in archs.items():
            lines.append(f"    {json.dumps(arch)}: {{")
            rows = [f"      {json.dumps(name)}: {json.dumps(code)}" for name, code in kernels.items()]
            lines += [",\n".join(rows), "    },"]
        lines[-1] = "    }"
        lines.append("  },")
    lines[-1] = "  }"
    TABLE.write_text("\n".join([*lines, " }", "}"]) + "\n")


# ------------------------------------------------------------------------------------------------ the cases


def attention(head_dim=64, dtype=BF16, head_dim_v=None, seq=512, gradients=(), **options) -> None:
    """Forward and backward, 4 query heads on 2 key/value heads. gradients: options that have one."""
    q = torch.empty(2, 4, seq, head_dim, dtype=dtype, requires_grad=True)
    k = torch.empty(2, 2, seq, head_dim, dtype=dtype, requires_grad=True)
    v = torch.empty(2, 2, seq, head_dim_v or head_dim, dtype=dtype, requires_grad=True)
    inputs = [q, k, v, *(options[name].requires_grad_() for name in gradients)]
    out = flashattn.attention(q, k, v, **options)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outs, inputs, [torch.empty_like(x) for x in outs])


def attention_twice(head_dim=64, dtype=BF16, gradients=(), **options) -> None:
    """`attention` of 4 heads, and the derivative of its gradients."""
    inputs = [torch.empty(2, 4, 512, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    inputs += [options[name].requires_grad_() for name in gradients]
    differentiate_twice(flashattn.attention(*inputs[:3], **options), inputs)


def differentiate_twice(outs: torch.Tensor | tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> None:
    outs = outs if isinstance(outs, tuple) else (outs,)
    first = torch.autograd.grad(outs, inputs, [torch.empty_like(x) for x in outs], create_graph=True)
    torch.autograd.grad(first, inputs, [torch.empty_like(x) for x in first], materialize_grads=True)


def packed(head_dim=64, dtype=BF16, **options) -> None:
    q, k, v = (torch.empty(600, heads, head_dim, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    starts = torch.tensor([0, 250, 600], dtype=torch.int32)
    out = flashattn.attention_varlen(q, k, v, starts, starts, 350, 350, **options)
    torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


def callables(with_mod: bool) -> None:
    documents, table = torch.zeros(2, 512, dtype=torch.int32), torch.ones(4, 1024)
    options = {}
    if with_mod:
        options["score_mod"] = lambda score, b, h, i, j: 20 * torch.tanh(score / 20) + table[h, i - j + 512]
    options["block_mask"] = create_block_mask(
        lambda b, h, i, j: (documents[b, i] == documents[b, j]) & (i >= j), 2, None, 512, 512, "cpu"
    )
    attention(**options)


def in_roles(*rows: tuple[str, Roles], **options) -> None:
    """As in a search, whose candidates are compiled too."""
    with contextlib.ExitStack() as stack:
        for direction, row in rows:
            stack.enter_context(tune.force_tiles(direction, row))
        attention(**options)


def plain(run: Callable[[], object]) -> None:
    with triton_hopper.use_plain_kernels():
        run()


def decode(dtype=BF16, seq_q=1, interleaved=False, n=32, **options) -> None:
    cache = flashattn.KVCache(2, 2, 512, 128, dtype=dtype)
    step(cache, dtype, seq_q, interleaved, n, **options)


def paged(dtype=BF16, seq_q=1, interleaved=True, n=32, **options) -> None:
    cache = flashattn.PagedKVCache(64, 16, 2, 128, dtype=dtype)
    step(cache.select([cache.add(), cache.add()]), dtype, seq_q, interleaved, n, **options)


def step(cache, dtype, seq_q, interleaved, n, **options) -> None:
    q, new = torch.empty(2, 4, seq_q, 128, dtype=dtype), torch.empty(2, 2, seq_q, 128, dtype=dtype)
    rotary = Rotary(torch.empty(512, n), torch.empty(512, n), interleaved) if n else None
    flashattn.decode(q, cache, new, new, rotary, **options)


def norm(width: int, rms=False, heads=1, with_residual=False, dtype=BF16, twice=False, **options) -> None:
    x = torch.empty(8, heads, width, dtype=dtype, requires_grad=True)
    shape = (width,) if heads == 1 else (heads, width)
    parameters = [torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(1 if rms else 2)]
    inputs = [x, *parameters]
    if with_residual:
        options["residual"] = torch.empty_like(x).requires_grad_()
        inputs.append(options["residual"])
    y = (flashattn.rms_norm if rms else flashattn.layer_norm)(x, *parameters, **options)
    if twice:
        return differentiate_twice(y, inputs)
    outs = y if isinstance(y, tuple) else (y,)
    torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])


def norm_jvp(width: int) -> None:
    inputs = tuple(torch.empty(*shape, width, dtype=BF16) for shape in ((8,), (), ()))
    torch.func.jvp(flashattn.layer_norm, inputs, inputs)


def lengths() -> torch.Tensor:
    return torch.tensor([400, 512], dtype=torch.int32)


def everything(**more) -> dict:
    return dict(
        window=(300, 0), mask=torch.ones(1, 1, 512, 512, dtype=torch.bool), softcap=20.0, alibi_slopes=torch.ones(4),
        bias=torch.ones(1, 4, 512, 512, dtype=BF16), sinks=torch.ones(4), dropout_p=0.1, seed=5, kv_lengths=lengths(),
        q_lengths=lengths(), return_lse=True, gradients=("bias", "sinks"), **more,
    )  # fmt: skip


SM_80, SM_90 = ("sm_80",), ("sm_90",)
CASES: dict[str, Case] = {
    "causal": Case(lambda: attention(causal=True)),
    "head_dim 128": Case(lambda: attention(128)),
    "head_dim 256, causal": Case(lambda: attention(256, causal=True), SM_90),
    "head_dim 40, 72": Case(lambda: attention(40, head_dim_v=72), SM_80),
    "float32, causal": Case(lambda: attention(dtype=torch.float32, causal=True), SM_80),
    "window": Case(lambda: attention(window=(100, 20))),
    "mask, bias": Case(lambda: attention(
        mask=torch.ones(1, 1, 512, 512, dtype=torch.bool), bias=torch.ones(1, 4, 512, 512, dtype=BF16),
        gradients=("bias",),
    )),
    "softcap, ALiBi": Case(lambda: attention(softcap=20.0, alibi_slopes=torch.ones(4), causal=True)),
    "sinks, dropout": Case(lambda: attention(
        sinks=torch.ones(4), dropout_p=0.1, seed=5, causal=True, gradients=("sinks",)
    )),
    "lengths, lse": Case(lambda: attention(
        kv_lengths=lengths(), q_lengths=lengths(), return_lse=True, causal=True
    )),
    "packed": Case(lambda: packed(causal=True)),
    "block_mask": Case(lambda: callables(False)),
    "score_mod, block_mask": Case(lambda: callables(True)),
    "everything": Case(lambda: attention(128, **everything())),
    # On Hopper: the plain kernels, and other rows of configs.HOPPER.
    "plain, causal": Case(lambda: plain(lambda: attention(causal=True)), SM_90),
    "plain, everything": Case(lambda: plain(lambda: attention(**everything())), SM_90),
    "persistent": Case(lambda: in_roles(("forward", Roles(2, 128, 2, 240, True, True))), SM_90),
    "three consumers": Case(lambda: in_roles(
        ("forward", Roles(3, 64, 3, 160, True, False)), ("backward_q", Roles(3, 64, 3, 160, False, False)),
        ("backward_kv", Roles(2, 32, 3, 240, False, False, shared=True)), causal=True,
    ), SM_90),
    "causal, twice": Case(lambda: attention_twice(causal=True)),
    "everything, twice": Case(lambda: attention_twice(**everything()), SM_80),
    "float32, twice": Case(lambda: attention_twice(128, torch.float32), SM_80),
    "decode": Case(lambda: decode()),
    "decode window, sinks": Case(lambda: decode(window=(100, 0), sinks=torch.ones(4))),
    "decode several": Case(lambda: decode(seq_q=5, n=0, q_lengths=torch.tensor([3, 5]))),
    "decode float32": Case(lambda: decode(torch.float32)),
    "paged": Case(lambda: paged()),
    "paged, modified": Case(lambda: paged(
        softcap=20.0, alibi_slopes=torch.ones(4), mask=torch.ones(2, 1, 1, 1, dtype=torch.bool)
    )),
    "rms_norm": Case(lambda: norm(4096, rms=True)),
    "layer_norm": Case(lambda: norm(4096)),
    "layer_norm everything": Case(lambda: norm(
        1000, with_residual=True, dropout_p=0.1, seed=5, prenorm=True, residual_in_fp32=True, weight_offset=1.0
    )),
    "layer_norm wide": Case(lambda: norm(40000, with_residual=True, prenorm=True)),
    "rms_norm of heads": Case(lambda: norm(128, rms=True, heads=4, dtype=torch.float32)),
    "rms_norm wide": Case(lambda: norm(40000, rms=True)),
    "layer_norm, jvp": Case(lambda: norm_jvp(4096)),
    "layer_norm wide, jvp": Case(lambda: norm_jvp(40000)),
    "layer_norm, twice": Case(lambda: norm(4096, twice=True)),
    "layer_norm wide, twice": Case(lambda: norm(40000, with_residual=True, prenorm=True, twice=True)),
}  # fmt: skip


def jobs(words: list[str]) -> Iterator[tuple[str, str]]:
    """(case, architecture) of those whose "case architecture" holds one of the words; of all without words."""
    for name, case in CASES.items():
        for architecture in case.architectures:
            if not words or any(word in f"{name} {architecture}" for word in words):
                yield name, architecture
