"""Exact softmax attention through the seam: converts nothing, costs what softmax costs. The null conversion of every test suite."""

from __future__ import annotations

from typing import Any

from attnconvert.surgery.method import LayerCost, Method, MethodConfig, softmax_cost
from attnconvert.surgery.sites import Site


class ExactConfig(MethodConfig):
    """No settings."""


def check(config: ExactConfig, site: Site) -> list[str]:
    return [
        f"the layer has {what}, which the exact core does not do"
        for what, there in (("capped logits", site.softcap is not None), ("learned sink logits", site.has_sink_logits))
        if there
    ]


def runtime_config(config: ExactConfig) -> dict[str, Any]:
    return {}


def cost(config: ExactConfig, site: Site, length: int, element_size: int) -> LayerCost:
    return softmax_cost(site, length, element_size)


METHOD = Method(
    name="exact",
    family="none",
    summary="softmax attention unchanged, through the seam (the null conversion)",
    paper="https://arxiv.org/abs/1706.03762",
    config=ExactConfig,
    check=check,
    runtime="attnconvert.surgery.runtime.exact:ExactAttention",
    runtime_config=runtime_config,
    cost=cost,
    examples=(ExactConfig(),),
    exact=ExactConfig(),
)
