"""Generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..encoder_decoder import EncoderDecoder, Model
from .sampling import Sampling


@torch.inference_mode()
def generate(
    model: Model,
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
    """Continue each prompt by up to `max_new_tokens` tokens; prompts may differ in length. For an encoder-decoder, the
    prompts are the encoder's input.

    Args:
        prompts: token numbers, at least one each.
        temperature: 0 takes the most likely token; else the logits are divided by it before sampling.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together reach probability p.
        min_p: sample among the tokens at least min_p times as likely as the most likely one.
        repetition_penalty: divides positive logits of tokens in the prompt or the result, and multiplies negative ones;
            also in greedy decoding.
        stop_tokens: a sequence ends with the first of these, which is not part of the result.
        seed: of the sampling; None: PyTorch's default generator.
        on_token: called with (prompt index, token) for each token as soon as it is chosen.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: naming the argument, before the model runs.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    check_prompts(model, prompts, max_new_tokens)
    results: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return results
    device = model.token_embedding.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    hidden, next_step = prefill(model, *pad_sequences(prompts, device), max_new_tokens)
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = not isinstance(model, EncoderDecoder)  # an encoder's input may be repeated
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        chosen = sampling.choose(model.compute_logits(hidden).float(), seen, generator)
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
        hidden = next_step(chosen)
    return results


def prefill(model: Model, tokens: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The hidden states (batch, width) for the first of `count` new tokens; and a function from chosen tokens (batch,)
    to the hidden states for the next."""
    batch = len(tokens)
    if isinstance(model, EncoderDecoder):
        memory, cache = model.encode(tokens, lengths), model.new_cache(batch, count)
        first = torch.full((batch,), model.config.decoder_start_token, device=tokens.device)

        def next_step(chosen: Tensor) -> Tensor:
            return model.decode(chosen[:, None], memory, cache=cache)[:, -1]

        return next_step(first), next_step
    cache = model.new_cache(batch, min(tokens.shape[1] + count, model.config.context))
    hidden = model.encode(tokens, lengths, cache=cache)
    hidden = hidden[torch.arange(batch, device=tokens.device), lengths.long() - 1]  # of each prompt's last token
    return hidden, lambda chosen: model.encode(chosen[:, None], cache=cache)[:, -1]


def pad_sequences(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad on the right: tokens (batch, longest) and lengths (batch,)."""
    lengths = torch.tensor([len(tokens) for tokens in sequences], dtype=torch.int32, device=device)
    rows = [torch.tensor(tokens, device=device) for tokens in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = model.config
    if not isinstance(max_new_tokens, Integral):
        raise ValueError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    check_tokens("prompts", prompts, config.vocab_size)
    if isinstance(model, EncoderDecoder):
        return
    if not (config.causal and config.lm_head):
        got = f"{config.family} without its head" if config.causal else config.family
        raise ValueError(f"model must be a causal language model or an encoder-decoder, got a {got}")
    for i, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > config.context:
            raise ValueError(
                f"prompts[{i}] must fit the context of {config.context} together with max_new_tokens, "
                f"got {len(prompt)} + {max_new_tokens} tokens"
            )


def check_tokens(name: str, sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    for i, tokens in enumerate(sequences):
        if isinstance(tokens, (int, str)):
            raise ValueError(
                f"{name} must be lists of token numbers, one for each sequence, got {tokens!r} in one's place"
            )
        if len(tokens) == 0:
            raise ValueError(f"{name}[{i}] must have at least one token, got none")
        wrong = next((t for t in tokens if not isinstance(t, Integral)), None)
        if wrong is not None:
            raise ValueError(f"{name}[{i}] must hold integers, got {wrong!r}")
        wrong = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name}[{i}] must hold tokens below {vocab_size}, got {wrong}")
