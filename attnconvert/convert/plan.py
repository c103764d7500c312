"""Decide what becomes of every attention site, what that saves and what it will cost. Pure: no weights are read, nothing is written.

Costs are arithmetic from shapes. Times are not: they divide that arithmetic by throughputs measured on one machine of each kind
(`ASSUMED_FLOPS`), and are good to a factor of three or so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from attnconvert.convert.load import load_config, resolve
from attnconvert.convert.report import compact_settings, describe_blocks, describe_heads, describe_rules, format_bytes, format_seconds, ranges, span_rules
from attnconvert.errors import AttnConvertError, ErrorGroup
from attnconvert.recipes.schema import SOFTMAX, Recipe, assign_rules, resolve_layers
from attnconvert.surgery import registry
from attnconvert.surgery.method import MethodConfig, softmax_cost
from attnconvert.surgery.plan import ConversionPlan, LayerPlan

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnconvert.surgery.runtime.seam import AttentionCore
    from attnconvert.surgery.sites import Site

ASSUMED_FLOPS = {"cpu": 5.0e10, "cuda": 1.0e13}
"""FLOP/s that training reaches in practice: 2 CPU cores in fp32, one H100 in bf16 on a model of 135 M parameters (larger ones do better)."""

SECONDS_PER_STEP = {"cpu": 0.0, "cuda": 0.1}
"""Least time of an optimizer step: a small model keeps a GPU waiting for the next kernel."""

_KEPT_BY_RECIPE = "the recipe keeps it"
_ALREADY_SLIDING = "already a sliding window"
_DEFAULT_LENGTH = 32_768


# ---------------------------------------------------------------- the plan


def build_plan(recipe: Recipe, config: Any, sites: Sequence[Site]) -> ConversionPlan:
    """One row per attention site: its method and settings, or why it keeps softmax attention.

    Args:
        recipe: a validated recipe.
        config: the model's transformers config.
        sites: `surgery.sites.find_sites(config)`, in layer order.

    Raises:
        AttnConvertError: `layer-out-of-range`, `unused-rule`, `nothing-to-convert`, `keep-all`, `keep-unmeasurable`, `no-weight-loss`.
        ErrorGroup: of `site-refused`, one per rule and set of reasons.
    """
    num_layers = len(sites)
    decided = assign_rules(recipe.layers, num_layers)
    keep = recipe.keep
    kept = set(resolve_layers(keep.layers, num_layers, where="keep.layers")) if keep is not None and keep.layers is not None else set()
    rows: list[LayerPlan] = []
    refused: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for site, index in zip(sites, decided, strict=True):
        rule = None if index is None else recipe.layers[index]
        softmax = LayerPlan(site.layer_idx, site.path, site.num_heads, site.num_key_value_heads, site.head_dim, method=None)
        if rule is None or rule.method == SOFTMAX:
            rows.append(_with(softmax, reason="no rule matches it" if rule is None else _KEPT_BY_RECIPE))
            continue
        if site.layer_idx in kept:
            rows.append(_with(softmax, reason=_KEPT_BY_RECIPE))
            continue
        method = registry.get(rule.method)
        problems = method.check(rule.config, site)
        if not problems:
            settings = method.runtime_config(rule.config)
            if method.key_value_heads is not None:
                settings["num_key_value_heads"] = method.key_value_heads(rule.config, site)
            rows.append(_with(softmax, method=rule.method, config=settings))
        elif rule.match == "all" and site.sliding_window is not None and all(_ALREADY_SLIDING in problem for problem in problems):
            # Such a layer is cheap already, and `all` did not ask for it by number.
            rows.append(_with(softmax, reason=problems[0]))
        else:
            assert index is not None
            refused.setdefault((index, tuple(problems)), []).append(site.layer_idx)
    if refused:
        raise _refusals(recipe, refused, num_layers)
    plan = ConversionPlan(base_model_type=config.model_type, layers=tuple(rows))
    if not plan.converted:
        reasons = "; ".join(dict.fromkeys(row.reason for row in rows))
        raise AttnConvertError(
            "nothing-to-convert", f"every layer keeps softmax attention: {reasons}", where="layers", hint="let a rule with a method match at least one layer"
        )
    if keep is not None and keep.fraction is not None:
        count = keep.num_layers(num_layers)
        if count >= len(plan.converted):
            raise AttnConvertError(
                "keep-all",
                f"keep.fraction {keep.fraction:g} puts {count} layers back to softmax, but only {len(plan.converted)} are converted",
                where="keep.fraction",
                hint="lower keep.fraction, or convert more layers",
            )
        assert keep.by is not None
        plan = ConversionPlan(plan.base_model_type, plan.layers, num_kept_later=count, keep_by=keep.by)
    _check_stages(recipe, plan)
    return plan


def layer_settings(recipe: Recipe, plan: ConversionPlan) -> dict[int, MethodConfig]:
    """Layer index -> the method's settings of every converted layer, with what the plan decided in the place of what the recipe left open."""
    decided = assign_rules(recipe.layers, len(plan.layers))
    found = {}
    for row, index in zip(plan.layers, decided, strict=True):
        config = None if row.method is None or index is None else _as_decided(recipe.layers[index].config, row)
        if config is not None:
            found[row.layer_idx] = config
    return found


