"""InfLLM-V2 core: softmax attention in which each token sees the blocks of keys that score best for it, and everything while its context is short."""

from __future__ import annotations

import torch
from torch import Tensor

from attnconvert.kernels.blocks.api import block_sparse_attention
from attnconvert.kernels.blocks.decode import BlockState, block_sparse_extend, block_sparse_step, fill, resized
from attnconvert.kernels.blocks.rule import Scorer, block_rule, capacity_for
from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs


class BlockSparseAttention(AttentionCore):
    """See `attnconvert.kernels.blocks.reference` for the maths and `attnconvert.kernels.blocks.decode` for the cache. No parameters.

    Args:
        num_heads: query heads H.
        num_key_value_heads: G.
        head_dim: D.
        block_size: tokens of a block: 32, 64 or 128.
        init_blocks: first blocks, which every query sees.
        window_size: tokens before a query's own block that it always sees, a multiple of `block_size`.
        topk: blocks that a query sees besides those of the window.
        dense_len: tokens of context below which a query sees everything.
        scorer: `compressed` or `mean`.

    Attributes:
        rule: the same as the kernels count. May be replaced; a cache that exists already needs the block size and scorer that it was begun with.
    """

    static_decode = True
    needs_planned_length = True

    def __init__(
        self, num_heads: int, num_key_value_heads: int, head_dim: int, block_size: int, init_blocks: int, window_size: int, topk: int, dense_len: int,
        scorer: Scorer,
    ):  # fmt: skip
        super().__init__()
        self.rule = block_rule(block_size, init_blocks, window_size, topk, dense_len, scorer)

    @property
    def alignment(self) -> int:  # type: ignore[override]
        """See `AttentionCore`."""
        return self.rule.alignment

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        assert inputs.sliding_window is None, "refused when the plan is made"
        layer, rule, scale, start = inputs.layer, self.rule, inputs.scaling, inputs.start
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if layer is None or not layer.state:
            aligned = self.alignment in inputs.aligned_to or self.packed_alignment % self.alignment == 0
            out = block_sparse_attention(q, k, v, rule=rule, scale=scale, start=start, aligned=aligned)
            if layer is not None:
                layer.capacity = capacity_for(max(layer.num_tokens, layer.planned_length or 0))
                layer.state = fill(k, v, rule, layer.capacity, start)._asdict()
            return out.transpose(1, 2)
        assert layer.capacity is not None
        state = BlockState(**layer.state)
        if layer.num_tokens > layer.capacity:
            layer.capacity = capacity_for(max(layer.num_tokens, layer.planned_length or 0))
            state = resized(state, rule, layer.capacity)
            layer.state = state._asdict()  # a new dict: a CUDA graph that was recorded on the old tensors is known by the old one
        if q.shape[1] == 1 and not torch.is_grad_enabled():
            out = block_sparse_step(q, k, v, state, rule=rule, scale=scale, start=start)
        else:
            out, state = block_sparse_extend(q, k, v, state, rule=rule, scale=scale, start=start)
            layer.state = state._asdict()
        return out.transpose(1, 2)
