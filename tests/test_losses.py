"""The losses against plain fp64 formulas, and the logit head against the models' own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from attnconvert.distill.losses import attention_output_error, distillation_loss, hidden_states, logit_head
from attnconvert.errors import AttnConvertError

VOCAB = 13


def _problem() -> dict[str, Tensor]:
    """Two rows of five tokens: a token without target, an invalid token that has one, and one that counts for nothing."""
    g = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(2, 5, 6, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(VOCAB, 6, generator=g, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (2, 5), generator=g)
    valid = torch.ones(2, 5, dtype=torch.bool)
    targets[0, 4] = targets[1, 2] = -100
    valid[1, 1] = valid[1, 2] = False
    return {"hidden": hidden, "teacher": teacher, "weight": weight, "targets": targets, "valid": valid}


def _capped(weight: Tensor) -> Any:
    return lambda hidden: torch.tanh(F.linear(hidden, weight) / 3) * 3


def _plain(p: dict[str, Tensor], hidden: Tensor, kl: float, ce: float) -> Tensor:
    head = _capped(p["weight"])
    student, teacher = head(hidden).log_softmax(-1), head(p["teacher"]).log_softmax(-1)
    kl_sum = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)[p["valid"]].sum()
    ce_sum = F.cross_entropy(student.flatten(0, 1), p["targets"].flatten(), ignore_index=-100, reduction="sum")
    return kl * kl_sum + ce * ce_sum


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize(("kl", "ce"), [(0.9, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_chunked_loss_and_gradient_equal_the_plain_formula(chunk_size: int, kl: float, ce: float) -> None:
    p = _problem()
    ours, plain = p["hidden"].clone().requires_grad_(), p["hidden"].clone().requires_grad_()
    result = distillation_loss(ours, p["teacher"] if kl else None, _capped(p["weight"]), p["targets"], p["valid"], kl, ce, chunk_size)
    expected = _plain(p, plain, kl, ce)
    (result.loss * 2.5).backward()
    (expected * 2.5).backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl * result.kl_sum + ce * result.ce_sum, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)
    assert ours.grad is not None
    assert ours.grad[1, 2].abs().max() == 0, "a token that counts for nothing must get no gradient"


def test_gradient_passes_gradcheck() -> None:
    p = _problem()

    def loss(hidden: Tensor) -> Tensor:
        return distillation_loss(hidden, p["teacher"], _capped(p["weight"]), p["targets"], p["valid"], 0.7, 0.3, 4).loss

    assert torch.autograd.gradcheck(loss, (p["hidden"].clone().requires_grad_(),))


def test_loss_of_micro_batches_with_whole_batch_weights_adds_up_to_the_batch() -> None:
    p = _problem()
    kl, ce = 0.9 / 8, 0.1 / 8
    whole = distillation_loss(p["hidden"], p["teacher"], _capped(p["weight"]), p["targets"], p["valid"], kl, ce, 4).loss
    parts = [distillation_loss(p["hidden"][i], p["teacher"][i], _capped(p["weight"]), p["targets"][i], p["valid"][i], kl, ce, 4).loss for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=0)


def test_logits_of_at_most_one_chunk_exist_at_a_time() -> None:
    p = _problem()
    sizes = []

    def head(hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return F.linear(hidden, p["weight"])

    distillation_loss(p["hidden"].clone().requires_grad_(), p["teacher"], head, p["targets"], p["valid"], 0.5, 0.5, 4).loss.backward()
    assert sizes == [4, 4, 4, 4, 2, 2]


def test_nan_in_tokens_that_count_for_nothing_stays_out_of_loss_and_gradient() -> None:
    p = _problem()
    clean = distillation_loss(p["hidden"], p["teacher"], _capped(p["weight"]), p["targets"], p["valid"], 0.5, 0.5, 4).loss
    p["hidden"][1, 2] = p["teacher"][1, 2] = float("nan")
    hidden = p["hidden"].requires_grad_()
    dirty = distillation_loss(hidden, p["teacher"], _capped(p["weight"]), p["targets"], p["valid"], 0.5, 0.5, 4).loss
    dirty.backward()
    assert torch.equal(clean, dirty.detach())
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_bf16_hidden_states_give_the_loss_in_fp32() -> None:
    p = {name: t.bfloat16() if t.is_floating_point() else t for name, t in _problem().items()}
    hidden = p["hidden"].clone().requires_grad_()
    result = distillation_loss(hidden, p["teacher"], _capped(p["weight"]), p["targets"], p["valid"], 0.5, 0.5, 4)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    # bf16 keeps 8 bits: the logits (about 3) are off by 1 %, a loss of about 8 tokens x 2 nats by well under 10 %.
    exact = {name: t.double() if t.is_floating_point() else t for name, t in p.items()}
    torch.testing.assert_close(result.loss.double(), _plain(exact, exact["hidden"], 0.5, 0.5), rtol=0.05, atol=0)


def test_attention_output_error_sums_over_valid_tokens_only() -> None:
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    kept = [(b, t) for b in range(2) for t in range(5) if valid[b, t]]
    error = sum(((student - teacher)[b, :, t] ** 2).sum() for b, t in kept)
    power = sum((teacher[b, :, t] ** 2).sum() for b, t in kept)
    student[1, :, 0] = teacher[1, :, 1] = float("nan")
    student.requires_grad_()
    ours = attention_output_error(student, teacher, valid)
    torch.testing.assert_close(ours, (torch.as_tensor(error), torch.as_tensor(power)), rtol=1e-12, atol=0)
    ours[0].backward()
    assert student.grad is not None
    assert student.grad[1, :, :2].abs().max() == 0


_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
_GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.5}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "mistral": MistralConfig(**_SMALL),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SMALL, head_dim=8),
    "gemma2": Gemma2Config(**_SMALL, **_GEMMA),
    "gemma3": Gemma3TextConfig(**_SMALL, **_GEMMA),
    "granite": GraniteConfig(**_SMALL, logits_scaling=8.0),
    "cohere": CohereConfig(**_SMALL, logit_scale=0.25),
    "phi3": Phi3Config(**_SMALL),
    "olmo2": Olmo2Config(**_SMALL),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5, bos_token_id=1, eos_token_id=2),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logit_head_of_hidden_states_equals_the_models_logits(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    ids = torch.randint(3, 64, (2, 11))
    head = logit_head(model, ids[:, :5])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        actual = head(hidden_states(model, ids))
        linear_only = model.get_output_embeddings()(hidden_states(model, ids))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    transformed = family in ("gemma2", "gemma3", "granite", "cohere")
    assert torch.allclose(linear_only, expected, rtol=1e-5, atol=1e-5) is not transformed, "the families with a transformed head must really exercise it"


class _TripledLlama(LlamaForCausalLM):
    """A family that does something to its logits that its config does not say."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out


def test_unknown_logit_transformation_is_refused() -> None:
    model = _TripledLlama(LlamaConfig(**_SMALL)).eval()
    with pytest.raises(AttnConvertError, match="_TripledLlama does something to its logits") as caught:
        logit_head(model, torch.arange(3, 9)[None])
    assert caught.value.code == "unknown-logit-head"


def test_model_without_a_language_model_head_is_refused() -> None:
    model = LlamaModel(LlamaConfig(**_SMALL)).eval()
    with pytest.raises(AttnConvertError) as caught:
        logit_head(model, torch.arange(3, 9)[None])
    assert caught.value.code == "no-lm-head"
    with pytest.raises(AttnConvertError) as caught:
        hidden_states(model, torch.arange(3, 9)[None])
    assert caught.value.code == "no-base-model"


def test_head_weights_get_no_gradient() -> None:
    p = _problem()
    projection = nn.Linear(6, VOCAB, bias=False, dtype=torch.float64)
    distillation_loss(p["hidden"].clone().requires_grad_(), p["teacher"], projection, p["targets"], p["valid"], 0.5, 0.5, 4).loss.backward()
    assert projection.weight.grad is None
