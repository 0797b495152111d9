"""Tokenisers, through the `tokenizers` package, from a Hugging Face directory, a GGUF file or a tiktoken file."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers


class Tokenizer:
    """Text to token numbers and back.

    `stop` holds the tokens that end a text, `size` one more than the largest token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, stop: list[int], chat_template: str = ""):
        self.backend, self.stop, self.chat_template = backend, stop, chat_template
        self.backend.no_padding()
        self.backend.no_truncation()
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self.backend.decode(tokens)

    def stream(self) -> Stream:
        """Decodes token by token."""
        return Stream(self)

    def chat(self, message: str) -> str:
        """One user message in the model's chat template, up to where the answer begins."""
        if not self.chat_template:
            raise ValueError("the tokeniser has no chat template")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment().from_string(self.chat_template)
        return template.render(messages=[{"role": "user", "content": message}], add_generation_prompt=True)

    def write(self, directory: Path) -> None:
        """The files that `from_directory` and `transformers` read."""
        self.backend.save(str(directory / "tokenizer.json"))
        config = dict(
            tokenizer_class="PreTrainedTokenizerFast", eos_token=None, chat_template=self.chat_template or None
        )
        if self.stop:
            config["eos_token"] = self.backend.id_to_token(self.stop[0])
            generation = json.dumps(dict(eos_token_id=self.stop), indent=2)
            (directory / "generation_config.json").write_text(generation, encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer | None:
        """From tokenizer.json; None where there is none."""
        file = path / "tokenizer.json"
        if not file.exists():
            return None

        def read(name: str) -> dict:
            return json.loads((path / name).read_text(encoding="utf-8")) if (path / name).exists() else {}

        config = read("tokenizer_config.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises no narrower type
            raise ValueError(f"{file}: truncated or not a tokeniser: {error}") from None
        eos = config.get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        stop = read("generation_config.json").get("eos_token_id", [] if eos is None else backend.token_to_id(eos))
        stop = stop if isinstance(stop, list) else [stop]
        return cls(backend, stop, config.get("chat_template") or "")

    @classmethod
    def from_bpe(
        cls,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special: list[str],
        stop: list[str],
        digits: bool = False,
        chat_template: str = "",
    ) -> Tokenizer:
        """Byte-level BPE as GPT-2 has it; with `digits`, each digit is a token of its own."""
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if digits:
            split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
        backend.pre_tokenizer = split
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(special)
        return cls(backend, [vocab[token] for token in stop if token in vocab], chat_template)

    @classmethod
    def train(cls, text: str, size: int, special: tuple[str, ...] = (), stop: str | None = None) -> Tokenizer:
        """Byte-level BPE of a text's own, `size` tokens with the special ones in front."""
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
        """From a .tiktoken file: a base64 token and its rank a line. Special tokens follow the ranks."""
        ranks = {}
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        to_text = byte_alphabet()
        vocab = {"".join(to_text[b] for b in token): rank for token, rank in ranks.items()}
        merges = [
            tuple("".join(to_text[b] for b in part) for part in last_merge(token, ranks))
            for token in sorted(ranks, key=ranks.__getitem__)
            if len(token) > 1
        ]
        vocab |= {token: len(ranks) + i for i, token in enumerate(special)}
        return cls.from_bpe(vocab, merges, special, stop=special[:1])


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes `token`: what merging its bytes by rank, but for `token` itself, leaves."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 60))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


class Stream:
    """Text as it grows token by token. A character may take several tokens, so text is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.tokens, self.shown = tokenizer, [], ""

    def add(self, token: int) -> str:
        """The text this token completes, perhaps none."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new