def with_span_rules(plan: ConversionPlan, rules: Mapping[int, Sequence[tuple[int, float]]]) -> ConversionPlan:
    """The plan with rules (alpha, beta), one per KV head, in the layers named."""

    def decided(row: LayerPlan) -> LayerPlan:
        if row.layer_idx not in rules:
            return row
        alphas, betas = (list(numbers) for numbers in zip(*rules[row.layer_idx], strict=True))
        return _with(row, method=row.method, config={**row.config, "alphas": alphas, "betas": betas}, reason=row.reason)

    return replace(plan, layers=tuple(map(decided, plan.layers)))


def finished_plan(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[ConversionPlan, Any]:
    """The plan and the config of a model that was converted before and has the attention of its plan. Loads no weights.

    Args: as `pipeline.prepare`.

    Raises:
        AttnConvertError: of loading the config.
    """
    import attnconvert

    attnconvert.register()
    config = load_config(resolve(model, revision=revision, trust_remote_code=trust_remote_code))
    return ConversionPlan.from_dict(config.attn_plan), config


def _with(row: LayerPlan, *, method: str | None = None, config: dict[str, Any] | None = None, reason: str = "") -> LayerPlan:
    return LayerPlan(row.layer_idx, row.path, row.num_heads, row.num_key_value_heads, row.head_dim, method, config or {}, reason)


def _refusals(recipe: Recipe, refused: Mapping[tuple[int, tuple[str, ...]], list[int]], num_layers: int) -> AttnConvertError:
    errors = []
    for (index, problems), layers in refused.items():
        rule = recipe.layers[index]
        others = [layer for layer in range(num_layers) if not any(layer in found for found in refused.values())]
        named = f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"
        if not others:
            hint = f"{rule.method} cannot be used on this model; `attnconvert methods` lists the others"
        elif rule.match == "all":
            hint = f"convert the other layers only, with `match: [{ranges(others)}]`, or keep these with `keep: {{layers: [{ranges(layers)}]}}`"
        else:
            hint = f"take {named} out of this rule's `match`, or keep them with `keep: {{layers: [{ranges(layers)}]}}`"
        errors.append(AttnConvertError("site-refused", f"{rule.method} cannot convert {named}: {'; '.join(problems)}", where=f"layers.{index}", hint=hint))
    return errors[0] if len(errors) == 1 else ErrorGroup(errors)


def _check_stages(recipe: Recipe, plan: ConversionPlan) -> None:
    """Refuse stage settings that the plan's cores cannot follow, before a model is loaded."""
    from attnconvert.surgery.runtime.seam import AttentionCore

    transfer = recipe.stages.transfer
    cores = list(_cores(plan))
    if transfer.tokens and transfer.loss == "weights":
        able = {row.layer_idx for row, core in cores if _num_parameters(core) and type(core).weight_loss is not AttentionCore.weight_loss}
        without = [row.layer_idx for row in plan.converted if row.layer_idx not in able]
        if without:
            raise AttnConvertError(
                "no-weight-loss",
                f"layers {ranges(without)} have no linear branch whose attention weights could be trained",
                where="stages.transfer.loss",
                expected="loss: output, or a method with a linear branch on every converted layer",
                hint="`--set stages.transfer.loss=output`, or skip the stage with `--set stages.transfer.tokens=0`",
            )
    if plan.num_kept_later and not transfer.tokens and not recipe.stages.finetune.tokens:
        raise AttnConvertError(
            "keep-unmeasurable",
            "keep.fraction chooses layers by measurement, but no stage reads any text",
            where="keep.fraction",
            hint="name the layers with keep.layers, or give a stage some tokens",
        )
    if plan.num_kept_later and plan.keep_by == "layer_error":
        fixed = {row.layer_idx for row, core in cores if not _num_parameters(core)}
        measured = [row for row in plan.converted if row.layer_idx not in fixed] if transfer.tokens else []
        if len(measured) < plan.num_kept_later:
            why = "stages.transfer.tokens is 0" if not transfer.tokens else "the converted layers have nothing to train in transfer"
            raise AttnConvertError(
                "keep-unmeasurable",
                f"keep.by: layer_error needs the errors of the transfer stage, but {why}",
                where="keep.by",
                expected="a transfer stage, or by: kl",
                hint="`--set keep.by=kl` measures every layer instead, or name the layers with keep.layers",
            )


def _cores(plan: ConversionPlan) -> Iterator[tuple[LayerPlan, AttentionCore]]:
    """The converted rows that get a core, with it, built on the meta device: shapes without memory."""
    import torch

    from attnconvert.surgery.runtime.cores import core_class

    with torch.device("meta"):
        for row in plan.converted:
            assert row.method is not None
            if registry.get(row.method).runtime is None:
                continue
            yield row, core_class(row.method)(row.num_heads, row.num_key_value_heads, row.head_dim, **row.config)  # type: ignore[call-arg]


def _num_parameters(core: AttentionCore) -> int:
    return sum(parameter.numel() for parameter in core.parameters())


def evaluation_window(plan: ConversionPlan) -> int | None:
    """The largest softmax window of the plan in tokens, which sets the passkey distances; None when no layer has one, and where attention spans differ or grow."""
    sizes = [int(row.config["window"]["size"]) for row in plan.converted if isinstance(row.config.get("window"), Mapping)]
    spans = {rule for row in plan.converted for rule in span_rules(asdict(row)) or ()}
    if len(spans) > 1 or any(beta for _, beta in spans):
        return None
    return max((size for size in (*sizes, *(alpha for alpha, _ in spans)) if size > 0), default=None)


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class LayerEstimate:
    """One layer, per sequence, at the context length of the estimate.

    Attributes:
        layer_idx: as in the plan.
        state_bytes_before: cache bytes of softmax attention.
        state_bytes_after: cache bytes as planned.
        flops_before: multiply-adds x 2 of the attention of a prefill, projections excluded.
        flops_after: the same, as planned.
        num_parameters: new parameters.
    """

    layer_idx: int
    state_bytes_before: int
    state_bytes_after: int
    flops_before: int
    flops_after: int
    num_parameters: int


@dataclass(frozen=True)
class StageEstimate:
    """One training stage. All figures are rough.

    Attributes:
        stage: `transfer` or `finetune`.
        tokens: training tokens; 0 = skipped.
        flops: of all steps.
        memory_bytes: peak of weights, gradients, optimizer state and activations.
        seconds: device kind (`cpu`, `cuda`) -> seconds at ASSUMED_FLOPS and SECONDS_PER_STEP.
    """

    stage: str
    tokens: int
    flops: float
    memory_bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """What a conversion saves and costs.

    Attributes:
        length: context length in tokens for bytes and FLOPs.
        element_size: bytes per weight and per cached key element.
        num_parameters: of the model before conversion.
        trained_parameters: what transfer trains: new parameters, and projections made anew.
        layers: one entry per layer; layers that go back to softmax after transfer count as converted here (which ones is not known yet).
        stages: transfer, finetune.
        model_bytes: weights of the finished checkpoint.
        assumptions: what the times and sizes rest on, as sentences.
    """

    length: int
    element_size: int
    num_parameters: int
    trained_parameters: int
    layers: tuple[LayerEstimate, ...]
    stages: tuple[StageEstimate, ...]
    model_bytes: int
    assumptions: tuple[str, ...]

    def total(self, name: str) -> int:
        """Sum over the layers of one LayerEstimate field."""
        return sum(int(getattr(layer, name)) for layer in self.layers)

    @property
    def new_parameters(self) -> int:
        """Parameters that the attention cores add."""
        return self.total("num_parameters")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "totals": {name: self.total(name) for name in LayerEstimate.__dataclass_fields__ if name != "layer_idx"}}


