"""Callables and block masks, and what checks them against FlexAttention and float64, gradients included."""

import functools
import math

import torch
from torch.nn.attention import flex_attention as theirs

import flashattn
from flashattn.compat.flex import flex_attention
from tests.common import INTERPRETED, Truth, assert_as_exact_as_torch, once_per_case, skip_if_wrong_there

BATCH, HEADS, DIM = 2, 4, 16
SEQ_Q, SEQ_K = (40, 50) if INTERPRETED else (150, 170)


def create_block_mask(mask_mod, batch, heads, seq_q, seq_k, block_size=128):
    return theirs.create_block_mask(mask_mod, batch, heads, seq_q, seq_k, torch.get_default_device(), block_size)


def make_captured(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def relative_bias(dtype):
    table = make_captured(HEADS, SEQ_Q + SEQ_K, dtype=dtype)
    return (lambda score, b, h, i, j: score + table[h, i - j + SEQ_K]), [table]


def softcap_and_scale(dtype):
    factor, shift = make_captured(HEADS, dtype=dtype), torch.nn.Parameter(torch.randn(BATCH, SEQ_K, dtype=dtype))

    def mod(score, b, h, i, j):
        return 3 * torch.tanh(score * factor[h].exp() / 3) + shift[b, j]

    return mod, [factor, shift]


def causal(score, b, h, i, j):
    return torch.where(i >= j, score, -float("inf"))


SCORE_MODS = {
    "identity": lambda dtype: (lambda score, b, h, i, j: score, []),
    "causal": lambda dtype: (causal, []),
    "alibi": lambda dtype: (lambda score, b, h, i, j: score - (i - j).abs() * torch.exp2(-(h + 1.0)), []),
    "relative_bias": relative_bias,
    "softcap_and_scale": softcap_and_scale,
    "a_number": lambda dtype: (lambda score, b, h, i, j: score * 0 + 1.5, []),
}


def documents():
    document = torch.randint(0, 3, (BATCH, max(SEQ_Q, SEQ_K))).sort(-1).values
    return create_block_mask(
        lambda b, h, i, j: (document[b, i] == document[b, j]) & (i >= j), BATCH, None, SEQ_Q, SEQ_K, 32
    )


def by_head():
    width = torch.tensor([5, 20, 80, 1000])
    return create_block_mask(lambda b, h, i, j: (i - j).abs() <= width[h], None, HEADS, SEQ_Q, SEQ_K, (32, 16))


BLOCK_MASKS = {
    "causal": lambda: create_block_mask(lambda b, h, i, j: i >= j, None, None, SEQ_Q, SEQ_K),
    "window": lambda: create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 40), None, None, SEQ_Q, SEQ_K, 16),
    "documents": documents,
    "by_head": by_head,
    "nothing_in_some_rows": lambda: create_block_mask(
        lambda b, h, i, j: (i >= SEQ_Q // 2) & (j < SEQ_K // 4), None, None, SEQ_Q, SEQ_K, 32
    ),
}


def inputs(kv_heads=HEADS, dtype=torch.float32):
    shapes = (HEADS, SEQ_Q), (kv_heads, SEQ_K), (kv_heads, SEQ_K)
    return [torch.randn(BATCH, heads, seq, DIM, dtype=dtype, requires_grad=True) for heads, seq in shapes]


def check_as_flex_attention(mod, block_mask, backend):
    q, k, v = (x.detach() for x in inputs())  # FlexAttention refuses inputs with gradients on the CPU
    mod, tables = SCORE_MODS[mod](torch.float32)
    for table in tables:
        table.requires_grad_(False)
    options = dict(score_mod=mod, block_mask=None if block_mask is None else BLOCK_MASKS[block_mask](), scale=0.3)
    with flashattn.use_backend(backend), torch.no_grad():
        out, lse = flex_attention(q, k, v, **options, return_lse=True)
        expected, aux = theirs.flex_attention(q, k, v, **options, return_aux=theirs.AuxRequest(lse=True))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, aux.lse, rtol=1e-5, atol=1e-5)


def make_indices():
    """b, h, i and j of every score, as a mod takes them."""
    return [torch.arange(n).view(-1, *[1] * (3 - d)) for d, n in enumerate((BATCH, HEADS, SEQ_Q, SEQ_K))]


