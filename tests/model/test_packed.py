"""Packed sequences: the same numbers as padded ones, forward and gradients, for every family."""

from dataclasses import replace

import pytest
import torch

import flashattn
import model
from model.inference.embed import embed
from model.io.packages import locate
from tests.model.checkpoints import ENCODER_DECODERS, TINY
from tests.packages import needs_minilm

LENGTHS = torch.tensor([17, 1, 9])


def pad(packed, lengths):
    rows = packed.split(lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def unpad(padded, lengths):
    return torch.cat([row[:n] for row, n in zip(padded, lengths.tolist(), strict=True)])


def compare(ours, packed, padded):
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    gradients = []
    for out in (packed, padded):
        ours.zero_grad()
        out.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    for name, expected in gradients[1].items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("name", TINY)
def test_packed_equals_padded(name, tiny):
    ours = tiny(name).ours
    tokens = torch.randint(1, 101, (int(LENGTHS.sum()),))
    packed, padded = ours(tokens, LENGTHS), ours(pad(tokens, LENGTHS), LENGTHS)
    compare(ours, packed, padded if ours.config.task == "classify" else unpad(padded, LENGTHS))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_packed_encoder_decoders(name, tiny):
    ours = tiny(name).ours
    target_lengths = torch.tensor([3, 12, 1])
    tokens = torch.randint(1, 101, (int(LENGTHS.sum()),))
    targets = torch.randint(1, 101, (int(target_lengths.sum()),))
    packed = ours(tokens, targets, LENGTHS, target_lengths)
    padded = ours(pad(tokens, LENGTHS), pad(targets, target_lengths), LENGTHS, target_lengths)
    compare(ours, packed, unpad(padded, target_lengths))
    with pytest.raises(ValueError, match="both packed or both padded"):
        ours(tokens, targets[None], LENGTHS)


def test_wrong_lengths_are_named(tiny):
    ours = tiny("gpt2").ours
    with pytest.raises(ValueError, match="lengths must sum to the 5 packed tokens, got 4"):
        ours(torch.arange(5), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="they need lengths, and go without a cache"):
        ours(torch.arange(5))
    with pytest.raises(ValueError, match="tokens must fit the context of 64, got 65"):
        ours(torch.ones(70, dtype=torch.long), torch.tensor([65, 5]))


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_dropout_is_of_training_alone(name, tiny):
    """Another draw, another result; the same draw, the same; none in evaluation. Packed drops what padded drops in
    attention only, so the two are not compared."""
    plain = tiny(name).ours
    ours = model.Transformer(replace(plain.config, dropout=0.3))
    ours.load_state_dict(plain.state_dict())
    tokens = torch.randint(1, 101, (2, 9))
    assert torch.equal(ours.eval()(tokens), plain(tokens))
    ours.train()
    torch.manual_seed(1)
    first, second = ours(tokens), ours(tokens)
    torch.manual_seed(1)
    assert torch.equal(ours(tokens), first)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        replace(plain.config, dropout=1)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_where_is_dropped(name, tiny, monkeypatch):
    """In each attention and each norm's addition; a norm that adds nothing drops nothing, but for the first of a GPT-2,
    which drops from the embeddings."""
    dropped = {"attention": [], "layer_norm": []}

    def watch(where, function, position):
        original = getattr(where, function)

        def watched(*args, **options):
            dropped[function].append(options.get("dropout_p", args[position] if len(args) > position else 0.0))
            return original(*args, **options)

        monkeypatch.setattr(where, function, watched)

    ours = model.Transformer(replace(tiny(name).ours.config, dropout=0.3))
    watch(flashattn, "attention", 99)
    watch(flashattn.modules, "layer_norm", 5)
    ours(torch.randint(1, 101, (2, 9)))
    assert dropped["attention"] == [0.3] * 3
    assert dropped["layer_norm"] == ([0.3] * 7 if name == "gpt2" else [0.0] + [0.3] * 6)


@needs_minilm
def test_embeddings_are_those_of_padded_sentences():
    ours, tokenizer = model.load(locate("minilm"))
    sentences = ["A man is eating food.", "x", "The girl is carrying a baby, and the woman is playing the violin."]
    vectors = embed(ours, tokenizer, sentences)
    for sentence, vector in zip(sentences, vectors, strict=True):
        hidden = ours.encode(torch.tensor([tokenizer.encode(sentence)]))[0].mean(0)
        torch.testing.assert_close(vector, torch.nn.functional.normalize(hidden, dim=0), rtol=1e-4, atol=1e-5)
