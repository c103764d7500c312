"""Which units each token uses, from scores or from the norms of queries; the entry point, and its PyTorch form.

Shapes: B batch, T tokens, H query heads, D head_dim, U units, E routed units, the other U - E being shared. A token uses all shared units and the `num_chosen`
routed ones with the highest scores, of equal ones the first. Scores that are not numbers count as the highest, so that the number is always the same.

`columns`, int64 [U], says where the scores of each unit are: of a routed unit its number among the routed ones, of a shared one a negative number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnconvert.kernels.choice import HAS_TRITON, Impl, in_this_process

MAX_UNITS = 128  # of the kernel, which compares each with each


def unit_norms(q: Tensor, num_units: int) -> Tensor:
    """The L2 norm of each unit's queries, [B, T, U] in fp32 (fp64 for fp64). q: [B, T, H, D]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(q.unflatten(2, (num_units, -1)), dim=(-2, -1), dtype=wide)
    return norms


def route_scores(scores: Tensor, columns: Tensor, num_chosen: int, *, impl: Impl = "auto") -> Tensor:
    """Units that each token uses, bool [B, T, U]. No gradients.

    Args:
        scores: [B, T, E], of the routed units.
        columns: see above.
        num_chosen: routed units that a token uses.
        impl: `reference` (PyTorch), `triton` (one launch), or `auto`: triton on CUDA where it can.

    Raises:
        ValueError: `triton` was asked for and cannot take these inputs; or impl is none of the three.
    """
    if _takes_triton(impl, scores, columns):
        from attnconvert.kernels.heads.triton_routing import triton_route

        return triton_route(scores, columns, num_chosen)
    return _chosen(scores.detach()[..., columns.clamp_min(0)], columns, num_chosen)


def route_queries(q: Tensor, columns: Tensor, num_chosen: int, *, impl: Impl = "auto") -> Tensor:
    """`route_scores` with the scores `unit_norms(q, U)` of the routed units, one launch in Triton. q: [B, T, H, D]."""
    if _takes_triton(impl, q, columns):
        from attnconvert.kernels.heads.triton_routing import triton_route

        return triton_route(q, columns, num_chosen)
    return _chosen(unit_norms(q.detach(), len(columns)), columns, num_chosen)


def _chosen(scores: Tensor, columns: Tensor, num_chosen: int) -> Tensor:
    """Bool [B, T, U] from the scores of all units [B, T, U]; those of shared ones mean nothing."""
    shared = columns < 0
    scores = scores.clamp_min(torch.finfo(scores.dtype).min).masked_fill(shared, -torch.inf)  # behind all others
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_chosen]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) | shared


def _takes_triton(impl: Impl, x: Tensor, columns: Tensor) -> bool:
    """Whether the kernel runs: for fp32 too, since nothing is multiplied here that tensor cores would round."""
    impl = in_this_process(impl)
    if impl == "reference" or (impl == "auto" and not x.is_cuda):
        return False
    why = "the package triton is not installed" if not HAS_TRITON else _refusal(x, columns)
    if impl == "triton" and why is not None:
        raise ValueError(f"impl='triton' cannot run here: {why}; use impl='auto' or 'reference'")
    return why is None


def _refusal(x: Tensor, columns: Tensor) -> str | None:
    from attnconvert.kernels.registration import INTERPRETED

    if not x.is_cuda and not INTERPRETED:
        return f"the tensors are on {x.device.type}, the kernel needs an NVIDIA GPU"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"no kernel for {x.dtype}"
    if len(columns) > MAX_UNITS:
        return f"{len(columns)} units are more than {MAX_UNITS}"
    return None
