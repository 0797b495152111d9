"""Continuous batching and speculative decoding: the tokens of `generate`, whatever runs beside them."""

import random
from dataclasses import replace

import pytest
import torch

import model
from model import Request, Sampling, Server
from model.inference import serving
from model.io.packages import locate
from tests.model.checkpoints import SERVED
from tests.model.configs import CONFIGS
from tests.packages import needs_smollm2


def generate_alone(ours, request):
    return model.generate(ours, [request.prompt], request.max_new_tokens, stop_tokens=request.stop_tokens)[0]


def make_requests(count, seed=0):
    rng = random.Random(seed)
    prompts = [[rng.randrange(101) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    return [Request(prompt, rng.randint(1, 20), stop_tokens=(7, 8)) for prompt in prompts]


@pytest.mark.parametrize("name", SERVED)
def test_each_gets_what_it_gets_alone(name, tiny):
    """With room for all, room for few, and pages of one token; requests come while others run."""
    ours = tiny(name).ours
    expected = [generate_alone(ours, request) for request in make_requests(12)]
    for pages, page_size, largest in ((100, 4, 32), (13, 4, 3), (50, 1, 5)):
        server = Server(ours, pages, page_size, largest)
        requests = make_requests(12)
        for i, request in enumerate(requests):
            server.submit(request)
            if i % 3 == 2:
                server.step()
        server.run()
        assert all(request.done for request in requests)
        assert [request.tokens for request in requests] == expected
        held = sum(server.cache.count_pages(server.cache.length(r.sequence)) for r in server.finished)
        assert held >= pages - server.cache.free_pages  # nothing else holds pages


def test_a_beginning_is_computed_once(tiny):
    ours = tiny("llama").ours
    server = Server(ours, pages=40, page_size=4)
    beginning = list(range(10, 31))
    first = server.submit(Request([*beginning, 1], 3))
    server.run()
    second, third, other = (server.submit(Request(p, 3)) for p in ([*beginning, 2], [*beginning], [99, *beginning]))
    free = server.cache.free_pages
    server.run()
    assert (first.reused, second.reused, third.reused, other.reused) == (0, 20, 20, 0)
    assert free - server.cache.free_pages == 1 + 1 + 6  # each of the two that share took one page of its own
    fourth = server.submit(Request(beginning[:20], 3))  # all of it is there, and one token has to be computed
    server.run()
    assert fourth.reused == 16
    for request in (first, second, third, other, fourth):
        assert request.tokens == generate_alone(ours, request)


def test_prompts_are_read_with_those_about_as_long():
    requests = make_requests(50)
    requests[0].reused = len(requests[0].prompt) - 1  # one token is left to read
    groups = serving.group_by_length(requests, lambda request: len(request.prompt) - request.reused)
    assert sorted(id(r) for group in groups for r in group) == sorted(map(id, requests))
    for group in groups:
        lengths = [len(request.prompt) - request.reused for request in group]
        assert sum(lengths) >= 3 / 4 * len(lengths) * max(lengths)


def test_while_one_runs_another_shares(tiny):
    ours = tiny("gpt2").ours
    server = Server(ours, pages=40, page_size=4)
    first = server.submit(Request(list(range(12)), 20))
    server.step()
    second = server.submit(Request([*range(12), 50], 20))
    server.run()
    assert second.reused == 12
    assert [r.tokens for r in (first, second)] == [generate_alone(ours, r) for r in (first, second)]


def test_sampling_depends_on_the_seed_alone(tiny):
    ours = tiny("gpt2").ours
    results = []
    for neighbours in (0, 5):
        server = Server(ours, pages=100, page_size=4)
        request = server.submit(Request([1, 2, 3], 12, Sampling(temperature=1.0, top_k=20), seed=3))
        for other in make_requests(neighbours):
            server.submit(other)
        server.run()
        results.append(request.tokens)
    assert results[0] == results[1]


def test_what_can_never_run_is_refused(tiny):
    server = Server(tiny("gpt2").ours, pages=4, page_size=4)
    with pytest.raises(ValueError, match="must fit the 4 pages, got 5"):
        server.submit(Request([1] * 10, 7))
    with pytest.raises(ValueError, match="must fit the context of 64"):
        server.submit(Request([1] * 60, 7))
    server.submit(Request([1] * 9, 7))
    server.run()


def submit_all(tiny, requests, pages=100, **options):
    server = Server(tiny("gpt2").ours, pages=pages, page_size=4, **options)
    return server, [server.submit(request) for request in requests]


class WrongError(Exception):
    pass


def make_failing(at: int):
    """A callback that raises with the token of this number."""
    seen = []

    def on_token(token: int) -> None:
        seen.append(token)
        if len(seen) == at:
            raise WrongError(f"token {at}")

    return on_token


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_callback_that_raises_ends_its_request_alone(at, tiny):
    before, after = make_requests(2), make_requests(2, seed=1)
    request = Request([1, 2, 3], 9, on_token=make_failing(at))
    server, _ = submit_all(tiny, [*before, request, *after])
    server.run()
    assert request.done
    assert isinstance(request.error, WrongError)
    assert request.tokens == generate_alone(server.model, request)[:at]
    for other in before + after:
        assert other.done
        assert other.error is None
        assert other.tokens == generate_alone(server.model, other)
    assert server.cache.free_pages == 100 - sum(
        server.cache.count_pages(server.cache.length(r.sequence)) for r in server.finished
    )


def test_a_request_that_cannot_choose_ends_alone(tiny):
    """Its token has no number, and from logits that are none nothing can be drawn."""
    ours = tiny("llama").ours
    with torch.no_grad():
        ours.token_embedding.weight[0] = torch.nan
    server = Server(ours, pages=100, page_size=4)
    request, *others = Request([1, 0], 9, Sampling(temperature=1.0)), Request([1, 2, 3], 9), Request([4], 9)
    for one in (others[0], request, others[1]):
        server.submit(one)
    server.run()
    assert request.done
    assert isinstance(request.error, RuntimeError)
    assert request.tokens == []
    assert [r.tokens for r in others] == [generate_alone(ours, r) for r in others]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampling=None), "sampling must be a Sampling, got None"),
        (dict(stop_tokens=None), "stop_tokens must be token numbers, got None"),
        (dict(stop_tokens=7), "stop_tokens must be token numbers, got 7"),
    ],
)
def test_what_would_stop_a_step_is_refused(options, message, tiny):
    with pytest.raises(TypeError, match=message):
        submit_all(tiny, [Request([1, 2, 3], 9, **options)])


