"""Turn a loaded model into a converted one, in place, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.plan import ConversionPlan
from attnconvert.surgery.runtime.modeling import attach_cores, config_class, converted_sites, model_class, use_seam


@dataclass(frozen=True)
class SwapReport:
    """What became of every tensor.

    Attributes:
        copied: names of tensors that are the teacher's, untouched.
        fresh: names of new parameters.
        num_fresh_parameters: how many numbers they hold.
    """

    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    num_fresh_parameters: int


def swap(model: Any, plan: ConversionPlan) -> SwapReport:
    """Convert `model` in place to the plan: new class, new config, a core in every converted attention module.

    Everything is checked before the first change. Raises AttnConvertError `plan-mismatch` when the plan was made for another model.
    """
    if model.config.model_type != plan.base_model_type:
        raise AttnConvertError("plan-mismatch", f"the plan was made for a {plan.base_model_type!r} model, this is {model.config.model_type!r}")
    modules = dict(model.named_modules())
    for row in plan.layers:
        if row.path not in modules:
            raise AttnConvertError(
                "plan-mismatch",
                f"the model has no module {row.path!r}",
                where=f"layer {row.layer_idx} of the plan",
                hint="make the plan from this model's own config",
            )
    before = list(model.state_dict())
    base: Any = type(model)
    base_config: Any = type(model.config)
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "transformers_version", "auto_map")}
    config = config_class(base_config)(**values)
    config.attn_plan, config.base_model_type = plan.to_dict(), plan.base_model_type
    converted = model_class(base)
    config.architectures = [converted.__name__]
    config._name_or_path = ""
    if hasattr(model.config, "_experts_implementation"):  # mixture-of-experts layers: a run-time choice that to_dict() leaves out
        config._experts_implementation = model.config._experts_implementation
    shared = model.config
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    model.config = config
    model.__class__ = converted
    attach_cores(model, config.attn_plan)
    use_seam(model)
    after = model.state_dict()
    fresh = tuple(name for name in after if ".core." in name)
    unaccounted = (set(after) - set(fresh)) ^ set(before)
    assert not unaccounted, f"tensors neither copied nor fresh: {sorted(unaccounted)[:5]}"
    return SwapReport(tuple(before), fresh, sum(after[name].numel() for name in fresh))


def changed_projections(model: Any) -> list[int]:
    """The converted layers whose projections were changed for the core, so that they cannot compute what the original layer did."""
    return sorted(idx for idx, _, module in converted_sites(model) if module.core.changes_projections)


def restore_softmax(model: Any, layer_idxs: Iterable[int], reason: str) -> ConversionPlan:
    """Put layers back to softmax attention, drop their cores, and return (and store) the new plan.

    Raises AttnConvertError `unknown-layer` when a layer has no core, `cannot-restore` when its projections were changed for the core.
    """
    wanted = set(layer_idxs)
    sites = {idx: module for idx, _, module in converted_sites(model)}
    if wanted - set(sites):
        raise AttnConvertError("unknown-layer", f"layers {sorted(wanted - set(sites))} are not converted", expected=f"some of {sorted(sites)}")
    changed = [idx for idx in changed_projections(model) if idx in wanted]
    if changed:
        raise AttnConvertError(
            "cannot-restore",
            f"layers {changed} cannot go back to softmax attention: their projections have other heads now",
            hint="let the plan keep them from the start",
        )
    for idx in wanted:
        sites[idx].core.teacher = True  # what listens to the module for it does nothing then
        del sites[idx].core
    plan = ConversionPlan.from_dict(model.config.attn_plan)
    rows = tuple(replace(row, method=None, config={}, reason=reason) if row.layer_idx in wanted else row for row in plan.layers)
    plan = replace(plan, layers=rows, num_kept_later=0)
    model.config.attn_plan = plan.to_dict()
    return plan


@contextmanager
def zeroed_linear_branch(model: nn.Module) -> Iterator[None]:
    """Ablation: inside, linear branches contribute nothing; only window and sinks are left."""
    cores = [module.core for _, _, module in converted_sites(model) if hasattr(module.core, "linear_enabled")]
    for core in cores:
        core.linear_enabled = False
    try:
        yield
    finally:
        for core in cores:
            core.linear_enabled = True
