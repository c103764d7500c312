"""Data-dependent start values of the cores, from the teacher's q, k and v on a few rows, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnconvert.distill.data import epoch_indices
from attnconvert.distill.loop import ConvertedLayer, RunContext, autocast
from attnconvert.distill.losses import hidden_states

if TYPE_CHECKING:
    from attnconvert.distill.data import PackedRows


def calibrate(model: nn.Module, layers: Mapping[int, ConvertedLayer], rows: PackedRows, run: RunContext, *, num_rows: int = 16) -> None:
    """Shows every core that asks for it the teacher's q, k and v of `num_rows` rows, one row at a time; afterwards no tap is left.

    Args:
        model: the converted causal LM on `run.device`.
        layers: converted layers by index.
        rows: training rows; the first ones in the training order of `run.seed` are used.
        run: where and how.
    """
    wanting = [core for core in layers.values() if core.needs_calibration]
    if not wanting:
        return

    def tap(core: Any, q: Tensor, k: Tensor, v: Tensor, inputs: Any, y: Tensor) -> None:
        core.calibrate(q, k, v, inputs)

    before = [(core, core.tap) for core in wanting]
    batch = rows.rows(epoch_indices(rows.num_rows, run.seed, 0, min(num_rows, rows.num_rows)))
    model.eval()
    try:
        for core in wanting:
            core.tap = tap
        for i in range(batch.input_ids.shape[0]):
            with torch.no_grad(), autocast(run):
                hidden_states(model, batch.input_ids[i : i + 1].to(run.device), batch.position_ids[i : i + 1].to(run.device))
    finally:
        for core, old in before:
            core.tap = old
