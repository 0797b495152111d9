"""CONTRIBUTING.md names files and functions that exist, and lists every place of a feature."""

import re
from pathlib import Path

from flashattn.score import SCORE_FIELDS, Score, ScoreOptions

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FEATURE = TEXT.partition("## Add a feature of attention")[2].partition("\n## ")[0]


def test_files_exist():
    names = set(re.findall(r"`((?:flashattn|csrc|tests|bench|model|docs)/[\w/.]+)`", TEXT))
    assert len(names) > 20
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_the_places_of_a_feature_exist():
    rows = re.findall(r"^\| `([\w/.]+)` \| (.*) \|$", FEATURE, flags=re.M)
    assert len(rows) == 10
    for file, places in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", places):
            others = re.findall(r"`([\w/.]+\.\w+)`", places)
            sources = [source, *((ROOT / other).read_text(encoding="utf-8") for other in others)]
            assert any(re.search(rf"\b{name}\b", text) for text in sources), f"{file}: {name}"


def test_every_field_is_at_its_places():
    """The fields that operators carry, in Triton's arguments and in the engine, whatever they are called there."""
    triton = (ROOT / "flashattn/backends/triton.py").read_text(encoding="utf-8")
    engine = (ROOT / "csrc/score_fields.h").read_text(encoding="utf-8")
    for name in Score._fields[:SCORE_FIELDS]:
        assert re.search(rf", {name}\)", engine), name
        if name not in ("left", "right", "max_seqlen_q", "max_seqlen_k"):  # which `bounds` and `sizes` read
            assert f"score.{name}" in triton, name
    assert {"window" if name in ("left", "right") else name for name in Score._fields} >= set(
        ScoreOptions.__annotations__
    )
