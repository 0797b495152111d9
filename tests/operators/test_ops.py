"""The operators under PyTorch's own checks, torch.compile and torch.export."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import flashattn
from flashattn import ops
from flashattn.score import Score

OPS = torch.ops.flashattn
BACKENDS = ["cpu", "reference"]


def attention_inputs(dtype=torch.float32, requires_grad=True):
    q, k, v = torch.randn(2, 4, 33, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 24)
    return [x.to(dtype).requires_grad_(requires_grad) for x in (q, k, v)]


def flatten(score: Score, backend: str) -> tuple:
    """As operators take a score."""
    return *ops.attention.flatten(score, backend), *ops.attention.flatten_mods(score)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [None, (40, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_attention_forward(backend, lengths, dtype):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs' whole storage
    kv_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    score = flatten(Score(0.25, right=0, kv_lengths=kv_lengths), backend)
    torch.library.opcheck(OPS.attention_forward.default, (*attention_inputs(dtype), *score))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck_attention_backward(backend, with_lse):
    q, k, v = attention_inputs(requires_grad=False)
    score = Score(0.25, softcap=5.0, alibi_slopes=torch.rand(1, 4), dropout_p=0.1, seed=torch.tensor(5))
    score = flatten(score._replace(bias=torch.randn(1, 4, 1, 40), sinks=torch.randn(4)), backend)
    out, lse, rest = OPS.attention_forward(q, k, v, *score)
    grad_lse = torch.randn_like(lse) if with_lse else None
    arguments = (torch.randn_like(out), grad_lse, q, k, v, out, lse, rest, True, [], *score)
    torch.library.opcheck(OPS.attention_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_opcheck_norm_forward(backend, center, fused):
    x = torch.randn(3, 5, 63, requires_grad=True)
    weight, bias = (torch.randn(63, requires_grad=True) for _ in range(2))
    residual = torch.randn(3, 5, 63, requires_grad=True) if fused else None
    seed = torch.tensor(5) if fused else None
    arguments = (
        x,
        residual,
        weight,
        bias,
        torch.float32,
        fused,
        center,
        1e-5,
        0.5,
        0.1 if fused else 0.0,
        seed,
        backend,
    )
    torch.library.opcheck(OPS.norm_forward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [False, True])
def test_opcheck_norm_backward(backend, center):
    x, weight = torch.randn(3, 5, 63), torch.randn(63)
    settings = (center, 1e-5, 0.0, 0.1, torch.tensor(5), backend)
    _, hidden, mean, rstd = OPS.norm_forward(x, None, weight, None, torch.float32, True, *settings)
    arguments = (
        torch.randn_like(x),
        torch.randn_like(x),
        hidden,
        weight,
        None,
        mean,
        rstd,
        torch.float32,
        None,
        *settings,
    )
    torch.library.opcheck(OPS.norm_backward.default, arguments)


class Layer(torch.nn.Module):
    """Norm, attention with lengths and lse, residual norm: every call in one graph."""

    def __init__(self):
        super().__init__()
        self.norm = flashattn.LayerNorm(32)
        self.after = flashattn.RMSNorm(32)

    def forward(self, x, lengths):
        y = self.norm(x).unflatten(-1, (4, 8)).transpose(1, 2)
        out, lse = flashattn.attention(y, y, y, causal=True, kv_lengths=lengths, return_lse=True)
        out = out.transpose(1, 2).flatten(2)
        y, hidden = self.after(out, residual=x, prenorm=True)
        return y + hidden, lse.clamp_min(0).sum()


@pytest.fixture
def layer():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    return Layer()


def gradients(function, layer, x, lengths):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y, total = function(x, lengths)
    (y.square().sum() + total).backward()
    return [y, total, x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(layer, backend, dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for seq in (17, 33) if dynamic else (17,):
        x, lengths = torch.randn(2, seq, 32), torch.tensor([seq, 5])
        for a, b in zip(gradients(compiled, layer, x, lengths), gradients(layer, layer, x, lengths), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_of_one_call_gives_the_same_bits():
    torch.use_deterministic_algorithms(False)
    q, k, v = attention_inputs(requires_grad=False)
    compiled = torch.compile(flashattn.attention, fullgraph=True)
    assert torch.equal(compiled(q, k, v, causal=True), flashattn.attention(q, k, v, causal=True))


def test_compile_with_every_size_dynamic():
    """head_dim too, which decides between backends."""

    def step(q, k, v, weight, lengths):
        out = flashattn.attention(q, k, v, causal=True, kv_lengths=lengths)
        return flashattn.rms_norm(out, weight, residual=q, dropout_p=0.3, seed=7).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq, head_dim in ((33, 16), (40, 24)):
        inputs = [torch.randn(2, 4, seq, head_dim, requires_grad=True) for _ in range(3)]
        inputs.append(torch.randn(head_dim, requires_grad=True))
        lengths = torch.tensor([seq, 5])
        ours, eager = (torch.autograd.grad(f(*inputs, lengths), inputs) for f in (compiled, step))
        assert all(map(torch.equal, ours, eager))


def test_compile_of_many_windows():
    """A graph serves every window, once a second one has shown that it changes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, left):
        return flashattn.attention(q, q, q, window=(left, 2)).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    for left in (3, 4, 9, 39, 40, 2**31 - 1):
        ours, eager = (torch.autograd.grad(f(q, left), q) for f in (compiled, step))
        assert torch.equal(*ours, *eager)
    assert counter.frame_count <= 3  # the first, any other, and one larger than any sequence


