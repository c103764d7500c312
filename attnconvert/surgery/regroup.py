"""Fewer key-value heads with the stock architecture: which maps between heads leave a model's function alone, and how to pool along them.

Neighbouring KV heads share no coordinates: the mean of two of them is close to the mean of two random vectors. But a head may be turned without
changing the model: values by any orthogonal matrix that the output projection undoes, keys and queries by any matrix that commutes with the rotary
embedding, which is a rotation of each rotary pair, and any orthogonal matrix on channels without rotary embedding. `aligned` finds
the rotations that bring the heads of a group closest together (generalised Procrustes on the second moments of what the projections put
out), pools, and gives the pooled block the norm of its members. `svd` allows more than rotations and is the best D-dimensional approximation of a group.

Every init is a pair of linear maps per source head: `encode` (new head = sum over members of encode @ head) and `decode` (head ~ decode @ new head),
and folding them into the four projections is the same for all: k, v rows by encode, q rows and o columns by decode.

Which channels form rotary pairs is not read from names: `find_freedom` runs the attention modules on unit vectors and looks.

Shapes: H query heads, G KV heads of the source, N of the target, L = lcm(G, N) heads that are pooled in N groups of M, D head_dim,
E hidden_size, P rotary pairs, F channels without rotary embedding. Spec: https://arxiv.org/abs/2305.13245, https://arxiv.org/abs/2412.20677.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.sites import Site, find_sites

INITS = ("aligned", "svd", "mean", "medoid", "first", "random")
"""Ways to make fewer KV heads, the default first."""
CALIBRATED = ("aligned", "svd", "medoid")
"""Those that look at activations."""

_OUTPUTS = ("o_proj", "dense", "out_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj", "W_pack", "wqkv", "att_proj")
_PROBE = "attnconvert_regroup_probe"
_AMPLITUDE = 512.0  # a clip or a norm shows between unit vectors and vectors this long
_MAX_ITERATIONS, _TOLERANCE = 100, 1e-6  # of the Procrustes objective, relative
_POSITIONS = (0, 1, 7, 61)


# ---------------------------------------------------------------- projections of a layer


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


# ---------------------------------------------------------------- inits


def regroup_layer(
    source: Projections, moments: Tensor, freedom: Freedom, num_key_value_heads: int, init: str, generator: torch.Generator | None = None
) -> Projections:
    """One layer with fewer KV heads.

    Args:
        source: the layer's projections, float64.
        moments: [E + 1, E + 1], second moments of (hidden state, 1) that the projections read; the identity stands for "no calibration".
        freedom: what may be turned.
        num_key_value_heads: N, a divisor of H, less than G.
        init: one of INITS.
        generator: for `random`.
    """
    num_heads, dim = source.q.shape[:2]
    num_maps = math.lcm(source.num_key_value_heads, num_key_value_heads)
    members = num_maps // num_key_value_heads
    assert num_heads % num_key_value_heads == 0, "the caller checked the heads"
    eye = torch.eye(dim, dtype=source.k.dtype, device=source.k.device).expand(num_maps, dim, dim)
    mean = HeadMaps(eye / members, eye)
    if init == "mean":
        return fold(source, mean, mean, num_key_value_heads)
    if init == "random":
        target = fold(source, mean, mean, num_key_value_heads)

        def drawn(like: Tensor, std: Tensor) -> Tensor:
            return (torch.randn(like.shape, generator=generator, dtype=torch.float64) * std.cpu()).to(like)

        def zeros(bias: Tensor | None) -> Tensor | None:
            return None if bias is None else torch.zeros_like(bias)

        k, v = drawn(target.k, source.k.std()), drawn(target.v, source.v.std())
        return replace(target, k=k, v=v, k_bias=zeros(target.k_bias), v_bias=zeros(target.v_bias))
    if init == "first":
        chosen = _one_of(eye, torch.zeros(num_key_value_heads, dtype=torch.int64), members)
        return fold(source, chosen, chosen, num_key_value_heads)

    repeats = num_maps // source.num_key_value_heads
    gram_k = _gram(source.k, source.k_bias, moments, repeats, num_key_value_heads)
    gram_v = _gram(source.v, source.v_bias, moments, repeats, num_key_value_heads)
    if init == "medoid":
        closeness = (_cosines(gram_k) + _cosines(gram_v)).sum(2)
        # Two heads are equally close to each other, and rounding must not choose: the larger one stays.
        size = sum(torch.einsum("nidid->ni", gram) / torch.einsum("nidid->n", gram)[:, None] for gram in (gram_k, gram_v))
        closest = (closeness + 1e-6 * size).argmax(1)
        chosen = _one_of(eye, closest.cpu(), members)
        return fold(source, chosen, chosen, num_key_value_heads)
    if init == "aligned":
        keys = _pooled_maps(_turned_keys(gram_k, freedom), gram_k)
        values = _pooled_maps(eye if freedom.values_fixed else _turned_freely(gram_v).flatten(0, 1), gram_v)
    else:
        assert init == "svd", f"unknown init {init!r}"
        keys = _svd_keys(gram_k, _query_weights(source, moments, num_maps), freedom)
        if freedom.keys_fixed:
            keys = _pooled_maps(eye, gram_k)
        values = _pooled_maps(eye, gram_v) if freedom.values_fixed else _svd_values(gram_v, _output_roots(source, num_maps))
    return fold(source, keys, values, num_key_value_heads)


def _one_of(eye: Tensor, chosen: Tensor, members: int) -> HeadMaps:
    """Keep one head of each group, the member `chosen` [N]."""
    keep = torch.nn.functional.one_hot(chosen, members).flatten().to(eye)
    return HeadMaps(eye * keep[:, None, None], eye)


def _gram(weight: Tensor, bias: Tensor | None, moments: Tensor, repeats: int, num_groups: int) -> Tensor:
    """Second moments of what the heads of each group put out, [N, M, D, M, D]."""
    rows = torch.cat([weight, torch.zeros_like(weight[..., :1]) if bias is None else bias[..., None]], -1).repeat_interleave(repeats, 0)
    rows = rows.unflatten(0, (num_groups, -1))
    flat = rows.flatten(1, 2)
    members, dim = rows.shape[1], rows.shape[2]
    gram: Tensor = (flat @ moments.to(flat) @ flat.transpose(1, 2)).unflatten(2, (members, dim)).unflatten(1, (members, dim))
    return gram


def _cosines(gram: Tensor) -> Tensor:
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


def _query_weights(source: Projections, moments: Tensor, num_maps: int) -> Tensor:
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


def _output_roots(source: Projections, num_maps: int) -> Tensor:
    """[L, D, D] symmetric B with B @ B = the sum of o_h.T @ o_h over the query heads of each value head."""
    square = torch.einsum("hed,hef->hdf", source.o, source.o).unflatten(0, (num_maps, -1)).sum(1)
    values, vectors = torch.linalg.eigh(square)
    roots: Tensor = vectors * _floored(values).sqrt()[:, None, :] @ vectors.transpose(1, 2)
    return roots


def _floored(squares: Tensor) -> Tensor:
    """Squares kept away from 0, so that what no query or output reads does not make its map infinite."""
    return squares.clamp_min(1e-6 * float(squares.max().clamp_min(torch.finfo(squares.dtype).tiny)))


# ---------------------------------------------------------------- the model


def check_architecture(config: Any, targets: Sequence[int]) -> list[Site]:
    """The attention sites of a model that can be saved with fewer KV heads as the same stock architecture. Reads no weights.

    Args:
        config: the model's transformers config.
        targets: numbers of KV heads asked for.

    Raises:
        AttnConvertError: `no-kv-head-setting`, `uneven-heads`, `kv-heads`, `fused-projections`, `cannot-regroup`, and those of `find_sites`.
    """
    family = config.model_type
    sites = find_sites(config)
    if not isinstance(getattr(config.get_text_config(decoder=True), "num_key_value_heads", None), int):
        raise AttnConvertError(
            "no-kv-head-setting",
            f"the config of a {family!r} model has no num_key_value_heads, so the architecture cannot hold fewer of them",
            expected="an architecture such as llama, mistral, qwen2, qwen3, phi, stablelm, gemma2, smollm3",
            hint="convert another checkpoint, or make this attention cheaper with `attnconvert linearize`",
        )
    shapes = sorted({(site.num_heads, site.num_key_value_heads, site.head_dim) for site in sites})
    if len(shapes) > 1:
        raise AttnConvertError(
            "uneven-heads",
            f"the layers of this {family!r} model have different heads: {', '.join(f'{h} query, {g} KV of {d}' for h, g, d in shapes)}",
            expected="the same heads in every layer: config.json holds one num_key_value_heads",
            hint="this model cannot be regrouped as its stock architecture",
        )
    heads, groups = sites[0].num_heads, sites[0].num_key_value_heads
    possible = [n for n in range(1, groups) if heads % n == 0]
    for target in targets:
        if target in possible:
            continue
        if groups == 1:
            raise AttnConvertError("kv-heads", "the model has one KV head, which cannot become fewer", hint="give a model with more KV heads")
        why = f"the model has {groups}" if target >= groups else f"its {heads} query heads cannot be shared out evenly"
        raise AttnConvertError("kv-heads", f"{target} KV heads cannot be made: {why}", expected=f"one of: {', '.join(map(str, possible))}")
    for target in targets:
        _check_shapes(config, sites, target)
    return sites


def with_key_value_heads(config: Any, num_key_value_heads: int) -> Any:
    """A copy of a transformers config with another number of KV heads."""
    config = copy.deepcopy(config)
    config.get_text_config(decoder=True).num_key_value_heads = num_key_value_heads
    return config


def _check_shapes(config: Any, sites: Sequence[Site], target: int) -> None:
    """Build both models on the meta device: only k and v projections may differ, and every layer must have the heads asked for."""
    family = config.model_type
    before, after = _meta_model(config), _meta_model(with_key_value_heads(config, target))
    for site in sites:
        module = before.get_submodule(site.path)
        names = dict(module.named_children())
        if not all(isinstance(names.get(name), nn.Linear) for name in ("q_proj", "k_proj", "v_proj")) or output_name(module) is None:
            fused = next((name for name in names if name in _FUSED), None)
            if fused is not None:
                raise AttnConvertError(
                    "fused-projections",
                    f"a {family!r} model computes queries, keys and values in one projection, {fused!r}, which is not supported",
                    where=site.path,
                    expected="separate q_proj, k_proj, v_proj and o_proj",
                    hint="convert a checkpoint of an architecture with separate projections",
                )
            raise _cannot(family, f"its attention has no linear q_proj, k_proj, v_proj and o_proj, but {', '.join(names)}", site.path)
    wanted = {f"{site.path}.{name}_proj" for site in sites for name in "kv"}
    old, new = ({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (before, after))
    odd = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name.rpartition(".")[0] not in wanted)
    if odd:
        raise _cannot(family, "a tensor besides the key and value projections depends on the number of KV heads", odd[0])
    site = sites[0]
    for path, heads, which in (("q_proj", site.num_heads, 0), ("k_proj", site.num_key_value_heads, 0), ("v_proj", site.num_key_value_heads, 0)):
        if old[f"{site.path}.{path}.weight"][which] != heads * site.head_dim:
            raise _cannot(family, f"{path} puts out more than {heads} heads of {site.head_dim}", f"{site.path}.{path}")
    if any(made.num_key_value_heads != target for made in find_sites(with_key_value_heads(config, target))):
        raise _cannot(family, "num_key_value_heads of its config does not set the heads of every layer", "config.json")


def _cannot(family: str, why: str, where: str) -> AttnConvertError:
    return AttnConvertError("cannot-regroup", f"a {family!r} model cannot be regrouped: {why}", where=where, hint="give a model of another architecture")


def _meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def output_name(module: nn.Module) -> str | None:
    """The name of an attention module's output projection; None when it has none that is known."""
    return next((name for name in _OUTPUTS if isinstance(getattr(module, name, None), nn.Linear)), None)


