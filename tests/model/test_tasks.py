"""The tasks in a short form, each of which still has to learn; what they are compared with; their data."""

import hashlib
import http.server
import math
import threading

import numpy as np
import pytest
import torch

from model import EncoderDecoder
from model.io.tokenizer import Tokenizer
from model.layers import initialise
from model.tasks import answers, datasets, ngram, sentiment, sequences, tags, text, translation
from model.training.train import Training, train
from tests.packages import needs_minilm


def needs_data(*names):
    """Fetches what a test reads; where that cannot be had, the test is skipped, and says why."""

    def fetch():
        try:
            for name in names:
                datasets.fetch(name)
        except OSError as error:
            pytest.skip(str(error))

    return fetch


def test_sequences():
    """Copying, reversing and sorting up to five numbers."""
    result = sequences.run(steps=200, longest=5)
    assert all(share > 0.75 for share in result["exact"].values()), result


def test_text(monkeypatch):
    """Below what the frequencies of tokens alone give, and on its way to 5-grams."""
    needs_data("austen")()
    monkeypatch.setattr(text, "BATCH", 4)
    result = text.run(steps=100, layers=1, width=128)
    learned, held_out = text.split()
    tokenizer = Tokenizer.train(learned, text.VOCAB)
    alone = ngram.KneserNey(np.array(tokenizer.encode(learned)), tokenizer.size, order=1)
    p = alone.compute_probabilities(np.array(tokenizer.encode(held_out)))
    frequencies = -np.log2(p).sum() / len(held_out.encode())
    assert result["five_grams_of_tokens"] < result["bits_per_byte"] < 0.95 * frequencies
    assert result["five_grams_of_tokens"] == pytest.approx(1.517, abs=1e-3)


@needs_minilm
def test_sentiment(monkeypatch):
    """Better than chance by four standard deviations, after a thirtieth of the examples."""
    needs_data("vader")()
    monkeypatch.setattr(sentiment, "BATCH", 8)
    result = sentiment.run(steps=40, measured=100)
    assert result["majority"] < 0.6  # of two classes that are about as large
    assert result["accuracy"] > 0.5 + 4 * math.sqrt(0.25 / 100), result
    assert result["accuracy_frozen"] > 0.65


@needs_minilm
def test_tags(monkeypatch):
    needs_data("brown")()
    monkeypatch.setattr(tags, "BATCH", 6)
    result = tags.run(steps=30, measured=40)
    assert result["accuracy"] > 0.6, result
    assert 0.85 < result["most_frequent"] < 0.95


@needs_minilm
def test_answers(monkeypatch):
    """In passages of two statements."""
    needs_data("trivia")()
    monkeypatch.setattr(answers, "BATCH", 8)
    monkeypatch.setattr(answers, "STATEMENTS", 2)
    result = answers.run(steps=25, measured=30)
    assert result["exact"] > 0.4, result
    assert 0.7 < result["bag_of_words"] < 1
    found = result["sample"]["found"][0]
    assert result["sample"]["passage"][found["start"] : found["end"]] == found["text"]


def test_translation():
    """Verses by heart: what beam search makes of them is what stands there."""
    needs_data("bible-en", "bible-es")()
    pairs = [(a, b) for a, b in datasets.read_verses() if len(a) < 60][:40]
    joined = "\n".join(f"{a}\n{b}" for a, b in pairs)
    tokenizer = Tokenizer.train(joined, 600, (translation.START, translation.STOP), translation.STOP)
    examples = translation.encode_pairs(pairs, tokenizer)
    torch.manual_seed(0)
    model = EncoderDecoder(translation.make_config(tokenizer.size, width=128, layers=1, dropout=0.0))
    initialise(model, 1)
    settings = Training(steps=150, learning_rate=2e-3, warmup=30, label_smoothing=0.1)
    train(model, lambda i: translation.make_batch(examples, i, seed=0), settings, progress=False)
    found = translation.translate(model, tokenizer, [a for a, _ in pairs])
    assert translation.bleu(found, [b for _, b in pairs]) > 80


def test_ibm_model_1():
    """The textbook's example: which word means what follows from where they stand together."""
    pairs = [("the house", "das Haus"), ("the book", "das Buch"), ("a book", "ein Buch")]
    known = translation.learn_dictionary(pairs, rounds=20)
    assert known == {"the": "das", "house": "Haus", "book": "Buch", "a": "ein"}
    assert translation.translate_word_by_word("a house, the book.", known) == "ein Haus, das Buch."


