"""Continuous batching: requests join a running batch as soon as there is room, and leave it when they are done.

Yu et al., "Orca" (OSDI 2022); Kwon et al., "PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .generate import check, pad
from .sampling import Sampling
from .transformer import Transformer


@dataclass(eq=False)
class Request:
    """A prompt and what becomes of it."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = ()
    seed: int = 0
    on_token: Callable[[int], None] | None = None  # called with each token as soon as it is chosen
    tokens: list[int] = field(default_factory=list)  # new ones
    done: bool = False
    reused: int = 0  # tokens of the prompt that were in the cache already
    sequence: int = -1  # its number in the cache
    generator: torch.Generator | None = None

    @property
    def everything(self) -> list[int]:
        return self.prompt + self.tokens


class Server:
    """Serves requests together.

    Args:
        model: a causal language model.
        pages, page_size: of the cache that all share. A request holds pages for what it has, and room for what it may
            still get is kept free; others wait.
        largest_batch: requests that run at once.

    What a finished request leaves in the cache serves others that begin alike, until its pages are needed.

    >>> import torch
    >>> from model import Transformer
    >>> from model.families.gpt2 import config
    >>> small = config(dict(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    >>> server = Server(Transformer(small).eval(), pages=32, page_size=4)
    >>> first, second = server.submit(Request([1, 2, 3], 5)), server.submit(Request([1, 2], 9))
    >>> server.run()
    >>> len(first.tokens), len(second.tokens)
    (5, 9)
    """

    def __init__(self, model: Transformer, pages: int, page_size: int = 16, largest_batch: int = 32):
        self.model, self.largest_batch = model, largest_batch
        self.cache = model.new_paged_cache(pages, page_size)
        self.pages = pages
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished: list[Request] = []  # that still hold pages; the longest unused first

    def submit(self, request: Request) -> Request:
        """Queue a request. Raises ValueError where it can never run."""
        check(self.model, [request.prompt], request.max_new_tokens)
        needed = self.cache.pages_for(len(request.prompt) + request.max_new_tokens)
        if needed > self.pages:
            raise ValueError(f"prompt and max_new_tokens must fit the {self.pages} pages, got {needed}")
        device = self.model.token_embedding.weight.device
        request.generator = torch.Generator(device).manual_seed(request.seed)
        request.done = request.max_new_tokens == 0
        if not request.done:
            self.waiting.append(request)
        return request

    def run(self) -> None:
        """Until all are done."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """Let in who waits, and give every running request its next token. False when there is nothing left to do."""
        new = []
        while self.waiting and len(self.running) + len(new) < self.largest_batch and self.make_room(new):
            new.append(self.admit(self.waiting.popleft()))
        old = list(self.running)
        self.running += new
        for group in groups(new):
            self.forward(group, [request.prompt[request.reused :] for request in group])
        if old:
            self.forward(old, [request.tokens[-1:] for request in old])
        self.running = [request for request in self.running if not request.done]
        return bool(self.waiting or self.running)

    def forward(self, requests: list[Request], tokens: list[list[int]]) -> None:
        """One pass over the tokens of each that the cache lacks, and the choice of its next."""
        rows, lengths = pad(tokens, self.model.token_embedding.weight.device)
        hidden = self.model.encode(rows, lengths, cache=self.cache.select([r.sequence for r in requests]))
        hidden = hidden[torch.arange(len(requests), device=rows.device), lengths.long() - 1]
        logits = self.model.logits(hidden).float()
        likeliest = logits.argmax(-1).tolist()
        for i, request in enumerate(requests):
            plain = request.sampling == Sampling()
            self.give(request, likeliest[i] if plain else sampled(request, logits[i]))

    def give(self, request: Request, token: int) -> None:
        if token not in request.stop_tokens:
            request.tokens.append(token)
            if request.on_token is not None:
                request.on_token(token)
        request.done = token in request.stop_tokens or len(request.tokens) == request.max_new_tokens
        if request.done:
            self.finished.append(request)

    def room_of(self, request: Request) -> int:
        """Pages that it may still take. None of them is ever copied: only whole pages are shared."""
        whole = self.cache.pages_for(len(request.prompt) + request.max_new_tokens)
        return whole - self.cache.pages_for(self.cache.length(request.sequence))

    def make_room(self, new: list[Request]) -> bool:
        """Whether the next request can join; finished ones give their pages up for it."""
        request = self.waiting[0]
        wanted = self.cache.pages_for(len(request.prompt) + request.max_new_tokens)
        wanted += sum(self.room_of(r) for r in self.running + new)
        while self.cache.free_pages < wanted and self.finished:
            self.cache.free(self.finished.pop(0).sequence)
        return self.cache.free_pages >= wanted

    def admit(self, request: Request) -> Request:
        """Give it a sequence, which shares the whole pages that another has of the same beginning."""
        best, shared, size = None, 0, self.cache.page_size
        for other in [*self.finished, *self.running]:
            alike = common(other.everything, request.prompt[:-1])  # the last token has to be computed, for its logits
            length = min(alike, self.cache.length(other.sequence)) // size * size
            if length > shared:
                best, shared = other, length
        if best is None:
            request.sequence = self.cache.add()
            return request
        request.sequence, request.reused = self.cache.fork(best.sequence, shared), shared
        if best in self.finished:  # used: the last one to give up its pages
            self.finished.remove(best)
            self.finished.append(best)
        return request


def groups(requests: list[Request]) -> list[list[Request]]:
    """Those with about as much to read, so that a quarter of a batch is padding at most."""
    result: list[list[Request]] = []
    for request in sorted(requests, key=unread):
        if not result or unread(request) > unread(result[-1][0]) * 4 // 3:
            result.append([])
        result[-1].append(request)
    return result


def unread(request: Request) -> int:
    return len(request.prompt) - request.reused


def sampled(request: Request, logits: torch.Tensor) -> int:
    seen = torch.zeros(1, len(logits), dtype=torch.bool, device=logits.device)
    seen[0, request.everything] = True
    return int(request.sampling.choose(logits[None], seen, request.generator))


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
