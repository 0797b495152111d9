"""Speech to text with Whisper, by the greedy decoder of its authors.

Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), arXiv:2212.04356, section 4.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoder_decoder import EncoderDecoder, Memory
from ..io.tokenizer import Tokenizer
from .sound import HOP, RATE, compute_spectrogram

FRAMES = 2  # of a spectrogram, per step of a time token
MAX_INITIAL_TIME = 50  # steps: the first segment of a window begins within a second
MULTILINGUAL = 51_865  # tokens; an English-only Whisper has fewer


class Segment(NamedTuple):
    start: float  # seconds
    end: float
    text: str


class Transcript(NamedTuple):
    text: str
    language: str
    segments: list[Segment]


@torch.inference_mode()
def transcribe(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    samples: Tensor,
    on_segment: Callable[[Segment], None] | None = None,
    *,
    language: str | None = None,
    task: str = "transcribe",
    no_speech_threshold: float = 0.6,
    logprob_threshold: float | None = None,
    longest: int = 224,
) -> Transcript:
    """Transcribe samples (n,) at 16 kHz.

    The model reads windows of 30 seconds and predicts when each segment begins and ends. The next window begins at the
    end of the last complete segment, so that no word is cut.

    Args:
        on_segment: called with each segment as soon as it is final.
        language: a code, such as "en"; None: detected in the first window.
        task: "transcribe", or "translate" into English.
        no_speech_threshold: windows with a higher probability of no speech are skipped.
        logprob_threshold: unless the mean log-probability of their tokens is over this; None: skipped anyway. The
            authors' decoder has -1, which keeps the "you" that small models write for silence.
        longest: tokens of a window.

    Raises:
        ValueError: naming the argument, before the model runs.
    """
    config = model.config
    if config.mel_bins == 0:
        raise ValueError(f"model must have an audio encoder, got a {config.family}")
    if samples.dim() != 1 or len(samples) == 0:
        raise ValueError(f"samples must be (n,), at least one, got shape {tuple(samples.shape)}")
    vocabulary = Vocabulary.from_model(config.vocab_size, config.decoder_start_token, tokenizer)
    vocabulary.check(language, task)
    size, total = FRAMES * config.audio_context, -(-len(samples) // HOP)
    frames = compute_spectrogram(F.pad(samples, (0, size * HOP)), config.mel_bins).to(
        model.token_embedding.weight.dtype
    )
    segments: list[Segment] = []
    first = 0
    while first < total:
        memory = model.encode(frames[None, :, first : first + size])
        if language is None:
            language = detect_language(model, memory, vocabulary)
        written = decode_window(model, memory, vocabulary, vocabulary.prompt(language, task), longest)
        parts, done = split_segments(written.tokens, vocabulary.first_time, min(size, total - first))
        sure = logprob_threshold is not None and written.logprob > logprob_threshold
        if written.no_speech > no_speech_threshold and not sure:
            parts, done = [], min(size, total - first)
        for start, end, tokens in parts:
            segment = Segment((first + start) * HOP / RATE, (first + end) * HOP / RATE, tokenizer.decode(tokens))
            if segment.text.strip() and end > start:
                segments.append(segment)
                if on_segment is not None:
                    on_segment(segment)
        first += done
    return Transcript("".join(segment.text for segment in segments).strip(), language, segments)


@dataclass(frozen=True)
class Vocabulary:
    """The special tokens of a Whisper, and the tokens that are suppressed."""

    start: int
    end: int
    no_speech: int | None
    first_time: int  # 0.00 s; the next token is a step of time later
    languages: dict[str, int]  # by their codes; empty for an English-only model
    tasks: dict[str, int]
    suppressed: list[int]

    @classmethod
    def from_model(cls, size: int, start: int, tokenizer: Tokenizer) -> Vocabulary:
        def number(*names: str) -> int | None:
            return next((n for n in map(tokenizer.backend.token_to_id, names) if n is not None), None)

        end, no_times = number("<|endoftext|>"), number("<|notimestamps|>")
        tasks = {task: number(f"<|{task}|>") for task in ("transcribe", "translate")}
        if None in (end, no_times, *tasks.values()):
            raise ValueError("tokenizer must be that of a Whisper, with <|notimestamps|> and its other special tokens")
        numbers = range(start + 1, min(tasks.values())) if size >= MULTILINGUAL else ()
        languages = {tokenizer.backend.id_to_token(n)[2:-2]: n for n in numbers}
        suppressed = [*find_non_speech_tokens(tokenizer), *range(start, no_times + 1)]
        return cls(start, end, number("<|nospeech|>", "<|nocaptions|>"), no_times + 1, languages, tasks, suppressed)

    def check(self, language: str | None, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        if self.languages and language is not None and language not in self.languages:
            raise ValueError(f"language must be one of {', '.join(self.languages)}, got {language!r}")
        if not self.languages and (language not in (None, "en") or task != "transcribe"):
            raise ValueError(f"model is English-only and transcribes, got language {language!r} and task {task!r}")

    def prompt(self, language: str, task: str) -> list[int]:
        return [self.start, self.languages[language], self.tasks[task]] if self.languages else [self.start]

    def constrain(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities (vocab_size,) of the next token. Time tokens come in pairs, the end of a segment and the
        beginning of the next, and never decrease; the first token is a time, and the last time may be single. If all
        times together are more likely than any other token, the next token is a time."""
        times = logits.new_zeros(len(logits), dtype=torch.bool)
        times[self.first_time :] = True
        banned = torch.zeros_like(times)
        banned[self.suppressed] = True
        is_time = [token >= self.first_time for token in tokens]
        if not tokens:
            banned |= ~times
            banned[self.first_time + MAX_INITIAL_TIME + 1 :] = True
        elif is_time[-1] and all(is_time[-2:]):  # a segment has begun
            banned |= times
        elif is_time[-1]:  # one has ended
            banned[: self.end] = True
        if any(is_time):
            last = max(token for token in tokens if token >= self.first_time)
            ended = is_time[-1] and not all(is_time[-2:])
            banned[self.first_time : last + (not ended)] = True  # segments may touch; their length is over 0
        logs = logits.masked_fill(banned, -torch.inf).log_softmax(-1)
        if logs[times].logsumexp(-1) > logs[~times].max():
            logs = logs.masked_fill(~times, -torch.inf)
        return logs


