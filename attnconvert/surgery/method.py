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
        num_parameters: new parameters the method adds to the layer.
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
            `Class(num_heads, num_key_value_heads, head_dim, **runtime_config)` and travels with the checkpoint.
        runtime_config: config -> plain JSON dict of keyword arguments for the core, stored in config.json.
        cost: (config, site, T, bytes per element) -> LayerCost.
        examples: settings the conformance tests and the docs use.
        exact: a setting at which the core must equal softmax attention, or None when there is none.
    """

    name: str
    family: str
    summary: str
    paper: str
    config: type[MethodConfig]
    check: Callable[[Any, Site], list[str]]
    runtime: str
    runtime_config: Callable[[Any], dict[str, Any]]
    cost: Callable[[Any, Site, int, int], LayerCost]
    examples: tuple[MethodConfig, ...]
    exact: MethodConfig | None = None
