"""Whisper: spectrograms, logits, gradients and transcripts as in `transformers`, on random and on real weights."""

import io
import json
import math
import shutil
import subprocess
import wave
from types import SimpleNamespace

import pytest
import tokenizers
import torch

import model
from model.encoder_decoder import Memory
from model.inference import sound, speech
from model.io import ctranslate2_file
from model.io.checkpoints import CheckpointError
from model.io.packages import locate
from model.io.tokenizer import Tokenizer
from tests.packages import needs_whisper

transformers = pytest.importorskip("transformers")


def write_checkpoint(path):
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
    theirs, ours = write_checkpoint(tmp_path)
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
    _, ours = write_checkpoint(tmp_path)
    sound, targets = torch.randn(2, 10, 40), torch.randint(1, 101, (2, 20))
    with torch.no_grad():
        memory, cache = ours.encode(sound), ours.new_cache(2, 20)
        parts = [
            ours.compute_logits(ours.decode(t, memory, cache=cache))
            for t in (targets[:, :7], *targets[:, 7:].split(1, 1))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), ours(sound, targets), rtol=1e-4, atol=1e-4)


def test_what_was_saved_is_what_was_there(tmp_path):
    theirs, ours = write_checkpoint(tmp_path / "a")
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
    torch.testing.assert_close(sound.compute_spectrogram(padded, mels), expected, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named(tmp_path):
    _, ours = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"samples must be \(n,\), at least one, got shape \(1, 5\)"):
        speech.transcribe(ours, None, torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"spectrogram must be \(batch, mel_bins, at most 40 frames\)"):
        ours.encode(torch.zeros(1, 10, 42))
    with pytest.raises(ValueError, match="tokenizer must be that of a Whisper"):
        speech.transcribe(ours, Tokenizer.train("a", 260), torch.zeros(500))


WORDS = [" you", " say", " it", "?"]


class Writes:
    """A Whisper that writes given tokens, a list for each window, and keeps what it is given to read."""

    def __init__(self, *windows, multilingual=False, no_speech=0.01, language="en"):
        names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
        names += ["<|nospeech|>", "<|notimestamps|>"]
        self.number = {word: i for i, word in enumerate([*WORDS, *names])}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(self.number, unk_token=WORDS[-1]))
        backend.decoder = tokenizers.decoders.Fuse()
        backend.add_special_tokens(names)
        self.tokenizer, self.size = Tokenizer(backend, []), 51_865 if multilingual else 51_864
        self.config = SimpleNamespace(
            mel_bins=10,
            audio_context=1500,
            vocab_size=self.size,
            decoder_start_token=self.number["<|startoftranscript|>"],
        )
        self.windows, self.no_speech, self.language = list(windows), no_speech, f"<|{language}|>"
        self.token_embedding = torch.nn.Embedding(1, 1)
        self.read, self.prompts, self.left = [], [], []

    def tokens(self, *window):
        """A number is a time in seconds."""
        end = self.number["<|notimestamps|>"] + 1
        return [self.number[x] if isinstance(x, str) else end + round(x / 0.02) for x in window]

    def encode(self, spectrogram):
        self.read.append(spectrogram[0])
        self.left = self.tokens(*self.windows[len(self.read) - 1], "<|endoftext|>")
        return Memory(torch.zeros(1, 1, 1), None)

    def new_cache(self, batch, capacity):
        self.prompts.append(None)
        return self

    def decode(self, tokens, memory, cache=None):
        """Its hidden states are the logits."""
        logits = torch.full((1, tokens.shape[1], self.size), -30.0)
        if cache is None:
            logits[0, 0, self.number[self.language]] = 0
            return logits
        if self.prompts[-1] is None:
            self.prompts[-1] = tokens[0].tolist()
            logits[0, 0, self.number["<|nospeech|>"]] = math.log(self.no_speech / (1 - self.no_speech))
            logits[0, 0, 0] = 0
        logits[0, -1, self.left.pop(0)] = 0
        return logits

    def compute_logits(self, hidden):
        return hidden

    def transcribe(self, seconds, **options):
        torch.manual_seed(0)
        self.samples = torch.randn(int(seconds * 16_000)) * 0.1
        return speech.transcribe(self, self.tokenizer, self.samples, **options)