def find_non_speech_tokens(tokenizer: Tokenizer) -> set[int]:
    """Tokens of annotations such as brackets and ♪, as in Whisper's `non_speech_tokens`."""
    runs = ["<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))", "(((", ")))", "[[", "]]"]
    symbols = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』', *runs, "{{", "}}", "♪♪", "♪♪♪"]
    notes = [*"♩♪♫♬♭♮♯"]

    def encode(text: str) -> list[int]:
        return tokenizer.backend.encode(text, add_special_tokens=False).ids

    found = {encode(text)[0] for text in (" -", " '") if encode(text)}  # allowed within a word
    for text in [f"{space}{symbol}" for symbol in symbols + notes for space in ("", " ")]:
        tokens = encode(text)
        if len(tokens) == 1 or (tokens and text.strip() in notes):
            found.add(tokens[0])
    return found


def detect_language(model: EncoderDecoder, memory: Memory, vocabulary: Vocabulary) -> str:
    if not vocabulary.languages:
        return "en"
    device = memory.hidden.device
    logits = model.compute_logits(model.decode(torch.tensor([[vocabulary.start]], device=device), memory)[0, 0])
    numbers = list(vocabulary.languages.values())
    return list(vocabulary.languages)[int(logits[numbers].argmax())]


class DecodedWindow(NamedTuple):
    tokens: list[int]  # text and times
    no_speech: float  # probability
    logprob: float  # mean over the tokens


def decode_window(
    model: EncoderDecoder, memory: Memory, vocabulary: Vocabulary, prompt: list[int], longest: int
) -> DecodedWindow:
    device = memory.hidden.device
    cache = model.new_cache(1, len(prompt) + longest)
    tokens: list[int] = []
    new, no_speech, logprob = prompt, 0.0, 0.0
    while len(tokens) < longest:
        logits = model.compute_logits(model.decode(torch.tensor([new], device=device), memory, cache=cache)[0]).float()
        if not tokens and vocabulary.no_speech is not None:
            no_speech = float(logits[0].softmax(-1)[vocabulary.no_speech])
        logs = vocabulary.constrain(logits[-1], tokens)
        token = int(logs.argmax())
        logprob += float(logs[token])
        if token == vocabulary.end:
            break
        tokens.append(token)
        new = [token]
    return DecodedWindow(tokens, no_speech, logprob / (len(tokens) + 1))


def split_segments(tokens: list[int], first_time: int, size: int) -> tuple[list[tuple[int, int, list[int]]], int]:
    """The segments of a window of `size` frames: the first and the last frame of each, and its text tokens; and the
    frame at which the next window begins. Text after the last pair of times is dropped: it was cut off, and the next
    window has all of it."""

    def frame(token: int) -> int:
        return FRAMES * (token - first_time)

    is_time = [token >= first_time for token in tokens]
    pairs = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
    ends_alone = is_time[-2:] == [False, True]  # and no text after it
    if not pairs:
        end = max((frame(token) for token in tokens if token > first_time), default=size)
        return [(0, end, [token for token in tokens if token < first_time])], size
    cuts = [0, *pairs] + ([len(tokens)] if ends_alone else [])
    pieces = [tokens[a:b] for a, b in pairwise(cuts)]
    parts = [(frame(p[0]), frame(p[-1]), [token for token in p if token < first_time]) for p in pieces]
    return parts, size if ends_alone else parts[-1][1]
