"""`routed_attention` on the kernels of triton.py: which are launched on what, gradients, and how PyTorch sees it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attnconvert.kernels.heads.triton import (
    LIST_BLOCK,
    LIST_OPTIONS,
    MAX_HEAD_DIM,
    MAX_TILE,
    _blocks,
    forward_kernel,
    key_grad_kernel,
    list_kernel,
    list_programs,
    query_grad_kernel,
)
from attnconvert.kernels.launch import MAX_PLANS, Launch, Layout, Plan, signature
from attnconvert.kernels.registration import INTERPRETED, architecture, namespace, register, runs_here

NAMESPACE = namespace(__name__)


def refusal(q: Tensor, k: Tensor, active: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    H, D = q.shape[2:]
    G, U = k.shape[2], active.shape[2]
    if q.dtype not in (torch.bfloat16, torch.float16) and not (q.dtype == torch.float32 and INTERPRETED):
        return f"dtype {q.dtype} is not bfloat16 or float16"
    if not q.is_cuda and not INTERPRETED:
        return f"the tensors are on {q.device.type}, the kernels need an NVIDIA GPU"
    if D > MAX_HEAD_DIM:
        return f"head_dim {D} is larger than {MAX_HEAD_DIM}"
    if H % G:
        return f"{H} query heads are not a multiple of {G} key-value heads"
    if U not in (G, H):
        return f"{U} units are neither {G} key-value heads nor {H} query heads"
    return None


def _recipe(q: Any, k: Any, active: Any, has_gate: bool, start: Any, causal: bool) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """(blocks, the constexprs that all kernels with queries share, tokens between the counts of a list, how many of those) for tensors of such signatures."""
    (_, T, H, D), _, dtype, device = q
    G = k[0][2]
    blocks = _blocks(D, dtype != torch.float32, architecture(device))
    flags = {"R": H // G, "UNITS": active[0][2] // G, "D": D, "DP": blocks["DP"], "HAS_GATE": has_gate, "HAS_START": start is not None}
    flags["CAUSAL"] = causal
    flags["PREC"] = "ieee" if dtype == torch.float32 else "tf32"
    grain = blocks["key"][1]
    return blocks, flags, grain, -(-T // grain)


def _padded(T: int) -> int:
    """What there is room for in the order of ranks: whole tiles."""
    tile: int = MAX_TILE.value
    return (T + tile - 1) // tile * tile


@functools.lru_cache(MAX_PLANS)
def _forward_plan(tensors: tuple[Any, ...], scale: float, causal: bool) -> Plan:
    """Launches of the forward pass. tensors: signatures of q, k, v, active, gate, start."""
    q, k, v, active, gate, start = tensors
    (B, T, H, _), (G, U) = q[0], (k[0][2], active[0][2])
    blocks, flags, grain, N = _recipe(q, k, active, gate is not None, start, causal)
    BM, BN, options = blocks["forward"]
    tiles = -(-T // BM)
    gates = "gates" if gate else None
    constants = {"GRAIN": grain, "BLOCK": LIST_BLOCK, "HAS_GATE": gate is not None}
    listing = ("active", "gate" if gate else None, "index", gates, "before", T, U, N)
    strides = (*q[1][:3], *k[1][:3], *v[1][:3])
    arguments = ("q", "k", "v", "output", "lse", "active", "index", gates, "before", "start" if start else None, *strides, T, tiles, G, N, scale)
    launches = [
        Launch(list_kernel, (list_programs(B * U, N, grain),), listing, constants, LIST_OPTIONS),
        Launch(forward_kernel, (B * H * tiles,), arguments, flags | {"BM": BM, "BN": BN}, options),
    ]
    return Plan(q[3], ("q", "k", "v", "active", "gate", "start", "output", "lse", "index", "before", "gates"), launches, {})


def _forward(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gate: Tensor | None, start: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward pass. active, gate, start (int32): contiguous.

    Returns:
        output [B, T, H, D]; log2 of softmax denominators, fp32 [B, H, T padded], of the i-th token that uses the head; INDEX, BEFORE and GATES of `list_kernel`,
        the last empty without gates.
    """
    results = _forward_shapes(q, k, v, active, gate, start, scale, causal)
    if q.numel():
        inputs = (q, k, v, active.view(torch.uint8), gate, start)
        _forward_plan(signature(*inputs), scale, causal)(*inputs, *results)
    return results


