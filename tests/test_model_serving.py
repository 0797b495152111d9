"""Continuous batching and speculative decoding: the tokens of `generate`, whatever runs beside them."""

import random

import pytest
import torch
from checkpoints import written
from packages import needs_smollm2

import model
from model import Request, Sampling, Server, serving
from model.packages import locate

FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "mistral"]


def alone(ours, request):
    return model.generate(ours, [request.prompt], request.max_new_tokens, stop_tokens=request.stop_tokens)[0]


def some_requests(count, seed=0):
    rng = random.Random(seed)
    prompts = [[rng.randrange(101) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    return [Request(prompt, rng.randint(1, 20), stop_tokens=(7, 8)) for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("pages", "page_size", "largest"), [(100, 4, 32), (13, 4, 3), (50, 1, 5)])
def test_each_gets_what_it_gets_alone(name, pages, page_size, largest, tmp_path):
    """With room for all, room for few, and pages of one token; requests come while others run."""
    written(name, tmp_path)
    ours, _ = model.load(tmp_path)
    server = Server(ours, pages, page_size, largest)
    requests = some_requests(12)
    for i, request in enumerate(requests):
        server.submit(request)
        if i % 3 == 2:
            server.step()
    server.run()
    for request in requests:
        assert request.done
        assert request.tokens == alone(ours, request)
    held = sum(server.cache.pages_for(server.cache.length(r.sequence)) for r in server.finished)
    assert held >= pages - server.cache.free_pages  # nothing else holds pages


def test_a_beginning_is_computed_once(tmp_path):
    written("llama", tmp_path)
    ours, _ = model.load(tmp_path)
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
        assert request.tokens == alone(ours, request)


def test_prompts_are_read_with_those_about_as_long():
    requests = some_requests(50)
    requests[0].reused = len(requests[0].prompt) - 1  # one token is left to read
    groups = serving.groups(requests)
    assert sorted(id(r) for group in groups for r in group) == sorted(map(id, requests))
    for group in groups:
        lengths = [len(request.prompt) - request.reused for request in group]
        assert sum(lengths) >= 3 / 4 * len(lengths) * max(lengths)


def test_while_one_runs_another_shares(tmp_path):
    written("gpt2", tmp_path)
    ours, _ = model.load(tmp_path)
    server = Server(ours, pages=40, page_size=4)
    first = server.submit(Request(list(range(12)), 20))
    server.step()
    second = server.submit(Request([*range(12), 50], 20))
    server.run()
    assert second.reused == 12
    assert [r.tokens for r in (first, second)] == [alone(ours, r) for r in (first, second)]


def test_sampling_depends_on_the_seed_alone(tmp_path):
    written("gpt2", tmp_path)
    ours, _ = model.load(tmp_path)
    results = []
    for neighbours in (0, 5):
        server = Server(ours, pages=100, page_size=4)
        request = server.submit(Request([1, 2, 3], 12, Sampling(temperature=1.0, top_k=20), seed=3))
        for other in some_requests(neighbours):
            server.submit(other)
        server.run()
        results.append(request.tokens)
    assert results[0] == results[1]


def test_what_can_never_run_is_refused(tmp_path):
    written("gpt2", tmp_path)
    ours, _ = model.load(tmp_path)
    server = Server(ours, pages=4, page_size=4)
    with pytest.raises(ValueError, match="must fit the 4 pages, got 5"):
        server.submit(Request([1] * 10, 7))
    with pytest.raises(ValueError, match="must fit the context of 64"):
        server.submit(Request([1] * 60, 7))
    server.submit(Request([1] * 9, 7))
    server.run()


@pytest.mark.parametrize("lookahead", [1, 3, 6])
@pytest.mark.parametrize("name", FAMILIES)
def test_guesses_change_nothing(name, lookahead, tmp_path):
    """A draft that is wrong, one that is the model itself, and one that is right now and then."""
    written(name, tmp_path)
    ours, _ = model.load(tmp_path)
    near, far = model.load(tmp_path)[0], model.load(tmp_path)[0]
    with torch.no_grad():
        for one, noise in ((near, 0.01), (far, 1.0)):
            for p in one.parameters():
                p += noise * torch.randn_like(p)
    for prompt in ([5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]):
        expected = model.generate(ours, [prompt], 30)[0]
        for draft in (ours, near, far):
            seen = []
            found = model.speculate(ours, draft, prompt, 30, lookahead=lookahead, on_token=seen.append)
            assert found.tokens == expected == seen
            if draft is ours:
                assert found.accepted == 1
                assert found.steps == -(-30 // (lookahead + 1))
        stop = expected[10]
        found = model.speculate(ours, near, prompt, 30, lookahead=lookahead, stop_tokens=[stop])
        assert found.tokens == model.generate(ours, [prompt], 30, stop_tokens=[stop])[0]


def test_a_draft_of_another_vocabulary(tmp_path):
    from dataclasses import replace

    written("gpt2", tmp_path)
    ours, _ = model.load(tmp_path)
    draft = model.Transformer(replace(ours.config, vocab_size=50))
    with pytest.raises(ValueError, match="draft must have the model's vocabulary of 101, got 50"):
        model.speculate(ours, draft, [1], 5)


@needs_smollm2
def test_real_weights():
    """SmolLM2 serves three at once, one of which shares a beginning; its first layers guess for it."""
    from dataclasses import replace

    ours, tokenizer = model.load(locate("smollm2"))
    prompts = ["The capital of France is", "The capital of France is called", "Once upon a time"]
    server = Server(ours, pages=64, page_size=4)
    requests = [server.submit(Request(tokenizer.encode(text), 12)) for text in prompts]
    server.run()
    assert [r.tokens for r in requests] == [alone(ours, r) for r in requests]
    draft = model.Transformer(replace(ours.config, layers=15)).eval()
    kept = {k: v for k, v in ours.state_dict().items() if not k.startswith("blocks.") or int(k.split(".")[1]) < 15}
    draft.load_state_dict(kept)
    prompt = tokenizer.encode("The three laws of motion are:")
    assert model.speculate(ours, draft, prompt, 24).tokens == model.generate(ours, [prompt], 24)[0]
