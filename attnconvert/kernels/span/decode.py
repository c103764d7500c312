"""Cached attention spans: the ragged cache of a layer, filled by a prefill, extended by further calls, stepped by decoding.

Each KV head has slots of its own: A for the sinks, then a ring for as many recent keys as its rule lets the last query of a context see. Position p
(of a row's document) is in slot p if p < A, else in slot A + (p - A) % ring: a slot is overwritten by a key `ring` positions later, when no query can
see the old one any more. The heads' slots lie one after the other in one tensor. Nothing else is kept: which position a slot holds follows from the
row's length. `reference` has the rules and the letters.

Queries may use some of the heads only: `active` and `gate` are those of `attnconvert.kernels.heads.reference`, with U units.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnconvert.kernels.choice import HAS_TRITON, Impl, use_triton
from attnconvert.kernels.pool import check_slots, rows_are_whole, step_in_pool
from attnconvert.kernels.span.reference import attend
from attnconvert.kernels.span.slots import ring_size


class SpanState(NamedTuple):
    """The keys that later queries may see.

    Attributes:
        k, v: [B, S, D], S slots of all KV heads, head after head; zeros in slots that are empty.
        length: [B] int64, real tokens so far of each row's document.
    """

    k: Tensor
    v: Tensor
    length: Tensor


class SpanLayout(NamedTuple):
    """Where the slots of a `SpanState` are; the same for all rows of a batch.

    Attributes:
        alphas, betas, leasts: the rule of each KV head, beta times `reference.BETA_ONE`.
        num_sinks: A.
        capacity: tokens of a row, padding included, that there is room for.
        rings: slots of each KV head besides the sinks.
        table: [G, 5] int32, the first slot, the ring, alpha, beta and least of each KV head, for kernels.
    """

    alphas: tuple[int, ...]
    betas: tuple[int, ...]
    leasts: tuple[int, ...]
    num_sinks: int
    capacity: int
    rings: tuple[int, ...]
    table: Tensor

    @property
    def num_slots(self) -> int:
        """S."""
        return sum(self.rings) + self.num_sinks * len(self.rings)


def span_layout(
    alphas: tuple[int, ...], betas: tuple[int, ...], leasts: tuple[int, ...], num_sinks: int, capacity: int, device: torch.device
) -> SpanLayout:  # fmt: skip
    """The layout in which rows of up to `capacity` tokens have room, no ring larger than its rule needs; see `SpanLayout`."""
    rings = tuple(ring_size(alpha, beta, num_sinks, capacity, least) for alpha, beta, least in zip(alphas, betas, leasts, strict=True))
    first = [sum(rings[:head]) + head * num_sinks for head in range(len(rings))]
    table = torch.tensor(list(zip(first, rings, alphas, betas, leasts, strict=True)), dtype=torch.int32, device=device)
    return SpanLayout(alphas, betas, leasts, num_sinks, capacity, rings, table)


def empty_state(batch_size: int, head_dim: int, layout: SpanLayout, dtype: torch.dtype) -> SpanState:
    """The state before the first token, on the layout's device."""
    device = layout.table.device
    slots = torch.zeros(batch_size, layout.num_slots, head_dim, dtype=dtype, device=device)
    return SpanState(slots, slots.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device))


def resized(state: SpanState, old: SpanLayout, capacity: int) -> tuple[SpanState, SpanLayout]:
    """The same keys with room for rows of `capacity` tokens. Copies only where a ring must grow; asks the device for nothing."""
    new = span_layout(old.alphas, old.betas, old.leasts, old.num_sinks, capacity, state.k.device)
    if new.rings == old.rings:
        return state, new._replace(table=old.table)
    position, head = _positions(new, state.length), _heads(new)
    place, held = _slots(old, head, position)
    held = held & (position >= 0) & ((position < old.num_sinks) | (position >= state.length[:, None] - old.table[head, 1]))
    return SpanState(_taken(state.k, place, held), _taken(state.v, place, held), state.length), new


def fill(k: Tensor, v: Tensor, layout: SpanLayout, start: Tensor | None = None) -> SpanState:
    """The state after a prefill.

    Args:
        k, v: [B, T, G, D], T up to the layout's capacity.
        start: [B, T] as in `span_attention`; the state is that of the last document.
    """
    B, T = k.shape[:2]
    pads = torch.zeros(B, dtype=torch.int64, device=k.device) if start is None else start[:, -1].long().clamp(0, T)
    position = _positions(layout, T - pads)
    place = _heads(layout) * T + (position + pads[:, None]).clamp(0, T - 1)
    return SpanState(_taken(_by_head(k), place, position >= 0), _taken(_by_head(v), place, position >= 0), T - pads)


