"""Generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .sampling import Sampling
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
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
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
        min_p: sample among the tokens at least min_p times as likely as the most likely one.
        repetition_penalty: positive logits of tokens of the prompt and of the result are divided by it, negative ones
            multiplied; also where the most likely token is taken.
        stop_tokens: a sequence ends with the first of these, which is not part of the result.
        seed: of the sampling; None takes PyTorch's generator as it is.
        on_token: called with (prompt index, token) for each token as soon as it is chosen.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: naming the argument, before the model runs.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    check(model, prompts, max_new_tokens)
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
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        chosen = sampling.choose(model.logits(hidden).float(), seen, generator)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
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


def check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
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