def default_length(config: Any) -> int:
    """The context length an estimate is made for: what the model was built for, at most 32768 tokens."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(int(limit or _DEFAULT_LENGTH), _DEFAULT_LENGTH)


def _as_decided(config: MethodConfig | None, row: LayerPlan) -> MethodConfig | None:
    """The recipe's settings of a layer, with what the recipe left open (null) as the row of the plan has it."""
    if config is None:
        return None
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in row.config.items() if getattr(config, key, value) is None}
    return config.model_copy(update=found)


def estimate(plan: ConversionPlan, sites: Sequence[Site], recipe: Recipe, num_parameters: int, length: int, element_size: int) -> Estimate:
    """Cache bytes, FLOPs, new parameters, and rough memory and time of the training stages.

    Args:
        plan: from `build_plan`.
        sites: the sites it was built from.
        recipe: the recipe it was built from.
        num_parameters: of the model before conversion.
        length: context length in tokens for bytes and FLOPs.
        element_size: bytes per weight.
    """
    decided = assign_rules(recipe.layers, len(sites))
    settings = layer_settings(recipe, plan)
    by_layer = {site.layer_idx: site for site in sites}
    new = {}
    for row, core in _cores(plan):
        new[row.layer_idx] = _num_parameters(core)
        if not new[row.layer_idx] and not core.changes_projections:  # some cores make theirs when they get to know the attention module
            cost = registry.get(str(row.method)).cost(settings[row.layer_idx], by_layer[row.layer_idx], length, element_size)
            new[row.layer_idx] = cost.num_parameters

    def costs(at: int) -> list[LayerEstimate]:
        layers = []
        for row, site, index in zip(plan.layers, sites, decided, strict=True):
            before = softmax_cost(site, at, element_size)
            after = before
            if row.method is not None:
                assert index is not None
                after = registry.get(row.method).cost(_as_decided(recipe.layers[index].config, row), site, at, element_size)
            layers.append(LayerEstimate(row.layer_idx, before.state_bytes, after.state_bytes, before.flops, after.flops, new.get(row.layer_idx, 0)))
        return layers

    layers = tuple(costs(length))
    new_parameters = sum(layer.num_parameters for layer in layers)
    made_anew = 0
    for row, site, index in zip(plan.layers, sites, decided, strict=True):
        if row.method is not None and not new.get(row.layer_idx):
            assert index is not None
            made_anew += registry.get(row.method).cost(_as_decided(recipe.layers[index].config, row), site, length, element_size).num_parameters
    trained = new_parameters + made_anew
    stages = []
    for name in ("transfer", "finetune"):
        stage = recipe.stages.transfer if name == "transfer" else recipe.stages.finetune
        tokens = stage.steps * stage.batch_size * stage.length
        if name == "transfer" and not trained:
            tokens = 0
        per_row = costs(stage.length)
        teacher = sum(layer.flops_before for layer in per_row) / stage.length
        student = sum(layer.flops_after for layer in per_row) / stage.length
        if name == "transfer":
            # One forward pass of the teacher, and every core and new projection forward and backward (twice a forward).
            per_token = 2.0 * num_parameters + teacher + 3 * (student + 2 * made_anew)
        else:
            # Teacher and student forward; backward through frozen weights costs one more forward, of attention two.
            with_teacher = recipe.stages.finetune.kl > 0
            per_token = 2.0 * num_parameters * (3 if with_teacher else 2) + (teacher if with_teacher else 0) + 3 * student
        flops = tokens * per_token
        stages.append(
            StageEstimate(
                name,
                tokens,
                flops,
                _training_bytes(plan, recipe, name, num_parameters, trained, element_size) if tokens else 0,
                {kind: max(flops / rate, SECONDS_PER_STEP[kind] * tokens / (stage.batch_size * stage.length)) for kind, rate in ASSUMED_FLOPS.items()},
            )
        )
    return Estimate(
        length=length,
        element_size=element_size,
        num_parameters=num_parameters,
        trained_parameters=trained,
        layers=layers,
        stages=tuple(stages),
        model_bytes=num_parameters * element_size + new_parameters * 4,
        assumptions=(
            f"Times assume {ASSUMED_FLOPS['cuda']:.2g} FLOP/s on a GPU (one H100, bf16, model of 135 M parameters) and {ASSUMED_FLOPS['cpu']:.2g} on 2 CPU cores in fp32; "
            "expect a factor of three either way. Loading, saving and evaluation come on top.",
            "Memory is for the recipe's micro_batch_size, without gradient checkpointing.",
            *(["The same-data baseline, finetuned too, takes about as long again as finetune."] if recipe.evaluate.same_data_baseline else []),
        ),
    )


