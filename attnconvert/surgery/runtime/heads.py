"""MoH core: softmax attention in which each token uses some of the heads, chosen by a router."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnconvert.kernels.heads.api import routed_attention
from attnconvert.kernels.heads.projection import SkippingLinear
from attnconvert.kernels.heads.routing import route_queries, route_scores, unit_norms
from attnconvert.kernels.heads.units import Unit, annealed, num_units, unit_counts
from attnconvert.kernels.span.decode import fill, span_attention_extend, span_attention_step, span_layout
from attnconvert.kernels.span.reference import BETA_ONE
from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs
from attnconvert.surgery.runtime.spans import keep, with_room

_OUTPUT = ("o_proj", "dense", "out_proj")  # what families call the projection of the heads' outputs, where it is linear
_QUERY_NORM = re.compile(r"(q|query)_(layer_?)?norm|norm_query")  # what families call it


class MixtureOfHeads(AttentionCore):
    """See `attnconvert.kernels.heads.reference` for the attention, `attnconvert.kernels.span.decode` for the cache, which has every head's keys.

    A routed unit's score is a softmax over the routed units of a token, of
    - router `output_norm`: routed_map x + routed_bias, x being the layer's input: the log of the norm of what the unit adds to the layer's output, as
      `estimate_norms` was told to estimate it;
    - router `norm`: the L2 norms of their queries before rotary embedding (which keeps norms) and before a norm of the queries, divided by the norms' deviation;
    - router `learned`: routed_map x; shared units have scores softmax(shared_map x), and both are multiplied by the two numbers
      softmax(kind_map x). The maps start such that scores hardly differ: kind_map and shared_map zero, routed_map quasi-random and small.

    The highest routed scores are used, of equal ones the first. With gates `hard` a used unit has the factor 1, whose gradient goes to its score; shared
    units of the routers without maps for them are just used. With gates `soft` it has its score, scaled so that a layer's outputs keep their size: routed scores are made
    to add up to their number, shared ones are multiplied by theirs, and the two numbers by 2. Unused units are not computed, so their gates have no gradient.

    Args:
        num_heads: query heads H.
        num_key_value_heads: G.
        head_dim: D.
        unit: what a router chooses: KV heads with their query heads, or single query heads.
        active: share of the units that a token uses, shared ones included.
        shared: share of the units that all tokens use.
        shared_units: which; None = the first.
        router, gates: see above.
        anneal: share of finetuning over which the used units go from all to `active`.

    Attributes:
        num_active: units that a token uses, shared ones included; changed by `set_progress`.
        balanced: each forward pass computes a balance loss (see `_balance`) and hands it to `on_balance`, where that is set.
        usage: when set, int64 [U + 1]: how many tokens used each unit, and how many there were, padding left out.
    """

    static_decode = True
    needs_planned_length = True
    bidirectional = True

    def __init__(
        self, num_heads: int, num_key_value_heads: int, head_dim: int, unit: Unit, active: float, shared: float, shared_units: Sequence[int] | None,
        router: Literal["output_norm", "norm", "learned"], gates: Literal["hard", "soft"], anneal: float,
    ):  # fmt: skip
        super().__init__()
        self.num_key_value_heads, self.router, self.gates, self.anneal = num_key_value_heads, router, gates, anneal
        self.num_units = num_units(unit, num_heads, num_key_value_heads)
        self.target, num_shared = unit_counts(self.num_units, active, shared)
        self.num_active = self.target
        self.set_shared(range(num_shared) if shared_units is None else shared_units)
        self.balanced = False
        self.on_balance: Callable[[Tensor], None] | None = None
        self.usage: Tensor | None = None
        self._seen: Tensor | None = None  # what the router looks at, from a hook to `forward`

    def set_shared(self, units: Sequence[int]) -> None:
        """Choose the units that all tokens use.

        Raises:
            ValueError: not as many different units of the layer as there have to be.
        """
        if len(set(units)) != len(units) or not set(units) <= set(range(self.num_units)) or len(units) >= self.target:
            raise ValueError(f"shared units {list(units)}: some of 0 to {self.num_units - 1}, each once, fewer than the {self.target} that are used")
        self.shared = tuple(sorted(units))
        self.routed = tuple(unit for unit in range(self.num_units) if unit not in self.shared)
        self._tensors: tuple[Tensor, Tensor] | None = None

    def set_progress(self, progress: float) -> None:
        """Use the number of units that belongs to a share of finetuning."""
        self.num_active = annealed(self.num_units, self.target, progress / self.anneal if self.anneal else 1.0)

    def fit(self, module: nn.Module) -> None:
        """Listen to what the router looks at; maps of its input get their size from the attention module. The output projection learns to skip zeros.

        Raises:
            ValueError: queries and keys have one norm together, and the router is `norm`.
        """
        for name, child in module.named_children():
            if name in _OUTPUT and type(child) is nn.Linear and self.target < self.num_units:
                child.__class__ = SkippingLinear  # the same object: hooks, and who knows it, stay
        if self.router != "norm":
            owner: Any = module
            width, factor = int(owner.config.hidden_size), (5**0.5 - 1) / 2
            if self.router == "output_norm":
                self.routed_bias = nn.Parameter(torch.zeros(len(self.routed), dtype=torch.float32))
            elif self.shared:
                self.kind_map = nn.Parameter(torch.zeros(2, width, dtype=torch.float32))
                self.shared_map = nn.Parameter(torch.zeros(len(self.shared), width, dtype=torch.float32))
            # The fractional parts of i j golden ratios: spread like random numbers, and the same wherever they are made.
            at = torch.outer(torch.arange(1, len(self.routed) + 1, dtype=torch.float64), torch.arange(1, width + 1, dtype=torch.float64))
            self.routed_map = nn.Parameter(((at * factor % 1 - 0.5) * 1e-3).float())
            module.register_forward_pre_hook(self._take_input, with_kwargs=True)
            return
        names = [name for name, _ in module.named_children()]
        if any(name.startswith("qk_") and "norm" in name for name in names):
            raise ValueError(
                "this model has one norm for queries and keys, and the router `norm` cannot see the queries before it; use the router `output_norm`"
            )
        for name in names:
            if _QUERY_NORM.fullmatch(name):
                module.get_submodule(name).register_forward_pre_hook(self._take_queries)

    def estimate_norms(self, weight: Tensor, bias: Tensor) -> None:
        """Start the router `output_norm` with linear maps of the layer's input, for all units. weight: [U, E], bias: [U], any device and floating dtype."""
        routed = list(self.routed)
        with torch.no_grad():
            self.routed_map.copy_(weight[routed])
            self.routed_bias.copy_(bias[routed])

    # Methods, not closures: a copy of the model then listens with the copy of the core.
    def _take_input(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self.teacher:
            self._seen = options["hidden_states"] if "hidden_states" in options else args[0]

    def _take_queries(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.teacher:
            self._seen = args[0]

    def _queries(self, q: Tensor) -> Tensor:
        """The queries that the router `norm` looks at, [B, T, H, D]. q: [B, H, T, D], what the seam got."""
        (B, H, T, D), seen = q.shape, self._seen
        if seen is None:
            return q.transpose(1, 2)
        # [B, T, H D], [B, T, H, D] or [B, H, T, D]; where T = H, what is not contiguous was transposed
        heads_first = seen.dim() == 4 and seen.shape[1] == H and (T != H or seen.stride(1) < seen.stride(2))
        return seen.transpose(1, 2) if heads_first else seen.reshape(B, T, H, D)

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The routed units int64 [E], and where each unit is among the routed ones [U], negative for shared ones. Not buffers: a loader leaves those uninitialised."""
        if self._tensors is None or self._tensors[0].device != device:
            with torch.inference_mode(False):  # what is made in inference mode cannot be used in training later
                order = torch.tensor([*self.shared, *self.routed], device=device)
                self._tensors = order[len(self.shared) :], order.argsort() - len(self.shared)
        return self._tensors

    def _route(self, q: Tensor, inputs: SeamInputs) -> tuple[Tensor, Tensor | None]:
        """Which units each token uses, bool [B, T, U], and their factors [B, T, U], None for 1."""
        num_shared, num_routed = len(self.shared), self.num_active - len(self.shared)
        units, columns = self._index(q.device)
        with torch.autocast(q.device.type, enabled=False):
            if self.router == "norm":
                seen = self._queries(q)
                learns = torch.is_grad_enabled() and seen.requires_grad
            else:
                assert self._seen is not None, "the attention module's input is seen before its queries"
                x = self._seen.to(self.routed_map.dtype)
                rank = nn.functional.linear(x, self.routed_map, self.routed_bias if self.router == "output_norm" else None)
                learns = torch.is_grad_enabled() and rank.requires_grad
            if self.tap is None:  # under a tap the core may be called again on the same inputs
                self._seen = None
            only_choose = self.gates == "hard" and not learns and not self.balanced
            if self.router == "norm" and only_choose:
                active = route_queries(seen, columns, num_routed)
            else:
                if self.router == "norm":
                    rank = unit_norms(seen, self.num_units)[..., units]
                active = route_scores(rank, columns, num_routed)
            if self.usage is not None:
                self._count(active, inputs)
            if only_choose:
                return active, None
            routed, logits = active[..., units], rank
            if self.router == "norm":
                spread = (rank - rank.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(1, rank.shape[-1] - 1)
                logits = rank / (spread + 1e-12).sqrt()
            scores = logits.softmax(-1)
            if self.balanced:
                self._report_balance(scores, routed, inputs)
            factors, shared = scores, torch.ones_like(scores[..., :1]).expand(-1, -1, num_shared)
            weighed = self.router == "learned" and num_shared > 0
            if weighed:
                kinds = nn.functional.linear(x, self.kind_map).softmax(-1)
                shared, factors = kinds[..., :1] * nn.functional.linear(x, self.shared_map).softmax(-1), kinds[..., 1:] * factors
            if self.gates == "hard":
                shared, factors = (1 + (part - part.detach()) for part in (shared, factors))
            else:
                factors = factors * ((2 if weighed else 1) * num_routed) / (scores * routed).sum(-1, keepdim=True)
                shared = shared * (2 * num_shared) if weighed else shared
            return active, torch.cat([shared, factors], -1)[..., columns + num_shared]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _report_balance(self, scores: Tensor, routed: Tensor, inputs: SeamInputs) -> None:
        """Hands out the balance loss: for each row E sum_i P_i f_i over the routed units, P the mean of the score and f the unit's share of all choices; mean over rows.

        1 when all units are chosen alike. By rows, so that it does not depend on how a batch is cut into forward passes. Not left to the compiler: when
        activations are recomputed in a backward pass, the same is computed again, and nobody wants it.
        """
        weight = inputs.valid()[..., None].to(scores.dtype)
        mean = (scores * weight).sum(1) / weight.sum(1)
        share = (routed * weight).sum(1)
        found = scores.shape[-1] * (mean * share / share.sum(-1, keepdim=True)).sum(-1).mean()
        if self.on_balance is not None:
            self.on_balance(found)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, active: Tensor, inputs: SeamInputs) -> None:
        assert self.usage is not None
        valid = inputs.valid()
        self.usage += torch.cat([(active & valid[..., None]).sum((0, 1)), valid.sum()[None]])

    def unit_factors(self, q: Tensor) -> Tensor:
        """The factors of units, 0 for those that a token does not use, for an engine that computes them all: [T, U]. q: [T, H, D], its tokens in one row."""
        if self._seen is not None:
            self._seen = self._seen[None]
        active, gate = self._route(q.transpose(0, 1)[None], SeamInputs(None, 1.0, batch_size=1, num_tokens=q.shape[0], device=q.device))
        return (active if gate is None else active * gate)[0].to(q.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        assert inputs.sliding_window is None, "refused when the plan is made"
        layer, scale, start = inputs.layer, inputs.scaling, inputs.start
        active, gate = self._route(q, inputs)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if layer is None or not layer.state:
            out = routed_attention(q, k, v, active, gate, scale=scale, start=start, causal=inputs.causal)
            if layer is not None:
                G = self.num_key_value_heads
                capacity = max(layer.num_tokens, layer.planned_length or 0)
                layout = span_layout((0,) * G, (BETA_ONE,) * G, (1,) * G, 0, capacity, q.device)  # every head sees everything
                keep(layer, fill(k, v, layout, start)._asdict(), layout)
            return out.transpose(1, 2)
        state, layout = with_room(layer)
        if q.shape[1] == 1 and not torch.is_grad_enabled():
            out = span_attention_step(q, k, v, state, layout, scale=scale, start=start, active=active, gate=gate)
        else:
            out, state = span_attention_extend(q, k, v, state, layout, scale=scale, start=start, active=active, gate=gate)
            layer.state = state._asdict()
        return out.transpose(1, 2)
