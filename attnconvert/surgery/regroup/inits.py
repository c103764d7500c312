"""The inits: which maps merge the KV heads of a group into one.

Shapes: H query heads, G KV heads of the source, N of the target, L = lcm(G, N) heads that are pooled in N groups of M, D head_dim,
E hidden_size, P rotary pairs, F channels without rotary embedding. Spec: https://arxiv.org/abs/2305.13245, https://arxiv.org/abs/2412.20677.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attnconvert.surgery.regroup.heads import Freedom, HeadMaps, Projections, fold

INITS = ("svd", "aligned", "mean", "medoid", "first", "random")
"""Ways to make fewer KV heads, the default first: `svd` loses least everywhere it was measured, before training and after (docs/results.md)."""
CALIBRATED = ("svd", "aligned", "medoid")
"""Those that look at activations."""

_MAX_ITERATIONS, _TOLERANCE = 100, 1e-6  # of the Procrustes objective, relative


def regroup_layer(
    source: Projections, moments: Tensor, freedom: Freedom, num_key_value_heads: int, init: str, generator: torch.Generator | None = None
) -> Projections:
    """One layer with fewer KV heads.

    Args:
        source: the layer's projections, float64.
        moments: [E + 1, E + 1], second moments of (hidden state, 1) that the projections read; the identity stands for "no calibration".
        freedom: what may be turned.
        num_key_value_heads: N, a divisor of H.
        init: one of INITS.
        generator: for `random`.
    """
    if init != "random":
        return fold(source, *head_maps(source, moments, freedom, num_key_value_heads, init), num_key_value_heads)
    target = fold(source, *head_maps(source, moments, freedom, num_key_value_heads, "mean"), num_key_value_heads)

    def drawn(like: Tensor, std: Tensor) -> Tensor:
        return (torch.randn(like.shape, generator=generator, dtype=torch.float64) * std.cpu()).to(like)

    def zeros(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else torch.zeros_like(bias)

    k, v = drawn(target.k, source.k.std()), drawn(target.v, source.v.std())
    return replace(target, k=k, v=v, k_bias=zeros(target.k_bias), v_bias=zeros(target.v_bias))


def head_maps(source: Projections, moments: Tensor, freedom: Freedom, num_key_value_heads: int, init: str) -> tuple[HeadMaps, HeadMaps]:
    """The maps of keys and of values that an init merges heads by; arguments as for `regroup_layer`, `random` excepted."""
    num_heads, dim = source.q.shape[:2]
    num_maps = math.lcm(source.num_key_value_heads, num_key_value_heads)
    members = num_maps // num_key_value_heads
    assert num_heads % num_key_value_heads == 0, "the caller checked the heads"
    eye = torch.eye(dim, dtype=source.k.dtype, device=source.k.device).expand(num_maps, dim, dim)
    if init == "mean":
        mean = HeadMaps(eye / members, eye)
        return mean, mean
    if init == "first":
        chosen = _one_of(eye, torch.zeros(num_key_value_heads, dtype=torch.int64), members)
        return chosen, chosen
    repeats = num_maps // source.num_key_value_heads
    gram_k = second_moments_by_group(source.k, source.k_bias, moments, repeats, num_key_value_heads)
    gram_v = second_moments_by_group(source.v, source.v_bias, moments, repeats, num_key_value_heads)
    if init == "medoid":
        closeness = (cosines(gram_k) + cosines(gram_v)).sum(2)
        # Two heads are equally close to each other, and rounding must not choose: the larger one stays.
        size = sum(torch.einsum("nidid->ni", gram) / torch.einsum("nidid->n", gram)[:, None] for gram in (gram_k, gram_v))
        closest = (closeness + 1e-6 * size).argmax(1)
        chosen = _one_of(eye, closest.cpu(), members)
        return chosen, chosen
    if init == "aligned":
        keys = _pooled_maps(_turned_keys(gram_k, freedom), gram_k)
        return keys, _pooled_maps(eye if freedom.values_fixed else _turned_freely(gram_v).flatten(0, 1), gram_v)
    assert init == "svd", f"unknown init {init!r}"
    keys = _pooled_maps(eye, gram_k) if freedom.keys_fixed else _svd_keys(gram_k, query_weights(source, moments, num_maps), freedom)
    return keys, _pooled_maps(eye, gram_v) if freedom.values_fixed else _svd_values(gram_v, output_roots(source, num_maps))


def _one_of(eye: Tensor, chosen: Tensor, members: int) -> HeadMaps:
    """Keep one head of each group, the member `chosen` [N]."""
    keep = torch.nn.functional.one_hot(chosen, members).flatten().to(eye)
    return HeadMaps(eye * keep[:, None, None], eye)


def second_moments_by_group(weight: Tensor, bias: Tensor | None, moments: Tensor, repeats: int, num_groups: int) -> Tensor:
    """Second moments of what the heads of each group put out, [N, M, D, M, D]."""
    rows = torch.cat([weight, torch.zeros_like(weight[..., :1]) if bias is None else bias[..., None]], -1).repeat_interleave(repeats, 0)
    rows = rows.unflatten(0, (num_groups, -1))
    flat = rows.flatten(1, 2)
    members, dim = rows.shape[1], rows.shape[2]
    gram: Tensor = (flat @ moments.to(flat) @ flat.transpose(1, 2)).unflatten(2, (members, dim)).unflatten(1, (members, dim))
    return gram


def cosines(gram: Tensor) -> Tensor:
    """Cosine between the heads of each group, [N, M, M], over tokens and channels together."""
    inner = torch.einsum("nidjd->nij", gram)
    norm = inner.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return inner / (norm[:, :, None] * norm[:, None, :])


def _pooled_maps(turn: Tensor, gram: Tensor) -> HeadMaps:
    """Turn, take the mean, and give it the mean size of its members: the mean of M unrelated heads is sqrt(M) too short.

    Size is measured as the turns were: by what the heads put out, or by their Frobenius norms where there are no activations. Frobenius norms beside
    turns fitted to activations overshoot: loss 6.26 against 5.59 on the embedded model at 8 -> 1, 4096 tokens.

    Args:
        turn: orthogonal matrices [L, D, D].
        gram: second moments, [N, M, D, M, D].
    """
    groups, members = gram.shape[:2]
    by_group = turn.unflatten(0, (groups, members))
    size = torch.einsum("nidid->ni", gram).clamp_min(0).sqrt().mean(1)
    mean = torch.einsum("nidf,nidje,njef->n", by_group, gram, by_group).clamp_min(torch.finfo(gram.dtype).tiny).sqrt() / members
    scale = (size / mean / members).repeat_interleave(members)
    return HeadMaps(turn.transpose(1, 2) * scale[:, None, None], turn)


def _turned_keys(gram: Tensor, freedom: Freedom) -> Tensor:
    """Rotations [L, D, D] that bring the keys of each group together and commute with the rotary embedding."""
    groups, members, dim = gram.shape[:3]
    turn = torch.eye(dim, dtype=gram.dtype, device=gram.device).repeat(groups, members, 1, 1)
    if freedom.keys_fixed:
        return turn.flatten(0, 1)
    if len(freedom.pairs):
        a, b = freedom.pairs[:, 0], freedom.pairs[:, 1]
        phase = _aligned_phases(_pair_moments(gram, freedom.pairs))  # [N, P, M]
        cos, sin = phase.real.transpose(1, 2), phase.imag.transpose(1, 2)
        # key @ turn = (a cos - b sin, a sin + b cos): multiplication of a + ib by the phase
        turn[:, :, a, a], turn[:, :, b, b], turn[:, :, b, a], turn[:, :, a, b] = cos, cos, -sin, sin
    if len(freedom.free):
        free = freedom.free
        part = gram[:, :, free][..., free]
        turn[:, :, free[:, None], free[None, :]] = _turned_freely(part)
    return turn.flatten(0, 1)


def _pair_moments(gram: Tensor, pairs: Tensor) -> Tensor:
    """E[conj(z_i) z_j] of the rotary pairs as complex numbers z = a + ib, Hermitian [N, P, M, M]."""
    a, b = pairs[:, 0], pairs[:, 1]

    def at(x: Tensor, y: Tensor) -> Tensor:  # [P, N, M, M]: advanced indices apart put their dimension first
        return gram[:, :, x, :, y]

    return torch.complex(at(a, a) + at(b, b), at(a, b) - at(b, a)).transpose(0, 1)


def _aligned_phases(moments: Tensor) -> Tensor:
    """Unit complex numbers w [..., M] that make sum_ij conj(w_i) moments_ij w_j as large as coordinate ascent gets it; w_0 = 1."""
    w = _unit(torch.linalg.eigh(moments).eigenvectors[..., -1])
    members = moments.shape[-1]
    last = torch.full(moments.shape[:-2], -math.inf, dtype=w.real.dtype, device=w.device)
    for _ in range(_MAX_ITERATIONS):
        for i in range(members):
            others = (moments[..., i, :] * w).sum(-1) - moments[..., i, i] * w[..., i]
            w[..., i] = _unit(others)
        value = torch.einsum("...i,...ij,...j->...", w.conj(), moments, w).real
        if bool((value - last <= _TOLERANCE * value.abs()).all()):
            break
        last = value
    return w * w[..., :1].conj()


def _unit(z: Tensor) -> Tensor:
    size = z.abs()
    return torch.where(size > torch.finfo(size.dtype).tiny, z / size.clamp_min(torch.finfo(size.dtype).tiny), torch.ones_like(z))


def _turned_freely(gram: Tensor) -> Tensor:
    """Orthogonal matrices R [N, M, F, F] that make sum_ij trace(R_i.T gram_ij R_j) as large as coordinate ascent gets it; R_0 = 1."""
    groups, members, dim = gram.shape[:3]
    basis = torch.linalg.eigh(gram.flatten(3, 4).flatten(1, 2)).eigenvectors[..., -dim:]
    turn = _polar(basis.unflatten(1, (members, dim)))
    last = torch.full((groups,), -math.inf, dtype=gram.dtype, device=gram.device)
    for _ in range(_MAX_ITERATIONS):
        for i in range(members):
            others = torch.einsum("ndje,njef->ndf", gram[:, i], turn) - gram[:, i, :, i] @ turn[:, i]
            turn[:, i] = _polar(others)
        value = torch.einsum("nidf,nidje,njef->n", turn, gram, turn)
        if bool((value - last <= _TOLERANCE * value.abs()).all()):
            break
        last = value
    return turn @ turn[:, :1].transpose(2, 3)


def _polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each matrix."""
    u, _, vh = torch.linalg.svd(matrix)
    nearest: Tensor = u @ vh
    return nearest


