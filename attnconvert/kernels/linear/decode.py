"""One decode step of the linear-attention operator: one new token a row, the state updated in place.

Same maths as `reference.linear_attention` with an initial state and T = 1 (its docstring has the formulas and the letters), but nothing is
allocated for the state, nothing waits for the device, and every tensor keeps its address: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnconvert.kernels.choice import HAS_TRITON, Impl, use_triton
from attnconvert.kernels.linear.reference import MAX_SHIFT, LinearState, feature_map, normalizer, normalizer_slot, window_start
from attnconvert.kernels.pool import check_slots, rows_are_whole, step_in_pool


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState,
    *,
    window_size: int,
    window_kind: str,
    num_sinks: int,
    scale: float,
    query_map: Tensor | None,
    key_map: Tensor | None,
    linear_log_weight: Tensor,
    query_gate: Tensor | None = None,
    key_gate: Tensor | None = None,
    reference: str = "absolute",
    start: Tensor | None = None,
    slots: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of the next token of each row; no gradients.

    Args:
        q: [B, 1, H, D], after RoPE and q/k norm. k, v: [B, 1, G, D].
        state: what `linear_attention` or `empty_state` returned for the same options; changed in place. Its rows may lie apart: all dimensions
            but the first are contiguous.
        window_size, window_kind, num_sinks, scale, query_map, key_map, linear_log_weight, query_gate, key_gate, reference: as in `linear_attention`.
        start: [B, 1] int64 or None. A row with a positive start has a padding token: its output is 0 and its state stays as it is. A
            step never starts a new document.
        slots: [B] int64 or None. Row b of the batch uses row slots[b] of the state, which then has any number of rows; no two use the same. -1 =
            the row is padding: its output is 0, and it has no state.
        impl: `reference` (PyTorch, any device), `triton`, or `auto`: triton for bf16 and fp16 on CUDA where it can, with the reason
            logged where it cannot.

    Returns:
        [B, 1, H, D] in q's dtype.

    Raises:
        ValueError: more than one token a row, a state or slots of another shape, or `triton` where it cannot run.
    """
    if q.shape[1] != 1:
        raise ValueError(f"a decode step takes one token a row, got {q.shape[1]}; use linear_attention with initial_state for more")
    check_slots(slots, q.shape[0])
    if (state.k.shape[1], state.sink_k.shape[2]) != (k.shape[2], num_sinks) or (slots is None and state.k.shape[0] != q.shape[0]):
        raise ValueError("the state was made for another batch size, number of heads or number of sinks")
    if not use_triton(impl, q, lambda: _refusal(q, k, v, state, query_map), "the decode step of linear attention"):

        def step(state: LinearState, start: Tensor | None) -> Tensor:
            return _step(q, k, v, state, window_size, window_kind, scale, query_map, key_map, linear_log_weight, query_gate, key_gate, reference, start)

        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return step(state, start) if slots is None else step_in_pool(step, state, slots, start)
    from attnconvert.kernels.linear.triton_decode import triton_linear_attention_step

    return triton_linear_attention_step(
        q, k, v, state, window_size, window_kind, scale, query_map, key_map, linear_log_weight, query_gate, key_gate, reference, start, slots
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_refusal(device_type: str, dtype: torch.dtype, head_dim: int, half_features: int, group: int) -> str | None:
    """Why no kernel takes such a step, or None; looks at the machine, which torch.compile cannot trace."""
    if not HAS_TRITON:
        return "triton is not installed"
    from attnconvert.kernels.linear.triton_decode import step_refusal

    refusal: str | None = step_refusal(device_type, dtype, head_dim, half_features, group)
    return refusal


def _refusal(q: Tensor, k: Tensor, v: Tensor, state: LinearState, query_map: Tensor | None) -> str | None:
    """Why the Triton form cannot take this step, or None."""
    if not q.dtype == k.dtype == v.dtype == state.k.dtype == state.v.dtype:
        return f"q, k, v and the state have several dtypes: {q.dtype}, {k.dtype}, {v.dtype}, {state.k.dtype}"
    if not all(rows_are_whole(tensor) for tensor in state):
        return "a row of the state is not contiguous"
    refusal: str | None = _kernel_refusal(q.device.type, q.dtype, q.shape[-1], 0 if query_map is None else query_map.shape[-1], q.shape[2] // state.kv.shape[1])
    return refusal


def _some(mask: Tensor) -> bool:
    """Whether the work behind a mask is worth doing; only the CPU can look without waiting."""
    return mask.device.type != "cpu" or torch.compiler.is_compiling() or bool(mask.any())


def _put(slots: Tensor, index: Tensor, new: Tensor, allowed: Tensor | None) -> None:
    """slots[b, :, index[b]] = new[b, 0] where allowed. slots: [B, G, n, D], index: [B], new: [B, 1, G, D], allowed: bool [B] or None."""
    where = index[:, None, None, None].expand(-1, slots.shape[1], 1, slots.shape[3])
    new = new.transpose(1, 2).to(slots.dtype)
    if allowed is not None:
        new = torch.where(allowed[:, None, None, None], new, slots.gather(2, where))
    slots.scatter_(2, where, new)


def _step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, window_size: int, kind: str, scale: float, query_map: Tensor | None, key_map: Tensor | None, linear_log_weight: Tensor,
    query_gate: Tensor | None, key_gate: Tensor | None, reference: str, start: Tensor | None,
) -> Tensor:  # fmt: skip
    """The PyTorch form."""
    B, _, H, D = q.shape
    G, A, num_slots = k.shape[2], state.sink_k.shape[2], state.k.shape[2]
    wide = state.kv.dtype
    valid = None if start is None else start[:, 0] <= 0
    position = state.length
    lo = window_start(position, window_size, kind)

    if num_slots:
        _put(state.k, position % num_slots, k, valid)
        _put(state.v, position % num_slots, v, valid)
    if A:
        first = position < A if valid is None else (position < A) & valid
        if _some(first):
            _put(state.sink_k, position.clamp(max=A - 1), k, first)
            _put(state.sink_v, position.clamp(max=A - 1), v, first)
    if query_map is not None:
        assert key_map is not None
        _fold(state, k, v, position, lo, window_size, kind, key_map, key_gate, valid)

    rows = q.to(wide).reshape(B, G, H // G, D)  # the rows of a KV group share one matmul
    scaled = rows * scale
    branches = []
    if A:
        seen = torch.arange(A, device=q.device) < torch.minimum(lo, position + 1)[:, None]
        branches.append((state.sink_k, state.sink_v, seen))
    if num_slots:
        held = position[:, None] - (position[:, None] - torch.arange(num_slots, device=q.device)) % num_slots
        branches.append((state.k, state.v, held >= lo[:, None]))
    numerator, denominator = rows.new_zeros(B, G, H // G, D), rows.new_zeros(B, G, H // G, 1)
    row_max = rows.new_full((B, G, H // G, 1), float("-inf"))
    logits = [(scaled @ keys.to(wide).transpose(-1, -2)).masked_fill(~seen[:, None, None], float("-inf")) for keys, _, seen in branches]
    for part in logits:
        row_max = torch.maximum(row_max, part.amax(-1, keepdim=True))
    has_linear = (lo > A)[:, None, None, None]
    if reference == "absolute" and query_map is not None:
        row_max = torch.where(has_linear, row_max.clamp_min(-MAX_SHIFT), row_max)
    row_max = torch.where(row_max == float("-inf"), 0.0, row_max)
    for part, (_, values, _) in zip(logits, branches, strict=True):
        weights = torch.exp(part - row_max)
        numerator = numerator + weights @ values.to(wide)
        denominator = denominator + weights.sum(-1, keepdim=True)
    if query_map is not None:
        Gs = state.kv.shape[1]
        phi = feature_map(q.to(wide).transpose(1, 2), query_map, query_gate) * torch.exp(linear_log_weight.to(wide)).expand(B, H, 1)[..., None]
        phi = phi.reshape(B, Gs, H // Gs, -1)
        if reference == "absolute":
            phi = phi * torch.exp(-row_max.clamp_min(-MAX_SHIFT)).reshape(B, Gs, H // Gs, 1)
        z = normalizer_slot(position + 1, window_size, kind)
        z = torch.where((z == 0)[:, None, None], state.z[:, :, 0], state.z[:, :, 1])
        numerator = numerator + (phi @ state.kv).view_as(numerator)
        denominator = denominator + (phi @ z[..., None]).view_as(denominator)
    out = numerator / torch.where(denominator == 0, 1.0, denominator)
    if valid is not None:
        out = torch.where(valid[:, None, None, None], out, 0.0)
    state.lengths.add_(1 if valid is None else valid[:, None, None])
    return out.reshape(B, 1, H, D).to(q.dtype)


def _fold(
    state: LinearState,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    lo: Tensor,
    window_size: int,
    kind: str,
    key_map: Tensor,
    key_gate: Tensor | None,
    valid: Tensor | None,
) -> None:
    """Move the keys that leave the window with this step, [lo(p - 1), lo(p)), from the ring into kv and z. position, lo: [B]."""
    before = torch.where(position > 0, window_start(position - 1, window_size, kind), 0)
    moved = lo > before if valid is None else (lo > before) & valid
    if not _some(moved):
        return
    wide, A, Gs = state.kv.dtype, state.sink_k.shape[2], state.kv.shape[1]
    if window_size:
        unit = window_size if kind == "block" else 1
        leaving = lo[:, None] - unit + torch.arange(unit, device=k.device)
        slot = (leaving % state.k.shape[2])[:, None, :, None].expand(-1, k.shape[2], -1, k.shape[3])
        keys, values = state.k.gather(2, slot), state.v.gather(2, slot)
    else:  # without a window a key is in the state as soon as it is seen
        leaving, keys, values = position[:, None], k.transpose(1, 2), v.transpose(1, 2)
    keys, values = (x.to(wide).repeat_interleave(Gs // x.shape[1], 1) for x in (keys, values))
    counts = (leaving >= A) & moved[:, None]
    phi = feature_map(keys, key_map, key_gate) * counts[:, None, :, None]
    z = normalizer(state, window_size, kind) + phi.sum(2)
    state.kv.add_(phi.transpose(-1, -2) @ values)
    slot = normalizer_slot(position + 1, window_size, kind)
    here = (torch.arange(2, device=k.device) == slot[:, None]) & moved[:, None]
    state.z.copy_(torch.where(here[:, None, :, None], z[:, :, None], state.z))
