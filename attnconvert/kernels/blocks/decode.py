"""Cached block-sparse attention: the keys of a layer with their compressed keys, filled by a prefill, extended by further calls, stepped by decoding.

Position p of a row's document is in slot p; padding takes none. Fine and coarse keys (`reference` says what they are) are kept beside the keys, each written
when its last key comes, so that a step reads those and the chosen blocks and nothing else. `reference` and `rule` have the rules and the letters; C is the
capacity of a cache in tokens, a multiple of `rule.CAPACITY_MULTIPLE`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnconvert.kernels.blocks.reference import attend, compress
from attnconvert.kernels.blocks.rule import CAPACITY_MULTIPLE, BlockRule
from attnconvert.kernels.choice import HAS_TRITON, Impl, use_triton
from attnconvert.kernels.softmax import QUERY_CHUNK, recomputed


class BlockState(NamedTuple):
    """What later queries may see, zeros where there is nothing yet.

    Attributes:
        k, v: [B, G, C, D].
        fine: [B, G, C / stride, D].
        coarse: [B, G, C / (stride * coarser), D]; [B, G, 0, D] where coarse keys are the fine ones.
        length: [B] int64, real tokens so far of each row's document.
    """

    k: Tensor
    v: Tensor
    fine: Tensor
    coarse: Tensor
    length: Tensor


def fill(k: Tensor, v: Tensor, rule: BlockRule, capacity: int, start: Tensor | None = None) -> BlockState:
    """The state after a prefill.

    Args:
        k, v: [B, T, G, D], T from 0 to `capacity`.
        capacity: C.
        start: [B, T] as in `block_sparse_attention`; the state is that of the last document.

    Raises:
        ValueError: a capacity that is not a multiple of `CAPACITY_MULTIPLE`, or less than T.
    """
    B, T = k.shape[:2]
    if capacity % CAPACITY_MULTIPLE or capacity < T:
        raise ValueError(f"a cache for {T} tokens has room for a multiple of {CAPACITY_MULTIPLE} tokens and at least so many, not for {capacity}")
    length = torch.full((B,), T, dtype=torch.int64, device=k.device)
    if start is not None:
        pads = start[:, -1].long().clamp(0, T)
        length = length - pads
        index = torch.arange(T, device=k.device) + pads[:, None]
        k, v = (_taken(x, index.clamp_max(T - 1)).masked_fill((index >= T)[..., None, None], 0) for x in (k, v))
    keys, values = (torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, capacity - T)).contiguous() for x in (k, v))
    return BlockState(keys, values, *_compressed(keys, length, rule), length)


def resized(state: BlockState, rule: BlockRule, capacity: int) -> BlockState:
    """The same keys with room for rows of at least `capacity` tokens; copies only to grow. Asks the device for nothing."""
    more = capacity - state.k.shape[2]
    if more <= 0:
        return state
    if capacity % CAPACITY_MULTIPLE:
        raise ValueError(f"a cache has room for a multiple of {CAPACITY_MULTIPLE} tokens, not for {capacity}")
    rows = (more, more, *(more // stride for _, stride in _means(rule)), 0)[:4]
    keys, values, fine, coarse = (torch.nn.functional.pad(x, (0, 0, 0, n)).contiguous() for x, n in zip(state[:4], rows, strict=True))
    return BlockState(keys, values, fine, coarse, state.length)


def block_sparse_extend(
    q: Tensor, k: Tensor, v: Tensor, state: BlockState, *, rule: BlockRule, scale: float, start: Tensor | None = None
) -> tuple[Tensor, BlockState]:  # fmt: skip
    """Attention of the next T tokens of each row onto a past, with gradients: a further turn, or a part of a prompt. PyTorch, memory linear in T.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D].
        state: not changed; has room for the tokens.
        start: [B, T] or None; a row's first `start` tokens are padding and leave its state alone.

    Returns:
        Outputs [B, T, H, D], finite for padding, and the new state.
    """
    B, T, device = q.shape[0], q.shape[1], q.device
    pads = torch.zeros(B, dtype=torch.int64, device=device) if start is None else start[:, -1].long().clamp(0, T)
    index = torch.arange(T, device=device) - pads[:, None]
    position = torch.where(index >= 0, state.length[:, None] + index, -1)
    length = state.length + T - pads
    slot = torch.arange(state.k.shape[2], device=device)
    fresh = ((slot >= state.length[:, None]) & (slot < length[:, None]))[:, None, :, None]
    place = (slot - state.length[:, None] + pads[:, None]).clamp(0, T - 1)
    taken = [_taken(x, place).transpose(1, 2).to(past.dtype) for past, x in ((state.k, k), (state.v, v))]
    keys, values = (torch.where(fresh, x, past).contiguous() for past, x in zip(state[:2], taken, strict=True))
    new = BlockState(keys, values, *_compressed(keys, length, rule), length)
    parts = zip(q.split(QUERY_CHUNK, 1), position.split(QUERY_CHUNK, 1), strict=True)
    return torch.cat([recomputed(_attend, some, keys, values, new, at, rule, scale) for some, at in parts], 1), new


def block_sparse_step(
    q: Tensor, k: Tensor, v: Tensor, state: BlockState, *, rule: BlockRule, scale: float, start: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:  # fmt: skip
    """Attention of the next token of each row; no gradients. Waits for nothing and moves no tensor, so it can be captured in a CUDA graph.

    Args:
        q: [B, 1, H, D]. k, v: [B, 1, G, D].
        state: changed in place; has room for the token.
        start: [B, 1] int64 or None. A row with a positive start has a padding token: its output is 0 and its state stays as it is.
        impl: `reference` (PyTorch, any device), `triton`, or `auto`: triton for bf16 and fp16 on CUDA where it can, with the reason
            logged where it cannot.

    Returns:
        [B, 1, H, D] in q's dtype.

    Raises:
        ValueError: more than one token a row, a state of another shape, or `triton` where it cannot run.
    """
    if q.shape[1] != 1:
        raise ValueError(f"a decode step takes one token a row, got {q.shape[1]}; use block_sparse_extend for more")
    C = state.k.shape[2]
    if state.k.shape[:2] != (q.shape[0], k.shape[2]) or [x.shape[2] for x in state[2:4]] != [C // n for _, n in _means(rule)] + [0] * (rule.coarser == 1):
        raise ValueError("the state was made for another batch size, number of heads or rule")
    if not use_triton(impl, q, lambda: _refusal(q, k, v, state, rule), "the decode step of block-sparse attention"):
        with torch.no_grad():
            return _step(q, k, v, state, rule, scale, start)
    from attnconvert.kernels.blocks.triton_decode import triton_block_sparse_step

    return triton_block_sparse_step(q, k, v, state, rule, scale, start)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_refusal(device_type: str, dtype: torch.dtype, head_dim: int, group: int, num_blocks: int) -> str | None:
    """Why no kernel takes such a step, or None; looks at the machine, which torch.compile cannot trace."""
    if not HAS_TRITON:
        return "triton is not installed"
    from attnconvert.kernels.blocks.triton_decode import step_refusal

    refusal: str | None = step_refusal(device_type, dtype, head_dim, group, num_blocks)
    return refusal


def _refusal(q: Tensor, k: Tensor, v: Tensor, state: BlockState, rule: BlockRule) -> str | None:
    """Why the Triton form cannot take this step, or None."""
    if not q.dtype == k.dtype == v.dtype == state.k.dtype == state.v.dtype == state.fine.dtype == state.coarse.dtype:
        return f"q, k, v and the state have several dtypes: {q.dtype}, {k.dtype}, {v.dtype}, {', '.join(str(x.dtype) for x in state[:4])}"
    if not all(tensor.is_contiguous() for tensor in state):
        return "a tensor of the state is not contiguous"
    refusal: str | None = _kernel_refusal(q.device.type, q.dtype, q.shape[-1], q.shape[2] // k.shape[2], state.k.shape[2] // rule.block_size)
    return refusal


def _step(q: Tensor, k: Tensor, v: Tensor, state: BlockState, rule: BlockRule, scale: float, start: Tensor | None) -> Tensor:
    """The PyTorch form."""
    position = state.length.clone()
    valid = torch.ones_like(position, dtype=torch.bool) if start is None else start[:, 0] <= 0
    _put(state.k, position, k[:, 0], valid)
    _put(state.v, position, v[:, 0], valid)
    state.length.add_(valid)
    for means, (kernel, stride) in zip(state[2:4], _means(rule), strict=False):
        first = position + 1 - kernel
        recent = (first[:, None] + torch.arange(kernel, device=q.device)).clamp(0, state.k.shape[2] - 1)
        keys = _taken(state.k.transpose(1, 2), recent)
        _put(means, first // stride, compress(keys, kernel, stride)[:, 0], valid & (first >= 0) & (first % stride == 0))
    out = _attend(q, state.k, state.v, state, (state.length - 1)[:, None], rule, scale)
    return torch.where(valid[:, None, None, None], out, 0.0)


def _attend(q: Tensor, keys: Tensor, values: Tensor, state: BlockState, position: Tensor, rule: BlockRule, scale: float) -> Tensor:
    """Attention to keys and values [B, G, C, D], those of the state, apart from it for the sake of gradients."""
    fine, coarse = (x.transpose(1, 2) for x in (state.fine, state.fine if rule.coarser == 1 else state.coarse))
    return attend(q, keys.transpose(1, 2), values.transpose(1, 2), fine, coarse, position=position, rule=rule, scale=scale)


def _means(rule: BlockRule) -> list[tuple[int, int]]:
    """Kernel and stride of the fine keys and, where they are others, of the coarse ones."""
    both = [(rule.kernel, rule.stride), (rule.kernel * rule.coarser, rule.stride * rule.coarser)]
    return both[: 1 + (rule.coarser > 1)]


@torch.no_grad()
def _compressed(keys: Tensor, length: Tensor, rule: BlockRule) -> tuple[Tensor, Tensor]:
    """Fine and coarse keys of a `BlockState` of keys [B, G, C, D], of which [B] `length` are there."""
    found = []
    for kernel, stride in _means(rule):
        means = compress(keys.transpose(1, 2), kernel, stride).transpose(1, 2)
        whole = (torch.arange(means.shape[2], device=keys.device) * stride + kernel <= length[:, None])[:, None, :, None]
        found.append(torch.nn.functional.pad(means.masked_fill(~whole, 0), (0, 0, 0, keys.shape[2] // stride - means.shape[2])).contiguous())
    return found[0], found[1] if rule.coarser > 1 else found[0][:, :, :0].contiguous()


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """Tokens `place` [B, n] of x [B, T, G, D]."""
    return x.gather(1, place[..., None, None].expand(-1, -1, *x.shape[2:]))


def _put(buffer: Tensor, place: Tensor, x: Tensor, where: Tensor) -> None:
    """Writes x [B, G, D] into rows `place` [B] of a buffer [B, G, n, D], only for the batch rows `where` [B]."""
    index = place.clamp(0, buffer.shape[2] - 1)[:, None, None, None].expand(-1, buffer.shape[1], 1, buffer.shape[3])
    buffer.scatter_(2, index, torch.where(where[:, None, None, None], x[:, :, None].to(buffer.dtype), buffer.gather(2, index)))
