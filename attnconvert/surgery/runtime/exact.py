"""Exact softmax attention behind the seam. It changes nothing: the null conversion that proves a family is wired correctly."""

from __future__ import annotations

import torch
from torch import Tensor

from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs, softmax_attention


class ExactAttention(AttentionCore):
    """Softmax attention with its own growing cache (keys, values and padding bits)."""

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        if inputs.layer is None:
            return softmax_attention(q, k, v, scaling=inputs.scaling, start=inputs.start, sliding_window=inputs.sliding_window)
        state, valid = inputs.layer.state, inputs.valid()
        if state:
            k, v, valid = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2), torch.cat([state["valid"], valid], 1)
        inputs.layer.state = {"k": k, "v": v, "valid": valid}
        if not state and inputs.start is None:
            return softmax_attention(q, k, v, scaling=inputs.scaling, start=None, sliding_window=inputs.sliding_window)
        # a padded or packed prefill knows its documents from `start`; later calls continue the last one
        mask = valid if state else None
        return softmax_attention(q, k, v, scaling=inputs.scaling, start=inputs.start, attention_mask=mask, sliding_window=inputs.sliding_window)
