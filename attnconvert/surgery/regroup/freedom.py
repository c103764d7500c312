"""What a model shows when it is run: which rotations of its heads leave it alone, and the second moments of what its projections read.

Shapes: H query heads, G KV heads of the source, N of the target, L = lcm(G, N) heads that are pooled in N groups of M, D head_dim,
E hidden_size, P rotary pairs, F channels without rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from attnconvert.surgery.regroup.heads import Freedom, fold, rotation
from attnconvert.surgery.regroup.layout import projection_form, projection_tensors, read_projections
from attnconvert.surgery.regroup.model import Regrouped
from attnconvert.surgery.sites import Site

_PROBE = "attnconvert_regroup_probe"
_AMPLITUDE = 512.0  # a clip or a norm shows between unit vectors and vectors this long
_POSITIONS = (0, 1, 7, 61)


@torch.no_grad()
def find_freedom(model: Any, sites: Sequence[Site]) -> dict[int, Freedom]:
    """What may be turned in each layer, found by running the attention modules on unit vectors in place of projected states.

    Positions are seen through what they do: channels that some position mixes are a rotary pair (half-split, interleaved or partial, whatever the
    family calls it), channels that no position touches are free. A norm or a clip between projection and attention is seen because the map is
    not linear, and keeps keys (or values) as they are.

    Args:
        model: a causal LM with weights, in fp32.
        sites: its attention sites.

    Returns:
        Layer index -> freedom.
    """
    seen, straight = _probe(model, sites, 1.0)
    loud, _ = _probe(model, sites, _AMPLITUDE)
    found = {}
    for site in sites:
        idx = site.layer_idx
        none = torch.empty(0, dtype=torch.int64, device=seen[idx]["k"].device)
        keys_fixed = values_fixed = None
        pairs, free = none.view(0, 2), none
        linear = {name: torch.allclose(seen[idx][name] * _AMPLITUDE, loud[idx][name], rtol=1e-3, atol=1e-3 * _AMPLITUDE) for name in "qkv"}
        if not (linear["q"] and linear["k"]):
            keys_fixed = (
                "a norm or clip stands between the projections of queries and keys and the attention, and its weights per channel let no rotation through"
            )
        else:
            layouts = [_layout(seen[idx][name]) for name in "qk"]
            if any(layout is None for layout in layouts) or not all(torch.equal(x, y) for x, y in zip(*layouts, strict=True)):  # type: ignore[arg-type]
                keys_fixed = "positions enter queries and keys in another way than by rotations of pairs of channels"
            else:
                pairs, free = layouts[0]  # type: ignore[misc]
        eye = torch.eye(site.head_dim, device=none.device)[:, None, :]
        if not (linear["v"] and torch.allclose(seen[idx]["v"], eye.expand_as(seen[idx]["v"]), atol=1e-4)):
            values_fixed = "something stands between the projection of values and the attention"
        elif not straight[idx]:
            values_fixed = "something stands between the attention and the output projection"
        found[idx] = Freedom(pairs, free, keys_fixed, values_fixed)
    return found


def _layout(maps: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rotary pairs [P, 2] and free channels [F] of a map per position, [D in, T, D out]; None when it is neither."""
    by_position = maps.transpose(0, 1)
    scale = by_position.abs().max()
    dim = maps.shape[0]
    coupled = (by_position.abs().amax(0) > 1e-6 * scale) & ~torch.eye(dim, dtype=torch.bool, device=maps.device)
    if bool((coupled.sum(1) > 1).any()) or not torch.equal(coupled, coupled.T):
        return None
    pairs = coupled.triu().nonzero()
    free = (~coupled.any(1)).nonzero()[:, 0]
    a, b = pairs[:, 0], pairs[:, 1]
    rotations = torch.allclose(by_position[:, a, a], by_position[:, b, b], atol=1e-4) and torch.allclose(by_position[:, a, b], -by_position[:, b, a], atol=1e-4)
    untouched = by_position[:, free, free]
    if not rotations or (len(free) and not torch.allclose(untouched, untouched[:1, :1].expand_as(untouched), atol=1e-4)):
        return None
    return pairs, free


