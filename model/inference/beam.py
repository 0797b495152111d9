"""Beam search for encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..encoder_decoder import EncoderDecoder
from .generate import check_tokens, pad_sequences


@torch.inference_mode()
def beam_search(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """The most likely output of each source, by beam search.

    Args:
        sources: token numbers, at least one each.
        beams: hypotheses kept; 1 is greedy.
        length_penalty: the score of a hypothesis of n tokens, with its stop token, is its log-probability divided by
            n ** length_penalty, as in `transformers`; 0 prefers short outputs.
        stop_tokens: end a hypothesis, and are not part of the result.

    Returns:
        The tokens of the best hypothesis of each source, without the start token.

    Raises:
        ValueError: naming the argument, before the model runs.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_tokens("sources", sources, model.config.vocab_size)
    if not sources:
        return []
    searches = [Search(beams, length_penalty, stop_tokens, max_new_tokens) for _ in sources]
    tokens, lengths = pad_sequences(sources, model.token_embedding.weight.device)
    memory = model.encode(tokens, lengths)
    memory = memory._replace(
        hidden=memory.hidden.repeat_interleave(beams, 0), lengths=memory.lengths.repeat_interleave(beams, 0)
    )
    cache = model.new_cache(len(sources) * beams, max_new_tokens + 1)
    last = torch.full((len(sources) * beams, 1), model.config.decoder_start_token, device=tokens.device)
    while True:
        logits = model.compute_logits(model.decode(last, memory, cache=cache)[:, -1])
        scores = logits.float().log_softmax(-1).view(len(sources), beams, -1)
        parents, chosen = zip(*(s.advance(row) for s, row in zip(searches, scores, strict=True)), strict=True)
        if all(search.done for search in searches):
            return [search.best() for search in searches]
        rows = torch.tensor([i * beams + p for i, row in enumerate(parents) for p in row], device=tokens.device)
        cache.reorder(rows)
        last = torch.tensor([t for row in chosen for t in row], device=tokens.device)[:, None]


class Search:
    """The hypotheses of one source: running ones, best first, and finished ones."""

    def __init__(self, beams: int, penalty: float, stop_tokens: Sequence[int], longest: int):
        self.beams, self.penalty, self.stop, self.longest = beams, penalty, set(stop_tokens), longest
        self.running: list[tuple[float, list[int]]] = [(0.0, [])]
        self.ended: list[tuple[float, list[int]]] = []
        self.done = False

    def penalised_score(self, score: float, length: int) -> float:
        return score / length**self.penalty

    def advance(self, scores: Tensor) -> tuple[list[int], list[int]]:
        """From log-probabilities (beams, vocab_size) of the next token: the row that each hypothesis continues, and its
        token. At first there is one hypothesis, in the first row."""
        if self.done:
            return list(range(self.beams)), [0] * self.beams
        vocab_size, count = scores.shape[1], len(self.running)
        so_far = torch.tensor([score for score, _ in self.running], device=scores.device)
        candidates = (so_far[:, None] + scores[:count]).flatten()
        # More than there are beams: so that enough continue if all the best ones end.
        best = candidates.topk(min(len(candidates), (1 + len(self.stop)) * self.beams))
        running, parents = [], []
        for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(index, vocab_size)
            tokens = [*self.running[parent][1], token]
            if token in self.stop:
                if rank < self.beams:
                    self.end(score, tokens)
            elif len(running) < self.beams:
                running.append((score, tokens))
                parents.append(parent)
        self.running = running
        length = len(running[0][1]) if running else 0
        if length == self.longest:
            for score, tokens in running:
                self.end(score, tokens)
        if not running or length == self.longest or self.is_decided(length):
            self.done = True
            return list(range(self.beams)), [0] * self.beams
        missing = self.beams - len(running)  # fewer candidates than beams, in a small vocabulary
        return parents + [0] * missing, [tokens[-1] for _, tokens in running] + [0] * missing

    def end(self, score: float, tokens: list[int]) -> None:
        self.ended.append((self.penalised_score(score, len(tokens)), tokens))
        self.ended.sort(key=lambda one: -one[0])
        del self.ended[self.beams :]

    def is_decided(self, length: int) -> bool:
        """Whether enough have ended, and no running hypothesis can score higher than the worst of them. A
        log-probability only falls; with a penalty over 0 its score is highest at the largest length."""
        if len(self.ended) < self.beams:
            return False
        if self.beams == 1:
            return True
        reach = self.longest if self.penalty > 0 else length
        return self.penalised_score(self.running[0][0], reach) <= self.ended[-1][0]

    def best(self) -> list[int]:
        tokens = self.ended[0][1]
        return tokens[:-1] if tokens and tokens[-1] in self.stop else tokens
