"""The states of all requests of one converted layer, as an engine keeps them: a pool of pages, one page for a request. Imports no vLLM.

A page holds a request's state tensors one after the other. A decode step reads and writes the pages of its requests where they lie (see `attnconvert.kernels.pool`);
several tokens of a request are computed on a copy of its state, which is put back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnconvert.surgery.runtime.cache import CoreCacheLayer
from attnconvert.surgery.runtime.cores import core_class
from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs

ALIGNMENT = 16  # bytes; what the widest loads of kernels want


class Field(NamedTuple):
    """One tensor of a state in a page: its name, its shape without the batch, its dtype, and the byte where it begins."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


class PageLayout(NamedTuple):
    """Where the tensors of a state are in a page, and how many bytes it has, a multiple of ALIGNMENT."""

    fields: tuple[Field, ...]
    num_bytes: int


def page_layout(state: Mapping[str, Tensor]) -> PageLayout:
    """The page for a state. state: tensors with batch first."""
    fields, offset = [], 0
    for name, tensor in state.items():
        fields.append(Field(name, tuple(tensor.shape[1:]), tensor.dtype, offset))
        offset += -(-prod(tensor.shape[1:]) * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return PageLayout(tuple(fields), offset)


def views(pages: Tensor, layout: PageLayout) -> dict[str, Tensor]:
    """The state tensors that lie in pages, one row for each page.

    Args:
        pages: uint8 [N, at least layout.num_bytes]; pages may lie apart by a multiple of ALIGNMENT.
    """
    found = {}
    for name, shape, dtype, offset in layout.fields:
        size = prod(shape) * dtype.itemsize
        found[name] = pages[:, offset : offset + size].view(dtype).view(len(pages), *shape) if size else pages.new_empty(len(pages), *shape, dtype=dtype)
    return found


class Chunk(NamedTuple):
    """Several tokens of one request, or its first.

    Attributes:
        begin, end: where they are in the batch.
        row: [1] int64, the request's page.
        seen: tokens of the request with them.
    """

    begin: int
    end: int
    row: Tensor
    seen: int

    @property
    def is_first(self) -> bool:
        """The request begins, or begins again after it was preempted: its page holds what another request left."""
        return self.seen == self.end - self.begin


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass: first the requests that take one further token each, then chunks.

    Attributes:
        rows: [n] int64, the pages of those that take one.
    """

    rows: Tensor
    chunks: tuple[Chunk, ...]


def batch_of(begins: Sequence[int], seen: Sequence[int], rows: Tensor) -> Batch:
    """Sorts the requests of a forward pass.

    Args:
        begins: where each request's tokens begin in the batch, and where the last one's end; n + 1.
        seen: tokens of each request with them; n.
        rows: [n] int64, each request's page.
    """
    counts = [stop - begin for begin, stop in itertools.pairwise(begins)]
    steps = next((i for i, (count, total) in enumerate(zip(counts, seen, strict=True)) if count != 1 or total == 1), len(counts))
    chunks = tuple(Chunk(begins[i], begins[i + 1], rows[i : i + 1], seen[i]) for i in range(steps, len(counts)) if counts[i])
    return Batch(rows[:steps], chunks)


def build_core(row: Mapping[str, Any]) -> AttentionCore:
    """The core of a layer of `attn_plan`, with fresh parameters."""
    build: Any = core_class(row["method"])
    core: AttentionCore = build(row["num_heads"], row["num_key_value_heads"], row["head_dim"], **row["config"])
    return core


class PooledState:
    """A core and the pool of its states.

    Args:
        core: of a method that keeps a state of its own.
        max_length: tokens of a request.
        dtype: of queries, keys and values.
    """

    def __init__(self, core: AttentionCore, max_length: int, dtype: torch.dtype):
        self.core, self.max_length = core, max_length
        state, self._core_layout = core.new_state(1, max_length, dtype, torch.empty(0).device)
        self.layout = page_layout(state)
        self.pool: dict[str, Tensor] = {}

    def bind(self, pages: Tensor) -> None:
        """Use these pages. pages: as in `views`."""
        self.pool = views(pages, self.layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, out: Tensor) -> None:
        """Attention of all tokens of a batch, each to its request; the states take them in.

        Args:
            q: [N, H, D], N at least the tokens of the batch. k, v: [N, G, D].
            out: [N, H, D], written where the batch has tokens.
        """
        steps = len(batch.rows)
        if steps:
            layer = self._layer(self.max_length)  # requests have numbers of tokens of their own; pages have room for all
            layer.state, layer.slots = self.pool, batch.rows
            out[:steps] = self._call(q[:steps, :, None], k[:steps, :, None], v[:steps, :, None], layer, scale)[:, :, 0]
        for chunk in batch.chunks:
            layer = self._layer(chunk.seen)
            if not chunk.is_first:
                layer.state = {name: tensor.index_select(0, chunk.row) for name, tensor in self.pool.items()}
            some_q, some_k, some_v = (x[chunk.begin : chunk.end].transpose(0, 1)[None] for x in (q, k, v))
            out[chunk.begin : chunk.end] = self._call(some_q, some_k, some_v, layer, scale)[0].transpose(0, 1)
            for name, tensor in self.pool.items():
                tensor.index_copy_(0, chunk.row, layer.state[name])

    def _layer(self, seen: int) -> CoreCacheLayer:
        layer = CoreCacheLayer(self.max_length)
        layer.num_tokens, layer.layout, layer.capacity = seen, self._core_layout, self.max_length
        return layer

    def _call(self, q: Tensor, k: Tensor, v: Tensor, layer: CoreCacheLayer, scale: float) -> Tensor:
        inputs = SeamInputs(None, scale, layer=layer, batch_size=q.shape[0], num_tokens=q.shape[2], device=q.device)
        found: Tensor = self.core(q, k, v, inputs)
        return found
