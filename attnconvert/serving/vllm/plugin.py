"""What vLLM calls in each of its processes: names the converted architectures. Costs others nothing: no model code is imported."""

from __future__ import annotations

from attnconvert.serving.vllm.plan import FAMILIES, ConvertedModelConfig, architecture

_MODELS = "attnconvert.serving.vllm.models"


def register() -> None:
    """Make vLLM know the converted architectures. May be called again. Their code is imported when one is asked for, and checks vLLM's version then."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    for family in FAMILIES:
        name = architecture(family)
        ModelRegistry.register_model(name, f"{_MODELS}:{name}")
        MODELS_CONFIG_MAP[name] = ConvertedModelConfig
