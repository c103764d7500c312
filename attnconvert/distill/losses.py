"""What the student is trained on: the error of one attention layer, and KL + cross-entropy over the vocabulary.

Shape legend: B batch, T tokens, H query heads, D head_dim, E hidden_size, V vocabulary, N = B * T.

Every loss here returns *sums* over tokens, never means: with gradient accumulation the mean over a batch is not the mean of the
micro-batches' means, so the caller divides by the counts of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from attnconvert.distill.data import IGNORE_INDEX
from attnconvert.errors import AttnConvertError

Head = Callable[[Tensor], Tensor]
"""Final hidden states [..., E] -> logits [..., V]."""


class _CausalLM(Protocol):
    """The part of a transformers causal LM used here (its own annotations are loose)."""

    config: Any

    @property
    def base_model(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module | None: ...


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_output_error(student: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of an attention output and the power it is measured against, both summed over valid tokens.

    `error / power` is the relative error of the layer; `error / (valid tokens * H * D)` the plain MSE of LoLCATs.

    Args:
        student: [B, H, T, D], differentiable.
        teacher: [B, H, T, D], any floating dtype.
        valid: bool [B, T], False for padding.

    Returns:
        (error, power), 0-d tensors in fp32 (fp64 for fp64 input).
    """
    keep = valid[:, None, :, None]
    target = _at_least_fp32(teacher)
    # where(), not a product: a padded row may hold NaN, and NaN * 0 is NaN.
    error = torch.where(keep, _at_least_fp32(student) - target, 0.0).square().sum()
    power = torch.where(keep, target, 0.0).square().sum()
    return error, power


