"""Attention layers by head, and the one way heads are merged: a pair of linear maps per head, folded into the four projections.

`encode` makes the new head (the sum over the members of its group of encode @ head) and `decode` takes it back (head ~ decode @ new head): k and v rows
are multiplied by encode, q rows and o columns by decode. Every init differs in its maps alone.

Shapes: H query heads, G KV heads of the source, N of the target, L = lcm(G, N) heads that are pooled in N groups of M, D head_dim,
E hidden_size, P rotary pairs, F channels without rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """The four projections of one attention layer by head.

    Attributes:
        q: [H, D, E].
        k: [G, D, E].
        v: [G, D, E].
        o: [H, E, D], the block of o_proj that reads head h.
        q_bias: [H, D] or None.
        k_bias: [G, D] or None.
        v_bias: [G, D] or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None

    @property
    def num_key_value_heads(self) -> int:
        """G."""
        return self.k.shape[0]

    def to(self, dtype: torch.dtype) -> Projections:
        """The same in `dtype`."""
        return replace(self, **{name: tensor.to(dtype) for name, tensor in vars(self).items() if tensor is not None})


@dataclass(frozen=True)
class Freedom:
    """What may be turned in a layer without changing its function.

    Attributes:
        pairs: int64 [P, 2], rotary pairs of channels, each of which keys and queries may be rotated in.
        free: int64 [F], channels without rotary embedding, which any orthogonal matrix may mix. Without pairs and free channels keys stay as they are.
        keys_fixed: why keys cannot be turned; None when they can.
        values_fixed: why values cannot be turned; None when they can.
    """

    pairs: Tensor
    free: Tensor
    keys_fixed: str | None = None
    values_fixed: str | None = None


@dataclass(frozen=True)
class HeadMaps:
    """Linear maps between the L heads of a source and the N of a target: new = sum over a group of encode @ head, and head ~ decode @ new.

    Attributes:
        encode: [L, D, D].
        decode: [L, D, D].
    """

    encode: Tensor
    decode: Tensor


def fold(source: Projections, keys: HeadMaps, values: HeadMaps, num_key_value_heads: int) -> Projections:
    """The projections of a layer with maps between heads folded in.

    A query that meets `decode @ new key` sees the same as `decode.T @ query` meeting the new key, so decode goes into q and o.

    Args:
        source: of G heads.
        keys: of L heads, a multiple of G; a source head that is split over groups is repeated.
        values: likewise.
        num_key_value_heads: N; groups are contiguous.
    """
    num_maps, heads = keys.encode.shape[0], source.q.shape[0]
    assert num_maps % source.num_key_value_heads == num_maps % num_key_value_heads == heads % num_maps == 0, "heads divide"
    repeats, per_map = num_maps // source.num_key_value_heads, heads // num_maps

    def pooled(tensor: Tensor | None, maps: Tensor) -> Tensor | None:
        if tensor is None:
            return None
        wide = tensor.repeat_interleave(repeats, 0)
        turned = torch.einsum("lij,lj...->li...", maps, wide)
        summed: Tensor = turned.unflatten(0, (num_key_value_heads, -1)).sum(1)
        return summed

    decode_q, decode_o = (maps.decode.repeat_interleave(per_map, 0) for maps in (keys, values))
    k, v = pooled(source.k, keys.encode), pooled(source.v, values.encode)
    assert k is not None
    assert v is not None
    return Projections(
        q=torch.einsum("hji,hje->hie", decode_q, source.q),
        k=k,
        v=v,
        o=torch.einsum("hej,hji->hei", source.o, decode_o),
        q_bias=None if source.q_bias is None else torch.einsum("hji,hj->hi", decode_q, source.q_bias),
        k_bias=pooled(source.k_bias, keys.encode),
        v_bias=pooled(source.v_bias, values.encode),
    )


def rotation(turn: Tensor) -> HeadMaps:
    """The maps of turning each head by an orthogonal `turn` [L, D, D] (new = turn.T @ head), to be folded with N = L."""
    return HeadMaps(turn.transpose(1, 2), turn)


def repeated(source: Projections, num_key_value_heads: int) -> Projections:
    """The same layer with each KV head repeated until there are `num_key_value_heads` of them."""
    times = num_key_value_heads // source.num_key_value_heads
    assert times * source.num_key_value_heads == num_key_value_heads, "heads divide"
    wide = {name: getattr(source, name) for name in ("k", "v", "k_bias", "v_bias")}
    more: dict[str, Any] = {name: None if tensor is None else tensor.repeat_interleave(times, 0) for name, tensor in wide.items()}
    return replace(source, **more)


def selected(source: Projections, key_value_heads: Sequence[int]) -> Projections:
    """Some KV heads of a layer in a given order, with the query heads that read them. With all of them it is the same function."""
    per_head = source.q.shape[0] // source.num_key_value_heads
    kv = torch.tensor(list(key_value_heads), device=source.k.device)
    q = (kv[:, None] * per_head + torch.arange(per_head, device=kv.device)).flatten()
    index = {"q": q, "o": q, "q_bias": q, "k": kv, "v": kv, "k_bias": kv, "v_bias": kv}
    return Projections(**{name: None if tensor is None else tensor[index[name]] for name, tensor in vars(source).items()})  # type: ignore[arg-type]


def joined(parts: Sequence[Projections]) -> Projections:
    """Layers with different heads of the same size side by side."""
    names = [name for name, tensor in vars(parts[0]).items() if tensor is not None]
    return Projections(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
