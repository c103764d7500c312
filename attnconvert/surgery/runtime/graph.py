"""Decode steps of a whole converted model as one CUDA graph.

A step of a small model is a few hundred kernels of some microseconds each, and Python needs longer to launch one than the device to run it.
The state of converted layers has constant size, or room for a length it was told, and is changed in place, so a step does the same to the same
addresses every time: it is recorded once and replayed. Layers kept as softmax attention grow their keys with every token and cannot be recorded.
"""

import functools
import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from attnconvert.surgery.runtime.cache import CoreCacheLayer
from attnconvert.surgery.runtime.seam import AttentionCore

logger = logging.getLogger(__name__)
_STATIC_INPUTS = ("input_ids", "position_ids", "attention_mask")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # they look at the largest position, on the host


@functools.cache
def log_once(message: str) -> None:
    """Says a reason once, at level info."""
    logger.info(message)


def graph_refusal(model: Any, cache: Any) -> str | None:
    """Why single-token steps of the model with this cache cannot be captured in a CUDA graph, or None.

    Args:
        model: a converted model.
        cache: its cache; None = there is none.
    """
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}"
    if cache is None:
        return "there is no cache"
    kept = sum(not isinstance(layer, CoreCacheLayer) for layer in cache.layers)
    if kept:
        return f"{kept} of {len(cache.layers)} layers are kept as softmax attention, whose cache grows with every token"
    cores = [module for module in model.modules() if isinstance(module, AttentionCore)]
    if not all(core.static_decode for core in cores):
        return f"{next(type(core).__name__ for core in cores if not core.static_decode)} changes the shape of its cache"
    if any(core.needs_planned_length for core in cores) and any(layer.planned_length is None for layer in cache.layers):
        return "the cache grows, for it was not told how many tokens to make room for: model.build_cache(max_length)"
    if model.training:
        return "the model is in training mode"
    if len(set((getattr(model, "hf_device_map", None) or {"": None}).values())) > 1:
        return "the model is spread over several devices"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the model is quantized"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "the family computes positions from the number of cached tokens"
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "a mixture of experts chooses its kernels on the host"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            return f"{rope['rope_type']} rotary embeddings depend on the length, which only the host knows"
    return None


@functools.cache
def capture_stream(device: int) -> Any:
    """The stream of a device on which graphs are captured: always the same, since cuBLAS keeps a workspace for each (32 MiB on an H100) until the process ends."""
    return torch.cuda.Stream(device)


class DecodeGraph:
    """The forward pass of a converted model; single-token steps on one cache are replayed from a CUDA graph.

    The first such step runs plainly (kernels are compiled and loaded), the second is captured, the others are replays. Calls it cannot
    replay (prefill, another cache, unknown inputs) run plainly. Call it without gradients. The tensors a replay returns are
    overwritten by the next one.

    Args:
        model: as `graph_refusal` accepts it; otherwise every call runs plainly and the reason is logged once.
    """

    def __init__(self, model: Any):
        self.model = model
        self.num_replays = 0
        self._graph: Any = None
        self._warm: tuple[Any, ...] = ()  # shapes and constants of the last plain step
        self._states: list[dict[str, Tensor]] = []  # and the cache it ran on: a layer's dict is the same object as long as its tensors are
        self._static: dict[str, Tensor] = {}
        self._output: Any = None
        self._failed = False

    def __call__(self, **inputs: Any) -> Any:
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if cache is None or not isinstance(ids, Tensor) or ids.shape[1] != 1 or self._failed or cache.get_seq_length() == 0:
            return self.model(**inputs)
        why = self._unknown_input(inputs)
        if why is None and not self._warm:
            why = graph_refusal(self.model, cache)
        if why is not None:
            log_once(f"a decode step runs without a CUDA graph: {why}")
            return self.model(**inputs)
        values = self._values(inputs, cache)
        key, states = self._key(inputs, values), [layer.state for layer in cache.layers]
        full = any(layer.capacity is not None and layer.num_tokens >= layer.capacity for layer in cache.layers)  # its tensors change in this step
        if full or key != self._warm or len(states) != len(self._states) or any(a is not b for a, b in zip(states, self._states, strict=True)):
            self._graph, self._static, self._output = None, {}, None
            output = self.model(**inputs)
            self._warm, self._states = key, [layer.state for layer in cache.layers]
            return output
        if self._graph is None:
            return self._capture(inputs, values)
        for name, value in values.items():
            self._static[name].copy_(value)
        self._graph.replay()
        self.num_replays += 1
        for layer in cache.layers:
            layer.num_tokens += 1
        return self._output

    @staticmethod
    def _unknown_input(inputs: dict[str, Any]) -> str | None:
        for name, value in inputs.items():
            if name in _STATIC_INPUTS or name == "past_key_values":
                continue
            if value is not None and not isinstance(value, (bool, int, float, str)):
                return f"the input {name!r} would be frozen in it"
            if name in ("output_attentions", "output_hidden_states") and value:
                return f"{name} is set"
        mask = inputs.get("attention_mask")
        return "the attention mask is not two-dimensional" if isinstance(mask, Tensor) and mask.dim() != 2 else None

    @staticmethod
    def _values(inputs: dict[str, Any], cache: Any) -> dict[str, Tensor]:
        """The tensors that differ from step to step: ids [B, 1], positions [B, 1], and the last column of the mask [B, 1]."""
        ids, positions, mask = (inputs.get(name) for name in _STATIC_INPUTS)
        assert isinstance(ids, Tensor)
        if positions is None:  # the forward pass would take it from the number of cached tokens, and a graph would freeze that
            positions = torch.full_like(ids, cache.get_seq_length())
        values = {"input_ids": ids, "position_ids": positions}
        return values if mask is None else values | {"attention_mask": mask[:, -1:]}

    @staticmethod
    def _key(inputs: dict[str, Any], values: dict[str, Tensor]) -> tuple[Any, ...]:
        """What must stay the same for a replay, besides the cache: the shapes of the inputs and the constants."""
        shapes = tuple((name, value.shape, value.dtype) for name, value in values.items())
        constants = tuple((name, value) for name, value in sorted(inputs.items()) if name not in _STATIC_INPUTS and name != "past_key_values")
        return shapes, constants

    def _capture(self, inputs: dict[str, Any], values: dict[str, Tensor]) -> Any:
        self._static = {name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()}
        layers = inputs["past_key_values"].layers
        before = [layer.num_tokens for layer in layers]
        graph, stream = torch.cuda.CUDAGraph(), capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._output = self.model(**{**inputs, **self._static})
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._failed = True
            for layer, number in zip(layers, before, strict=True):
                layer.num_tokens = number
            log_once(f"decode steps run without a CUDA graph, capturing one failed: {str(error).splitlines()[0]}")
            return self.model(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph
        graph.replay()
        self.num_replays += 1
        return self._output
