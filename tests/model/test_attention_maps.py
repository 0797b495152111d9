"""Attention maps: the weights and entropies that `transformers` has, in groups, without anything (seq, seq)."""

import pytest
import torch

import model
from model.inference.attention_maps import compute_attention_maps
from tests.model.checkpoints import write_checkpoint_of
from tests.packages import needs_minilm

transformers = pytest.importorskip("transformers")


def sum_groups(weights, size):
    """Means over groups of queries of the sums over groups of keys."""
    seq = weights.shape[-1]
    group = -(-seq // size)
    rows = [part.mean(1) for part in weights.split(group, 1)]
    return torch.stack([torch.stack([p.sum(-1) for p in row.split(group, -1)], -1) for row in rows], 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("size", [64, 10])
def test_weights_equal_transformers(name, size, tmp_path):
    theirs = write_checkpoint_of(name, tmp_path)
    theirs.set_attn_implementation("eager")
    ours, _ = model.load(tmp_path)
    tokens = torch.randint(1, 101, (23,))
    with torch.no_grad():
        expected = theirs(tokens[None], output_attentions=True).attentions
    maps = compute_attention_maps(ours, tokens, size)
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(maps.weights[layer], sum_groups(weights[0], size), rtol=1e-3, atol=1e-4)
        entropy = torch.special.entr(weights[0]).sum(-1).mean(-1)
        torch.testing.assert_close(maps.entropy[layer], entropy, rtol=1e-3, atol=1e-4)


def test_wrong_arguments_are_named(tiny):
    ours = tiny("gpt2").ours
    with pytest.raises(ValueError, match=r"tokens must be \(seq,\), at least one, got shape \(1, 3\)"):
        compute_attention_maps(ours, torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="size must be between 1 and 256"):
        compute_attention_maps(ours, torch.ones(3, dtype=torch.long), size=300)


@needs_minilm
def test_the_picture(tmp_path):
    from model.tasks import maps

    result = maps.run("minilm", maps.TEXT, str(tmp_path))
    assert (tmp_path / "attention.png").stat().st_size > 20_000
    assert len(result["entropy"]) == 6
    assert all(0 <= value <= torch.tensor(len(result["tokens"])).log() for row in result["entropy"] for value in row)