def test_the_bibles():
    needs_data("bible-en", "bible-es")()
    pairs = datasets.read_verses()
    assert len(pairs) == 31_084
    assert pairs[0][0] == "In the beginning God created the heaven and the earth."
    assert pairs[-1][1].startswith("La gracia de nuestro Señor Jesucristo sea con todos vosotros")
    assert not any(set("<>\n") & set(a + b) for a, b in pairs)


def test_the_novels():
    needs_data("austen")()
    novels = datasets.read_novels()
    assert len(novels) == 6
    assert (
        "\nIt is a truth universally acknowledged, that a single man in possession of a good fortune, must be in"
        in (novels["Pride And Prejudice"])
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_is_a_distribution(order):
    """Over the next token, behind contexts that were seen and others; and what was seen is likelier."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.3, 2000) - 1, 9)
    model = ngram.KneserNey(tokens, vocab_size=11, order=order)
    for context in ([0, 1], [9, 9], [10, 3], [10, 10]):
        total = sum(model.compute_probabilities(np.array([*context, token]))[-1] for token in range(11))
        assert total == pytest.approx(1)
    assert model.compute_probabilities(np.array([0, 0, 0]))[-1] > model.compute_probabilities(np.array([0, 0, 9]))[-1]


def test_kneser_ney_by_hand():
    """Tokens a b a b a c: of bigrams, counts 2 (ab), 2 (ba), 1 (ac). With n1 = 1, n2 = 2, the rest taken as 1, the
    discounts are 1 - 2 Y 2 = 0.2 and 2 - 3 Y 1/2 = 1.7, with Y = 1/5."""
    model = ngram.KneserNey(np.array([0, 1, 0, 1, 0, 2]), vocab_size=3, order=2)
    y = 1 / 5
    one, two = 1 - 2 * y * 2 / 1, 2 - 3 * y * 1 / 2
    # Unigrams: each of a, b, c follows one kind of token; n1 = 3, the rest taken as 1.
    y = 3 / 5
    lower_one = 1 - 2 * y * 1 / 3
    unigram = (1 - lower_one + 3 * lower_one / 3) / 3
    b_after_a = (2 - two + (one + two) * unigram) / 3
    c_after_a = (1 - one + (one + two) * unigram) / 3
    found = [model.compute_probabilities(np.array([0, token]))[1] for token in (1, 2)]
    assert found == pytest.approx([b_after_a, c_after_a])


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves `answer`, and says that it is `length` bytes long."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(self.server.length))
            self.end_headers()
            self.wfile.write(self.server.answer)

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.status, served.answer, served.length = 200, b"data", 4
    threading.Thread(target=served.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{served.server_port}/x.tgz"
    package = datasets.Package(url, hashlib.sha256(b"data").hexdigest(), "none")
    monkeypatch.setitem(datasets.PACKAGES, "x", package)
    monkeypatch.setenv("FLASHATTN_DATA", str(tmp_path))
    yield served
    served.shutdown()


def test_a_download_is_kept(server, tmp_path):
    assert datasets.fetch("x").read_bytes() == b"data"
    server.shutdown()
    assert datasets.fetch("x") == tmp_path / "x.tgz"


@pytest.mark.parametrize(
    ("status", "answer", "length", "message"),
    [
        (200, b"da", 4, "download failed: 2 of 4 bytes received"),
        (200, b"Data", 4, "SHA-256 must be"),
        (404, b"", 0, "download failed: HTTP Error 404"),
    ],
)
def test_a_download_that_fails_leaves_nothing(server, tmp_path, status, answer, length, message):
    server.status, server.answer, server.length = status, answer, length
    with pytest.raises(OSError, match=message):
        datasets.fetch("x")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_fetched_again(server, tmp_path):
    (tmp_path / "x.tgz").write_bytes(b"da")
    assert datasets.fetch("x").read_bytes() == b"data"


def test_not_a_debian_package(server):
    server.answer, server.length = b"!<arch>\n", 8
    datasets.PACKAGES["x"] = datasets.PACKAGES["x"]._replace(sha256=hashlib.sha256(b"!<arch>\n").hexdigest())
    with pytest.raises(OSError, match=r"no data\.tar in it"):
        datasets.open_debian_package("x")
