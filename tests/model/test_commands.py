"""The commands of `python -m model`, in this process; test_command_line.py calls some as a person does."""

import json
import sys
import wave
from dataclasses import replace

import pytest
import torch
from tokenizers import processors

import model
from model import commands
from model.__main__ import main
from model.io.tokenizer import Tokenizer
from model.layers import initialise
from model.tasks import translation
from model.tasks.common import make_small_llama
from tests.model.fakes import BERT, make_small_tokenizer
from tests.packages import needs_minilm, needs_rampart, needs_smollm2, needs_whisper

POEM = (
    "The owl and the pussycat went to sea in a beautiful pea green boat. They took some honey, and plenty of money.\n"
)


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["model", *map(str, arguments)])
    code = main()
    out, errors = capsys.readouterr()
    assert code == 0, errors
    return json.loads(out) if "--json" in arguments else out


def save_encoder(directory, task, **options):
    torch.manual_seed(0)
    ours = model.Transformer(replace(BERT, vocab_size=11)).with_head(task, **options)
    model.save(ours, directory, make_small_tokenizer())
    return directory


def test_classify(monkeypatch, capsys, tmp_path):
    path = save_encoder(tmp_path / "x", "classify", labels=("bad", "good"))
    result = run_command(monkeypatch, capsys, "classify", "--model", path, "paris is large", "new york", "--json")
    assert result["texts"] == ["paris is large", "new york"]
    assert all(sum(labels.values()) == pytest.approx(1) for labels in result["labels"])
    assert "good" in run_command(monkeypatch, capsys, "classify", "--model", path, "paris")


@needs_rampart
def test_tag(monkeypatch, capsys):
    text = "Ask Anna Kowalski."
    out = run_command(monkeypatch, capsys, "tag", "--model", "rampart", text)
    assert [line.split()[0] for line in out.splitlines()] == ["GIVEN_NAME", "SURNAME"]
    found = run_command(monkeypatch, capsys, "tag", "--model", "rampart", text, "--json")["entities"]
    assert [(e["label"], text[e["start"] : e["end"]]) for e in found] == [
        ("GIVEN_NAME", "Anna"),
        ("SURNAME", "Kowalski"),
    ]


def test_answer(monkeypatch, capsys, tmp_path):
    path = save_encoder(tmp_path / "x", "answer")
    arguments = ["answer", "--model", path, "--question", "paris is", "--passage", "new york is large", "--best", "2"]
    result = run_command(monkeypatch, capsys, *arguments, "--json")
    assert len(result["best"]) == 2
    assert "(no answer)" in run_command(monkeypatch, capsys, *arguments)


def test_translate(monkeypatch, capsys, tmp_path):
    tokenizer = Tokenizer.train(POEM, 300, (translation.START, translation.STOP), translation.STOP)
    ours = model.EncoderDecoder(translation.make_config(tokenizer.size, width=64, layers=1, dropout=0.1))
    initialise(ours, 1)
    model.save(ours.eval(), tmp_path / "x", tokenizer)
    arguments = ["translate", "--model", tmp_path / "x", "The owl", "the sea", "--max-new-tokens", "5"]
    result = run_command(monkeypatch, capsys, *arguments, "--json")
    sources = [[*tokenizer.encode(text), *tokenizer.stop] for text in ("The owl", "the sea")]
    found = model.beam_search(ours, sources, 5, stop_tokens=tokenizer.stop)
    assert result["translations"] == [tokenizer.decode(tokens).strip() for tokens in found]
    assert len(run_command(monkeypatch, capsys, *arguments, "--beams", "1").splitlines()) == 2


