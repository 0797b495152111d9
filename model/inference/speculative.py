"""Speculative decoding: a small model guesses, the large one checks several guesses at once.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), arXiv:2211.17192; greedy, where it
changes no token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..caches import Cache
from ..transformer import Transformer
from .generate import check


class Speculated(NamedTuple):
    tokens: list[int]
    steps: int  # of the large model
    accepted: float  # the share of guesses that were right


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
) -> Speculated:
    """The tokens of `generate(model, [prompt], max_new_tokens)`, with fewer steps of the model.

    On the CPU engine the logits are those of `generate` to the bit, with up to 7 guesses, for models without experts
    whose feed-forward networks are a multiple of 64 wide: PyTorch takes another exp for what does not fill its vectors.
    Elsewhere a product of several rows may round another way than that of one, and where two tokens are equally likely
    up to rounding the other one may be taken: in 16 bits now and then.

    Args:
        draft: a smaller model of the same vocabulary.
        lookahead: guesses for one step of the model.
        on_token: called with each token as soon as it is certain.

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
        check(one, [prompt], max_new_tokens)
    tokens, whole = list(prompt), len(prompt) + max_new_tokens
    caches = [one.new_cache(1, whole) for one in (model, draft)]
    steps = guessed = right = 0
    while len(tokens) < whole:
        # The prompt is read alone, as `generate` reads it: guesses behind it would change its keys' last bits.
        count = min(lookahead, whole - len(tokens) - 1) if caches[0].lengths[0] else 0
        guesses = guess(draft, caches[1], tokens, count)
        certain = next_of(model, caches[0], tokens + guesses, count + 1)
        agreed = next((i for i, (a, b) in enumerate(zip(guesses, certain, strict=False)) if a != b), count)
        steps, guessed, right = steps + 1, guessed + count, right + agreed
        for token in certain[: agreed + 1]:
            if token in stop_tokens:
                return Speculated(tokens[len(prompt) :], steps, right / max(1, guessed))
            tokens.append(token)
            if on_token is not None:
                on_token(token)
        for cache in caches:  # what was guessed wrong; the last token is in neither cache yet
            cache.truncate([min(cache.lengths[0], len(tokens) - 1)])
    return Speculated(tokens[len(prompt) :], steps, right / max(1, guessed))


def next_of(model: Transformer, cache: Cache, tokens: list[int], count: int) -> list[int]:
    """The likeliest token behind each of the last `count`; what the cache lacks of them all is run."""
    new = torch.tensor([tokens[cache.lengths[0] :]], device=model.token_embedding.weight.device)
    hidden = model.encode(new, cache=cache)[0, -count:]
    return model.logits(hidden).float().argmax(-1).tolist()


def guess(draft: Transformer, cache: Cache, tokens: list[int], count: int) -> list[int]:
    guesses: list[int] = []
    for _ in range(count):
        guesses += next_of(draft, cache, tokens + guesses, 1)
    return guesses
