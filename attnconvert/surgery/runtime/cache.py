"""Cache layers for converted attention: transformers' cache contract outside, a dict of tensors owned by the core inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class StateView:
    """What a converted layer's `update()` returns in place of keys and values: this call's tokens and the layer that holds the rest.

    Not a tensor on purpose: code between the cache and the attention function that touches k or v fails loudly.
    """

    __slots__ = ("key", "layer", "value")

    def __init__(self, layer: CoreCacheLayer, key: Tensor, value: Tensor):
        self.layer, self.key, self.value = layer, key, value


class CoreCacheLayer(CacheLayerMixin):
    """Cache layer of one converted attention module.

    `update()` sees no mask, so it only counts tokens; the core owns `state` (named tensors with batch first). Calls with several tokens
    replace its tensors; decode steps of a core with `static_decode`, and the reordering of beams, change them in place.

    Args:
        planned_length: tokens, padding included, that the cache is expected to hold in the end; None = not known. A core whose state grows
            with the context makes room for them at once.

    Attributes:
        state: the core's tensors; empty before the first token.
        layout: what the core has to know about them besides.
        capacity: tokens, padding included, that the state's tensors have room for; None = any number.
        slots: rows of the state that the batch uses, int64 [B] on its device, see `attnconvert.kernels.pool`; None = the state has the batch's rows. Set by a
            serving engine, which owns the tensors: single tokens only, and whatever else is done to rows it does itself.
        num_tokens: tokens seen, padding included (transformers derives positions and mask sizes from it).
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    is_croppable = False

    def __init__(self, planned_length: int | None = None) -> None:
        super().__init__()
        self.planned_length = planned_length
        self.state: dict[str, Tensor] = {}
        self.layout: Any = None
        self.capacity: int | None = None
        self.slots: Tensor | None = None
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.is_initialized = True
        self.num_tokens += key_states.shape[-2]
        view = StateView(self, key_states, value_states)
        return view, view

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # the full length: most models build one mask for all layers, and kept layers need it whole
        return self.num_tokens + query_length, 0

    def refuse_slots(self, what: str) -> None:
        """Raises ValueError where the state's rows are not the batch's."""
        if self.slots is not None:
            raise ValueError(f"{what} on rows of a pool (`slots` is set): the serving engine that owns the pool has to take rows out and put them back")

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.refuse_slots("a change of the batch")
        self.state = {name: function(tensor) for name, tensor in self.state.items()}

    def reset(self) -> None:
        self.refuse_slots("a reset")
        self.state, self.layout, self.capacity, self.num_tokens, self.is_initialized = {}, None, None, 0, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.refuse_slots("beams")
        for tensor in self.state.values():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        raise ValueError("an offloaded cache is not supported by converted attention, whose cache is small already: use the default cache")

    def crop(self, max_length: int) -> None:
        if max_length != self.num_tokens:
            raise ValueError(
                "converted attention forgets, so its cache cannot be cropped: assisted and prompt-lookup decoding are not available for converted models"
            )
