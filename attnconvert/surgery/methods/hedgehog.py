"""Hedgehog linear attention (https://arxiv.org/abs/2402.04347) with an exact softmax window and attention sinks.

For query n with softmax set W_n (window and sinks) and remainder P_n (all earlier keys of the same document):

    y_n = (sum_W exp(s_ni - c) v_i + e^l sum_P phi(q_n).phi(k_i) v_i) / (sum_W exp(s_ni - c) + e^l sum_P phi(q_n).phi(k_i))

with s the softmax logits, l a learned log weight per head, and phi(x) = max([e^g+ softmax(xW), e^g- softmax(-xW)], 1e-12): W one matrix per query
head (queries) and per KV head (keys), g a learned gate on the map's norm (`gates`; 0 without). c = 0 (`reference: absolute`), or the row's
maximum over W_n (`window_max`). LoLCATs (https://arxiv.org/abs/2410.10254) is `window_max` without sinks and gates, with a key map per query head.
`absolute` with gates is our default because it was measured to be better: see docs/results.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from attnconvert.surgery.method import LayerCost, Method, MethodConfig
from attnconvert.surgery.sites import Site


class WindowConfig(MethodConfig):
    """Which recent keys get exact softmax attention."""

    kind: Literal["block", "sliding"] = Field(
        default="block",
        description="sliding: exactly `size` keys including the query's own; block: the query's block of `size` and the one before (size+1 to 2*size keys), blocks counted from the first token of the document",
    )
    size: int = Field(default=64, ge=0, le=4096, description="keys; 0 = no window (pure Hedgehog)")


class HedgehogConfig(MethodConfig):
    """Settings of a Hedgehog layer."""

    window: WindowConfig = WindowConfig()
    sinks: int = Field(default=4, ge=0, le=64, description="first tokens of each document that stay in the softmax branch")
    linear: bool = Field(default=True, description="false = window and sinks alone, the honest baseline; keys outside are dropped")
    feature_dim: int | None = Field(default=None, ge=1, le=256, description="features per half of the map (the state has twice as many); null = head_dim")
    key_map: Literal["per_kv_head", "per_query_head"] = Field(
        default="per_kv_head",
        description="per_kv_head shares map and state inside a KV group; per_query_head is LoLCATs' layout, num_heads / num_kv_heads times the state",
    )
    reference: Literal["absolute", "window_max"] = Field(
        default="absolute",
        description="what the linear branch is weighed against: absolute = phi.phi stands for exp(logit) itself; window_max = it is scaled by the row's largest logit in the window (LoLCATs)",
    )
    gates: bool = Field(
        default=True,
        description="let the feature maps change their norm, g = x.u / sqrt(D) + a log mean exp(xW) with u and a learned per head; without it every key weighs about the same",
    )
    gate_power: float = Field(
        default=0.3,
        ge=0,
        le=2,
        description="initial a of the gates: 1 = features start as exp(+-xW), which can single out one key; 0 = all features of equal norm, as published",
    )
    softmax_weight: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="initial weight of the softmax branch against the linear one, e^-l (LoLCATs: 0.1); null = per head, from the teacher's weights on a few rows",
    )

    @model_validator(mode="after")
    def _something_left(self) -> HedgehogConfig:
        if not self.linear and self.window.size == 0:
            raise ValueError("linear: false needs a window (window.size > 0), else a query sees nothing but sinks")
        return self


def check(config: HedgehogConfig, site: Site) -> list[str]:
    problems = []
    if site.softcap is not None:
        problems.append("the layer caps its attention logits (softcap), which the softmax branch does not do yet")
    if site.has_sink_logits:
        problems.append("the layer has learned sink logits (s_aux)")
    if site.sliding_window is not None and config.linear:
        problems.append(f"the layer is already a sliding window of {site.sliding_window} tokens; keep it, there is nothing to linearize")
    return problems


def runtime_config(config: HedgehogConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def cost(config: HedgehogConfig, site: Site, length: int, element_size: int) -> LayerCost:
    H, G, D = site.num_heads, site.num_key_value_heads, site.head_dim
    F = (config.feature_dim or D) * 2
    state_heads = H if config.key_map == "per_query_head" else G
    window_keys = min(length, (2 if config.window.kind == "block" else 1) * config.window.size)
    state = window_keys * G * 2 * D * element_size + min(length, config.sinks) * G * 2 * D * element_size
    flops, parameters = 4 * length * (window_keys + config.sinks) * H * D, 0
    if config.linear:
        state += state_heads * F * (D + 1) * 4
        flops += length * (2 * H * D * F // 2 + 2 * state_heads * D * F // 2 + 2 * H * F * D + 2 * state_heads * F * D)
        parameters += H + (H + state_heads) * (D * F // 2 + (D + 1) * config.gates)
    return LayerCost(state_bytes=state, flops=flops, num_parameters=parameters)


METHOD = Method(
    name="hedgehog",
    family="linearize",
    summary="Hedgehog linear attention with an exact softmax window and attention sinks",
    paper="https://arxiv.org/abs/2402.04347",
    config=HedgehogConfig,
    check=check,
    runtime="attnconvert.surgery.runtime.hedgehog:HedgehogAttention",
    runtime_config=runtime_config,
    cost=cost,
    examples=(
        HedgehogConfig(window=WindowConfig(kind="block", size=8), sinks=2),
        HedgehogConfig(window=WindowConfig(kind="sliding", size=8), sinks=2),
        HedgehogConfig(window=WindowConfig(size=0), sinks=0, feature_dim=4),
        HedgehogConfig(window=WindowConfig(kind="block", size=8), sinks=0, key_map="per_query_head", reference="window_max", gates=False),
        HedgehogConfig(window=WindowConfig(kind="sliding", size=8), sinks=2, linear=False),
    ),
    exact=HedgehogConfig(window=WindowConfig(kind="sliding", size=4096), sinks=0),
)
