"""Hugging Face transformers on flashattn's backends: `register()`, then `attn_implementation="flashattn"`.

Two functions are registered, since a model asks twice: once for a mask, at the start of a forward pass, and in every
layer for attention. Without the first, transformers passes no mask at all and padding is attended to.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import backends, tracing
from ..attention import attention, attention_varlen

NAME = "flashattn"


def register() -> None:
    """Make `attn_implementation="flashattn"` known to transformers (5.0 or later), in `from_pretrained`, `from_config`
    and `set_attn_implementation`.

    Taken over: causal and bidirectional models, grouped heads, padding on either side, custom masks (boolean or added),
    caches, sliding windows, `softcap`, sinks (`s_aux`), `position_bias` with its gradient, dropout, and packed batches:
    by position_ids that begin anew, or, without a mask in memory, by `cu_seq_lens_q` and its like, as
    `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them. Attention weights are never
    formed: `output_attentions` warns, and gives none.

    >>> import flashattn.compat.transformers
    >>> flashattn.compat.transformers.register()  # doctest: +SKIP
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    _take_the_name_as_it_is(PreTrainedModel)


def _take_the_name_as_it_is(model: type) -> None:
    """transformers takes every name with "flash" in it for a package of flash_attn's calls: it would look for ours on
    its hub, and for a model that lists the packages it goes with (gpt-oss) choose another."""
    theirs = model._check_and_adjust_attn_implementation
    if getattr(theirs, "knows", None) == NAME:
        return

    @functools.wraps(theirs)
    def check(self, attn_implementation, *args, **kwargs):
        return NAME if attn_implementation == NAME else theirs(self, attn_implementation, *args, **kwargs)

    check.knows = NAME
    model._check_and_adjust_attn_implementation = check


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
    """The mask of a forward pass, bool (batch, 1, q_length, kv_length), True = attend; None where `attention_forward`
    needs none: the last query sees the last key, nothing is padded, and no window is shorter than the keys."""
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
    """Whether some token of a (batch, seq) mask is masked. A compiled graph and a CUDA graph cannot ask, and take it to
    be so; on a GPU to ask is to wait for it, once in a forward pass."""
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
    if output_attentions:  # transformers' own "sdpa" answers so too
        backends.warn_once(
            f'attn_implementation="{NAME}" has no output_attentions: weights are never formed ("eager" has)'
        )
    options = dict(softcap=softcap, sinks=s_aux, dropout_p=dropout, scale=scaling)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is not None:
        if position_bias is not None:
            raise ValueError("position_bias must be None in a packed batch: its positions are those of a padded one")
        packed = (x[0].transpose(0, 1) for x in (query, key, value))
        window = None if sliding_window is None else (sliding_window - 1, None)
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return attention_varlen(*packed, *lengths, causal=causal, window=window, **options)[None], None
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:  # a custom one, which is added
        mask, bias = None, mask if bias is None else bias + mask
    if bias is not None:
        bias = bias.to(query.dtype)
    # A mask says it all. Without one a window is no shorter than the keys.
    causal = causal and attention_mask is None
    out = attention(query, key, value, causal=causal, mask=mask, bias=bias, **options)
    return out.transpose(1, 2).contiguous(), None
