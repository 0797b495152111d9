"""Marks for tests on real weights: `make` installs the packages; without them the tests are skipped, and say so."""

import pytest

from model.io.packages import locate


def needs(name: str):
    try:
        locate(name)
    except FileNotFoundError as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.filterwarnings("default")


needs_smollm2, needs_minilm, needs_gpt2_vocabulary, needs_rxnmapper, needs_rampart, needs_rxnfp, needs_whisper = (
    needs(name) for name in ("smollm2", "minilm", "gpt2-vocabulary", "rxnmapper", "rampart", "rxnfp", "whisper")
)
