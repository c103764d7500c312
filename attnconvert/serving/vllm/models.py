"""vLLM's model classes with converted attention, made on request: `AttnConvertLlamaForCausalLM` from vLLM's own `LlamaForCausalLM`."""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

import torch
import vllm

from attnconvert.serving.vllm.plan import FAMILIES, architecture, check_version


def __getattr__(name: str) -> Any:
    """A converted class by its name.

    Raises:
        AttnConvertError: `vllm-version`.
    """
    for family in FAMILIES:
        if name == architecture(family):
            check_version(vllm.__version__)  # before anything is imported that another version may not have
            return _model_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class(family: str) -> type[Any]:
    module, name = FAMILIES[family]
    base = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    return type(architecture(family), (_Converted, base), {"__module__": __name__, "__doc__": f"vLLM's {name} with converted attention."})


class _Converted:
    """What each class adds to vLLM's own: converted layers compute their attention, and room is made for states."""

    has_inner_state: ClassVar[bool] = True
    is_hybrid: ClassVar[bool] = True  # where no layer has a state, the config's `layer_types` say so

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        from attnconvert.serving.vllm.layers import convert_layers

        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        convert_layers(self, vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Asked by vLLM: the shapes of a layer's state, which is all bytes here."""
        from attnconvert.serving.vllm.layers import page_bytes

        return ((page_bytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        raise NotImplementedError("states are copied for prefix caching only, which is off")
