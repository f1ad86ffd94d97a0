"""Products of FP8 tiles and blocks by cuBLAS, which torch calls on SM90 (H100, H200; CUDA 12.9).

Arguments lie as ``torch.nn.functional.scaled_mm`` is documented and tested to want them. No GPU has
run this file yet: it is tested against a stand-in that refuses any other form, and against the same
products computed in bf16 (``ops/fp8_linear.py``). Stacks of experts have no such kernel in torch.

M rows, K summed over, N columns of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.errors import UserError

_ALIGNED = 4


def require_kernels(device: torch.device) -> None:
    """Raises ``UserError`` unless the device has them."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    raise UserError(
        "model.fp8_kernels=true: cuBLAS multiplies tiles and blocks of FP8 on SM90 (H100, H200) "
        f"only, and this is {here}; use model.fp8_kernels=false, which computes the same in bf16"
    )


def product(
    a_MK: Tensor, scales_a: Tensor, b_NK: Tensor, scales_b: Tensor, dtype: torch.dtype
) -> Tensor:
    """``a b^T`` of what the numbers times their scales are, added up in fp32: (M, N).

    Args:
        a_MK: e4m3.
        scales_a: of its 1 x 128 tiles, (M, K/128).
        b_NK: e4m3.
        scales_b: of its tiles, (N, K/128), or of its 128 x 128 blocks, (N/128, K/128).
        dtype: of the result, bf16 or fp32.
    """
    tiles, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    in_tiles = scales_b.shape[0] == b_NK.shape[0]
    return F.scaled_mm(
        a_MK.contiguous(),
        b_NK.contiguous().t(),
        _of_tiles(scales_a),
        tiles,
        _of_tiles(scales_b) if in_tiles else _of_blocks(scales_b),
        tiles if in_tiles else blocks,
        output_dtype=dtype,
    )


def _of_tiles(scales: Tensor) -> Tensor:
    """Row by row side by side, (M, K/128)."""
    return scales.float().t().contiguous().t()


def _of_blocks(scales: Tensor) -> Tensor:
    """By rows of blocks, each padded to 4 numbers: (K/128 padded, N/128)."""
    return F.pad(scales.float(), (0, -scales.shape[1] % _ALIGNED)).t()
