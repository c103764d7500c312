"""Whole models: whether an architecture can hold fewer KV heads, new attention weights, and putting them in place.

Shapes: H query heads, G KV heads of the source, N of the target, D head_dim, E hidden_size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.regroup.grouping import in_similar_groups, usual_grouping
from attnconvert.surgery.regroup.heads import Freedom, Projections
from attnconvert.surgery.regroup.inits import regroup_layer
from attnconvert.surgery.regroup.layout import projection_form, projection_tensors, read_projections, set_head_counts, set_projection
from attnconvert.surgery.regroup.queries import merge_queries
from attnconvert.surgery.sites import Site, find_sites


def check_architecture(config: Any, targets: Sequence[int], num_heads: int | None = None) -> list[Site]:
    """The attention sites of a model that can be saved with fewer heads as the same stock architecture. Reads no weights.

    Args:
        config: the model's transformers config.
        targets: numbers of KV heads asked for.
        num_heads: query heads asked for; None = as many as there are. KV heads may then stay as they are.

    Raises:
        AttnConvertError: `no-kv-head-setting`, `uneven-heads`, `kv-heads`, `query-heads`, `cannot-regroup`, and those of `find_sites`.
    """
    family = config.model_type
    sites = find_sites(config)
    if not isinstance(getattr(config.get_text_config(decoder=True), "num_key_value_heads", None), int):
        raise AttnConvertError(
            "no-kv-head-setting",
            f"the config of a {family!r} model has no num_key_value_heads, so the architecture cannot hold fewer of them",
            expected="an architecture such as llama, mistral, qwen2, qwen3, phi, phi3, stablelm, gemma2, smollm3",
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
    if num_heads is not None and (num_heads >= heads or heads % num_heads):
        fewer = [n for n in range(1, heads) if heads % n == 0]
        why = f"the model has {heads}" if num_heads >= heads else f"its {heads} query heads cannot be merged evenly"
        raise AttnConvertError("query-heads", f"{num_heads} query heads cannot be made: {why}", expected=f"one of: {', '.join(map(str, fewer))}")
    possible = [n for n in range(1, groups + (num_heads is not None)) if (num_heads or heads) % n == 0]
    if hasattr(config, "multi_query"):
        possible = possible[:1]  # one KV head, or one for each query head: it has no number for anything between
    for target in targets:
        if target in possible:
            continue
        if groups == 1 and num_heads is None:
            raise AttnConvertError("kv-heads", "the model has one KV head, which cannot become fewer", hint="give a model with more KV heads")
        if target >= groups:
            why = f"the model has {groups}"
        elif (num_heads or heads) % target:
            why = f"its {num_heads or heads} query heads cannot be shared out evenly"
        else:
            why = f"a {family!r} model has one KV head, or as many as query heads"
        raise AttnConvertError("kv-heads", f"{target} KV heads cannot be made: {why}", expected=f"one of: {', '.join(map(str, possible))}")
    for target in targets:
        _check_shapes(config, sites, target, num_heads)
    return sites


def with_heads(config: Any, num_key_value_heads: int, num_heads: int | None = None, head_dim: int | None = None) -> Any:
    """A copy of a transformers config with other numbers of heads; with other query heads it says `head_dim`, which the width no longer gives."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    if hasattr(text, "multi_query"):
        text.multi_query = num_key_value_heads == 1
    text.num_key_value_heads = num_key_value_heads
    if num_heads is not None:
        text.num_attention_heads, text.head_dim = num_heads, head_dim
    return config


def _check_shapes(config: Any, sites: Sequence[Site], target: int, num_heads: int | None) -> None:
    """Build both models on the meta device: only the projections may differ, and every layer must have the heads asked for."""
    family, head_dim = config.model_type, sites[0].head_dim
    before = _meta_model(config)
    for site in sites:
        module = before.get_submodule(site.path)
        form = projection_form(module)
        if form is None:
            names = ", ".join(name for name, _ in module.named_children())
            raise _cannot(family, f"its attention has no linear q_proj, k_proj, v_proj and o_proj, nor a fused form that is known, but {names}", site.path)
        rows = [getattr(module, name).out_features if not form.transposed else getattr(module, name).nf for name in form.inputs]
        widths = [site.num_heads * head_dim, site.num_key_value_heads * head_dim, site.num_key_value_heads * head_dim]
        if rows not in (widths, [sum(widths)]):
            raise _cannot(family, f"its projections put out more than {site.num_heads} query and {site.num_key_value_heads} KV heads of {head_dim}", site.path)
    wanted = with_heads(config, target, num_heads, head_dim)
    try:
        after, made = _meta_model(wanted), find_sites(wanted)
    except (AttnConvertError, ValueError) as error:
        heads = f"{num_heads or sites[0].num_heads} query and {target} KV heads of {head_dim} channels"
        raise _cannot(family, f"the architecture cannot be built with {heads}", "config.json") from error
    if any((site.num_heads, site.head_dim) != (num_heads or sites[0].num_heads, head_dim) for site in made):
        raise _cannot(family, "its config has no head_dim that would let fewer query heads keep their size", "config.json")
    if any(site.num_key_value_heads != target for site in made):
        raise _cannot(family, "num_key_value_heads of its config does not set the heads of every layer", "config.json")
    paths = set()
    for site in sites:
        form = projection_form(before.get_submodule(site.path))
        assert form is not None
        changed = form.inputs[-2:] if num_heads is None else (*form.inputs, form.output)
        paths |= {f"{site.path}.{name}" for name in changed}
    old, new = ({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (before, after))
    odd = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name.rpartition(".")[0] not in paths)
    if odd:
        raise _cannot(family, "a tensor besides the projections depends on the number of heads", odd[0])


