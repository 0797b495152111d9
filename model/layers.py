"""The pieces of a block: attention with rotary positions and a cache, the feed-forward, the block itself."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashattn

from .config import Config
from .experts import Experts
from .positions import rotate
from .step import Packed, Step

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu, "relu": F.relu}


class Linear(nn.Linear):
    """nn.Linear; on a CPU, for the few rows of a decode step, at the speed of memory."""

    def forward(self, x: Tensor) -> Tensor:
        return flashattn.linear(x, self.weight, self.bias)


def make_norm(config: Config, width: int | None = None) -> nn.Module:
    """width: the model's by default."""
    norm = flashattn.LayerNorm if config.norm == "layer" else flashattn.RMSNorm
    return norm(width or config.width, eps=config.norm_eps, weight_offset=config.norm_offset)


def embed_tokens(embedding: nn.Embedding, tokens: Tensor, scale: float) -> Tensor:
    """Embeddings times a scale, which is rounded to their dtype first, as in training."""
    x = embedding(tokens)
    return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed | None,
    packed_k: Packed | None,
    kv_lengths: Tensor | None,
    **options,
) -> Tensor:
    """`attention` of padded sequences, `attention_varlen` of packed ones; all (batch, heads, seq, head_dim)."""
    if packed is None:
        return flashattn.attention(q, k, v, kv_lengths=kv_lengths, **options)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    starts = (packed.cu_seqlens, packed_k.cu_seqlens, packed.max_seqlen, packed_k.max_seqlen)
    return flashattn.attention_varlen(q, k, v, *starts, **options).transpose(0, 1)[None]


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        bias = config.bias and config.qkv_bias
        self.q = Linear(config.width, config.heads * config.head_dim, bias)
        self.k = Linear(config.width, config.kv_heads * config.head_dim, bias and config.k_bias)
        self.v = Linear(config.width, config.kv_heads * config.head_dim, bias)
        self.out = Linear(config.heads * config.head_dim, config.width, config.bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(config.heads)) if config.sinks else None

    def forward(self, x: Tensor, layer: int, step: Step) -> Tensor:
        config = self.config
        q, k, v = (linear(x).unflatten(-1, (-1, config.head_dim)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # (batch, seq, heads, head_dim) viewed as (batch, heads, seq, head_dim), not copied.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = dict(window=config.window(layer), scale=config.scale, softcap=config.softcap, sinks=self.sinks)
        options["bias"] = step.bias
        dropout_p = config.attention_dropout_p if self.training else 0.0
        if step.cache is not None:  # decode rotates the new keys and appends them
            layer_cache, rotary = step.cache.layers[layer], step.cache.rotary
            out = flashattn.decode(q, layer_cache, k, v, rotary, q_lengths=step.lengths, **options)
        else:
            if step.rotary is not None:
                q, k = rotate(q, step.rotary), rotate(k, step.rotary)
            options |= dict(causal=step.causal, dropout_p=dropout_p)
            if step.observe is not None:
                step.observe(layer, q, k, options)
            out = attend(q, k, v, step.packed, step.packed, step.lengths, **options)
        return self.out(out.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """A decoder's attention to `step.memory`, the encoder's output. A cache keeps its keys and values."""

    def forward(self, x: Tensor, layer: int, step: Step) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        kept = None if step.cache is None else step.cache.memory.get(layer)
        k, v = kept or (heads(self.k(step.memory)), heads(self.v(step.memory)))
        if step.cache is not None:
            step.cache.memory[layer] = k, v
        dropout_p = self.config.attention_dropout_p if self.training else 0.0
        options = dict(scale=self.config.scale, dropout_p=dropout_p)
        out = attend(heads(self.q(x)), k, v, step.packed, step.memory_packed, step.memory_lengths, **options)
        return self.out(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def initialise(model: nn.Module, layers: int) -> None:
    """Random weights to train from: normal, with variance 1 / fan_in. Projections into the residual stream are smaller
    by sqrt(2 * layers), so that it does not grow with depth ("GPT-2", section 2.3)."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and name.endswith((".out", ".down")):
            module.weight /= math.sqrt(2 * layers)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.activation_dropout
        self.float32 = config.float32_residual
        self.gate = Linear(config.width, config.ffn_width, config.bias) if config.gated else None
        self.up = Linear(config.width, config.ffn_width, config.bias)
        self.down = Linear(config.ffn_width, config.width, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        x = F.dropout(x, self.dropout, self.training)
        if self.float32 and x.dtype == torch.float16:
            return flashattn.linear(x.float(), self.down.weight.float())
        return self.down(x)


class Block(nn.Module):
    """Attention and feed-forward, each with its norm and its residual addition, which are one kernel. has_cross: with
    attention to an encoder's output between them."""

    def __init__(self, config: Config, has_cross: bool = False):
        super().__init__()
        self.norm_first, self.dropout = config.norm_first, config.dropout
        self.attention = Attention(config)
        self.attention_norm = make_norm(config)
        self.feed_forward = Experts(config) if config.experts else FeedForward(config)
        self.feed_forward_norm = make_norm(config)
        self.cross_attention = CrossAttention(config) if has_cross else None
        self.cross_attention_norm = make_norm(config) if has_cross else None
        self.post_attention_norm = make_norm(config) if config.post_norms else nn.Identity()
        self.post_feed_forward_norm = make_norm(config) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None, layer: int, step: Step) -> tuple[Tensor, Tensor | None]:
        """Pre-norm: x is the last sublayer's output, which the next norm adds to the residual stream. Post-norm: x is
        the stream, and residual is None. The norms apply dropout to x before they add it."""
        p = self.dropout if self.training else 0.0
        if self.norm_first:
            y, residual = self.attention_norm(x, residual, True, p)
            y = y.half() if self.attention_norm.weight.dtype == torch.float16 else y  # of a float32 stream
            y = self.post_attention_norm(self.attention(y, layer, step))
            if self.cross_attention is not None:
                y, residual = self.cross_attention_norm(y, residual, True, p)
                y = self.cross_attention(y, layer, step)
            y, residual = self.feed_forward_norm(y, residual, True, p)
            return self.post_feed_forward_norm(self.feed_forward(y)), residual
        x = self.attention_norm(self.attention(x, layer, step), x, dropout_p=p)
        if self.cross_attention is not None:
            x = self.cross_attention_norm(self.cross_attention(x, layer, step), x, dropout_p=p)
        x = self.feed_forward_norm(self.feed_forward(x), x, dropout_p=p)
        return x, None
