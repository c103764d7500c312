"""The operator's entry point: chooses between the PyTorch reference and the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from attnconvert.kernels.choice import HAS_TRITON, Impl, use_triton
from attnconvert.kernels.heads.reference import routed_attention as reference_routed_attention


def refusal(q: Tensor, k: Tensor, active: Tensor) -> str | None:
    """Why the Triton kernels cannot take these inputs, or None."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    from attnconvert.kernels.heads.triton_operator import refusal as kernel_refusal

    return kernel_refusal(q, k, active)


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gate: Tensor | None = None, *, scale: float, start: Tensor | None = None, causal: bool = True,
    impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attention in which each token uses some of the heads; see `reference.routed_attention` for the arguments.

    Args:
        impl: `reference` (PyTorch: any device, any dtype), `triton` (NVIDIA GPUs), or `auto`: triton for bf16 and fp16 on CUDA wherever it
            can, else the reference, with the reason logged once. The environment variable ATTNCONVERT_IMPL replaces `auto`.

    Raises:
        ValueError: `triton` was asked for and cannot take these inputs; it never falls back. Or impl is none of the three.
    """
    if not use_triton(impl, q, lambda: refusal(q, k, active), "attention with routed heads"):
        return reference_routed_attention(q, k, v, active, gate, scale=scale, start=start, causal=causal)
    from attnconvert.kernels.heads.triton_operator import triton_routed_attention

    return triton_routed_attention(q, k, v, active, gate, scale=scale, start=start, causal=causal)
