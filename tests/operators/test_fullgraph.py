"""Calls with callables and with caches in one graph of torch.compile: values and gradients are those without it, bit
for bit, and a graph serves other tensors and lengths."""

import functools
import io
import threading

import pytest
import torch
from torch._dynamo import convert_frame
from torch.nn.attention.flex_attention import and_masks
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask
from torch.utils.flop_counter import FlopCounterMode

import flashattn
from flashattn import ops
from flashattn.arguments import build_score
from flashattn.compat.flash_attn import flash_attn_func
from flashattn.compat.flex import flex_attention
from flashattn.compat.sdpa import scaled_dot_product_attention
from tests.common import find_device
from tests.operators.graphs import compiled, no_graphs  # noqa: F401  (a fixture)

OPS = torch.ops.flashattn
BACKENDS = ["cpu", "reference"]
create_block_mask = functools.partial(torch_block_mask, device="cpu", BLOCK_SIZE=16)


pytestmark = pytest.mark.usefixtures("no_graphs")


def inputs(seq: int = 20, requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, heads, seq, 8, dtype=dtype, requires_grad=requires_grad) for heads in (4, 2, 2)]


def causal(b, h, i, j):
    return i >= j


def given(allowed: torch.Tensor):
    return lambda b, h, i, j: allowed[i][j] | (i == j)


def assert_same(found, expected) -> None:
    found, expected = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    for x, y in zip(found, expected, strict=True):
        assert x is y is None or torch.equal(x, y)


# ------------------------------------------------------------------------------------------------ callables


def with_everything(q, k, v, table, weight, mask, block_mask):
    """Tensors from outside and computed in the graph, indexed at once and in a chain, and their sizes."""
    doubled = table * 2

    def mod(score, b, h, i, j):
        row = doubled[h]
        return score * torch.where(i >= j, 1.0, weight[i]) + row[j % row.shape[0]] + table[h, i - j]

    out, lse = flashattn.attention(
        q, k, v, score_mod=mod, block_mask=block_mask, bias=weight[: k.shape[2]], sinks=weight[:4], mask=mask,
        return_lse=True,
    )  # fmt: skip
    return out.square().sum() + lse.sum()


@pytest.mark.parametrize(("backend", "dynamic"), [("cpu", False), ("cpu", True), ("reference", False)])
def test_score_mod_and_block_mask(backend, dynamic):
    step, frames = compiled(with_everything, dynamic), 0
    with flashattn.use_backend(backend):
        for seq, width in ((40, 90), (70, 150)) if dynamic else ((40, 90), (40, 90)):
            tensors = *inputs(seq), torch.randn(4, width, requires_grad=True), torch.randn(80, requires_grad=True)
            allowed = torch.rand(seq, seq) > 0.4
            block_mask = create_block_mask(given(allowed), None, None, seq, seq)
            arguments = *tensors, torch.rand(seq, seq) > 0.1, block_mask
            ours, eager = (torch.autograd.grad(f(*arguments), tensors) for f in (step, with_everything))
            assert_same(ours, eager)
            frames = frames or step.counter.frame_count
    assert step.counter.frame_count == frames


def test_block_mask_alone():
    """Which the CPU engine takes by blocks, backward too; one may be made in the graph."""
    documents = torch.arange(300) // 70
    block_mask = create_block_mask(and_masks(causal, lambda b, h, i, j: documents[i] == documents[j]), 2, 4, 300, 300)

    def step(q, k, v, block_mask):
        made = create_block_mask(causal, None, None, q.shape[2], k.shape[2])
        outs = (flashattn.attention(q, k, v, block_mask=x) for x in (block_mask, made))
        return sum(x.square().sum() for x in outs)

    tensors = inputs(300)
    ours, eager = (torch.autograd.grad(f(*tensors, block_mask), tensors) for f in (compiled(step), step))
    assert_same(ours, eager)


class Slopes(torch.nn.Module):
    """A callable that holds a parameter, and has a method that is one."""

    def __init__(self):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.randn(4))

    def mod(self, score, b, h, i, j):
        return score - self.slopes[h] * (i - j).abs()

    def forward(self, score, b, h, i, j):
        return score * self.slopes[h]


def capped(score, b, h, i, j, cap):
    return cap * torch.tanh(score / cap)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_can_be_a_callable(dynamic):
    module, partial = Slopes(), functools.partial(capped, cap=2.5)

    def step(q, k, v, cap, window, lengths):
        def local(score, b, h, i, j):
            return torch.where((i - j < window) & (j < lengths[b]), capped(score, b, h, i, j, cap), -float("inf"))

        mods = (module, partial, local) if dynamic else (module.mod, local)
        return [flex_attention(q, k, v, score_mod=mod, enable_gqa=True) for mod in mods]

    ours, tensors = compiled(step, dynamic), inputs(seq=8)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in tensors]
    for settings in ((0.7, 7, torch.tensor([8, 3])), (0.2, 4, torch.tensor([1, 5]))):
        found, expected = ours(*tensors, *settings), step(*tensors, *settings)
        assert_same(found, expected)
        assert [x.stride() for x in found] == [x.stride() for x in expected]
    wanted = *tensors, module.slopes
    assert_same(*(torch.autograd.grad(sum(x.square().sum() for x in outs), wanted) for outs in (found, expected)))


