"""Routed heads (MoH): which units all tokens share, chosen by calibration before the swap, and how tokens are spread over the units of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from attnconvert.convert.plan import layer_settings
from attnconvert.recipes.schema import Recipe
from attnconvert.surgery.methods.moh import MohConfig, counts
from attnconvert.surgery.plan import ConversionPlan
from attnconvert.surgery.sites import Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from attnconvert.distill.data import PackedRows

CALIBRATION_TOKENS = 16_384
USAGE_TOKENS = 32_768


def undecided_units(recipe: Recipe, plan: ConversionPlan, sites: Sequence[Site]) -> dict[int, tuple[int, int]]:
    """Layer index -> units of the layer and how many are shared, where calibration has to say which.

    Args:
        recipe: the recipe of the plan.
        plan: a plan for `sites`.
        sites: the attention sites.
    """
    settings, found = layer_settings(recipe, plan), {}
    for site in sites:
        config = settings.get(site.layer_idx)
        if isinstance(config, MohConfig) and config.choose_shared == "calibration" and config.shared_units is None:
            units, _, shared = counts(config, site)
            if shared:
                found[site.layer_idx] = units, shared
    return found


def measure_importance(
    model: Any, sites: Sequence[Site], units: Mapping[int, int], rows: PackedRows, seed: int, progress: Callable[[str, int, int], None]
) -> dict[int, list[float]]:
    """Layer index -> for each unit the mean over tokens of ||H_u W_O^u||: what it adds to the layer's output. The model is not changed.

    Args:
        model: the unconverted causal LM, on any device.
        sites: its attention sites.
        units: layer index -> units of that layer: KV heads with their query heads, or query heads.
        rows: text; the first rows in the training order of `seed` are used.
        seed: see there.
        progress: called as `progress("calibration", done, total)`.
    """
    import torch

    from attnconvert.distill.data import epoch_indices
    from attnconvert.distill.lora import lora_targets
    from attnconvert.distill.losses import hidden_states

    sums: dict[int, Tensor] = {}
    num_tokens = 0

    def listen(idx: int, projection: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            weight = cast(Any, projection).weight  # [out, in], of a Conv1D [in, out]
            by_unit = (weight.t() if isinstance(projection, torch.nn.Linear) else weight).unflatten(0, (units[idx], -1)).float()
            heads = args[0].flatten(0, -2).unflatten(1, (units[idx], -1)).float()
            norms = [(heads[:, unit] @ by_unit[unit]).norm(dim=-1).sum(dtype=torch.float64) for unit in range(units[idx])]
            found = torch.stack(norms)
            sums[idx] = sums[idx] + found if idx in sums else found

        return hook

    count = min(rows.num_rows, -(-CALIBRATION_TOKENS // rows.length))
    batch = rows.rows(epoch_indices(rows.num_rows, seed, 0, count))
    device = next(model.parameters()).device
    with _hooks(
        (projection, listen(site.layer_idx, projection))
        for site in sites
        if site.layer_idx in units
        for projection in [model.get_submodule(lora_targets(model, [site.path], ["o"])[0])]
    ):
        for row in range(count):
            with torch.no_grad():
                hidden_states(model.eval(), batch.input_ids[row : row + 1].to(device), batch.position_ids[row : row + 1].to(device))
            num_tokens += rows.length
            progress("calibration", row + 1, count)
    return {idx: (total / num_tokens).tolist() for idx, total in sums.items()}


@contextmanager
def _hooks(pairs: Iterator[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_important(importance: Mapping[int, Sequence[float]], shared: Mapping[int, int]) -> dict[int, list[int]]:
    """Layer index -> the numbers of its `shared` most important units, ascending; of equals the first."""
    return {idx: sorted(sorted(range(len(own)), key=lambda unit: (-own[unit], unit))[: shared[idx]]) for idx, own in importance.items()}


def with_shared_units(plan: ConversionPlan, units: Mapping[int, Sequence[int]]) -> ConversionPlan:
    """The plan with the shared units of the layers named."""
    rows = (replace(row, config={**row.config, "shared_units": list(units[row.layer_idx])}) if row.layer_idx in units else row for row in plan.layers)
    return replace(plan, layers=tuple(rows))


def measure_usage(model: Any, rows: PackedRows, device: Any, progress: Callable[[str, int, int], None]) -> dict[int, list[float]]:
    """Layer index -> the share of tokens that use each unit, over the first rows; {} for a model without routed heads.

    Args:
        model: a converted causal LM on `device`.
        rows: text.
        device: where inputs are sent.
        progress: called as `progress("use of heads", done, total)`.
    """
    import torch

    from attnconvert.distill.losses import hidden_states
    from attnconvert.surgery.runtime.heads import MixtureOfHeads
    from attnconvert.surgery.runtime.modeling import converted_sites

    cores = {idx: module.core for idx, _, module in converted_sites(model) if isinstance(module.core, MixtureOfHeads)}
    count = min(rows.num_rows, -(-USAGE_TOKENS // rows.length)) if cores else 0
    try:
        for core in cores.values():
            core.usage = torch.zeros(core.num_units + 1, dtype=torch.int64, device=device)
        for row in range(count):
            batch = rows.rows([row])
            with torch.no_grad():
                hidden_states(model, batch.input_ids.to(device), batch.position_ids.to(device))
            progress("use of heads", row + 1, count)
        return {idx: (core.usage[:-1] / core.usage[-1].clamp_min(1)).tolist() for idx, core in cores.items() if core.usage is not None}
    finally:
        for core in cores.values():
            core.usage = None
