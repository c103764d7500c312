"""Attention transfer: every converted layer sees the teacher's hidden state and learns the teacher's attention.

One forward pass of the teacher per micro-batch. In each converted layer a tap computes the student's own output (of the core, or of the attention
module where its projections are what changed), the layer-local loss and its gradient at once, so the graph of one layer exists at a time; the layer
then passes the teacher's output on. Layers never meet in a gradient: this is L independent regressions that share a forward pass.

The loss of a layer on a batch (config.loss, config.relative; sums over the valid tokens of the *whole* batch):
    output, relative   sum |y_student - y_teacher|^2 / sum |y_teacher|^2
    output, raw        1000 / L * mean (y_student - y_teacher)^2          (LoLCATs, https://arxiv.org/abs/2410.10254)
    weights            cross-entropy of the attention weights, nats per query (Hedgehog, https://arxiv.org/abs/2402.04347)
The denominators are known only after the last micro-batch. The gradient is linear in them, so each micro-batch adds the gradient of its sum and
the step divides at the end: micro_batch_size changes nothing but rounding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnconvert.distill.loop import ConvertedLayer, ParamGroup, RunContext, StageResult, autocast, skip_stage, train
from attnconvert.distill.losses import attention_output_error, hidden_states

if TYPE_CHECKING:
    from attnconvert.distill.config import TransferConfig
    from attnconvert.distill.data import PackedRows

_log = logging.getLogger(__name__)


@dataclass
class _Layer:
    """One trained layer and what the micro-batches of the current step have added up (0-d tensors on the device)."""

    core: ConvertedLayer
    params: dict[str, nn.Parameter]
    loss: Tensor | float = 0.0
    normaliser: Tensor | float = 0.0
    error: Tensor | float = 0.0
    power: Tensor | float = 0.0
    scale: float = 1.0


@dataclass
class _Tap:
    """What all taps share: how the core is called (compiled or not), and over how many tokens a batch is spread."""

    config: TransferConfig
    run: RunContext
    forward: Callable[..., Tensor]
    num_micro_batches: int


def run_transfer(model: nn.Module, cores: Mapping[int, ConvertedLayer], rows: PackedRows, config: TransferConfig, run: RunContext) -> StageResult:
    """Trains the cores on the teacher's attention; afterwards only their parameters differ and no tap is left.

    A core without parameters cannot learn: its layer computes the teacher's softmax during the stage and reports no error. When no core has any,
    or `config.steps` is 0, the stage is skipped. The output projection to the vocabulary is never run.

    Args:
        model: the converted causal LM on `run.device`, weights in any floating dtype.
        cores: layer index -> the core (or regrouped module) of that layer, parameters in fp32.
        rows: training rows of `config.length` tokens.
        config: the recipe's `stages.transfer`.
        run: where and how.

    Raises:
        AttnConvertError: see `loop.train`.
    """
    trained = {idx: _Layer(core, params) for idx, core in sorted(cores.items()) if (params := dict(core.named_parameters()))}
    if config.steps == 0:
        return skip_stage("transfer", "stages.transfer.tokens is 0", run)
    if not trained:
        return skip_stage("transfer", "no converted layer has parameters to train", run)
    assert rows.length == config.length, f"rows of {rows.length} tokens for a stage of length {config.length}"

    model.eval()
    model.requires_grad_(False)
    for layer in trained.values():
        for p in layer.params.values():
            p.requires_grad_(True)
    micro = config.micro_batch_size or config.batch_size
    shared = _Tap(config, run, _core_forward(run), config.batch_size // micro)

    def compute(step: int) -> dict[str, Tensor]:
        batch = rows.batch(run.seed, step, config.batch_size * config.length)
        for layer in trained.values():
            layer.loss = layer.normaliser = layer.error = layer.power = 0.0
        for start in range(0, config.batch_size, micro):
            part = slice(start, start + micro)
            with torch.no_grad(), autocast(run):
                hidden_states(model, batch.input_ids[part].to(run.device, non_blocking=True), batch.position_ids[part].to(run.device, non_blocking=True))
        return _finish_step(list(trained.values()), config)

    teachers = [core for idx, core in cores.items() if idx not in trained]
    before = [(core, core.teacher, core.tap) for core in cores.values()]
    try:
        for core in teachers:
            core.teacher = True
        for layer in trained.values():
            layer.core.teacher = False
            layer.core.tap = functools.partial(_tap, layer, shared)
        params = {f"{idx}.{name}": p for idx, layer in trained.items() for name, p in layer.params.items()}
        return train("transfer", [ParamGroup(params, config.lr, config.weight_decay)], compute, layers=list(trained), config=config, rows=rows, run=run)
    finally:
        for core, teacher, tap in before:
            core.teacher, core.tap = teacher, tap


def _call_core(core: ConvertedLayer, *inputs: Any) -> Tensor:
    out: Tensor = core(*inputs)
    return out


def _core_forward(run: RunContext) -> Callable[..., Tensor]:
    if not run.compile:
        return _call_core
    if run.device.type != "cuda":
        _log.warning("compile was asked for, but the device is %s: the cores run uncompiled", run.device.type)
        return _call_core
    # One compiled function for all layers, not one per module: equal layers share the graph.
    return torch.compile(_call_core, dynamic=False)


def _tap(layer: _Layer, shared: _Tap, core: ConvertedLayer, *inputs: Any) -> None:
    """Adds this micro-batch's gradient to the layer's parameters. The last of `inputs` is the teacher's output y, [B, H, T, D] or [B, 1, T, E]."""
    *given, y = (x.detach() if isinstance(x, Tensor) else x for x in inputs)
    try:
        _local_backward(layer, shared, core, given, y)
    except Exception as error:
        if shared.forward is _call_core or not _is_compile_error(error):
            raise
        _log.warning("the cores run uncompiled from here on, because compiling failed: %s", error)
        shared.forward = _call_core
        _local_backward(layer, shared, core, given, y)


