"""The cases of dense attention, and what checks one against the float64 truth, gradients included."""

import itertools

import torch

import flashattn
from tests.attention.truth import (
    Case,
    hide_past_lengths,
    list_inputs,
    make_gradients,
    make_inputs,
    ours,
    run,
    sum_magnitudes,
    torch_attention,
)
from tests.common import Truth, assert_as_exact_as_torch, find_device, once_per_case

CASES = [
    Case("full"),
    Case("causal", causal=True),
    Case("one_query_one_key", seq_q=1, seq_k=1, head_dim=1, head_dim_v=1),
    Case("one_key", seq_q=5, seq_k=1),
    Case("no_keys", seq_q=5, seq_k=0, causal=True),
    Case("no_queries", seq_q=0, seq_k=7),
    Case("no_batch", batch=0),
    Case("grouped", heads=6, kv_heads=2, seq_q=37, seq_k=111, causal=True),
    Case("one_kv_head", heads=4, kv_heads=1, seq_q=40, seq_k=40, head_dim=20, head_dim_v=20),
    Case("more_queries_than_keys", seq_q=111, seq_k=40, causal=True),  # the first 71 queries see nothing
    Case("more_keys_than_queries", seq_q=33, seq_k=111, causal=True),
    Case("decode", heads=4, kv_heads=2, seq_q=1, seq_k=111, head_dim=64, head_dim_v=64, causal=True),
    Case("wider_v", seq_q=40, seq_k=70, head_dim=5, head_dim_v=40, causal=True),
    Case("narrower_v", seq_q=40, seq_k=70, head_dim=72, head_dim_v=3),
    Case("head_dim_64", heads=1, kv_heads=1, seq_q=111, seq_k=111, head_dim=64, head_dim_v=64, causal=True),
    Case("head_dim_128", heads=1, kv_heads=1, seq_q=70, seq_k=70, head_dim=128, head_dim_v=128),
    Case("head_dim_256", heads=1, kv_heads=1, seq_q=35, seq_k=63, head_dim=256, head_dim_v=256, causal=True),
    Case("head_dim_200", heads=1, kv_heads=1, seq_q=17, seq_k=35, head_dim=200, head_dim_v=136),
    Case("scale", scale=0.7, causal=True),
    Case("negative_scale", scale=-0.3),
    Case("kv_lengths", batch=4, kv_lengths=(0, 1, 40, 63)),
    Case("kv_lengths_causal", batch=3, seq_q=40, seq_k=70, kv_lengths=(0, 35, 70), causal=True),
    Case("q_lengths", batch=3, q_lengths=(0, 33, 63)),
    Case("q_lengths_of_many_keys", batch=2, seq_q=40, seq_k=300, head_dim=64, head_dim_v=64, q_lengths=(20, 40)),
    Case("both_lengths", batch=4, heads=4, q_lengths=(0, 20, 63, 1), kv_lengths=(63, 0, 33, 40), causal=True),
    Case("window", seq_q=111, seq_k=111, window=(17, 5)),
    Case("window_left", batch=2, heads=4, seq_q=130, seq_k=111, window=(33, None), q_lengths=(130, 77)),
    Case("window_right", seq_q=40, seq_k=230, window=(None, 3), head_dim=64),
    Case("window_causal", heads=4, seq_q=333, seq_k=350, window=(64, 9), causal=True),
    Case("window_of_one", seq_q=70, seq_k=70, window=(0, 0)),
    Case("decode_narrow", heads=8, kv_heads=1, seq_q=2, seq_k=600, head_dim=24, head_dim_v=9, causal=True),
    Case("window_decode", heads=8, seq_q=3, seq_k=700, window=(130, None), causal=True),
    Case("window_of_everything", seq_q=40, seq_k=70, window=(2**31 - 1, 2**62)),
    Case("window_past_the_keys", batch=2, seq_q=63, seq_k=63, window=(5, 0), kv_lengths=(20, 63)),
    Case("softcap", softcap=2.0),
    Case("softcap_of_large_scores", softcap=5.0, scale=2.0, causal=True),
    Case("slopes", batch=2, heads=4, seq_q=40, seq_k=70, slopes="h"),
    Case("slopes_of_each_batch", batch=2, heads=4, slopes="bh", causal=True),
    Case("mask", batch=2, mask="bhqk"),
    Case("mask_of_keys", batch=2, heads=4, mask="bk", causal=True),
    Case("mask_of_queries", seq_q=111, seq_k=40, mask="q"),
    Case("bias", batch=2, seq_q=40, seq_k=111, bias="bhqk", head_dim=40),
    Case("bias_of_heads", batch=2, heads=4, seq_q=111, bias="hqk", causal=True),
    Case("bias_of_keys", batch=2, heads=4, seq_q=130, seq_k=130, bias="k", window=(20, 20)),
    Case("bias_of_queries", batch=3, bias="hq"),
    Case("bias_of_batches", batch=8, bias="b"),
    Case("bias_of_a_batch", batch=3, heads=4, seq_q=130, seq_k=200, bias="bqk", kv_lengths=(200, 0, 77)),
    Case("sinks", batch=2, heads=4, sinks=True),
    Case("sinks_and_nothing_to_see", seq_q=111, seq_k=40, sinks=True, causal=True, window=(30, None)),
    Case("sinks_decode", batch=2, heads=4, seq_q=2, seq_k=700, sinks=True, window=(600, 0)),
    Case("dropout", batch=2, heads=4, dropout_p=0.3),
    Case("dropout_causal", seq_q=130, seq_k=150, head_dim=64, causal=True, dropout_p=0.1),
    Case("features_decode", batch=2, heads=4, seq_q=2, seq_k=130, softcap=3.0, slopes="h", bias="hk", sinks=True),
    Case(
        "everything",
        batch=3,
        heads=4,
        seq_q=111,
        seq_k=130,
        causal=True,
        window=(70, 5),
        kv_lengths=(130, 0, 77),
        q_lengths=(111, 50, 0),
        softcap=3.0,
        slopes="bh",
        mask="bqk",
        bias="hqk",
        sinks=True,
        dropout_p=0.2,
    ),
    Case("long", heads=1, kv_heads=1, seq_q=35, seq_k=1000, head_dim=40, head_dim_v=40, causal=True),
]