def test_a_window_begins_where_the_last_segment_ended():
    """Of a word at the cut no half is written: the next window has the whole of it."""
    writes = Writes([0.0, " you", 12.5, 12.5, " say"], [0.5, " say", 20.0, 20.5, " it", 30.0])
    seen = []
    found = writes.transcribe(42.5, on_segment=seen.append)
    assert found.segments == seen == [(0.0, 12.5, " you"), (13.0, 32.5, " say"), (33.0, 42.5, " it")]
    assert found.text == "you say it"
    spectrum = sound.compute_spectrogram(torch.nn.functional.pad(writes.samples, (0, 480_000)), 10)
    assert torch.equal(torch.stack(writes.read), torch.stack([spectrum[:, :3000], spectrum[:, 1250:4250]]))


def test_nothing_is_written_where_nobody_speaks():
    windows = [0.0, " you", 2.0], [0.0, " say", 3.0]
    assert Writes(*windows, no_speech=0.95).transcribe(40) == ("", "en", [])
    assert Writes(*windows, no_speech=0.55).transcribe(40).text == "you say"
    assert Writes(*windows, no_speech=0.95).transcribe(40, no_speech_threshold=0.96).text == "you say"
    assert Writes(*windows, no_speech=0.95).transcribe(40, logprob_threshold=-1.0).text == "you say"


def test_languages_and_tasks():
    """English-only models have neither; another is told both, and the language is what it takes the sound for."""
    window = [0.0, " you", 2.0]
    names = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>"]
    for options, changes in (
        ({}, {}),
        (dict(language="en"), {1: "<|en|>"}),
        (dict(task="translate"), {2: "<|translate|>"}),
    ):
        writes = Writes(window, multilingual=True, language="de")
        found = writes.transcribe(3, **options)
        assert writes.prompts == [writes.tokens(*(changes.get(i, name) for i, name in enumerate(names)))]
        assert found.language == options.get("language", "de")
    english = Writes(window)
    assert english.transcribe(3).language == "en"
    assert english.prompts == [english.tokens("<|startoftranscript|>")]


@pytest.mark.parametrize(
    ("multilingual", "options", "message"),
    [
        (True, dict(language="german"), "language must be one of en, de, got 'german'"),
        (True, dict(task="sing"), "task must be one of transcribe, translate, got 'sing'"),
        (False, dict(language="de"), "model is English-only and transcribes, got language 'de'"),
        (False, dict(task="translate"), "model is English-only .* task 'translate'"),
    ],
)
def test_what_a_model_cannot_is_named(multilingual, options, message):
    with pytest.raises(ValueError, match=message):
        Writes(multilingual=multilingual).transcribe(3, **options)


@pytest.mark.parametrize(
    ("tokens", "parts", "done"),
    [
        ([100, 1, 150], [(0, 100, [1])], 3000),
        ([110, 1, 2], [(0, 20, [1, 2])], 3000),  # as the authors' decoder has it
        ([100], [(0, 3000, [])], 3000),
        ([100, 1, 120, 130, 2, 150], [(0, 40, [1]), (60, 100, [2])], 3000),
        ([100, 1, 120, 130, 2, 150, 150], [(0, 40, [1]), (60, 100, [2])], 100),
        ([100, 1, 120, 130, 2, 3], [(0, 40, [1])], 40),
    ],
)
def test_segments(tokens, parts, done):
    assert speech.split_segments(tokens, 100, 3000) == (parts, done)


def test_what_may_follow_is_as_in_transformers():
    """Random logits after every kind of beginning."""
    config = transformers.GenerationConfig(
        no_timestamps_token_id=99, eos_token_id=50, bos_token_id=51, max_initial_timestamp_index=50
    )
    theirs = transformers.WhisperTimeStampLogitsProcessor(config, begin_index=1)
    vocabulary = speech.Vocabulary(51, 50, None, 100, {}, {}, [99])
    for written in ([], [100], [105, 3], [105, 3, 4, 5], [105, 3, 110], [105, 3, 110, 110], [105, 3, 110, 112, 7]):
        for spread in (0.1, 3.0, 10.0):
            logits = torch.randn(200) * spread
            expected = theirs(torch.tensor([[51, *written]]), logits[None].clone())[0].log_softmax(-1)
            torch.testing.assert_close(vocabulary.constrain(logits, written).log_softmax(-1), expected)