def query_weights(source: Projections, moments: Tensor, num_maps: int) -> Tensor:
    """Second moments [L, D] of the channels of the queries that read each key head: what an error there counts."""
    bias = torch.zeros_like(source.q[..., 0]) if source.q_bias is None else source.q_bias
    rows = torch.cat([source.q, bias[..., None]], -1)
    squares: Tensor = ((rows @ moments.to(rows)) * rows).sum(-1).unflatten(0, (num_maps, -1)).sum(1)
    return squares


def _svd_keys(gram: Tensor, weights: Tensor, freedom: Freedom) -> HeadMaps:
    """Per rotary pair the best complex number per token that all keys of a group are multiples of; free channels as values.

    Args:
        gram: [N, M, D, M, D].
        weights: second moments of the queries' channels, [L, D].
        freedom: of the layer.
    """
    groups, members, dim = gram.shape[:3]
    encode, decode = gram.new_zeros(groups, members, dim, dim), gram.new_zeros(groups, members, dim, dim)
    weights = weights.unflatten(0, (groups, members))
    if len(freedom.pairs):
        a, b = freedom.pairs[:, 0], freedom.pairs[:, 1]
        root = _floored((weights[..., a] + weights[..., b]) / 2).sqrt().transpose(1, 2)  # [N, P, M]
        moments = _pair_moments(gram, freedom.pairs) * (root[..., :, None] * root[..., None, :])
        # z_i ~ conj(u_i) c for Hermitian moments E[conj(z_i) z_j]; c = sum_i u_i z_i
        u = torch.linalg.eigh(moments).eigenvectors[..., -1]
        scale = root.square().mean(-1, keepdim=True).sqrt()  # keys keep their size; the queries get the rest
        for maps, z in ((encode, u * root / scale), (decode, u.conj() / root * scale)):
            re, im = z.real.transpose(1, 2), z.imag.transpose(1, 2)
            maps[:, :, a, a], maps[:, :, b, b], maps[:, :, a, b], maps[:, :, b, a] = re, re, -im, im
    if len(freedom.free):
        free = freedom.free
        root = torch.diag_embed(_floored(weights[..., free]).sqrt())
        part = _svd_values(gram[:, :, free][..., free], root.flatten(0, 1))
        for maps, values in ((encode, part.encode), (decode, part.decode)):
            maps[:, :, free[:, None], free[None, :]] = values.unflatten(0, (groups, members))
    return HeadMaps(encode.flatten(0, 1), decode.flatten(0, 1))


