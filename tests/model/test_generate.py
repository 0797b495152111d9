"""Generation: the cache, batches of unequal prompts, sampling, stopping, and what is refused."""

import pytest
import torch

import flashattn
from model import Transformer, generate
from model.inference.sampling import Sampling
from tests.model.configs import CONFIGS

PROMPTS = [[3, 7, 9], [1], [4, 4, 8, 15, 16, 23, 42]]


@pytest.fixture(params=CONFIGS)
def tiny(request):
    torch.manual_seed(0)
    model = Transformer(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return model


def generate_without_cache(model, prompt, new):
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_batch_of_unequal_prompts_equals_each_alone(tiny, backend):
    with flashattn.use_backend(backend), torch.no_grad():
        together = generate(tiny, PROMPTS, 12)
        for prompt, tokens in zip(PROMPTS, together, strict=True):
            assert tokens == generate_without_cache(tiny, prompt, 12)
            assert generate(tiny, [prompt], 12) == [tokens]


def test_stop_tokens(tiny):
    full = generate(tiny, PROMPTS, 12)
    stop = full[0][5]
    for tokens, stopped in zip(full, generate(tiny, PROMPTS, 12, stop_tokens=[stop]), strict=True):
        assert stopped == tokens[: tokens.index(stop)] if stop in tokens else stopped == tokens


def test_streaming_gives_the_same_tokens_in_order(tiny):
    seen = [[] for _ in PROMPTS]
    result = generate(tiny, PROMPTS, 5, on_token=lambda i, token: seen[i].append(token))
    assert seen == result


def test_sampling_is_reproducible(tiny):
    first, second = (generate(tiny, PROMPTS, 8, temperature=1.0, seed=5) for _ in range(2))
    assert first == second
    assert generate(tiny, PROMPTS, 8, temperature=1.0, seed=6) != first


def test_up_to_the_context(tiny):
    assert len(generate(tiny, [[1] * 30], 10)[0]) == 10


def test_nothing_to_do(tiny):
    assert generate(tiny, [], 5) == []
    assert generate(tiny, [[1]], 0) == [[]]


LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(20000, 4)


def sample_shares(**options):
    sampling = Sampling(**{"temperature": 1.0, **options})
    tokens = sampling.choose(LOGITS, generator=torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=4) / len(tokens)


def test_sampling_follows_the_distribution():
    torch.testing.assert_close(sample_shares(), LOGITS[0].softmax(-1), rtol=0, atol=0.02)
    torch.testing.assert_close(sample_shares(temperature=2.0), (LOGITS[0] / 2).softmax(-1), rtol=0, atol=0.02)


def test_top_k():
    expected = torch.tensor([-torch.inf, 2.0, 1.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(sample_shares(top_k=2), expected, rtol=0, atol=0.02)
    assert sample_shares(top_k=1)[1] == 1
    torch.testing.assert_close(sample_shares(top_k=100), LOGITS[0].softmax(-1), rtol=0, atol=0.02)


def test_top_p():
    # The probabilities are 0.64, 0.24, 0.09, 0.03: two tokens reach 0.8, one reaches 0.5.
    expected = torch.tensor([-torch.inf, 2.0, 1.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(sample_shares(top_p=0.8), expected, rtol=0, atol=0.02)
    assert sample_shares(top_p=0.5)[1] == 1
    torch.testing.assert_close(sample_shares(top_p=1.0), LOGITS[0].softmax(-1), rtol=0, atol=0.02)


def test_min_p():
    expected = torch.tensor([-torch.inf, 2.0, 1.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(
        sample_shares(min_p=0.3), expected, rtol=0, atol=0.02
    )  # 0.24 is 0.37 of 0.64, 0.09 is 0.14
    assert sample_shares(min_p=1.0)[1] == 1
    torch.testing.assert_close(sample_shares(min_p=0.0), LOGITS[0].softmax(-1), rtol=0, atol=0.02)


def test_repetition_penalty(tiny):
    """As transformers has it, for tokens of the prompt and for those that were chosen."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    logits, tokens = torch.randn(3, 50), torch.randint(0, 50, (3, 9))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, tokens, True)
    for signs in (logits, -logits.abs()):
        ours = Sampling(repetition_penalty=1.7).choose(signs, seen)
        assert torch.equal(ours, theirs(tokens, signs).argmax(-1))
    for result, prompt in zip(generate(tiny, PROMPTS, 12, repetition_penalty=1e6), PROMPTS, strict=True):
        assert len(set(prompt + result)) == len(set(prompt)) + len(result)  # nothing twice, while others are left


def test_greedy_is_temperature_0():
    assert sample_shares(temperature=0.0)[1] == 1


WRONG = {
    "too_long": ([[1] * 30], 11, {}, r"prompts\[0\] must fit the context of 40.*got 30 \+ 11"),
    "empty": ([[1], []], 5, {}, r"prompts\[1\] must have at least one token"),
    "token": ([[50]], 5, {}, r"prompts\[0\] must hold tokens below 50, got 50"),
    "fraction": ([[1, 2.5]], 5, {}, r"prompts\[0\] must hold integers, got 2.5"),
    "half a token": ([[1]], 2.5, {}, "max_new_tokens must be an integer, got 2.5"),
    "negative": ([[1]], -1, {}, "max_new_tokens must be at least 0, got -1"),
    "temperature": ([[1]], 1, {"temperature": -1.0}, "temperature must be at least 0"),
    "no number": ([[1]], 1, {"temperature": float("nan")}, "temperature must be at least 0, and finite, got nan"),
    "top_k": ([[1]], 1, {"top_k": 0}, "top_k must be at least 1"),
    "top_p": ([[1]], 1, {"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    "min_p": ([[1]], 1, {"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
    "repetition_penalty": ([[1]], 1, {"repetition_penalty": 0.0}, "repetition_penalty must be over 0"),
    "endless penalty": ([[1]], 1, {"repetition_penalty": float("inf")}, "must be over 0, and finite, got inf"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(tiny, name):
    prompts, new, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        generate(tiny, prompts, new, **options)


def test_an_encoder_does_not_generate():
    from dataclasses import replace

    encoder = Transformer(replace(CONFIGS["learned"], family="bert", causal=False, lm_head=False))
    with pytest.raises(ValueError, match="model must be a causal language model or an encoder-decoder, got a bert"):
        generate(encoder, [[1]], 1)
    with pytest.raises(ValueError, match="tokens must fit the context of 40, got 41"):
        encoder(torch.zeros(1, 41, dtype=torch.long))
