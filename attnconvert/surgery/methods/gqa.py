"""Fewer KV heads (GQA, https://arxiv.org/abs/2305.13245; one head is MQA): the projections change, the attention and the architecture stay.

Heads are aligned, merged and folded into the four projections (`surgery/regroup/`), then the new projections are trained to give the old module's
output, then the model its logits. The checkpoint is a stock one with another `num_key_value_heads`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from attnconvert.surgery.method import LayerCost, Method, MethodConfig, softmax_cost
from attnconvert.surgery.sites import Site

Init = Literal["svd", "aligned", "mean", "medoid", "first", "random"]


class GqaConfig(MethodConfig):
    """Settings of the GQA family. Every layer of a model gets the same, because config.json holds one number of KV heads."""

    kv_heads: int | None = Field(default=None, ge=1, description="KV heads to end with, a divisor of the query heads; null = the model's divided by divide_by")
    divide_by: int = Field(default=2, ge=2, description="how many KV heads become one, where kv_heads is null")
    init: Init = Field(
        default="svd", description="how heads are merged before training; `attnconvert regroup MODEL --kv-heads N --compare-inits` measures each"
    )
    grouping: Literal["contiguous", "similar"] | None = Field(
        default=None,
        description="which heads become one: neighbours, or those that lose least together (a stock model all the same); null = similar for svd and aligned, else contiguous",
    )
    query_heads: int | None = Field(default=None, ge=1, description="query heads to end with (SQA), a multiple of the KV heads; null = as many as there are")


def check(config: GqaConfig, site: Site) -> list[str]:
    if config.kv_heads is None and site.num_key_value_heads % config.divide_by:
        return [f"{site.num_key_value_heads} KV heads cannot be divided by {config.divide_by} (name a number with kv_heads)"]
    return []


def key_value_heads(config: GqaConfig, site: Site) -> int:
    return config.kv_heads if config.kv_heads is not None else site.num_key_value_heads // config.divide_by


def runtime_config(config: GqaConfig) -> dict[str, Any]:
    from attnconvert.surgery.regroup import usual_grouping  # torch: not for reading a recipe

    return {"init": config.init, "grouping": config.grouping or usual_grouping(config.init), "query_heads": config.query_heads}


def cost(config: GqaConfig, site: Site, length: int, element_size: int) -> LayerCost:
    """As softmax attention with fewer KV heads. The hidden size, which a site does not tell, is taken to be that of all query heads."""
    before, heads = softmax_cost(site, length, element_size), key_value_heads(config, site)
    width, queries = site.num_heads * site.head_dim, config.query_heads or site.num_heads
    return LayerCost(
        state_bytes=before.state_bytes * heads // site.num_key_value_heads,
        flops=before.flops * queries // site.num_heads,
        num_parameters=2 * width * (queries + heads) * site.head_dim,
    )


METHOD = Method(
    name="gqa",
    family="regroup",
    summary="fewer KV heads in the stock architecture (GQA, MQA): heads aligned and merged, projections trained",
    paper="https://arxiv.org/abs/2305.13245",
    config=GqaConfig,
    check=check,
    runtime=None,
    runtime_config=runtime_config,
    cost=cost,
    examples=(GqaConfig(), GqaConfig(kv_heads=1, init="aligned")),
    key_value_heads=key_value_heads,
)
