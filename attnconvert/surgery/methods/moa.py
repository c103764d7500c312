"""MoA: attention spans of different lengths (https://arxiv.org/abs/2406.14909), one rule per KV head.

The query at position n sees the first `num_sinks` tokens and the last alpha + beta max(n + 1, min_length) tokens, itself included: a window that is fixed
(beta 0), grows with the context, or is everything (alpha 0, beta 1). Rules come from calibration (at most `search.max_rules` different ones per layer, all layers
together within `density`), from MoA's plan files, or from the recipe: one fixed window for all heads is StreamingLLM
(https://arxiv.org/abs/2309.17453), the two candidates "short" and "everything" are DuoAttention's (https://arxiv.org/abs/2410.10819). A head keeps the
keys that its window can reach, so cache and decoding shrink with the spans. No parameters are added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field, field_validator, model_validator

from attnconvert.kernels.span.slots import fixed_point, least_window, ring_size, visible_pairs
from attnconvert.surgery.method import LayerCost, Method, MethodConfig, softmax_cost
from attnconvert.surgery.sites import Site

MAX_ALPHA = 2**30  # positions and windows stay far inside of 32 bits


def _check_numbers(alphas: Iterable[int], betas: Iterable[float]) -> None:
    for alpha in alphas:
        if abs(alpha) > MAX_ALPHA:
            raise ValueError(f"alpha {alpha} is beyond {MAX_ALPHA} tokens")
    for beta in betas:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta {beta:g} is not between 0 and 1")


class SearchConfig(MethodConfig):
    """How calibration finds the rules."""

    alphas: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="tokens to choose alpha from, may be negative; null = from minus the shortest of lengths to the longest, in eighths of it",
    )
    betas: tuple[float, ...] = Field(default=tuple(i / 8 for i in range(9)), min_length=1, description="fractions of the context to choose beta from, 0 to 1")
    candidates: tuple[tuple[int, float], ...] | None = Field(
        default=None, min_length=1, description="the rules to choose from, as pairs (alpha, beta), in place of all pairs of alphas and betas"
    )
    lengths: tuple[int, ...] = Field(
        default=(2048, 4096, 8192), min_length=1, description="tokens of the contexts on which each rule's damage is measured, ascending"
    )
    validation_length: int | None = Field(
        default=None, ge=1, description="tokens of the contexts on which the best plans are compared; null = a length that was not measured"
    )
    max_rules: int = Field(default=2, ge=1, description="different rules in one layer at most")
    num_samples: int = Field(default=16, ge=1, description="contexts per length: plain text and questions about far text in turn")
    response_tokens: int = Field(default=32, ge=1, description="tokens of the answers that the model writes itself to questions about far text, at most")

    @field_validator("lengths")
    @classmethod
    def _ascending(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= a for a, b in zip((0, *lengths), lengths, strict=False)):
            raise ValueError("lengths are positive and ascending, each once")
        return lengths

    @model_validator(mode="after")
    def _rules_make_sense(self) -> SearchConfig:
        if self.candidates is not None and self.alphas is not None:
            raise ValueError("candidates names the rules one by one: leave out alphas (and betas)")
        pairs = self.candidates if self.candidates is not None else [(alpha, 0.0) for alpha in self.alphas or ()]
        _check_numbers([alpha for alpha, _ in pairs], [*self.betas, *(beta for _, beta in pairs)])
        if self.candidates is not None and len({(alpha, fixed_point(beta)) for alpha, beta in self.candidates}) < len(self.candidates):
            raise ValueError("candidates has the same rule twice")
        if self.response_tokens >= self.lengths[0]:
            raise ValueError(f"a response of {self.response_tokens} tokens leaves nothing of a context of {self.lengths[0]}")
        return self


class MoaConfig(MethodConfig):
    """Settings of a layer with attention spans."""

    density: float = Field(
        default=0.5, gt=0, le=1, description="share of the KV cache to keep, mean over all heads, at each of the lengths; for rules from calibration"
    )
    num_sinks: int = Field(default=64, ge=0, le=65536, description="first tokens of a document that every query sees, whatever its window")
    alphas: int | tuple[int, ...] | None = Field(
        default=None, description="tokens of the window, one number for all KV heads or one for each, may be negative; null = from calibration or from plan"
    )
    betas: float | tuple[float, ...] | None = Field(
        default=None, description="what the window grows by with each token of the context, 0 to 1, one number or one for each KV head; null as for alphas"
    )
    min_length: int | None = Field(
        default=None,
        ge=0,
        description="tokens of context below which windows no longer shrink with it, so that short inputs lose nothing; null = the shortest of search.lengths, or 0 beside alphas and betas",
    )
    plan: str | None = Field(default=None, description="a JSON file with MoA's rules (alphas and betas, a list per layer), in place of alphas and betas")
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _one_source_of_rules(self) -> MoaConfig:
        if (self.alphas is None) != (self.betas is None):
            given, missing = ("alphas", "betas") if self.betas is None else ("betas", "alphas")
            raise ValueError(f"{given} without {missing}: a rule has both (a fixed window has betas: 0, a share of the context has alphas: 0)")
        if self.plan is not None and self.alphas is not None:
            raise ValueError("plan names a file with alphas and betas: leave out one or the other")
        if self.alphas is not None and self.betas is not None:
            alphas = self.alphas if isinstance(self.alphas, tuple) else (self.alphas,)
            betas = self.betas if isinstance(self.betas, tuple) else (self.betas,)
            if isinstance(self.alphas, tuple) and isinstance(self.betas, tuple) and len(alphas) != len(betas):
                raise ValueError(f"{len(alphas)} alphas and {len(betas)} betas: one of each for every KV head")
            if not alphas or not betas:
                raise ValueError("alphas and betas have one number for each KV head, or one for all")
            _check_numbers(alphas, betas)
        return self


def rules_of(config: MoaConfig, num_key_value_heads: int) -> list[tuple[int, float]] | None:
    """The rule of every KV head, (alpha, beta); None where calibration has not decided yet."""
    if config.alphas is None or config.betas is None:
        return None
    alphas = config.alphas if isinstance(config.alphas, tuple) else (config.alphas,) * num_key_value_heads
    betas = config.betas if isinstance(config.betas, tuple) else (config.betas,) * num_key_value_heads
    return list(zip(alphas, betas, strict=True))


def min_length_of(config: MoaConfig) -> int:
    """Tokens of context below which windows do not shrink with it."""
    if config.min_length is not None:
        return config.min_length
    return config.search.lengths[0] if config.alphas is None else 0


def check(config: MoaConfig, site: Site) -> list[str]:
    problems = [
        f"the layer has {what}, which attention spans do not do"
        for what, there in (("capped logits (softcap)", site.softcap is not None), ("learned sink logits (s_aux)", site.has_sink_logits))
        if there
    ]
    if site.sliding_window is not None:  # a third bound in every rule and every kernel, to save little: its cache is bounded as it is
        problems.append(f"the layer is already a sliding window of {site.sliding_window} tokens; keep it, there is little to leave out")
    for name, numbers in (("alphas", config.alphas), ("betas", config.betas)):
        if isinstance(numbers, tuple) and len(numbers) != site.num_key_value_heads:
            problems.append(f"{name} has {len(numbers)} numbers, but the layer has {site.num_key_value_heads} KV heads")
    return problems


def runtime_config(config: MoaConfig) -> dict[str, Any]:
    alphas, betas = (list(x) if isinstance(x, tuple) else x for x in (config.alphas, config.betas))
    return {"alphas": alphas, "betas": betas, "num_sinks": config.num_sinks, "min_length": min_length_of(config)}


def cost(config: MoaConfig, site: Site, length: int, element_size: int) -> LayerCost:
    """As the rules say, cache slots in multiples of 64 tokens; the target density's share of softmax attention where they are not known yet."""
    rules = rules_of(config, site.num_key_value_heads)
    if rules is None:
        dense = softmax_cost(site, length, element_size)
        return LayerCost(state_bytes=round(dense.state_bytes * config.density), flops=round(dense.flops * config.density), num_parameters=0)
    fixed = [(alpha, q, least_window(alpha, q, min_length_of(config))) for alpha, q in ((alpha, fixed_point(beta)) for alpha, beta in rules)]
    slots = sum(config.num_sinks + ring_size(alpha, beta, config.num_sinks, length, least) for alpha, beta, least in fixed)
    pairs = sum(visible_pairs(alpha, beta, config.num_sinks, length, least) for alpha, beta, least in fixed)
    return LayerCost(
        state_bytes=2 * slots * site.head_dim * element_size, flops=4 * pairs * (site.num_heads // site.num_key_value_heads) * site.head_dim, num_parameters=0
    )


METHOD = Method(
    name="moa",
    family="sparsify",
    summary="attention sinks and a window per KV head that may grow with the context, the rules found by calibration (MoA)",
    paper="https://arxiv.org/abs/2406.14909",
    config=MoaConfig,
    check=check,
    runtime="attnconvert.surgery.runtime.spans:SpanAttention",
    runtime_config=runtime_config,
    cost=cost,
    examples=(
        MoaConfig(alphas=8, betas=0, num_sinks=2),
        MoaConfig(alphas=(-2, 6), betas=(0.5, 0.125), num_sinks=3, min_length=16),
        MoaConfig(alphas=(4, 0), betas=(0, 1), num_sinks=0),
    ),
    exact=MoaConfig(alphas=0, betas=1),
)
