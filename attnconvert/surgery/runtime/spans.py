"""MoA core: softmax attention in which each KV head sees the attention sinks and a window of its own that may grow with the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnconvert.kernels.span.api import span_attention
from attnconvert.kernels.span.decode import SpanLayout, SpanState, empty_state, fill, resized, span_attention_extend, span_attention_step, span_layout
from attnconvert.kernels.span.slots import fixed_point, least_window
from attnconvert.surgery.runtime.cache import CoreCacheLayer
from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs

SPARE_TOKENS = 64  # what a cache without a planned length grows by: rings grow in steps of 64, and all heads' rings should grow in one copy


class SpanAttention(AttentionCore):
    """See `attnconvert.kernels.span.reference` for the maths and `attnconvert.kernels.span.decode` for the cache. No parameters.

    Args:
        num_heads: query heads H.
        num_key_value_heads: G.
        head_dim: D.
        alphas: tokens, one per KV head or one for all; None = not decided yet, every head sees everything.
        betas: fractions between 0 and 1, as many.
        num_sinks: first tokens of a document that every query sees.
        min_length: tokens of context below which a window does not shrink with it.
    """

    static_decode = True
    needs_planned_length = True

    def __init__(
        self, num_heads: int, num_key_value_heads: int, head_dim: int, alphas: Sequence[int] | int | None, betas: Sequence[float] | float | None, num_sinks: int,
        min_length: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.num_key_value_heads, self.head_dim, self.num_sinks, self.min_length = num_key_value_heads, head_dim, num_sinks, min_length
        if alphas is None or betas is None:
            assert alphas is betas, "both numbers of a rule, or neither"
            alphas, betas = 0, 1.0
        self.set_rules(alphas, betas)

    def set_rules(self, alphas: Sequence[int] | int, betas: Sequence[float] | float) -> None:
        """Change the rules, as in `__init__`. A cache that exists already keeps those it was begun with.

        Raises:
            ValueError: not one rule per KV head, or a beta outside of 0 to 1.
        """
        count = self.num_key_value_heads
        alphas = [alphas] * count if isinstance(alphas, int) else list(alphas)
        betas = [betas] * count if isinstance(betas, (int, float)) else list(betas)
        if len(alphas) != count or len(betas) != count:
            raise ValueError(f"{len(alphas)} alphas and {len(betas)} betas for {count} KV heads")
        if not all(0 <= beta <= 1 for beta in betas):
            raise ValueError(f"a beta is outside of 0 to 1: {betas}")
        self.alphas, self.betas = tuple(alphas), tuple(fixed_point(beta) for beta in betas)
        self.leasts = tuple(least_window(alpha, beta, self.min_length) for alpha, beta in zip(self.alphas, self.betas, strict=True))
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = None

    def _rules(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The rules as int32 tensors [G]. Not buffers: a checkpoint's loader leaves those that it does not find in the files uninitialised."""
        if self._tensors is None or self._tensors[0].device != device:
            with torch.inference_mode(False):  # what is made in inference mode cannot be used in training later
                self._tensors = tuple(torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (self.alphas, self.betas, self.leasts))  # type: ignore[assignment]
        assert self._tensors is not None
        return self._tensors

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        assert inputs.sliding_window is None, "refused when the plan is made"
        layer, scale, start = inputs.layer, inputs.scaling, inputs.start
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if layer is None or not layer.state:
            if layer is not None:
                layer.refuse_slots("a prompt")
            alpha, beta, least = self._rules(q.device)
            out = span_attention(q, k, v, alpha=alpha, beta=beta, least=least, num_sinks=self.num_sinks, scale=scale, start=start)
            if layer is not None:
                layout = span_layout(self.alphas, self.betas, self.leasts, self.num_sinks, max(layer.num_tokens, layer.planned_length or 0), q.device)
                keep(layer, fill(k, v, layout, start)._asdict(), layout)
            return out.transpose(1, 2)
        state, layout = with_room(layer)
        if q.shape[1] == 1 and not torch.is_grad_enabled():
            out = span_attention_step(q, k, v, state, layout, scale=scale, start=start, slots=layer.slots)
        else:
            layer.refuse_slots("several tokens at once, or gradients,")
            out, state = span_attention_extend(q, k, v, state, layout, scale=scale, start=start)
            layer.state = state._asdict()
        return out.transpose(1, 2)

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Any]:
        layout = span_layout(self.alphas, self.betas, self.leasts, self.num_sinks, max_length, device)
        return empty_state(batch_size, self.head_dim, layout, dtype)._asdict(), layout


def keep(layer: CoreCacheLayer, state: dict[str, Tensor], layout: SpanLayout) -> None:
    """Store a state and its layout."""
    layer.state, layer.layout, layer.capacity = state, layout, layout.capacity


def with_room(layer: CoreCacheLayer) -> tuple[SpanState, SpanLayout]:
    """The stored state, grown first where the tokens that `layer` has counted already would not fit. A pool has no batch's length, and does not grow."""
    state, layout = SpanState(**layer.state), layer.layout
    assert isinstance(layout, SpanLayout)
    if layer.slots is None and layer.num_tokens > layout.capacity:
        planned = layer.planned_length or 0
        grown, layout = resized(state, layout, planned if layer.num_tokens <= planned else layer.num_tokens + SPARE_TOKENS)
        keep(layer, layer.state if grown is state else grown._asdict(), layout)  # the same tensors stay the same dict: a CUDA graph is known by it
        state = grown
    return state, layout
