"""Tokenisers against those of others, on real vocabularies."""

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, processors

from model.io import gguf_file, gguf_tokenizer
from model.io.packages import KNOWN, locate
from model.io.tokenizer import Tokenizer, make_byte_alphabet
from tests.packages import needs_gpt2_vocabulary, needs_smollm2


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


def make_word_pieces():
    """As BERT's: words apart, the rest of a word after ##."""
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3, ".": 4, "[SEP]": 5}))
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return Tokenizer(backend, [])


def make_sentence_pieces():
    """As Llama 2's: spaces that show, and bytes for what has no token."""
    pieces = ["▁", "▁a", "b", "▁the", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, [])


def make_byte_pieces():
    return Tokenizer.train("two  words, naïve 北京 🙂", 300, special=("<|end|>",))


def test_a_stream_of_bytes_without_tokens():
    tokenizer = make_sentence_pieces()
    for text in (" a b", "the naïve 北京 🙂🙂 b", "  the", "x" * 50 + "é"):
        tokens, stream = tokenizer.encode(text.replace(" ", "▁")), tokenizer.stream()
        pieces = [stream.add(token) for token in tokens]
        assert "".join(pieces) + stream.end() == tokenizer.decode(tokens) == text[text.startswith(" ") :]
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@pytest.mark.parametrize("make", [make_word_pieces, make_byte_pieces])
def test_a_stream_gives_the_text_of_any_tokens(make):
    """Of pieces that make no whole character too; the end gives what was held back."""
    tokenizer, rng = make(), random.Random(0)
    for length in (0, 1, 2, 3, 7, 40, 200):
        tokens = [rng.randrange(tokenizer.size) for _ in range(length)]
        stream = tokenizer.stream()
        pieces = [stream.add(token) for token in tokens]
        assert "".join(pieces) + stream.end() == tokenizer.decode(tokens)
        assert stream.end() == ""


def test_the_tail_of_a_stream_is_shown():
    tokenizer = make_byte_pieces()
    tokens = tokenizer.encode("🦉")
    stream = tokenizer.stream()
    assert [stream.add(token) for token in tokens[:-1]] == [""] * (len(tokens) - 1)
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_a_stream_decodes_each_token_a_few_times(monkeypatch):
    tokenizer, decoded = make_byte_pieces(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    stream, tokens = tokenizer.stream(), tokenizer.encode("two words, naïve 🙂 " * 40)
    for token in tokens:
        stream.add(token)
    assert sum(decoded) < 12 * len(tokens)


def write_tokenizer(path, files, backend=None):
    """A directory with a tokeniser of bytes, and JSON files beside it."""
    backend = backend or make_byte_pieces().backend
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.save(str(path / "tokenizer.json"))
    for name, contents in files.items():
        (path / name).write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return Tokenizer.from_directory(path)


NAMES = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
TEMPLATES = {
    "names of tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "lines": "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content }}]\n  {% endif %}\n{% endfor %}\n",
    "a date": "{% set day = strftime_now('%d %b %Y') %}Today: {{ day }}\n",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "break": "{% for m in messages %}{% if loop.first %}{{ m.content }}{% break %}{% endif %}{% endfor %}",
    "marks": "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}{% endfor %}",
    "nothing is given": "{% if tools is none and not documents %}{{ messages[0].content }}{% endif %}",
    "the answer": "{{ messages[0].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "a space": "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = m.content %}{% endfor %}{{ ns.x }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_equal_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = write_tokenizer(tmp_path, {"tokenizer_config.json": NAMES | dict(chat_template=TEMPLATES[name])})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [dict(role="user", content="A <b> & naïve?")]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat(messages[0]["content"]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "the chat template does not take this: roles must alternate"),
        ("{% for m in messages %}", "the chat template does not take this: Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "the chat template does not take this: access to attribute"),
    ],
)
def test_a_chat_template_that_refuses(template, message, tmp_path):
    tokenizer = write_tokenizer(tmp_path, {"tokenizer_config.json": NAMES | dict(chat_template=template)})
    with pytest.raises(ValueError, match=message):
        tokenizer.chat("Hi")


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "one {{ messages[0].content }}"},
        {"chat_template.jinja": "one {{ messages[0].content }}", "tokenizer_config.json": dict(chat_template="two")},
        {"tokenizer_config.json": dict(chat_template=[
            dict(name="tool_use", template="two"), dict(name="default", template="one {{ messages[0].content }}"),
        ])},
    ],
)  # fmt: skip
def test_where_a_chat_template_stands(files, tmp_path):
    assert write_tokenizer(tmp_path, files).chat("Hi") == "one Hi"