@pytest.mark.parametrize(("kind", "call"), [(RuntimeError, 1), (KeyboardInterrupt, 2), (RuntimeError, 8)])
def test_a_step_that_fails_can_be_taken_again(kind, call, tiny, monkeypatch):
    """What stops a pass through the model, in any layer, leaves every request as it was."""
    requests = [Request(list(range(3 * i + 1)), 9) for i in range(4)]
    server, _ = submit_all(tiny, requests)
    block, calls = server.model.blocks[1], []
    inner = block.forward

    def forward(*args):
        calls.append(1)
        result = inner(*args)  # its keys are in the cache, those of the layers behind it are not
        if len(calls) == call:
            raise kind("stopped")
        return result

    monkeypatch.setattr(block, "forward", forward)
    with pytest.raises(kind, match="stopped"):
        server.run()
    server.run()
    assert [r.tokens for r in requests] == [generate_alone(server.model, r) for r in requests]


def test_an_interrupt_in_a_callback_stops_the_server_and_nothing_is_lost(tiny):
    def interrupt(token: int) -> None:
        if len(request.tokens) == 2:
            raise KeyboardInterrupt

    others = make_requests(4)
    request = Request([1, 2, 3], 9, on_token=interrupt)
    server, _ = submit_all(tiny, [*others[:2], request, *others[2:]])
    with pytest.raises(KeyboardInterrupt):
        server.run()
    server.run()
    assert [r.tokens for r in [request, *others]] == [generate_alone(server.model, r) for r in [request, *others]]


