"""Tokenisers, through the `tokenizers` package, from a Hugging Face directory, a GGUF file or a tiktoken file."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .splitting import make_byte_level_bpe

# Fields of tokenizer_config.json that are kept for other libraries, beside its tokens by name ("bos_token").
KEPT_FIELDS = (
    "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip


class Tokenizer:
    """Text to token numbers and back.

    `stop` are the tokens that end a text, `size` is one more than the largest token, `config` are the fields of a
    tokenizer_config.json: tokens by name ("bos_token") and `KEPT_FIELDS`. The backend's padding and truncation are
    disabled; `write` keeps them.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, stop: list[int], chat_template: str = "", config: dict | None = None
    ):
        self.backend, self.stop, self.chat_template, self.config = backend, stop, chat_template, config or {}
        self.padding, self.truncation = backend.padding, backend.truncation
        self.backend.no_padding()
        self.backend.no_truncation()
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: at the ends of the text, such as a bos token; chat templates have their own."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_truncated(self, text: str, longest: int) -> list[int]:
        """At most `longest` tokens: the end of the text is cut off, before its last special tokens."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        encoding.truncate(longest - self.backend.num_special_tokens_to_add(False))
        return self.backend.post_process(encoding).ids

    def decode(self, tokens: list[int]) -> str:
        return self.backend.decode(tokens)

    def find_id(self, token: str | None) -> int | None:
        """The number of a token; None if there is no such token."""
        return None if token is None else self.backend.token_to_id(token)

    def stream(self) -> Stream:
        """Decodes token by token."""
        return Stream(self)

    def chat(self, message: str) -> str:
        """A user message in the model's chat template, up to the beginning of the answer. Encode it with
        `add_special_tokens=False`.

        Raises:
            ValueError: if there is no template, or if it rejects this message.
        """
        if not self.chat_template:
            raise ValueError("the tokeniser has no chat template")
        from .chat import render

        tokens = {name: x for name, x in self.config.items() if name.endswith("_token") and isinstance(x, str)}
        return render(self.chat_template, [{"role": "user", "content": message}], tokens)

    def write(self, directory: Path) -> None:
        """The files that `from_directory` and `transformers` read."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.padding is not None:
            backend.enable_padding(**self.padding)
        if self.truncation is not None:
            backend.enable_truncation(**self.truncation)
        backend.save(str(directory / "tokenizer.json"))
        config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=None) | self.config
        if self.stop and config["eos_token"] is None:
            config["eos_token"] = self.backend.id_to_token(self.stop[0])
        generation = {f"{name}_token_id": self.find_id(config.get(f"{name}_token")) for name in ("bos", "pad")}
        generation |= dict(eos_token_id=self.stop)
        generation = {name: value for name, value in generation.items() if value not in (None, [])}
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        config["chat_template"] = self.chat_template or None
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer | None:
        """From tokenizer.json and the files beside it; None if there is none. As in transformers, the special tokens
        around a text are those of tokenizer.json, whatever add_bos_token says.

        Raises:
            ValueError: naming the file and what is wrong in it.
        """
        file = path / "tokenizer.json"
        if not file.exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file}: truncated or not a tokeniser: {error}") from None
        said = read_json(path, "tokenizer_config.json")
        config = read_json(path, "special_tokens_map.json") | {name: x for name, x in said.items() if x is not None}
        kept = {name: get_text(x) for name, x in config.items() if name in KEPT_FIELDS or name.endswith("_token")}
        kept = {name: x for name, x in kept.items() if name not in ("add_bos_token", "add_eos_token")}
        return cls(backend, read_stop_tokens(backend, config, path), read_chat_template(config, path), kept)

    @classmethod
    def from_bpe(
        cls, vocab: dict[str, int], merges: list[tuple[str, str]], special: list[str], stop: list[str]
    ) -> Tokenizer:
        """Byte-level BPE, as in GPT-2."""
        backend = make_byte_level_bpe(vocab, merges)
        backend.add_special_tokens(special)
        return cls(backend, [vocab[token] for token in stop if token in vocab])

    @classmethod
    def train(cls, text: str, size: int, special: tuple[str, ...] = (), stop: str | None = None) -> Tokenizer:
        """Train byte-level BPE on a text: `size` tokens, the special ones first."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
        )
        backend.train_from_iterator(text.split("\n"), trainer)
        return cls(backend, [] if stop is None else [backend.token_to_id(stop)])

    @classmethod
    def from_tiktoken(cls, path: Path, special: list[str]) -> Tokenizer:
        """From a .tiktoken file, a base64 token and its rank per line. Special tokens follow the ranks."""
        ranks = {}
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        to_text = make_byte_alphabet()
        vocab = {"".join(to_text[b] for b in token): rank for token, rank in ranks.items()}
        merges = [
            tuple("".join(to_text[b] for b in part) for part in find_last_merge(token, ranks))
            for token in sorted(ranks, key=ranks.__getitem__)
            if len(token) > 1
        ]
        vocab |= {token: len(ranks) + i for i, token in enumerate(special)}
        return cls.from_bpe(vocab, merges, special, stop=special[:1])


def read_json(path: Path, name: str) -> dict:
    """The JSON object in a file of a directory; empty if there is no such file."""
    try:
        return json.loads((path / name).read_text(encoding="utf-8")) if (path / name).exists() else {}
    except ValueError as error:
        raise ValueError(f"{path / name}: not valid JSON: {error}") from None


def get_text(token: object) -> object:
    """The text of a token, or of each in a list; it may be an object that also says how it is matched."""
    if isinstance(token, list):
        return [get_text(one) for one in token]
    return token["content"] if isinstance(token, dict) and "content" in token else token


def read_stop_tokens(backend: tokenizers.Tokenizer, config: dict, path: Path) -> list[int]:
    """The tokens that end a text, from the first file that has any."""
    for name in ("generation_config.json", "config.json"):
        stop = read_json(path, name).get("eos_token_id")
        stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if any(not isinstance(token, int) for token in stop):
            raise ValueError(f"{path / name}: eos_token_id must be numbers, got {stop}")
        if stop:
            return stop
    eos = get_text(config.get("eos_token"))
    number = None if eos is None else backend.token_to_id(eos)
    return [] if number is None else [number]


def read_chat_template(config: dict, path: Path) -> str:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template") or ""
    if isinstance(found, list):  # several by name
        found = {one["name"]: one["template"] for one in found}
    return found.get("default", "") if isinstance(found, dict) else found


def make_byte_alphabet() -> dict[int, str]:
    """The printable character of each byte in byte-level BPE (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def find_last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that merge to `token`: its bytes merged by rank, up to two parts."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 60))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


class Stream:
    """Decodes token by token. A character may take several tokens, so text is held back until it is complete; `end`
    returns the rest. Only the last tokens are decoded again: the text that a token adds depends on the tokens before
    it, back to the last complete character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.tokens = tokenizer, []
        self.start = self.shown = 0  # tokens: decoded from `start` on; the text before `shown` was returned

    def add(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self.tokens.append(token)
        text = self.decode_new()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        if text:
            self.start, self.shown = self.shown, len(self.tokens)
        return text

    def end(self) -> str:
        """The text of the last tokens, if it is an incomplete character."""
        text = self.decode_new()
        self.start = self.shown = len(self.tokens)
        return text

    def decode_new(self) -> str:
        """The text of the tokens after `shown`."""
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        return self.tokenizer.decode(self.tokens[self.start :])[len(before) :]
