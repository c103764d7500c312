"""`block_sparse_attention` on the kernels of triton_select.py and triton_attend.py: which are launched on what, gradients, and how PyTorch sees it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnconvert.kernels.blocks.rule import BlockRule
from attnconvert.kernels.blocks.triton_attend import MAX_GROUP, MAX_HEAD_DIM, backward_launches, forward_launch
from attnconvert.kernels.blocks.triton_select import MAX_BLOCKS, add_scratch, cap, chunk_launches, chunks, prepare_launches, tile_tokens, word_dtype
from attnconvert.kernels.launch import MAX_PLANS, Layout, Plan, signature
from attnconvert.kernels.registration import INTERPRETED, namespace, register, runs_here

NAMESPACE = namespace(__name__)


def refusal(q: Tensor, k: Tensor, rule: BlockRule) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    T, H, D = q.shape[1:]
    if q.dtype not in (torch.bfloat16, torch.float16) and not (q.dtype == torch.float32 and INTERPRETED):
        return f"dtype {q.dtype} is not bfloat16 or float16"
    if not q.is_cuda and not INTERPRETED:
        return f"the tensors are on {q.device.type}, the kernels need an NVIDIA GPU"
    if D > MAX_HEAD_DIM:
        return f"head_dim {D} is larger than {MAX_HEAD_DIM}"
    if H % k.shape[2]:
        return f"{H} query heads are not a multiple of {k.shape[2]} key-value heads"
    if H // k.shape[2] > MAX_GROUP:
        return f"{H // k.shape[2]} query heads share a key-value head, more than {MAX_GROUP}"
    if -(-T // rule.block_size) > MAX_BLOCKS:
        return f"{T} tokens are more than {MAX_BLOCKS} blocks of {rule.block_size}"
    return None


@functools.lru_cache(MAX_PLANS)
def _forward_plan(tensors: tuple[Any, ...], rule: BlockRule, scale: float, train: bool) -> tuple[Plan, Layout]:
    """Launches of the forward pass, and their memory. tensors: signatures of q, k, v, start."""
    q, k, v, start = tensors
    (B, T, H, D), _, dtype, device = q
    G = k[0][2]
    layout = Layout()
    add_scratch(layout, B=B, T=T, H=H, G=G, D=D, rule=rule, dtype=dtype)
    launches = prepare_launches(q, k, start, rule, scale)
    for first, stop in chunks(B, T, G, rule):
        launches += chunk_launches(q, k, start, rule, scale, first, stop, train)
        launches.append(forward_launch(q, k, v, rule.block_size, scale, first, stop, cap(H // G, D, T, rule)))
    return Plan(device, ("q", "k", "v", "start", "output", "lse", "words", "scratch"), launches, {"scratch": layout}), layout


def _forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, rule: list[int], scale: float, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass. start: int32, contiguous, aligned.

    Returns:
        output [B, T, H, D]; log2 of softmax denominators, fp32 [B, T, H]; if train, bits of which tokens of a tile see a block [B, G, tiles, N], else empty.
    """
    output, lse, words = _forward_shapes(q, k, v, start, rule, scale, train)
    if q.numel():
        inputs = (q, k, v, start)
        plan, layout = _forward_plan(signature(*inputs), _rule(rule), scale, train)
        plan(*inputs, output, lse, words, layout.allocate(q.device))
    return output, lse, words


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, rule: list[int], scale: float, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, D), G, S = q.shape, k.shape[2], rule[0]
    tokens = tile_tokens(H // G, D, S)
    words = torch.empty(B, G, (T + tokens - 1) // tokens if train else 0, (T + S - 1) // S, dtype=word_dtype(tokens), device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(B, T, H, dtype=torch.float32, device=q.device), words


@functools.lru_cache(MAX_PLANS)
def _backward_plan(tensors: tuple[Any, ...], rule: BlockRule, scale: float) -> tuple[Plan, Layout]:
    """Launches of the backward pass, and their memory. tensors: signatures of q, k, v and the output's gradient."""
    q, k, v, grad = tensors
    (_, T, H, D), _, _, device = q
    launches, layout = backward_launches(q, k, v, grad, rule.block_size, scale, cap(H // k[0][2], D, T, rule))
    return Plan(device, ("q", "k", "v", "output", "lse", "words", "grad", "dq", "dk", "dv", "scratch"), launches, {"scratch": layout}), layout


def _backward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, words: Tensor, grad: Tensor, rule: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. output, lse, words: of the forward pass."""
    gradients = _backward_shapes(q, k, v, output, lse, words, grad, rule, scale)
    if q.numel():
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        plan, layout = _backward_plan(signature(q, k, v, grad), _rule(rule), scale)
        plan(q, k, v, output, lse, words, grad, *gradients, layout.allocate(q.device))
    return gradients


def _backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, words: Tensor, grad: Tensor, rule: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _numbers(rule: BlockRule) -> list[int]:
    """What an operator's schema can take of a rule."""
    return [*rule[:5], int(rule.scorer == "compressed")]


def _rule(numbers: list[int]) -> BlockRule:
    """The rule of `_numbers`."""
    block_size, num_init, num_local, num_blocks, dense_len, compressed = numbers
    return BlockRule(block_size, num_init, num_local, num_blocks, dense_len, "compressed" if compressed else "mean")


_LIBRARY = None  # of an earlier execution of this module
_LIBRARY = register(
    NAMESPACE, {"block_sparse_attention_forward": (_forward, _forward_shapes), "block_sparse_attention_backward": (_backward, _backward_shapes)}
)
_forward_op = getattr(torch.ops, NAMESPACE).block_sparse_attention_forward.default
_backward_op = getattr(torch.ops, NAMESPACE).block_sparse_attention_backward.default


class _BlockSparseAttention(torch.autograd.Function):
    """Gradients of q, k and v; none goes through the choice of blocks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, rule: list[int], scale: float) -> Tensor:
        run: Any = _forward if runs_here(q) else _forward_op
        output, lse, words = run(q, k, v, start, rule, scale, True)
        ctx.save_for_backward(q, k, v, output, lse, words)
        ctx.options = (rule, scale)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run: Any = _backward if runs_here(grad) else _backward_op
        return *run(*ctx.saved_tensors, grad, *ctx.options), *[None] * 3


def _run(q: Tensor, k: Tensor, v: Tensor, rule: BlockRule, scale: float, start: Tensor | None) -> Tensor:
    """Attention of rows whose documents are aligned."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    k, v = (x if x.dtype == q.dtype else x.to(q.dtype) for x in (k, v))
    starts = None if start is None else start.to(device=q.device, dtype=torch.int32).contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _BlockSparseAttention.apply(q, k, v, starts, _numbers(rule), scale)  # type: ignore[no-any-return]
    run: Any = _forward if runs_here(q) else _forward_op
    return run(q, k, v, starts, _numbers(rule), scale, False)[0]  # type: ignore[no-any-return]


def aligned_places(start: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Where tokens have to go for every document to begin at a multiple of `multiple`.

    Args:
        start: [B, T] int64, see `triton_block_sparse_attention`.

    Returns:
        place: [B, T] each token's place in its new row, -1 for padding.
        new_start: [B, T'], `start` of the new rows. What fills a document up belongs to it; behind a row's last one there is padding.
    """
    T = start.shape[1]
    index = torch.arange(T)
    real = start <= index
    following = torch.nn.functional.pad(start, (0, 1), value=-1)[:, 1:]
    last = real & ((following != start) | (index == T - 1))
    size = torch.where(last, (index - start + multiple) // multiple * multiple, 0)  # of a document, at its last token
    upto = size.cumsum(1)
    begin = upto - size  # of the token's document, or of the next one, in the new row
    length = max(int(upto.max()), 1)
    new_start = torch.zeros(start.shape[0], length + 1, dtype=torch.int64).scatter_(1, begin, begin)[:, :length].cummax(1).values
    return torch.where(real, begin + index - start, -1), torch.where(torch.arange(length) < upto[:, -1:], new_start, length + T)


def _run_realigned(q: Tensor, k: Tensor, v: Tensor, rule: BlockRule, scale: float, start: Tensor) -> Tensor:
    """Attention of rows with documents and padding anywhere; the output of padding is 0. Reads `start` on the host."""
    B, T = start.shape
    place, new_start = aligned_places(start.cpu().long(), rule.alignment)
    length = new_start.shape[1]
    row, index = (place >= 0).nonzero().unbind(1)
    moved = place[row, index]
    if torch.equal(moved, index):
        starts = torch.nn.functional.pad(new_start, (0, max(T - length, 0)), value=length + T)[:, :T].to(q.device)
        return torch.where((place >= 0).to(q.device)[:, :, None, None], _run(q, k, v, rule, scale, starts), 0.0)
    source, target = (row * T + index).to(q.device), (row * length + moved).to(q.device)
    new_q, new_k, new_v = (
        x.new_zeros(B * length, *x.shape[2:]).index_copy(0, target, x.flatten(0, 1).index_select(0, source)).unflatten(0, (B, length)) for x in (q, k, v)
    )
    out = _run(new_q, new_k, new_v, rule, scale, new_start.to(q.device))
    result: Tensor = q.new_zeros(B * T, *q.shape[2:]).index_copy(0, source, out.flatten(0, 1).index_select(0, target)).unflatten(0, (B, T))
    return result


def triton_block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rule: BlockRule, scale: float, start: Tensor | None = None, aligned: bool = False
) -> Tensor:
    """`reference.block_sparse_attention` on Triton kernels; the same arguments. Products take q's dtype, sums are fp32.

    Args:
        aligned: every document in `start` begins at a multiple of `rule.alignment`, and there is no padding except behind a row's last document. Without it
            `start` is read on the host and tokens are moved to where that is true.
    """
    if start is None and rule.sees_all(q.shape[1]):
        with torch.autocast(q.device.type, enabled=False):
            queries, keys, values = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
            out = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)
    if start is None or not q.numel() or aligned:
        return _run(q, k, v, rule, scale, start)
    return _run_realigned(q, k, v, rule, scale, start)
