"""Speculative decoding: a small model drafts tokens, the large one checks several at once.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), arXiv:2211.17192; greedy, with the
same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..caches import ModelCache
from ..transformer import Transformer
from .generate import check_prompts


class Speculation(NamedTuple):
    tokens: list[int]
    steps: int  # of the large model
    accepted: float  # the share of drafted tokens that were right


@torch.inference_mode()
def speculate(
    model: Transformer,
    draft: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    lookahead: int = 4,
    stop_tokens: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> Speculation:
    """The tokens of `generate(model, [prompt], max_new_tokens)`, in fewer steps of the model.

    On the CPU engine the logits are bit-exactly those of `generate`, with a lookahead of up to 7, for models without
    experts whose ffn_width is a multiple of 64: PyTorch has another exp for elements that do not fill a vector.
    Elsewhere products of several rows may round differently from those of one row, so a tie within rounding may be
    decided otherwise: rarely, in 16 bits.

    Args:
        draft: a smaller model with the same vocabulary.
        lookahead: drafted tokens for one step of the model.
        on_token: called with each token as soon as it is accepted.

    Raises:
        ValueError: naming the argument, before a model runs.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"draft must have the model's vocabulary of {model.config.vocab_size}, got {draft.config.vocab_size}"
        )
    if lookahead < 1:
        raise ValueError(f"lookahead must be at least 1, got {lookahead}")
    for one in (model, draft):
        check_prompts(one, [prompt], max_new_tokens)
    tokens, total = list(prompt), len(prompt) + max_new_tokens
    caches = [one.new_cache(1, total) for one in (model, draft)]
    steps = guessed = right = 0
    while len(tokens) < total:
        # The prompt is read alone, as by `generate`: drafted tokens would change the last bits of its keys.
        count = min(lookahead, total - len(tokens) - 1) if caches[0].lengths[0] else 0
        guesses = draft_tokens(draft, caches[1], tokens, count)
        certain = predict_tokens(model, caches[0], tokens + guesses, count + 1)
        agreed = next((i for i, (a, b) in enumerate(zip(guesses, certain, strict=False)) if a != b), count)
        steps, guessed, right = steps + 1, guessed + count, right + agreed
        for token in certain[: agreed + 1]:
            if token in stop_tokens:
                return Speculation(tokens[len(prompt) :], steps, right / max(1, guessed))
            tokens.append(token)
            if on_token is not None:
                on_token(token)
        for cache in caches:  # drop rejected tokens; the last token is in neither cache yet
            cache.truncate([min(cache.lengths[0], len(tokens) - 1)])
    return Speculation(tokens[len(prompt) :], steps, right / max(1, guessed))


def predict_tokens(model: Transformer, cache: ModelCache, tokens: list[int], count: int) -> list[int]:
    """The most likely token after each of the last `count` tokens. Runs the model on those not in the cache yet."""
    new = torch.tensor([tokens[cache.lengths[0] :]], device=model.token_embedding.weight.device)
    hidden = model.encode(new, cache=cache)[0, -count:]
    return model.compute_logits(hidden).float().argmax(-1).tolist()


def draft_tokens(draft: Transformer, cache: ModelCache, tokens: list[int], count: int) -> list[int]:
    guesses: list[int] = []
    for _ in range(count):
        guesses += predict_tokens(draft, cache, tokens + guesses, 1)
    return guesses
