"""What a score_mod and a mask_mod may do, against PyTorch's eager FlexAttention: PyTorch's own helpers, tensors made in
the mod, chains of indices, what depends on captured tensors alone."""

import pytest
import torch
from torch.nn.attention import flex_attention as theirs

import flashattn
from flashattn.compat.flex import flex_attention
from tests.common import BACKENDS, find_device

BATCH, HEADS, SEQ, DIM = 2, 3, 40, 8


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """FlexAttention's own mathematics, not a compiled kernel."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    torch.use_deterministic_algorithms(False)


def on_backends(names, others: list[str], on_triton: set[str]) -> list:
    """(name, backend) of all names on the others; on Triton, whose interpreter is slow, of what its functions are
    generated from in another way."""
    triton = [pytest.param(name, "triton", marks=pytest.mark.interpreter) for name in names if name in on_triton]
    return triton + [(name, backend) for name in names for backend in others]


def causal(b, h, i, j):
    return i >= j


def near(b, h, i, j):
    return i - j < 9


def first_keys(b, h, i, j):
    return j < 5


def documents(device):
    document = (torch.arange(SEQ, device=device) // torch.tensor([[7], [13]], device=device)).contiguous()
    return lambda b, h, i, j: document[b][i] == document[b][j]


MASK_MODS = {
    "noop": lambda device: theirs.noop_mask,
    "and": lambda device: theirs.and_masks(causal, near),
    "or": lambda device: theirs.or_masks(causal, first_keys),
    "and_of_none": lambda device: theirs.and_masks(),
    "or_of_none": lambda device: theirs.or_masks(),
    "nested": lambda device: theirs.or_masks(first_keys, theirs.and_masks(causal, near, theirs.noop_mask)),
    "documents": documents,
    "and_documents": lambda device: theirs.and_masks(causal, documents(device)),
    "made_in_it": lambda device: (
        lambda b, h, i, j: (i >= j) & (j >= torch.tensor([0, 3, 1], device=device).cumsum(0)[h])
    ),
}


def run(function, backend, **options):
    torch.manual_seed(1)
    q, k, v = (torch.randn(BATCH, HEADS, SEQ, DIM).to(find_device(backend)) for _ in range(3))
    with flashattn.use_backend(backend), torch.no_grad():
        return function(q, k, v, **options)


def compare(backend, **options):
    ours, expected = run(flex_attention, backend, **options), run(theirs.flex_attention, backend, **options)
    if "block_mask" in options:  # PyTorch gives NaN, or the mean, to a query with nothing to attend to
        keep = theirs.create_mask(options["block_mask"].mask_mod, BATCH, HEADS, SEQ, SEQ, ours.device)
        some = keep.any(-1, keepdim=True)
        assert (ours.masked_select(~some) == 0).all()
        ours, expected = ours.masked_select(some), expected.masked_select(some)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, backend", on_backends(MASK_MODS, ["cpu", "reference"], {"noop", "and_documents"}))
def test_mask_mods(name, backend):
    device = find_device(backend)
    compare(backend, block_mask=theirs.create_block_mask(MASK_MODS[name](device), BATCH, HEADS, SEQ, SEQ, device, 16))


def made(function):
    """A mod whose tensor is made in it, of no captured one."""
    return lambda tables: lambda score, b, h, i, j: torch.where(i >= j, score, function(score, h))


def of_tables(function):
    return lambda tables: lambda score, b, h, i, j: score + function(*tables, b, h, i, j)


SCORE_MODS = {
    "zeros": made(lambda score, h: torch.zeros(())),
    "zeros_as_the_score": made(lambda score, h: torch.zeros((), dtype=score.dtype, device=score.device)),
    "ones": made(lambda score, h: torch.ones(()) * h),
    "full": made(lambda score, h: torch.full((), -1.5)),
    "full_like": made(lambda score, h: torch.full_like(score, -1.5)),
    "new_full": made(lambda score, h: score.new_full((), -1.5)),
    "new_zeros": made(lambda score, h: score.new_zeros(())),
    "new_ones": made(lambda score, h: score.new_ones(())),
    "new_tensor": made(lambda score, h: score.new_tensor(-1.5)),
    "list": made(lambda score, h: torch.tensor([0.5, 1.0, 2.0], device=score.device)[h]),
    "one_of_ones": made(lambda score, h: torch.zeros(1, device=score.device)[0]),
    "chain": of_tables(lambda x, y, b, h, i, j: x[h][i]),
    "chain_of_three": of_tables(lambda x, y, b, h, i, j: y[h][i][j]),
    "pair_and_one": of_tables(lambda x, y, b, h, i, j: y[h, i][j]),
    "one_and_pair": of_tables(lambda x, y, b, h, i, j: y[h][i, j]),
    "slice_first": of_tables(lambda x, y, b, h, i, j: x[:, i][h]),
    "ellipsis": of_tables(lambda x, y, b, h, i, j: y[..., j][h][i]),
    "slice_between": of_tables(lambda x, y, b, h, i, j: y[h, :, j][i]),
    "number_and_position": of_tables(lambda x, y, b, h, i, j: y[2, i][j] + y[h, 3, j] + y[h, :, -1][i]),
    "number_last": of_tables(lambda x, y, b, h, i, j: y[h][i][2] + x[h][0]),
    "negative": of_tables(lambda x, y, b, h, i, j: x[h - 1][i - j]),
    "part": of_tables(lambda x, y, b, h, i, j: x[1:, 2:][h % 2, i % 9]),
    "transposed": of_tables(lambda x, y, b, h, i, j: x.T[i, h] + y.transpose(0, 2)[j][i, h]),
    "viewed": of_tables(lambda x, y, b, h, i, j: x.reshape(-1)[h * SEQ + i]),
    "computed_first": of_tables(lambda x, y, b, h, i, j: (x * 2).exp()[h][i]),
    "reduced_first": of_tables(lambda x, y, b, h, i, j: x.softmax(-1)[h, i] + y.mean() + y.amax(-1)[h][i]),
}


ON_TRITON = {"zeros", "ones", "new_full", "chain_of_three", "slice_between", "number_last", "part"}


@pytest.mark.parametrize("name, backend", on_backends(SCORE_MODS, ["reference"], ON_TRITON))
def test_score_mods(name, backend):
    device = find_device(backend)
    tables = torch.randn(HEADS, SEQ).to(device), torch.randn(HEADS, SEQ, SEQ).to(device)
    compare(backend, score_mod=SCORE_MODS[name](tables))


FIRST = ["chain_of_three", "number_and_position", "transposed", "reduced_first"]


@pytest.mark.parametrize("name, backend", on_backends(FIRST, ["reference"], {"transposed"}))
def test_gradients_through_what_comes_first(name, backend):
    """Of a captured tensor that the mod transforms before it takes a number of it, against float64."""
    device = find_device(backend)
    leaves = [torch.randn(BATCH, HEADS, SEQ, DIM) for _ in range(3)] + [
        torch.randn(HEADS, SEQ), torch.randn(HEADS, SEQ, SEQ)
    ]  # fmt: skip
    ours = [x.to(device).requires_grad_() for x in leaves]
    exact = [x.double().to(device).requires_grad_() for x in leaves]
    with flashattn.use_backend(backend):
        out = flex_attention(*ours[:3], score_mod=SCORE_MODS[name](ours[3:]))
    mod = SCORE_MODS[name](exact[3:])
    for argument in (4, 3, 2, 1):
        mod = torch.vmap(mod, tuple(0 if n in (0, argument) else None for n in range(5)))
    scores = mod(
        exact[0] @ exact[1].mT * DIM**-0.5, *(torch.arange(n, device=device) for n in (BATCH, HEADS, SEQ, SEQ))
    )
    truth = scores.softmax(-1) @ exact[2]
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    gradients = (
        torch.autograd.grad(x.square().sum(), leaves, materialize_grads=True, allow_unused=True)
        for x, leaves in ((out, ours), (truth, exact))
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_first_is_computed_in_every_call(backend):
    """A table that changes in place, of which the mod takes a part."""
    q = torch.randn(1, HEADS, SEQ, DIM).to(find_device(backend))
    table = torch.zeros(2, SEQ).to(q.device)

    def mod(score, b, h, i, j):
        return score + table[1][j]

    with flashattn.use_backend(backend):
        torch.testing.assert_close(flex_attention(q, q, q, score_mod=mod), flashattn.attention(q, q, q))
        table[1] = torch.arange(SEQ)
        changed = flex_attention(q, q, q, score_mod=mod)
        expected = flashattn.attention(q, q, q, bias=torch.arange(SEQ, device=q.device).float())
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


class Scaled:
    def mod(self, score, b, h, i, j):
        return score * 2.0


def test_a_method_is_a_callable():
    q = torch.randn(1, HEADS, SEQ, DIM)
    out = flex_attention(q, q, q, score_mod=Scaled().mod)
    torch.testing.assert_close(out, flashattn.attention(q, q, q, scale=2 * DIM**-0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_without_a_mask_mod(backend):
    """`from_kv_blocks` alone: its blocks attend whole, and no other."""
    device = find_device(backend)
    counts = torch.tensor([[[1, 2, 3, 2]]], dtype=torch.int32, device=device)
    indices = torch.tensor([[0, 1, 2, 3], [1, 3, 0, 2], [3, 1, 0, 2], [0, 2, 1, 3]], dtype=torch.int32, device=device)
    block_mask = theirs.BlockMask.from_kv_blocks(counts, indices[None, None], BLOCK_SIZE=16)
    q = torch.randn(BATCH, HEADS, 64, DIM, device=device)
    keep = torch.zeros(4, 4, dtype=torch.bool)
    for row, (count, order) in enumerate(zip(counts.view(-1).tolist(), indices.tolist(), strict=True)):
        keep[row, order[:count]] = True
    keep = keep.repeat_interleave(16, 0).repeat_interleave(16, 1).to(device)
    with flashattn.use_backend(backend):
        out, expected = flex_attention(q, q, q, block_mask=block_mask), flashattn.attention(q, q, q, mask=keep)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_larger_than_the_sequence(backend):
    """One of any length, which PyTorch makes where none is given, and one of a mask."""
    q = torch.randn(1, HEADS, SEQ, DIM).to(find_device(backend))
    empty = theirs._create_empty_block_mask(q, q)
    one = theirs.BlockMask.from_kv_blocks(
        empty.kv_num_blocks, empty.kv_indices, BLOCK_SIZE=1 << 28, mask_mod=causal, seq_lengths=(SEQ, SEQ)
    )
    with flashattn.use_backend(backend):
        torch.testing.assert_close(flex_attention(q, q, q, block_mask=empty), flashattn.attention(q, q, q))
        torch.testing.assert_close(
            flex_attention(q, q, q, block_mask=one), flashattn.attention(q, q, q, causal=True), rtol=1e-5, atol=1e-5
        )


TABLE = torch.zeros(HEADS, SEQ)
WRONG = {
    "row": (dict(score_mod=lambda s, b, h, i, j: s + TABLE[h]), r"score_mod must work on one score.*shape \(40,\)"),
    "row_summed": (dict(score_mod=lambda s, b, h, i, j: s + TABLE[h].sum()), "score_mod must work on one score.*sum"),
    "row_times": (
        dict(score_mod=lambda s, b, h, i, j: s + (TABLE[h] * 2)[i]), r"score_mod must work on one score.*shape \(40,\)",
    ),
    "several": (
        dict(score_mod=lambda s, b, h, i, j: s + TABLE[h, torch.arange(3)][0]), r"score_mod must work on one score",
    ),
    "random": (dict(score_mod=lambda s, b, h, i, j: s + torch.rand(())), "score_mod must give the same for the same"),
    "random_table": (dict(score_mod=lambda s, b, h, i, j: s + torch.rand(4)[h]), "score_mod must give the same"),
    "number": (dict(score_mod=lambda s, b, h, i, j: 1.5), "score_mod must return a tensor, got float"),
    "pair": (dict(score_mod=lambda s, b, h, i, j: (s, s)), "score_mod must return a tensor, got tuple"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_of_one_score_is_named(name):
    options, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        flex_attention(*torch.randn(3, BATCH, HEADS, SEQ, DIM), **options)


def test_a_mask_of_numbers_is_refused():
    block_mask = theirs.create_block_mask(causal, None, None, SEQ, SEQ, "cpu")
    block_mask.mask_mod = lambda b, h, i, j: (i >= j) * 2
    with pytest.raises(TypeError, match=r"block_mask\.mask_mod must return a bool tensor, got torch.int64"):
        flex_attention(*torch.randn(3, BATCH, HEADS, SEQ, DIM), block_mask=block_mask)


NUMBERS = {
    "negative": lambda score, b, h, i, j: torch.where(i >= j, score, -torch.full((), 1e9)),
    "product": lambda score, b, h, i, j: score * (torch.ones(()) * 2),
    "logarithm": lambda score, b, h, i, j: score + torch.log2(torch.full((), 8.0)) * j,
    "beside_a_table": lambda score, b, h, i, j: score + (RAMP + torch.ones(()))[j],
}
RAMP = torch.linspace(-1, 1, 20)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_made_of_nothing(name):
    q = torch.randn(1, 2, 20, 8)
    i, j = torch.arange(20)[:, None], torch.arange(20)
    scores = NUMBERS[name](q @ q.mT * 8**-0.5, 0, torch.arange(2)[:, None, None], i, j)
    found = flashattn.attention(q, q, q, score_mod=NUMBERS[name])
    torch.testing.assert_close(found, scores.softmax(-1) @ q, rtol=1e-5, atol=1e-5)
