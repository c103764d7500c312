"""The seam: one attention function and one mask function for every family that goes through transformers' attention interface.

transformers' attention module computes q, k, v (projections, biases, q/k norm, RoPE), updates the cache and calls the registered
function. Ours asks the module for a child called `core`: with one, the core computes the attention; without, the layer keeps
softmax attention. The mask stays 2D (a 4D mask is T x T: 1 GiB at 32k tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from attnconvert.surgery.runtime.cache import CoreCacheLayer, StateView

# A checkpoint's copy of this file registers under its own name: its functions know its own classes only.
IMPLEMENTATION = "attnconvert" if __name__.startswith("attnconvert.") else "attnconvert_" + __name__.replace(".", "_")
STARTS_KWARG = "attnconvert_starts"
MASKED_QUERY_CHUNK = 1024  # queries per softmax call when a mask is needed, so the mask is at most 1024 x T


@dataclass(frozen=True)
class SeamInputs:
    """What a core needs besides q, k, v.

    Attributes:
        start: [B, T] index of the first token of each token's document in this call (negative never; a padding token before the
            document has the document's start, greater than its own index); None = no padding and no packing.
        scaling: factor on q.k.
        aligned_to: window sizes and alignments of blocks in the plan of which every document start is known to be a multiple; those of blocks only without padding.
        sliding_window: window of the original layer in tokens, or None.
        layer: the cache layer when decoding with a cache, else None.
        causal: False = an encoder's attention: a token sees the later ones of its document too.
    """

    start: Tensor | None
    scaling: float
    aligned_to: tuple[int, ...] = ()
    sliding_window: int | None = None
    layer: CoreCacheLayer | None = None
    batch_size: int = 0
    num_tokens: int = 0
    device: torch.device | None = None
    causal: bool = True

    def valid(self) -> Tensor:
        """Which tokens are real, bool [B, T]; False for padding before the document, and in encoders for all padding."""
        if self.start is None:
            return torch.ones(self.batch_size, self.num_tokens, dtype=torch.bool, device=self.device)
        return self.start <= torch.arange(self.num_tokens, device=self.start.device)


@dataclass(frozen=True)
class Starts:
    """Document starts, computed once per forward pass and handed to every layer. Fields as in SeamInputs."""

    start: Tensor | None
    aligned_to: tuple[int, ...] = ()


def document_starts(
    attention_mask: Tensor | None, position_ids: Tensor | None, batch_size: int, num_tokens: int, *, has_past: bool, causal: bool = True
) -> Tensor | None:
    """Document starts [B, T] from a 2D mask or from packed position_ids; None when there is neither. No device sync.

    Args:
        attention_mask: [B, >= T] 1 = real; the last T columns belong to this call.
        position_ids: [B or 1, T]; a value that is not its predecessor + 1 starts a document (only without mask and past, as in
            transformers).
        causal: padding behind a document is left as a part of it, since none of its tokens sees that. Otherwise any padding token has the start T.
    """
    if attention_mask is not None:
        valid = attention_mask[:, -num_tokens:].bool()
        if not causal:
            index = torch.arange(num_tokens, device=valid.device)
            new = torch.nn.functional.pad(valid[:, 1:] & ~valid[:, :-1], (1, 0))
            return torch.where(new, index, torch.zeros_like(index)).cummax(1).values.masked_fill(~valid, num_tokens)
        pads = (valid.int().cumsum(1) == 0).sum(1, keepdim=True)
        return pads.expand(batch_size, num_tokens)
    if position_ids is None or has_past or num_tokens == 1 or position_ids.dim() != 2:
        return None
    index = torch.arange(num_tokens, device=position_ids.device)
    new = torch.nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    return torch.where(new, index, torch.zeros_like(index)).cummax(1).values.expand(batch_size, num_tokens)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scaling: float, start: Tensor | None, attention_mask: Tensor | None = None, sliding_window: int | None = None,
    softcap: float | None = None, sink_logits: Tensor | None = None, dropout: float = 0.0, causal: bool = True,
) -> Tensor:  # fmt: skip
    """Exact softmax attention with padding, documents, sliding window, logit cap and learned sink logits.

    Args:
        q: [B, H, T, D]. k, v: [B, G, S, D], S >= T; the last T keys are the queries' own tokens.
        start: [B, T] document starts relative to this call's first token; used for packing when S == T.
        attention_mask: [B, >= S] 1 = real key, its last S columns belong to the keys; None = all real (or `start` says it).
        sliding_window: keys a query sees including its own.
        causal: False = queries see later keys of their document too; not with a sliding window or a past.

    Returns:
        [B, H, T, D].
    """
    T, S = q.shape[2], k.shape[2]
    past = S - T
    plain = softcap is None and sink_logits is None
    if plain and attention_mask is None and (start is None or past) and (sliding_window is None or sliding_window >= S) and (past == 0 or T == 1):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal and T > 1, scale=scaling, dropout_p=dropout, enable_gqa=k.shape[1] != q.shape[1]
        )
    if plain and k.shape[1] != q.shape[1]:  # with a mask SDPA's fused kernels do not take grouped heads and it would fall back to T x T
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    key = torch.arange(S, device=q.device)
    pieces = []
    for at in range(0, T, MASKED_QUERY_CHUNK):
        rows = torch.arange(at, min(T, at + MASKED_QUERY_CHUNK), device=q.device)
        stop = past + int(rows.shape[0]) + at if causal else S  # later keys are in the future of the whole chunk
        cols = key[:stop]
        mask = ((cols <= rows[:, None] + past) if causal else torch.ones(len(rows), stop, dtype=torch.bool, device=q.device))[None]
        if sliding_window is not None:
            mask = mask & (cols > rows[:, None] + past - sliding_window)
        if attention_mask is not None:
            mask = mask & attention_mask[:, -S:].bool()[:, None, :stop]
        elif start is not None and past == 0:
            mask = mask & (cols >= start[:, rows, None])
            if not causal:
                mask = mask & (torch.minimum(start, key)[:, None] <= rows[:, None])
        mask = mask[:, None]
        chunk_q, chunk_k, chunk_v = q[:, :, rows], k[:, :, :stop], v[:, :, :stop]
        if plain:
            # a row without keys (padding) would be NaN: let it see itself, nobody reads it
            mask = mask | (cols == rows[:, None] + past)
            pieces.append(torch.nn.functional.scaled_dot_product_attention(chunk_q, chunk_k, chunk_v, attn_mask=mask, scale=scaling, dropout_p=dropout))
        else:
            pieces.append(_eager(chunk_q, chunk_k, chunk_v, mask, scaling, softcap, sink_logits, dropout))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None, sink_logits: Tensor | None, dropout: float) -> Tensor:
    """Softmax with a logit cap (Gemma2) or learned sinks (gpt-oss), which SDPA cannot do. mask: bool [B, 1, T, S]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sink_logits is not None:
        sinks = sink_logits.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = torch.nn.functional.dropout(logits.float().softmax(-1).to(q.dtype), dropout)[..., : k.shape[2]]
    return weights @ v


