"""The Transformer: embeddings, blocks, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flashattn

from .caches import LayerCaches, ModelCache, PagedModelCache
from .config import PROBLEM_TYPES, Config
from .heads import HEADS
from .layers import Block, Linear, embed_tokens, initialise, make_norm
from .positions import RelativeBias, make_rotary_table
from .step import Step, make_step


class Stack(nn.Module):
    """Blocks, the final norm, and the relative position bias that the blocks share."""

    def __init__(self, config: Config, layers: int, causal: bool, has_cross: bool = False):
        super().__init__()
        self.config, self.layers = config, layers
        self.recompute = False  # the blocks' activations in the backward pass (activation checkpointing)
        count = 1 if config.shared_layers else layers
        self.blocks = nn.ModuleList(Block(config, has_cross) for _ in range(count))
        self.norm = make_norm(config) if config.norm_first else None
        self.relative = RelativeBias(config, causal) if config.positions == "relative" else None

    def run(self, x: Tensor, step: Step) -> Tensor:
        """From embeddings (batch, seq, width) to the last hidden states."""
        if self.relative is not None:
            step.bias = self.relative(step)
        residual, dtype = None, x.dtype
        if self.config.float32_residual and dtype == torch.float16:
            x = x.float()
        if not self.config.norm_first:  # with pre-norm, the first norm applies the dropout of the embeddings
            x = F.dropout(x, self.config.dropout, self.training)
        for layer in range(self.layers):
            block = self.blocks[layer % len(self.blocks)]
            run = partial(checkpoint, block, use_reentrant=False) if self.recompute and self.training else block
            x, residual = run(x, residual, layer, step)
        x = x if self.norm is None else self.norm(x, residual, dropout_p=self.config.dropout * self.training)
        return x.to(dtype)


class Transformer(Stack):
    """Decoder-only or encoder-only, by its config.

    >>> import torch
    >>> from model import Config, Transformer
    >>> config = Config("llama", vocab_size=100, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_width=64,
    ...     context=128, causal=True, norm="rms", norm_eps=1e-5, norm_first=True, activation="silu", gated=True,
    ...     positions="rope", bias=False)
    >>> Transformer(config)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 100])
    """

    def __init__(self, config: Config):
        super().__init__(config, config.layers, config.causal)
        width = config.embedding_width or config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.context, width) if learned else None
        self.type_embedding = nn.Embedding(config.token_types, width) if config.token_types else None
        self.embedding_norm = make_norm(config, width) if config.embedding_norm else None
        self.embedding_projection = Linear(width, config.width) if config.embedding_width else None
        untied = config.lm_head and not config.tie_word_embeddings
        self.lm_head = Linear(config.width, config.vocab_size, bias=False) if untied else None
        self.task_head = HEADS[config.task](config) if config.task else None

    def with_head(
        self, task: str, labels: Sequence[str] = (), problem_type: str = PROBLEM_TYPES[0], dropout: float = 0.0
    ) -> Transformer:
        """The same encoder, sharing its weights, with a new, untrained head."""
        config = replace(
            self.config, lm_head=False, task=task, labels=tuple(labels), problem_type=problem_type, dropout=dropout,
            attention_dropout=None, classifier_dropout=0.0,
        )  # fmt: skip
        model = Transformer(config)
        initialise(model.task_head, config.layers)
        weights = {name: p for name, p in self.named_parameters() if not name.startswith(("task_head.", "lm_head."))}
        for name, p in weights.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, p)
        return model

    def encode(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        token_types: Tensor | None = None,
        cache: LayerCaches | None = None,
        observe: Callable[[int, Tensor, Tensor, dict], None] | None = None,
    ) -> Tensor:
        """The last hidden states (batch, seq, width) of tokens (batch, seq).

        Sequences shorter than seq are padded on the right, with their `lengths` (batch,) given; hidden states of
        padding are undefined. With a cache, tokens follow those in it. Tokens (total,) are packed sequences of these
        lengths; their hidden states are (total, width). observe: called in each layer with its number, q, k and the
        options of attention.
        """
        step = make_step(tokens, self.config.causal, lengths, cache, observe=observe)
        longest = step.max_length(tokens)
        if longest > self.config.context:
            raise ValueError(f"tokens must fit the context of {self.config.context}, got {longest}")
        if step.packed is not None:
            tokens, token_types = tokens[None], None if token_types is None else token_types[None]
        x = embed_tokens(self.token_embedding, tokens, self.config.embedding_scale)
        if self.position_embedding is not None:
            x = x + self.position_embedding(step.positions)
        elif cache is None:
            step.rotary = make_rotary_table(step.positions, self.config, longest)
        if self.type_embedding is not None:
            x = x + self.type_embedding(torch.zeros_like(tokens) if token_types is None else token_types)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.embedding_projection is not None:
            x = self.embedding_projection(x)
        x = self.run(x, step)
        return x if step.packed is None else x[0]

    def new_cache(self, batch: int, capacity: int) -> ModelCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens. Rotary frequencies that depend on the length
        of a sequence are those of the capacity, from the first token on."""
        return ModelCache(self.config, batch, capacity, self.token_embedding.weight, self.make_rotary(capacity))

    def new_paged_cache(self, pages: int, page_size: int) -> PagedModelCache:
        """An empty pool of pages, for sequences that join and leave, of up to `paged_context` tokens each."""
        rotary = self.make_rotary(self.paged_context)
        return PagedModelCache(self.config, pages, page_size, self.token_embedding.weight, rotary)

    @property
    def paged_context(self) -> int:
        """The longest sequence that has the rotary frequencies of every shorter one."""
        scaling, context = self.config.rope_scaling, self.config.context
        return context if scaling is None else scaling.fixed_context(context)

    def make_rotary(self, length: int) -> flashattn.Rotary | None:
        """The table of the first `length` positions."""
        if self.config.positions != "rope":
            return None
        positions = torch.arange(length, device=self.token_embedding.weight.device)[None]
        return flashattn.Rotary(*(x[0, 0] for x in make_rotary_table(positions, self.config, length)))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """From (…, width) to (…, vocab_size)."""
        if not self.config.lm_head:
            raise ValueError(f"a {self.config.family} checkpoint without a head has no logits")
        logits = flashattn.linear(hidden, self.token_embedding.weight if self.lm_head is None else self.lm_head.weight)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Logits (batch, seq, vocab_size), or those of the config's task, or hidden states without a head. For packed
        tokens (total,), as in `encode`, without the dimension batch, except for text classes (batch, labels)."""
        hidden = self.encode(tokens, lengths, token_types)
        if self.config.task == "classify" and tokens.dim() == 1:
            hidden = hidden[lengths.cumsum(0) - lengths][:, None]  # the first token of each
        if self.task_head is not None:
            return self.task_head(hidden, self.token_embedding.weight)
        return self.compute_logits(hidden) if self.config.lm_head else hidden