def _local_backward(layer: _Layer, shared: _Tap, core: Any, inputs: Sequence[Any], y: Tensor) -> None:
    valid: Tensor = inputs[-1].valid()
    num_valid = valid.sum()
    with torch.enable_grad():
        if shared.config.loss == "weights":
            loss = core.weight_loss(*inputs) * num_valid
            size = valid.numel()
        else:
            loss, power = attention_output_error(shared.forward(core, *inputs), y, valid)
            error, size = loss.detach(), y.numel()
        # Any constant of the order of the final normaliser keeps the accumulated gradient near 1; _finish_step takes it out again.
        layer.scale = float(size * shared.num_micro_batches)
        with torch.autocast(shared.run.device.type, enabled=False):
            (loss / layer.scale).backward()
    if shared.config.loss == "weights":  # the output error is what layers, losses and methods are compared by
        with torch.no_grad():
            error, power = attention_output_error(shared.forward(core, *inputs), y, valid)
        normaliser = num_valid
    elif shared.config.relative:
        normaliser = power
    else:
        normaliser = num_valid * (y.shape[1] * y.shape[3])
    layer.loss = layer.loss + loss.detach()
    layer.normaliser = layer.normaliser + normaliser
    layer.error = layer.error + error
    layer.power = layer.power + power


def _finish_step(layers: list[_Layer], config: TransferConfig) -> dict[str, Tensor]:
    """Turns the accumulated sums and gradients into those of the batch loss, clips per layer, and returns the step's metrics."""
    assert all(isinstance(layer.loss, Tensor) for layer in layers), "a converted layer did not call its tap"
    raw = config.loss == "output" and not config.relative
    weight = 1000.0 / len(layers) if raw else 1.0
    normalisers = torch.stack([torch.as_tensor(layer.normaliser) for layer in layers]).clamp_min(1e-30)
    losses = weight * torch.stack([torch.as_tensor(layer.loss) for layer in layers]) / normalisers
    norms = []
    for i, layer in enumerate(layers):
        params = [p for p in layer.params.values() if p.grad is not None]
        for p in params:
            assert p.grad is not None
            p.grad.mul_(weight * layer.scale / normalisers[i])
        norms.append(torch.nn.utils.clip_grad_norm_(params, config.grad_clip or float("inf")))
    errors = torch.stack([torch.as_tensor(layer.error) for layer in layers]) / torch.stack([torch.as_tensor(layer.power) for layer in layers]).clamp_min(1e-30)
    return {"loss": losses.sum() if raw else losses.mean(), "grad_norm": torch.stack(norms).square().sum().sqrt(), "layer_errors": errors}


def _is_compile_error(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # imports the compiler, so only once it has been used

    return isinstance(error, TorchDynamoException)
