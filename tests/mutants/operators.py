"""Faults of operators and calls."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "a call without gradients keeps its tensors",
        "flashattn/ops/attention.py",
        "if requires_grad and torch.is_grad_enabled():",
        "if requires_grad:",
        ("tests/operators/test_changed_in_place.py",),
    ),
    Mutant(
        "a subclass takes the fast path",
        "flashattn/ops/attention.py",
        "            must_dispatch = True  # a subclass may override dispatch",
        "            pass",
        ("tests/compat/test_sdpa.py",),
    ),
    Mutant(
        "Dynamo traces into an operator's implementation",
        "flashattn/ops/register.py",
        "return lambda run: register(tracing.keep_from_dynamo(run))",
        "return lambda run: register(run)",
        ("tests/operators/test_forward_mode.py",),
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
