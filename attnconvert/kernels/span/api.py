"""The operator's entry point: chooses between the PyTorch reference and the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from attnconvert.kernels.choice import HAS_TRITON, Impl, use_triton
from attnconvert.kernels.span.reference import span_attention as reference_span_attention


def refusal(q: Tensor, k: Tensor) -> str | None:
    """Why the Triton kernels cannot take these inputs, or None."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    from attnconvert.kernels.span.triton_operator import refusal as kernel_refusal

    return kernel_refusal(q, k)


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: Tensor, beta: Tensor, num_sinks: int, scale: float, least: Tensor | None = None,
    start: Tensor | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attention in which every KV head has its own span; see `reference.span_attention` for the arguments.

    Args:
        impl: `reference` (PyTorch: any device, any dtype), `triton` (NVIDIA GPUs), or `auto`: triton for bf16 and fp16 on CUDA wherever it
            can, else the reference, with the reason logged once. The environment variable ATTNCONVERT_IMPL replaces `auto`.

    Raises:
        ValueError: `triton` was asked for and cannot take these inputs; it never falls back. Or impl is none of the three.
    """
    if not use_triton(impl, q, lambda: refusal(q, k), "span attention"):
        return reference_span_attention(q, k, v, alpha=alpha, beta=beta, num_sinks=num_sinks, scale=scale, least=least, start=start)
    from attnconvert.kernels.span.triton_operator import triton_span_attention

    return triton_span_attention(q, k, v, alpha=alpha, beta=beta, num_sinks=num_sinks, scale=scale, least=least, start=start)
