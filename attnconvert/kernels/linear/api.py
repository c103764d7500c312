"""The operator's entry point: chooses between the PyTorch reference and the Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from attnconvert.kernels.choice import HAS_TRITON, Impl, use_triton
from attnconvert.kernels.linear.reference import LinearOutput, LinearState
from attnconvert.kernels.linear.reference import linear_attention as reference_linear_attention


@functools.cache
def _compiled_reference() -> Callable[..., LinearOutput]:
    """The reference, compiled once for all layers: weights are arguments, so 30 layers share one graph."""
    return torch.compile(reference_linear_attention, dynamic=False)


def refusal(
    q: Tensor, k: Tensor, v: Tensor, query_map: Tensor | None, key_map: Tensor | None, linear_log_weight: Tensor, query_gate: Tensor | None, key_gate: Tensor | None, with_state: bool
) -> str | None:  # fmt: skip
    """Why the Triton kernels cannot take these inputs, or None. with_state: an initial state, or a final one is asked for."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    from attnconvert.kernels.linear.triton_operator import refusal as kernel_refusal

    inputs = (q, k, v, query_map, key_map, linear_log_weight, query_gate, key_gate)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return kernel_refusal(q, k, query_map=query_map, linear_log_weight=linear_log_weight, needs_grad=needs_grad, has_state=with_state)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, window_kind: str, num_sinks: int, scale: float, query_map: Tensor | None, key_map: Tensor | None, linear_log_weight: Tensor,
    query_gate: Tensor | None = None, key_gate: Tensor | None = None, reference: str = "absolute", start: Tensor | None = None, aligned: bool = False,
    initial_state: LinearState | None = None, output_final_state: bool = False, impl: Impl = "auto", compile_reference: bool = False,
) -> LinearOutput:  # fmt: skip
    """Softmax over window and sinks plus Hedgehog linear attention over the rest; see `reference.linear_attention` for the arguments.

    Args:
        impl: `reference` (PyTorch: any device, any dtype, gradients through states), `triton` (NVIDIA GPUs), or `auto`: triton for bf16 and fp16
            on CUDA wherever it can, else the reference, with the reason logged once. The environment variable ATTNCONVERT_IMPL
            replaces `auto`.
        compile_reference: where it is the reference that runs, run it through torch.compile.

    Raises:
        ValueError: `triton` was asked for and cannot take these inputs; it never falls back. Or impl is none of the three.
    """
    with_state = initial_state is not None or output_final_state
    if not use_triton(impl, q, lambda: refusal(q, k, v, query_map, key_map, linear_log_weight, query_gate, key_gate, with_state), "linear attention"):
        operator: Callable[..., LinearOutput] = _compiled_reference() if compile_reference else reference_linear_attention
    else:
        from attnconvert.kernels.linear.triton_operator import triton_linear_attention

        operator = triton_linear_attention
    return operator(
        q, k, v, window_size=window_size, window_kind=window_kind, num_sinks=num_sinks, scale=scale, query_map=query_map, key_map=key_map, linear_log_weight=linear_log_weight,
        query_gate=query_gate, key_gate=key_gate, reference=reference, start=start, aligned=aligned, initial_state=initial_state, output_final_state=output_final_state,
    )  # fmt: skip