def _cannot(family: str, why: str, where: str) -> AttnConvertError:
    return AttnConvertError("cannot-regroup", f"a {family!r} model cannot be regrouped: {why}", where=where, hint="give a model of another architecture")


def _meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


@dataclass(frozen=True)
class Regrouped:
    """The new attention weights of a whole model, ready to be installed.

    Attributes:
        num_key_value_heads: N.
        tensors: name in the model's state dict -> tensor, for every q, k, v and o projection.
        num_heads: query heads; None = as many as the model has.
    """

    num_key_value_heads: int
    tensors: Mapping[str, Tensor]
    num_heads: int | None = None


def regroup(
    model: Any,
    sites: Sequence[Site],
    moments: Mapping[int, Tensor],
    freedoms: Mapping[int, Freedom],
    num_key_value_heads: int,
    init: str,
    seed: int = 0,
    *,
    grouping: str | None = None,
    num_heads: int | None = None,
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
        grouping: one of GROUPINGS: which heads become one; None = `usual_grouping` of the init.
        num_heads: query heads; None = as many as there are.
    """
    generator = torch.Generator().manual_seed(seed)
    grouping = grouping or usual_grouping(init)

    def made(site: Site, source: Projections, moment: Tensor) -> Projections:
        freedom = freedoms[site.layer_idx]
        if num_key_value_heads != source.num_key_value_heads:
            if grouping == "similar":
                source = in_similar_groups(source, moment, freedom, num_key_value_heads, init)
            source = regroup_layer(source, moment, freedom, num_key_value_heads, init, generator)
        return source if num_heads is None else merge_queries(source, moment, num_heads)

    return Regrouped(num_key_value_heads, new_tensors(model, sites, moments, made), num_heads)


def new_tensors(
    model: Any, sites: Sequence[Site], moments: Mapping[int, Tensor], make: Callable[[Site, Projections, Tensor], Projections]
) -> dict[str, Tensor]:
    """What `make` (site, projections, second moments, all float64) makes of each layer, as entries of the model's state dict in the weights' data type."""
    tensors: dict[str, Tensor] = {}
    for site in sites:
        module = model.get_submodule(site.path)
        source = read_projections(module, site)
        wide = source.to(torch.float64)
        moment = moments.get(site.layer_idx)
        if moment is None:
            moment = torch.eye(wide.k.shape[2] + 1, dtype=torch.float64, device=wide.k.device)
        made = make(site, wide, moment.to(wide.k)).to(source.k.dtype)
        tensors |= {f"{site.path}.{name}": tensor for name, tensor in projection_tensors(made, module).items()}
    return tensors


def install(model: Any, new: Regrouped) -> Regrouped:
    """Give `model` these attention weights and heads, in place.

    Returns:
        What it had before; installing that undoes this one.
    """
    config = model.config.get_text_config(decoder=True)
    num_heads = new.num_heads or int(config.num_attention_heads)
    old = Regrouped(
        int(config.num_key_value_heads),
        {name: model.get_parameter(name).data for name in new.tensors},
        None if new.num_heads is None else int(config.num_attention_heads),
    )
    for path in {name.rsplit(".", 2)[0] for name in new.tensors}:
        module: Any = model.get_submodule(path)
        set_head_counts(module, new.num_key_value_heads, num_heads)
    for name, tensor in new.tensors.items():
        path, _, what = name.rpartition(".")
        parent, _, linear = path.rpartition(".")
        set_projection(model.get_submodule(parent), f"{linear}.{what}", tensor)
    if hasattr(config, "multi_query"):
        config.multi_query = new.num_key_value_heads == 1
    config.num_key_value_heads = new.num_key_value_heads
    if new.num_heads is not None:
        head_dim = _head_dim(config)
        config.num_attention_heads, config.head_dim = new.num_heads, head_dim
    return old


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@contextmanager
def installed(model: Any, new: Regrouped) -> Iterator[None]:
    """Inside, `model` has these attention weights and heads."""
    old = install(model, new)
    try:
        yield
    finally:
        install(model, old)
