"""What a method is: a frozen record of functions. One file in `methods/` per method; the file name is the name in YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from attnconvert.surgery.sites import Site


class MethodConfig(BaseModel):
    """Base of every method's settings: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class LayerCost:
    """What one converted layer costs per sequence.

    Attributes:
        state_bytes: cache bytes held at context length T (all heads, one sequence).
        flops: multiply-adds x 2 of the attention core for a prefill of T tokens, projections excluded.
        num_parameters: parameters of the layer that training starts from a rough guess: new ones, or whole projections that were made anew.
    """

    state_bytes: int
    flops: int
    num_parameters: int


@dataclass(frozen=True)
class Method:
    """One kind of attention.

    Attributes:
        name: the file name in `methods/`, the word used in recipes.
        family: the CLI verb it belongs to: `linearize`, `sparsify`, `mix-heads`, `regroup`, or `none`.
        summary: one line for `attnconvert methods`.
        paper: URL of the paper.
        config: the pydantic model of its settings.
        check: (config, site) -> reasons why this site cannot be converted; empty = it can. Needs no weights.
        runtime: `module:Class` of the core under `attnconvert.surgery.runtime`; it is built as
            `Class(num_heads, num_key_value_heads, head_dim, **runtime_config)` and travels with the checkpoint. None for a method that changes the
            projections of the attention module and leaves the attention itself alone: its checkpoints need no code of ours.
        runtime_config: config -> plain JSON dict for the row of the plan, stored in config.json; keyword arguments of the core where there is one.
        cost: (config, site, T, bytes per element) -> LayerCost.
        examples: settings the conformance tests and the docs use.
        exact: a setting at which the core must equal softmax attention, or None when there is none.
        key_value_heads: (config, site) -> KV heads of the layer afterwards, stored in the row of the plan as `num_key_value_heads`; None = as before.
    """

    name: str
    family: str
    summary: str
    paper: str
    config: type[MethodConfig]
    check: Callable[[Any, Site], list[str]]
    runtime: str | None
    runtime_config: Callable[[Any], dict[str, Any]]
    cost: Callable[[Any, Site, int, int], LayerCost]
    examples: tuple[MethodConfig, ...]
    exact: MethodConfig | None = None
    key_value_heads: Callable[[Any, Site], int] | None = None


def softmax_cost(site: Site, length: int, element_size: int) -> LayerCost:
    """Cost of a layer that keeps softmax attention: KV bytes, and the causal half of 2 T^2 H D multiply-adds."""
    keys = min(length, site.sliding_window or length)
    pairs = length * keys - keys * (keys - 1) // 2
    return LayerCost(
        state_bytes=2 * keys * site.num_key_value_heads * site.head_dim * element_size, flops=4 * pairs * site.num_heads * site.head_dim, num_parameters=0
    )
