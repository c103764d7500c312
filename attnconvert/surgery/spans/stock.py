"""Give some layers of a stock model another attention for a while: to profile it, or to try a plan without changing the model's class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnconvert.kernels.span.api import span_attention
from attnconvert.surgery.runtime.seam import softmax_attention
from attnconvert.surgery.spans.rules import Rule

_NAME = "attnconvert_spans"

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer index, q [B, H, T, D], k and v [B, G, T, D], scaling) -> [B, H, T, D], causal."""


@contextmanager
def attention_through(model: Any, layers: Collection[int], attend: Attend) -> Iterator[None]:
    """Inside, the attention of `layers` is computed by `attend`, that of all others as before; whole sequences without padding or cache only.

    Args:
        model: a causal LM of transformers, of any family that goes through its attention interface.
        layers: layer indices.
        attend: the attention.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, dropout: float = 0.0, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert k.shape[2] == q.shape[2], "whole sequences, use_cache=False"
        scale = q.shape[3] ** -0.5 if scaling is None else float(scaling)
        if module.layer_idx in layers:
            out = attend(module.layer_idx, q, k, v, scale)
        else:
            window, softcap, sinks = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
            out = softmax_attention(q, k, v, scaling=scale, start=None, sliding_window=window, softcap=softcap, sink_logits=sinks)
        return out.to(q.dtype).transpose(1, 2).contiguous(), None

    def no_mask(*args: Any, **kwargs: Any) -> None:
        return None

    implementation = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    ALL_MASK_ATTENTION_FUNCTIONS[_NAME] = no_mask
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(implementation)
        del ALL_ATTENTION_FUNCTIONS[_NAME]
        del ALL_MASK_ATTENTION_FUNCTIONS[_NAME]


@contextmanager
def with_spans(model: Any, rules: Mapping[int, Sequence[Rule]], num_sinks: Mapping[int, int]) -> Iterator[None]:
    """Inside, the model attends as it will once it is converted to these rules.

    Args:
        model: as for `attention_through`.
        rules: layer index -> one rule per KV head; layers not named keep their attention.
        num_sinks: layer index -> sinks of the layer.
    """
    device = next(model.parameters()).device
    tensors = {
        idx: torch.tensor([[rule.alpha, rule.beta_q, rule.least] for rule in own], dtype=torch.int32, device=device).unbind(1) for idx, own in rules.items()
    }

    def attend(idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        alpha, beta, least = tensors[idx]
        return span_attention(q, k, v, alpha=alpha, beta=beta, least=least, num_sinks=num_sinks[idx], scale=scaling).transpose(1, 2)

    with attention_through(model, rules.keys(), attend):
        yield
