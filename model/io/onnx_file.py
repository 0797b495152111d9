"""The weights of an ONNX graph, in 4 or 8 bits, under the names of a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read(path: Path) -> dict[str, Tensor]:
    """All weights, dequantised to float32.

    The weight of a matrix product has no name, but its node has: `/bert/encoder/layer.0/…/query/MatMul_Q4`.

    Raises:
        ValueError: for a file that is no ONNX graph, or for a quantisation that is not supported.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(path).graph
    except Exception as error:  # the parser has its own exceptions
        raise ValueError(f"not an ONNX graph: {error}") from None
    if not graph.node:
        raise ValueError("not an ONNX graph: it has no nodes")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            settings = {a.name: a.i for a in node.attribute}
            name = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            tensors[f"{name}.weight"] = dequantise_four_bits(*(arrays.pop(i) for i in node.input[1:]), **settings)
    for name in [name.removesuffix("_quantized") for name in arrays if name.endswith("_quantized")]:
        values, scale, zero = (arrays.pop(f"{name}_{part}") for part in ("quantized", "scale", "zero_point"))
        tensors[name] = (values.astype(np.float32) - zero) * scale
    floats = {name: array for name, array in arrays.items() if array.dtype == np.float32 and "." in name}
    return {name: torch.tensor(x) for name, x in (floats | tensors).items()}


def dequantise_four_bits(packed, scales, *more, K: int, N: int, bits: int, block_size: int, **_) -> np.ndarray:
    """(N, K) from packed (N, blocks, block_size / 2), the first of two in the low bits of a byte, and scales
    (N, blocks). Without zero points, `more`, the zero is 8."""
    if bits != 4 or more:
        raise ValueError(f"a matrix must have 4 bits and the zero point 8, got {bits} bits, {len(more)} zero points")
    values = np.stack((packed & 15, packed >> 4), axis=-1).reshape(N, -1, block_size).astype(np.float32) - 8
    return (values * scales.reshape(N, -1, 1)).reshape(N, -1)[:, :K]