def span_attention_extend(
    q: Tensor, k: Tensor, v: Tensor, state: SpanState, layout: SpanLayout, *, scale: float, start: Tensor | None = None, active: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, SpanState]:  # fmt: skip
    """Attention of the next T tokens of each row onto a past, with gradients: a further turn, or a part of a prompt. PyTorch, memory linear in T.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D].
        state: not changed.
        layout: has room for the tokens.
        start: [B, T] or None; a row's first `start` tokens are padding and leave its state alone.
        active: bool [B, T, U], the units that each token uses; U = G or H; None = all.
        gate: [B, T, U], factors of the units, or None for 1; only beside `active`.

    Returns:
        Outputs [B, T, H, D], finite for padding, and the new state.

    Raises:
        ValueError: units of another shape.
    """
    _check_units(q, k, active, gate)
    B, T, device = q.shape[0], q.shape[1], q.device
    pads = torch.zeros(B, dtype=torch.int64, device=device) if start is None else start[:, -1].long().clamp(0, T)
    index = torch.arange(T, device=device) - pads[:, None]
    query_position = state.length[:, None] + index
    new_position = torch.where(index >= 0, query_position, -1)
    out = _attend(q, state, _positions(layout, state.length), layout, query_position, scale, (k, v, new_position))
    length = state.length + T - pads
    position = _positions(layout, length)
    fresh = position >= state.length[:, None]
    place = _heads(layout) * T + (position - state.length[:, None] + pads[:, None]).clamp(0, T - 1)
    kept_k, kept_v = (torch.where(fresh[..., None], _taken(_by_head(x), place, fresh).to(past.dtype), past) for past, x in ((state.k, k), (state.v, v)))
    return _routed(out, active, gate), SpanState(kept_k, kept_v, length)


def span_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: SpanState, layout: SpanLayout, *, scale: float, start: Tensor | None = None, active: Tensor | None = None,
    gate: Tensor | None = None, slots: Tensor | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attention of the next token of each row; no gradients. Waits for nothing and moves no tensor, so it can be captured in a CUDA graph.

    Args:
        q: [B, 1, H, D]. k, v: [B, 1, G, D].
        state: changed in place. Its rows may lie apart: all dimensions but the first are contiguous.
        layout: has room for the token.
        start: [B, 1] int64 or None. A row with a positive start has a padding token: its output is 0 and its state stays as it is.
        active: bool [B, 1, U], the units that each row uses; U = G or H; None = all. Triton reads no keys of a KV head that a row does not use.
        gate: [B, 1, U], factors of the units, or None for 1; only beside `active`.
        slots: [B] int64 or None. Row b of the batch uses row slots[b] of the state, which then has any number of rows; no two use the same. -1 =
            the row is padding: its output is 0, and it has no state.
        impl: `reference` (PyTorch, any device), `triton`, or `auto`: triton for bf16 and fp16 on CUDA where it can, with the reason
            logged where it cannot.

    Returns:
        [B, 1, H, D] in q's dtype.

    Raises:
        ValueError: more than one token a row, a state, units or slots of another shape, or `triton` where it cannot run.
    """
    if q.shape[1] != 1:
        raise ValueError(f"a decode step takes one token a row, got {q.shape[1]}; use span_attention_extend for more")
    check_slots(slots, q.shape[0])
    if (state.k.shape[1], len(layout.rings)) != (layout.num_slots, k.shape[2]) or (slots is None and state.k.shape[0] != q.shape[0]):
        raise ValueError("the state was made for another batch size, number of heads or layout")
    _check_units(q, k, active, gate)
    if not use_triton(impl, q, lambda: _refusal(q, k, v, state), "the decode step of attention spans"):

        def step(state: SpanState, start: Tensor | None) -> Tensor:
            return _step(q, k, v, state, layout, scale, start)

        with torch.no_grad():
            return _routed(step(state, start) if slots is None else step_in_pool(step, state, slots, start), active, gate)
    from attnconvert.kernels.span.triton_decode import triton_span_attention_step

    return triton_span_attention_step(q, k, v, state, layout, scale, start, active, gate, slots)


def _check_units(q: Tensor, k: Tensor, active: Tensor | None, gate: Tensor | None) -> None:
    shapes = [(*q.shape[:2], units) for units in (k.shape[2], q.shape[2])]
    for name, x in (("active", active), ("gate", gate)):
        if x is not None and (active is None or x.shape != active.shape or x.shape not in shapes):
            raise ValueError(
                f"{name} is {list(x.shape)}; active, and gate beside it, have a column for each KV head or each query head: {list(shapes[0])} or {list(shapes[1])}"
            )


def _routed(out: Tensor, active: Tensor | None, gate: Tensor | None) -> Tensor:
    """Outputs [B, T, H, D], all units used, with the units' factors, and 0 where a token does not use one."""
    if active is None:
        return out
    units = out.unflatten(2, (active.shape[2], -1))
    if gate is not None:
        units = units * gate.to(out.dtype)[..., None, None]
    out = units.masked_fill(~active[..., None, None], 0).flatten(2, 3)
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_refusal(device_type: str, dtype: torch.dtype, head_dim: int, group: int) -> str | None:
    """Why no kernel takes such a step, or None; looks at the machine, which torch.compile cannot trace."""
    if not HAS_TRITON:
        return "triton is not installed"
    from attnconvert.kernels.span.triton_decode import step_refusal

    refusal: str | None = step_refusal(device_type, dtype, head_dim, group)
    return refusal


