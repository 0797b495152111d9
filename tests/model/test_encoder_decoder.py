"""Encoder-decoders: parity with `transformers` on checkpoints that it writes with random weights; the cache."""

import pytest
import torch

import model
from model.io.checkpoints import CheckpointError
from model.positions import make_sinusoids
from tests.model.checkpoints import ENCODER_DECODERS, SMALL_T5, change_config, write_checkpoint_of

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_parity_with_transformers(name, tiny):
    """Past the largest distance; d_kv times heads is not d_model."""
    _, theirs, ours = tiny(name)
    tokens, targets = torch.randint(1, 101, (3, 37)), torch.randint(1, 101, (3, 29))
    with torch.no_grad():
        expected = theirs(input_ids=tokens, decoder_input_ids=targets).logits
        torch.testing.assert_close(ours(tokens, targets), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_parity_when_padded(name, tiny):
    _, theirs, ours = tiny(name)
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


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_gradients_equal_transformers(name, tiny):
    """Those of the relative position biases too."""
    _, theirs, ours = tiny(name)
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


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_a_cache_changes_nothing(name, tiny):
    """Several tokens, then one by one; the encoder's keys and values are made once."""
    ours = tiny(name).ours
    tokens, targets, lengths = torch.randint(1, 101, (2, 11)), torch.randint(1, 101, (2, 30)), torch.tensor([11, 4])
    with torch.no_grad():
        whole = ours(tokens, targets, lengths)
        memory, cache = ours.encode(tokens, lengths), ours.new_cache(2, 30)
        pieces = (targets[:, :17], *targets[:, 17:].split(1, 1))
        parts = [ours.compute_logits(ours.decode(piece, memory, cache=cache)) for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["load", "half"])
@pytest.mark.parametrize("name", ["t5", "t5_1.1"])
def test_float16_stays_finite(name, how, tmp_path):
    """Where feed-forwards put out more than float16 holds: as in transformers, which keeps their last product in
    float32, and close to what float32 gives."""
    theirs = write_checkpoint_of(name, tmp_path)
    with torch.no_grad():
        for parameter_name, p in theirs.named_parameters():
            if ".wo." in parameter_name:
                p.mul_(3e4)
    if name == "t5_1.1":
        theirs.config.tie_word_embeddings = False
    theirs.save_pretrained(tmp_path)
    if name == "t5_1.1":
        change_config(tmp_path, tie_word_embeddings=False)
    exact, ours = model.load(tmp_path)[0], model.load(tmp_path, torch.float16)[0]
    if how == "half":
        ours = model.load(tmp_path)[0].half()
    tokens, targets = torch.randint(1, 101, (3, 17)), torch.randint(1, 101, (3, 9))
    with torch.no_grad():
        expected, found = exact(tokens, targets), ours(tokens, targets)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max())
        memory, cache = ours.encode(tokens), ours.new_cache(3, 9)
        step = ours.compute_logits(ours.decode(targets[:, :1], memory, cache=cache))
    torch.testing.assert_close(step, found[:, :1], rtol=0.01, atol=0.01 * expected.abs().max())


def test_an_unknown_feed_forward_is_named(tmp_path):
    transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL_T5)).save_pretrained(tmp_path)
    change_config(tmp_path, feed_forward_proj="swish")
    with pytest.raises(CheckpointError, match="feed_forward_proj must be one of relu, gated-gelu"):
        model.load(tmp_path)


def test_a_head_that_only_the_config_ties(tmp_path):
    write_checkpoint_of("t5_1.1", tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"but lm_head\.weight is another"):
        model.load(tmp_path)


def test_sinusoids():
    """Vaswani et al., section 3.5, the sines and the cosines each together."""
    table = make_sinusoids(torch.arange(50)[None], 16)[0]
    for position in (0, 1, 49):
        for i in range(8):
            angle = torch.tensor(position / 10000 ** (2 * i / 16), dtype=torch.float64)
            torch.testing.assert_close(table[position, i].double(), angle.sin(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(table[position, 8 + i].double(), angle.cos(), rtol=1e-5, atol=1e-5)
