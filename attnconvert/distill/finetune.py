"""LoRA finetuning of the whole converted model against the teacher's logits (forward KL) and the text (cross-entropy).

The teacher is the same set of weights with the adapters off and every converted layer in teacher mode, so no second model is held. On an unconverted
model (no converted layers) the same code gives the baseline: the softmax model finetuned on the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from attnconvert.distill.data import IGNORE_INDEX, MixedRows
from attnconvert.distill.loop import (
    ConvertedLayer,
    ParamGroup,
    RunContext,
    StageResult,
    autocast,
    skip_stage,
    train,
)
from attnconvert.distill.lora import adapters_off, lora_layers
from attnconvert.distill.losses import distillation_loss, hidden_states, logit_head

if TYPE_CHECKING:
    import peft

    from attnconvert.distill.config import FinetuneConfig
    from attnconvert.distill.data import PackedRows

_log = logging.getLogger(__name__)

_CHUNK_ELEMENTS = 2**26
"""Logits held at once: 256 MiB per fp32 tensor, of which the loss needs about four."""


@runtime_checkable
class AlignedLayer(Protocol):
    """A converted layer that is faster where packed documents are aligned.

    Attributes:
        alignment: of what number it wants the starts to be multiples; 1 = of none.
        packed_alignment: the starts of all documents in packed rows are known to be multiples of this.
    """

    alignment: int
    packed_alignment: int


@runtime_checkable
class RoutedLayer(Protocol):
    """A converted layer with a router.

    Attributes:
        balanced: each forward pass computes a balance loss: mean over rows, 1 = all choices are alike.
        on_balance: gets it, with its graph; None = nobody does.
    """

    balanced: bool
    on_balance: Callable[[Tensor], None] | None

    def set_progress(self, progress: float) -> None:
        """Use as many units as belong to a share of finetuning, 1 at its end."""


def run_finetune(
    model: peft.PeftModel, cores: Mapping[int, ConvertedLayer], rows: PackedRows | MixedRows, config: FinetuneConfig, run: RunContext
) -> StageResult:
    """Trains the adapters, and what is new in the converted layers when `config.train_cores`; other weights never change.

    KL is averaged over all tokens of a batch, cross-entropy over those with a next token in their document; both by the counts of the whole batch, so
    `micro_batch_size` changes nothing but rounding. Dropout is that of the adapters only; the model itself stays in eval mode. The balance losses of layers with
    a router are added up over the layers; how many units they use follows from the step.

    Args:
        model: the result of `lora.add_lora`, on `run.device`.
        cores: layer index -> the core (or regrouped module) of that layer, parameters in fp32; empty for an unconverted model.
        rows: training rows of `config.length` tokens, or of `config.lengths`.
        config: the recipe's `stages.finetune`.
        run: where and how.

    Raises:
        AttnConvertError: `unknown-logit-head`, `no-lm-head`, and see `loop.train`.
    """
    if config.steps == 0:
        return skip_stage("finetune", "stages.finetune.tokens is 0", run)
    assert rows.length == config.length, f"rows of {rows.length} tokens for a stage of length {config.length}"
    base = model.get_base_model()

    base.eval()
    base.requires_grad_(False)
    # Inside an attention module, but named apart: cores are saved and given their own learning rate by layer index.
    core_params = {f"core.{idx}.{name}": p for idx, core in sorted(cores.items()) for name, p in core.named_parameters()} if config.train_cores else {}
    adapter_params: dict[str, nn.Parameter] = {}
    for path, layer in lora_layers(model).items():
        cast(nn.Module, layer.lora_dropout).train()
        adapter_params |= {f"{path}.{name}": p for name, p in cast(nn.Module, layer).named_parameters() if name.startswith("lora_")}
    groups = [ParamGroup(adapter_params, config.lr, config.weight_decay)]
    if core_params:
        # No decay: it would pull feature maps that start at the identity towards zero.
        groups.append(ParamGroup(core_params, config.core_lr or config.lr, 0.0))
    trained = [p for group in groups for p in group.params.values()]
    for p in trained:
        p.requires_grad_(True)

    with autocast(run):
        some = rows.parts[0] if isinstance(rows, MixedRows) else rows
        head = logit_head(base, some.input_ids[:1, :16].to(run.device, torch.int64))
    vocab_size = cast(Any, base).get_output_embeddings().weight.shape[0]
    chunk_size = max(16, _CHUNK_ELEMENTS // vocab_size)
    micro = config.micro_batch_size or config.batch_size
    routed = [core for core in cores.values() if isinstance(core, RoutedLayer)]
    balanced = routed if config.balance else []

    def listen(found: list[Tensor] | None) -> None:
        # Nobody listens in a backward pass, where checkpointed layers are computed again: what they would hand out holds on to all that was recomputed.
        for core in balanced:
            core.on_balance = None if found is None else found.append

    def compute(step: int) -> dict[str, Tensor]:
        for core in routed:
            core.set_progress((step + 1) / config.steps)
        batch = rows.batch(run.seed, step, config.batch_size * config.length)
        num_rows, length = batch.input_ids.shape
        rows_per_pass = micro * (config.length // length)
        targets = batch.targets()
        # Counted on the CPU: no wait for the device.
        num_tokens, num_targets = targets.numel(), int((targets != IGNORE_INDEX).sum())
        kl_sum, ce_sum, balance = (torch.zeros((), device=run.device) for _ in range(3))
        for start in range(0, num_rows, rows_per_pass):
            part = slice(start, start + rows_per_pass)
            input_ids = batch.input_ids[part].to(run.device, non_blocking=True)
            position_ids = batch.position_ids[part].to(run.device, non_blocking=True)
            teacher_hidden = None
            if config.kl > 0:
                with _as_teacher(model, cores), torch.no_grad(), autocast(run):
                    teacher_hidden = hidden_states(base, input_ids, position_ids)
            losses: list[Tensor] = []
            with autocast(run):
                listen(losses)
                student_hidden = hidden_states(base, input_ids, position_ids)
                listen(None)
                part_targets = targets[part].to(run.device, non_blocking=True)
                loss = distillation_loss(
                    student_hidden,
                    teacher_hidden,
                    head,
                    part_targets,
                    torch.ones_like(part_targets, dtype=torch.bool),  # packed rows have no padding
                    config.kl / num_tokens,
                    config.ce / max(1, num_targets),
                    chunk_size,
                )
            total = loss.loss
            if losses:
                assert len(losses) == len(balanced), "each layer with a router hands out one balance loss in a forward pass"
                part_balance = torch.stack(losses).sum() * (input_ids.shape[0] / num_rows)
                total, balance = total + config.balance * part_balance, balance + part_balance.detach()
            total.backward()  # type: ignore[no-untyped-call]
            kl_sum, ce_sum = kl_sum + loss.kl_sum, ce_sum + loss.ce_sum
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or float("inf"))
        kl, ce = kl_sum / num_tokens, ce_sum / max(1, num_targets)
        metrics = {"loss": config.kl * kl + config.ce * ce + config.balance * balance, "grad_norm": norm, "ce": ce}
        return metrics | ({"kl": kl} if config.kl > 0 else {}) | ({"balance": balance / len(balanced)} if balanced else {})

    try:
        for core in balanced:
            core.balanced = True
        with _told_alignment(cores, rows), _gradient_checkpointing(base, run.gradient_checkpointing), _compiled_layers(base, run):
            return train("finetune", groups, compute, layers=[], config=config, rows=rows, run=run)
    finally:
        listen(None)
        for core in routed:
            core.balanced = False
            core.set_progress(1.0)
        base.eval()  # the adapters' dropout too: whoever evaluates next must not have to know about it


@contextmanager
def _as_teacher(model: peft.PeftModel, cores: Mapping[int, ConvertedLayer]) -> Iterator[None]:
    before = [(core, core.teacher) for core in cores.values()]
    try:
        for core, _ in before:
            core.teacher = True
        with adapters_off(model):
            yield
    finally:
        for core, teacher in before:
            core.teacher = teacher


@contextmanager
def _told_alignment(cores: Mapping[int, ConvertedLayer], rows: PackedRows | MixedRows) -> Iterator[None]:
    """Inside, layers whose kernels take packed documents that begin at certain multiples know of which ones these do; else each would look on the device, and wait."""
    layers = [core for core in cores.values() if isinstance(core, AlignedLayer) and core.alignment > 1]
    alignment = rows.alignment if layers else 1
    for core in layers:
        core.packed_alignment = alignment
    try:
        yield
    finally:
        for core in layers:
            core.packed_alignment = 1


@contextmanager
def _gradient_checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, decoder layers recompute their activations in the backward pass.

    transformers does so only for modules in training mode. The flag is set on those modules alone, not below them, so that the model's own
    attention and residual dropout stay off.
    """
    if not enabled:
        yield
        return
    lm: Any = model
    settings = {"use_reentrant": False}  # the reentrant kind gives no gradient when the embeddings are frozen
    if hasattr(lm, "activation_checkpointing_enable"):  # transformers >= 5.23, where the old name warns
        lm.activation_checkpointing_enable(settings)
    else:
        lm.gradient_checkpointing_enable(settings)
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers, "transformers enabled gradient checkpointing on no module"
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        if hasattr(lm, "activation_checkpointing_disable"):
            lm.activation_checkpointing_disable()
        else:
            lm.gradient_checkpointing_disable()


@contextmanager
def _compiled_layers(model: nn.Module, run: RunContext) -> Iterator[None]:
    """Inside, decoder layers run compiled when `run.compile` says so (CUDA only). Equal layers share their graphs: one for the student, one for the teacher."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not run.compile or run.device.type != "cuda" or not layers:
        if run.compile:
            _log.warning("compile was asked for, but the device is %s: layers run uncompiled", run.device.type)
        yield
        return
    lm: Any = model
    lm.static_starts = True
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        lm.static_starts = False
        for layer in layers:
            layer._compiled_call_impl = None
