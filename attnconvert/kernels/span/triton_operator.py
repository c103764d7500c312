"""`span_attention` on the kernels of triton.py: which are launched on what, gradients, and how PyTorch sees it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.launch import MAX_PLANS, Launch, Layout, Plan, signature
from attnconvert.kernels.registration import INTERPRETED, architecture, namespace, register, runs_here
from attnconvert.kernels.span.triton import MAX_HEAD_DIM, SINK_BLOCK, _blocks, forward_kernel, key_grad_kernel, query_grad_kernel, sink_grad_kernel

NAMESPACE = namespace(__name__)
SEGMENT_TOKENS = 1024  # queries whose gradients for a document's sinks are summed together, at least; a power of 2, as all blocks are
MAX_SEGMENTS = 32  # each has such sums, in fp32, for every KV head


def refusal(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    H, D = q.shape[2:]
    if q.dtype not in (torch.bfloat16, torch.float16) and not (q.dtype == torch.float32 and INTERPRETED):
        return f"dtype {q.dtype} is not bfloat16 or float16"
    if not q.is_cuda and not INTERPRETED:
        return f"the tensors are on {q.device.type}, the kernels need an NVIDIA GPU"
    if D > MAX_HEAD_DIM:
        return f"head_dim {D} is larger than {MAX_HEAD_DIM}"
    if H % k.shape[2]:
        return f"{H} query heads are not a multiple of {k.shape[2]} key-value heads"
    return None


def _recipe(q: Any, k: Any, start: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(blocks, the constexprs that all kernels share) for tensors of such signatures."""
    (_, _, H, D), _, dtype, device = q
    G = k[0][2]
    blocks = _blocks(D, dtype != torch.float32, architecture(device))
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return blocks, {"R": H // G, "D": D, "DP": blocks["DP"], "HAS_START": start is not None, "PREC": precision}


@functools.lru_cache(MAX_PLANS)
def _forward_plan(tensors: tuple[Any, ...], num_sinks: int, scale: float) -> Plan:
    """Launch of the forward pass. tensors: signatures of q, k, v, alpha, beta, least, start."""
    q, k, v, _, _, _, start = tensors
    (B, T, H, _), G = q[0], k[0][2]
    blocks, flags = _recipe(q, k, start)
    BM, BN, options = blocks["forward"]
    tiles = -(-T // BM)
    arguments = (
        "q",
        "k",
        "v",
        "output",
        "lse",
        "alpha",
        "beta",
        "least",
        "start" if start else None,
        *q[1][:3],
        *k[1][:3],
        *v[1][:3],
        T,
        tiles,
        B,
        G,
        num_sinks,
        scale,
    )
    launch = Launch(forward_kernel, (B * H * tiles,), arguments, flags | {"GP": triton.next_power_of_2(G), "BM": BM, "BN": BN}, options)
    return Plan(q[3], ("q", "k", "v", "alpha", "beta", "least", "start", "output", "lse"), [launch], {})


def _forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, least: Tensor, start: Tensor | None, num_sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward pass. alpha, beta, least, start: int32, contiguous. -> output [B, T, H, D], log2 of softmax denominators fp32 [B, H, T]."""
    output, lse = _forward_shapes(q, k, v, alpha, beta, least, start, num_sinks, scale)
    if q.numel():
        inputs = (q, k, v, alpha, beta, least, start)
        _forward_plan(signature(*inputs), min(num_sinks, q.shape[1]), scale)(*inputs, output, lse)
    return output, lse


@functools.lru_cache(MAX_PLANS)
def _backward_plan(tensors: tuple[Any, ...], num_sinks: int, scale: float) -> tuple[Plan, Layout]:
    """Launches of the backward pass, and their memory. tensors: signatures of q, k, v, alpha, beta, least, start and the output's gradient."""
    q, k, v, _, _, _, start, grad = tensors
    (B, T, H, D), G = q[0], k[0][2]
    blocks, flags = _recipe(q, k, start)
    segment = max(SEGMENT_TOKENS, triton.next_power_of_2(-(-T // MAX_SEGMENTS)))
    segments = -(-T // segment)
    sinks = -(-num_sinks // SINK_BLOCK) * SINK_BLOCK
    layout = Layout()
    layout.add("delta", (B, H, T), torch.float32)
    layout.add("part", (B, G, segments, 2, sinks, D) if segments > 1 else (0,), torch.float32)
    rules = ("alpha", "beta", "least", "start" if start else None)
    strides = (*q[1][:3], *k[1][:3], *v[1][:3], *grad[1][:3])
    ranked = {"GP": triton.next_power_of_2(G)}
    launches = []
    for name, kernel in (("query", query_grad_kernel), ("sink", sink_grad_kernel), ("key", key_grad_kernel)):
        BM, BN, options = blocks[name]
        constants = flags | {"BM": BM, "BN": BN}
        if name == "query":
            tiles = -(-T // BM)
            arguments = ("q", "k", "v", "output", "grad", "lse", "delta", "dq", *rules, *strides, T, tiles, B, G, num_sinks, scale)
            launches.append(Launch(kernel, (B * H * tiles,), arguments, constants | ranked, options))
        elif name == "key":
            tiles = -(-T // BN)
            arguments = (
                "q",
                "k",
                "v",
                "grad",
                "lse",
                "delta",
                "part",
                "dk",
                "dv",
                *rules,
                *strides,
                T,
                tiles,
                B,
                G,
                num_sinks,
                segment,
                segments,
                sinks,
                scale,
            )
            launches.append(Launch(kernel, (B * G * tiles,), arguments, constants | ranked | {"HAS_SINKS": num_sinks > 0}, options))
        elif sinks and segments > 1:
            arguments = ("q", "k", "v", "grad", "lse", "delta", "part", *rules, *strides, T, G, num_sinks, segment, segments, scale)
            launches.append(Launch(kernel, (segments - 1, B * G, sinks // BN), arguments, constants, options))
    names = ("q", "k", "v", "alpha", "beta", "least", "start", "output", "lse", "grad", "dq", "dk", "dv", "scratch")
    return Plan(q[3], names, launches, {"scratch": layout}), layout


def _backward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, least: Tensor, start: Tensor | None, output: Tensor, lse: Tensor, grad: Tensor, num_sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v. output, lse: of the forward pass."""
    gradients = _backward_shapes(q, k, v, alpha, beta, least, start, output, lse, grad, num_sinks, scale)
    if q.numel():
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        inputs = (q, k, v, alpha, beta, least, start)
        plan, layout = _backward_plan(signature(*inputs, grad), min(num_sinks, q.shape[1]), scale)
        plan(*inputs, output, lse, grad, *gradients, layout.allocate(q.device))
    return gradients


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, least: Tensor, start: Tensor | None, num_sinks: int, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(B, H, T, dtype=torch.float32, device=q.device)


def _backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, least: Tensor, start: Tensor | None, output: Tensor, lse: Tensor, grad: Tensor, num_sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


_LIBRARY = None  # of an earlier execution of this module
_LIBRARY = register(NAMESPACE, {"span_attention_forward": (_forward, _forward_shapes), "span_attention_backward": (_backward, _backward_shapes)})
_forward_op = getattr(torch.ops, NAMESPACE).span_attention_forward.default
_backward_op = getattr(torch.ops, NAMESPACE).span_attention_backward.default


class _SpanAttention(torch.autograd.Function):
    """Gradients of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, least: Tensor, start: Tensor | None, num_sinks: int, scale: float
    ) -> Tensor:
        run: Any = _forward if runs_here(q) else _forward_op
        output, lse = run(q, k, v, alpha, beta, least, start, num_sinks, scale)
        ctx.save_for_backward(q, k, v, alpha, beta, least, start, output, lse)
        ctx.options = (num_sinks, scale)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: Any = _backward if runs_here(grad) else _backward_op
        return *run(*ctx.saved_tensors, grad, *ctx.options), *[None] * 6


def triton_span_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: Tensor, beta: Tensor, num_sinks: int, scale: float, least: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`reference.span_attention` on Triton kernels; the same arguments. Products take q's dtype, sums are fp32; nothing is read on the host."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    k, v = (x if x.dtype == q.dtype else x.to(q.dtype) for x in (k, v))
    least = torch.ones_like(alpha) if least is None else least
    alpha, beta, least = (x.to(device=q.device, dtype=torch.int32).contiguous() for x in (alpha, beta, least))
    starts = None if start is None else start.to(torch.int32).contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _SpanAttention.apply(q, k, v, alpha, beta, least, starts, num_sinks, scale)  # type: ignore[no-any-return]
    run: Any = _forward if runs_here(q) else _forward_op
    return run(q, k, v, alpha, beta, least, starts, num_sinks, scale)[0]  # type: ignore[no-any-return]