def test_train_then_use(monkeypatch, capsys, tmp_path):
    """A poem by heart, in two calls of which the second goes on; then it is generated, looked at and converted."""
    (tmp_path / "poem.txt").write_text(POEM * 40, encoding="utf-8")
    arguments = ["train", tmp_path / "poem.txt", "--out", tmp_path / "run", "--vocab", "300", "--layers", "1"]
    arguments += ["--width", "64", "--context", "32", "--learning-rate", "0.01", "--save-every", "30", "--batch", "4"]
    run_command(monkeypatch, capsys, *arguments, "--steps", "30", "--schedule", "constant")
    result = run_command(monkeypatch, capsys, *arguments, "--steps", "60", "--schedule", "constant", "--json")
    assert result["steps"] == 60
    assert result["bits_per_byte"] < 0.5
    path = result["directory"]
    written = run_command(
        monkeypatch,
        capsys,
        "generate",
        "--model",
        path,
        "--prompt",
        "The owl and the pussycat",
        "--max-new-tokens",
        "16",
        "--json",
    )
    assert written["equals_reference"]
    assert POEM.startswith("The owl and the pussycat" + written["text"][:20])
    guessed = run_command(
        monkeypatch, capsys, "generate", "--model", path, "--draft", path, "--prompt", "The owl and the pussycat",
        "--max-new-tokens", "16", "--json",
    )  # fmt: skip
    assert guessed["tokens"] == written["tokens"]
    assert guessed["steps"] < 16
    looked = run_command(monkeypatch, capsys, "inspect", "--model", path, "--json")
    assert looked["config"]["family"] == "llama"
    assert looked["parameters"] == sum(looked["of"].values())
    assert looked["cache_bytes_per_token"] == 2 * 1 * 64 * 4
    assert "parameters" in run_command(monkeypatch, capsys, "inspect", "--model", path)
    run_command(monkeypatch, capsys, "convert", "--model", path, tmp_path / "half", "--dtype", "bfloat16")
    half, _ = model.load(tmp_path / "half", torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(half.token_embedding.weight, model.load(path)[0].token_embedding.weight.bfloat16())


@needs_whisper
def test_transcribe_hears_no_words_in_silence(monkeypatch, capsys, tmp_path):
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 48_000))
    arguments = ["transcribe", "--model", "whisper", tmp_path / "x.wav", "--dtype", "bfloat16", "--json"]
    found = run_command(monkeypatch, capsys, *arguments)
    assert (found["text"], found["language"], found["segments"]) == ("", "en", [])
    assert found["seconds_of_sound"] == 3


@pytest.mark.parametrize(
    ("option", "least"),
    [
        ("--vocab", 1), ("--layers", 1), ("--width", 1), ("--context", 2), ("--batch", 1), ("--accumulate", 1),
        ("--steps", 1), ("--save-every", 1),
    ],
)  # fmt: skip
def test_training_takes_no_zeros(option, least, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model", "train", __file__, "--out", "x", option, str(least - 1)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"argument {option}: must be at least {least}, got {least - 1}" in capsys.readouterr().err


def test_a_text_too_short_to_hold_a_part_out(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.txt").write_text("The owl", encoding="utf-8")
    arguments = ["train", str(tmp_path / "x.txt"), "--out", str(tmp_path / "x"), "--context", "2", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["model", *arguments])
    assert main() == 1
    assert "error: texts must be long enough for two tokens in the twentieth held out, got 1" in capsys.readouterr().err


@needs_minilm
@needs_smollm2
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["classify", "--model", "minilm", "x"],
            "model must have a head for the task 'classify', got a bert without one",
        ),
        (["translate", "--model", "minilm", "x"], "translate needs an encoder-decoder, got a bert"),
        (["train", "/nowhere.txt", "--out", "x"], "No such file or directory: '/nowhere.txt'"),
        (["train", __file__, "--out", "x", "--width", "100"], "width must be a multiple of the heads' 64, got 100"),
        (["train", __file__, "--out", "x", "--model", "minilm"], "train needs a causal language model, got a bert"),
        (["train", __file__, "--out", "x", "--context", "100000"], "more tokens than the context of 100000"),
        (["convert", "--model", "minilm", "/tmp"], "/tmp must not exist yet"),
        (
            ["generate", "--model", "smollm2", "--prompt", "x", "--max-new-tokens", "9000"],
            "must fit the context of 8192",
        ),
    ],
)
def test_what_is_wrong_is_said(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model", *arguments])
    assert main() == 1
    out, errors = capsys.readouterr()
    assert message in errors
    assert not out or out.endswith("\n")  # where both are shown, the error begins a line
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1


def test_a_chat_begins_once_and_ends_whole(monkeypatch, capsys, tmp_path):
    """Its template has the bos token that a plain text gets; a last piece of a character is shown too."""
    tokenizer = Tokenizer.train(POEM, 300, special=("<s>",))
    tokenizer.backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.config, tokenizer.chat_template = dict(bos_token="<s>"), "{{ bos_token }}{{ messages[0].content }}"
    model.save(make_small_llama(tokenizer.size, layers=1, width=64, context=32, seed=0), tmp_path / "x", tokenizer)
    prompts, owl = [], tokenizer.encode("🦉", add_special_tokens=False)

    def generate(_, prompts_, *args, on_token, **options):
        prompts.extend(prompts_)
        for token in owl[:-1]:
            on_token(0, token)
        return [owl[:-1]]

    monkeypatch.setattr(commands, "generate", generate)
    for more in ([], ["--chat"]):
        out = run_command(
            monkeypatch, capsys, "generate", "--model", tmp_path / "x", "--prompt", "the", "--no-check", *more
        )
        assert out.startswith("the\N{REPLACEMENT CHARACTER}\n\n")
    assert prompts == [tokenizer.encode("the")] * 2
    assert prompts[0][0] == 0 != prompts[0][1]
