"""The plan of a conversion: one row per attention site. Pure data, stored in config.json under `attn_plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PLAN_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One attention site.

    Attributes:
        layer_idx: transformers' layer index.
        path: module path inside the model, e.g. `model.layers.0.self_attn`.
        num_heads: query heads H. num_key_value_heads: G. head_dim: D.
        method: method name, or None when the layer keeps softmax attention.
        config: the method's runtime settings as plain JSON (empty when kept).
        reason: why this row says what it says, for the printed table.
    """

    layer_idx: int
    path: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    method: str | None
    config: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class ConversionPlan:
    """All sites of a model, in layer order.

    Attributes:
        base_model_type: transformers' `model_type` of the model before conversion.
        layers: one LayerPlan per attention site.
        num_kept_later: how many more layers return to softmax after attention transfer, chosen by `keep_by`; 0 = none.
        keep_by: `layer_error` (largest relative error after transfer) or `kl` (largest drop of the KL to the teacher when restored).
        switch: where `dense_len` of block-sparse layers was measured, and the figures; None = nowhere.
    """

    base_model_type: str
    layers: tuple[LayerPlan, ...]
    num_kept_later: int = 0
    keep_by: str = "layer_error"
    switch: dict[str, Any] | None = None

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        return tuple(row for row in self.layers if row.method is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form for config.json."""
        facts = {"schema_version": PLAN_SCHEMA_VERSION, **asdict(self), "layers": [asdict(row) for row in self.layers]}
        return {key: value for key, value in facts.items() if key != "switch" or value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionPlan:
        """Inverse of `to_dict`. Raises ValueError for a schema version this attnconvert does not know."""
        if data.get("schema_version") != PLAN_SCHEMA_VERSION:
            raise ValueError(f"attn_plan has schema_version {data.get('schema_version')!r}, this attnconvert reads {PLAN_SCHEMA_VERSION}")
        rest = {k: v for k, v in data.items() if k not in ("schema_version", "layers")}
        return cls(layers=tuple(LayerPlan(**row) for row in data["layers"]), **rest)
