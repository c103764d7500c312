"""Hedgehog core: exact softmax over a window and attention sinks, linear attention over the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnconvert.kernels.linear.api import linear_attention
from attnconvert.kernels.linear.decode import linear_attention_step
from attnconvert.kernels.linear.reference import LinearState, attention_weight_loss, branch_log_ratio, empty_state
from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs


class HedgehogAttention(AttentionCore):
    """See `attnconvert.kernels.linear.reference` for the maths.

    Parameters: query_map [H, D, F/2] and key_map [G or H, D, F/2], identity at the start (phi then follows the pretrained q and k);
    linear_log_weight [H, 1], the log weight of the linear branch against the softmax branch (LoLCATs' -log gamma);
    with gates query_gate [H, D + 1] and key_gate [G or H, D + 1], a direction u (zero at the start) and a power a (gate_power at the start).
    """

    static_decode = True

    def __init__(
        self, num_heads: int, num_key_value_heads: int, head_dim: int, window: dict[str, Any], sinks: int, linear: bool, feature_dim: int | None, key_map: str, reference: str, gates: bool, gate_power: float,
        softmax_weight: float | None,
    ):  # fmt: skip
        super().__init__()
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.window_size, self.window_kind, self.num_sinks = int(window["size"]), str(window["kind"]), sinks
        self.needs_calibration = linear and softmax_weight is None
        self._log_ratio: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)  # sums of `branch_log_ratio` so far
        self.linear, self.linear_enabled, self.gates, self.reference = linear, True, gates, reference
        if linear:
            key_heads = num_heads if key_map == "per_query_head" else num_key_value_heads
            eye = torch.eye(head_dim, feature_dim or head_dim, dtype=torch.float32)
            self.query_map = nn.Parameter(eye.repeat(num_heads, 1, 1))
            self.key_map = nn.Parameter(eye.repeat(key_heads, 1, 1))
            self.linear_log_weight = nn.Parameter(torch.full((num_heads, 1), -math.log(softmax_weight or 0.1), dtype=torch.float32))
            if gates:
                gate = torch.zeros(1, head_dim + 1, dtype=torch.float32)
                gate[:, -1] = gate_power
                self.query_gate = nn.Parameter(gate.repeat(num_heads, 1))
                self.key_gate = nn.Parameter(gate.repeat(key_heads, 1))

    def _options(self, scaling: float) -> dict[str, Any]:
        on = self.linear and self.linear_enabled
        return {
            "window_size": self.window_size, "window_kind": self.window_kind, "num_sinks": self.num_sinks, "scale": scaling,
            "query_map": self.query_map if on else None, "key_map": self.key_map if on else None,
            "linear_log_weight": self.linear_log_weight if on else torch.zeros(1, 1), "reference": self.reference,
            "query_gate": self.query_gate if on and self.gates else None, "key_gate": self.key_gate if on and self.gates else None,
        }  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        layer = inputs.layer
        state = LinearState(**layer.state) if layer is not None and layer.state else None
        if state is not None and q.shape[2] == 1 and not torch.is_grad_enabled():
            assert layer is not None
            options = self._options(inputs.scaling)
            step = linear_attention_step(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), state, **options, start=inputs.start, slots=layer.slots)
            return step.transpose(1, 2)
        if layer is not None:
            layer.refuse_slots("several tokens at once, or gradients,")
        out, final = linear_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            **self._options(inputs.scaling),
            start=inputs.start,
            aligned=self.window_size in inputs.aligned_to,
            initial_state=state,
            output_final_state=layer is not None,
            compile_reference=self.compile_kernel,
        )
        if layer is not None:
            assert final is not None
            layer.state = final._asdict()
        return out.transpose(1, 2)

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Any]:
        options = self._options(1.0)
        keys = torch.empty(batch_size, 0, self.num_key_value_heads, self.head_dim, dtype=dtype, device=device)
        state_heads, half_features = (self.num_key_value_heads, 0) if options["key_map"] is None else options["key_map"].shape[::2]
        state = empty_state(
            keys, keys, num_sinks=self.num_sinks, window_size=self.window_size, kind=self.window_kind, num_features=2 * half_features, state_heads=state_heads
        )
        return state._asdict(), None

    def calibrate(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> None:
        """linear_log_weight = the one at which both branches weigh as in the teacher. Pretrained heads differ by e^10 in it, and one learned from a common start is far off for long."""
        if not self.needs_calibration:
            return
        options = self._options(inputs.scaling)
        del options["linear_log_weight"]
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            found = branch_log_ratio(q.transpose(1, 2), k.transpose(1, 2), **options, start=inputs.start)
            ratio, weight = (old + new for old, new in zip(self._log_ratio, found, strict=True))
            self._log_ratio = ratio, weight
            known = (weight > 0)[:, None]
            self.linear_log_weight.copy_(torch.where(known, (ratio / weight)[:, None], self.linear_log_weight))

    def weight_loss(self, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs) -> Tensor:
        return attention_weight_loss(q.transpose(1, 2), k.transpose(1, 2), **self._options(inputs.scaling), start=inputs.start)
