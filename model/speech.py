"""Speech to text: spectrograms, and what a Whisper writes of them."""

from __future__ import annotations

import math
import wave
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

from .encoder_decoder import EncoderDecoder
from .tokenizer import Tokenizer

RATE, WINDOW, HOP = 16_000, 400, 160  # samples: in a second, in a frame, from one frame to the next


def read_wave(file: str | Path | BinaryIO) -> Tensor:
    """Samples (n,) at 16 kHz in [-1, 1], of a WAV file of 16-bit numbers; several channels are averaged.

    Raises:
        ValueError: for another kind of file.
    """
    try:
        with wave.open(file if hasattr(file, "read") else str(file), "rb") as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{file}: truncated or not a WAV file: {error}") from None
    if width != 2:
        raise ValueError(f"{file}: samples must have 16 bits, got {8 * width}")
    data = data[: len(data) // (2 * channels) * 2 * channels]
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).view(-1, channels).float().mean(1) / 32768
    size = round(len(samples) * RATE / rate)
    return F.interpolate(samples[None, None], size=size, mode="linear")[0, 0] if rate != RATE else samples


def mel_filters(count: int) -> Tensor:
    """(count, WINDOW / 2 + 1): triangles whose corners are evenly spaced on Slaney's mel scale, linear up to 1,000 Hz
    and logarithmic above, each of area 1. Slaney, "Auditory Toolbox" (1998)."""

    def mel(hertz: Tensor) -> Tensor:
        return torch.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * (hertz / 1000).log() / math.log(6.4))

    def hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))

    top = mel(torch.tensor(RATE / 2, dtype=torch.float64))
    corners = hertz(torch.linspace(0, float(top), count + 2, dtype=torch.float64))
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, middle, high = (corners[i : i + count, None] for i in range(3))
    triangles = torch.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def spectrogram(samples: Tensor, mels: int) -> Tensor:
    """(mels, frames) of samples (n,) at 16 kHz, in [-1, 1]: the logarithm of the energy in each band, at most 8 decades
    below the loudest, scaled to about [-1, 1]."""
    window = torch.hann_window(WINDOW)
    power = torch.stft(samples, WINDOW, HOP, window=window, return_complex=True)[..., :-1].abs().square()
    bands = (mel_filters(mels) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(bands, bands.max() - 8) + 4) / 4


@torch.inference_mode()
def transcribe(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    samples: Tensor,
    on_token: Callable[[int], None] | None = None,
    longest: int = 224,
) -> str:
    """What is said in samples (n,) at 16 kHz, 30 seconds at a time; greedy.

    on_token: called with each token as soon as it is chosen. longest: tokens in 30 seconds.

    Raises:
        ValueError: for a model that does not hear, or samples of another shape.
    """
    if model.config.mels == 0:
        raise ValueError(f"model must be one that hears, got a {model.config.family}")
    if samples.dim() != 1 or len(samples) == 0:
        raise ValueError(f"samples must be (n,), at least one, got shape {tuple(samples.shape)}")
    size = 2 * model.config.audio_context * HOP
    pieces = [transcribe_piece(model, tokenizer, piece, size, on_token, longest) for piece in samples.split(size)]
    return " ".join(filter(None, pieces))


def transcribe_piece(model, tokenizer, samples, size, on_token, longest) -> str:
    samples = F.pad(samples, (0, size - len(samples)))
    memory = model.encode(spectrogram(samples, model.config.mels)[None])
    cache = model.new_cache(1, longest + 2)
    special = {tokenizer.backend.token_to_id(name) for name in ("<|endoftext|>", "<|nospeech|>", "<|nocaptions|>")}
    new = [model.config.start_token, tokenizer.backend.token_to_id("<|notimestamps|>")]
    tokens: list[int] = []
    while len(tokens) < longest:
        hidden = model.decode(torch.tensor([new]), memory, cache=cache)[0, -1]
        logits = model.logits(hidden).float()
        logits[model.config.start_token :] = -torch.inf  # what steers, and times
        token = int(logits.argmax())
        if token in special:
            break
        tokens.append(token)
        new = [token]
        if on_token is not None:
            on_token(token)
    return tokenizer.decode(tokens).strip()
