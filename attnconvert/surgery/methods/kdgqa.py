"""Fewer KV heads that serve different numbers of query heads (KDGQA, DGQA, PGQA: https://arxiv.org/abs/2408.08454), saved with code of ours.

A KV head with large keys serves more query heads; how many is counted once, on calibration text, and frozen (`surgery/regroup/uneven.py`), since a map that
follows the batch fills a KV cache in one way and reads it in another. Rules for different layers may give them different numbers of KV heads. Where
every layer ends with the same number and each head serves as many, `gqa` gives the same model as a stock checkpoint.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from attnconvert.surgery.method import LayerCost, Method, MethodConfig, softmax_cost
from attnconvert.surgery.sites import Site


class KdgqaConfig(MethodConfig):
    """Settings of a layer with uneven groups."""

    kv_heads: int = Field(default=2, ge=1, description="KV heads of the layer, at most as many as it has")
    allocation: Literal["kdgqa", "dgqa_ema", "dgqa_diff", "even"] = Field(
        default="kdgqa",
        description="what decides how many query heads a KV head serves: kdgqa = the norm of its keys over the calibration text, dgqa_ema = a running mean of it, dgqa_diff = how much it changes from window to window, even = nothing",
    )
    query_heads: tuple[int, ...] | None = Field(
        default=None, description="how many query heads each KV head serves, in order; null = from calibration, by `allocation`"
    )
    init: Literal["svd", "aligned", "mean", "medoid", "first", "random"] = Field(default="svd", description="how heads are merged before training")
    noise: bool = Field(default=False, description="in training, subtract noise of each row's mean and deviation from the attention weights (PGQA)")

    @model_validator(mode="after")
    def _heads_agree(self) -> KdgqaConfig:
        if self.query_heads is not None and (len(self.query_heads) != self.kv_heads or min(self.query_heads) < 1):
            raise ValueError(f"query_heads needs {self.kv_heads} numbers, one for each KV head, of at least 1")
        return self


def check(config: KdgqaConfig, site: Site) -> list[str]:
    problems = [
        f"the layer has {what}, which uneven groups do not do"
        for what, there in (("capped logits", site.softcap is not None), ("learned sink logits", site.has_sink_logits))
        if there
    ]
    if config.kv_heads > site.num_key_value_heads:
        problems.append(f"the layer has {site.num_key_value_heads} KV heads, fewer than the {config.kv_heads} asked for")
    if config.query_heads is not None and sum(config.query_heads) != site.num_heads:
        problems.append(f"query_heads adds up to {sum(config.query_heads)}, but the layer has {site.num_heads} query heads")
    return problems


def runtime_config(config: KdgqaConfig) -> dict[str, Any]:
    return {"kv_heads": config.kv_heads, "query_heads": None if config.query_heads is None else list(config.query_heads), "noise": config.noise}


def cost(config: KdgqaConfig, site: Site, length: int, element_size: int) -> LayerCost:
    """As softmax attention with fewer KV heads. The hidden size, which a site does not tell, is taken to be that of all query heads."""
    before = softmax_cost(site, length, element_size)
    width = site.num_heads * site.head_dim
    return LayerCost(
        state_bytes=before.state_bytes * config.kv_heads // site.num_key_value_heads,
        flops=before.flops,
        num_parameters=2 * width * (site.num_heads + config.kv_heads) * site.head_dim,
    )


METHOD = Method(
    name="kdgqa",
    family="regroup",
    summary="fewer KV heads, uneven: those with large keys serve more query heads; any number in any layer",
    paper="https://arxiv.org/abs/2408.08454",
    config=KdgqaConfig,
    check=check,
    runtime="attnconvert.surgery.runtime.uneven:UnevenAttention",
    runtime_config=runtime_config,
    cost=cost,
    examples=(KdgqaConfig(kv_heads=2, allocation="even"), KdgqaConfig(kv_heads=2, query_heads=(3, 1))),
    exact=None,
)