def _training_bytes(plan: ConversionPlan, recipe: Recipe, name: str, num_parameters: int, trained_parameters: int, element_size: int) -> int:
    """Rough peak memory of a stage."""
    stage = recipe.stages.transfer if name == "transfer" else recipe.stages.finetune
    tokens = (stage.micro_batch_size or stage.batch_size) * stage.length
    first = plan.converted[0]
    hidden = first.num_heads * first.head_dim  # of the attention; the residual stream is about as wide
    weights = num_parameters * element_size + trained_parameters * 4 * 4  # parameter, gradient and two moments of AdamW
    if name == "transfer":
        # One layer at a time: q, k, v, y and the core's intermediate tensors, fp32.
        return weights + tokens * hidden * 4 * 24
    # Activations of every layer: attention, norms and an MLP about four times as wide; then chunks of logits.
    rank = recipe.stages.finetune.lora.rank
    adapters = len(plan.layers) * 8 * hidden * rank * 4 * 4
    return weights + adapters + tokens * hidden * len(plan.layers) * element_size * 34 + 2**30


# ---------------------------------------------------------------- shown to people


def describe_settings(row: LayerPlan) -> str:
    """A converted row's settings in a few words: `window block 64, 4 sinks, linear F=128`; unusual ones are spelled out."""
    assert row.method is not None
    rest = dict(row.config)
    parts = []
    window, sinks, linear = rest.pop("window", None), rest.pop("sinks", None), rest.pop("linear", None)
    heads = rest.pop("num_key_value_heads", None) or rest.pop("kv_heads", None)
    if "alphas" in rest:
        del rest["alphas"], rest["betas"]
        parts += [describe_rules(span_rules(asdict(row))), f"{count} sinks" if (count := rest.pop("num_sinks")) else "no sinks"]
        if not rest.get("min_length"):  # the rules hold from the first token on
            rest.pop("min_length", None)
    if "topk" in rest:
        parts.append(describe_blocks(rest))
        for name in ("block_size", "init_blocks", "window_size", "topk", "dense_len", "scorer"):
            del rest[name]
    if "router" in rest:
        parts.append(describe_heads(row.num_heads, row.num_key_value_heads, rest))
        for name in ("unit", "active", "shared", "shared_units", "router", "gates"):
            del rest[name]
    if heads is not None:
        parts.append(f"{row.num_key_value_heads} -> {heads} KV heads")
    if isinstance(rest.get("query_heads"), int):
        parts.append(f"{row.num_heads} -> {rest.pop('query_heads')} query heads")
    features = rest.pop("feature_dim", None)
    if isinstance(window, Mapping):
        parts.append(f"window {window['kind']} {window['size']}" if window["size"] else "no window")
    if sinks is not None:
        parts.append(f"{sinks} sinks" if sinks else "no sinks")
    if linear is not None:
        # Both halves of the feature map count: the state has F x D numbers.
        parts.append(f"linear F={2 * (features or row.head_dim)}" if linear else "no linear branch")
    if linear is not False:
        defaults = registry.get(row.method)
        usual = defaults.runtime_config(defaults.config())
        unusual = compact_settings({key: value for key, value in rest.items() if value != usual.get(key)})
        parts += [unusual] if unusual else []
    return ", ".join(parts)