def read_projections(module: Any, site: Site) -> Projections:
    """The projections of an attention module by head; views of its weights."""
    by_head = {"q": site.num_heads, "k": site.num_key_value_heads, "v": site.num_key_value_heads}
    parts: dict[str, Tensor | None] = {}
    for name, heads in by_head.items():
        linear = getattr(module, f"{name}_proj")
        parts[name] = linear.weight.data.unflatten(0, (heads, site.head_dim))
        parts[f"{name}_bias"] = None if linear.bias is None else linear.bias.data.unflatten(0, (heads, site.head_dim))
    output = getattr(module, str(output_name(module)))
    return Projections(o=output.weight.data.unflatten(1, (site.num_heads, site.head_dim)).transpose(0, 1), **parts)  # type: ignore[arg-type]


def flat_tensors(projections: Projections, output: str) -> dict[str, Tensor]:
    """The projections as an attention module's state dict."""
    tensors = {f"{output}.weight": projections.o.transpose(0, 1).flatten(1).contiguous()}
    for name in "qkv":
        tensors[f"{name}_proj.weight"] = getattr(projections, name).flatten(0, 1).contiguous()
        bias = getattr(projections, f"{name}_bias")
        if bias is not None:
            tensors[f"{name}_proj.bias"] = bias.flatten().contiguous()
    return tensors


