"""Hugging Face transformers on flashattn's backends: `register()`, then `attn_implementation="flashattn"`.

Two functions are registered: a model calls one for a mask, at the start of a forward pass, and one for attention, in
each layer. Without the first, transformers passes no mask at all and attends to padding.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import backends, tracing
from ..attention import attention, attention_varlen
from ..score import ScoreOptions

NAME = "flashattn"
CHECK = "_check_and_adjust_attn_implementation"  # a method of transformers' models


def register() -> None:
    """Register `attn_implementation="flashattn"` with transformers (5.0 or later), for `from_pretrained`, `from_config`
    and `set_attn_implementation`.

    Supported: causal and bidirectional models, grouped-query heads, padding on either side, custom masks (boolean or
    additive), caches, sliding windows, `softcap`, sinks (`s_aux`), `position_bias` with its gradient, dropout, and
    packed batches: by position_ids that restart, or, without a mask in memory, by `cu_seq_lens_q` and the arguments
    beside it, as `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them. Attention weights are never
    materialised: `output_attentions` warns and returns none.

    >>> import flashattn.compat.transformers
    >>> flashattn.compat.transformers.register()  # doctest: +SKIP
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    _accept_name(PreTrainedModel)


def _accept_name(model: type) -> None:
    """Have transformers use NAME as it is. It assumes that a name with "flash" in it is a package with flash_attn's
    calls: it would look for ours on its hub, and choose another for a model that lists compatible packages
    (gpt-oss)."""
    original = getattr(model, CHECK)
    if getattr(original, "accepts", None) == NAME:
        return

    @functools.wraps(original)
    def check(self, attn_implementation, *args, **kwargs):
        return NAME if attn_implementation == NAME else original(self, attn_implementation, *args, **kwargs)

    check.accepts = NAME  # type: ignore[attr-defined]  # a mark for the next call
    setattr(model, CHECK, check)


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others,
) -> Tensor | None:
    """The mask of a forward pass, bool (batch, 1, q_length, kv_length), True = attend; None if `attention_forward`
    needs none: the last query is at the last key, nothing is padded, and no window is shorter than the keys."""
    from transformers.masking_utils import sdpa_mask

    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    may_skip = (allow_is_causal_skip and ends_together) or allow_is_bidirectional_skip
    limited = local_size is not None and kv_length > local_size
    if may_skip and not limited and not is_padded(attention_mask):
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **others,
    )  # fmt: skip


def is_padded(mask: Tensor | None) -> bool:
    """Whether some token of a (batch, seq) mask is masked. Graphs of torch.compile and CUDA graphs cannot read it and
    assume so; on a GPU reading it synchronises, once in a forward pass."""
    if mask is None or tracing.is_traced() or tracing.is_capturing():
        return mask is not None
    return not bool(mask.all())


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool = False,
    **others,
) -> tuple[Tensor, None]:
    """One layer's attention: query (batch, heads, seq_q, head_dim), key and value (batch, kv_heads, seq_k, head_dim).

    Returns:
        out (batch, seq_q, heads, head_dim), and None for the weights.
    """
    if output_attentions:  # as transformers' own "sdpa" does
        backends.warn_once(
            f'attn_implementation="{NAME}" has no output_attentions: weights are never formed ("eager" has)'
        )
    options = ScoreOptions(softcap=softcap, sinks=s_aux, scale=scaling)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is not None:
        if position_bias is not None:
            raise ValueError("position_bias must be None in a packed batch: its positions are those of a padded one")
        if cu_seq_lens_k is None:
            raise ValueError("cu_seq_lens_k must be given with cu_seq_lens_q, got None")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options["window"] = None if sliding_window is None else (sliding_window - 1, None)
        out = attention_varlen(
            q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, causal=causal, dropout_p=dropout,
            **options,
        )  # fmt: skip
        return out[None], None
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:  # a custom mask, which is additive
        bias = mask if bias is None else bias + mask
        mask = None
    if bias is not None:
        bias = bias.to(query.dtype)
    # A mask includes causality and the window. Without one, the window is not shorter than the keys.
    causal = causal and attention_mask is None
    options["mask"] = mask
    out = attention(query, key, value, causal=causal, bias=bias, dropout_p=dropout, **options)
    return out.transpose(1, 2).contiguous(), None
