"""Routed heads (MoH): calibration before the swap, which finds the units that all tokens share and the start of the routers, and how tokens are spread over the units of the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from attnconvert.convert.plan import layer_settings
from attnconvert.kernels.heads.units import num_units, unit_counts
from attnconvert.recipes.schema import Recipe
from attnconvert.surgery.methods.moh import MohConfig, counts
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.sites import Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from attnconvert.distill.data import PackedRows

CALIBRATION_TOKENS = 16_384
USAGE_TOKENS = 32_768
ALLOCATION_TOKENS = 4_096
RIDGE = 1e-3


class Uncalibrated(NamedTuple):
    """What calibration has to find for a layer.

    Attributes:
        units: of the layer.
        shared: how many of them all tokens use, where calibration says which; 0 = nothing to choose.
        router: maps have to be fitted.
        used: how many a token uses if all layers are alike, where calibration says how many instead.
    """

    units: int
    shared: int
    router: bool
    used: int | None = None


def uncalibrated(recipe: Recipe, plan: ConversionPlan, sites: Sequence[Site]) -> dict[int, Uncalibrated]:
    """Layer index -> what calibration has to find for it; layers with nothing to find are left out.

    Args:
        recipe: the recipe of the plan.
        plan: a plan for `sites`.
        sites: the attention sites.
    """
    settings, found = layer_settings(recipe, plan), {}
    for site in sites:
        config = settings.get(site.layer_idx)
        if isinstance(config, MohConfig):
            units, used, shared = counts(config, site)
            choose = shared if config.choose_shared == "calibration" and config.shared_units is None else 0
            router = config.router == "output_norm" and used < units
            if choose or router:
                found[site.layer_idx] = Uncalibrated(units, choose, router, used if config.allocate == "calibration" and router else None)
    return found


class UnitFacts(NamedTuple):
    """What calibration found about the units of a layer.

    Attributes:
        importance: for each unit the mean over tokens of ||H_u W_O^u||, the norm of what it adds to the layer's output.
        weight: linear maps of the layer's input that estimate the logs of those norms, fp32 [U, E].
        bias: of the maps, fp32 [U].
        explained: share of the logs' variance that the maps explain on the tokens they were fitted to, mean over units.
    """

    importance: list[float]
    weight: Tensor
    bias: Tensor
    explained: float


def calibrate_units(
    model: Any, sites: Sequence[Site], units: Mapping[int, int], rows: PackedRows, seed: int, progress: Callable[[str, int, int], None]
) -> dict[int, UnitFacts]:
    """Layer index -> how much each unit adds to the layer's output, and how that is told from the layer's input. The model is not changed.

    The maps are a ridge regression with the penalty RIDGE times the mean variance of the inputs. Logs, because outputs are positive and of very different sizes;
    norms below a thousandth of a row's mean, such as those of a first token that serves as a sink, count as that.

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

    inputs: dict[int, Tensor] = {}
    sums: dict[int, list[Tensor]] = {}

    def listen(idx: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            inputs[idx] = options["hidden_states"] if "hidden_states" in options else args[0]

        return hook

    def measure(idx: int, projection: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            weight = cast(Any, projection).weight  # [out, in], of a Conv1D [in, out]
            by_unit = (weight.t() if isinstance(projection, torch.nn.Linear) else weight).unflatten(0, (units[idx], -1)).float()
            heads = args[0].flatten(0, -2).unflatten(1, (units[idx], -1)).float()
            norms = torch.stack([(heads[:, unit] @ by_unit[unit]).norm(dim=-1) for unit in range(units[idx])], 1)
            x, y = inputs.pop(idx).flatten(0, -2).float(), norms.clamp_min(1e-3 * norms.mean(0)).log()
            found = [norms.sum(0, dtype=torch.float64), x.sum(0), y.sum(0), x.t() @ x, x.t() @ y, y.square().sum(0)]
            sums[idx] = [old + new for old, new in zip(sums[idx], found, strict=True)] if idx in sums else found

        return hook

    count = min(rows.num_rows, -(-CALIBRATION_TOKENS // rows.length))
    batch = rows.rows(epoch_indices(rows.num_rows, seed, 0, count))
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for site in sites:
            if site.layer_idx in units:
                projection = model.get_submodule(lora_targets(model, [site.path], ["o"])[0])
                stack.callback(model.get_submodule(site.path).register_forward_pre_hook(listen(site.layer_idx), with_kwargs=True).remove)
                stack.callback(projection.register_forward_pre_hook(measure(site.layer_idx, projection)).remove)
        for row in range(count):
            with torch.no_grad():
                hidden_states(model.eval(), batch.input_ids[row : row + 1].to(device), batch.position_ids[row : row + 1].to(device))
            progress("calibration", row + 1, count)
    return {idx: _fit([part.double().cpu() for part in own], count * rows.length) for idx, own in sums.items()}


def _fit(sums: Sequence[Tensor], num_tokens: int) -> UnitFacts:
    """Ridge regression from sums over tokens, in fp64: of the norms [U], x [E], y [U], x x^T [E, E], x y^T [E, U], y^2 [U]."""
    import torch

    norms, x, y, xx, xy, yy = sums
    mean_x, mean_y = x / num_tokens, y / num_tokens
    xx, xy, yy = xx - torch.outer(x, mean_x), xy - torch.outer(x, mean_y), yy - y * mean_y
    weight = torch.linalg.solve(xx + RIDGE * xx.diagonal().mean() * torch.eye(len(x), dtype=xx.dtype), xy)
    left = yy - 2 * (weight * xy).sum(0) + (weight * (xx @ weight)).sum(0)
    return UnitFacts((norms / num_tokens).tolist(), weight.t().float().contiguous(), (mean_y - mean_x @ weight).float(), float((1 - left / yy).mean()))


def measure_losses(
    model: Any, sites: Sequence[Site], plan: ConversionPlan, wanted: Mapping[int, Uncalibrated], facts: Mapping[int, UnitFacts], rows: PackedRows, seed: int,
    progress: Callable[[str, int, int], None],
) -> dict[int, dict[int, float]]:  # fmt: skip
    """Layer index -> number of used units -> KL(model || the same where the tokens of that layer alone use so many), nats per token. The model is not changed.

    Numbers from two below to two above the layer's `used`; all units lose nothing.

    Args:
        model: the unconverted causal LM, on any device.
        sites: its attention sites.
        plan: has the shared units.
        wanted: layers without a number `used` are left out.
        facts: of the layers, by `calibrate_units`.
        rows: text; the first rows in the training order of `seed` are used.
        seed: see there.
        progress: called as `progress("loss by layer", done, total)`.
    """
    import torch

    from attnconvert.distill.data import epoch_indices
    from attnconvert.distill.lora import lora_targets
    from attnconvert.distill.losses import distillation_loss, hidden_states, logit_head

    device = next(model.parameters()).device
    batch = rows.rows(epoch_indices(rows.num_rows, seed, 0, min(rows.num_rows, -(-ALLOCATION_TOKENS // rows.length)))).to(device)
    targets = batch.targets()
    vocab = model.get_output_embeddings().weight.shape[0]
    paths, shared = {site.layer_idx: site.path for site in sites}, {row.layer_idx: row.config.get("shared_units") for row in plan.layers}

    def hidden(row: int) -> Tensor:
        return hidden_states(model.eval(), batch.input_ids[row : row + 1], batch.position_ids[row : row + 1])

    @contextlib.contextmanager
    def routed(idx: int, used: int) -> Iterator[None]:
        weight, bias = (part.to(device) for part in (facts[idx].weight, facts[idx].bias))
        given = shared[idx]
        always = list(range(_num_shared(plan, idx))) if given is None else list(given)
        masks: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            scores = torch.nn.functional.linear((options["hidden_states"] if "hidden_states" in options else args[0]).float(), weight, bias)
            scores[..., always] = torch.inf
            masks.append(torch.zeros_like(scores).scatter(-1, scores.topk(used, -1).indices, 1.0))

        def leave_out(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads, mask = args[0].unflatten(-1, (len(bias), -1)), masks.pop()
            return ((heads * mask[..., None].to(heads.dtype)).flatten(-2), *args[1:])

        attention = model.get_submodule(paths[idx])
        projection = model.get_submodule(lora_targets(model, [paths[idx]], ["o"])[0])
        handles = [attention.register_forward_pre_hook(look, with_kwargs=True), projection.register_forward_pre_hook(leave_out)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    cases = [
        (idx, used)
        for idx, own in wanted.items()
        if own.used is not None
        for used in range(max(1, own.used - 2, _num_shared(plan, idx) + 1), min(own.units, own.used + 3))
    ]
    found: dict[int, dict[int, float]] = {idx: {own.units: 0.0} for idx, own in wanted.items() if own.used is not None and own.units <= own.used + 2}

    def kl_of_row(row: int) -> float:
        own = targets[row : row + 1]
        return float(distillation_loss(hidden(row), teacher[row], head, own, torch.ones_like(own, dtype=torch.bool), 1.0, 0.0, max(16, 2**26 // vocab)).kl_sum)

    with torch.no_grad():
        head = logit_head(model, batch.input_ids[:1, :16])
        teacher = [hidden(row) for row in range(len(batch.input_ids))]
        for done, (idx, used) in enumerate(cases, start=1):
            with routed(idx, used):
                kl = sum(kl_of_row(row) for row in range(len(teacher)))
            found.setdefault(idx, {})[used] = kl / targets.numel()
            progress("loss by layer", done, len(cases))
    return found


def _num_shared(plan: ConversionPlan, idx: int) -> int:
    row = next(row for row in plan.layers if row.layer_idx == idx)
    given = row.config["shared_units"]
    units = num_units(row.config["unit"], row.num_heads, row.num_key_value_heads)
    return len(given) if given is not None else unit_counts(units, row.config["active"], row.config["shared"])[1]


def allocated(losses: Mapping[int, Mapping[int, float]], total: int) -> dict[int, int]:
    """Layer index -> used units, `total` in all, with the least sum of losses, as if layers lost by themselves.

    Args:
        losses: layer index -> number of used units -> what that loses.
        total: a sum that they can reach.
    """
    best: dict[int, tuple[float, dict[int, int]]] = {0: (0.0, {})}
    for idx, own in losses.items():
        more: dict[int, tuple[float, dict[int, int]]] = {}
        for count, (loss, chosen) in best.items():
            for used, lost in own.items():
                if count + used <= total and (count + used not in more or loss + lost < more[count + used][0]):
                    more[count + used] = loss + lost, {**chosen, idx: used}
        best = more
    return best[total][1]


def with_active(plan: ConversionPlan, used: Mapping[int, int]) -> ConversionPlan:
    """The plan with the numbers of used units of the layers named."""

    def share(row: LayerPlan) -> float:
        return used[row.layer_idx] / num_units(row.config["unit"], row.num_heads, row.num_key_value_heads)

    rows = (replace(row, config={**row.config, "active": share(row)}) if row.layer_idx in used else row for row in plan.layers)
    return replace(plan, layers=tuple(rows))


def calibrate_heads(
    model: Any,
    sites: Sequence[Site],
    plan: ConversionPlan,
    wanted: Mapping[int, Uncalibrated],
    rows: PackedRows,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, dict[str, Any]], dict[int, tuple[Tensor, Tensor]]]:
    """All that calibration finds: JSON facts for `with_calibration` and the report, by layer index as text, and the maps for `start_routers`. The model is not changed.

    Args:
        model: the unconverted causal LM, on any device.
        sites: its attention sites.
        plan: a plan for `sites`.
        wanted: of `uncalibrated`, not empty.
        rows: text; the first rows in the training order of `seed` are used.
        seed: see there.
        progress: called as `progress(what, done, total)`.
    """
    found = calibrate_units(model, sites, {idx: own.units for idx, own in wanted.items()}, rows, seed, progress)
    facts: dict[str, dict[str, Any]] = {
        "importance": {str(idx): found[idx].importance for idx, own in wanted.items() if own.shared},
        "explained": {str(idx): found[idx].explained for idx, own in wanted.items() if own.router},
    }
    if any(own.used is not None for own in wanted.values()):
        losses = measure_losses(model, sites, with_calibration(plan, wanted, facts), wanted, found, rows, seed, progress)
        facts["losses"] = {str(idx): {str(used): lost for used, lost in own.items()} for idx, own in losses.items()}
        facts["used"] = {str(idx): used for idx, used in allocated(losses, sum(own.used or 0 for own in wanted.values())).items()}
    return facts, {idx: (found[idx].weight, found[idx].bias) for idx, own in wanted.items() if own.router}


def with_calibration(plan: ConversionPlan, wanted: Mapping[int, Uncalibrated], facts: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    """The plan with the shared units and the numbers of used ones that calibration chose."""
    importance = {int(idx): own for idx, own in facts["importance"].items()}
    plan = with_shared_units(plan, most_important(importance, {idx: own.shared for idx, own in wanted.items()}))
    return with_active(plan, {int(idx): used for idx, used in facts.get("used", {}).items()})


def start_routers(model: Any, maps: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Give the routers `output_norm` of a converted model the maps of all units, layer index -> (weight, bias) of UnitFacts; other layers' are left alone."""
    from attnconvert.surgery.runtime.heads import MixtureOfHeads
    from attnconvert.surgery.runtime.modeling import converted_sites

    for idx, _, module in converted_sites(model):
        if isinstance(module.core, MixtureOfHeads) and module.core.router == "output_norm" and idx in maps:
            module.core.estimate_norms(*maps[idx])


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
