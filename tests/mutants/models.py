"""Faults of the models."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "new queries are not rotated",
        "model/layers.py",
        "q, k = rotate(q, step.rotary), rotate(k, step.rotary)",
        "k = rotate(k, step.rotary)",
        ("tests/model/test_checkpoints.py",),
    ),
    Mutant(
        "warm-up begins at the full rate",
        "model/training/train.py",
        "return self.learning_rate * (step + 1) / self.warmup",
        "return self.learning_rate",
        ("tests/model/test_train.py",),
    ),
    Mutant(
        "a server accepts a request too large for its pool",
        "model/inference/serving.py",
        "if needed > self.pages:",
        "if needed > self.pages + 1:",
        ("tests/model/test_serving.py",),
    ),
    Mutant(
        "long contexts take the short factors",
        "model/rope.py",
        "self.long_factors if length > self.original_context else self.short_factors",
        "self.short_factors",
        ("tests/model/test_rope.py",),
    ),
    Mutant(
        "dynamic positions forget their factor",
        "model/rope.py",
        "/ self.original_context - (self.factor - 1)",
        "/ self.original_context",
        ("tests/model/test_rope.py",),
    ),
]
