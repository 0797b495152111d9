"""What compiles the kernels of a call ahead of time, and checks what the compiler made."""

import contextlib

import torch
from torch.nn.attention.flex_attention import create_block_mask

from bench import compiled
from bench.descriptors import find_lost_descriptors
from bench.sass import find_full_tile_loops
from flashattn.backends import triton as backend
from flashattn.backends.triton_hopper import use_plain_kernels
from flashattn.cache import CacheView, Rotary
from flashattn.kernels import compiler, configs, norm_configs
from flashattn.kernels.precision import choose_input_precision
from flashattn.protocol import Saved, SavedNorm, Tangents
from flashattn.score import Norm, Score
from flashattn.score_mod import read_block_mask, trace

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
ATTENTION_KERNELS = ["attention_forward", "attention_backward_q", "attention_backward_kv"]


def compile_attention(
    architecture, head_dim, dtype=torch.bfloat16, causal=True, lengths=False, head_dim_v=None, window=None,
    plain=True, **features,
):  # fmt: skip
    """All three kernels, four with a bias, as a launch on these tensors would compile them; plain: as if there were
    none in roles, which take the assembler ten times as long and of which `test_machine_code.py` has more."""
    torch.use_deterministic_algorithms(False)
    q = torch.empty(2, 4, 512, head_dim, dtype=dtype)
    k = torch.empty(2, 2, 512, head_dim, dtype=dtype)
    v = torch.empty(2, 2, 512, head_dim_v or head_dim, dtype=dtype)
    some = torch.zeros(2, dtype=torch.int32) if lengths else None
    score = Score(0.125, window, 0 if causal else None, some, some, **features)
    with compiled.compile_for(architecture) as kernels, use_plain_kernels() if plain else contextlib.nullcontext():
        out, lse, rest = backend.forward(q, k, v, score)
        saved = Saved(q, k, v, out, lse, rest)
        backend.backward(out, lse if lengths else None, saved, score, "bias" in features, [])
    names = [kernel.name.removesuffix("_hopper") for kernel in kernels]
    assert names == ATTENTION_KERNELS + ["attention_backward_bias"] * ("bias" in features)
    if plain:
        check_shared_bytes(kernels, q, k, v, score)
    return kernels


def compile_derivatives(
    architecture, head_dim, dtype=torch.bfloat16, causal=True, head_dim_v=None, given="qkv", **features
):
    """`attention_jvp`, `attention_hvp_q`, `_kv` and, with a bias, `_bias`. given: what has a tangent, of q, k, v, bias,
    sinks and captured tensors, by first letters."""
    torch.use_deterministic_algorithms(False)
    q = torch.empty(2, 4, 512, head_dim, dtype=dtype)
    k = torch.empty(2, 2, 512, head_dim, dtype=dtype)
    v = torch.empty(2, 2, 512, head_dim_v or head_dim, dtype=dtype)
    score = Score(0.125, None, 0 if causal else None, **features)
    captured = () if score.score_mod is None else score.score_mod.captured
    of = zip("qkvbs", (q, k, v, score.bias, score.sinks), strict=True)
    tangents = Tangents(
        *(x if name in given else None for name, x in of), tuple(x if "c" in given else None for x in captured)
    )
    with compiled.compile_for(architecture) as kernels:
        out, lse, rest, *moved = backend.jvp(q, k, v, score, tangents)
        backend.hvp(out, None, Saved(q, k, v, out, lse, rest), score, tangents, *moved, "bias" in features, [])
    bias = ["attention_hvp_bias"] * ("bias" in features)
    assert [kernel.name for kernel in kernels] == ["attention_jvp", "attention_hvp_q", "attention_hvp_kv", *bias]
    check_shared_bytes(kernels, q, k, v, score, tangents)
    return kernels


# The pass whose tiles a kernel has.
DIRECTIONS = {direction: direction for direction in configs.ATTENTION}
DIRECTIONS |= dict(backward_bias="backward_q", hvp_bias="hvp_q")