def apply_mod(mod, q, k):
    """Every score, in q's dtype."""
    scores = q @ k.repeat_interleave(HEADS // k.shape[1], 1).mT * DIM**-0.5
    return mod(scores, *make_indices()).to(scores.dtype).broadcast_to(scores.shape)


def compute_weights(scores, block_mask):
    if block_mask is None:
        return scores.softmax(-1)
    keep = block_mask.mask_mod(*make_indices())
    some = keep.any(-1, keepdim=True)
    return torch.where(some, scores.masked_fill(~keep, -torch.inf).masked_fill(~some, 0).softmax(-1), 0)


def attend_densely(mod, block_mask, q, k, v):
    """Softmax of the whole matrix, in q's dtype."""
    return compute_weights(apply_mod(mod, q, k), block_mask) @ v.repeat_interleave(HEADS // k.shape[1], 1)


def sum_magnitudes(mod, block_mask, q, k, v, tables, grad):
    """How large the float32 terms are whose sums the gradients of `tables` are: ds = p (dp - delta), where dp and delta
    may cancel (as in tests/attention/truth.py), times what the score changes by with its entry of the table."""
    scores = apply_mod(mod, q.detach(), k.detach())
    p = compute_weights(scores.detach(), block_mask)
    dp = grad.abs() @ v.detach().abs().repeat_interleave(HEADS // v.shape[1], 1).mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    terms = []
    for table in tables:
        of_each = torch.zeros_like(ds).requires_grad_()
        (summed,) = torch.autograd.grad(scores, table, of_each, create_graph=True)
        (change,) = torch.autograd.grad(summed.sum(), of_each, retain_graph=True)  # a score has one entry of a table
        terms += torch.autograd.grad(scores, table, ds * change.sign(), retain_graph=True)
    return terms


def make_mask_and_grad(block_mask: str | None):
    """The block mask of this name, and the gradient of the output."""
    torch.manual_seed(0)
    made = None if block_mask is None else BLOCK_MASKS[block_mask]()
    return made, torch.randn(BATCH, HEADS, SEQ_Q, DIM)


def make_leaves(mod: str, dtype, kind):
    """The callable, q, k and v as `dtype` rounds them, and the tensors that the callable captured, all in `kind`."""
    torch.manual_seed(1)
    x = [t.detach().to(dtype).to(kind).requires_grad_() for t in inputs(kv_heads=2)]
    torch.manual_seed(2)
    made, tables = SCORE_MODS[mod](torch.float32)
    if kind == torch.float64:
        cells = {id(t): t.detach().double().requires_grad_() for t in tables}
        for cell in made.__closure__ or ():
            if id(cell.cell_contents) in cells:
                cell.cell_contents = cells[id(cell.cell_contents)]
        tables = list(cells.values())
    return made, x, tables


@once_per_case
def compute_truth(dtype, mod: str, block_mask: str | None, device: torch.device) -> Truth:
    block_mask, grad = make_mask_and_grad(block_mask)
    results = []
    for kind in (dtype, torch.float64):
        made, x, tables = make_leaves(mod, dtype, kind)
        out = attend_densely(made, block_mask, *x)
        results.append([out, *torch.autograd.grad(out, [*x, *tables], grad.to(out))])
    terms = [0.0] * 4 + sum_magnitudes(made, block_mask, *x, tables, grad.double())
    return Truth((), {}, (), results[1], results[0], terms)


def check_gradients(dtype, mod, block_mask, backend):
    """Of q, k, v and of what the score_mod captured, with grouped heads."""
    skip_if_wrong_there(backend, dtype)
    truth = compute_truth(dtype, mod, block_mask, torch.get_default_device())
    block_mask, grad = make_mask_and_grad(block_mask)
    made, x, tables = make_leaves(mod, dtype, dtype)
    with flashattn.use_backend(backend):
        out = flex_attention(*x, score_mod=made, block_mask=block_mask, enable_gqa=True)
        results = [out, *torch.autograd.grad(out, [*x, *tables], grad.to(out))]
    for n, (ours, by_torch, exact, summed) in enumerate(
        zip(results, truth.by_torch, truth.exact, truth.terms, strict=True)
    ):
        assert_as_exact_as_torch(ours, by_torch, exact, f"result {n}", summed)


def check_with_every_other_feature(backend, by_position):
    """A score_mod that does nothing, and a block mask that is a window, change nothing. Without features that count
    from positions the CPU engine takes the block mask."""
    q, k, v = inputs()
    options = dict(
        bias=make_captured(HEADS, 1, SEQ_K), softcap=3.0, sinks=make_captured(HEADS),
        mask=torch.rand(BATCH, 1, 1, SEQ_K) > 0.2,
        kv_lengths=torch.tensor([SEQ_K, SEQ_K - 20]), q_lengths=torch.tensor([SEQ_Q - 3, SEQ_Q]),
    )  # fmt: skip
    if by_position:
        options |= dict(alibi_slopes=torch.rand(HEADS), dropout_p=0.2, seed=5)
    window = create_block_mask(
        lambda b, h, i, j: (j <= i + SEQ_K - SEQ_Q + 9) & (j >= i + SEQ_K - SEQ_Q - 50),
        None,
        None,
        SEQ_Q,
        SEQ_K,
        32,
    )
    results = []
    for other in (
        dict(window=(50, 9)), dict(block_mask=window), dict(score_mod=lambda s, b, h, i, j: s, window=(50, 9))
    ):  # fmt: skip
        with flashattn.use_backend(backend):
            out, lse = flashattn.attention(q, k, v, **options, **other, return_lse=True)
        wanted = (q, k, v, options["bias"], options["sinks"])
        loss = out.square().sum() + lse[lse.isfinite()].sum()
        results.append([out, lse, *torch.autograd.grad(loss, wanted)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def short_table():
    """As long as the window: other pairs would read outside of it."""
    table = make_captured(9)
    return (lambda score, b, h, i, j: score * 2 + table[i - j]), [table]


def long_rows():
    """Of two dimensions, past the end by far, and a table of integer indices into another."""
    table, steps = make_captured(2, 9), torch.arange(9)
    return (lambda score, b, h, i, j: score + table[h, steps[i - j]] + table[h, (i - j) * 1]), [table]


def roots():
    """A number whose derivative is NaN where it is not seen."""
    factor = torch.tensor(0.5, requires_grad=True)
    return (lambda score, b, h, i, j: score + factor * torch.sqrt(i - j + 0.0) / 3), [factor]


def logarithms():
    """Derivatives by the score and by a number of a table that are NaN where they are not seen."""
    factor = make_captured(2)
    return (lambda score, b, h, i, j: score * torch.log(i - j + 2.0) + factor[h] * torch.log(i - j + 1.5)), [factor]


def check_hidden_pairs(make, backend):
    """Nothing is read outside of what is captured, and no gradient is NaN, where only hidden pairs would do either."""
    mod, others, x = make_hidden_pairs(make)
    exact = [t.detach().double().requires_grad_() for t in x]
    with flashattn.use_backend(backend):
        ours = flashattn.attention(*x, score_mod=mod, window=(8, 0))
        gradients = torch.autograd.grad(ours.square().sum(), [*x, *others])
    truth = attend_in_window(mod, *exact)
    expected = torch.autograd.grad(truth.square().sum(), [*exact, *others])
    for found, right in zip([ours, *gradients], [truth, *expected], strict=True):
        torch.testing.assert_close(found.double(), right.double(), rtol=3e-5, atol=3e-5)


def check_second_derivatives_of_hidden_pairs(make, backend):
    mod, others, x = make_hidden_pairs(make)
    exact = [t.detach().double().requires_grad_() for t in x]

    def differentiate(attend, inputs):
        first = torch.autograd.grad(attend(*inputs[:3]).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    with flashattn.use_backend(backend):
        found = differentiate(functools.partial(flashattn.attention, score_mod=mod, window=(8, 0)), [*x, *others])
    expected = differentiate(functools.partial(attend_in_window, mod), [*exact, *others])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item())


def make_hidden_pairs(make):
    """(score_mod, what it captured, [q, k, v])"""
    torch.manual_seed(1)
    return *make(), [torch.randn(1, 2, 40, DIM, requires_grad=True) for _ in range(3)]


def attend_in_window(mod, q, k, v):
    """By PyTorch's operations, with a score_mod of the pairs that attend alone."""
    scores = q @ k.mT * DIM**-0.5
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    pairs = torch.where((j <= i) & (j >= i - 8))  # of every head
    heads = []
    for h in range(2):
        seen = mod(scores[0, h][pairs], 0, torch.tensor(h), *pairs)
        heads.append(torch.full_like(scores[0, h], -math.inf).index_put(pairs, seen))
    return torch.stack(heads)[None].softmax(-1) @ v


def every_operation(score, b, h, i, j):
    """One of each kind that the Triton functions are generated from."""
    x = torch.clamp(score, -3, 3) + torch.relu(score - 1) + torch.maximum(score, -score) * torch.sign(score + 0.01)
    x = x + torch.exp(-(score**2)) + torch.log(score.abs() + 1) + torch.sqrt(score**2 + 1)
    x = x + torch.sin(score) * torch.cos(score) + torch.sigmoid(score) + torch.tanh(score) + torch.erf(score)
    x = x + 2.0 ** (-(h + 1.0)) + (i % 3) - (i - j) // 4 + score.pow(0.0) + 1 / (score**3 + 40)
    x = x + torch.where((i > j) | ~(i != 5) & (b == 0), score / (1 + j), torch.rsqrt(score * score + 2))
    return x + torch.floor(score.detach()) * 0.1 + torch.exp2(score.clamp(max=1.0)) + score.reciprocal().clamp(-1, 1)


def check_every_operation(backend):
    torch.manual_seed(0)
    x = [t.detach().requires_grad_() for t in inputs()]
    exact = [t.detach().double().requires_grad_() for t in inputs()]
    for a, b in zip(exact, x, strict=True):
        a.data.copy_(b.data)
    with flashattn.use_backend(backend):
        ours = flex_attention(*x, score_mod=every_operation)
        gradients = torch.autograd.grad(ours.square().sum(), x)
    truth = attend_densely(every_operation, None, *exact)
    expected = torch.autograd.grad(truth.square().sum(), exact)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