def say(text, file):
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(file), text], check=True)
    return file


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (16_000, 2), (44_100, 1), (8_000, 2), (11_025, 1)])
def test_wave_files(rate, channels, tmp_path):
    """A tone keeps its frequency at every rate; two channels become their mean."""
    t = torch.arange(rate) / rate
    tone = (0.5 * torch.sin(2 * torch.pi * 440 * t) * 32767).short()
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(torch.stack([tone, tone // 2][:channels], 1).numpy().tobytes())
    samples = sound.read_wave(tmp_path / "x.wav")
    assert len(samples) == 16_000
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000) * (1 if channels == 1 else 0.75)
    torch.testing.assert_close(samples[1000:-1000], expected[1000:-1000], rtol=0, atol=1e-3)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_no_frequency_becomes_another(rate):
    """Of tones up to 8 kHz, what the rates below can hold stays as it is; of those above nothing is left."""
    t, new = torch.arange(2 * rate, dtype=torch.float64) / rate, torch.arange(32_000, dtype=torch.float64) / 16_000
    for hertz in (100, 3_000, 3_900, 7_800, 8_200, 12_000, 20_000, 23_000):
        if hertz >= rate / 2:
            continue
        found = sound.resample(torch.sin(2 * torch.pi * hertz * t).float(), rate)
        expected = torch.sin(2 * torch.pi * hertz * new).float() * (hertz < 8_000)
        assert (found - expected)[2000:-2000].abs().max() < 1e-2, hertz


def test_nothing_to_resample():
    assert sound.resample(torch.zeros(0), 44_100).shape == (0,)
    assert sound.resample(torch.ones(3), 44_100).shape == (1,)


def test_what_is_no_wave_file(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"x\.wav: truncated or not a WAV file"):
        sound.read_wave(tmp_path / "x.wav")
    with wave.open(str(tmp_path / "y.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(100))
    with pytest.raises(ValueError, match=r"y\.wav: samples must have 16 bits, got 8"):
        sound.read_wave(tmp_path / "y.wav")


@needs_whisper
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs Debian's espeak-ng")
def test_it_hears_what_was_said(tmp_path):
    """A synthetic voice, which tiny.en mishears here and there: seven words of ten at least are right."""
    ours, tokenizer = model.load("whisper")
    text = "The meeting begins on Tuesday at ten o'clock, and everybody should bring a pencil."
    segments = []
    found = speech.transcribe(ours, tokenizer, sound.read_wave(say(text, tmp_path / "x.wav")), segments.append).text
    assert "".join(segment.text for segment in segments).strip() == found
    wanted = text.lower().replace(",", "").replace(".", "").replace(" ten ", " 10 ").split()
    heard = set(found.lower().replace(",", "").replace(".", "").split())
    assert sum(word in heard for word in wanted) >= 0.7 * len(wanted), found


@needs_whisper
def test_notes_are_those_of_the_checkpoint():
    """Its config lists the tokens that are not to be written."""
    ours, tokenizer = model.load("whisper")
    listed = json.loads((locate("whisper") / "config.json").read_text())["suppress_ids"]
    assert speech.find_non_speech_tokens(tokenizer) == {
        token for token in listed if token < ours.config.decoder_start_token
    }


@needs_whisper
def test_real_weights_equal_transformers(tmp_path):
    """The file's weights written as a Hugging Face directory: transformers has the same logits on some tones."""
    ours, _ = model.load("whisper")
    model.save(ours, tmp_path / "x")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "x").eval()
    t = torch.arange(480_000) / 16_000
    samples = 0.3 * torch.sin(2 * torch.pi * (200 + 50 * t) * t) * (torch.sin(5 * t) > 0)
    frames, targets = sound.compute_spectrogram(samples, 80)[None], torch.tensor([[50257, 50362, 383, 1049]])
    with torch.no_grad():
        expected = theirs(input_features=frames, decoder_input_ids=targets).logits
        torch.testing.assert_close(ours(frames, targets), expected, rtol=1e-3, atol=1e-3)


@needs_whisper
def test_a_file_that_is_cut_off(tmp_path):
    source = locate("whisper")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with (source / "model.bin").open("rb") as file:
        data = file.read(1_000_000)
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.bin: truncated"):
        model.load(tmp_path)
    with pytest.raises(ValueError, match="version must be 6 and the model a WhisperSpec, got 1"):
        ctranslate2_file.read_arrays(io.BytesIO(b"\1\0\0\0" + bytes(100)))
