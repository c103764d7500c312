"""The operator's entry point: chooses between the PyTorch reference and the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from attnconvert.kernels.blocks.reference import block_sparse_attention as reference_block_sparse_attention
from attnconvert.kernels.blocks.rule import BlockRule
from attnconvert.kernels.choice import HAS_TRITON, Impl, use_triton


def refusal(q: Tensor, k: Tensor, rule: BlockRule) -> str | None:
    """Why the Triton kernels cannot take these inputs, or None."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    from attnconvert.kernels.blocks.triton_operator import refusal as kernel_refusal

    return kernel_refusal(q, k, rule)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rule: BlockRule, scale: float, start: Tensor | None = None, aligned: bool = False, impl: Impl = "auto"
) -> Tensor:
    """Attention in which each token sees the blocks of keys that score best for it; see `reference.block_sparse_attention` for the arguments.

    Args:
        aligned: a promise that every document in `start` begins at a multiple of the block size and that there is no padding except behind a row's
            last document. Without it, or with blocks below 64 tokens, the kernels read `start` on the host and move tokens to where that is true; the reference does not need it.
        impl: `reference` (PyTorch: any device, any dtype), `triton` (NVIDIA GPUs), or `auto`: triton for bf16 and fp16 on CUDA wherever it
            can, else the reference, with the reason logged once. The environment variable ATTNCONVERT_IMPL replaces `auto`.

    Raises:
        ValueError: `triton` was asked for and cannot take these inputs; it never falls back. Or impl is none of the three.
    """
    if not use_triton(impl, q, lambda: refusal(q, k, rule), "block-sparse attention"):
        return reference_block_sparse_attention(q, k, v, rule=rule, scale=scale, start=start)
    from attnconvert.kernels.blocks.triton_operator import triton_block_sparse_attention

    return triton_block_sparse_attention(q, k, v, rule=rule, scale=scale, start=start, aligned=aligned)
