"""Generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; the prompts may differ in length.

    Args:
        prompts: token numbers, at least one each.
        temperature: 0 takes the most likely token; else the logits are divided by it before sampling.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together reach probability p.
        stop_tokens: a sequence ends with the first of these, which is not part of the result.
        seed: of the sampling; None takes PyTorch's generator as it is.
        on_token: called with (prompt index, token) for each token as soon as it is chosen.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: naming the argument, before the model runs.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    results: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return results
    device = model.token_embedding.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int32, device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    capacity = min(longest + max_new_tokens, model.config.context)
    cache = model.new_cache(len(prompts), capacity)

    hidden = model.encode(tokens, lengths, cache=cache)
    hidden = hidden[torch.arange(len(prompts), device=device), lengths.long() - 1]  # of each prompt's last token
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        chosen = sample(model.logits(hidden).float(), temperature, top_k, top_p, generator)
        for i, token in enumerate(chosen.tolist()):
            if not running[i]:
                continue
            running[i] = token not in stop_tokens
            if running[i]:
                results[i].append(token)
                if on_token is not None:
                    on_token(i, token)
        if not any(running) or step == max_new_tokens - 1:
            break
        hidden = model.encode(chosen[:, None], cache=cache)[:, -1]
    return results


def check(model, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
    config = model.config
    if not (config.causal and config.head):
        raise ValueError(f"model must be a causal language model, got a {config.family}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
        if len(prompt) + max_new_tokens > config.context:
            raise ValueError(
                f"prompts[{i}] must fit the context of {config.context} together with max_new_tokens, "
                f"got {len(prompt)} + {max_new_tokens} tokens"
            )
        wrong = next((t for t in prompt if not 0 <= t < config.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"prompts[{i}] must hold tokens below {config.vocab_size}, got {wrong}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token (batch,) from logits (batch, vocab_size)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None:
        # Nucleus: the smallest set of the most likely tokens that reaches top_p. Holtzman et al. (2019).
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
