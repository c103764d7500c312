"""States of many rows in one pool, of which each decode step uses some: how serving engines keep the states of their requests.

A pool is a state whose tensors have more rows than a batch; `slots` says which of them a batch uses. The Triton forms of the steps look there themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_slots(slots: Tensor | None, batch_size: int) -> None:
    """Raises ValueError where slots are not int64 [B]. What they are, only the device knows."""
    if slots is not None and (slots.shape != (batch_size,) or slots.dtype != torch.int64):
        raise ValueError(f"slots are {slots.dtype} {list(slots.shape)}; they say which row of the pool each row of the batch uses: int64 [{batch_size}]")


def rows_are_whole(tensor: Tensor) -> bool:
    """Whether each row is contiguous, wherever the rows lie."""
    return tensor.is_contiguous() or tensor[:1].is_contiguous()


def step_in_pool(step: Callable[[Any, Tensor], Tensor], pool: Any, slots: Tensor, start: Tensor | None) -> Tensor:
    """A PyTorch step on rows of a pool: they are taken out, stepped and put back. Asks the device for nothing.

    Args:
        step: (state, start) -> output [B, 1, H, D]; changes the state in place, and leaves a row with a positive start alone.
        pool: a named tuple of tensors with rows first; changed in place.
        slots: [B] int64, different rows of the pool; -1 = the row of the batch is padding.
        start: [B, 1] or None, as in the step.

    Returns:
        The step's output, 0 in rows of padding.
    """
    used = slots >= 0
    # Padding goes with the first row that is used: whoever is last to put that row back puts back the same.
    source = torch.where(used, torch.arange(len(slots), device=slots.device), used.to(torch.uint8).argmax())
    rows = slots[source].clamp_min(0)
    state = type(pool)(*(tensor[rows] for tensor in pool))
    out = step(state, torch.where(used, 0 if start is None else start[:, 0], 1)[:, None])
    for tensor, new in zip(pool, state, strict=True):
        tensor[rows] = new[source]
    return out
