"""Model FLOPs: what a model's mathematics asks for, and what this device reaches on a large product."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from ..encoder_decoder import EncoderDecoder, Model
from ..experts import Experts


def matrix_parameters(module: nn.Module) -> int:
    """That a token is multiplied by."""
    plain = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    experts = [m for m in module.modules() if isinstance(m, Experts)]
    return plain + sum((m.gate_up.numel() + m.down.numel()) * m.active // len(m.down) for m in experts)


def model_flops(model: Model, inputs: dict[str, Tensor]) -> float:
    """Of a forward and a backward pass: 6 for each token and parameter of a matrix, 12 * heads * head_dim for each
    layer and pair of query and key. Chowdhery et al., "PaLM" (2022), arXiv:2204.02311, appendix B. What is recomputed
    does not count; a causal half counts whole, as there."""
    config = model.config
    pair = 12 * config.heads * config.head_dim
    sources = inputs["tokens"]
    if config.mel_bins:  # a spectrogram, two frames of which become one
        sources = sources[:, 0, ::2]
    tokens, longest = count(sources, inputs.get("lengths"))
    head = config.width * config.vocab_size
    if not isinstance(model, EncoderDecoder):
        blocks = matrix_parameters(model.blocks) * config.layers // len(model.blocks)
        head *= config.lm_head or config.task == "masked"
        return 6 * tokens * (blocks + head) + pair * config.layers * tokens * longest
    targets, longest_target = count(inputs["targets"], inputs.get("target_lengths"))
    encoder = 6 * tokens * matrix_parameters(model.encoder) + pair * config.layers * tokens * longest
    decoder = 6 * targets * (matrix_parameters(model.decoder) + head)
    return encoder + decoder + pair * config.decoder_layers * targets * (longest_target + longest)


def count(tokens: Tensor, lengths: Tensor | None) -> tuple[float, float]:
    """How many tokens there are, and how many a token of them has in its sequence, on average."""
    if lengths is None:
        return float(tokens.numel()), float(tokens.shape[-1])
    lengths = lengths.double()
    return float(lengths.sum()), float(lengths.square().sum() / lengths.sum())


def peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a product of two large matrices on this device, the best of five."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