@pytest.mark.parametrize(
    ("files", "stop"),
    [
        ({"tokenizer_config.json": NAMES}, ["</s>"]),
        ({"tokenizer_config.json": NAMES, "config.json": dict(eos_token_id=5)}, [5]),
        ({"tokenizer_config.json": NAMES, "config.json": dict(eos_token_id=[5, 6])}, [5, 6]),
        ({"generation_config.json": dict(eos_token_id=[7]), "config.json": dict(eos_token_id=5)}, [7]),
        ({"generation_config.json": dict(eos_token_id=None), "config.json": dict(eos_token_id=5)}, [5]),
        ({"generation_config.json": dict(), "tokenizer_config.json": NAMES}, ["</s>"]),
        ({"generation_config.json": dict(eos_token_id=None), "config.json": dict(eos_token_id=None)}, []),
        ({"special_tokens_map.json": dict(eos_token=dict(content="</s>", lstrip=False))}, ["</s>"]),
        ({"tokenizer_config.json": dict(eos_token="none of them")}, []),
    ],
)
def test_where_a_text_ends(files, stop, tmp_path):
    tokenizer = write_tokenizer(tmp_path, files)
    assert tokenizer.stop == [tokenizer.backend.token_to_id(x) if isinstance(x, str) else x for x in stop]


def test_an_end_that_is_no_number(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: eos_token_id must be numbers, got \['</s>'\]"):
        write_tokenizer(tmp_path, {"config.json": dict(eos_token_id="</s>")})


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_tokens_around_a_text_equal_transformers(bos, eos, tmp_path):
    """What tokenizer.json says holds, whatever tokenizer_config.json says of it."""
    transformers = pytest.importorskip("transformers")
    backend = make_byte_pieces().backend
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    said = {name: x for name, x in dict(add_bos_token=bos, add_eos_token=eos).items() if x is not None}
    tokenizer = write_tokenizer(tmp_path, {"tokenizer_config.json": NAMES | said}, backend)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("two") == theirs("two")["input_ids"]
    plain = tokenizer.encode("two", add_special_tokens=False)
    assert plain == theirs("two", add_special_tokens=False)["input_ids"]
    (tmp_path / "again").mkdir()
    tokenizer.write(tmp_path / "again")
    assert Tokenizer.from_directory(tmp_path / "again").encode("two") == tokenizer.encode("two")


def test_what_is_written_is_what_was_read(tmp_path):
    """Tokens by name, lengths, sides, padding and truncation, for transformers and for ourselves."""
    transformers = pytest.importorskip("transformers")
    config = NAMES | dict(
        model_max_length=77, padding_side="left", model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=["<|end|>"], chat_template="{{ bos_token }}",
    )  # fmt: skip
    backend = make_byte_pieces().backend
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.enable_truncation(max_length=9)
    backend.enable_padding(pad_id=backend.token_to_id("<pad>"), pad_token="<pad>", direction="left")
    tokenizer = write_tokenizer(tmp_path, {"tokenizer_config.json": config}, backend)
    assert len(tokenizer.encode("two words " * 9)) > 9  # we do not cut
    (tmp_path / "again").mkdir()
    tokenizer.write(tmp_path / "again")
    first, second = (transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path, tmp_path / "again"))
    assert second.special_tokens_map == first.special_tokens_map
    assert second.model_max_length == first.model_max_length == 77
    assert second.padding_side == first.padding_side == "left"
    assert second.chat_template == first.chat_template
    texts = ["two", "two words, naïve"]
    assert dict(second(texts, padding=True)) == dict(first(texts, padding=True))
    assert second.backend_tokenizer.truncation == first.backend_tokenizer.truncation
    again = Tokenizer.from_directory(tmp_path / "again")
    assert (again.config, again.stop, again.chat_template) == (
        tokenizer.config,
        tokenizer.stop,
        tokenizer.chat_template,
    )
    assert (again.padding, again.truncation) == (tokenizer.padding, tokenizer.truncation)


def test_files_that_are_cut_off(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not valid JSON"):
        write_tokenizer(tmp_path, {"tokenizer_config.json": '{"bos'})


def test_byte_alphabet():
    alphabet = make_byte_alphabet()
    assert len(set(alphabet.values())) == 256
    assert alphabet[ord(" ")] == "Ġ"


@needs_smollm2
def test_smollm2():
    import gguf

    reader = gguf.GGUFReader(locate("smollm2"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = gguf_tokenizer.read_tokenizer(gguf_file.select(fields, "tokenizer."))
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
