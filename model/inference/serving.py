"""Continuous batching: requests join a running batch as soon as there is room, and leave it when done.

Yu et al., "Orca" (OSDI 2022); Kwon et al., "PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from ..transformer import Transformer
from .generate import check_prompts, pad_sequences
from .sampling import Sampling


@dataclass(eq=False)
class Request:
    """A prompt and its result: when `done`, its new `tokens`; fewer if it was `cancelled`, or if its `on_token` or its
    sampling raised `error`."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = ()
    seed: int = 0
    on_token: Callable[[int], None] | None = None  # called with each token as soon as it is chosen
    tokens: list[int] = field(default_factory=list, init=False)  # the new ones
    done: bool = field(default=False, init=False)
    cancelled: bool = field(default=False, init=False)
    error: Exception | None = field(default=None, init=False)
    reused: int = field(default=0, init=False)  # tokens of the prompt that were in the cache
    sequence: int = field(default=-1, init=False)  # its number in the cache
    generator: torch.Generator | None = field(default=None, init=False)  # made when it is submitted

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt + self.tokens


class Server:
    """Serves requests together.

    Args:
        model: a causal language model.
        pages, page_size: of the shared cache. A running request has pages for its tokens, and pages for those that may
            still come are kept free; other requests wait.
        largest_batch: requests that run at once.

    Pages of a finished request are reused by requests with the same prefix, until they are needed. A request whose
    `on_token` raises ends alone, with its `error`; any other exception in a step, an interrupt too, leaves the requests
    unchanged, and the step can be repeated. Call it from one thread; an `on_token` may submit and cancel.

    Raises:
        ValueError: naming the argument.

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
        if not (isinstance(model, Transformer) and model.config.causal and model.config.lm_head):
            raise ValueError(f"model must be a causal language model, got a {model.config.family}")
        for name, value in dict(pages=pages, page_size=page_size, largest_batch=largest_batch).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.largest_batch = model, largest_batch
        self.cache = model.new_paged_cache(pages, page_size)
        self.pages = pages
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished: list[Request] = []  # that still have pages, least recently used first

    def submit(self, request: Request) -> Request:
        """Queue a request.

        Raises:
            ValueError: if it can never run, or was submitted before.
            TypeError: if sampling or stop_tokens are of another type.
        """
        if request.generator is not None:
            raise ValueError("request must be a new one, got one that was submitted")
        if not isinstance(request.sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {request.sampling!r}")
        if not isinstance(request.stop_tokens, Collection):
            raise TypeError(f"stop_tokens must be token numbers, got {request.stop_tokens!r}")
        check_prompts(self.model, [request.prompt], request.max_new_tokens)
        length, longest = len(request.prompt) + request.max_new_tokens, self.model.paged_context
        if length > longest:
            raise ValueError(
                f"prompt and max_new_tokens must fit the original context of {longest}, got {length} tokens: rotary "
                "frequencies that depend on the length of a sequence cannot be shared (generate has its own)"
            )
        needed = self.cache.count_pages(length)
        if needed > self.pages:
            raise ValueError(f"prompt and max_new_tokens must fit the {self.pages} pages, got {needed}")
        device = self.model.token_embedding.weight.device
        # Copies: the caller may change its own.
        request.prompt, request.stop_tokens = list(request.prompt), tuple(request.stop_tokens)
        request.generator = torch.Generator(device).manual_seed(request.seed)
        request.done = request.max_new_tokens == 0
        if not request.done:
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request that waits or runs, with the tokens that it has; without effect on one that is done.

        Raises:
            ValueError: if it was not submitted to this server.
        """
        if request.done:
            return
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self.retire(request)
        else:
            raise ValueError("request must be one that was submitted to this server")
        request.done = request.cancelled = True

    def run(self) -> None:
        """Run steps until all requests are done."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit waiting requests, and append a token to every running one. Returns whether any are left."""
        while self.waiting and len(self.running) < self.largest_batch and self.make_room():
            self.admit(self.waiting.popleft())
        for group in group_by_length(self.running, lambda request: len(self.tokens_to_prefill(request))):
            self.forward([request for request in group if not request.done])  # callbacks may have cancelled some
        return bool(self.waiting or self.running)

    def tokens_to_prefill(self, request: Request) -> list[int]:
        """The tokens of a request that are not in the cache yet."""
        length, prompt = self.cache.length(request.sequence), request.prompt
        return prompt[length:] + request.tokens[max(0, length - len(prompt)) :]

    def forward(self, requests: list[Request]) -> None:
        """Run the model on the tokens that are not in the cache yet, and append the next token of each request."""
        if not requests:
            return
        before = {request.sequence: self.cache.length(request.sequence) for request in requests}
        try:
            choices = self.choose_tokens(requests)
        except BaseException:  # an interrupt too: some layers may have these tokens already
            for sequence, length in before.items():
                self.cache.truncate(sequence, length)
            raise
        for request, choice in zip(requests, choices, strict=True):
            self.append_token(request, choice)
        for request, choice in zip(requests, choices, strict=True):
            self.notify(request, choice)

    def choose_tokens(self, requests: list[Request]) -> list[int | Exception]:
        """The next token of each request, or the exception of its sampling."""
        device = self.model.token_embedding.weight.device
        rows, lengths = pad_sequences([self.tokens_to_prefill(request) for request in requests], device)
        hidden = self.model.encode(rows, lengths, cache=self.cache.select([r.sequence for r in requests]))
        hidden = hidden[torch.arange(len(requests), device=device), lengths.long() - 1]
        logits = self.model.compute_logits(hidden).float()
        choices: list[int | Exception] = logits.argmax(-1).tolist()
        for i, request in enumerate(requests):
            if request.sampling == Sampling():
                continue
            try:
                choices[i] = sample_token(request, logits[i])
            except Exception as error:
                choices[i] = error
        return choices

    def append_token(self, request: Request, choice: int | Exception) -> None:
        if isinstance(choice, Exception):
            request.error = choice
        elif choice not in request.stop_tokens:
            request.tokens.append(choice)
            if len(request.tokens) < request.max_new_tokens:
                return
        self.retire(request)

    def notify(self, request: Request, choice: int | Exception) -> None:
        """Call `on_token`, once all requests of the batch have their tokens: one that raises affects no other."""
        if request.on_token is None or request.cancelled or request.error or choice in request.stop_tokens:
            return
        try:
            request.on_token(choice)
        except Exception as error:
            request.error = error
            if not request.done:
                self.retire(request)

    def retire(self, request: Request) -> None:
        """Stop a request; its pages stay until others need them."""
        request.done = True
        self.running.remove(request)
        self.finished.append(request)

    def pages_reserved(self, request: Request) -> int:
        """The pages that it may still need. No page is ever copied on write, as only full pages are shared."""
        total = self.cache.count_pages(len(request.prompt) + request.max_new_tokens)
        return total - self.cache.count_pages(self.cache.length(request.sequence))

    def make_room(self) -> bool:
        """Whether the next request can join. Frees pages of finished requests for it."""
        request = self.waiting[0]
        wanted = self.cache.count_pages(len(request.prompt) + request.max_new_tokens)
        wanted += sum(self.pages_reserved(r) for r in self.running)
        while self.cache.free_pages < wanted and self.finished:
            self.cache.free(self.finished.pop(0).sequence)
        return self.cache.free_pages >= wanted

    def admit(self, request: Request) -> None:
        """Start a request; its sequence shares the full pages of the longest common prefix with another."""
        best, shared, size = None, 0, self.cache.page_size
        for other in [*self.finished, *self.running]:
            prefix = common_prefix(other.all_tokens, request.prompt[:-1])  # the last token is computed, for its logits
            length = min(prefix, self.cache.length(other.sequence)) // size * size
            if length > shared:
                best, shared = other, length
        request.sequence = self.cache.add() if best is None else self.cache.fork(best.sequence, shared)
        request.reused = shared
        self.running.append(request)
        if best in self.finished:  # most recently used
            self.finished.remove(best)
            self.finished.append(best)


def group_by_length(requests: list[Request], length: Callable[[Request], int]) -> list[list[Request]]:
    """Batches of requests with about as many tokens to read: at most a quarter of a batch is padding."""
    result: list[list[Request]] = []
    for request in sorted(requests, key=length):
        if not result or length(request) > length(result[-1][0]) * 4 // 3:
            result.append([])
        result[-1].append(request)
    return result


def sample_token(request: Request, logits: torch.Tensor) -> int:
    seen = torch.zeros(1, len(logits), dtype=torch.bool, device=logits.device)
    seen[0, request.all_tokens] = True
    return int(request.sampling.choose(logits[None], seen, request.generator))


def common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
