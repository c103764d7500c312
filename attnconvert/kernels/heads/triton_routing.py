"""The choice of routed units in one Triton launch: a program has one token, and ranks its units by comparing each with each.

In PyTorch it is a dozen launches, norms, a sort and what makes a mask of its indices: in a decode step of a small batch more time than reading the keys takes.
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
OPTIONS = {"num_warps": 4, "num_stages": 2}
TILE = 8192  # numbers of queries that a program looks at together


@triton.jit
def route_kernel(
    X, COLUMNS, ACTIVE, x_sb, x_st, x_sh, T, num_chosen,
    U: tl.constexpr, UP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B T,). X: queries [B, T, H, D], WIDTH numbers of each unit, or, where WIDTH is 0, scores [B, T, E]. ACTIVE [B, T, U], 0 or 1."""
    token = tl.program_id(0).to(tl.int64)
    X += token // T * x_sb + token % T * x_st
    unit = tl.arange(0, UP)
    column = tl.load(COLUMNS + unit, mask=unit < U, other=-1)
    routed = column >= 0
    if WIDTH == 0:
        score = tl.load(X + column, mask=routed, other=0.0).to(tl.float32)
    else:
        squares = tl.zeros([UP], tl.float32)
        for first in tl.static_range(0, WIDTH, BLOCK):
            at = first + tl.arange(0, BLOCK)
            there = routed[:, None] & (at < WIDTH)[None, :]
            x = tl.load(X + (unit[:, None] * (WIDTH // D) + (at // D)[None, :]) * x_sh + (at % D)[None, :], mask=there, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, 1)
        score = tl.sqrt_rn(squares)
    score = tl.where(score == score, score, float("inf"))
    before = (score[:, None] > score[None, :]) | ((score[:, None] == score[None, :]) & (unit[:, None] < unit[None, :]))
    rank = tl.sum((before & routed[:, None]).to(tl.int32), 0)
    tl.store(ACTIVE + token * U + unit, ((rank < num_chosen) | (column < 0)).to(tl.int8), mask=unit < U)


def _constants(num_units: int, width: int, D: int) -> dict[str, Any]:
    """Constexprs. width: numbers of a unit's queries, 0 for scores."""
    UP = triton.next_power_of_2(num_units)
    return {"U": num_units, "UP": UP, "WIDTH": width, "D": D, "BLOCK": min(triton.next_power_of_2(max(width, 1)), TILE // UP)}


@functools.lru_cache(MAX_PLANS)
def _plan(tensors: tuple[Any, ...], num_chosen: int) -> Plan:
    """tensors: signatures of x and columns."""
    x, columns = tensors
    (B, T, *heads), (num_units,) = x[0], columns[0]
    constants = _constants(num_units, heads[0] * heads[1] // num_units, heads[1]) if len(heads) == 2 else _constants(num_units, 0, 1)
    arguments = ("x", "columns", "active", *x[1][:2], x[1][2] if len(heads) == 2 else 0, T, num_chosen)
    return Plan(x[3], ("x", "columns", "active"), [Launch(route_kernel, (B * T,), arguments, constants, OPTIONS)], {})


def _route(x: Tensor, columns: Tensor, num_chosen: int) -> Tensor:
    active = _shapes(x, columns, num_chosen)
    if active.numel():
        _plan(signature(x, columns), num_chosen)(x, columns, active.view(torch.uint8))
    return active


def _shapes(x: Tensor, columns: Tensor, num_chosen: int) -> Tensor:
    return torch.empty(*x.shape[:2], columns.shape[0], dtype=torch.uint8, device=x.device).view(torch.bool)


_LIBRARY = None  # of an earlier execution of this module
_LIBRARY = register(NAMESPACE, {"route": (_route, _shapes)})
_op = getattr(torch.ops, NAMESPACE).route.default


def triton_route(x: Tensor, columns: Tensor, num_chosen: int) -> Tensor:
    """`routing.route_scores` for scores [B, T, E], `routing.route_queries` for queries [B, T, H, D]."""
    x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
    run: Any = _route if runs_here(x) else _op
    return run(x, columns, num_chosen)  # type: ignore[no-any-return]


# units, query heads, head_dim (0: scores)
_SHIPPED = ((8, 32, 128), (32, 32, 128), (3, 9, 64), (128, 128, 128), (4, 8, 256), (8, 8, 0), (128, 128, 0))


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability; nothing depends on it.
    """
    configs = []
    for num_units, H, D in _SHIPPED:
        constants = _constants(num_units, H * D // num_units, max(D, 1))
        types = {"X": "*bf16" if D else "*fp32", "COLUMNS": "*i64", "ACTIVE": "*u8", "T": "i32", "num_chosen": "i32"}
        types |= dict.fromkeys(("x_sb", "x_st", "x_sh"), "i32:16" if D else "i32")
        name = f"heads-route_kernel-u{num_units}" + (f"-h{H}-d{D}" if D else "-scores")
        configs.append((name, route_kernel, types, constants, OPTIONS, 0))
    return configs