def check_shared_bytes(kernels, q, k, v, score, tangents=None):
    """Each kernel was compiled to use at most as much as the arithmetic allows, by which tiles are chosen."""
    architecture, has_score_mod = kernels[0].architecture, score.score_mod is not None
    pairs, itemsize = backend.count_pair_costs(score, tangents), q.element_size()
    with compiled.compile_only(architecture):
        precision, cols = (
            choose_input_precision(q, v, tangents is not None),
            configs.choose_cols(q.shape[-1], v.shape[-1]),
        )
    for kernel in kernels:
        direction = DIRECTIONS[kernel.name.removeprefix("attention_")]
        tiles = configs.fit_tiles(architecture, direction, cols, itemsize, pairs, has_score_mod, precision)
        allowed = configs.count_shared_bytes(architecture, direction, tiles, cols, itemsize, pairs, precision)
        assert kernel.shared_bytes <= allowed, kernel


def check(kernels, tensor_cores=True, spills=True):
    """Without spills: none where time goes, in loops over whole tiles."""
    for kernel in kernels:
        assert 0 < kernel.shared_bytes <= configs.SHARED_MEMORY[kernel.architecture], kernel
        if tensor_cores:
            assert kernel.tensor_instructions > 0, kernel
        if kernel.architecture == "sm_90":
            assert not find_lost_descriptors(kernel.code), kernel
        if not spills and kernel.tensor_instructions:
            assert not any(loop.mix.get("local") for loop in find_full_tile_loops(kernel.code)), kernel
        elif not spills:
            assert (kernel.spills, kernel.stack_bytes) == (0, 0), kernel


def check_float32_on_tensor_cores(setting, architecture, head_dim, **features):
    """At a setting of PyTorch's precision: shared memory is enough, and sm_100's tensor memory, without which a kernel
    compiles to a trap; where three products do not fit in that, float32 is multiplied without tensor cores."""
    torch.set_float32_matmul_precision(setting)
    try:
        kernels = compile_attention(architecture, head_dim, torch.float32, **features)
    finally:
        torch.set_float32_matmul_precision("highest")
    check(kernels, tensor_cores=not (architecture == "sm_100" and compiler.WASTES_TENSOR_MEMORY))
    assert all(kernel.registers > 32 for kernel in kernels)


CANDIDATES = [
    (direction, head_dim, row)
    for direction, by_dim in configs.HOPPER_CANDIDATES.items()
    for head_dim, rows in by_dim.items()
    for row in rows
]


FEATURES = {
    "softcap": dict(softcap=20.0),
    "slopes": dict(alibi_slopes=torch.ones(1, 4)),
    "mask": dict(mask=torch.ones(1, 1, 512, 512, dtype=torch.bool)),
    "bias": dict(bias=torch.ones(1, 4, 512, 512, dtype=torch.bfloat16)),
    "sinks": dict(sinks=torch.ones(4)),
    "dropout": dict(dropout_p=0.1, seed=torch.tensor(5)),
}


def check_packed_sequences(architecture, head_dim):
    starts = torch.zeros(2, 3, dtype=torch.int32)
    usual = (architecture, head_dim) in (("sm_80", 64), ("sm_90", 64), ("sm_90", 128))
    packed = dict(cu_seqlens=starts, max_seqlen_q=300, max_seqlen_k=300)
    check(compile_attention(architecture, head_dim, **packed), spills=not usual)


TABLE = torch.ones(4, 1024)
DOCUMENTS = torch.zeros(2, 512, dtype=torch.int32)


def relative_bias(score, b, h, i, j):
    return 20 * torch.tanh(score / 20) + TABLE[h, i - j + 512]


def check_score_mod_and_block_mask(architecture, what):
    features = {}
    if what != "block_mask":
        features["score_mod"] = trace("score_mod", relative_bias, 1)
    if what != "score_mod":
        block_mask = create_block_mask(
            lambda b, h, i, j: (DOCUMENTS[b, i] == DOCUMENTS[b, j]) & (i >= j), 2, None, 512, 512, "cpu"
        )
        features["block_mask"] = read_block_mask(block_mask, 2, 4, 512, 512, torch.device("cpu"))
    usual = what == "score_mod" and architecture != "gfx942"
    check(compile_attention(architecture, 64, causal=False, **features), spills=not usual)