class AttentionCore(nn.Module):
    """Base of every method's attention core; the child `core` of an attention module. Parameters are fp32.

    Attributes:
        teacher: True = the layer computes the original softmax attention (no cache).
        tap: when set, the layer computes the teacher's attention y and calls `tap(core, q, k, v, inputs, y)` first.
        needs_calibration: `calibrate` sets something.
        compile_kernel: run the operator through torch.compile (training on CUDA).
        static_decode: a decode step changes the tensors of its cache layer in place, allocates none for it and never waits for the
            device, so it can be captured in a CUDA graph.
        needs_planned_length: `static_decode` holds only for a cache that was told its length.
        bidirectional: `forward` knows attention that is not causal, that of encoders.
        alignment: the kernels take packed documents as they are where all begin at multiples of this; 1 = anywhere.
        packed_alignment: set while training on packed rows, all documents of which are known to begin at multiples of it.
        changes_projections: `fit` changes what the attention module's projections compute, so that the layer is no longer the teacher's.
    """

    static_decode = False
    needs_planned_length = False
    changes_projections = False
    bidirectional = False
    alignment = 1

    def __init__(self) -> None:
        super().__init__()
        self.teacher = False
        self.tap: Callable[[AttentionCore, Tensor, Tensor, Tensor, SeamInputs, Tensor], None] | None = None
        self.compile_kernel = False
        self.needs_calibration = False
        self.packed_alignment = 1

    def fit(self, module: nn.Module) -> None:
        """Change the attention module that the core will be the child of, or get to know it, when a model is built or converted. Default: nothing to do."""

    def original(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        """The teacher's attention of whole sequences, shapes as in `forward`. Raises ValueError where the layer's projections are no longer the teacher's."""
        return softmax_attention(q, k, v, scaling=inputs.scaling, start=inputs.start, sliding_window=inputs.sliding_window, causal=inputs.causal)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        """Student attention. q [B, H, T, D], k, v [B, G, T, D] (this call's tokens only) -> [B, H, T, D]; updates `inputs.layer`."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Any]:
        """An empty state and its layout, as a cache layer keeps them: how serving engines make a pool of them, see `attnconvert.kernels.pool`.

        Args:
            batch_size: rows.
            max_length: tokens that each row has room for; tensors have the shapes of a cache that was planned for them.
            dtype: of keys and values.
            device: where the tensors are.

        Raises:
            NotImplementedError: decode steps of the core cannot use rows of a pool.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no state that could be part of a pool: its decode steps know the rows of their own batch only")

    def calibrate(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> None:
        """Sets start values that depend on data; called once per row of a few calibration rows, shapes as in `forward`. Default: nothing to set."""

    def weight_loss(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        """Cross-entropy of the student's attention weights against the teacher's, mean over heads and valid tokens; a scalar."""
        raise NotImplementedError(f"{type(self).__name__} has no attention weights to compare; use the output loss")


def attnconvert_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | StateView,
    value: Tensor | StateView,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls. query [B, H, T, D]; key, value [B, G, S, D] or the cache layer's view -> ([B, T, H, D], None)."""
    B, _, T, D = query.shape
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"converted models take a 2D attention mask [batch, tokens]; got shape {list(attention_mask.shape)}. Pass padding as a 2D mask, packed documents as position_ids."
        )
    scaling = D**-0.5 if scaling is None else scaling
    core: AttentionCore | None = getattr(module, "core", None)
    layer = key.layer if isinstance(key, StateView) else None
    starts: Starts | None = kwargs.get(STARTS_KWARG)
    has_past = layer.num_tokens > T if layer is not None else (key.shape[2] > T if isinstance(key, Tensor) else False)
    causal = bool(getattr(module, "is_causal", True))  # as transformers' own attention functions ask
    start = starts.start if starts is not None else document_starts(attention_mask, kwargs.get("position_ids"), B, T, has_past=has_past, causal=causal)
    window = kwargs.get("sliding_window")
    if not causal and window is not None:
        raise ValueError(f"{type(module).__name__} is not causal and has a sliding window of {window} tokens: windows on both sides are not computed here")
    if core is None:
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        mask = attention_mask if start is not None or has_past else None
        out = softmax_attention(
            query,
            key,
            value,
            scaling=scaling,
            start=start,
            attention_mask=mask,
            sliding_window=window,
            softcap=kwargs.get("softcap"),
            sink_logits=kwargs.get("s_aux"),
            dropout=dropout,
            causal=causal,
        )
        return out.transpose(1, 2).contiguous(), None
    if isinstance(key, StateView):
        view = key
        key, value = view.key, view.value
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    if key.shape[2] != T:
        raise ValueError("a converted layer was given a key-value cache that is not its own; pass past_key_values=None or model.build_cache()")
    inputs = SeamInputs(start, scaling, starts.aligned_to if starts is not None else (), window, layer, B, T, query.device, causal)
    if core.teacher or core.tap is not None:
        if layer is not None:
            raise ValueError("teacher mode computes whole sequences: call the model with use_cache=False")
        out = core.original(query, key, value, inputs)
        if core.tap is not None:
            core.tap(core, query, key, value, inputs, out)
    else:
        if not causal and not core.bidirectional:
            raise ValueError(f"{type(module).__name__} is not causal, its tokens see later ones, and {type(core).__name__} computes causal attention only")
        out = core(query, key, value, inputs)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def attnconvert_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function: the 2D mask as it is. Causality, windows and documents are the attention function's job."""
    return attention_mask


AttentionInterface.register(IMPLEMENTATION, attnconvert_attention)
AttentionMaskInterface.register(IMPLEMENTATION, attnconvert_mask)
