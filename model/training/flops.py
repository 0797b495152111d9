"""Model FLOPs, and the peak FLOP/s of this device."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from ..encoder_decoder import EncoderDecoder, Model
from ..experts import Experts


def count_matrix_parameters(module: nn.Module) -> int:
    """The parameters of the matrices that a token is multiplied by."""
    plain = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    experts = [m for m in module.modules() if isinstance(m, Experts)]
    return plain + sum((m.gate_up.numel() + m.down.numel()) * m.active // len(m.down) for m in experts)


def count_model_flops(model: Model, inputs: dict[str, Tensor]) -> float:
    """Of a forward and a backward pass: 6 for each token and matrix parameter, 12 * heads * head_dim for each layer and
    pair of query and key. Chowdhery et al., "PaLM" (2022), arXiv:2204.02311, appendix B: without recomputation, and
    with all pairs even if attention is causal."""
    config = model.config
    pair = 12 * config.heads * config.head_dim
    sources = inputs["tokens"]
    if config.mel_bins:  # a spectrogram, two frames of which become one
        sources = sources[:, 0, ::2]
    tokens, longest = count_tokens(sources, inputs.get("lengths"))
    head = config.width * config.vocab_size
    if not isinstance(model, EncoderDecoder):
        blocks = count_matrix_parameters(model.blocks) * config.layers // len(model.blocks)
        head *= config.lm_head or config.task == "masked"
        return 6 * tokens * (blocks + head) + pair * config.layers * tokens * longest
    targets, longest_target = count_tokens(inputs["targets"], inputs.get("target_lengths"))
    encoder = 6 * tokens * count_matrix_parameters(model.encoder) + pair * config.layers * tokens * longest
    decoder = 6 * targets * (count_matrix_parameters(model.decoder) + head)
    return encoder + decoder + pair * config.decoder_layers * targets * (longest_target + longest)


def count_tokens(tokens: Tensor, lengths: Tensor | None) -> tuple[float, float]:
    """The number of tokens, and the length of a token's sequence, averaged over the tokens."""
    if lengths is None:
        return float(tokens.numel()), float(tokens.shape[-1])
    lengths = lengths.double()
    return float(lengths.sum()), float(lengths.square().sum() / lengths.sum())


def measure_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a product of two large matrices on this device, best of five."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
