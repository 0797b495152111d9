"""How kernels multiply float32: by the setting for PyTorch's own float32 matrix products on the GPU.

| torch.set_float32_matmul_precision | Triton's input_precision | a product |
|---|---|---|
| "highest" | "ieee" | multiply-adds of float32, without tensor cores |
| "high" | "tf32x3" | three of tensor cores: big big + big small + small big of x = big + small, both TF32 |
| "medium" | "tf32" | one: tensor cores read the upper 19 bits of a float32, its fraction is cut to 10 bits |

On sm_100 the parts of "tf32x3" do not fit in tensor memory with Triton before 3.8; "ieee" takes its place there, as for
a head_dim above 128.

Passes with tangents have twice the tiles: there "tf32x3" ends at a head_dim of 64 and, on GPUs with 99 KiB of shared
memory, "tf32" at 128.

AMD's GPUs have matrix instructions for float32 itself, which "ieee" uses; Triton has "tf32x3" for none of them, and
"tf32" for gfx942 only. Triton's interpreter always computes float32.
"""

import torch
from torch import Tensor

from .compiler import WASTES_TENSOR_MEMORY
from .configs import FAMILY, find_architecture


def find_widest(precision: str, architecture: str, with_tangents: bool) -> int:
    """The largest head_dim whose tiles fit in registers and, on smaller GPUs, in shared memory."""
    if precision == "tf32x3":
        return 64 if with_tangents else 128
    return 128 if precision == "tf32" and with_tangents and architecture not in FAMILY else 256


def choose_input_precision(q: Tensor, v: Tensor, with_tangents: bool = False) -> str:
    """Of the products of a pass, for tl.dot, by the current setting, which may have changed before a backward."""
    if q.dtype != torch.float32:
        return "ieee"  # so that a change of the setting compiles nothing anew
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer fp32_precision of torch.backends, whose "tf32" is a single product
        setting = "medium"
    # The older setting ignores later changes of the newer one for CUDA.
    if setting == "highest" or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    architecture = find_architecture()
    if not architecture.startswith("sm_"):
        return "ieee"
    precision = "tf32" if setting == "medium" else "tf32x3"
    if precision == "tf32x3" and WASTES_TENSOR_MEMORY and FAMILY.get(architecture) == "sm_100":
        return "ieee"
    fits = max(q.shape[-1], v.shape[-1]) <= find_widest(precision, architecture, with_tangents)
    return precision if fits else "ieee"