@functools.lru_cache(MAX_PLANS)
def _backward_plan(tensors: tuple[Any, ...], has_gate: bool, scale: float, causal: bool) -> tuple[Plan, Layout]:
    """Launches of the backward pass, and their memory. tensors: signatures of q, k, v, active, start and the output's gradient."""
    q, k, v, active, start, grad = tensors
    (B, T, H, _), G = q[0], k[0][2]
    blocks, flags, _, N = _recipe(q, k, active, has_gate, start, causal)
    layout = Layout()
    layout.add("delta", (B, H, _padded(T)), torch.float32)
    lists = ("index", "gates" if has_gate else None, "before", "start" if start else None)
    strides = (*q[1][:3], *k[1][:3], *v[1][:3], *grad[1][:3])
    BM, BN, options = blocks["query"]
    tiles = -(-T // BM)
    arguments = ("q", "k", "v", "output", "grad", "lse", "delta", "dot" if has_gate else None, "dq", "active", *lists, *strides, T, tiles, G, N, scale)
    launches = [Launch(query_grad_kernel, (B * H * tiles,), arguments, flags | {"BM": BM, "BN": BN}, options)]
    BM, BN, options = blocks["key"]
    arguments = ("q", "k", "v", "grad", "lse", "delta", "dk", "dv", *lists, *strides, T, N, G, scale)
    launches.append(Launch(key_grad_kernel, (B * G * N,), arguments, flags | {"BM": BM, "BN": BN}, options))
    names = ("q", "k", "v", "active", "start", "output", "lse", "index", "before", "gates", "grad", "dq", "dk", "dv", "dot", "scratch")
    return Plan(q[3], names, launches, {"scratch": layout}), layout


def _backward(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, start: Tensor | None, output: Tensor, lse: Tensor, index: Tensor, before: Tensor, gates: Tensor,
    grad: Tensor, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, and, with gates, of each query head's factor, fp32 [B, T, H]. output .. gates: of the forward pass."""
    gradients = _backward_shapes(q, k, v, active, start, output, lse, index, before, gates, grad, scale, causal)
    if q.numel():
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        inputs = (q, k, v, active.view(torch.uint8), start)
        plan, layout = _backward_plan(signature(*inputs, grad), gates.numel() > 0, scale, causal)
        plan(*inputs, output, lse, index, before, gates, grad, *gradients, layout.allocate(q.device))
    return gradients


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gate: Tensor | None, start: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, D), U = q.shape, active.shape[2]
    grain = _blocks(D, q.dtype != torch.float32, architecture(q.get_device() if q.is_cuda else -1))["key"][1]
    index = torch.empty(B, U, T, dtype=torch.int32, device=q.device)
    before = torch.empty(B, U, (T + grain - 1) // grain + 1, dtype=torch.int32, device=q.device)
    gates = torch.zeros((0,) if gate is None else (B, U, _padded(T)), dtype=torch.float32, device=q.device)  # behind a list's end there are zeros
    lse = torch.empty(B, H, _padded(T), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse, index, before, gates


def _backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, start: Tensor | None, output: Tensor, lse: Tensor, index: Tensor, before: Tensor, gates: Tensor,
    grad: Tensor, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, torch.empty(q.shape[:3] if gates.dim() == 3 else (0,), dtype=torch.float32, device=q.device)


_LIBRARY = None  # of an earlier execution of this module
_LIBRARY = register(NAMESPACE, {"routed_attention_forward": (_forward, _forward_shapes), "routed_attention_backward": (_backward, _backward_shapes)})
_forward_op = getattr(torch.ops, NAMESPACE).routed_attention_forward.default
_backward_op = getattr(torch.ops, NAMESPACE).routed_attention_backward.default


class _RoutedAttention(torch.autograd.Function):
    """Gradients of q, k, v and gate."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, active: Tensor, gate: Tensor | None, start: Tensor | None, scale: float, causal: bool) -> Tensor:
        run: Any = _forward if runs_here(q) else _forward_op
        output, lse, index, before, gates = run(q, k, v, active, gate, start, scale, causal)
        ctx.save_for_backward(q, k, v, active, start, output, lse, index, before, gates)
        ctx.scale, ctx.causal, ctx.gate_dtype = scale, causal, None if gate is None else gate.dtype
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: Any = _backward if runs_here(grad) else _backward_op
        dq, dk, dv, dot = run(*ctx.saved_tensors, grad, ctx.scale, ctx.causal)
        units = ctx.saved_tensors[3].shape[2]
        dgate = None if ctx.gate_dtype is None else dot.unflatten(2, (units, -1)).sum(3).to(ctx.gate_dtype)
        return dq, dk, dv, None, dgate, None, None, None


def triton_routed_attention(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gate: Tensor | None = None, *, scale: float, start: Tensor | None = None, causal: bool = True
) -> Tensor:
    """`reference.routed_attention` on Triton kernels; the same arguments. Products take q's dtype, sums are fp32; nothing is read on the host."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    k, v = (x if x.dtype == q.dtype else x.to(q.dtype) for x in (k, v))
    active, gate = active.contiguous(), None if gate is None else gate.contiguous()
    starts = None if start is None else start.to(torch.int32).contiguous()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gate)):
        return _RoutedAttention.apply(q, k, v, active, gate, starts, scale, causal)  # type: ignore[no-any-return]
    run: Any = _forward if runs_here(q) else _forward_op
    return run(q, k, v, active, gate, starts, scale, causal)[0]  # type: ignore[no-any-return]
