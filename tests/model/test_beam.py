"""Encoder-decoders that generate: greedy and beam search as in `transformers`, and against a search of everything."""

import itertools
from dataclasses import replace

import pytest
import torch

import model
from tests.model.checkpoints import ENCODER_DECODERS

STOP = 1
TIED = [name for name in ENCODER_DECODERS if name != "t5_1.1"]  # whose head this transformers would tie


def run_theirs(theirs, tokens, lengths, stop, **options):
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    start = getattr(theirs.config, "decoder_start_token_id", 0)
    out = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0,
        decoder_start_token_id=start, forced_eos_token_id=None, bad_words_ids=None,
        use_cache=False,  # its cache has as many layers as the encoder
        **options,
    )  # fmt: skip
    rows = [row[1:].tolist() for row in out]
    return [row[: row.index(stop)] if stop in row else row[:12] for row in rows]


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (4, 2.0)])
def test_as_in_transformers(name, beams, penalty, tiny):
    """Random weights know no end: the stop token is one that the first output would have later."""
    _, theirs, ours = tiny(name)
    lengths = torch.tensor([7, 3, 5, 6])
    tokens = torch.randint(2, 101, (4, 7))
    sources = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    tokens = tokens.where(torch.arange(7) < lengths[:, None], 0)
    stop = model.generate(ours, sources, 12)[0][5]
    options = dict(early_stopping="never", length_penalty=penalty) if beams > 1 else {}
    expected = run_theirs(theirs, tokens, lengths, stop, num_beams=beams, **options)
    found = model.beam_search(ours, sources, 12, beams=beams, length_penalty=penalty, stop_tokens=[stop])
    assert found == expected
    if beams == 1:
        assert model.generate(ours, sources, 12, stop_tokens=[stop]) == expected
        assert len(expected[0]) < 12


def compute_log_probability(ours, source, tokens):
    targets = torch.tensor([[ours.config.decoder_start_token, *tokens]])
    logs = ours(torch.tensor([source]), targets)[0].log_softmax(-1)
    return sum(logs[i, t].item() for i, t in enumerate(tokens))


def test_many_beams_find_the_best_of_all(tiny):
    """All outputs of up to three of six tokens, each scored by itself."""
    small = model.EncoderDecoder(replace(tiny("t5").ours.config, vocab_size=6))
    torch.manual_seed(3)
    for p in small.parameters():
        torch.nn.init.normal_(p, std=0.5)
    outputs = [
        [*tokens, *end]
        for n in range(4)
        for tokens in itertools.product([0, 2, 3, 4, 5], repeat=n)
        for end in ([[STOP]] if n < 3 else [[]])
    ]
    for source in ([2, 5, 3], [4], [3, 3]):
        with torch.no_grad():
            best = max(outputs, key=lambda tokens: compute_log_probability(small.eval(), source, tokens) / len(tokens))
        found = model.beam_search(small, [source], 3, beams=200, stop_tokens=[STOP])
        assert found == [[t for t in best if t != STOP]]


def test_wrong_arguments_are_named(tiny):
    ours = tiny("marian").ours
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        model.beam_search(ours, [[1]], 5, beams=0)
    with pytest.raises(ValueError, match=r"sources\[1\] must have at least one token"):
        model.beam_search(ours, [[1], []], 5)
    with pytest.raises(ValueError, match=r"prompts\[0\] must hold tokens below 101, got 101"):
        model.generate(ours, [[101]], 5)
