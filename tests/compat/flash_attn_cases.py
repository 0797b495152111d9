"""The options of flash_attn's calls, and what checks them against flashattn.attention."""

import torch

import flashattn
from flashattn.compat import flash_attn

OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(causal=True), dict(causal=True)),
    "window": (dict(window_size=(7, -1)), dict(window=(7, None))),
    "window_causal": (dict(window_size=(7, 3), causal=True), dict(window=(7, 0))),
    "window_of_one": (dict(window_size=(0, 0)), dict(window=(0, 0))),
    "window_of_none": (dict(window_size=(None, None), softcap=None), {}),
    "window_of_a_tensor": (dict(window_size=torch.tensor([7, -1])), dict(window=(7, None))),
    "scale_of_a_tensor": (dict(softmax_scale=torch.tensor(0.25)), dict(scale=0.25)),
    "scale": (dict(softmax_scale=0.2), dict(scale=0.2)),
    "softcap": (dict(softcap=2.0), dict(softcap=2.0)),
    "slopes": (dict(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4])),) * 2,
}


def check_as_attention(name):
    theirs, ours = OPTIONS[name]
    q = torch.randn(2, 20, 4, 16, requires_grad=True)
    kv = torch.randn(2, 33, 2, 2, 16, requires_grad=True)
    out, lse, weights = flash_attn.flash_attn_kvpacked_func(q, kv, **theirs, return_attn_probs=True)
    expected, expected_lse = flashattn.attention(q.transpose(1, 2), *kv.permute(2, 0, 3, 1, 4), **ours, return_lse=True)
    assert torch.equal(out, expected.transpose(1, 2))
    assert torch.equal(lse, expected_lse)
    assert weights is None
    assert out.is_contiguous()
    again = flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **theirs)
    assert torch.equal(again, out)
    gradients = [torch.autograd.grad(x.square().sum(), (q, kv)) for x in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


STARTS_Q, STARTS_K = torch.tensor([0, 7, 7, 20]).int(), torch.tensor([0, 10, 14, 40]).int()


def split_into_pages(x, starts, page_size):
    """(pages, page table) of packed rows, the pages in no order."""
    lengths = starts.diff().tolist()
    width = max(-(-n // page_size) for n in lengths)
    table = torch.randperm(len(lengths) * width + 2)[: len(lengths) * width].view(len(lengths), width).int()
    pages = torch.full((len(lengths) * width + 2, page_size, *x.shape[1:]), torch.nan)
    for rows, own in zip(x.split(lengths), table, strict=True):
        for i, row in enumerate(rows):
            pages[own[i // page_size], i % page_size] = row
    return pages, table


def check_varlen_of_pages():
    q, k = torch.randn(20, 4, 16), torch.randn(40, 2, 16)
    pages, table = split_into_pages(k, STARTS_K, 8)
    out = flash_attn.flash_attn_varlen_func(q, pages, pages, STARTS_Q, STARTS_K, 13, 26, causal=True, block_table=table)
    assert torch.equal(out, flashattn.attention_varlen(q, k, k, STARTS_Q, STARTS_K, 13, 26, causal=True))


def check_kvcache(lies, name):
    """Each row is attention over its own keys, the new ones among them."""
    theirs, ours = OPTIONS[name]
    lengths, seq = (10, 4, 26), 3
    q, k, v = (torch.randn(3, seq, heads, 16) for heads in (4, 2, 2))
    old = torch.randn(2, 3, 32, 2, 16)
    options = dict(cache_seqlens=torch.tensor(lengths).int())
    if lies == "rows":
        caches = old.clone()
    elif lies == "chosen":
        caches = torch.full((2, 7, 32, 2, 16), torch.nan)
        options["cache_batch_idx"] = torch.tensor([5, 0, 3]).int()
        caches[:, [5, 0, 3]] = old
    else:
        starts = torch.tensor([0, 32, 64, 96])
        caches, tables = zip(*(split_into_pages(x.flatten(0, 1), starts, 8) for x in old), strict=True)
        caches = torch.stack([caches[0], move_pages(caches[1], tables[1], tables[0])])
        options["block_table"] = tables[0]
    out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, **options, **theirs, return_softmax_lse=True)
    for b, n in enumerate(lengths):
        keys, values = (torch.cat([x[b, :n], y[b]])[None].transpose(1, 2) for x, y in ((old[0], k), (old[1], v)))
        expected, expected_lse = flashattn.attention(
            q[b : b + 1].transpose(1, 2), keys, values, **ours, return_lse=True
        )
        torch.testing.assert_close(out[b : b + 1].transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b : b + 1], expected_lse, rtol=1e-5, atol=1e-5)
    again = flash_attn.flash_attn_with_kvcache(
        q, *caches, **(options | {"cache_seqlens": torch.tensor(lengths).int() + seq}), **theirs
    )
    assert torch.equal(again, out)  # what was written is there


def move_pages(pages, table, wanted):
    """Pages moved so that another table reads the same."""
    moved = torch.full_like(pages, torch.nan)
    moved[wanted.flatten().long()] = pages[table.flatten().long()]
    return moved


def check_kvcache_rotates(causal, interleaved):
    q, k, v = (torch.randn(2, 3, 2, 16) for _ in range(3))
    angles = torch.rand(16, 5) * 6
    caches = torch.zeros(2, 2, 16, 2, 16)
    out = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, angles.cos(), angles.sin(), cache_seqlens=torch.tensor([0, 4]).int(), causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    position = torch.arange(3) if causal else torch.zeros(3).long()
    turned = rotate_pairs(q[:1], angles[position], interleaved), rotate_pairs(k[:1], angles[:3], interleaved), v[:1]
    expected = flashattn.attention(*(x.transpose(1, 2) for x in turned), causal=causal)
    torch.testing.assert_close(out[:1].transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[0, 1, 4:7], rotate_pairs(k[1:], angles[4:7], interleaved)[0])


def rotate_pairs(x, angles, interleaved):
    """Pairs of the first 10 numbers of (1, seq, heads, 16) as complex numbers."""
    part = x[..., :10].unflatten(-1, (5, 2)) if interleaved else torch.stack(x[..., :10].split(5, -1), -1)
    turned = torch.view_as_real(
        torch.view_as_complex(part.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat((turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1), x[..., 10:]), -1)