def _svd_values(gram: Tensor, roots: Tensor) -> HeadMaps:
    """The D directions that hold most of what all heads of a group put out, as the output projections see it.

    Args:
        gram: [N, M, D, M, D].
        roots: [L, D, D], invertible B with |B v| the size of what a head's value v adds to the residual stream.
    """
    groups, members, dim = gram.shape[:3]
    roots = roots.unflatten(0, (groups, members))
    seen = torch.einsum("nidc,nicje,njfe->nidjf", roots, gram, roots)
    basis = torch.linalg.eigh(seen.flatten(3, 4).flatten(1, 2)).eigenvectors[..., -dim:].unflatten(1, (members, dim))
    size = roots.flatten(1).norm(dim=1) / math.sqrt(members * dim)
    encode = basis.transpose(2, 3) @ roots / size[:, None, None, None]
    decode = torch.linalg.solve(roots, basis) * size[:, None, None, None]
    return HeadMaps(encode.flatten(0, 1), decode.flatten(0, 1))


def output_roots(source: Projections, num_maps: int) -> Tensor:
    """[L, D, D] symmetric B with B @ B = the sum of o_h.T @ o_h over the query heads of each value head."""
    square = torch.einsum("hed,hef->hdf", source.o, source.o).unflatten(0, (num_maps, -1)).sum(1)
    values, vectors = torch.linalg.eigh(square)
    roots: Tensor = vectors * _floored(values).sqrt()[:, None, :] @ vectors.transpose(1, 2)
    return roots


def _floored(squares: Tensor) -> Tensor:
    """Squares kept away from 0, so that what no query or output reads does not make its map infinite."""
    return squares.clamp_min(1e-6 * float(squares.max().clamp_min(torch.finfo(squares.dtype).tiny)))
