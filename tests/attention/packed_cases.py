"""The cases of packed sequences, and what checks one against the float64 truth of each sequence alone."""

import itertools

import torch

import flashattn
from tests.attention.truth import Case, list_inputs, make_inputs, run, sum_magnitudes, torch_attention
from tests.common import INTERPRETED, Truth, assert_as_exact_as_torch, find_device, once_per_case, randn

REST = 5  # rows past the last sequence


def make_packed_case(case: Case, lengths_q, lengths_k) -> Case:
    """The case of a batch of these lengths."""
    return case._replace(batch=len(lengths_q), seq_q=max(lengths_q), seq_k=max(lengths_k))


def make_cu_seqlens(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def make_packed_inputs(case: Case, lengths_q, lengths_k, dtype, device):
    inputs, options = make_inputs(case, dtype, device)
    totals = [sum(lengths_q), sum(lengths_k), sum(lengths_k)]
    packed = [
        randn(total + REST, x.shape[1], x.shape[3], dtype=dtype, device=device)
        for total, x in zip(totals, inputs, strict=False)
    ]
    options = {name: value for name, value in options.items() if name not in ("q_lengths", "kv_lengths")}
    return packed + inputs[3:], options


def split_sequences(case: Case, lengths_q, lengths_k, options, inputs):
    """Each sequence as a case, options and inputs of its own."""
    ends_q, ends_k = itertools.accumulate(lengths_q), itertools.accumulate(lengths_k)
    for b, (n, m, end_q, end_k) in enumerate(zip(lengths_q, lengths_k, ends_q, ends_k, strict=True)):

        def slice_row(x, b=b, n=n, m=m):
            x = x[b : b + 1] if x.shape[0] > 1 else x
            return x[:, :, : n if x.shape[2] > 1 else 1, : m if x.shape[3] > 1 else 1]

        one = case._replace(batch=1, seq_q=n, seq_k=m, first_batch=b)
        own = dict(options)
        if "mask" in own:
            own["mask"] = slice_row(own["mask"])
        if case.slopes == "bh":
            own["alibi_slopes"] = own["alibi_slopes"][b : b + 1]
        q, k, v = (x[end - size : end].transpose(0, 1)[None] for x, end, size in zip(
            inputs, (end_q, end_k, end_k), (n, m, m), strict=False))  # fmt: skip
        others = [slice_row(x) if x.dim() == 4 else x for x in inputs[3:]]
        yield one, own, [q, k, v, *others]


def attend_by_sequence(case: Case, lengths_q, lengths_k, options):
    """PyTorch's (out, lse) as a function of packed inputs."""

    def attention(*inputs):
        outs, lses = [], []
        for one, own, x in split_sequences(case, lengths_q, lengths_k, options, inputs):
            out, lse = torch_attention(one, own, *x)
            outs.append(out[0].transpose(0, 1)), lses.append(lse[0])
        q, v = inputs[0], inputs[2]
        outs.append(q.new_zeros(REST, case.heads, v.shape[-1]))
        lses.append(lses[0].new_full((case.heads, REST), -torch.inf))
        return torch.cat(outs), torch.cat(lses, 1)

    return attention


def sum_packed_magnitudes(case: Case, lengths_q, lengths_k, options, inputs, grad_out, grad_lse):
    """How large the terms of the sums are, as `sum_magnitudes` has it."""
    parts = []
    at = 0
    for one, own, x in split_sequences(case, lengths_q, lengths_k, options, inputs):
        rows = slice(at, at + one.seq_q)
        at += one.seq_q
        parts.append(sum_magnitudes(one, own, x, grad_out[rows].transpose(0, 1)[None], grad_lse[None, :, rows]))
    q, k = (torch.cat([p[i] for p in parts], 2) for i in (2, 3))
    largest = [max(p[i].abs().max().item() if p[i].numel() else 0 for p in parts) for i in range(5, len(parts[0]))]
    return [0.0, 0.0, q, k, 0.0, *largest]


def ours(case: Case, lengths_q, lengths_k, options):
    def attention(*x):
        others = dict(zip(list_inputs(case)[3:], x[3:], strict=True))
        cu_q, cu_k = make_cu_seqlens(lengths_q, x[0].device), make_cu_seqlens(lengths_k, x[0].device)
        return flashattn.attention_varlen(
            *x[:3], cu_q, cu_k, case.seq_q, case.seq_k, return_lse=True, **options, **others
        )

    return attention


def make_packed_gradients(case, out, lse, dtype, device):
    grad_out = randn(*out.shape, dtype=dtype, device=device)
    return grad_out, torch.where(lse.isfinite(), randn(*lse.shape, dtype=torch.float32, device=device), 0)


def make_truth(case: Case, lengths_q, lengths_k, dtype, device) -> Truth:
    inputs, options = make_packed_inputs(case, lengths_q, lengths_k, dtype, device)
    theirs = attend_by_sequence(case, lengths_q, lengths_k, options)
    gradients = make_packed_gradients(case, *theirs(*inputs), dtype, device)
    exact = run(theirs, [x.double() for x in inputs], *gradients)
    by_torch = run(theirs, inputs, *gradients)
    terms = sum_packed_magnitudes(case, lengths_q, lengths_k, options, inputs, *gradients)
    return Truth(inputs, options, gradients, exact, by_torch, terms)


compute_truth = once_per_case(make_truth)


def check(case: Case, lengths_q, lengths_k, dtype, backend, compute_truth=compute_truth):
    case = make_packed_case(case, lengths_q, lengths_k)
    truth = compute_truth(case, lengths_q, lengths_k, dtype, find_device(backend))
    inputs, options, gradients = truth.fresh()
    for x, length in zip(inputs, (lengths_q, lengths_k, lengths_k), strict=False):
        x[sum(length) :] = torch.nan  # nothing is read there
    with flashattn.use_backend(backend):
        results = run(ours(case, lengths_q, lengths_k, options), inputs, *gradients)
    names = ("out", "lse", *(f"grad_{name}" for name in list_inputs(case)))
    for name, x, y, t, s in zip(names, results, truth.by_torch, truth.exact, truth.terms, strict=True):
        assert_as_exact_as_torch(x, y, t, name, s)
    for x, length in zip(results[2:5], (lengths_q, lengths_k, lengths_k), strict=True):
        assert (x[sum(length) :] == 0).all()


LENGTHS = [(40, 0, 63, 1, 130, 64), (40, 33, 0, 9, 111, 100)]
if INTERPRETED:  # which is slow
    LENGTHS = [(20, 0, 1, 70), (33, 9, 0, 61)]
CASES = [
    Case("full"),
    Case("causal", heads=4, head_dim=64, head_dim_v=40, causal=True),
    Case("window", window=(30, 4)),
    Case("softcap", softcap=3.0, causal=True),
    Case("slopes", heads=4, slopes="bh"),
    Case("mask", mask="bqk", causal=True),
    Case("bias", bias="hqk"),
    Case("bias_of_batches", bias="bk", causal=True),
    Case("sinks", sinks=True, causal=True),
    Case("dropout", heads=4, dropout_p=0.2),
    Case(
        "everything", heads=4, causal=True, window=(50, 0), softcap=4.0, slopes="h", mask="bk", bias="bhqk", sinks=True,
        dropout_p=0.1,
    ),
]  # fmt: skip


def check_dropout_of_padded_batch(backend):
    """The same seed drops the same weights, packed or padded."""
    lengths, device = (17, 40), find_device(backend)
    q, k, v = (randn(57, 2, 16, dtype=torch.float32, device=device) for _ in range(3))
    padded = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    both = torch.tensor(lengths, device=device)
    with flashattn.use_backend(backend):
        out = flashattn.attention_varlen(q, k, v, *[make_cu_seqlens(lengths, device)] * 2, dropout_p=0.5, seed=3)
        expected = flashattn.attention(*padded, q_lengths=both, kv_lengths=both, dropout_p=0.5, seed=3)
    for x, y, n in zip(out.split(lengths), expected, lengths, strict=True):
        torch.testing.assert_close(x.transpose(0, 1), y[:, :n], rtol=1e-6, atol=1e-6)


def check_nested_tensors(backend):
    device = find_device(backend)
    lengths = (5, 33, 0, 20)
    parts = [[randn(n, 2, 16, dtype=torch.float32, device=device) for n in lengths] for _ in range(3)]
    nested = [torch.nested.nested_tensor(x, layout=torch.jagged, requires_grad=True) for x in parts]
    flat = [torch.cat(x).requires_grad_() for x in parts]
    with flashattn.use_backend(backend):
        out, lse = flashattn.attention(*(x.transpose(1, 2) for x in nested), causal=True, return_lse=True)
        expected, expected_lse = flashattn.attention_varlen(
            *flat, *[make_cu_seqlens(lengths, device)] * 2, causal=True, return_lse=True
        )
        assert torch.equal(out.transpose(1, 2).values(), expected)
        assert torch.equal(lse.transpose(1, 2).values(), expected_lse.transpose(0, 1))
        gradients = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), nested)
        expected = torch.autograd.grad(expected.square().sum(), flat)
    for x, y in zip(gradients, expected, strict=True):
        assert torch.equal(x.values(), y)