def test_compile_with_every_feature():
    def step(q, k, v, bias, sinks, mask):
        out, lse = flashattn.attention(
            q, k, v, causal=True, bias=bias, sinks=sinks, mask=mask, softcap=4.0, dropout_p=0.2, seed=3,
            alibi_slopes=torch.full((4,), 0.1), return_lse=True,
        )  # fmt: skip
        return out.square().sum() + lse.sum()

    inputs = [*attention_inputs(), torch.randn(4, 33, 40, requires_grad=True), torch.randn(4, requires_grad=True)]
    mask = torch.rand(33, 40) > 0.1
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = (torch.autograd.grad(f(*inputs, mask), inputs) for f in (compiled, step))
    assert all(map(torch.equal, ours, eager))


def packed_inputs():
    q, k, v = (torch.randn(50, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    return q, k, v, torch.tensor([0, 20, 20, 45], dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_packed_sequences(backend):
    torch.use_deterministic_algorithms(False)
    *inputs, starts = packed_inputs()
    q, k, v = (x.detach().transpose(0, 1)[None].requires_grad_() for x in inputs)
    score = Score(0.25, right=0, cu_seqlens=torch.stack((starts, starts)), max_seqlen_q=25, max_seqlen_k=25)
    torch.library.opcheck(OPS.attention_forward.default, (q, k, v, *flatten(score, backend)))


def test_compile_of_packed_sequences():
    def step(q, k, v, starts):
        out, lse = flashattn.attention_varlen(q, k, v, starts, starts, 25, 25, causal=True, return_lse=True)
        return out.square().sum() + lse[:, :45].sum()

    *inputs, starts = packed_inputs()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, eager = (torch.autograd.grad(f(*inputs, starts), inputs) for f in (compiled, step))
    assert all(map(torch.equal, ours, eager))


def test_compile_notices_another_backend(layer):
    calls = []

    def graph_backend(graph, inputs):
        calls.append([n.args[-1] for n in graph.graph.nodes if "flashattn" in str(n.target)])
        return graph

    compiled = torch.compile(lambda x: flashattn.rms_norm(x), fullgraph=True, backend=graph_backend)
    compiled(torch.randn(3, 8))
    with flashattn.use_backend("reference"):
        compiled(torch.randn(3, 8))
    assert calls == [["cpu"], ["reference"]]


def test_compile_with_dropout_and_no_seed():
    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(lambda x: flashattn.layer_norm(x, dropout_p=0.5), fullgraph=True)
    x = torch.ones(4, 64)
    assert not torch.equal(compiled(x), compiled(x))


def test_export(layer):
    x, lengths = torch.randn(2, 17, 32), torch.tensor([17, 5])
    seq = torch.export.Dim("seq", min=2, max=64)
    program = torch.export.export(layer, (x, lengths), dynamic_shapes=({1: seq}, None))
    longer = torch.randn(2, 40, 32)
    for a, b in zip(program.module()(longer, lengths), layer(longer, lengths), strict=True):
        torch.testing.assert_close(a, b)


def test_meta_tensors():
    q, k, v = (x.to("meta") for x in attention_inputs())
    out, lse = flashattn.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 33, 24)
    assert lse.dtype == torch.float32