DECODING = {
    "plain": {},
    "window_sinks": dict(left=100, sinks=torch.ones(4)),
    "modified": dict(softcap=20.0, alibi_slopes=torch.ones(1, 4), mask=torch.ones(2, 1, 1, 512, dtype=torch.bool)),
}


def check_decoding(architecture, features, dtype, paged):
    """One new token against a cache of 512, of 4 query heads on 2 key/value heads, rotated."""
    torch.use_deterministic_algorithms(False)
    q, new = torch.empty(2, 4, 1, 128, dtype=dtype), torch.empty(2, 2, 1, 128, dtype=dtype)
    cache = torch.empty(64 if paged else 2, 2, 16 if paged else 512, 128, dtype=dtype)
    table = torch.zeros(2, 32, dtype=torch.int32) if paged else None
    lengths = torch.full((2,), 512, dtype=torch.int32)
    cached = CacheView(cache, cache, table, lengths, lengths, 512)
    rotary = Rotary(torch.empty(512, 32), torch.empty(512, 32), interleaved=paged)
    score = Score(0.1, right=0, kv_lengths=lengths, **DECODING[features])
    with compiled.compile_for(architecture) as kernels:
        q = backend.append(q, new, new, cached, None, rotary)
        backend.decode(q, cached, score)
    assert [kernel.name for kernel in kernels] == ["rotate_and_store", "attention_decode", "attention_merge"]
    for kernel in kernels:
        assert kernel.shared_bytes <= configs.SHARED_MEMORY[architecture]
        if architecture in ("sm_80", "sm_90") and dtype == torch.bfloat16:
            assert (kernel.spills, kernel.stack_bytes) == (0, 0), kernel
    if dtype == torch.bfloat16:
        assert kernels[1].tensor_instructions > 0
    pairs = backend.count_pair_costs(score)
    tiles = configs.fit_tiles(architecture, "decode", (128, 128), dtype.itemsize, pairs, False)
    most = configs.count_shared_bytes(architecture, "decode", tiles, (128, 128), dtype.itemsize, pairs)
    least = (tiles.stages - 1) * tiles.block_n * 2 * 128 * dtype.itemsize  # with pages too as many keys are under way
    assert least <= kernels[1].shared_bytes <= most


def check_norms(architecture, width):
    """LayerNorm with every option, and RMSNorm per head with none."""
    torch.use_deterministic_algorithms(False)
    x, parameter = torch.empty(8, 4, width, dtype=torch.bfloat16), torch.empty(width)
    layer = Norm(True, 1e-5, 1.0, 0.1, torch.tensor(5))
    rms = Norm(False, 1e-6)
    with compiled.compile_for(architecture) as kernels:
        y, hidden, mean, rstd = backend.norm_forward(x, x, parameter, parameter, torch.float32, True, layer)
        saved = SavedNorm(hidden, parameter, parameter, mean, rstd)
        backend.norm_backward(y, hidden, saved, x.dtype, torch.float32, layer)
        weight = torch.empty(4, width, dtype=torch.bfloat16)
        y, _, mean, rstd = backend.norm_forward(x, None, weight, None, x.dtype, False, rms)
        backend.norm_backward(y, None, SavedNorm(x, weight, None, rstd, rstd), x.dtype, None, rms)
    means = ["norm_backward_means"] * (width > norm_configs.NORM_COLS["backward"])
    expected = ["norm_forward", *means, "norm_backward", "norm_backward_parameters"]
    assert [kernel.name for kernel in kernels] == expected * 2
    for kernel in kernels:
        assert kernel.shared_bytes <= configs.SHARED_MEMORY[architecture]
        if architecture in ("sm_80", "sm_90"):
            assert (kernel.spills, kernel.stack_bytes) == (0, 0), kernel