def render_plan(plan: ConversionPlan, estimate: Estimate | None) -> RenderableType:
    """The plan as rich tables: consecutive layers of one kind in one row, then what it saves and what it costs, unless that is past (None)."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    by_layer = {} if estimate is None else {layer.layer_idx: layer for layer in estimate.layers}
    table = Table(title=f"Plan ({len(plan.layers)} layers, {plan.base_model_type})", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("layers", "method", "settings", *([] if estimate is None else [f"cache at {estimate.length}"])):
        table.add_column(column, justify="right" if column.startswith("cache") else "left", no_wrap=column != "settings")
    for run in _runs(plan.layers):
        first, costs = run[0], [by_layer[row.layer_idx] for row in run if row.layer_idx in by_layer]
        cells = [ranges([row.layer_idx for row in run]), first.method or SOFTMAX, describe_settings(first) if first.method else f"kept: {first.reason}"]
        if costs:
            before, after = sum(cost.state_bytes_before for cost in costs), sum(cost.state_bytes_after for cost in costs)
            cells.append(format_bytes(before) if first.method is None else f"{format_bytes(before)} -> {format_bytes(after)}")
        table.add_row(*(Text(cell) for cell in cells))
    measured = [] if plan.switch is None else [Text(f"dense_len was measured on {plan.switch['device']} in {plan.switch['dtype']}, {plan.switch['date']}.")]
    if estimate is None:
        return Group(table, *measured)
    lines = [
        f"Cache of one sequence at {estimate.length} tokens: {format_bytes(estimate.total('state_bytes_before'))} -> {format_bytes(estimate.total('state_bytes_after'))}; "
        f"attention of the prefill: {estimate.total('flops_before'):.2g} -> {estimate.total('flops_after'):.2g} FLOPs; "
        f"new parameters: {estimate.new_parameters:,} beside {estimate.num_parameters:,}."
    ]
    if plan.num_kept_later:
        measure = "the largest errors after transfer" if plan.keep_by == "layer_error" else "the largest effect on the KL to the teacher"
        lines.append(f"After transfer, {plan.num_kept_later} of these layers go back to softmax, those with {measure}; their cache and FLOPs come on top.")
    for stage in estimate.stages:
        if not stage.tokens:
            lines.append(f"{stage.stage}: skipped")
            continue
        times = f"about {format_seconds(stage.seconds['cuda'])} on a GPU, {format_seconds(stage.seconds['cpu'])} on 2 CPU cores"
        lines.append(f"{stage.stage}: {stage.tokens:,} tokens, {stage.flops:.1e} FLOPs, {format_bytes(stage.memory_bytes)} memory, {times}")
    lines += estimate.assumptions
    return Group(table, *(Text(line) for line in lines))


def _runs(rows: Sequence[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Consecutive layers that differ in nothing but their number."""
    run: list[LayerPlan] = []

    def kind(row: LayerPlan) -> tuple[Any, ...]:
        return row.method, json.dumps(row.config, sort_keys=True), row.reason, row.num_heads, row.num_key_value_heads, row.head_dim

    for row in rows:
        if run and kind(row) != kind(run[-1]):
            yield run
            run = []
        run.append(row)
    if run:
        yield run