def make_truth(case: Case, dtype: torch.dtype, device: torch.device) -> Truth:
    inputs, options = make_inputs(case, dtype, device)
    gradients = make_gradients(case, options, dtype, device)

    def theirs(*x):
        return torch_attention(case, options, *x)

    exact = run(theirs, [x.double() for x in inputs], *gradients)
    by_torch = run(theirs, inputs, *gradients)
    return Truth(inputs, options, gradients, exact, by_torch, sum_magnitudes(case, options, inputs, *gradients))


compute_truth = once_per_case(make_truth)


def check(case: Case, dtype: torch.dtype, backend: str, compute_truth=compute_truth) -> None:
    truth = compute_truth(case, dtype, find_device(backend))
    inputs, options, gradients = truth.fresh()
    hide_past_lengths(case, inputs, gradients)
    with flashattn.use_backend(backend):
        results = run(ours(case, options), inputs, *gradients)
    names = ("out", "lse", *(f"grad_{name}" for name in list_inputs(case)))
    for name, x, y, t, summed in zip(names, results, truth.by_torch, truth.exact, truth.terms, strict=True):
        assert_as_exact_as_torch(x, y, t, name, summed)


FEATURES = dict(
    causal=True, window=(40, 9), q_lengths=(70, 33, 0), kv_lengths=(90, 0, 64), softcap=3.0, slopes="bh", mask="bk",
    bias="hqk", sinks=True, dropout_p=0.2, kv_heads=2, scale=0.4,
)  # fmt: skip


def pairwise() -> list[Case]:
    """Cases in which every two features meet, and each is met without the other: feature n is in the cases of the n-th
    four of 1 .. 6, and in none but those, so that of any two each has a case the other lacks.

    Kleitman and Spencer, "Families of k-independent sets" (1973).
    """
    fours = dict(zip(FEATURES, itertools.combinations(range(1, 7), 4), strict=False))
    base = Case("", batch=3, heads=4, kv_heads=4, seq_q=70, seq_k=90, head_dim=24, head_dim_v=40)
    return [
        base._replace(name=f"pairs_{n}", **{name: FEATURES[name] for name, four in fours.items() if n in four})
        for n in range(7)
    ]


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 5, 2, 1))[:, :, 2:-1, 3:-5],
    "last_dim_strided": lambda x: x.mT.contiguous().mT,
    "every_second": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "backwards_batch": lambda x: torch.stack([x[0], x[0]], 0)[:1].expand(x.shape[0], -1, -1, -1),
}


def check_strides(view, backend):
    device = find_device(backend)
    case = Case("", batch=1, heads=4, kv_heads=2, seq_q=40, seq_k=50, head_dim=24, causal=True)
    inputs, options = make_inputs(case, torch.float32, device)
    views = [VIEWS[view](x) for x in inputs]
    grad_out, grad_lse = make_gradients(case, options, torch.float32, device)

    def both(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out, lse = flashattn.attention(*tensors, return_lse=True, **options)
        return [out, lse, *torch.autograd.grad((out, lse), tensors, (VIEWS[view](grad_out), grad_lse))]

    with flashattn.use_backend(backend):
        for a, b in zip(both(views), both(inputs), strict=True):
            assert torch.equal(a, b)