def test_another_callable_is_another_graph():
    q, k, v = inputs(requires_grad=False)
    step = compiled(lambda mod, mask: flashattn.attention(q, k, v, score_mod=mod, block_mask=mask))
    other = create_block_mask(lambda b, h, i, j: i <= j, None, None, 20, 20)
    for mod in (lambda score, b, h, i, j: score * 2, lambda score, b, h, i, j: score + i):
        for block_mask in (create_block_mask(causal, None, None, 20, 20), other, None):
            assert_same(step(mod, block_mask), flashattn.attention(q, k, v, score_mod=mod, block_mask=block_mask))


def test_return_aux():
    weight = torch.rand(4)
    request = flashattn.AuxRequest(True, True, True, True, True)

    def step(q, k, v, block_mask):
        mod = lambda score, b, h, i, j: score * weight[h]  # noqa: E731
        plain = flashattn.attention(q, k, v, causal=True, sinks=weight, return_aux=request)
        return plain, flashattn.attention(q, k, v, score_mod=mod, block_mask=block_mask, return_aux=request)

    ours, frames = compiled(step, dynamic=True), 0
    for seq in (40, 70):
        arguments = *inputs(seq), create_block_mask(causal, None, None, seq, seq)
        found = ours(*arguments)
        assert_same(found, step(*arguments))
        assert not found[1][1].entropy.requires_grad
        frames = frames or ours.counter.frame_count
    assert ours.counter.frame_count == frames


def test_inductor():
    tensors = *inputs(), torch.randn(4, 60, requires_grad=True), torch.randn(64, requires_grad=True)
    arguments = *tensors, torch.rand(20, 20) > 0.1, create_block_mask(causal, None, None, 20, 20)
    step = torch.compile(with_everything, fullgraph=True)
    ours, eager = (torch.autograd.grad(f(*arguments), tensors) for f in (step, with_everything))
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_triton():
    """Whose kernels are made from the text, in the operator, and which decodes too."""
    with find_device("triton") as device, flashattn.use_backend("triton"):
        table = torch.randn(2, 40, requires_grad=True)
        block_mask = torch_block_mask(causal, None, None, 20, 20, device)
        q, k, v = (torch.randn(1, heads, 20, 16, requires_grad=True) for heads in (2, 1, 1))

        def attend(q, k, v):
            mod = lambda score, b, h, i, j: torch.tanh(score) + table[h, i - j + 20]  # noqa: E731
            return flashattn.attention(q, k, v, score_mod=mod, block_mask=block_mask).square().sum()

        gradients = (torch.autograd.grad(f(q, k, v), (q, k, v, table)) for f in (compiled(attend), attend))
        assert_same(*gradients)

        def step(cache, q, k, v):
            return flashattn.decode(q.detach(), cache, k.detach(), v.detach(), return_lse=True)

        caches = (flashattn.KVCache(1, 1, 30, 16, device=device) for _ in range(2))
        assert_same(*(f(cache, q, k, v) for f, cache in zip((compiled(step), step), caches, strict=True)))


def test_autocast():
    """A table that is computed from what was captured is computed as without a graph: without autocast."""
    table = torch.randn(4, 4)

    def step(q, k, v):
        return flashattn.attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (table @ table.mT)[h, j % 4])

    tensors = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(compiled(step)(*tensors), step(*tensors))


def test_sizes_that_are_symbols():
    """Where shapes and strides are compared."""

    def step(q, k, v, slopes, mask):
        flash = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), alibi_slopes=slopes, window_size=(3, 1))
        return flash, scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    ours, frames = compiled(step, dynamic=True), 0
    for seq in (20, 33):
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(seq, requires_grad=False)]
        others = torch.rand(4), torch.rand(seq, seq) > 0.2
        found, expected = ours(*tensors, *others), step(*tensors, *others)
        assert_same(found, expected)
        assert [x.stride() for x in found] == [x.stride() for x in expected]
        frames = frames or ours.counter.frame_count
    assert ours.counter.frame_count == frames