@dataclass(frozen=True)
class Regrouped:
    """The new attention weights of a whole model, ready to be installed.

    Attributes:
        num_key_value_heads: N.
        tensors: name in the model's state dict -> tensor, for every q, k, v and o projection.
    """

    num_key_value_heads: int
    tensors: Mapping[str, Tensor]


def regroup(
    model: Any, sites: Sequence[Site], moments: Mapping[int, Tensor], freedoms: Mapping[int, Freedom], num_key_value_heads: int, init: str, seed: int = 0
) -> Regrouped:
    """New attention weights for `model`, which is left as it is.

    Args:
        model: the source, in fp32.
        sites: its attention, as `check_architecture` returned it.
        moments: layer index -> second moments, as `second_moments` returned them; layers that are absent use the weights alone.
        freedoms: layer index -> what may be turned.
        num_key_value_heads: N.
        init: one of INITS.
        seed: of `random`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        module = model.get_submodule(site.path)
        source = read_projections(module, site)
        wide = source.to(torch.float64)
        moment = moments.get(site.layer_idx)
        if moment is None:
            moment = torch.eye(wide.k.shape[2] + 1, dtype=torch.float64, device=wide.k.device)
        made = regroup_layer(wide, moment, freedoms[site.layer_idx], num_key_value_heads, init, generator).to(source.k.dtype)
        tensors |= {f"{site.path}.{name}": tensor for name, tensor in flat_tensors(made, str(output_name(module))).items()}
    return Regrouped(num_key_value_heads, tensors)


def install(model: Any, new: Regrouped) -> Regrouped:
    """Give `model` these attention weights and heads, in place.

    Returns:
        What it had before; installing that undoes this one.
    """
    old_heads = int(model.config.get_text_config(decoder=True).num_key_value_heads)
    old = Regrouped(old_heads, {name: model.get_parameter(name).data for name in new.tensors})
    for path in {name.rsplit(".", 2)[0] for name in new.tensors}:
        module: Any = model.get_submodule(path)
        heads = old_heads * module.q_proj.weight.shape[0] // module.k_proj.weight.shape[0]
        # Families keep these beside the config, under these names; a reload reads the config alone, and is compared with this model.
        for attribute, value in (("num_key_value_heads", new.num_key_value_heads), ("num_key_value_groups", heads // new.num_key_value_heads)):
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, value)
    for name, tensor in new.tensors.items():
        path, _, what = name.rpartition(".")
        linear = model.get_submodule(path)
        getattr(linear, what).data = tensor
        if what == "weight":
            linear.out_features, linear.in_features = tensor.shape
    config = model.config.get_text_config(decoder=True)
    config.num_key_value_heads = new.num_key_value_heads
    return old


@contextmanager
def installed(model: Any, new: Regrouped) -> Iterator[None]:
    """Inside, `model` has these attention weights and heads."""
    old = install(model, new)
    try:
        yield
    finally:
        install(model, old)


# ---------------------------------------------------------------- what may be turned


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

    def unit(linear: nn.Linear, _: Any, output: Tensor) -> Tensor:
        vectors = amplitude * torch.eye(dim, device=output.device, dtype=output.dtype)
        return vectors[:, None, None, :].expand(dim, output.shape[1], output.shape[2] // dim, dim).reshape(output.shape)

    def arrived(idx: int) -> Any:
        def hook(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            straight[idx] = torch.equal(args[0].reshape(-1), returned[idx].reshape(-1))

        return hook

    AttentionInterface.register(_PROBE, record)
    AttentionMaskInterface.register(_PROBE, lambda *args, **kwargs: None)
    implementation = model.config._attn_implementation
    with ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.path)
            for name in ("q_proj", "k_proj", "v_proj"):
                stack.callback(getattr(module, name).register_forward_hook(unit).remove)
            stack.callback(getattr(module, str(output_name(module))).register_forward_pre_hook(arrived(site.layer_idx)).remove)
        model.set_attn_implementation(_PROBE)
        stack.callback(model.set_attn_implementation, implementation)
        model.base_model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    return seen, straight


# ---------------------------------------------------------------- calibration


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
        def hook(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            states = args[0].detach().flatten(0, -2).float()
            states = torch.cat([states, torch.ones_like(states[:, :1])], 1)
            moment = (states.T @ states).double()
            sums[idx] = moment if idx not in sums else sums[idx].add_(moment)

        return hook

    with ExitStack() as stack:
        for site in sites:
            linear = model.get_submodule(site.path).k_proj
            stack.callback(linear.register_forward_pre_hook(adder(site.layer_idx)).remove)
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
        tensors |= {f"{site.path}.{name}": tensor for name, tensor in flat_tensors(made, str(output_name(module))).items()}
    return Regrouped(sites[0].num_key_value_heads, tensors)
