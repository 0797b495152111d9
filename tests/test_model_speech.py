"""Whisper: spectrograms, logits, gradients and transcripts as in `transformers`, on random and on real weights."""

import io
import shutil
import subprocess
import wave

import pytest
import torch
from packages import needs_whisper

import model
from model import ctranslate2_file, speech
from model.packages import locate

transformers = pytest.importorskip("transformers")


def written(path):
    theirs = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=101, num_mel_bins=10, d_model=48, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=72, decoder_ffn_dim=72, max_source_positions=20,
            max_target_positions=30, pad_token_id=0, decoder_start_token_id=1, eos_token_id=2, bos_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(path)
    return theirs, model.load(path)[0]


def test_logits_and_gradients_equal_transformers(tmp_path):
    theirs, ours = written(tmp_path)
    sound, targets = torch.randn(2, 10, 40), torch.randint(1, 101, (2, 9))
    found, expected = ours(sound, targets), theirs(input_features=sound, decoder_input_ids=targets).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    expected.square().mean().backward()
    pairs = {
        "embedding": (ours.token_embedding.weight, theirs.get_input_embeddings().weight),
        "first convolution": (ours.audio.conv1.weight, theirs.model.encoder.conv1.weight),
    }
    for ours_, theirs_ in pairs.values():
        torch.testing.assert_close(ours_.grad, theirs_.grad, rtol=1e-3, atol=1e-4 * theirs_.grad.abs().max())


def test_a_cache_changes_nothing(tmp_path):
    _, ours = written(tmp_path)
    sound, targets = torch.randn(2, 10, 40), torch.randint(1, 101, (2, 20))
    with torch.no_grad():
        memory, cache = ours.encode(sound), ours.new_cache(2, 20)
        parts = [
            ours.logits(ours.decode(t, memory, cache=cache)) for t in (targets[:, :7], *targets[:, 7:].split(1, 1))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), ours(sound, targets), rtol=1e-4, atol=1e-4)


def test_what_was_saved_is_what_was_there(tmp_path):
    theirs, ours = written(tmp_path / "a")
    model.save(ours, tmp_path / "b")
    assert model.load(tmp_path / "b")[0].config == ours.config
    again = type(theirs).from_pretrained(tmp_path / "b").eval()
    sound, targets = torch.randn(1, 10, 40), torch.randint(1, 101, (1, 9))
    with torch.no_grad():
        a, b = (x(input_features=sound, decoder_input_ids=targets).logits for x in (again, theirs))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mels", [80, 128])
def test_spectrograms_equal_transformers(mels):
    samples = torch.randn(16_000 * 2) * 0.1 + torch.sin(torch.arange(32_000) * 0.2)
    extract = transformers.WhisperFeatureExtractor(feature_size=mels)
    expected = extract(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
    padded = torch.nn.functional.pad(samples, (0, 480_000 - len(samples)))
    torch.testing.assert_close(speech.spectrogram(padded, mels), expected, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named(tmp_path):
    _, ours = written(tmp_path)
    with pytest.raises(ValueError, match=r"samples must be \(n,\), at least one, got shape \(1, 5\)"):
        speech.transcribe(ours, None, torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"spectrogram must be \(batch, mels, at most 40 frames\)"):
        ours.encode(torch.zeros(1, 10, 42))


def say(text, file):
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(file), text], check=True)
    return file


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (16_000, 2), (44_100, 1), (8_000, 2)])
def test_wave_files(rate, channels, tmp_path):
    """A tone keeps its frequency at every rate; two channels become their mean."""
    t = torch.arange(rate) / rate
    tone = (0.5 * torch.sin(2 * torch.pi * 440 * t) * 32767).short()
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(torch.stack([tone, tone // 2][:channels], 1).numpy().tobytes())
    samples = speech.read_wave(tmp_path / "x.wav")
    assert len(samples) == 16_000
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000) * (1 if channels == 1 else 0.75)
    torch.testing.assert_close(samples[100:-100], expected[100:-100], rtol=0, atol=0.05)


def test_what_is_no_wave_file(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"x\.wav: truncated or not a WAV file"):
        speech.read_wave(tmp_path / "x.wav")
    with wave.open(str(tmp_path / "y.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(100))
    with pytest.raises(ValueError, match=r"y\.wav: samples must have 16 bits, got 8"):
        speech.read_wave(tmp_path / "y.wav")


@needs_whisper
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs Debian's espeak-ng")
def test_it_hears_what_was_said(tmp_path):
    """A synthetic voice, which tiny.en mishears here and there: seven words of ten at least are right."""
    ours, tokenizer = model.load("whisper")
    text = "The meeting begins on Tuesday at ten o'clock, and everybody should bring a pencil."
    tokens = []
    found = speech.transcribe(ours, tokenizer, speech.read_wave(say(text, tmp_path / "x.wav")), on_token=tokens.append)
    assert tokenizer.decode(tokens).strip() == found
    wanted = text.lower().replace(",", "").replace(".", "").replace(" ten ", " 10 ").split()
    heard = set(found.lower().replace(",", "").replace(".", "").split())
    assert sum(word in heard for word in wanted) >= 0.7 * len(wanted), found


@needs_whisper
def test_real_weights_equal_transformers(tmp_path):
    """The file's weights written as a Hugging Face directory: transformers has the same logits on some tones."""
    ours, _ = model.load("whisper")
    model.save(ours, tmp_path / "x")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "x").eval()
    t = torch.arange(480_000) / 16_000
    samples = 0.3 * torch.sin(2 * torch.pi * (200 + 50 * t) * t) * (torch.sin(5 * t) > 0)
    sound, targets = speech.spectrogram(samples, 80)[None], torch.tensor([[50257, 50362, 383, 1049]])
    with torch.no_grad():
        expected = theirs(input_features=sound, decoder_input_ids=targets).logits
        torch.testing.assert_close(ours(sound, targets), expected, rtol=1e-3, atol=1e-3)


@needs_whisper
def test_a_file_that_is_cut_off(tmp_path):
    source = locate("whisper")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with (source / "model.bin").open("rb") as file:
        data = file.read(1_000_000)
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(model.checkpoints.CheckpointError, match=r"model\.bin: truncated"):
        model.load(tmp_path)
    with pytest.raises(ValueError, match="version must be 6 and the model a WhisperSpec, got 1"):
        ctranslate2_file.read_arrays(io.BytesIO(b"\1\0\0\0" + bytes(100)))
