"""Grouped attention in which KV heads may serve different numbers of query heads, and layers may hold different numbers of KV heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs, softmax_attention


def even_split(num_heads: int, num_groups: int) -> list[int]:
    """`num_heads` shared out over groups as evenly as possible, larger groups first."""
    small, more = divmod(num_heads, num_groups)
    return [small + (group < more) for group in range(num_groups)]


class UnevenAttention(AttentionCore):
    """Exact softmax attention of N KV heads, the n-th of which serves `query_heads[n]` query heads in order; the cache holds N heads.

    Args:
        num_heads: query heads H.
        num_key_value_heads: of the architecture; the layer has `kv_heads` of them.
        head_dim: D.
        kv_heads: N, up to H.
        query_heads: how many query heads each KV head serves, at least one; None = as evenly as possible.
        noise: in training, subtract from each row of attention weights normal noise of the row's mean and deviation, its own token excepted (PGQA).
    """

    changes_projections = True

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int, kv_heads: int, query_heads: list[int] | None = None, noise: bool = False):
        super().__init__()
        self.query_heads = even_split(num_heads, kv_heads) if query_heads is None else list(query_heads)
        self.head_dim, self.noise = head_dim, noise
        assert len(self.query_heads) == kv_heads, "one entry for each KV head"
        assert sum(self.query_heads) == num_heads, "every query head reads one KV head"
        assert min(self.query_heads) >= 1, "every KV head is read"

    def fit(self, module: nn.Module) -> None:
        """Give the attention module projections to N KV heads, unless it has them."""
        groups, heads = len(self.query_heads), sum(self.query_heads)
        sizes = {"k_proj": groups, "v_proj": groups, "qkv_proj": heads + 2 * groups}
        for name, old in [(name, child) for name, child in module.named_children() if name in sizes]:
            assert isinstance(old, nn.Linear), "the projections of keys and values are linear"
            width = sizes[name] * self.head_dim
            if old.out_features != width:  # the parameters stay the same objects: an optimizer or a record of them may hold on to them
                old.out_features = width
                old.weight.data = old.weight.data.new_empty(width, old.in_features)
                if old.bias is not None:
                    old.bias.data = old.bias.data.new_empty(width)
                old.reset_parameters()
        if isinstance(getattr(module, "num_key_value_heads", None), int):
            module.num_key_value_heads = groups  # type: ignore[assignment]

    def original(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        raise ValueError("the projections of this layer were changed, so it cannot compute what the original layer did")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        mask = None
        if inputs.layer is not None:
            state, valid = inputs.layer.state, inputs.valid()
            if state:
                k, v, valid = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2), torch.cat([state["valid"], valid], 1)
                mask = valid  # a padded or packed prefill knows its documents from `start`; later calls continue the last one
            inputs.layer.state = {"k": k, "v": v, "valid": valid}
        elif self.noise and self.training:
            index = torch.tensor(self.query_heads, device=q.device)
            return _noisy_attention(q, k.repeat_interleave(index, 1), v.repeat_interleave(index, 1), inputs)
        # Heads that serve as many queries are one ordinary grouped attention.
        parts: dict[int, list[Tensor]] = {}
        queries = q.split(self.query_heads, 1)
        for count in sorted(set(self.query_heads)):
            chosen = [n for n, served in enumerate(self.query_heads) if served == count]
            every = len(chosen) == len(self.query_heads)
            some_q, some_k, some_v = (
                (q, k, v) if every else (torch.cat([queries[n] for n in chosen], 1), *(torch.cat([x[:, n : n + 1] for n in chosen], 1) for x in (k, v)))
            )
            out = softmax_attention(
                some_q, some_k, some_v, scaling=inputs.scaling, start=inputs.start, attention_mask=mask, sliding_window=inputs.sliding_window
            )
            if every:
                return out
            parts[count] = list(out.split(count, 1))
        return torch.cat([parts[count].pop(0) for count in self.query_heads], 1)


def _noisy_attention(q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
    """Attention of whole sequences with weights w - n, n normal with the mean and deviation of the row of w, zero for a token's own key. q, k, v: [B, H, T, D]."""
    T = q.shape[2]
    at = torch.arange(T, device=q.device)
    seen = (at <= at[:, None])[None]
    if inputs.sliding_window is not None:
        seen = seen & (at > at[:, None] - inputs.sliding_window)
    if inputs.start is not None:
        seen = seen & (at >= inputs.start[:, :, None])
    own = torch.eye(T, dtype=torch.bool, device=q.device)
    seen = (seen | own)[:, None]
    logits = (q @ k.transpose(-1, -2)).float() * inputs.scaling
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    count = seen.sum(-1, keepdim=True)
    mean = weights.sum(-1, keepdim=True) / count
    deviation = (((weights - mean) * seen).square().sum(-1, keepdim=True) / count).sqrt()
    noise = (mean + deviation * torch.randn_like(weights)).detach() * (seen & ~own)
    return (weights - noise).to(v.dtype) @ v
