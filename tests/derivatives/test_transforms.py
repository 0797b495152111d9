"""functorch's transforms: vmap against a loop of calls, transforms of transforms against PyTorch's own mathematics, and
all of it in graphs."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention.flex_attention import create_block_mask

import flashattn
from flashattn.compat import flex, sdpa
from flashattn.compat.flash_attn import flash_attn_func
from flashattn.reference import naive

MAPPED = 3
BATCH, HEADS, KV_HEADS, SEQ_Q, SEQ_K, DIM = 2, 4, 2, 5, 6, 8
SHAPES = {
    "q": (BATCH, HEADS, SEQ_Q, DIM),
    "k": (BATCH, KV_HEADS, SEQ_K, DIM),
    "v": (BATCH, KV_HEADS, SEQ_K, DIM),
    "bias": (1, HEADS, SEQ_Q, SEQ_K),
    "bias_of_keys": (SEQ_K,),
    "sinks": (HEADS,),
    "alibi_slopes": (HEADS,),
    "table": (HEADS,),
    "row": (BATCH, SEQ_Q, DIM),
    "weight": (DIM,),
    "weights": (SEQ_Q, DIM),
    "packed_q": (7, HEADS, DIM),
    "packed_k": (7, KV_HEADS, DIM),
}
DTYPES = {"cpu": torch.float32, "reference": torch.float64}
STARTS = torch.tensor([0, 3, 7], dtype=torch.int32)
BLOCKS = create_block_mask(lambda b, h, i, j: i >= j, None, None, SEQ_Q, SEQ_K, "cpu", BLOCK_SIZE=16)


def attend(q, k, v, **options):
    return flashattn.attention(q, k, v, return_lse=True, **options)


def attend_packed(q, k, v, **options):
    return flashattn.attention_varlen(q, k, v, STARTS, STARTS, 4, 4, return_lse=True, **options)


# {name: (a call, its inputs and the dimension of each that is mapped, or None)}
CALLS = {
    "all": (attend, dict(q=0, k=0, v=0)),
    "q": (attend, dict(q=0, k=None, v=None)),
    "last_dimensions": (attend, dict(q=-1, k=3, v=2)),
    "causal": (lambda *x: attend(*x, causal=True, softcap=2.0), dict(q=0, k=1, v=0)),
    "bias": (lambda q, k, v, b: attend(q, k, v, bias=b), dict(q=0, k=0, v=0, bias=0)),
    "shared_bias": (lambda q, k, v, b: attend(q, k, v, bias=b), dict(q=0, k=0, v=0, bias=None)),
    "bias_alone": (lambda q, k, v, b: attend(q, k, v, bias=b), dict(q=None, k=None, v=None, bias_of_keys=0)),
    "shared_bias_of_keys": (lambda q, k, v, b: attend(q, k, v, bias=b), dict(q=0, k=0, v=0, bias_of_keys=None)),
    "sinks": (lambda q, k, v, s: attend(q, k, v, sinks=s), dict(q=0, k=0, v=0, sinks=0)),
    "shared_sinks": (lambda q, k, v, s: attend(q, k, v, sinks=s), dict(q=0, k=0, v=0, sinks=None)),
    "sinks_and_bias": (
        lambda q, k, v, s, b: attend(q, k, v, sinks=s, bias=b, causal=True),
        dict(q=0, k=0, v=0, sinks=0, bias_of_keys=0),
    ),
    "packed": (attend_packed, dict(packed_q=0, packed_k=0, packed_k_=0)),
    "dropout": (lambda *x: attend(*x, dropout_p=0.4, seed=7), dict(q=0, k=0, v=0)),
    "score_mod": (
        lambda q, k, v, t: attend(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s) * t[h] + b),
        dict(q=0, k=0, v=0, table=0),
    ),
    "block_mask": (lambda *x: attend(*x, block_mask=BLOCKS), dict(q=0, k=0, v=0)),
    "sdpa": (
        lambda q, k, v: (sdpa.scaled_dot_product_attention(q, k, v, enable_gqa=True),),
        dict(q=0, k=0, v=0),
    ),
    "flex": (lambda q, k, v: (flex.flex_attention(q, k, v, enable_gqa=True),), dict(q=0, k=0, v=0)),
    "layer_norm": (lambda x, w: (flashattn.layer_norm(x, w, w * w),), dict(row=0, weight=None)),
    "mapped_weight": (lambda x, w: (flashattn.layer_norm(x, w, w * w),), dict(row=1, weight=0)),
    "weight_alone": (lambda x, w: (flashattn.rms_norm(x, w),), dict(row=None, weight=0)),
    "head_weights": (
        lambda x, w: flashattn.layer_norm(x, w, w * 0.5, residual=x * x, prenorm=True),
        dict(row=0, weights=0),
    ),
    "norm_dropout": (
        lambda x, w: flashattn.rms_norm(x, w, residual=x, dropout_p=0.4, seed=7, prenorm=True),
        dict(row=0, weight=0),
    ),
}


def make_inputs(dims: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    inputs = []
    for name, at in dims.items():
        shape = list(SHAPES[name.rstrip("_")])
        if at is not None:
            shape.insert(at if at >= 0 else len(shape) + 1 + at, MAPPED)
        inputs.append(torch.randn(shape, dtype=dtype))
    return inputs


def loop(call, dims: dict, inputs) -> list[torch.Tensor]:
    rows = []
    for n in range(MAPPED):
        own = (x if at is None else x.select(at, n) for x, at in zip(inputs, dims.values(), strict=True))
        rows.append(call(*own))
    return [torch.stack(x) for x in zip(*rows, strict=True)]


def sum_cubes(call):
    return lambda *x: sum(torch.where(y == -torch.inf, 0, y).pow(3).sum() for y in call(*x))


def take_gradients(call, count: int):
    return grad(sum_cubes(call), tuple(range(count)))


def take_tangents(call):
    def tangents(*x):
        results, moved = jvp(call, x, tuple(torch.cos(i) for i in x))
        return *results, *moved

    return tangents


KINDS = {
    "values": lambda call, count: call,
    "gradients": take_gradients,
    "tangents": lambda call, count: take_tangents(call),
    "tangents_of_gradients": lambda call, count: take_tangents(take_gradients(call, count)),
    "gradients_of_tangents": lambda call, count: take_gradients(take_tangents(call), count),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_a_loop(name, kind, backend):
    call, dims = CALLS[name]
    inputs, call = make_inputs(dims, DTYPES[backend]), KINDS[kind](call, len(dims))
    with flashattn.use_backend(backend):
        mapped = vmap(call, tuple(dims.values()))(*inputs)
        expected = loop(call, dims, inputs)
    assert len(mapped) == len(expected)
    for x, y in zip(mapped, expected, strict=True):
        torch.testing.assert_close(x, y, **(dict(rtol=1e-3, atol=1e-3) if backend == "cpu" else {}))


@pytest.mark.parametrize("name", ["kv_lengths", "q_lengths", "mask", "alibi_slopes"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_mapped_options(name, with_sinks):
    """Those that have no gradient."""
    values = dict(
        kv_lengths=torch.tensor([[1, 6], [0, 3], [5, 5]]),
        q_lengths=torch.tensor([[1, 5], [0, 3], [5, 2]]),
        mask=torch.rand(MAPPED, BATCH, 1, SEQ_Q, SEQ_K) > 0.3,
        alibi_slopes=torch.rand(MAPPED, HEADS),
    )
    dims = dict(q=0, k=0, v=0, sinks=0)
    *inputs, sinks = make_inputs(dims, torch.float64)

    def call(q, k, v, x, s):
        own = take_gradients(lambda *qkv: attend(*qkv, **{name: x}, sinks=s if with_sinks else None), 3)
        return own(q, k, v)

    inputs = (*inputs, values[name], sinks)
    expected = [torch.stack(x) for x in zip(*(call(*(x[n] for x in inputs)) for n in range(MAPPED)), strict=True)]
    for x, y in zip(vmap(call)(*inputs), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_mapped_boundaries_of_packed_sequences():
    q, k = torch.randn(MAPPED, 7, HEADS, DIM), torch.randn(MAPPED, 7, KV_HEADS, DIM)
    starts = torch.tensor([[0, 3, 7], [0, 0, 7], [0, 5, 6]], dtype=torch.int32)

    def call(q, k, starts):
        return flashattn.attention_varlen(q, k, k, starts, starts, 7, 7)

    expected = torch.stack([call(q[n], k[n], starts[n]) for n in range(MAPPED)])
    torch.testing.assert_close(vmap(call)(q, k, starts), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_callables_first_seen_by_a_transform(kind):
    """Their trace is kept for other calls, so it must not hold what the transform made of its example numbers."""
    offset, inputs = torch.rand(HEADS, dtype=torch.float64), make_inputs(dict(q=0, k=0, v=0), torch.float64)

    def call(*x):
        blocks = create_block_mask(mask_mod, None, None, SEQ_Q, SEQ_K, "cpu", BLOCK_SIZE=16)
        return attend(*x, score_mod=lambda s, b, h, i, j: s * (i // 2 + j % 3) + offset[h], block_mask=blocks)

    def mask_mod(b, h, i, j):
        return (i // 2 + j // 2) % 3 != 0

    mapped = vmap(KINDS[kind](call, 3))(*inputs)
    i, j = torch.arange(SEQ_Q)[:, None], torch.arange(SEQ_K)

    def formulas(q, k, v):
        s = q @ k.repeat_interleave(2, 1).mT * DIM**-0.5 * (i // 2 + j % 3) + offset[:, None, None]
        s = s.masked_fill((i // 2 + j // 2) % 3 == 0, -torch.inf)
        return s.softmax(-1) @ v.repeat_interleave(2, 1), s.logsumexp(-1)

    expected = loop(KINDS[kind](formulas, 3), dict(q=0, k=0, v=0), inputs)
    for x, y in zip(mapped, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_vmap_of_vmap():
    q, k = torch.randn(2, 3, BATCH, HEADS, SEQ_Q, DIM), torch.randn(3, 2, BATCH, KV_HEADS, SEQ_K, DIM)
    found = vmap(vmap(lambda q, k: flashattn.attention(q, k, k)), (0, 1))(q, k)
    expected = torch.stack(
        [torch.stack([flashattn.attention(q[i, j], k[j, i], k[j, i]) for j in range(3)]) for i in range(2)]
    )
    torch.testing.assert_close(found, expected)


def test_random_seeds():
    x = torch.randn(MAPPED, 1, 2, 64, DIM)

    def call(x):
        return flashattn.attention(x, x, torch.ones_like(x), dropout_p=0.5)

    same = vmap(call, randomness="same")(x[:1].expand_as(x))
    different = vmap(call, randomness="different")(x[:1].expand_as(x))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(x)


# ------------------------------------------------------------------------------------------------ of each other

OPTIONS = dict(causal=True, softcap=2.0)


def ours(q, k, v, bias, sinks):
    return flashattn.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **OPTIONS)


def theirs(q, k, v, bias, sinks):
    return naive.attention(q, k, v, bias=bias, sinks=sinks, **OPTIONS)


INPUTS = [torch.randn(SHAPES[name], dtype=torch.float64).sin() for name in ("q", "k", "v", "bias", "sinks")]
MOVED = [torch.cos(x) for x in INPUTS]
EVERY = tuple(range(5))


TRANSFORMS = {
    "grad": lambda f: grad(sum_cubes(f), EVERY)(*INPUTS),
    "vjp": lambda f: vjp(f, *INPUTS)[1](tuple(x.sin() for x in theirs(*INPUTS))),
    "jvp": lambda f: jvp(f, tuple(INPUTS), tuple(MOVED)),
    "jacrev": lambda f: jacrev(lambda *x: f(*x)[0], EVERY)(*INPUTS),
    "jacfwd": lambda f: jacfwd(lambda *x: f(*x)[0], EVERY)(*INPUTS),
    "hessian": lambda f: hessian(lambda b, s: sum_cubes(f)(*INPUTS[:3], b, s), (0, 1))(*INPUTS[3:]),
    "forward_over_reverse": lambda f: jvp(grad(sum_cubes(f), EVERY), tuple(INPUTS), tuple(MOVED)),
    "reverse_over_forward": lambda f: grad(sum_cubes(lambda *x: jvp(f, x, tuple(MOVED))[1]), EVERY)(*INPUTS),
    "reverse_over_reverse": lambda f: grad(sum_cubes(grad(sum_cubes(f), EVERY)), EVERY)(*INPUTS),
    "gradient_by_tangents": lambda f: grad(sum_cubes(lambda *t: jvp(f, tuple(INPUTS), t)[1]), EVERY)(*MOVED),
    "vmap_of_jvp": lambda f: vmap(lambda t: jvp(lambda q: f(q, *INPUTS[1:]), (INPUTS[0],), (t,))[1])(
        torch.stack([MOVED[0], INPUTS[0]])
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    torch.testing.assert_close(TRANSFORMS[name](ours), TRANSFORMS[name](theirs))


def run_in_a_graph(name, call):
    torch._dynamo.reset()
    return torch.compile(lambda: TRANSFORMS[name](call), fullgraph=True, backend="aot_eager")()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_a_graph(name):
    try:
        found = run_in_a_graph(name, ours)
    except torch._dynamo.exc.TorchDynamoException as error:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            run_in_a_graph(name, theirs)
        pytest.skip(f"nor can PyTorch {torch.__version__}: {type(error).__name__}")
    torch.testing.assert_close(found, TRANSFORMS[name](theirs))


AUTOGRAD = {
    "hvp": lambda f: torch.autograd.functional.hvp(sum_cubes(f), tuple(INPUTS), tuple(MOVED)),
    "vhp": lambda f: torch.autograd.functional.vhp(sum_cubes(f), tuple(INPUTS), tuple(MOVED)),
    "vectorized_jacobian": lambda f: torch.autograd.functional.jacobian(f, tuple(INPUTS), vectorize=True),
    "forward_jacobian": lambda f: torch.autograd.functional.jacobian(
        lambda *x: f(*x)[0], tuple(INPUTS), vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda f: torch.autograd.functional.hessian(
        lambda s: sum_cubes(f)(*INPUTS[:4], s), INPUTS[4], vectorize=True
    ),
}


@pytest.mark.parametrize("name", AUTOGRAD)
def test_autograd_functional(name):
    # (PyTorch's own lse gives a Jacobian of -inf a NaN.)
    torch.testing.assert_close(AUTOGRAD[name](ours), AUTOGRAD[name](theirs))


def test_gradients_in_a_batch():
    inputs = [x.clone().requires_grad_() for x in INPUTS]
    out, lse = ours(*inputs)
    gradients = torch.randn(4, *out.shape, dtype=out.dtype), torch.randn(4, *lse.shape, dtype=lse.dtype)
    found = torch.autograd.grad((out, lse), inputs, gradients, is_grads_batched=True, retain_graph=True)
    for n in range(4):
        one = torch.autograd.grad((out, lse), inputs, [g[n] for g in gradients], retain_graph=True)
        for x, y in zip(found, one, strict=True):
            torch.testing.assert_close(x[n], y)


def test_per_sample_gradients_of_a_model():
    """By functional_call, as PyTorch's tutorial has it."""
    model = torch.nn.Sequential(flashattn.LayerNorm(16), torch.nn.Linear(16, 16), flashattn.RMSNorm(16))
    attention = flashattn.MultiheadAttention(16, 2)
    both = torch.nn.ModuleList([model, attention])
    x = torch.randn(5, 7, 16)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = both

        def forward(self, x):
            h = self.parts[0](x)
            return self.parts[1](h, h, h, need_weights=False)[0].square().sum()

    whole = Both()
    parameters = {n: p.detach() for n, p in whole.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(whole, parameters, (x,))

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for n in range(5):
        for name, g in grad(loss)(parameters, x[n]).items():
            torch.testing.assert_close(found[name][n], g, rtol=1e-4, atol=1e-4)


def test_flash_attn_takes_a_transform():
    x = torch.randn(MAPPED, 2, 9, 4, DIM)
    found = vmap(lambda x: flash_attn_func(x, x, x, causal=True))(x)
    torch.testing.assert_close(found, torch.stack([flash_attn_func(y, y, y, causal=True) for y in x]))
