"""Encoder-decoders: parity with `transformers` on checkpoints that it writes with random weights; the cache."""

import json

import pytest
import torch

import model
from model.positions import sinusoids

transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=101, d_model=48, d_kv=20, d_ff=72, num_layers=2, num_decoder_layers=3, num_heads=4,
    relative_attention_num_buckets=12, relative_attention_max_distance=20,
)  # fmt: skip
MARIAN = dict(
    vocab_size=101, d_model=48, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=72, decoder_ffn_dim=72, max_position_embeddings=64, pad_token_id=0,
    decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=1,
)  # fmt: skip
TINY = {
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**MARIAN, activation_function="relu", scale_embedding=True)
    ),
    "marian_swish": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**MARIAN, activation_function="swish")
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL)),
    "t5_1.1": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SMALL, feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
    ),
}


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def written(name, path):
    theirs = TINY[name]().eval()
    with torch.no_grad():
        for parameter_name, p in theirs.named_parameters():
            if "embed_positions" not in parameter_name:  # sinusoids
                p.copy_(torch.randn_like(p) * 0.3)
        if name.startswith("marian"):
            theirs.final_logits_bias.copy_(torch.randn(1, 101))
    if name == "t5_1.1":  # a head of its own, which this transformers has no config for
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(101, 48) * 0.3)
    theirs.save_pretrained(path)
    if name == "t5_1.1":
        change_config(path, tie_word_embeddings=False)
    return theirs, model.load(path)[0]


@pytest.mark.parametrize("name", TINY)
def test_parity_with_transformers(name, tmp_path):
    """Past the largest distance; d_kv times heads is not d_model."""
    theirs, ours = written(name, tmp_path)
    tokens, targets = torch.randint(1, 101, (3, 37)), torch.randint(1, 101, (3, 29))
    with torch.no_grad():
        expected = theirs(input_ids=tokens, decoder_input_ids=targets).logits
        torch.testing.assert_close(ours(tokens, targets), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_parity_when_padded(name, tmp_path):
    theirs, ours = written(name, tmp_path)
    tokens, targets = torch.randint(1, 101, (3, 17)), torch.randint(1, 101, (3, 9))
    lengths, target_lengths = torch.tensor([17, 5, 9]), torch.tensor([4, 9, 1])
    exists, target_exists = (torch.arange(n) < x[:, None] for n, x in ((17, lengths), (9, target_lengths)))
    with torch.no_grad():
        expected = theirs(
            input_ids=tokens, attention_mask=exists.long(), decoder_input_ids=targets,
            decoder_attention_mask=target_exists.long(),
        ).logits  # fmt: skip
        got = ours(tokens, targets, lengths, target_lengths)
    torch.testing.assert_close(got[target_exists], expected[target_exists], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_gradients_equal_transformers(name, tmp_path):
    """Those of the tables of biases by distance too."""
    theirs, ours = written(name, tmp_path)
    tokens, targets = torch.randint(1, 101, (2, 17)), torch.randint(1, 101, (2, 9))
    ours(tokens, targets).square().mean().backward()
    theirs(input_ids=tokens, decoder_input_ids=targets).logits.square().mean().backward()
    pairs = {"embedding": (ours.token_embedding.weight, theirs.get_input_embeddings().weight)}
    for side in ("encoder", "decoder") if name.startswith("t5") else ():
        attention = getattr(theirs, side).block[0].layer[0].SelfAttention
        pairs[side] = getattr(ours, side).relative.weight, attention.relative_attention_bias.weight
    for ours_, theirs_ in pairs.values():
        torch.testing.assert_close(ours_.grad, theirs_.grad, rtol=1e-3, atol=1e-4 * theirs_.grad.abs().max())
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("name", TINY)
def test_a_cache_changes_nothing(name, tmp_path):
    """Several tokens, then one by one; the encoder's keys and values are made once."""
    _, ours = written(name, tmp_path)
    tokens, targets, lengths = torch.randint(1, 101, (2, 11)), torch.randint(1, 101, (2, 30)), torch.tensor([11, 4])
    with torch.no_grad():
        whole = ours(tokens, targets, lengths)
        memory, cache = ours.encode(tokens, lengths), ours.new_cache(2, 30)
        pieces = (targets[:, :17], *targets[:, 17:].split(1, 1))
        parts = [ours.logits(ours.decode(piece, memory, cache=cache)) for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_an_unknown_feed_forward_is_named(tmp_path):
    transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL)).save_pretrained(tmp_path)
    change_config(tmp_path, feed_forward_proj="swish")
    with pytest.raises(model.checkpoints.CheckpointError, match="feed_forward_proj must be one of relu, gated-gelu"):
        model.load(tmp_path)


def test_a_head_that_only_the_config_ties(tmp_path):
    written("t5_1.1", tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(model.checkpoints.CheckpointError, match=r"but lm_head\.weight is another"):
        model.load(tmp_path)


def test_sinusoids():
    """Vaswani et al., section 3.5, the sines and the cosines each together."""
    table = sinusoids(torch.arange(50)[None], 16)[0]
    for position in (0, 1, 49):
        for i in range(8):
            angle = torch.tensor(position / 10000 ** (2 * i / 16), dtype=torch.float64)
            torch.testing.assert_close(table[position, i].double(), angle.sin(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(table[position, 8 + i].double(), angle.cos(), rtol=1e-5, atol=1e-5)
