"""Recordings: WAV files, resampled to 16 kHz, and their spectrograms."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

RATE, WINDOW, HOP = 16_000, 400, 160  # samples: in a second, in a frame, from one frame to the next


def read_wave(file: str | Path | BinaryIO) -> Tensor:
    """Samples (n,) at 16 kHz, in [-1, 1], of a 16-bit WAV file; channels are averaged.

    Raises:
        ValueError: for a file of another format.
    """
    try:
        with wave.open(file if hasattr(file, "read") else str(file), "rb") as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{file}: truncated or not a WAV file: {error}") from None
    if width != 2:
        raise ValueError(f"{file}: samples must have 16 bits, got {8 * width}")
    if not 1 <= rate <= 1_000_000:
        raise ValueError(f"{file}: the rate must be 1 to 1,000,000 Hz, got {rate}")
    data = data[: len(data) // (2 * channels) * 2 * channels]
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).view(-1, channels).float().mean(1) / 32768
    return resample(samples, rate)


def resample(samples: Tensor, rate: int) -> Tensor:
    """Samples (n,) from `rate` to RATE, with the frequencies up to half of the smaller rate; higher ones are removed,
    as they would alias."""
    if rate == RATE or len(samples) == 0:
        return samples
    seconds = len(samples) // rate + 2  # padded with silence: the transform is periodic
    spectrum = torch.fft.rfft(F.pad(samples, (0, seconds * rate - len(samples))))
    kept = seconds * min(rate, RATE) // 2  # frequencies, without half the rate itself
    spectrum = F.pad(spectrum[:kept], (0, seconds * RATE // 2 + 1 - kept))
    return torch.fft.irfft(spectrum, n=seconds * RATE)[: round(len(samples) * RATE / rate)] * (RATE / rate)


def make_mel_filters(count: int) -> Tensor:
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


def compute_spectrogram(samples: Tensor, mel_bins: int) -> Tensor:
    """(mel_bins, frames) of samples (n,) at 16 kHz, in [-1, 1]: the logarithm of the energy in each band, at most 8
    decades below the loudest, scaled to about [-1, 1]."""
    window = torch.hann_window(WINDOW)
    power = torch.stft(samples, WINDOW, HOP, window=window, return_complex=True)[..., :-1].abs().square()
    bands = (make_mel_filters(mel_bins) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(bands, bands.max() - 8) + 4) / 4
