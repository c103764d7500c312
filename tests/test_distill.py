"""Transfer, finetuning, adapters and the training loop, on a tiny Llama with a toy attention core."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig
from transformers.masking_utils import AttentionMaskInterface

from attnconvert.distill.config import FinetuneConfig, LoraConfig, TransferConfig
from attnconvert.distill.data import MixedRows, PackedRows, epoch_indices
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext, StageResult, checkpoint_path, lr_factor, truncate_metrics, write_atomic
from attnconvert.distill.lora import adapter_state, adapters_off, add_lora, load_adapter_state, lora_layers, lora_targets, merge_lora
from attnconvert.distill.losses import hidden_states
from attnconvert.distill.transfer import run_transfer
from attnconvert.errors import AttnConvertError

T, VOCAB, LAYERS = 16, 32, 2
PATHS = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]


@dataclass
class ToyInputs:
    mask: Tensor  # bool [B, 1, T, T]
    scaling: float

    def valid(self) -> Tensor:
        return torch.ones(self.mask.shape[0], self.mask.shape[2], dtype=torch.bool)


class ToyCore(nn.Module):
    """Softmax attention with its own query and key maps, far from the teacher at the start; no parameters when not `trainable`."""

    def __init__(self, head_dim: int, trainable: bool = True) -> None:
        super().__init__()
        self.teacher, self.tap = False, None
        if trainable:
            self.wq, self.wk = nn.Parameter(0.3 * torch.eye(head_dim)), nn.Parameter(torch.eye(head_dim))

    def weights(self, q: Tensor, k: Tensor, inputs: ToyInputs) -> Tensor:
        q, k = (q.to(self.wq.dtype) @ self.wq, k.to(self.wk.dtype) @ self.wk) if hasattr(self, "wq") else (q * 0, k)
        return (q @ k.transpose(-1, -2) * inputs.scaling).masked_fill(~inputs.mask, float("-inf")).softmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: ToyInputs) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        return self.weights(q, k.repeat_interleave(groups, 1), inputs).to(v.dtype) @ v.repeat_interleave(groups, 1)

    def weight_loss(self, q: Tensor, k: Tensor, v: Tensor, inputs: ToyInputs) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        target = (q @ k.transpose(-1, -2) * inputs.scaling).masked_fill(~inputs.mask, float("-inf")).softmax(-1)
        return -(target * self.weights(q, k, inputs).clamp_min(1e-12).log()).sum(-1).mean()


def toy_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float = 1.0, **kwargs: Any) -> tuple[Tensor, None]:
    position_ids = kwargs.get("position_ids")
    tokens = q.shape[2]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(q.shape[0], 1, tokens, tokens)
    if position_ids is not None:
        document = (position_ids == 0).cumsum(-1)
        allowed = allowed & (document[:, None, :, None] == document[:, None, None, :])
    inputs, core = ToyInputs(allowed, scaling), getattr(module, "core", None)
    if core is None or core.teacher or core.tap is not None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling, enable_gqa=True)
        if core is not None and core.tap is not None:
            core.tap(core, q, k, v, inputs, out)
    else:
        out = core(q, k, v, inputs)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("attnconvert_toy", toy_attention)
AttentionMaskInterface.register("attnconvert_toy", lambda *args, **kwargs: None)


def tiny_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,  # sharp attention: the teacher is worth learning
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="attnconvert_toy").to(dtype).eval()


def converted(dtype: torch.dtype = torch.float32, trainable: tuple[bool, ...] = (True, True)) -> tuple[Any, dict[int, ToyCore]]:
    model = tiny_model(dtype)
    for layer, flag in zip(model.model.layers, trainable, strict=True):
        layer.self_attn.core = ToyCore(8, flag).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return model, {i: layer.self_attn.core for i, layer in enumerate(model.model.layers)}


def adapted(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[Any, dict[int, ToyCore]]:
    model, cores = converted(dtype)
    return add_lora(model, PATHS, LoraConfig(rank=2, dropout=dropout), seed=0), cores


@pytest.fixture(scope="session")
def rows() -> PackedRows:
    return make_rows()


def make_rows() -> PackedRows:
    """Twelve rows; each has a different number of documents, so rows differ in how many tokens have a target."""
    g = torch.Generator().manual_seed(3)
    positions = torch.arange(T, dtype=torch.int32).repeat(12, 1)
    for i, row in enumerate(positions):
        for start in range(3, 3 + i % 5):
            row[start:] = torch.arange(T - start, dtype=torch.int32)
    return PackedRows(torch.randint(3, VOCAB, (12, T), generator=g, dtype=torch.int32), positions)


def transfer_config(steps: int = 7, **settings: Any) -> TransferConfig:
    return TransferConfig(tokens=steps * 4 * T, length=T, batch_size=4, warmup_steps=2, **settings)


def finetune_config(steps: int = 7, **settings: Any) -> FinetuneConfig:
    return FinetuneConfig(tokens=steps * 4 * T, length=T, batch_size=4, warmup_steps=2, **({"lr": 1e-2} | settings))


class Recorder:
    """Keeps what the loop reports and runs `act(step)` after each step."""

    def __init__(self, act: Callable[[int], object] = lambda step: None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.act = act

    def on_step(self, stage: str, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        self.lines.append(metrics)
        self.act(step)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


# The two stages as one thing, for the claims that hold for both.
def train_stage(stage: str, run: RunContext, *, dtype: torch.dtype = torch.float32, steps: int = 7, **settings: Any) -> tuple[dict[str, Tensor], StageResult]:
    """A fresh model through one stage -> (all its parameters afterwards, the result)."""
    if stage == "transfer":
        model, cores = converted(dtype)
        result = run_transfer(model, cores, make_rows(), transfer_config(steps, **settings), run)
    else:
        model, cores = adapted(dtype, dropout=0.2)  # dropout: resuming must restore the RNG too
        result = run_finetune(model, cores, make_rows(), finetune_config(steps, **settings), run)
    return weights(model), result


STAGES = pytest.mark.parametrize("stage", ["transfer", "finetune"])


class TestSchedule:
    def test_warms_up_linearly_to_the_peak_and_ends_at_the_final_ratio(self) -> None:
        factors = [lr_factor(step, 100, 10, 0.02) for step in range(100)]
        assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
        assert factors[10] == pytest.approx(1.0)
        assert factors[-1] == pytest.approx(0.02)
        assert all(a > b for a, b in itertools.pairwise(factors[10:]))

    @pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
    def test_stage_shorter_than_its_warm_up_still_reaches_the_peak(self, num_steps: int) -> None:
        assert max(lr_factor(step, num_steps, 20, 0.02) for step in range(num_steps)) == pytest.approx(1.0)


class TestTransfer:
    def test_learns_the_teachers_attention(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = converted()
        result = run_transfer(model, cores, rows, transfer_config(60, lr=0.05), RunContext(tmp_path))
        first = read_metrics(tmp_path)[0]["layer_errors"]
        assert sorted(result.layer_errors) == [0, 1]
        assert all(result.layer_errors[i] < 0.2 * first[str(i)] for i in (0, 1))

    def test_changes_core_parameters_only_and_leaves_no_tap(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = converted()
        before = weights(model)
        run_transfer(model, cores, rows, transfer_config(2), RunContext(tmp_path))
        assert differing(before, weights(model)) == {f"{path}.core.{name}" for path in PATHS for name in ("wq", "wk")}
        assert all(p.grad is None for name, p in model.named_parameters() if ".core." not in name)
        assert all(core.tap is None and core.teacher is False for core in cores.values())

    @pytest.mark.parametrize(("loss", "relative"), [("output", True), ("output", False), ("weights", True)])
    def test_first_step_reports_the_plain_formula_over_the_whole_batch(self, loss: str, relative: bool, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = converted(torch.float64)
        seen: dict[int, tuple[float, float, float]] = {}

        def tap(core: ToyCore, q: Tensor, k: Tensor, v: Tensor, inputs: ToyInputs, y: Tensor) -> None:
            d = core(q, k, v, inputs) - y
            idx = next(i for i, c in cores.items() if c is core)
            seen[idx] = (d.square().sum() / y.square().sum()).item(), d.square().mean().item(), core.weight_loss(q, k, v, inputs).item()

        batch = rows.rows(epoch_indices(rows.num_rows, 0, 0, 4))
        for core in cores.values():
            core.tap = tap
        with torch.no_grad():
            hidden_states(model, batch.input_ids, batch.position_ids)
        for core in cores.values():
            core.tap = None
        run_transfer(model, cores, rows, transfer_config(1, loss=loss, relative=relative, micro_batch_size=1), RunContext(tmp_path))
        line = read_metrics(tmp_path)[0]
        errors, squares, entropies = zip(*(seen[i] for i in (0, 1)), strict=True)
        assert list(line["layer_errors"].values()) == pytest.approx(errors, rel=1e-5)
        expected = sum(entropies) / 2 if loss == "weights" else sum(errors) / 2 if relative else 1000 / 2 * sum(squares)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(("loss", "relative"), [("output", True), ("output", False), ("weights", True)])
    def test_gradient_is_that_of_the_reported_loss(self, loss: str, relative: bool, rows: PackedRows, tmp_path: Path) -> None:
        """The accumulated gradient of a layer, against finite differences of its own loss."""

        def step(shift: float) -> tuple[float, float]:
            model, cores = converted(torch.float64)
            with torch.no_grad():
                cores[1].wq[2, 3] += shift
            config = transfer_config(1, loss=loss, relative=relative, micro_batch_size=2)
            run_transfer(model, cores, rows, config, RunContext(tmp_path))
            assert cores[1].wq.grad is not None
            # The metrics are fp32; a step of 1e-2 keeps the difference well above their rounding.
            return read_metrics(tmp_path)[0]["loss"] * (1 if loss == "output" and not relative else 2), cores[1].wq.grad[2, 3].item()

        up, down, gradient = step(1e-2)[0], step(-1e-2)[0], step(0.0)[1]
        assert gradient == pytest.approx((up - down) / 2e-2, rel=1e-2)

    def test_parameterless_core_is_skipped_and_its_layer_passes_the_teacher_on(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = converted(trainable=(False, True))
        result = run_transfer(model, cores, rows, transfer_config(2), RunContext(tmp_path / "a"))
        assert list(result.layer_errors) == [1]
        assert cores[0].teacher is False
        # Layer 1 saw the teacher's hidden state: its error is the one it has when layer 0 is tapped.
        model, cores = converted()
        run_transfer(model, cores, rows, transfer_config(2), RunContext(tmp_path / "b"))
        assert read_metrics(tmp_path / "a")[0]["layer_errors"]["1"] == read_metrics(tmp_path / "b")[0]["layer_errors"]["1"]

    def test_stage_without_anything_to_train_is_skipped_with_the_reason(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = converted(trainable=(False, False))
        assert run_transfer(model, cores, rows, transfer_config(2), RunContext(tmp_path)).skipped == "no converted layer has parameters to train"
        model, cores = converted()
        assert run_transfer(model, cores, rows, transfer_config(0), RunContext(tmp_path)).skipped == "stages.transfer.tokens is 0"
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_taps_are_removed_after_an_exception(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = converted(trainable=(False, True))

        def fail(step: int) -> None:
            raise RuntimeError("planted")

        with pytest.raises(RuntimeError, match="planted"):
            run_transfer(model, cores, rows, transfer_config(2), RunContext(tmp_path, progress=Recorder(fail)))
        assert all(core.tap is None and core.teacher is False for core in cores.values())

    def test_gradient_clip_bounds_each_layer_by_itself(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = converted()
        run_transfer(model, cores, rows, transfer_config(1, grad_clip=1e-3), RunContext(tmp_path))
        for core in cores.values():
            norm = torch.stack([p.grad.norm() for p in core.parameters() if p.grad is not None]).norm().item()
            assert norm == pytest.approx(1e-3, rel=1e-2)

    def test_compile_on_a_cpu_says_that_it_runs_uncompiled(self, rows: PackedRows, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        model, cores = converted()
        run_transfer(model, cores, rows, transfer_config(1), RunContext(tmp_path, compile=True))
        assert "the cores run uncompiled" in caplog.text

    def test_compiling_that_fails_is_logged_and_trains_uncompiled(
        self, rows: PackedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*args: Any) -> Tensor:
            raise TorchDynamoException("planted")

        (expected, cores), (actual, other_cores) = converted(), converted()
        run_transfer(expected, cores, rows, transfer_config(2), RunContext(tmp_path / "plain"))
        monkeypatch.setattr("attnconvert.distill.transfer._core_forward", lambda run: broken)
        run_transfer(actual, other_cores, rows, transfer_config(2), RunContext(tmp_path / "broken"))
        assert differing(weights(expected), weights(actual)) == set()
        assert [record.getMessage() for record in caplog.records].count("the cores run uncompiled from here on, because compiling failed: planted") == 1


class TestFinetune:
    def test_first_step_reports_plain_kl_and_cross_entropy_of_the_batch(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = adapted(torch.float64)
        batch = rows.rows(epoch_indices(rows.num_rows, 0, 0, 4))
        base = tiny_model(torch.float64)
        with torch.no_grad():
            student, teacher = (m(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.log_softmax(-1) for m in (model, base))
        kl = F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), log_target=True, reduction="batchmean").item()
        ce = F.cross_entropy(student.flatten(0, 1), batch.targets().flatten()).item()
        run_finetune(model, cores, rows, finetune_config(1, kl=0.7, ce=0.3, micro_batch_size=1), RunContext(tmp_path))
        line = read_metrics(tmp_path)[0]
        assert kl > 0.1, "the toy core must be far from the teacher, else this compares zeros"
        assert (line["kl"], line["ce"], line["loss"]) == pytest.approx((kl, ce, 0.7 * kl + 0.3 * ce), rel=1e-5)

    def test_brings_the_student_closer_to_the_teacher(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = adapted()
        result = run_finetune(model, cores, rows, finetune_config(40), RunContext(tmp_path))
        lines = read_metrics(tmp_path)
        assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
        assert result.final_loss == pytest.approx(sum(line["loss"] for line in lines[-4:]) / 4, rel=1e-6)
        assert (result.steps, result.tokens) == (40, 40 * 4 * T)

    def test_rows_of_several_lengths_take_turns_and_passes_over_them_hold_as_many_tokens(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(3)

        def some(num_rows: int, length: int) -> PackedRows:
            ids = torch.randint(3, VOCAB, (num_rows, length), generator=generator, dtype=torch.int32)
            return PackedRows(ids, torch.arange(length, dtype=torch.int32).repeat(num_rows, 1))

        def recorded(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
            shapes.append(tuple(ids.shape))
            return hidden_states(model, ids, positions)

        mixed, shapes = MixedRows((some(24, 16), some(12, 32))), list[tuple[int, ...]]()
        monkeypatch.setattr("attnconvert.distill.finetune.hidden_states", recorded)
        after = []
        for micro in (4, 2):
            model, cores = adapted(torch.float64)
            config = FinetuneConfig(tokens=3 * 4 * 32, length=32, lengths=(16, 32), batch_size=4, micro_batch_size=micro, kl=0.0, ce=1.0, lr=1e-2)
            result = run_finetune(model, cores, mixed, config, RunContext(tmp_path / str(micro)))
            assert (result.steps, result.tokens) == (3, 3 * 4 * 32)
            after.append(weights(model))
        assert shapes == [(8, 16), (4, 32), (8, 16)] + 2 * [(4, 16)] + 2 * [(2, 32)] + 2 * [(4, 16)]
        assert all(torch.allclose(after[0][name], after[1][name], atol=1e-7) for name in after[0])

    @pytest.mark.parametrize("lengths", [(16,), (32, 16), (20, 32), (16, 16, 32), ()])
    def test_lengths_that_do_not_divide_the_rows_are_refused(self, lengths: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="lengths"):
            FinetuneConfig(tokens=64, length=32, lengths=lengths)

    @pytest.mark.parametrize("train_cores", [True, False])
    def test_changes_adapters_and_cores_only(self, train_cores: bool, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = adapted()
        before = weights(model)
        run_finetune(model, cores, rows, finetune_config(2, train_cores=train_cores), RunContext(tmp_path))
        changed = differing(before, weights(model))
        expected = {name for name in before if "lora_" in name or (train_cores and ".core." in name)}
        assert changed == expected
        assert len(expected) == LAYERS * 4 * 2 + (LAYERS * 2 if train_cores else 0)

    def test_cores_have_their_own_learning_rate(self, rows: PackedRows, tmp_path: Path) -> None:
        model, cores = adapted()
        before = weights(model)
        run_finetune(model, cores, rows, finetune_config(1, lr=1e-2, core_lr=1e-5), RunContext(tmp_path))
        # Adam's first step moves every parameter by the learning rate (here that of one step of a one-step stage: the peak).
        moved = {name: (p - before[name]).abs().max().item() for name, p in weights(model).items()}
        assert max(v for name, v in moved.items() if ".core." in name) == pytest.approx(1e-5, rel=0.02)
        assert max(v for name, v in moved.items() if "lora_B" in name) == pytest.approx(1e-2, rel=0.02)

    def test_unconverted_model_starts_at_kl_zero_and_trains_on_the_text(self, rows: PackedRows, tmp_path: Path) -> None:
        model = add_lora(tiny_model(), PATHS, LoraConfig(rank=2), seed=0)
        run_finetune(model, {}, rows, finetune_config(30, kl=0.0, ce=1.0), RunContext(tmp_path / "ce"))
        lines = read_metrics(tmp_path / "ce")
        assert lines[-1]["ce"] < lines[0]["ce"]
        assert "kl" not in lines[0], "without a KL weight the teacher is not run"
        model = add_lora(tiny_model(), PATHS, LoraConfig(rank=2), seed=0)
        run_finetune(model, {}, rows, finetune_config(2), RunContext(tmp_path / "kl"))
        assert read_metrics(tmp_path / "kl")[0]["kl"] == pytest.approx(0.0, abs=1e-6)

    def test_gradient_checkpointing_changes_nothing_but_rounding(self, rows: PackedRows, tmp_path: Path) -> None:
        results = []
        for on in (False, True):
            model, cores = adapted(torch.float64)
            calls = [0]
            model.get_base_model().model.layers[0].input_layernorm.register_forward_hook(lambda *args, calls=calls: calls.__setitem__(0, calls[0] + 1))
            run_finetune(model, cores, rows, finetune_config(1, kl=0.0, ce=1.0), RunContext(tmp_path, gradient_checkpointing=on))
            left_on = any(getattr(m, "gradient_checkpointing", False) or m.training for m in model.get_base_model().modules())
            results.append((weights(model), calls[0], left_on))
        # once in the logit-head check with the model and once with the base model, once in the step; the recomputation is the fourth
        assert [calls for _, calls, _ in results] == [3, 4]
        assert [left_on for *_, left_on in results] == [False, False]
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)

    def test_bf16_autocast_trains_fp32_parameters_after_the_teachers_pass(self, tmp_path: Path, rows: PackedRows) -> None:
        model, cores = adapted(torch.bfloat16)
        before = weights(model)
        run_finetune(model, cores, rows, finetune_config(1), RunContext(tmp_path, precision="bf16"))
        changed = differing(before, weights(model))
        # On the first step only the B side of an adapter has a gradient: A's is multiplied by B = 0.
        assert {name for name in before if "lora_B" in name or ".core." in name} <= changed
        assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name or ".core." in name)


@STAGES
class TestLoop:
    def test_micro_batch_size_changes_nothing_but_rounding(self, stage: str, tmp_path: Path) -> None:
        # No dropout, whose random numbers depend on the shape of the micro-batch.
        def run(micro: int) -> dict[str, Tensor]:
            context = RunContext(tmp_path / str(micro))
            if stage == "transfer":
                model, cores = converted(torch.float64)
                run_transfer(model, cores, make_rows(), transfer_config(3, micro_batch_size=micro), context)
            else:
                model, cores = adapted(torch.float64)
                run_finetune(model, cores, make_rows(), finetune_config(3, micro_batch_size=micro), context)
            return weights(model)

        whole = run(4)
        # Adapters are fp32 in any model, so a step agrees to fp32 rounding; Adam's normalisation amplifies it a little.
        for micro in (1, 2):
            torch.testing.assert_close(run(micro), whole, rtol=1e-4, atol=1e-6)

    def test_scheduled_learning_rate_is_the_one_that_moves_the_parameters(self, stage: str, tmp_path: Path) -> None:
        model, cores = converted() if stage == "transfer" else adapted()
        states: list[dict[str, Tensor]] = []
        run = RunContext(tmp_path, progress=Recorder(lambda step: states.append(weights(model))))
        if stage == "transfer":
            run_transfer(model, cores, make_rows(), transfer_config(4, final_lr_ratio=0.0), run)
        else:
            run_finetune(model, cores, make_rows(), finetune_config(4, final_lr_ratio=0.0), run)
        assert differing(states[1], states[2]) != set()
        assert differing(states[2], states[3]) == set(), "the last step has learning rate 0"
        peak = (transfer_config() if stage == "transfer" else finetune_config()).lr
        assert [line["lr"] for line in read_metrics(tmp_path)] == pytest.approx([peak / 2, peak, peak, 0.0])

    def test_resumed_run_ends_with_the_same_bits_and_one_metrics_line_per_step(self, stage: str, tmp_path: Path) -> None:
        class Killed(BaseException):
            """Stands for a kill: nothing of the loop catches it."""

        def kill_at_5(step: int) -> None:
            if step == 5:
                raise Killed

        expected, result = train_stage(stage, RunContext(tmp_path / "whole"))
        run_dir = tmp_path / "killed"
        with pytest.raises(Killed):
            train_stage(stage, RunContext(run_dir, checkpoint_every=3, progress=Recorder(kill_at_5)))
        assert len(read_metrics(run_dir)) == 5
        torch.manual_seed(99)  # a resumed process is in any RNG state
        recorder = Recorder()
        actual, resumed = train_stage(stage, RunContext(run_dir, checkpoint_every=3, resume=True, progress=recorder))
        assert [line["step"] for line in recorder.lines] == [4, 5, 6, 7]
        assert differing(expected, actual) == set()
        assert without_times(read_metrics(run_dir)) == without_times(read_metrics(tmp_path / "whole"))
        assert (resumed.final_loss, resumed.layer_errors, resumed.tokens) == (result.final_loss, result.layer_errors, result.tokens)

    def test_kill_9_while_a_checkpoint_is_written_is_resumed_to_the_same_bits(self, stage: str, tmp_path: Path) -> None:
        child = multiprocessing.get_context("spawn").Process(target=_train_and_die_writing, args=(stage, tmp_path / "killed"))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert (tmp_path / "killed" / "checkpoints" / f"{stage}.pt.tmp").exists(), "the process must die with a half-written checkpoint beside the old one"
        expected, _ = train_stage(stage, RunContext(tmp_path / "whole"))
        actual, _ = train_stage(stage, RunContext(tmp_path / "killed", resume=True))
        assert differing(expected, actual) == set()
        assert [line["step"] for line in read_metrics(tmp_path / "killed")] == list(range(1, 8))

    def test_ctrl_c_finishes_the_step_and_leaves_a_resumable_state(self, stage: str, tmp_path: Path) -> None:
        expected, _ = train_stage(stage, RunContext(tmp_path / "whole"))
        calls = [0]
        original = ToyCore.forward

        def interrupt_in_the_middle(core: ToyCore, *args: Any) -> Tensor:
            calls[0] += 1
            if calls[0] == 6:  # two layers a step: inside the third (after the two calls of the logit-head check: inside the first)
                os.kill(os.getpid(), signal.SIGINT)
            return original(core, *args)

        handler = signal.default_int_handler
        before = signal.signal(signal.SIGINT, handler)  # a suite started in the background inherits "ignore"
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ToyCore, "forward", interrupt_in_the_middle)
                with pytest.raises(KeyboardInterrupt):
                    train_stage(stage, RunContext(tmp_path / "stopped"))
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
        stopped = len(read_metrics(tmp_path / "stopped"))
        assert stopped == (3 if stage == "transfer" else 1)
        recorder = Recorder()
        actual, _ = train_stage(stage, RunContext(tmp_path / "stopped", resume=True, progress=recorder))
        assert recorder.lines[0]["step"] == stopped + 1
        assert differing(expected, actual) == set()

    def test_interrupt_raised_by_the_progress_callback_leaves_a_resumable_state(self, stage: str, tmp_path: Path) -> None:
        def interrupt(step: int) -> None:
            if step == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_stage(stage, RunContext(tmp_path, progress=Recorder(interrupt)))
        recorder = Recorder()
        train_stage(stage, RunContext(tmp_path, resume=True, progress=recorder))
        assert [line["step"] for line in recorder.lines] == [3, 4, 5, 6, 7]

    def test_non_finite_loss_names_the_step_and_keeps_the_last_checkpoint(self, stage: str, tmp_path: Path) -> None:
        model, cores = converted() if stage == "transfer" else adapted()
        kept: list[bytes] = []

        def poison(step: int) -> None:
            if step == 3:
                kept.append(checkpoint_path(tmp_path, stage).read_bytes())  # type: ignore[arg-type]
                with torch.no_grad():
                    cores[1].wq.fill_(float("nan"))

        context = RunContext(tmp_path, checkpoint_every=2, progress=Recorder(poison))
        run: Any = run_transfer if stage == "transfer" else run_finetune
        config = transfer_config() if stage == "transfer" else finetune_config()
        with pytest.raises(AttnConvertError) as caught:
            run(model, cores, make_rows(), config, context)
        assert caught.value.code == "non-finite-loss"
        assert f"stage {stage}, step 4 of 7" in str(caught.value)
        assert ("layer 1" in str(caught.value)) is (stage == "transfer")
        assert f"--set stages.{stage}.lr=" in str(caught.value)
        assert checkpoint_path(tmp_path, stage).read_bytes() == kept[0]  # type: ignore[arg-type]
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]

    def test_finished_stage_resumes_to_its_result_without_a_step(self, stage: str, tmp_path: Path) -> None:
        expected, first = train_stage(stage, RunContext(tmp_path))
        recorder = Recorder()
        actual, again = train_stage(stage, RunContext(tmp_path, resume=True, progress=recorder))
        assert recorder.lines == []
        assert differing(expected, actual) == set()
        assert (again.final_loss, again.layer_errors, again.seconds) == (first.final_loss, first.layer_errors, first.seconds)

    def test_resume_with_another_setting_is_refused_but_another_micro_batch_size_is_not(self, stage: str, tmp_path: Path) -> None:
        train_stage(stage, RunContext(tmp_path), steps=2)
        with pytest.raises(AttnConvertError, match=r"config.lr: .* -> 0\.123") as caught:
            train_stage(stage, RunContext(tmp_path, resume=True), steps=2, lr=0.123)
        assert caught.value.code == "resume-mismatch"
        with pytest.raises(AttnConvertError, match="seed: 0 -> 1"):
            train_stage(stage, RunContext(tmp_path, resume=True, seed=1), steps=2)
        _, result = train_stage(stage, RunContext(tmp_path, resume=True), steps=2, micro_batch_size=1)
        assert result.steps == 2

    def test_fresh_start_forgets_this_stage_and_the_later_ones(self, stage: str, tmp_path: Path) -> None:
        train_stage("transfer", RunContext(tmp_path), steps=2)
        train_stage("finetune", RunContext(tmp_path, resume=True), steps=2)
        assert [(line["stage"], line["step"]) for line in read_metrics(tmp_path)] == [("transfer", 1), ("transfer", 2), ("finetune", 1), ("finetune", 2)]
        _, result = train_stage(stage, RunContext(tmp_path), steps=1)
        assert result.steps == 1
        assert checkpoint_path(tmp_path, "finetune").exists() is (stage == "finetune")
        kept = [("transfer", 1), ("transfer", 2), ("finetune", 1)] if stage == "finetune" else [("transfer", 1)]
        assert [(line["stage"], line["step"]) for line in read_metrics(tmp_path)] == kept

    def test_metrics_read_in_bursts_are_the_same_metrics(self, stage: str, tmp_path: Path) -> None:
        train_stage(stage, RunContext(tmp_path / "each"))
        train_stage(stage, RunContext(tmp_path / "burst", log_every=3))
        assert without_times(read_metrics(tmp_path / "each")) == without_times(read_metrics(tmp_path / "burst"))
        line = read_metrics(tmp_path / "each")[3]
        assert {"stage", "step", "loss", "lr", "tokens", "tokens_per_second", "seconds", "grad_norm"} <= line.keys()
        assert line["tokens"] == 4 * 4 * T

    def test_damaged_checkpoint_is_reported(self, stage: str, tmp_path: Path) -> None:
        path = checkpoint_path(tmp_path, stage)  # type: ignore[arg-type]
        path.parent.mkdir()
        path.write_bytes(b"not a checkpoint")
        with pytest.raises(AttnConvertError) as caught:
            train_stage(stage, RunContext(tmp_path, resume=True))
        assert caught.value.code == "bad-checkpoint"

    def test_running_out_of_memory_advises_a_smaller_micro_batch(self, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any) -> Tensor:
            raise torch.OutOfMemoryError("planted")

        monkeypatch.setattr(PackedRows, "batch", fail)
        with pytest.raises(AttnConvertError, match=f"--set stages.{stage}.micro_batch_size=2") as caught:
            train_stage(stage, RunContext(tmp_path))
        assert caught.value.code == "out-of-memory"


def _train_and_die_writing(stage: str, run_dir: Path) -> None:
    """Child process: kills itself between writing the second checkpoint beside the first and renaming it."""
    torch.set_num_threads(1)
    replace, count = os.replace, [0]

    def die_on_second(source: Any, target: Any) -> None:
        if str(target).endswith(".pt"):
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = die_on_second  # type: ignore[assignment]
    train_stage(stage, RunContext(run_dir, checkpoint_every=3))


class TestFiles:
    def test_line_cut_short_by_a_crash_is_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        lines = [json.dumps({"stage": stage, "step": step}) for stage, step in (("transfer", 1), ("transfer", 2), ("transfer", 3))]
        path.write_text("\n".join(lines) + '\n{"stage": "transfer", "st')
        truncate_metrics(path, "transfer", 2)
        assert path.read_text() == "\n".join(lines[:2]) + "\n"

    def test_full_disk_keeps_the_old_file_and_is_a_user_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        path = tmp_path / "checkpoint.pt"
        write_atomic(path, b"old")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(AttnConvertError, match="No space left on device") as caught:
            write_atomic(path, b"new")
        assert caught.value.code == "cannot-write"
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


class TestLora:
    def test_targets_are_the_projections_of_the_given_attention_modules_only(self) -> None:
        model, _ = converted()
        assert lora_targets(model, PATHS[1:], ["q", "o"]) == [f"{PATHS[1]}.q_proj", f"{PATHS[1]}.o_proj"]
        assert [name.rpartition(".")[2] for name in lora_targets(model, PATHS[:1], ["v", "mlp"])] == ["v_proj", "gate_proj", "up_proj", "down_proj"]

    def test_fused_projections_are_found_in_gpt2_and_gpt_neox(self) -> None:
        gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2))
        assert lora_targets(gpt2, ["transformer.h.0.attn"], ["q", "k", "v"]) == ["transformer.h.0.attn.c_attn"]
        assert [n.removeprefix("transformer.h.0.") for n in lora_targets(gpt2, ["transformer.h.0.attn"], ["o", "mlp"])] == [
            "attn.c_proj",
            "mlp.c_fc",
            "mlp.c_proj",
        ]
        small = GPTNeoXConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        neox = AutoModelForCausalLM.from_config(small)
        assert lora_targets(neox, ["gpt_neox.layers.1.attention"], ["k", "o"]) == [f"gpt_neox.layers.1.attention.{n}" for n in ("query_key_value", "dense")]
        wrapped = add_lora(gpt2, ["transformer.h.1.attn"], LoraConfig(rank=2), seed=0)
        assert list(lora_layers(wrapped)) == ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]

    def test_target_that_matches_nothing_is_an_error(self) -> None:
        model, _ = converted()
        del model.model.layers[1].self_attn.k_proj
        with pytest.raises(AttnConvertError, match="adapter target 'k' matches nothing") as caught:
            lora_targets(model, PATHS, ["q", "k"])
        assert caught.value.where is not None
        assert PATHS[1] in caught.value.where

    def test_adapters_sit_exactly_on_the_targets_even_in_long_lists(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2, num_key_value_heads=1)
        model = AutoModelForCausalLM.from_config(config)
        paths = [f"model.layers.{i}.self_attn" for i in (*range(1, 12),)]  # not layer 0: peft's suffix compression must not add it
        wrapped = add_lora(model, paths, LoraConfig(rank=1), seed=0)
        assert len(lora_layers(wrapped)) == 44
        assert not any(".layers.0." in name for name in lora_layers(wrapped))

    def test_same_seed_gives_the_same_adapters_and_leaves_the_global_rng_alone(self) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        model, _ = converted()
        torch.set_rng_state(before)
        first = adapter_state(add_lora(model, PATHS, LoraConfig(rank=2), seed=3))
        assert torch.equal(torch.get_rng_state(), before)
        second = adapter_state(add_lora(converted()[0], PATHS, LoraConfig(rank=2), seed=3))
        assert differing(first, second) == set()

    def test_adapters_off_restores_the_model_and_on_again_restores_the_adapters(self) -> None:
        model, _ = adapted()
        _randomise(model)
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            on = model(input_ids=ids, use_cache=False).logits
            with adapters_off(model):
                off = model(input_ids=ids, use_cache=False).logits
            again = model(input_ids=ids, use_cache=False).logits
            plain = converted()[0](input_ids=ids, use_cache=False).logits
        assert torch.equal(off, plain)
        assert torch.equal(on, again)
        assert not torch.equal(on, off)

    def test_merged_model_computes_what_the_adapted_one_did(self) -> None:
        model, _ = adapted()
        _randomise(model)
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
            merged = merge_lora(model)
            actual = merged(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert merged.state_dict().keys() == converted()[0].state_dict().keys()

    def test_merge_into_bf16_rounds_the_fp32_sum_once(self) -> None:
        model, _ = adapted(torch.bfloat16)
        _randomise(model)
        name = f"{PATHS[0]}.q_proj"
        layer = lora_layers(model)[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = (layer.get_base_layer().weight.float() + 8 * (b @ a)).bfloat16()  # alpha 16 / rank 2
        merged = merge_lora(model).get_submodule(name)
        assert torch.equal(merged.weight, expected)

    def test_adapter_state_round_trips_through_a_fresh_model(self) -> None:
        model, _ = adapted()
        _randomise(model)
        state = adapter_state(model)
        fresh, _ = adapted()
        load_adapter_state(fresh, state)
        assert len(state) == LAYERS * 4 * 2
        assert differing(state, adapter_state(fresh)) == set()

    def test_adapters_of_another_shape_are_refused_and_nothing_changes(self) -> None:
        model, _ = adapted()
        before = adapter_state(model)
        other = adapter_state(add_lora(converted()[0], PATHS, LoraConfig(rank=3), seed=0))
        with pytest.raises(AttnConvertError, match=r"saved \(3, 16\), model \(2, 16\)") as caught:
            load_adapter_state(model, other)
        assert caught.value.code == "adapter-mismatch"
        assert differing(before, adapter_state(model)) == set()


def _randomise(model: Any) -> None:
    g = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
