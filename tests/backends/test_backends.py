"""How a backend is chosen, forced and refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashattn
from flashattn import backends
from flashattn.backends import triton_hopper
from flashattn.compat import sdpa

ROOT = Path(__file__).parents[2]


def run_python(*arguments, **environment):
    """Run Python on its own; returns the finished process."""
    environment = {**os.environ, **environment}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_the_extension_is_built():
    assert backends.unavailable_reason("cpu", "cpu", torch.float32) is None


@pytest.mark.parametrize(
    "dtype, head_dim, expected",
    [
        (torch.float32, 64, "cpu"),
        (torch.bfloat16, 256, "cpu"),
        (torch.float64, 64, "reference"),
        (torch.half, 257, "reference"),
    ],
)
def test_the_choice_on_a_cpu(dtype, head_dim, expected, monkeypatch):
    monkeypatch.setattr(backends.triton, "unavailable_reason", lambda device_type: "no GPU")
    backends._choose_once.cache_clear()
    assert backends.choose(torch.device("cpu"), dtype, head_dim=head_dim) == expected
    backends._choose_once.cache_clear()


def test_the_reference_takes_wide_heads():
    q = torch.randn(1, 1, 5, 300)
    torch.testing.assert_close(flashattn.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_a_forced_backend_that_cannot_is_an_error():
    q = torch.zeros(1, 1, 5, 8, dtype=torch.float64)
    with flashattn.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' cannot take this call: .*float64"):
        flashattn.attention(q, q, q)


def test_use_backend_restores():
    with pytest.raises(KeyError), flashattn.use_backend("reference"):
        raise KeyError
    assert backends._forced.value is None
    with pytest.raises(ValueError, match="backend must be one of triton, cpu, reference, got 'cuda'"):
        flashattn.use_backend("cuda").__enter__()


def enter_overlapping(begin):
    """Two blocks of which the first to begin is the first to end."""
    first, second = begin(), begin()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None), second.__exit__(None, None, None)


def test_overlapping_blocks_leave_nothing_behind():
    """As two threads make them."""
    theirs = torch.nn.functional.scaled_dot_product_attention
    enter_overlapping(lambda: flashattn.use_backend("reference"))
    enter_overlapping(backends.triton_on_cpu)
    enter_overlapping(triton_hopper.use_plain_kernels)
    enter_overlapping(sdpa.patch)
    assert backends._forced.value is None
    assert not backends.triton.accepts_cpu_tensors.value
    assert triton_hopper.ENABLED.value
    assert torch.nn.functional.scaled_dot_product_attention is theirs


def test_of_overlapping_blocks_the_last_to_begin_counts():
    first, second = flashattn.use_backend("cpu"), flashattn.use_backend("reference")
    first.__enter__(), second.__enter__()
    assert backends._forced.value == "reference"
    first.__exit__(None, None, None)
    assert backends._forced.value == "reference"
    second.__exit__(None, None, None)
    assert backends._forced.value is None


def test_patch_puts_back_what_it_found(monkeypatch):
    def theirs(*args, **options):
        pass

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", theirs)
    with sdpa.patch(), sdpa.patch():
        assert torch.nn.functional.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    assert torch.nn.functional.scaled_dot_product_attention is theirs


def test_use_backend_in_a_compiled_function():
    @torch.compile(fullgraph=True, backend="eager")
    def call(q):
        with flashattn.use_backend("reference"):
            return flashattn.attention(q, q, q)

    q = torch.randn(1, 2, 9, 8)
    with flashattn.use_backend("reference"):
        expected = flashattn.attention(q, q, q)
    assert torch.equal(call(q), expected)
    assert backends._forced.value is None


def test_backward_uses_the_backend_of_forward(monkeypatch):
    used = []
    real = backends.reference.backward
    monkeypatch.setattr(backends.reference, "backward", lambda *a: used.append("reference") or real(*a))
    q = torch.randn(1, 1, 5, 8, requires_grad=True)
    with flashattn.use_backend("reference"):
        out = flashattn.attention(q, q, q)
    out.sum().backward()
    assert used == ["reference"]


def test_environment_variable():
    code = "import torch, flashattn; print(flashattn.backends.choose(torch.device('cpu'), torch.float32))"
    assert run_python("-c", code, FLASHATTN_BACKEND="reference").stdout == "reference\n"
    wrong = run_python("-c", code, FLASHATTN_BACKEND="fast")
    assert "backend must be one of triton, cpu, reference, got 'fast'" in wrong.stderr


@pytest.mark.parametrize("isa", [isa for isa in backends.cpu.ISAS if isa != backends.cpu.get_isa()])
def test_instruction_sets(isa):
    """The engine's tests, on each instruction set this processor has but does not choose; one it lacks is an error that
    names the variable."""
    if isa not in backends.cpu.list_isas():
        done = run_python("-c", "import flashattn", FLASHATTN_CPU_ISA=isa)
        assert f"FLASHATTN_CPU_ISA must be one of {', '.join(backends.cpu.ISAS)}, and one this" in done.stderr
        pytest.skip(f"this processor has no {isa}")
    done = run_python("-c", "import flashattn; print(flashattn.backends.cpu.get_isa())", FLASHATTN_CPU_ISA=isa)
    assert done.stdout == f"{isa}\n"
    tests = [
        f"tests/{name}.py"
        for name in ("attention/test_attention", "norm/test_norm", "backends/test_linear", "backends/test_engine")
    ]
    chosen = "(cpu or engine or random) and not memory"
    done = run_python("-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, *tests, FLASHATTN_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]


def test_status():
    done = run_python("-m", "flashattn")
    assert done.returncode == 0
    for word in ("flashattn 0.", "CPU features", "triton", "cpu        usable", "reference  usable", "goes to: cpu"):
        assert word in done.stdout
