"""Faults of operators and calls."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "backward does not notice that a tensor of the options was changed",
        "flashattn/ops/attention.py",
        "*captured, *score.saved_tensors())",
        "*captured)",
        ("tests/operators/test_changed_in_place.py",),
    ),
    Mutant(
        "a subclass takes the fast path",
        "flashattn/tracing.py",
        "            dispatched = True  # a subclass may override dispatch",
        "            pass",
        ("tests/operators/test_fake.py::test_outside_the_mode",),
    ),
    Mutant(
        "the operators' fakes forget the rest",
        "flashattn/reference/__init__.py",
        "    return True\n",
        "    return False\n",
        ("tests/operators/test_ops.py",),
    ),
    Mutant(
        "a failed step keeps its tokens",
        "flashattn/ops/decode.py",
        "        cache.truncate(lengths)\n",
        "        pass\n",
        ("tests/attention/test_decode.py",),
    ),
]
