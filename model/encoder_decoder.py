"""The original Transformer: an encoder, and a decoder that attends to its output.

Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashattn

from .caches import ModelCache
from .config import Config
from .layers import Linear, embed_tokens, make_norm
from .positions import make_sinusoids
from .step import Packed, Step, make_step
from .transformer import Stack, Transformer


class Memory(NamedTuple):
    """An encoder's output: (batch, seq, width) and the length of each sequence; (1, total, width) if packed."""

    hidden: Tensor
    lengths: Tensor | None
    packed: Packed | None = None


class AudioEmbedding(nn.Module):
    """From a spectrogram (batch, mel_bins, frames) to embeddings (batch, frames / 2, width), with positions.

    Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), arXiv:2212.04356, section 2.2.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.conv1 = nn.Conv1d(config.mel_bins, config.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, kernel_size=3, stride=2, padding=1)
        self.positions = nn.Embedding(config.audio_context, config.width)

    def forward(self, spectrogram: Tensor) -> Tensor:
        frames = 2 * self.positions.num_embeddings
        if spectrogram.dim() != 3 or spectrogram.shape[2] > frames:
            raise ValueError(
                f"spectrogram must be (batch, mel_bins, at most {frames} frames), got shape {tuple(spectrogram.shape)}"
            )
        x = F.gelu(self.conv2(F.gelu(self.conv1(spectrogram)))).transpose(1, 2)
        return x + self.positions.weight[: x.shape[1]]


class EncoderDecoder(nn.Module):
    """Both sides share the token embedding, unless the encoder reads audio.

    >>> import torch
    >>> from model import Config, EncoderDecoder
    >>> config = Config("t5", vocab_size=100, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn_width=64,
    ...     context=512, causal=False, norm="rms", norm_eps=1e-6, norm_first=True, activation="relu", gated=False,
    ...     positions="relative", bias=False, decoder_layers=2, relative_buckets=32, scale=1.0)
    >>> model = EncoderDecoder(config)
    >>> model(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 8]])).shape
    torch.Size([1, 2, 100])
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Stack(config, config.layers, causal=False)
        self.decoder = Stack(config, config.decoder_layers, causal=True, has_cross=True)
        self.encoder_embedding_norm = make_norm(config) if config.embedding_norm else None
        self.decoder_embedding_norm = make_norm(config) if config.embedding_norm else None
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.context, config.width) if learned else None
        self.audio = AudioEmbedding(config) if config.mel_bins else None
        self.lm_head = None if config.tie_word_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self.lm_head_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.lm_head_bias else None

    def embed(self, tokens: Tensor, step: Step, norm: nn.Module | None) -> Tensor:
        tokens = tokens if step.packed is None else tokens[None]
        x = embed_tokens(self.token_embedding, tokens, self.config.embedding_scale)
        if self.config.positions == "sinusoidal":
            x = x + make_sinusoids(step.positions, self.config.width).to(x.dtype)
        elif self.position_embedding is not None:
            x = x + self.position_embedding(step.positions)
        return x if norm is None else norm(x)

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> Memory:
        """tokens: (batch, seq), padded on the right if `lengths` (batch,) are given, or packed (total,); for an audio
        encoder, a spectrogram (batch, mel_bins, frames)."""
        if self.audio is not None:
            x = self.audio(tokens)
            return Memory(self.encoder.run(x, make_step(x[..., 0], False, lengths)), lengths)
        step = make_step(tokens, False, lengths)
        hidden = self.encoder.run(self.embed(tokens, step, self.encoder_embedding_norm), step)
        return Memory(hidden, lengths, step.packed)

    def decode(
        self, tokens: Tensor, memory: Memory, lengths: Tensor | None = None, cache: ModelCache | None = None
    ) -> Tensor:
        """The last hidden states (batch, seq, width). With a cache, tokens follow those in it. Packed tokens (total,)
        need a packed memory, and give (total, width)."""
        if (tokens.dim() == 1) != (memory.packed is not None):
            raise ValueError("tokens and memory must be both packed or both padded")
        of_memory = dict(memory=memory.hidden, memory_lengths=memory.lengths, memory_packed=memory.packed)
        step = make_step(tokens, True, lengths, cache, **of_memory)
        hidden = self.decoder.run(self.embed(tokens, step, self.decoder_embedding_norm), step)
        return hidden if step.packed is None else hidden[0]

    def new_cache(self, batch: int, capacity: int) -> ModelCache:
        """An empty cache of the decoder for `batch` sequences of up to `capacity` tokens."""
        return ModelCache(self.config, batch, capacity, self.token_embedding.weight, None)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """From (…, width) to (…, vocab_size)."""
        weight = self.token_embedding.weight if self.lm_head is None else self.lm_head.weight
        return flashattn.linear(hidden * self.config.logit_scale, weight, self.lm_head_bias)

    def forward(
        self, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None, target_lengths: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, seq, vocab_size) of the decoder, which reads `targets`; they begin with the start token."""
        return self.compute_logits(self.decode(targets, self.encode(tokens, lengths), target_lengths))


Model = Transformer | EncoderDecoder
