"""How much the loss depends on each part of the attention maps (MoA, https://arxiv.org/abs/2406.14909): profiled once, on whole sequences.

Take one entry A_ij of a softmax map away and let the rest of its row share its weight. To first order the loss then changes by

    E_ij = A_ij / (1 - A_ij) * (sum_n g_in A_in - g_ij),        g = dL/dA = dO V^T

A row with one entry has no rest, its output becomes zero: E = -g A. That form is also taken where 1 - A_ij is so small that the other one is rounding
noise. |E| is summed over square blocks and over the query heads of a KV head, and averaged over samples.

The published code runs the model, keeps every layer's q, k and gradient of the attention output, and then makes full maps layer by layer. Here
the attention is an autograd function whose backward pass does the work: per block of queries, rows of A are made again from q and k, give E,
and give the gradients of q, k and v, all in fp32. No map is kept, none is ever whole, and nothing is kept for later either: with gradient checkpointing
q and k live as long as their layer's backward pass. Memory is linear in T. The row sum of g A equals dO . O, but is summed here from the rows: O is rounded
to the model's data type, and A / (1 - A) would blow that up where a sink takes nearly all weight.

Shapes: T tokens, H query heads, G key-value heads, R = H / G, D head_dim, n blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.runtime.seam import softmax_attention
from attnconvert.surgery.sites import Site
from attnconvert.surgery.spans.rules import BLOCK
from attnconvert.surgery.spans.stock import attention_through

_SMALLEST_REST = 1e-5  # 1 - A below this: fp32 leaves the sum over the rest less than two digits

Item = tuple[Tensor, Tensor]
"""input_ids int64 [T], and a bool [T] that is True on the response: the tokens whose loss counts, the last ones of the sequence."""


@dataclass(frozen=True)
class Influence:
    """Profile of some layers.

    Attributes:
        blocks: length -> layer index -> float32 [G, n, n] on the CPU, query blocks by key blocks; mean over samples of the summed |E|, in nats.
        block: tokens of a block.
        num_samples: length -> samples.
        losses: length -> mean response loss of the model as it is, nats per token.
    """

    blocks: Mapping[int, Mapping[int, Tensor]]
    block: int
    num_samples: Mapping[int, int]
    losses: Mapping[int, float]


def check_sites(sites: Sequence[Site]) -> None:
    """Raise AttnConvertError `spans-not-possible` for layers whose attention is more than a causal softmax."""
    for site in sites:
        odd = [what for what, there in (("capped logits", site.softcap is not None), ("learned sink logits", site.has_sink_logits)) if there]
        odd += [f"a sliding window of {site.sliding_window} tokens"] if site.sliding_window is not None else []
        if odd:
            raise AttnConvertError(
                "spans-not-possible", f"the layer has {' and '.join(odd)}, for which no spans can be searched", where=f"layer {site.layer_idx}, {site.path}",
                hint="keep such layers as they are, or give them rules of your own (`alphas`, `betas`)",
            )  # fmt: skip


def profile(model: Any, sites: Sequence[Site], items: Sequence[Item], *, block: int = BLOCK, progress: Callable[[int, int], None] | None = None) -> Influence:
    """Influence of every block of the attention maps of `sites` on the response loss. The model is unchanged afterwards.

    Args:
        model: a causal LM of transformers, with weights, on its device, in any floating type.
        sites: the layers to profile.
        items: samples; those of one length are averaged.
        block: tokens of a block.
        progress: told (samples done, samples).

    Raises:
        AttnConvertError: `spans-not-possible`.
    """
    assert items, "nothing to profile"
    check_sites(sites)
    device = next(model.parameters()).device
    heads = {site.layer_idx: site.num_key_value_heads for site in sites}
    sums: dict[int, dict[int, Tensor]] = {}
    counts: dict[int, int] = {}
    losses: dict[int, float] = {}
    current: dict[int, Tensor] = {}

    def attend(idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        out: Tensor = _Profiled.apply(q, k, v, scaling, current[idx], block)
        return out

    with ExitStack() as stack:
        stack.enter_context(_ready_for_gradients(model))
        stack.enter_context(attention_through(model, heads.keys(), attend))
        stack.enter_context(torch.enable_grad())
        for done, (input_ids, response) in enumerate(items, start=1):
            length = int(input_ids.shape[0])
            num_blocks = -(-length // block)
            if length not in sums:
                sums[length] = {idx: torch.zeros(G, num_blocks, num_blocks, device=device) for idx, G in heads.items()}
            current.clear()
            current.update(sums[length])
            loss = response_loss(model, input_ids.to(device), response)
            loss.backward()  # type: ignore[no-untyped-call]
            counts[length] = counts.get(length, 0) + 1
            losses[length] = losses.get(length, 0.0) + float(loss.detach())
            if progress is not None:
                progress(done, len(items))
    return Influence(
        {length: {idx: (total / counts[length]).cpu() for idx, total in own.items()} for length, own in sums.items()},
        block,
        counts,
        {length: total / counts[length] for length, total in losses.items()},
    )


def response_loss(model: Any, input_ids: Tensor, response: Tensor) -> Tensor:
    """Mean cross-entropy of the response tokens, nats; a scalar.

    Args:
        model: a causal LM.
        input_ids: int64 [T] on the model's device.
        response: bool [T], True on the last tokens and nowhere else; never on the first.
    """
    num_tokens = int(response.sum())
    assert 0 < num_tokens < len(response), "a response has a context"
    assert bool(response[-num_tokens:].all()), "the response ends the sequence"
    logits = model(input_ids=input_ids[None], use_cache=False, logits_to_keep=num_tokens + 1).logits[0, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, input_ids[-num_tokens:])


class _Profiled(torch.autograd.Function):
    """Causal softmax attention; its backward pass adds |E| to `total` [G, n, n]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, total: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scaling, ctx.total, ctx.block = scaling, total, block
        return softmax_attention(q, k, v, scaling=scaling, start=None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = add_influence(q, k, v, gradients[0], ctx.scaling, ctx.total, ctx.block)
        return dq, dk, dv, None, None, None


def add_influence(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, scaling: float, total: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the block sums of |E| to `total` and returns the gradients of q, k and v.

    Args:
        q, d_out: [B, H, T, D]. k, v: [B, G, T, D].
        scaling: factor on q.k.
        total: [G, n, n], changed in place.
        block: queries of a tile and keys of a block.
    """
    B, H, T, D = q.shape
    G = k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = (B, G, H // G, T, D)
    queries, gradients = q.reshape(grouped).to(wide), d_out.reshape(grouped).to(wide)
    keys, values = k.to(wide)[:, :, None], v.to(wide)[:, :, None]
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    position = torch.arange(T, device=q.device)
    for at, first in enumerate(range(0, T, block)):
        stop = min(T, first + block)
        rows = slice(first, stop)
        scores = queries[..., rows, :] @ keys[..., :stop, :].transpose(-1, -2) * scaling  # [B, G, R, rows, stop]
        scores.masked_fill_(position[:stop] > position[rows, None], -torch.inf)
        weights = scores.softmax(-1)
        g = gradients[..., rows, :] @ values[..., :stop, :].transpose(-1, -2)
        mean = (g * weights).sum(-1, keepdim=True)
        rest = 1 - weights
        effect = torch.where(rest < _SMALLEST_REST, -g * weights, weights / rest.clamp_min(_SMALLEST_REST) * (mean - g))
        per_key = F.pad(effect.abs().sum((0, 2, 3)), (0, -stop % block))  # [G, keys]
        total[:, at, : at + 1] += per_key.unflatten(1, (at + 1, block)).sum(-1).to(total.dtype)
        d_scores = weights * (g - mean) * scaling
        dq[..., rows, :] = d_scores @ keys[..., :stop, :]
        dk[..., :stop, :] += (d_scores.transpose(-1, -2) @ queries[..., rows, :]).sum(2, keepdim=True)
        dv[..., :stop, :] += (weights.transpose(-1, -2) @ gradients[..., rows, :]).sum(2, keepdim=True)
    return dq.reshape(q.shape).to(q.dtype), dk[:, :, 0].to(k.dtype), dv[:, :, 0].to(v.dtype)


@contextmanager
def _ready_for_gradients(model: Any) -> Iterator[None]:
    """Inside, no parameter wants a gradient, the embeddings' output does, and decoder layers are checkpointed; dropout stays off."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    settings = {"use_reentrant": False}
    modern = hasattr(model, "activation_checkpointing_enable")  # transformers >= 5.23, where the old name warns
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        (model.activation_checkpointing_enable if modern else model.gradient_checkpointing_enable)(settings)
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # of this module alone: that is what transformers asks for, and the dropout of its children stays off
        yield
    finally:
        (model.activation_checkpointing_disable if modern else model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()  # a hook that enabling leaves on the embeddings
        model.eval()
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)