def test_a_request_serves_once(tiny):
    server, (request,) = submit_all(tiny, [Request([1, 2], 3)])
    with pytest.raises(ValueError, match="request must be a new one, got one that was submitted"):
        server.submit(request)
    server.run()
    with pytest.raises(ValueError, match="request must be a new one"):
        server.submit(request)
    assert request.tokens == generate_alone(server.model, request)
    with pytest.raises(TypeError):
        Request([1, 2], 3, tokens=[5])  # results are not constructor arguments


def test_a_prompt_is_what_it_was_when_it_was_submitted(tiny):
    prompt = [1, 2, 3]
    server, (first, second) = submit_all(tiny, [Request(prompt, 6), Request((4, 5), 6, Sampling(temperature=1.0))])
    expected = generate_alone(server.model, first)
    server.step()
    prompt.clear()
    server.run()
    assert first.tokens == expected
    assert second.error is None
    assert len(second.tokens) == 6


@pytest.mark.parametrize("name", ["largest_batch", "pages", "page_size"])
def test_a_server_of_nothing_is_refused(name, tiny):
    ours = tiny("gpt2").ours
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Server(ours, **{"pages": 4, name: 0})


def test_a_server_needs_a_language_model(tiny):
    with pytest.raises(ValueError, match="model must be a causal language model, got a bert"):
        Server(tiny("bert").ours, pages=4)


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: Request([1, 2.5], 3), r"prompts\[0\] must hold integers, got 2.5"),
        (lambda: Request([1, 2], 2.5), "max_new_tokens must be an integer, got 2.5"),
    ],
)
def test_what_is_not_a_number_of_tokens_is_refused(request_of, message, tiny):
    with pytest.raises(ValueError, match=message):
        submit_all(tiny, [request_of()])


def test_cancel_while_it_waits(tiny):
    server, (first, second) = submit_all(tiny, [Request([1, 2], 5), Request([3, 4], 5)], largest_batch=1)
    server.step()
    server.cancel(second)
    assert second.done
    assert second.cancelled
    assert second not in server.waiting
    server.run()
    assert second.tokens == []
    assert first.tokens == generate_alone(server.model, first)
    assert not first.cancelled


def test_cancel_while_it_runs(tiny):
    """Its pages serve others."""
    server, (first, second) = submit_all(tiny, [Request([1, 2], 20), Request([3, 4], 30)], pages=14)
    third = server.submit(Request([5, 6], 30))
    for _ in range(4):
        server.step()
    assert third.sequence == -1  # no room yet
    server.cancel(second)
    assert second.done
    assert second.tokens == generate_alone(server.model, second)[:4]
    server.run()
    assert second.tokens == generate_alone(server.model, second)[:4]
    assert [r.tokens for r in (first, third)] == [generate_alone(server.model, r) for r in (first, third)]


@pytest.mark.parametrize("which", ["itself", "next", "last"])
def test_cancel_out_of_a_callback(which, tiny):
    requests = [Request([1, 2], 9), Request([3, 4], 9), Request(list(range(30)), 9)]
    target = requests[["itself", "next", "last"].index(which)]
    requests[0].on_token = lambda token: server.cancel(target) if len(requests[0].tokens) == 3 else None
    after = []
    target.on_token = target.on_token or (lambda token: after.append(target.cancelled))
    server, _ = submit_all(tiny, requests)
    server.run()
    assert target.cancelled
    assert len(target.tokens) < 9
    assert not any(after)
    for request in requests:
        expected = generate_alone(server.model, request)
        assert request.tokens == (expected[: len(request.tokens)] if request is target else expected)


def test_a_callback_may_submit(tiny):
    later = Request([9, 8], 4)
    first = Request([1, 2], 6, on_token=lambda token: server.submit(later) if later.generator is None else None)
    server, _ = submit_all(tiny, [first])
    server.run()
    assert [r.tokens for r in (first, later)] == [generate_alone(server.model, r) for r in (first, later)]


