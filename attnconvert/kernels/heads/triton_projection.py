"""A linear map of few rows in one Triton launch that reads no weights which would be multiplied by zeros.

A program has ROWS outputs of one input row. It looks at its input first and then asks for those segments of the weights' rows that meet something: a predicated load
that is off reads no memory. Every output has one owner and a fixed order of its sum.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.launch import MAX_PLANS, Launch, Plan, signature
from attnconvert.kernels.registration import namespace, register, runs_here

NAMESPACE = namespace(__name__)
SEGMENT = 32  # neighbouring numbers that are looked at together; in 16 bit two sectors of memory


@triton.jit
def project_kernel(
    X, W, BIAS, Y, N, K, ROWS: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """Grid (rows of X, N / ROWS). X [rows, K], W [N, K], Y [rows, N]; K a multiple of SEGMENT."""
    X += tl.program_id(0).to(tl.int64) * K
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    segment, within = tl.arange(0, BLOCK // SEGMENT), tl.arange(0, SEGMENT)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None, None] * K
    total = tl.zeros([ROWS, BLOCK // SEGMENT, SEGMENT], tl.float32)
    for first in range(0, K, BLOCK):
        begin = first + segment * SEGMENT
        at = begin[:, None] + within[None, :]
        x = tl.load(X + at, mask=(begin < K)[:, None], other=0.0).to(tl.float32)
        some = tl.max((x != 0).to(tl.int32), 1) != 0
        w = tl.load(W + row + at[None, :, :], mask=some[None, :, None], other=0.0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x[None, :, :]
    y = tl.sum(tl.sum(total, 2), 1)
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(Y + tl.program_id(0).to(tl.int64) * N + n, y.to(Y.dtype.element_ty), mask=n < N)


def _constants(K: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Constexprs and launch options."""
    if K % 4096 == 0:  # measured on an H100 for 2048, 3072, 4096 and 8192
        rows, block, warps = 2, 4096, 4
    else:
        rows, block, warps = (2, 1024, 2) if K <= 2048 else (4, 512, 2)
    return {"ROWS": rows, "BLOCK": block, "SEGMENT": SEGMENT}, {"num_warps": warps, "num_stages": 1}


@functools.lru_cache(MAX_PLANS)
def _plan(tensors: tuple[Any, ...], num_rows: int) -> Plan:
    """tensors: signatures of x, weight and bias."""
    x, weight, bias = tensors
    N, K = weight[0]
    constants, options = _constants(K)
    launch = Launch(project_kernel, (num_rows, -(-N // constants["ROWS"])), ("x", "weight", "bias" if bias else None, "y", N, K), constants, options)
    return Plan(x[3], ("x", "weight", "bias", "y"), [launch], {})


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _shapes(x, weight, bias)
    if y.numel():
        _plan(signature(x, weight, bias), x.numel() // weight.shape[1])(x, weight, bias, y)
    return y


def _shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)


_LIBRARY = None  # of an earlier execution of this module
_LIBRARY = register(NAMESPACE, {"project": (_project, _shapes)})
_op = getattr(torch.ops, NAMESPACE).project.default


def triton_project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product x W^T + bias without gradients, [..., K] -> [..., N]; weight [N, K] contiguous, K a multiple of SEGMENT."""
    run: Any = _project if runs_here(x) else _op
    return run(x.detach().contiguous(), weight.detach(), None if bias is None else bias.detach())  # type: ignore[no-any-return]


_SHIPPED = ((4096, 4096, False), (576, 576, False), (5120, 5120, False), (8192, 8192, False), (256, 256, True))  # outputs, inputs, bias


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability; nothing depends on it.
    """
    configs = []
    types = {**dict.fromkeys(("X", "W", "BIAS", "Y"), "*bf16"), "N": "i32:16", "K": "i32:16"}
    for N, K, has_bias in _SHIPPED:
        constants, options = _constants(K)
        name = f"heads-project_kernel-{N}x{K}" + "-bias" * has_bias
        configs.append((name, project_kernel, types, constants | ({} if has_bias else {"BIAS": None}), options, 0))
    return configs
