"""Exact softmax attention through the seam: converts nothing, costs what softmax costs. The null conversion of every test suite."""

from __future__ import annotations

from typing import Any

from attnconvert.surgery.method import LayerCost, Method, MethodConfig
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


def softmax_cost(site: Site, length: int, element_size: int) -> LayerCost:
    """Cost of a layer that keeps softmax attention: KV bytes, and the causal half of 2 T^2 H D multiply-adds."""
    keys = min(length, site.sliding_window or length)
    pairs = length * keys - keys * (keys - 1) // 2
    return LayerCost(
        state_bytes=2 * keys * site.num_key_value_heads * site.head_dim * element_size, flops=4 * pairs * site.num_heads * site.head_dim, num_parameters=0
    )


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
