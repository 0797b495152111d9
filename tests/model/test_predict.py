"""Classes, labelled spans and answers: by hand on logits made for it, and a real BERT that labels personal data."""

import numpy as np
import pytest
import torch

import model
from model.inference.predict import answer, classify, tag
from model.io import onnx_file
from model.io.packages import locate
from tests.model.fakes import BERT, Says, make_small_tokenizer
from tests.packages import needs_rampart

LABELS = ("O", "B-CITY", "I-CITY", "B-SIZE", "SAME")


def make_logits(labels, width=5):
    return torch.nn.functional.one_hot(torch.tensor([LABELS.index(label) for label in labels]), width) * 9.0


def test_spans_of_words():
    """new york is larger than paris: pieces [CLS] new york is large ##r than paris [SEP]."""
    tokenizer = make_small_tokenizer()
    assert len(tokenizer.encode("new york is larger than paris")) == 9
    logits = make_logits(["O", "B-CITY", "I-CITY", "O", "B-SIZE", "I-CITY", "SAME", "I-CITY", "O"])
    found = tag(Says(logits.tolist(), task="tag", labels=LABELS), tokenizer, "new york is larger than paris")
    assert [(e.label, e.text) for e in found] == [
        ("CITY", "new york"), ("SIZE", "larger"), ("SAME", "than"), ("CITY", "paris"),
    ]  # fmt: skip
    assert all(0.99 < e.probability < 1 for e in found)
    assert [("new york is larger than paris"[e.start : e.end]) for e in found] == [e.text for e in found]


def test_a_span_ends_where_another_begins():
    logits = make_logits(["O", "B-CITY", "B-CITY", "SAME", "SAME", "O"])
    found = tag(Says(logits.tolist(), task="tag", labels=LABELS), make_small_tokenizer(), "new paris new paris")
    assert [(e.label, e.text) for e in found] == [
        ("CITY", "new"),
        ("CITY", "paris"),
        ("SAME", "new"),
        ("SAME", "paris"),
    ]
    assert tag(Says(make_logits(["O", "O"]).tolist(), task="tag", labels=LABELS), make_small_tokenizer(), "") == []


@pytest.mark.parametrize(
    ("problem_type", "expected"),
    [
        ("single_label_classification", [0.0474, 0.9526]),
        ("multi_label_classification", [0.2689, 0.8808]),
        ("regression", [-1.0, 2.0]),
    ],
)
def test_classes(problem_type, expected):
    says = Says([[-1.0, 2.0]], task="classify", labels=("bad", "good"), problem_type=problem_type)
    found = classify(says, make_small_tokenizer(), ["paris is large"])[0]
    assert list(found) == ["good", "bad"]
    assert [found["bad"], found["good"]] == pytest.approx(expected, abs=1e-4)


def test_answers():
    """Pieces: [CLS] paris is [SEP] new york is large ##r [SEP]; an answer does not end before it starts, nor lie in the
    question, nor be longer than allowed."""
    start = [0.0, 9, 9, 0, 5, 1, 0, 4, 0, 0]
    end = [0.5, 9, 9, 0, 0, 3, 0, 0, 4, 0]
    says = Says([list(zip(start, end, strict=True))], task="answer")
    found = answer(says, make_small_tokenizer(), "paris is", "new york is larger", best=3)
    assert [(s.text, s.score) for s in found.best] == [("new york is larger", 9.0), ("new york", 8.0), ("larger", 8.0)]
    assert found.null_score == 0.5
    assert sum(s.probability for s in found.best) + found.null_probability < 1
    short = answer(says, make_small_tokenizer(), "paris is", "new york is larger", best=2, longest=2)
    assert [s.text for s in short.best] == ["new york", "larger"]
    every = answer(says, make_small_tokenizer(), "paris is", "new york is larger", best=100)
    assert len(every.best) == 5 * 6 / 2
    assert sum(s.probability for s in every.best) + every.null_probability == pytest.approx(1)


def test_wrong_calls_are_named():
    says, tokenizer = Says([[0.0]], task="tag", labels=LABELS), make_small_tokenizer()
    with pytest.raises(
        ValueError, match="model must have a head for the task 'classify', got a bert with one for 'tag'"
    ):
        classify(says, tokenizer, ["x"])
    with pytest.raises(ValueError, match="text must fit the context of 32 tokens, got 42"):
        tag(says, tokenizer, "new " * 40)
    with pytest.raises(ValueError, match="best must be at least 1, got 0"):
        answer(Says([[0.0]], task="answer"), tokenizer, "x", "y", best=0)


def test_a_new_head_shares_the_encoder():
    encoder = model.Transformer(BERT)
    tagger = encoder.with_head("tag", LABELS, dropout=0.1)
    assert tagger.token_embedding.weight is encoder.token_embedding.weight
    tokens = torch.tensor([[0, 2, 3, 1]])
    assert torch.equal(tagger.eval().encode(tokens), encoder.eval().encode(tokens))
    assert tagger(tokens).shape == (1, 4, 5)
    assert tagger.with_head("classify", ("a", "b"))(tokens).shape == (1, 2)


def test_four_bits():
    """Two blocks of four; 8 is zero; the first of two numbers lies in the low half."""
    packed = np.array([[[0x98, 0xF0], [0x8A, 0x88]]], dtype=np.uint8)
    weight = onnx_file.dequantise_four_bits(packed, np.array([0.5, 2.0], np.float32), K=7, N=1, bits=4, block_size=4)
    assert weight.tolist() == [[0.0, 0.5, -4.0, 3.5, 4.0, 0.0, 0.0]]


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(ValueError, match="not an ONNX graph"):
        onnx_file.read(tmp_path / "x.onnx")


TEXT = "My name is Anna Kowalski, I live at 14 Baker Street, London; call +44 20 7946 0958."


@needs_rampart
def test_personal_data():
    ours, tokenizer = model.load(locate("rampart"))
    assert len(ours.config.labels) == 35
    found = {entity.text: entity.label for entity in tag(ours, tokenizer, TEXT)}
    assert found == {
        "Anna": "GIVEN_NAME", "Kowalski": "SURNAME", "14": "BUILDING_NUMBER", "Baker Street": "STREET_NAME",
        "London": "CITY", "+44 20 7946 0958": "PHONE",
    }  # fmt: skip


@needs_rampart
def test_personal_data_as_onnxruntime_has_it():
    onnxruntime = pytest.importorskip("onnxruntime")
    path = locate("rampart")
    ours, tokenizer = model.load(path)
    tokens = np.array([tokenizer.encode(TEXT)])
    session = onnxruntime.InferenceSession(str(path / "onnx/model_q4.onnx"))
    inputs = dict(input_ids=tokens, attention_mask=np.ones_like(tokens), token_type_ids=np.zeros_like(tokens))
    expected = torch.tensor(session.run(None, inputs)[0])
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.tensor(tokens)), expected, rtol=1e-4, atol=1e-4)