def test_cancel_of_what_is_done_changes_nothing(tiny):
    server, (request,) = submit_all(tiny, [Request([1, 2], 3)])
    server.run()
    server.cancel(request)
    assert not request.cancelled
    assert request.tokens == generate_alone(server.model, request)
    with pytest.raises(ValueError, match="request must be one that was submitted to this server"):
        server.cancel(Request([1, 2], 3))


@pytest.mark.parametrize("name", SERVED)
def test_guesses_change_nothing(name, tiny):
    """A draft that is wrong, one that is the model itself, and one that is right now and then."""
    ours, near, far = (tiny(name).ours for _ in range(3))
    with torch.no_grad():
        for one, noise in ((near, 0.01), (far, 1.0)):
            for p in one.parameters():
                p += noise * torch.randn_like(p)
    for prompt in ([5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]):
        expected = model.generate(ours, [prompt], 30)[0]
        stop = expected[10]
        stopped = model.generate(ours, [prompt], 30, stop_tokens=[stop])[0]
        for lookahead in (1, 3, 6):
            for draft in (ours, near, far):
                seen = []
                found = model.speculate(ours, draft, prompt, 30, lookahead=lookahead, on_token=seen.append)
                assert found.tokens == expected == seen
                if draft is ours:
                    assert found.accepted == 1
                    assert found.steps == 1 + -(-29 // (lookahead + 1))  # the prompt first
            found = model.speculate(ours, near, prompt, 30, lookahead=lookahead, stop_tokens=[stop])
            assert found.tokens == stopped


@pytest.mark.parametrize("lookahead", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_guesses_change_no_bit(name, size, dtype, lookahead, monkeypatch):
    """Of the logits, on the CPU engine: or else, of two tokens that are about as likely, the other is taken."""
    config = replace(CONFIGS[name], ffn_width=64)  # what fills PyTorch's vectors; see `speculate`
    ours, draft = (model.Transformer(config).to(dtype).eval() for _ in range(2))
    with torch.no_grad():
        for p, guessed in zip(ours.parameters(), draft.parameters(), strict=True):
            p.copy_(torch.randn_like(p) * 0.5)
            guessed.copy_(p + 0.03 * torch.randn_like(p))
    steps, logits = [], ours.compute_logits
    monkeypatch.setattr(ours, "compute_logits", lambda hidden: steps.append(logits(hidden)) or steps[-1])
    prompt, rows = torch.randint(0, 50, (size,)).tolist(), []
    tokens = model.generate(ours, [prompt], 10)[0]
    expected = torch.cat(steps)
    steps.clear()
    found = model.speculate(ours, draft, prompt, 10, lookahead=lookahead, on_token=lambda _: rows.append(len(steps)))
    assert found.tokens == tokens
    certain = [steps[step - 1][: rows.count(step)] for step in sorted(set(rows))]
    assert torch.equal(torch.cat(certain), expected)


def test_a_draft_of_another_vocabulary(tiny):
    ours = tiny("gpt2").ours
    draft = model.Transformer(replace(ours.config, vocab_size=50))
    with pytest.raises(ValueError, match="draft must have the model's vocabulary of 101, got 50"):
        model.speculate(ours, draft, [1], 5)


@needs_smollm2
def test_real_weights():
    """SmolLM2 serves three at once, one of which shares a beginning; its first layers guess for it."""
    ours, tokenizer = model.load(locate("smollm2"))
    prompts = ["The capital of France is", "The capital of France is called", "Once upon a time"]
    server = Server(ours, pages=64, page_size=4)
    requests = [server.submit(Request(tokenizer.encode(text), 12)) for text in prompts]
    server.run()
    assert [r.tokens for r in requests] == [generate_alone(ours, r) for r in requests]
    draft = model.Transformer(replace(ours.config, layers=15)).eval()
    kept = {k: v for k, v in ours.state_dict().items() if not k.startswith("blocks.") or int(k.split(".")[1]) < 15}
    draft.load_state_dict(kept)
    prompt = tokenizer.encode("The three laws of motion are:")
    assert model.speculate(ours, draft, prompt, 24).tokens == model.generate(ours, [prompt], 24)[0]