def test_nested_tensors():
    """Whose lengths a graph does not read."""
    layer = flashattn.MultiheadAttention(16, 2, batch_first=True)

    def step(x):
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        heads = flashattn.attention(heads, heads, heads, causal=True).transpose(1, 2)
        return layer(x, x, x, need_weights=False)[0].values() + heads.values().flatten(1)

    ours = compiled(step, dynamic=True)
    for lengths in ((3, 5), (7, 2)):
        rows = [torch.randn(n, 16) for n in lengths]
        x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
        found, expected = ours(x), step(x)
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(out.square().sum(), x)[0].values() for out in (found, expected))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


WRONG = {
    "of many scores": (lambda score, b, h, i, j: score + torch.ones(3), "score_mod must work on one score at a time"),
    "elsewhere": (
        lambda score, b, h, i, j: score + torch.ones(4, device="meta")[h],
        "score_mod must capture tensors on q's device cpu, got one on meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    mod, what = WRONG[name]
    step = compiled(lambda q, k, v: flashattn.attention(q, k, v, score_mod=mod))
    with pytest.raises(Exception, match=what):
        step(*inputs())
    with pytest.raises(TypeError, match="score_mod must be a callable, got int"):
        flashattn.attention(*inputs(), score_mod=3)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.randn(4))
        self.block_mask = create_block_mask(causal, None, None, 20, 20)

    def forward(self, q, k, v):
        mod = lambda score, b, h, i, j: score * self.slopes[h]  # noqa: E731
        return flashattn.attention(q, k, v, score_mod=mod, block_mask=self.block_mask)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """A program that is kept holds the callables: as text."""
    layer, arguments = Layer(), tuple(inputs(requires_grad=False))
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, arguments, strict=strict), file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(*arguments), layer(*arguments))


def flex_arguments(backend: str, dtype: torch.dtype) -> tuple:
    table = torch.randn(4, 40, requires_grad=True)
    mod = lambda score, b, h, i, j: score * 0.5 + table[h, i - j + 20].exp()  # noqa: E731
    block_mask = create_block_mask(lambda b, h, i, j: (i >= j) & (table[h, j] < 1), None, None, 20, 20)
    q, k, v = inputs(dtype=dtype)
    score = build_score(
        q, (2, 4, 20, 20), scale=0.3, window=(9, None), sinks=torch.randn(4, requires_grad=True), score_mod=mod,
        block_mask=block_mask,
    )  # fmt: skip
    return (q, k, v), (*ops.attention.flatten(score, backend), *ops.attention.flatten_mods(score))


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", torch.bfloat16), ("reference", torch.float32)])
def test_opcheck(backend, dtype):
    tensors, settings = flex_arguments(backend, dtype)
    torch.library.opcheck(OPS.attention_forward.default, (*tensors, *settings))
    detach = lambda x: x.detach() if isinstance(x, torch.Tensor) else x  # noqa: E731
    settings = [[detach(x) for x in s] if isinstance(s, list) else detach(s) for s in settings]
    tensors = [x.detach() for x in tensors]
    out, lse, rest = OPS.attention_forward(*tensors, *settings)
    arguments = torch.randn_like(out), torch.randn_like(lse), *tensors, out, lse, rest, False, [True], *settings
    torch.library.opcheck(OPS.attention_backward.default, arguments)
    torch.library.opcheck(OPS.attention_stats.default, (*tensors[:2], *settings))


def test_flops_are_counted():
    """Those of blocks that a mask leaves out too."""
    q, k, v = inputs(requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        flashattn.attention(q, k, v, block_mask=create_block_mask(causal, None, None, 20, 20))
    assert counter.get_total_flops() == 2 * 2 * 4 * 20 * 20 * (8 + 8)


def test_in_inference_mode():
    table, (q, k, v) = torch.randn(20), inputs(requires_grad=False)

    def attend(q):
        return flashattn.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[i])

    with torch.inference_mode():
        assert_same(compiled(attend)(q), attend(q))


def drawing(s, b, h, i, j):
    return s + torch.rand(())


CHANGED = torch.zeros(20)


def changing(s, b, h, i, j):
    return s + CHANGED.add_(1)[i]


@pytest.mark.parametrize("mod, why", [(drawing, "must give the same"), (changing, "must not change a tensor")])
def test_what_a_mod_must_not_do(mod, why):
    q, k, v = inputs(requires_grad=False)
    for attend in (flashattn.attention, compiled(flashattn.attention)):
        with pytest.raises(Exception, match=f"score_mod {why}"):
            attend(q, k, v, score_mod=mod)


def test_flops_of_a_backward():
    q, k, v = inputs()
    with FlopCounterMode(display=False) as forward:
        out = flashattn.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * 0.5)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() > 2 * forward.get_total_flops() > 0


def test_tracing_waits_for_a_compilation_elsewhere():
    """FX's patches are every thread's."""
    q, k, v = inputs(requires_grad=False)

    def attend():
        flashattn.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * 0.25)

    thread = threading.Thread(target=attend)
    with convert_frame.compile_lock:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
