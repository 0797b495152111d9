"""Saving: `transformers` reads what we write, for every family; a full disk or an interrupt leaves nothing."""

import resource

import pytest
import torch

import model
from model.families import FAMILIES
from model.io import saving
from model.io.packages import locate
from tests.model.checkpoints import ENCODER_DECODERS, TINY
from tests.packages import needs_minilm, needs_smollm2

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", TINY)
def test_transformers_reads_what_we_write(name, tiny, tmp_path):
    _, theirs, ours = tiny(name)
    model.save(ours, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all("pooler" in key for key in report["missing_keys"])  # a bare encoder has none
    assert not report["unexpected_keys"]
    tokens = torch.randint(0, 101, (2, 23))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens)[0], theirs(tokens)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_transformers_reads_encoder_decoders(name, tiny, tmp_path):
    _, theirs, ours = tiny(name)
    model.save(ours, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["unexpected_keys"]
    if name != "t5_1.1":  # this transformers ties every T5's head
        tokens, targets = torch.randint(1, 101, (2, 23)), torch.randint(1, 101, (2, 9))
        with torch.no_grad():
            a, b = (x.eval()(input_ids=tokens, decoder_input_ids=targets).logits for x in (again, theirs))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*TINY, *ENCODER_DECODERS])
def test_a_saved_model_is_loaded_unchanged(name, tiny, tmp_path):
    ours = tiny(name).ours
    model.save(ours, tmp_path / "x")
    again, tokenizer = model.load(tmp_path / "x")
    assert tokenizer is None
    assert again.config == ours.config
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_every_family_can_be_written():
    assert {n for n in FAMILIES if not hasattr(FAMILIES[n], "to_hf")} == set()


@needs_minilm
def test_the_tokeniser_comes_along(tmp_path):
    ours, tokenizer = model.load(locate("minilm"))
    model.save(ours, tmp_path / "x", tokenizer)
    again, tokenizer_again = model.load(tmp_path / "x")
    assert tokenizer_again.encode("Hello, my dog is cute") == tokenizer.encode("Hello, my dog is cute")
    assert again.config == ours.config


@needs_smollm2
def test_a_gguf_becomes_a_directory(tmp_path):
    ours, tokenizer = model.load(locate("smollm2"), torch.bfloat16)
    model.save(ours, tmp_path / "x", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    text = "Once upon a time in 1815"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert model.load(tmp_path / "x")[1].stop == tokenizer.stop


def test_nothing_is_written_over(tiny, tmp_path):
    ours = tiny("gpt2").ours
    model.save(ours, tmp_path / "x")
    with pytest.raises(FileExistsError, match="x must not exist yet"):
        model.save(ours, tmp_path / "x")


def test_a_full_disk(tiny, tmp_path):
    """A limit on the size of a file: a write past it fails as on a full disk."""
    ours = tiny("gpt2").ours
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: not written: "):
            model.save(ours, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tiny, tmp_path, monkeypatch):
    ours = tiny("gpt2").ours
    monkeypatch.setattr(saving, "to_hf_names", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model.save(ours, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
