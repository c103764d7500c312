"""The output projection of attention with routed heads: in a decode step, columns of its weight that meet zeros are not read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnconvert.kernels.choice import HAS_TRITON, in_this_process

MAX_ROWS = 1  # what one row of a batch leaves out others use; measured on an H100, two rows take longer than the ordinary product


class SkippingLinear(nn.Linear):
    """`nn.Linear`, which in a decode step of one row on a GPU leaves out whatever the input's zeros make needless, in segments of 32 numbers.

    The result is the same, up to the order of a sum in fp32; a weight that is not a number is not seen where it would meet a zero. There is no state: an existing
    `nn.Linear` becomes one by its `__class__`, and keeps its parameters, its hooks and its identity.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if not self._skips(input):
            return super().forward(input)
        from attnconvert.kernels.heads.triton_projection import triton_project

        return triton_project(input, self.weight, self.bias)

    def _skips(self, x: Tensor) -> bool:
        weight = self.weight
        if not x.is_cuda or x.numel() > MAX_ROWS * self.in_features or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return False
        plain = type(weight) is nn.Parameter and weight.is_contiguous() and weight.device == x.device  # not quantized, sharded or elsewhere
        same = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16) and (self.bias is None or self.bias.dtype == x.dtype)
        return plain and same and HAS_TRITON and self.in_features % 32 == 0 and in_this_process("auto") != "reference"
