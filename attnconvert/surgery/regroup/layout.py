"""Where attention modules keep their projections: apart, or in one fused matrix.

Fused rows come in two orders: all queries, then keys, then values (Phi-3's qkv_proj, GPT-2's c_attn, GPT-BigCode's with one KV head), or query, key and
value of head 0, then of head 1 (GPT-NeoX's query_key_value, GPT-BigCode's with as many KV heads as query heads).

Shapes: H query heads, G KV heads, D head_dim, E hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnconvert.surgery.regroup.heads import Projections
from attnconvert.surgery.sites import Site

_OUTPUTS = ("o_proj", "dense", "out_proj", "c_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn")


@dataclass(frozen=True)
class ProjectionForm:
    """How an attention module holds its projections.

    Attributes:
        inputs: names of the modules that read the hidden states: q_proj, k_proj, v_proj, or one fused.
        output: name of the module that reads the heads' outputs.
        by_head: fused rows are in the order of heads.
        transposed: weights are [in, out] (Conv1D).
    """

    inputs: tuple[str, ...]
    output: str
    by_head: bool = False
    transposed: bool = False


def projection_form(module: Any) -> ProjectionForm | None:
    """How an attention module holds its projections; None when it is no way that is known."""
    children = dict(module.named_children())

    def is_projection(name: str) -> bool:
        return isinstance(children.get(name), (nn.Linear, Conv1D))

    output = next(filter(is_projection, _OUTPUTS), None)
    separate = ("q_proj", "k_proj", "v_proj")
    fused = next(filter(is_projection, _FUSED), None)
    if output is None or not (fused or all(map(is_projection, separate))):
        return None
    if fused is None:
        return ProjectionForm(separate, output)
    by_head = fused == "query_key_value" or getattr(module, "multi_query", None) is False
    return ProjectionForm((fused,), output, by_head, isinstance(children[fused], Conv1D))


def read_projections(module: Any, site: Site) -> Projections:
    """The projections of an attention module by head; views of its weights where they are stored apart."""
    form = projection_form(module)
    assert form is not None, "the caller checked the architecture"
    H, G, D = site.num_heads, site.num_key_value_heads, site.head_dim

    def stored(name: str, what: str) -> Tensor | None:
        tensor = getattr(getattr(module, name), what)
        return None if tensor is None else (tensor.data.T if form.transposed and what == "weight" else tensor.data)

    parts: dict[str, Tensor | None] = {}
    for what, suffix in (("weight", ""), ("bias", "_bias")):
        if len(form.inputs) == 3:
            rows = [stored(name, what) for name in form.inputs]
        else:
            fused = stored(form.inputs[0], what)
            if fused is None:
                rows = [None] * 3
            elif form.by_head:
                rows = [part.flatten(0, 1) for part in fused.unflatten(0, (H, 3, D)).unbind(1)]
            else:
                rows = list(fused.split([H * D, G * D, G * D]))
        for name, heads, tensor in zip("qkv", (H, G, G), rows, strict=True):
            parts[name + suffix] = None if tensor is None else tensor.unflatten(0, (heads, D))
    output = stored(form.output, "weight")
    assert output is not None
    return Projections(o=output.unflatten(1, (H, D)).transpose(0, 1), **parts)  # type: ignore[arg-type]


def projection_tensors(projections: Projections, module: Any) -> dict[str, Tensor]:
    """The projections as entries of the state dict of `module`, which may hold other numbers of heads."""
    form = projection_form(module)
    assert form is not None, "the caller checked the architecture"
    by_head = form.by_head and projections.num_key_value_heads == projections.q.shape[0]  # GPT-BigCode keeps one KV head behind the queries
    tensors = {f"{form.output}.weight": projections.o.transpose(0, 1).flatten(1)}
    for what, suffix in (("weight", ""), ("bias", "_bias")):
        parts = [getattr(projections, name + suffix) for name in "qkv"]
        if parts[0] is None:
            continue
        if len(form.inputs) == 3:
            tensors |= {f"{name}.{what}": part.flatten(0, 1) for name, part in zip(form.inputs, parts, strict=True)}
        elif by_head:
            tensors[f"{form.inputs[0]}.{what}"] = torch.stack(parts, 1).flatten(0, 2)
        else:
            tensors[f"{form.inputs[0]}.{what}"] = torch.cat([part.flatten(0, 1) for part in parts])
    transposed = form.transposed
    return {name: (tensor.T if transposed and name.endswith("weight") else tensor).contiguous() for name, tensor in tensors.items()}


def set_projection(module: Any, name: str, tensor: Tensor) -> None:
    """Give a projection of `module` a weight or bias of any size; `name` as in `projection_tensors`, e.g. `k_proj.weight`."""
    path, _, what = name.rpartition(".")
    linear = module.get_submodule(path)
    getattr(linear, what).data = tensor
    if what == "weight" and isinstance(linear, Conv1D):
        linear.nx, linear.nf = tensor.shape
    elif what == "weight":
        linear.out_features, linear.in_features = tensor.shape


def set_head_counts(module: Any, num_key_value_heads: int, num_heads: int) -> None:
    """Tell an attention module its heads: families keep them beside the config, under these names. A reload reads the config alone, and is compared."""
    counts = {
        "num_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_key_value_groups": num_heads // num_key_value_heads,
        "kv_heads": num_key_value_heads,
        "kv_dim": num_key_value_heads * int(getattr(module, "head_dim", 0) or 0),
    }
    for name, value in counts.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
    if isinstance(getattr(module, "multi_query", None), bool):
        module.multi_query = num_key_value_heads == 1
