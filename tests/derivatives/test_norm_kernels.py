"""The Triton kernels of norms' tangents: compiled ahead of time, and executed by the PTX machine."""

import pytest
import torch

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from bench import compiled, ptx
from flashattn.backends import triton as backend
from flashattn.kernels import configs, norm_configs
from flashattn.protocol import NormTangents, SavedNorm
from flashattn.score import Norm
from tests.derivatives.norm_cases import check
from tests.norm.cases import Case, shrink_blocks
from tests.ptx.run_text import STRICT

ON_PTX = [
    ("sm_80", Case("layer", (9, 63), residual="same", dropout_p=0.1, prenorm=True), torch.bfloat16),
    ("sm_90", Case("rms", (5, 2, 40), center=False, bias=False, per_head=True), torch.float32),
    ("sm_90", Case("wide", (2, 1500)), torch.float16),
]


@pytest.mark.parametrize("architecture, case, dtype", ON_PTX, ids=lambda x: getattr(x, "name", str(x)))
def test_on_the_ptx_machine(architecture, case, dtype, monkeypatch):
    shrink_blocks(monkeypatch)
    with ptx.device(architecture, on_fault=STRICT) as gpu:
        check(case, dtype, "triton")
    means = {"norm_hvp_means"} if case.name == "wide" else set()
    assert {launch.kernel for launch in gpu.launches} >= {"norm_jvp", "norm_hvp", *means}


def compile_tangents(width: int, dtype: torch.dtype, norm: Norm, fused: bool) -> None:
    """With every piece, h in float32, or of x alone."""
    x, weight = torch.empty(8, 4, width, dtype=dtype), torch.empty(width, dtype=dtype)
    residual, bias = x if fused else None, weight if norm.center else None
    hidden_dtype, tangents = torch.float32 if fused else dtype, NormTangents(x, residual, weight, bias)
    y, hidden, mean, rstd, _, t = backend.norm_jvp(x, residual, weight, bias, tangents, hidden_dtype, fused, norm)
    saved = SavedNorm(hidden if fused else x, weight, bias, rstd if mean is None else mean, rstd)
    residual_dtype = torch.float32 if fused else None
    backend.norm_hvp(y, saved, t if fused else x, weight, dtype, residual_dtype, norm)


def check_compiled(architecture: str, width: int) -> None:
    """They fit in shared memory and spill no register, on the architectures of which spills count."""
    torch.use_deterministic_algorithms(False)
    layer, rms = Norm(True, 1e-5, 1.0, 0.1, torch.tensor(5)), Norm(False, 1e-6)
    with compiled.compile_for(architecture) as kernels:
        compile_tangents(width, torch.bfloat16, layer, True)
        compile_tangents(width, torch.float32, rms, False)
    means = ["norm_hvp_means"] * (width > norm_configs.NORM_COLS["hvp"])
    assert [kernel.name for kernel in kernels] == ["norm_jvp", *means, "norm_hvp", "norm_backward_parameters"] * 2
    for kernel in kernels:
        assert kernel.shared_bytes <= configs.SHARED_MEMORY[architecture]
        if architecture in ("sm_80", "sm_90"):
            assert (kernel.spills, kernel.stack_bytes) == (0, 0), kernel


WIDTHS = {"sm_80": (64, 8192), "sm_90": (1000, 40000), "sm_100": (4096,), "gfx942": (1000, 40000)}


@pytest.mark.parametrize("architecture, width", [(a, width) for a, widths in WIDTHS.items() for width in widths])
def test_kernels_compile(architecture, width):
    check_compiled(architecture, width)


@pytest.mark.parametrize("direction", ["jvp", "hvp"])
def test_the_widest_rows_stay_in_registers(direction):
    check_compiled("sm_90", norm_configs.NORM_COLS[direction])