def _probe(model: Any, sites: Sequence[Site], amplitude: float) -> tuple[dict[int, dict[str, Tensor]], dict[int, bool]]:
    """What the attention function of each layer receives when every head's projection is the unit vector e_i for row i of a batch.

    Args:
        model: with weights.
        sites: its attention sites.
        amplitude: length of the vectors.

    Returns:
        Layer -> q, k, v -> [D rows, T positions, D], the same for every head or NaN; and layer -> whether what attention returns reaches the output projection unchanged.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    device = next(model.parameters()).device
    seen: dict[int, dict[str, Tensor]] = {}
    returned: dict[int, Tensor] = {}
    straight: dict[int, bool] = {}
    dim, heads = sites[0].head_dim, sites[0].num_heads
    limit = int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 2048)
    positions = torch.tensor(sorted({p for p in (*_POSITIONS, limit - 1) if p < limit}), device=device)[None].expand(dim, -1)

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # All heads must get the same map; NaN, which equals nothing, says that they do not.
        seen[module.layer_idx] = {
            name: torch.where(torch.tensor(torch.allclose(x, x[:, :1].expand_as(x), atol=1e-5), device=device), x[:, 0].float(), math.nan)
            for name, x in (("q", q), ("k", k), ("v", v))
        }
        generator = torch.Generator().manual_seed(module.layer_idx)
        y = torch.randn(q.shape[0], q.shape[2], heads, dim, generator=generator).to(q)
        returned[module.layer_idx] = y
        return y, None

    def unit(linear: Any, _: Any, output: Tensor) -> Tensor:
        vectors = amplitude * torch.eye(dim, device=output.device, dtype=output.dtype)
        return vectors[:, None, None, :].expand(dim, output.shape[1], output.shape[2] // dim, dim).reshape(output.shape)

    def arrived(idx: int) -> Any:
        def hook(linear: Any, args: tuple[Tensor, ...]) -> None:
            straight[idx] = torch.equal(args[0].reshape(-1), returned[idx].reshape(-1))

        return hook

    AttentionInterface.register(_PROBE, record)
    AttentionMaskInterface.register(_PROBE, lambda *args, **kwargs: None)
    implementation = model.config._attn_implementation
    with ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.path)
            form = projection_form(module)
            assert form is not None, "the caller checked the architecture"
            for name in form.inputs:
                stack.callback(getattr(module, name).register_forward_hook(unit).remove)
            stack.callback(getattr(module, form.output).register_forward_pre_hook(arrived(site.layer_idx)).remove)
        model.set_attn_implementation(_PROBE)
        stack.callback(model.set_attn_implementation, implementation)
        model.base_model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    return seen, straight


@contextmanager
def second_moments(model: Any, sites: Sequence[Site]) -> Iterator[dict[int, Tensor]]:
    """Inside, every forward pass adds to the second moments of (hidden state, 1) that the projections of each layer read.

    Args:
        model: the source.
        sites: its attention sites.

    Yields:
        Layer index -> float64 [E + 1, E + 1] on the model's device, sums over tokens; filled by the forward passes.
    """
    sums: dict[int, Tensor] = {}

    def adder(idx: int) -> Any:
        def hook(linear: Any, args: tuple[Tensor, ...]) -> None:
            states = args[0].detach().flatten(0, -2).float()
            states = torch.cat([states, torch.ones_like(states[:, :1])], 1)
            moment = (states.T @ states).double()
            sums[idx] = moment if idx not in sums else sums[idx].add_(moment)

        return hook

    with ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.path)
            form = projection_form(module)
            assert form is not None, "the caller checked the architecture"
            stack.callback(getattr(module, form.inputs[0]).register_forward_pre_hook(adder(site.layer_idx)).remove)
        yield sums


def random_turns(sites: Sequence[Site], freedoms: Mapping[int, Freedom], seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """Random rotations that leave the model's function alone: layer -> (of keys, of values), [G, D, D] float64 each."""
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(count: int, dim: int) -> Tensor:
        q: Tensor = torch.linalg.qr(torch.randn(count, dim, dim, generator=generator, dtype=torch.float64))[0]
        return q

    turns = {}
    for site in sites:
        freedom, groups = freedoms[site.layer_idx], site.num_key_value_heads
        keys = torch.eye(site.head_dim, dtype=torch.float64).repeat(groups, 1, 1)
        a, b = freedom.pairs[:, 0].cpu(), freedom.pairs[:, 1].cpu()
        angle = 2 * math.pi * torch.rand(groups, len(a), generator=generator, dtype=torch.float64)
        keys[:, a, a], keys[:, b, b], keys[:, b, a], keys[:, a, b] = angle.cos(), angle.cos(), -angle.sin(), angle.sin()
        free = freedom.free.cpu()
        if len(free):
            keys[:, free[:, None], free[None, :]] = orthogonal(groups, len(free))
        values = torch.eye(site.head_dim, dtype=torch.float64).repeat(groups, 1, 1) if freedom.values_fixed else orthogonal(groups, site.head_dim)
        turns[site.layer_idx] = (keys, values)
    return turns


def turned(model: Any, sites: Sequence[Site], turns: Mapping[int, tuple[Tensor, Tensor]]) -> Regrouped:
    """The attention weights of `model` with every KV head turned and as many heads as before: the same function, up to rounding."""
    tensors: dict[str, Tensor] = {}
    for site in sites:
        module = model.get_submodule(site.path)
        source = read_projections(module, site)
        keys, values = (rotation(turn.to(source.k.device)) for turn in turns[site.layer_idx])
        made = fold(source.to(torch.float64), keys, values, site.num_key_value_heads).to(source.k.dtype)
        tensors |= {f"{site.path}.{name}": tensor for name, tensor in projection_tensors(made, module).items()}
    return Regrouped(sites[0].num_key_value_heads, tensors)
