"""PyTorch's own samples of SDPA, layer_norm and rms_norm (the OpInfos of its test suite) through the drop-ins: values,
gradients, error inputs, autocast, strides, subclasses, meta and fake tensors."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.common import assert_as_exact_as_torch
from tests.operators.opinfo_samples import OURS, op_infos, samples, theirs

NAMES = pytest.mark.parametrize("name", OURS)


def converted(sample, convert):
    return tree_map_only(torch.Tensor, convert, sample)


def run(function, sample, dtype) -> list[torch.Tensor]:
    """The result and the gradients of all floating inputs."""
    args, options = converted(sample, lambda x: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x)
    leaves = [x for x in tree_flatten((args, options))[0] if isinstance(x, torch.Tensor) and x.requires_grad]
    out = function(*args, **options)
    return [out, *torch.autograd.grad(out, leaves, gradient_like(out))]


def of_each_head(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """k or v with as many heads as q."""
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def by_kernel(q, k, v, enable_gqa=False, **options):
    """PyTorch's SDPA on its kernel, which samples of other than four contiguous dimensions do not reach."""
    if enable_gqa:
        k, v = of_each_head(q, k), of_each_head(q, v)
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    q, k, v = (x.expand(*leading, *x.shape[-2:])[(None,) * (2 - len(leading))].contiguous() for x in (q, k, v))
    return theirs("scaled_dot_product_attention")(q, k, v, **options).reshape(*leading, q.shape[-2], v.shape[-1])


def sum_magnitudes(
    q, k, v, grad, attn_mask=None, is_causal=False, dropout_p=0.0, enable_gqa=False
) -> list[torch.Tensor]:
    """How large the float32 terms are whose sums SDPA's gradients are: these samples have scores of up to 200, so that
    weights are 0 or 1, and dp and delta in ds = p (dp - delta) nearly the same."""
    q, k, v, grad = (x.detach().double() for x in (q, k, v, grad))
    kv_heads = k.shape[-3] if enable_gqa else 0
    if enable_gqa:
        k, v = of_each_head(q, k), of_each_head(q, v)
    scale = q.shape[-1] ** -0.5
    scores = q @ k.mT * scale + (0 if attn_mask is None else attn_mask.detach())
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    p, dp = scores.softmax(-1), grad.abs() @ v.abs().mT
    rounded = p * (1 + q.abs() @ k.abs().mT * scale)  # a score that is a unit in its last place off is a factor of p
    ds = rounded * (dp + (p * dp).sum(-1, keepdim=True))
    of_keys = (ds.mT @ q.abs() * scale).sum_to_size(k.shape)
    of_values = (rounded.mT @ grad.abs()).sum_to_size(v.shape)
    if enable_gqa:
        of_keys, of_values = (x.unflatten(-3, (kv_heads, -1)).sum(-3) for x in (of_keys, of_values))
    terms = [rounded @ v.abs(), (ds @ k.abs() * scale).sum_to_size(q.shape), of_keys, of_values]
    return terms if attn_mask is None else [*terms, ds.sum_to_size(attn_mask.shape)]


def gradient_like(out: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(out.shape, dtype=torch.float64).to(out.dtype)


def strides(x: torch.Tensor) -> list[int]:
    """Those that say where something lies."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


@pytest.mark.parametrize(
    "dtype, noncontiguous",
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)],
)
@NAMES
def test_values_and_gradients(name, dtype, noncontiguous):
    pooled = []  # of SDPA's samples, which are as large as each other and of few numbers
    for n, sample in enumerate(samples(name, dtype, noncontiguous)):
        ours, by_torch = run(OURS[name], sample, dtype), run(theirs(name), sample, dtype)
        assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in by_torch]
        assert strides(ours[0]) == strides(by_torch[0])
        truth = run(theirs(name), sample, torch.float64)
        if name != "scaled_dot_product_attention":
            for i, (x, y, t) in enumerate(zip(ours, by_torch, truth, strict=True)):
                assert_as_exact_as_torch(x, y, t, f"sample {n}, result {i}")
        elif sample[1]["dropout_p"] == 0:  # which weights are dropped is each library's own
            by_torch = run(by_kernel, sample, dtype)
            terms = sum_magnitudes(*sample[0], gradient_like(ours[0]), **sample[1])
            pooled.append(
                [torch.stack([z.detach().double() for z in x]) for x in zip(ours, by_torch, truth, terms, strict=True)]
            )
    for i, of_each in enumerate(itertools.zip_longest(*pooled)):
        found = torch.cat([x.flatten(1) for x in of_each if x is not None], 1)
        assert_as_exact_as_torch(found[0].to(dtype), *found[1:3], f"result {i}", found[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@NAMES
def test_autocast(name, dtype):
    for args, options in samples(name, dtype):
        with torch.autocast("cpu", torch.bfloat16):
            ours, expected = OURS[name](*args, **options), theirs(name)(*args, **options)
        assert ours.dtype == expected.dtype
        assert ours.shape == expected.shape


class Named(torch.Tensor):
    """A subclass in Tensor's own way."""


@NAMES
def test_subclasses(name):
    for sample in samples(name):
        args, options = converted(sample, lambda x: x.as_subclass(Named))
        torch.manual_seed(2)
        ours = OURS[name](*args, **options)
        assert type(ours) is type(theirs(name)(*args, **options)) is Named
        torch.manual_seed(2)
        assert torch.equal(ours.as_subclass(torch.Tensor), OURS[name](*sample[0], **sample[1]))


@pytest.mark.parametrize("kind", ["meta", "fake"])
@NAMES
def test_without_data(name, kind):
    for sample in samples(name):
        expected = theirs(name)(*sample[0], **sample[1])
        if kind == "meta":
            args, options = converted(sample, lambda x: x.to("meta"))
            ours = OURS[name](*args, **options)
            assert ours.is_meta
        else:
            with FakeTensorMode() as mode:
                args, options = converted(sample, mode.from_tensor)
                ours = OURS[name](*args, **options)
        assert (ours.shape, ours.dtype, strides(ours)) == (expected.shape, expected.dtype, strides(expected))


@pytest.mark.parametrize("name", ["native_layer_norm", "rms_norm"])
def test_error_inputs(name):
    """SDPA's OpInfo has none."""
    ours = OURS[name.removeprefix("native_")]
    for wrong in op_infos()[name].error_inputs("cpu"):
        sample = wrong.sample_input
        with pytest.raises(wrong.error_type):
            ours(sample.input, *sample.args, **sample.kwargs)
