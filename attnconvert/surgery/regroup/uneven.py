"""KV heads that serve different numbers of query heads: heads with large keys serve more query heads (KDGQA, DGQA; https://arxiv.org/abs/2408.08454).

The papers count anew at every step from the norms of the batch's keys, future tokens included, which leaves a KV cache filled under one map and read under
another. Here the norms are taken from calibration text and the map is frozen, with at least one query head for every KV head.

Shapes: H query heads, G KV heads of the source, N of the layer, D head_dim, W calibration windows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.regroup.grouping import in_similar_groups
from attnconvert.surgery.regroup.heads import Freedom, Projections, joined, repeated, selected
from attnconvert.surgery.regroup.inits import regroup_layer
from attnconvert.surgery.regroup.layout import projection_form, projection_tensors, read_projections, set_head_counts, set_projection
from attnconvert.surgery.regroup.model import Regrouped, new_tensors
from attnconvert.surgery.runtime.uneven import even_split
from attnconvert.surgery.sites import Site
from attnconvert.surgery.swap import SwapReport, swap

ALLOCATIONS = ("kdgqa", "dgqa_ema", "dgqa_diff", "even")
"""What decides how many query heads a KV head serves: the norm of its keys, its running mean, how much it changes, or nothing."""

_EMA_CURRENT = 0.9  # as published


def shared_out(weights: Sequence[float], num_heads: int) -> list[int]:
    """How many query heads each KV head serves: in proportion to `weights`, by largest remainder, at least one each.

    KV heads whose share is below one get one, and the others share what is left. Ties go to the larger weight, then to the earlier head. Weights that
    are all zero share evenly.

    Args:
        weights: not negative, one for each KV head.
        num_heads: H, at least as many.
    """
    counts = [0] * len(weights)
    open_heads, left = list(range(len(weights))), num_heads
    while True:
        total = sum(weights[i] for i in open_heads)
        if total <= 0:
            for i, count in zip(open_heads, even_split(left, len(open_heads)), strict=True):
                counts[i] = count
            return counts
        quotas = {i: weights[i] * left / total for i in open_heads}
        small = [i for i in open_heads if quotas[i] < 1]
        if not small:
            break
        for i in small:
            counts[i] = 1
        left -= len(small)
        open_heads = [i for i in open_heads if i not in small]
    for i in open_heads:
        counts[i] = int(quotas[i])
    extra = sorted(open_heads, key=lambda i: (-(quotas[i] - counts[i]), -weights[i], i))[: left - sum(counts[i] for i in open_heads)]
    for i in extra:
        counts[i] += 1
    return counts


def allocate(norms: Tensor, num_heads: int, num_key_value_heads: int, allocation: str) -> list[int]:
    """How many query heads each of N KV heads serves.

    Args:
        norms: Frobenius norms of the keys of each source head in each calibration window, [W, G], in the order of the text.
        num_heads: H.
        num_key_value_heads: N.
        allocation: one of ALLOCATIONS.
    """
    if allocation == "even":
        return even_split(num_heads, num_key_value_heads)
    by_query = norms.double().repeat_interleave(num_heads // norms.shape[1], 1)
    groups = torch.stack([part.mean(1) for part in by_query.split(even_split(num_heads, num_key_value_heads), 1)], 1)  # [W, N]
    if allocation == "kdgqa":
        found = groups.square().sum(0).sqrt()
    elif allocation == "dgqa_diff":
        found = groups.diff(dim=0).abs().mean(0) if len(groups) > 1 else torch.zeros_like(groups[0])
    else:
        assert allocation == "dgqa_ema", f"unknown allocation {allocation!r}"
        found = groups[0]
        for current in groups[1:]:
            found = _EMA_CURRENT * current + (1 - _EMA_CURRENT) * found
    spread = found.max() - found.min()
    weights = torch.zeros_like(found) if spread <= 1e-9 * found.max() else (found - found.min()) / spread
    return shared_out(weights.tolist(), num_heads)


@contextmanager
def key_norms(model: Any, sites: Sequence[Site]) -> Iterator[dict[int, list[Tensor]]]:
    """Inside, every forward pass is a calibration window: it adds the Frobenius norms of the keys of each KV head, before norms and positions.

    Args:
        model: the source.
        sites: its attention sites.

    Yields:
        Layer index -> one float64 tensor [G] for each forward pass; filled by the forward passes.
    """
    found: dict[int, list[Tensor]] = {}

    def adder(site: Site, fused: bool) -> Any:
        H, G, D = site.num_heads, site.num_key_value_heads, site.head_dim

        def hook(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            keys = output[..., H * D : (H + G) * D] if fused else output
            norms = keys.detach().double().unflatten(-1, (G, D)).square().sum(-1).flatten(0, -2).sum(0).sqrt()
            found.setdefault(site.layer_idx, []).append(norms)

        return hook

    with ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.path)
            form = projection_form(module)
            assert form is not None, "the caller checked the architecture"
            assert not form.by_head, "the caller checked the architecture"
            fused = len(form.inputs) == 1
            stack.callback(getattr(module, form.inputs[0 if fused else 1]).register_forward_hook(adder(site, fused)).remove)
        yield found


def regroup_unevenly(
    source: Projections, moments: Tensor, freedom: Freedom, query_heads: Sequence[int], init: str, generator: torch.Generator | None = None
) -> Projections:
    """One layer whose KV head n is merged from those of its own query heads: `query_heads[n]` of them, in order.

    Args:
        source: the layer's projections, float64.
        moments: as for `regroup_layer`.
        freedom: what may be turned.
        query_heads: how many query heads each new KV head serves.
        init: one of INITS.
        generator: for `random`.
    """
    wide, at, parts = repeated(source, source.q.shape[0]), 0, []
    for count in query_heads:
        parts.append(regroup_layer(selected(wide, range(at, at + count)), moments, freedom, 1, init, generator))
        at += count
    return joined(parts)


def unshared(made: Projections, query_heads: Sequence[int]) -> Projections:
    """The same layer with a KV head for every query head, as a stock module without grouping computes it."""
    index = [n for n, count in enumerate(query_heads) for _ in range(count)]
    kv = {name: getattr(made, name) for name in ("k", "v", "k_bias", "v_bias")}
    return Projections(
        made.q, made.k[index], made.v[index], made.o, made.q_bias, *(None if kv[name] is None else kv[name][index] for name in ("k_bias", "v_bias"))
    )


# ---------------------------------------------------------------- whole models


@dataclass(frozen=True)
class UnevenHeads:
    """New attention weights with a map of query to KV heads for each layer, ready for `install_uneven`.

    Attributes:
        query_heads: layer index -> how many query heads each KV head serves.
        tensors: name in the model's state dict -> tensor.
    """

    query_heads: Mapping[int, Sequence[int]]
    tensors: Mapping[str, Tensor]


def make_uneven(
    model: Any,
    sites: Sequence[Site],
    moments: Mapping[int, Tensor],
    freedoms: Mapping[int, Freedom],
    query_heads: Mapping[int, Sequence[int]],
    init: str,
    seed: int = 0,
    *,
    grouping: str = "contiguous",
) -> UnevenHeads:
    """New attention weights for `model`, which is left as it is; arguments as for `regroup`.

    Args:
        model: the source, in fp32.
        sites: its attention sites.
        moments: layer index -> second moments; layers that are absent use the weights alone.
        freedoms: layer index -> what may be turned.
        query_heads: layer index -> how many query heads each KV head serves; layers that are absent stay as they are.
        init: one of INITS.
        seed: of `random`.
        grouping: one of GROUPINGS, for the layers whose KV heads all serve as many.
    """
    generator = torch.Generator().manual_seed(seed)

    def made(site: Site, source: Projections, moment: Tensor) -> Projections:
        freedom, counts = freedoms[site.layer_idx], query_heads[site.layer_idx]
        if len(set(counts)) > 1:
            return regroup_unevenly(source, moment, freedom, counts, init, generator)
        if len(counts) == source.num_key_value_heads:
            return source
        if grouping == "similar":
            source = in_similar_groups(source, moment, freedom, len(counts), init)
        return regroup_layer(source, moment, freedom, len(counts), init, generator)

    return UnevenHeads(query_heads, new_tensors(model, [site for site in sites if site.layer_idx in query_heads], moments, made))


def uneven_plan(config: Any, sites: Sequence[Site], query_heads: Mapping[int, Sequence[int]], noise: bool = False) -> ConversionPlan:
    """The plan of a model whose layers have the maps `query_heads`; other layers are kept."""
    rows = []
    for site in sites:
        counts = query_heads.get(site.layer_idx)
        settings = {} if counts is None else {"kv_heads": len(counts), "query_heads": list(counts), "noise": noise}
        method = None if counts is None else "kdgqa"
        rows.append(LayerPlan(site.layer_idx, site.path, site.num_heads, site.num_key_value_heads, site.head_dim, method, settings))
    return ConversionPlan(config.model_type, tuple(rows))


def install_uneven(model: Any, new: UnevenHeads, plan: ConversionPlan) -> SwapReport:
    """Convert `model` in place to the plan (see `uneven_plan`), with these weights.

    Raises:
        AttnConvertError: `plan-mismatch`.
    """
    report = swap(model, plan)
    for name, tensor in new.tensors.items():
        model.get_parameter(name).data = tensor
    return report


def measurable(model: Any, sites: Sequence[Site], new: UnevenHeads) -> Regrouped:
    """Weights for `installed` that make the unconverted model compute what `new` will: a KV head for every query head, so the cache is larger.

    Every layer of the model must be in `new`, and the architecture must have num_key_value_heads.
    """
    tensors: dict[str, Tensor] = {}
    for site in sites:
        module, counts = model.get_submodule(site.path), new.query_heads[site.layer_idx]
        shrunk = copy.deepcopy(module)
        set_head_counts(shrunk, len(counts), site.num_heads)
        for name in projection_tensors(read_projections(module, site), module):
            set_projection(shrunk, name, new.tensors[f"{site.path}.{name}"])
        made = unshared(read_projections(shrunk, replace(site, num_key_value_heads=len(counts))), counts)
        tensors |= {f"{site.path}.{name}": tensor for name, tensor in projection_tensors(made, module).items()}
    return Regrouped(sites[0].num_heads, tensors)


def stock_heads(query_heads: Mapping[int, Sequence[int]], num_layers: int) -> int:
    """KV heads of the stock architecture that holds these maps.

    Raises:
        AttnConvertError: `not-stock`, when there is none: KV heads that serve different numbers of query heads, or layers with different heads.
    """
    uneven = sorted(idx for idx, counts in query_heads.items() if len(set(counts)) > 1)
    numbers = sorted({len(counts) for counts in query_heads.values()})
    if not uneven and len(numbers) == 1 and len(query_heads) == num_layers:
        return numbers[0]
    if uneven:
        idx = uneven[0]
        why = f"in {len(uneven)} layers KV heads serve different numbers of query heads (layer {idx}: {', '.join(map(str, query_heads[idx]))})"
    elif len(query_heads) < num_layers:
        why = f"{num_layers - len(query_heads)} of {num_layers} layers keep their heads"
    else:
        why = f"layers have {', '.join(map(str, numbers))} KV heads"
    raise AttnConvertError(
        "not-stock",
        f"no stock architecture holds this model: {why}",
        expected="the same number of KV heads in every layer, each serving as many query heads: config.json holds one num_key_value_heads",
        hint="save it with the code of attnconvert (it then loads with trust_remote_code), or use the method gqa",
    )