class DistillationLoss(NamedTuple):
    """`loss` carries the gradient; the two sums are for the log."""

    loss: Tensor
    kl_sum: Tensor
    ce_sum: Tensor


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    head: Head,
    targets: Tensor,
    valid: Tensor,
    kl: float,
    ce: float,
    chunk_size: int,
) -> DistillationLoss:
    """`kl * sum KL(teacher || student) + ce * sum CE`, from final hidden states, without ever holding [B, T, V] logits.

    Logits exist for `chunk_size` tokens at a time. The gradient with respect to `student_hidden` is computed in the forward pass,
    chunk by chunk, so backward only scales it. The head's own weights get no gradient.

    Args:
        student_hidden: [..., E].
        teacher_hidden: [..., E]; may be None when `kl` is 0.
        head: hidden states -> logits, including what the model does after its output projection (see `logit_head`).
        targets: int64 [...], next tokens, `IGNORE_INDEX` where there is none.
        valid: bool [...], the tokens that KL counts.
        kl: weight of each valid token's KL in nats, i.e. the recipe's weight divided by the valid tokens of the whole batch.
        ce: weight of each target's cross-entropy in nats, i.e. the recipe's weight divided by the targets of the whole batch.
        chunk_size: tokens per chunk; changes the result only by rounding.
    """
    assert teacher_hidden is not None or kl == 0, "KL needs the teacher's hidden states"
    hidden = student_hidden.flatten(0, -2)
    teacher = None if teacher_hidden is None or kl == 0 else teacher_hidden.detach().flatten(0, -2)
    loss, kl_sum, ce_sum = _ChunkedDistillation.apply(hidden, teacher, head, targets.flatten(), valid.flatten(), kl, ce, chunk_size)  # type: ignore[no-untyped-call]
    return DistillationLoss(loss, kl_sum, ce_sum)


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NE: Tensor, teacher_NE: Tensor | None, head: Head, targets_N: Tensor, valid_N: Tensor, kl: float, ce: float, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        want_grad = ctx.needs_input_grad[0]
        grad_NE = torch.empty_like(hidden_NE) if want_grad else None
        dtype = torch.promote_types(hidden_NE.dtype, torch.float32)
        kl_sum, ce_sum = hidden_NE.new_zeros((), dtype=dtype), hidden_NE.new_zeros((), dtype=dtype)
        for start in range(0, hidden_NE.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            has_target = targets_N[chunk] != IGNORE_INDEX
            valid = valid_N[chunk]
            unused = ~(has_target | valid)[:, None]
            # Padded tokens may hold anything, NaN too; as zeros they cannot leak through a product with a zero weight.
            hidden = hidden_NE[chunk].detach().masked_fill(unused, 0.0)
            with torch.enable_grad():
                hidden.requires_grad_(want_grad)
                logits = head(hidden)
            scores = _at_least_fp32(logits.detach())
            lse = scores.logsumexp(-1)
            index = targets_N[chunk].clamp_min(0)[:, None]
            ce_sum += torch.where(has_target, lse - scores.gather(-1, index)[:, 0], 0.0).sum()
            ce_weight = has_target.to(dtype) * ce
            grad = None
            if teacher_NE is not None:
                teacher_scores = _at_least_fp32(head(teacher_NE[chunk].masked_fill(unused, 0.0)))
                teacher_lse = teacher_scores.logsumexp(-1)
                probs = (teacher_scores - teacher_lse[:, None]).exp_()
                kl_N = (probs * teacher_scores.sub_(scores)).sum(-1) - teacher_lse + lse
                kl_sum += torch.where(valid, kl_N, 0.0).sum()
                kl_weight = valid.to(dtype) * kl
                if want_grad:
                    grad = (scores - lse[:, None]).exp_().mul_((kl_weight + ce_weight)[:, None]).sub_(probs.mul_(kl_weight[:, None]))
            elif want_grad:
                grad = (scores - lse[:, None]).exp_().mul_(ce_weight[:, None])
            if grad is not None and grad_NE is not None:
                grad.scatter_add_(-1, index, -ce_weight[:, None])
                (grad_NE[chunk],) = torch.autograd.grad(logits, hidden, grad.to(logits.dtype))
        if grad_NE is not None:
            ctx.save_for_backward(grad_NE)
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return kl * kl_sum + ce * ce_sum, kl_sum, ce_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_kl: Tensor, grad_ce: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NE,) = ctx.saved_tensors
        return grad_NE * grad_loss.to(grad_NE.dtype), None, None, None, None, None, None, None


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Final hidden states [B, T, E] of a causal LM: the output of its base model, before the output projection.

    Args:
        model: a transformers causal LM (adapters injected in place are part of it).
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], restarting at 0 at each packed document; None = one document per row.

    Raises:
        AttnConvertError: `no-base-model`, the model has no base model inside.
    """
    base = cast(_CausalLM, model).base_model
    if base is model:
        raise AttnConvertError(
            "no-base-model",
            f"{type(model).__name__} has no base model under its language-model head",
            expected="a causal language model of transformers (AutoModelForCausalLM)",
        )
    hidden = base(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden


def logit_head(model: nn.Module, input_ids: Tensor) -> Head:
    """Builds `hidden states -> logits` for a causal LM and checks it against the model's own logits.

    After the output projection it applies what the config names: `logit_scale` (Cohere), `logits_scaling` (Granite) and
    `final_logit_softcapping` (Gemma 2 and 3). A family that does anything else is refused by the check, never trained on wrong logits.

    Args:
        model: a transformers causal LM.
        input_ids: int64 [B, T] sample for the check; a dozen tokens are enough. The check runs in the caller's autocast context.

    Raises:
        AttnConvertError: `no-base-model`, `no-lm-head` or `unknown-logit-head`.
    """
    projection = cast(_CausalLM, model).get_output_embeddings()
    if projection is None:
        raise AttnConvertError(
            "no-lm-head",
            f"{type(model).__name__} has no output projection to the vocabulary",
            expected="a causal language model of transformers (AutoModelForCausalLM)",
        )
    config = cast(_CausalLM, model).config
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = projection(hidden)
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    with torch.no_grad():
        logits = head(hidden_states(model, input_ids))
        ours, theirs = _at_least_fp32(logits), _at_least_fp32(model(input_ids=input_ids, use_cache=False).logits)
    # The same operations in the same order; the slack is for a family that rounds to another dtype in between.
    resolution = 2e-2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-5
    same = ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item() if same else float("nan")
    if not error <= resolution * theirs.abs().max().item():
        seen = f"the largest difference is {error:.3g}" if same else f"the shapes are {tuple(ours.shape)} and {tuple(theirs.shape)}"
        raise AttnConvertError(
            "unknown-logit-head",
            f"{type(model).__name__} does something to its logits that attnconvert does not know",
            where=f"final hidden states x output projection against the model's own logits: {seen}",
            expected="logits = output projection of the base model's output, then logit_scale, logits_scaling or final_logit_softcapping of the config",
            hint="skip the finetuning stage with `--set stages.finetune.tokens=0`, or report the model family",
        )
    return head
