"""MoH: mixture-of-head attention (https://arxiv.org/abs/2410.11842): each token uses some of the heads.

y_t = sum over the units u that token t uses of g_tu H_tu W_O^u

A unit is a KV head with the query heads that share it, or a single query head. Some units may be shared: all tokens use them. Of the others a router chooses
the best for each token: those that will add most to the layer's output, estimated from its input, or by one of the published routers. What a token does not
use is not computed: its part of the attention in a prefill, the reading of its keys in a decode step. All keys and values are made and kept, since later
tokens may look at them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from attnconvert.kernels.heads.units import Unit, num_units, unit_counts
from attnconvert.kernels.span.slots import fixed_point, ring_size
from attnconvert.surgery.method import LayerCost, Method, MethodConfig, softmax_cost
from attnconvert.surgery.sites import Site


class MohConfig(MethodConfig):
    """Settings of a layer with routed heads."""

    unit: Unit = Field(
        default="kv_head",
        description="what a token uses or not: kv_head = a KV head with the query heads that share it, which saves reading its keys; query_head = a single "
        "query head. Without shared KV heads both are the same",
    )
    active: float = Field(
        default=0.75, gt=0, le=1, description="share of the units that a token uses, rounded to whole units; 1 = all, which is softmax attention"
    )
    allocate: Literal["even", "calibration"] = Field(
        default="even",
        description="how many units the tokens use in each layer: even = active in every layer; calibration = more where leaving some out changes the model's output most, active on "
        "average; needs the router output_norm",
    )
    shared: float = Field(
        default=0, ge=0, lt=1, description="share of the units that all tokens use, part of active, rounded down and to less than what is used"
    )
    choose_shared: Literal["calibration", "first"] = Field(
        default="calibration",
        description="which units are shared: calibration = those with the largest outputs after o_proj on some text; first = the first ones",
    )
    shared_units: tuple[int, ...] | None = Field(default=None, description="numbers of the shared units, from 0, in place of shared and choose_shared")
    router: Literal["output_norm", "norm", "learned"] = Field(
        default="output_norm",
        description="what chooses the other units: output_norm = the norms of their outputs after o_proj, estimated from the layer's input by a linear map that is fitted to some "
        "text; norm = the norms of their queries (no parameters), as published; learned = linear maps of the layer's input that start from nothing, as published",
    )
    gates: Literal["hard", "soft"] = Field(
        default="hard",
        description="what a used unit is multiplied by: hard = 1, with the gradient of its score; soft = its score, scaled so that outputs keep their size",
    )
    anneal: float = Field(default=0, ge=0, le=1, description="share of finetuning over which a token's units go from all to active; 0 = active from the start")

    @model_validator(mode="after")
    def _units_once(self) -> MohConfig:
        if self.shared_units is not None and (len(set(self.shared_units)) != len(self.shared_units) or min(self.shared_units, default=0) < 0):
            raise ValueError(f"shared_units {list(self.shared_units)} are not different numbers from 0")
        return self


def counts(config: MohConfig, site: Site) -> tuple[int, int, int]:
    """Units of a layer, how many of them a token uses, and how many all tokens use."""
    units = num_units(config.unit, site.num_heads, site.num_key_value_heads)
    used, shared = unit_counts(units, config.active, config.shared)
    return units, used, shared if config.shared_units is None else len(config.shared_units)


def check(config: MohConfig, site: Site) -> list[str]:
    problems = [
        f"the layer has {what}, which attention with routed heads does not do"
        for what, there in (("capped logits (softcap)", site.softcap is not None), ("learned sink logits (s_aux)", site.has_sink_logits))
        if there
    ]
    if site.sliding_window is not None:
        problems.append(f"the layer is already a sliding window of {site.sliding_window} tokens; keep it, there is little to leave out")
    units, used, shared = counts(config, site)
    what = "KV heads" if config.unit == "kv_head" else "query heads"
    if used == units and config.active < 1:
        more = "; unit query_head has more to choose from" if config.unit == "kv_head" and site.num_heads > units else ""
        problems.append(
            f"{config.active:g} of {units} {what} is all of them, so there is nothing to leave out; set active to {(units - 1) / units:.2g} or less{more}"
        )
    if shared >= used:
        problems.append(f"{shared} shared units and {used} used ones leave a router nothing to choose; {used - 1} shared_units at most")
    if config.allocate == "calibration" and config.router != "output_norm":
        problems.append(f"allocate: calibration measures what layers lose by the router output_norm, not {config.router}; set allocate to even")
    if any(unit >= units for unit in config.shared_units or ()):
        problems.append(f"shared_units {list(config.shared_units or ())} are beyond the layer's {units} {what}")
    return problems


def runtime_config(config: MohConfig) -> dict[str, Any]:
    return {
        "unit": config.unit, "active": config.active, "shared": config.shared, "shared_units": None if config.shared_units is None else list(config.shared_units),
        "router": config.router, "gates": config.gates, "anneal": config.anneal,
    }  # fmt: skip


def cost(config: MohConfig, site: Site, length: int, element_size: int) -> LayerCost:
    """Attention in proportion to the units that a token uses; a cache of all keys and values. The hidden size, which a site does not tell, is taken to be H D."""
    units, used, shared = counts(config, site)
    slots = site.num_key_value_heads * ring_size(0, fixed_point(1.0), 0, length)
    routed, width = units - shared, site.num_heads * site.head_dim
    maps = {"norm": 0, "output_norm": routed * (width + 1), "learned": (routed + (2 + shared if shared else 0)) * width}
    return LayerCost(
        state_bytes=2 * slots * site.head_dim * element_size,
        flops=softmax_cost(site, length, element_size).flops * used // units,
        num_parameters=maps[config.router],
    )


METHOD = Method(
    name="moh",
    family="mix-heads",
    summary="each token uses some of the heads, or of the KV heads with their query heads, chosen by a router (MoH)",
    paper="https://arxiv.org/abs/2410.11842",
    config=MohConfig,
    check=check,
    runtime="attnconvert.surgery.runtime.heads:MixtureOfHeads",
    runtime_config=runtime_config,
    cost=cost,
    examples=(
        MohConfig(unit="query_head", active=0.75, shared=0.25, router="norm"),
        MohConfig(active=0.5, shared=0, gates="soft"),
        MohConfig(unit="query_head", active=0.5, shared_units=(2,), router="learned", gates="soft"),
    ),
    exact=MohConfig(active=1),
)
