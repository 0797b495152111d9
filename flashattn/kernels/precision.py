"""How kernels multiply float32: by the setting for PyTorch's own float32 matrix products on the GPU.

| torch.set_float32_matmul_precision | Triton's input_precision | a product |
|---|---|---|
| "highest" | "ieee" | multiply-adds of float32, without tensor cores |
| "high" | "tf32x3" | three of tensor cores: big big + big small + small big of x = big + small, both TF32 |
| "medium" | "tf32" | one: tensor cores read the upper 19 bits of a float32, its fraction is cut to 10 bits |

On sm_100 the parts of "tf32x3" do not fit in tensor memory with Triton before 3.8; "ieee" takes its place there, as for
a head_dim above 128.

AMD's GPUs have matrix instructions for float32 itself, which "ieee" uses; Triton has "tf32x3" for none of them, and
"tf32" for gfx942 only. Triton's interpreter always computes float32.
"""

import torch
from torch import Tensor

from .compiler import WASTES_TENSOR_MEMORY
from .configs import FAMILY, find_architecture

WIDEST_SPLIT = 128  # head_dim: beyond, the parts fit neither in registers nor, on smaller GPUs, in shared memory


def choose_input_precision(q: Tensor, v: Tensor) -> str:
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
    if setting == "medium":
        return "tf32"
    if WASTES_TENSOR_MEMORY and FAMILY.get(architecture) == "sm_100":
        return "ieee"
    return "tf32x3" if max(q.shape[-1], v.shape[-1]) <= WIDEST_SPLIT else "ieee"
