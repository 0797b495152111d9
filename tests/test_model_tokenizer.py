"""Tokenisers against those of others, on real vocabularies."""

import pytest
from packages import needs_gpt2_vocabulary, needs_smollm2

from model import gguf_file
from model.packages import KNOWN, locate
from model.tokenizer import Tokenizer, byte_alphabet


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.from_tiktoken(locate("gpt2-vocabulary"), special=["<|endoftext|>"])


@needs_gpt2_vocabulary
def test_gpt2_vocabulary(gpt2):
    assert gpt2.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.size == 50257
    assert gpt2.encode("<|endoftext|>") == [50256] == gpt2.stop


TEXTS = ["", " ", "naïve café — 北京 🙂", "  two  spaces\n\tand a tab", "it's 2024, isn't it?", "x" * 1000]


@needs_gpt2_vocabulary
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@needs_gpt2_vocabulary
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(gpt2, text):
    """Characters of several tokens come whole."""
    stream = gpt2.stream()
    pieces = [stream.add(token) for token in gpt2.encode(text)]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_byte_alphabet():
    alphabet = byte_alphabet()
    assert len(set(alphabet.values())) == 256
    assert alphabet[ord(" ")] == "Ġ"


@needs_smollm2
def test_smollm2():
    import gguf

    tokenizer = gguf_file.tokenizer(gguf.GGUFReader(locate("smollm2")))
    assert tokenizer.size == 49152
    assert tokenizer.stop == [2, 0]
    text = tokenizer.chat("Hi")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(text)[0] == 1
    assert tokenizer.decode(tokenizer.encode("12345 and 北京")) == "12345 and 北京"
    assert len(tokenizer.encode("12345")) == 5  # each digit is a token


def test_no_chat_template():
    tokenizer = Tokenizer.from_bpe({"a": 0}, [], [], stop=[])
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat("Hi")


def test_unknown_package(monkeypatch):
    monkeypatch.setitem(KNOWN, "nothing", ("no_such_package", "x"))
    with pytest.raises(FileNotFoundError, match="'nothing' comes with the package no_such_package"):
        locate("nothing")