def _refusal(q: Tensor, k: Tensor, v: Tensor, state: SpanState) -> str | None:
    """Why the Triton form cannot take this step, or None."""
    if not q.dtype == k.dtype == v.dtype == state.k.dtype == state.v.dtype:
        return f"q, k, v and the state have several dtypes: {q.dtype}, {k.dtype}, {v.dtype}, {state.k.dtype}"
    if not all(rows_are_whole(tensor) for tensor in state):
        return "a row of the state is not contiguous"
    refusal: str | None = _kernel_refusal(q.device.type, q.dtype, q.shape[-1], q.shape[2] // k.shape[2])
    return refusal


def _step(q: Tensor, k: Tensor, v: Tensor, state: SpanState, layout: SpanLayout, scale: float, start: Tensor | None) -> Tensor:
    """The PyTorch form."""
    position = state.length
    place, _ = _slots(layout, torch.arange(len(layout.rings), device=q.device), position[:, None])
    valid = None if start is None else start[:, 0] <= 0
    where = place[..., None].expand(-1, -1, q.shape[-1])
    for past, x in ((state.k, k), (state.v, v)):
        new = x[:, 0].to(past.dtype)
        past.scatter_(1, where, new if valid is None else torch.where(valid[:, None, None], new, past.gather(1, where)))
    state.length.add_(1 if valid is None else valid)
    out = _attend(q, state, _positions(layout, state.length), layout, (state.length - 1)[:, None], scale)
    return out if valid is None else torch.where(valid[:, None, None, None], out, 0.0)


def _attend(
    q: Tensor,
    state: SpanState,
    slot_position: Tensor,
    layout: SpanLayout,
    query_position: Tensor,
    scale: float,
    new: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention to the slots, which hold `slot_position` [B, S], and to new tokens: their k and v [B, T, G, D] and positions [B, T]."""
    R, outputs, at = q.shape[2] // len(layout.rings), [], 0
    for heads, num_slots in _runs(layout):
        stop = at + len(heads) * num_slots
        keys, values, key_position = (x[:, at:stop].unflatten(1, (len(heads), num_slots)) for x in (state.k, state.v, slot_position))
        if new is not None:
            more = [x[:, :, heads.start : heads.stop].transpose(1, 2).to(keys.dtype) for x in new[:2]]
            keys, values = torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2)
            key_position = torch.cat([key_position, new[2][:, None].expand(-1, len(heads), -1)], 2)
        rules = {name: layout.table[heads.start : heads.stop, column] for column, name in enumerate(("alpha", "beta", "least"), 2)}
        some = q[:, :, heads.start * R : heads.stop * R]
        outputs.append(attend(some, keys, values, query_position=query_position, key_position=key_position, **rules, num_sinks=layout.num_sinks, scale=scale))
        at = stop
    return torch.cat(outputs, 2)


# ---------------------------------------------------------------- slots and positions


def _runs(layout: SpanLayout) -> Iterator[tuple[range, int]]:
    """Neighbouring KV heads with as many slots, and how many each has."""
    first = 0
    for ring, same in itertools.groupby(layout.rings):
        stop = first + len(list(same))
        yield range(first, stop), ring + layout.num_sinks
        first = stop


def _heads(layout: SpanLayout) -> Tensor:
    """The KV head of every slot, int64 [S]."""
    sizes = layout.table[:, 1].long() + layout.num_sinks
    return torch.repeat_interleave(sizes, output_size=layout.num_slots)


def _slots(layout: SpanLayout, head: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The slots in which `head` [n] keeps `position` [B, n], int64 [B, n], and whether it has such slots; those of other positions are some slot."""
    A = layout.num_sinks
    first, ring = layout.table[head, 0].long(), layout.table[head, 1].long()
    slot = torch.where(position < A, position.clamp_min(0), A + (position - A) % ring.clamp_min(1))
    there = (position < A) | (ring > 0)
    return first + torch.where(there, slot, 0), there


def _positions(layout: SpanLayout, length: Tensor) -> Tensor:
    """The position that each slot holds, -1 for an empty one: int64 [B, S]. length: [B] tokens so far."""
    A, head = layout.num_sinks, _heads(layout)
    first, ring = layout.table[head, 0].long(), layout.table[head, 1].long()
    offset = torch.arange(layout.num_slots, device=length.device) - first
    last = length[:, None] - 1
    recent = last - (last - offset) % ring.clamp_min(1)  # the last position that belongs here: a ring begins at offset A, which holds position A
    return torch.where(offset < A, torch.where(offset <= last, offset, -1), torch.where(recent >= A, recent, -1))


def _by_head(x: Tensor) -> Tensor:
    """[B, T, G, D] -> [B, G * T, D]."""
    return x.transpose(1, 2).flatten(1, 2)


def _taken(x: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """Rows `place` [B, S] of x [B, n, D], zeros where not `there`."""
    taken = x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
    return taken.masked_fill(~there[..., None], 0)
