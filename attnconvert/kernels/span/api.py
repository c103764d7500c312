"""The operator's entry point: chooses between the PyTorch reference and the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from attnconvert.kernels.choice import HAS_TRITON, Impl, in_this_process, log_once
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
    why = None
    impl = in_this_process(impl)
    if impl != "reference":
        if impl == "auto" and not q.is_cuda:
            why = f"the tensors are on {q.device.type}"
        elif impl == "auto" and q.dtype not in (torch.bfloat16, torch.float16):
            why = f"{q.dtype} inputs ask for exact products"
        else:
            why = refusal(q, k)
        if impl == "triton" and why is not None:
            raise ValueError(f"impl='triton' cannot run here: {why}; use impl='auto' or 'reference'")
        if why is not None and q.is_cuda and not torch.compiler.is_compiling():
            log_once(f"span attention runs in PyTorch, not in Triton: {why}")
    if impl == "reference" or why is not None:
        return reference_span_attention(q, k, v, alpha=alpha, beta=beta, num_sinks=num_sinks, scale=scale, least=least, start=start)
    from attnconvert.kernels.span.triton_operator import triton_span_attention

    return triton_span_attention(q, k, v, alpha=alpha, beta=beta, num_sinks=num_sinks, scale=scale, least=least, start=start)
