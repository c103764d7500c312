"""Which KV heads become one: neighbours, or those that lose least together.

Any order of the KV heads is the same function, as long as query heads and output columns move along, so the result stays a stock model. What merging
two heads costs is predicted from calibration: the share of the attention logits' and of the values' energy that the merged head cannot hold, in the
size of what the values add to the residual stream. A group costs the sum over its pairs, and pairs are swapped between groups while that helps.

Shapes: L heads in N groups of M, D head_dim.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from attnconvert.surgery.regroup import inits
from attnconvert.surgery.regroup.heads import Freedom, HeadMaps, Projections, repeated, selected

GROUPINGS = ("contiguous", "similar")
"""Ways to choose the heads that become one."""


def usual_grouping(init: str) -> str:
    """The grouping where none is asked for. Measured (docs/results.md), `similar` helps every init that fits its maps to activations; the mean it can hurt."""
    return "similar" if init in ("svd", "aligned") else "contiguous"


def in_similar_groups(source: Projections, moments: Tensor, freedom: Freedom, num_key_value_heads: int, init: str) -> Projections:
    """The same layer with KV heads in another order (repeated where N does not divide them), so that contiguous groups lose little.

    Args:
        source: of one layer, float64.
        moments: second moments of what its projections read, [E + 1, E + 1].
        freedom: what may be turned.
        num_key_value_heads: N.
        init: the one that will merge them.
    """
    wide = repeated(source, math.lcm(source.num_key_value_heads, num_key_value_heads))
    return selected(wide, similar_order(pair_costs(wide, moments, freedom, init), num_key_value_heads))


def pair_costs(source: Projections, moments: Tensor, freedom: Freedom, init: str) -> Tensor:
    """What merging each pair of KV heads is expected to cost, symmetric [L, L], zero on the diagonal.

    An error of the logits with variance x (over pairs of tokens, in units of the softmax's temperature) is taken to spoil the share x / (1 + x) of the
    values: small errors count in proportion, and no error spoils more than everything.
    """
    heads, dim = source.k.shape[:2]
    pairs = list(itertools.combinations(range(heads), 2))
    costs = source.k.new_zeros(heads, heads)
    if not pairs:
        return costs
    chosen = selected(source, [head for pair in pairs for head in pair])
    tokens = moments[-1, -1]
    gram_k = inits.second_moments_by_group(chosen.k, chosen.k_bias, moments, 1, len(pairs))
    gram_v = inits.second_moments_by_group(chosen.v, chosen.v_bias, moments, 1, len(pairs))
    weights, roots = inits.query_weights(chosen, moments, 2 * len(pairs)), inits.output_roots(chosen, 2 * len(pairs))
    keys, values = inits.head_maps(chosen, moments, freedom, len(pairs), "mean" if init == "random" else init)
    logits = _unheld(keys, gram_k, torch.diag_embed(weights.sqrt())) / (tokens.square() * dim * (source.q.shape[0] // heads))
    lost = _unheld(values, gram_v, roots)
    seen = roots.unflatten(0, (-1, 2))
    size = torch.einsum("niab,nibic,niac->ni", seen, gram_v, seen)
    total = ((lost + size * logits / (1 + logits)) / tokens).sum(1)
    first, second = torch.tensor(pairs, device=costs.device).T
    costs[first, second] = costs[second, first] = total
    return costs


def _unheld(maps: HeadMaps, gram: Tensor, roots: Tensor) -> Tensor:
    """Energy of what the merged head of each group does not give back to its members, [N, M], as `roots` [L, D, D] sees it.

    Args:
        maps: of L heads.
        gram: second moments of the heads, [N, M, D, M, D].
        roots: of L heads.
    """
    groups, members, dim = gram.shape[:3]
    encode, decode, seen = (x.unflatten(0, (groups, members)) for x in (maps.encode, maps.decode, roots))
    held = torch.einsum("niab,njbc->niajc", decode, encode)
    every = torch.eye(members * dim, dtype=gram.dtype, device=gram.device).view(members, dim, members, dim)
    error = torch.einsum("niab,nibjc->niajc", seen, every - held).flatten(3)
    energy: Tensor = torch.einsum("niax,nxy,niay->ni", error, gram.flatten(3).flatten(1, 2), error)
    return energy


def similar_order(costs: Tensor, num_groups: int) -> list[int]:
    """An order of the heads in which contiguous groups of equal size have a low sum of `costs` [L, L] within groups.

    Swaps from two starts, contiguous groups and groups built greedily around the heads that fit nobody; never worse than contiguous.
    """
    heads = costs.shape[0]
    table: list[list[float]] = costs.tolist()
    size = heads // num_groups

    def cost(group: list[int]) -> float:
        return sum(table[i][j] for i, j in itertools.combinations(group, 2))

    def swapped(groups: list[list[int]]) -> list[list[int]]:
        groups = [list(group) for group in groups]
        better = True
        while better:
            better = False
            for a, b in itertools.combinations(range(num_groups), 2):
                for i, j in itertools.product(range(size), repeat=2):
                    x, y = groups[a][i], groups[b][j]
                    change = sum(table[y][z] - table[x][z] for z in groups[a] if z != x) + sum(table[x][z] - table[y][z] for z in groups[b] if z != y)
                    if change < -1e-9 * abs(cost(groups[a]) + cost(groups[b])):
                        groups[a][i], groups[b][j] = y, x
                        better = True
        return groups

    contiguous = [list(range(at, at + size)) for at in range(0, heads, size)]
    greedy, left = [], set(range(heads))
    while left:
        group = [max(left, key=lambda x: (min((table[x][z] for z in left if z != x), default=0.0), -x))]
        left.discard(group[0])
        while len(group) < size:
            group.append(min(left, key=lambda x: (sum(table[x][z] for z in group), x)))
            left.discard(group[-1])
        greedy.append(group)
    best = min((swapped(contiguous), swapped(greedy)), key=lambda groups: sum(map(cost, groups)))
    return [head for group in sorted(sorted(group) for group in best) for head in group]
