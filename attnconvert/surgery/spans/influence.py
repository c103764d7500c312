"""How much a model's predictions change when a rule hides keys: profiled once for all rules, on whole sequences.

A rule takes the hidden keys S out of a row of a softmax map, and the rest share their weight. The row's output then moves by

    d_i = sum_{j not in S} A_ij (v_j - O_i) / sum_{j not in S} A_ij,        and the loss to first order by        e_i = dO_i . d_i

with dO the gradient at the attention's output. What counts is how far the predictions move, KL(as it is || with the rule), which has no first order: it is
half the quadratic form of d with the Fisher matrix. When each scored token is replaced by one drawn from the model's own prediction, e_i^2 / 2 is an unbiased
estimate of that, so a rule costs a KV head the sum of e_i^2 / 2 over rows, e_i summed over the query heads of the group, in nats per scored token. Covariance
between rows and between KV heads is left out: that makes it a sum over heads, which the optimiser needs.

MoA (https://arxiv.org/abs/2406.14909) sums |e| of single entries instead, which is not a divergence: many small effects weigh as much as one large one. Adding up within
a row before taking |e| changes little, the squares do (one model, few samples):

Measured on SmolLM2-135M-Instruct at 512 tokens, 16 sinks, plans of fixed windows made from the same 6 texts and 6 questions: KL to the dense model on held-out
text, and the loss of a pass key's answer (10 prompts, dense .54), nats.

    share of the cache                50 %          25 %
    one window for all heads          .023  11.0    .082  16.7
    sum of |e| of single pairs        .033   8.8    .113  10.2
    sum of |e| of rows                .031   4.6    .142  11.5
    sum of e^2 / 2 of rows            .016   2.6    .064   6.1
    the same, texts alone             .012   5.3    .058  11.2
    the same, questions alone         .043   2.5    .151   4.1

The attention is an autograd function whose backward pass does the work: per tile of queries, rows of A are made again from q and k, sums over
the keys from each to the last give every rule's e_i by a look-up, exactly for its window and sinks, and the tile gives the gradients of q, k and v, all in fp32. No map is
ever whole, and nothing is kept: with gradient checkpointing q and k live as long as their layer's backward pass. Memory is linear in T.

Shapes: T tokens, H query heads, G key-value heads, D head_dim, R rules.
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
from attnconvert.surgery.spans.rules import Rule, windows
from attnconvert.surgery.spans.stock import attention_through

_TINY = 1e-30  # weight of the keys in sight that is nothing in fp32
_TILE = 64  # queries of a tile on a CPU, and at least
_TILE_NUMBERS = 1 << 25  # in one tensor of a tile on a GPU: 128 MiB

Item = tuple[Tensor, Tensor]
"""input_ids int64 [T], and a bool [T] that is True on the tokens whose predictions count, the last ones of the sequence."""


@dataclass(frozen=True)
class Influence:
    """Profile of some layers.

    Attributes:
        costs: length -> layer index -> float64 [G, R] on the CPU: what each rule costs each KV head, alone, in nats per scored token; mean over samples.
        num_samples: length -> samples.
        losses: length -> entropy of the model's predictions as it is, nats per scored token.
    """

    costs: Mapping[int, Mapping[int, Tensor]]
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


def profile(
    model: Any,
    sites: Sequence[Site],
    items: Sequence[Item],
    rules: Sequence[Rule],
    num_sinks: Mapping[int, int],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Influence:
    """What every rule costs every KV head of `sites`. The model is unchanged afterwards.

    Args:
        model: a causal LM of transformers, with weights, on its device, in any floating type.
        sites: the layers to profile.
        items: samples; those of one length are averaged.
        rules: the rules.
        num_sinks: layer index -> sinks of the layer.
        seed: of the tokens that are drawn from the model's predictions.
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
    lowest: dict[tuple[int, int], Tensor] = {}
    generator = torch.Generator(device).manual_seed(seed)

    def attend(idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        out: Tensor = _Profiled.apply(q, k, v, scaling, current[idx], lowest[q.shape[2], num_sinks[idx]], num_sinks[idx])
        return out

    with ExitStack() as stack:
        stack.enter_context(_ready_for_gradients(model))
        stack.enter_context(attention_through(model, heads.keys(), attend))
        stack.enter_context(torch.enable_grad())
        for done, (input_ids, response) in enumerate(items, start=1):
            length = int(input_ids.shape[0])
            own = sums.setdefault(length, {idx: torch.zeros(G, len(rules), dtype=torch.float64) for idx, G in heads.items()})
            for sinks in {num_sinks[idx] for idx in heads}:
                if (length, sinks) not in lowest:
                    lowest[length, sinks] = first_keys(rules, length, sinks).to(device)
            current.update({idx: torch.zeros(G, len(rules), device=device) for idx, G in heads.items()})
            logits = response_logits(model, input_ids.to(device), response)
            said = logits.detach().softmax(-1)
            drawn = torch.multinomial(said, 1, generator=generator)[:, 0]
            F.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            for idx, total in current.items():
                own[idx] += total.cpu().double() / len(drawn)
            counts[length] = counts.get(length, 0) + 1
            losses[length] = losses.get(length, 0.0) + float(torch.special.entr(said).sum(-1).mean())
            if progress is not None:
                progress(done, len(items))
    return Influence(
        {length: {idx: total / counts[length] for idx, total in own.items()} for length, own in sums.items()},
        counts,
        {length: total / counts[length] for length, total in losses.items()},
    )


def response_logits(model: Any, input_ids: Tensor, response: Tensor) -> Tensor:
    """Predictions of the response tokens: logits [tokens of the response, vocabulary], in fp32 (or fp64).

    Args:
        model: a causal LM.
        input_ids: int64 [T] on the model's device.
        response: bool [T], True on the last tokens and nowhere else; never on the first.
    """
    num_tokens = int(response.sum())
    assert 0 < num_tokens < len(response), "a response has a context"
    assert bool(response[-num_tokens:].all()), "the response ends the sequence"
    logits: Tensor = model(input_ids=input_ids[None], use_cache=False, logits_to_keep=num_tokens + 1).logits[0, :-1]
    return logits if logits.dtype == torch.float64 else logits.float()


class _Profiled(torch.autograd.Function):
    """Causal softmax attention; its backward pass adds what each rule costs to `total` [G, R]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, total: Tensor, lowest: Tensor, num_sinks: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scaling, ctx.total, ctx.lowest, ctx.num_sinks = scaling, total, lowest, num_sinks
        return softmax_attention(q, k, v, scaling=scaling, start=None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = add_costs(q, k, v, gradients[0], ctx.scaling, ctx.total, ctx.lowest, ctx.num_sinks)
        return dq, dk, dv, None, None, None, None


def first_keys(rules: Sequence[Rule], length: int, num_sinks: int) -> Tensor:
    """The first key of each query's window, past the sinks: int64 [T, R] on the CPU."""
    position = torch.arange(length)
    return torch.stack([(position + 1 - windows(rule, position)).clamp_min(num_sinks) for rule in rules], 1)


def add_costs(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, scaling: float, total: Tensor, lowest: Tensor, num_sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the sum over rows of e^2 / 2 to `total` and returns the gradients of q, k and v.

    Args:
        q, d_out: [B, H, T, D]. k, v: [B, G, T, D].
        scaling: factor on q.k.
        total: [G, R], changed in place.
        lowest: [T, R], from `first_keys`, on the same device.
        num_sinks: first tokens that no rule hides.
    """
    B, H, T, D = q.shape
    G = k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = (B, G, H // G, T, D)
    queries, gradients = q.reshape(grouped).to(wide), d_out.reshape(grouped).to(wide)
    keys, values = k.to(wide)[:, :, None], v.to(wide)[:, :, None]
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    position = torch.arange(T, device=q.device)
    tile = max(_TILE, _TILE_NUMBERS // (B * H * T)) if q.is_cuda else _TILE
    for first in range(0, T, tile):
        stop = min(T, first + tile)
        rows = slice(first, stop)
        scores = queries[..., rows, :] @ keys[..., :stop, :].transpose(-1, -2) * scaling  # [B, G, H/G, rows, stop]
        scores.masked_fill_(position[:stop] > position[rows, None], -torch.inf)
        weights = scores.softmax(-1)
        g = gradients[..., rows, :] @ values[..., :stop, :].transpose(-1, -2)
        mean = (g * weights).sum(-1, keepdim=True)
        d_scores = weights * (g - mean)
        if stop > num_sinks:  # d of the keys in sight: with those that are hidden it adds up to 0, and sums of few keys are exact
            ends = lowest[rows].clamp_max(stop) - num_sinks  # [rows, R], keys that are hidden
            shown, moved = (_shown(x, num_sinks, ends) for x in (weights, d_scores))  # [B, G, H/G, rows, R]
            effect = (moved / shown.clamp_min(_TINY)).sum(2) * (ends > 0)
            total += (effect.square().sum((0, 2)) / 2).to(total.dtype)
        d_scores *= scaling
        dq[..., rows, :] = d_scores @ keys[..., :stop, :]
        dk[..., :stop, :] += (d_scores.transpose(-1, -2) @ queries[..., rows, :]).sum(2, keepdim=True)
        dv[..., :stop, :] += (weights.transpose(-1, -2) @ gradients[..., rows, :]).sum(2, keepdim=True)
    return dq.reshape(q.shape).to(q.dtype), dk[:, :, 0].to(k.dtype), dv[:, :, 0].to(v.dtype)


def _shown(x: Tensor, num_sinks: int, ends: Tensor) -> Tensor:
    """Sums over the sinks and the window, [..., rows, R], of x [..., rows, keys]; `ends` [rows, R]: keys after the sinks that are hidden."""
    from_here = F.pad(x[..., num_sinks:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    return from_here.gather(-1, ends.expand(*x.shape[:-1], -1)) + x[..., :num_sinks].sum(-1, keepdim=True)


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
