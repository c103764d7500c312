"""Evaluation and report, on tiny random Llamas and a byte tokenizer built here."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_recall import bytes_tokenizer, tiny_llama
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from attnconvert.convert import evaluate, reevaluate
from attnconvert.convert.evaluate import EvalReport, cache_bytes, evaluate_models, head_is_separate, json_safe
from attnconvert.convert.reevaluate import check_thresholds, parse_thresholds
from attnconvert.convert.report import compact_settings, format_bytes, format_seconds, layer_map, ranges, render_markdown, render_table, write_report
from attnconvert.distill.config import EvalConfig
from attnconvert.distill.data import PackedRows
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.plan import ConversionPlan, LayerPlan

CPU = torch.device("cpu")
VOCAB = 300


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return tiny_llama(0)


@pytest.fixture(scope="module")
def student(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """The teacher with noise on its weights."""
    student = copy.deepcopy(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return student


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


def _packed(num_rows: int, length: int, *, document: int | None = None, seed: int = 0) -> PackedRows:
    """Random rows; a new document every `document` tokens, or none inside a row."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(VOCAB, (num_rows, length), generator=generator, dtype=torch.int32)
    position_ids = torch.arange(length, dtype=torch.int32) % (document or length)
    return PackedRows(input_ids, position_ids.repeat(num_rows, 1))


def _config(*, tokens: int = 10_000, length: int = 24, lengths: tuple[int, ...] = (), trials: int = 0) -> EvalConfig:
    return EvalConfig(tokens=tokens, length=length, passkey_lengths=lengths, passkey_trials=trials)


def _run(student: Any, teacher: Any, tokenizer: Any, rows: PackedRows, config: EvalConfig, **changes: Any) -> EvalReport:
    settings: dict[str, Any] = {"device": "cpu", "window": None, "ablations": {}} | changes
    return evaluate_models(student, teacher, tokenizer, rows, config, **settings)


# ---------------------------------------------------------------- perplexity, KL, agreement


def test_identical_models_have_no_kl_full_agreement_and_ratio_one(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    quality = _run(copy.deepcopy(teacher), teacher, tokenizer, _packed(5, 24, document=7), _config()).quality_of("student")
    assert quality.kl is not None
    assert quality.agreement is not None
    assert quality.ppl_ratio is not None
    assert quality.kl.value == 0
    assert quality.agreement.value == 1
    assert quality.ppl_ratio.value == 1
    assert quality.ppl_ratio.ci95 == (1, 1)


def test_perplexity_is_exp_of_the_loss_transformers_computes(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = _packed(3, 24)
    input_ids = rows.input_ids.long()
    with torch.no_grad():
        loss = teacher(input_ids=input_ids, labels=input_ids).loss.item()
    report = _run(teacher, None, tokenizer, rows, _config())
    assert report.quality_of("student").ppl.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert report.num_tokens == 3 * 23


def _by_hand(student: LlamaForCausalLM, teacher: LlamaForCausalLM, rows: PackedRows, document: int) -> dict[str, float]:
    """Every document alone through both models, the plain formulas in fp64."""
    nll, teacher_nll, kl, agree = [], [], [], []
    for row in rows.input_ids.long():
        for part in row.split(document):
            with torch.no_grad():
                p, q = (F.log_softmax(model(input_ids=part[None]).logits[0, :-1].double(), dim=-1) for model in (teacher, student))
            nll.append(-q.gather(1, part[1:, None])[:, 0])
            teacher_nll.append(-p.gather(1, part[1:, None])[:, 0])
            kl.append((p.exp() * (p - q)).sum(-1))
            agree.append((p.argmax(-1) == q.argmax(-1)).double())
    means = {name: torch.cat(value).mean().item() for name, value in {"nll": nll, "teacher": teacher_nll, "kl": kl, "agree": agree}.items()}
    return means | {"count": float(len(torch.cat(nll)))}


@pytest.mark.parametrize("budget", [VOCAB * 5, 2**25], ids=["five positions at a time", "all at once"])
def test_packed_figures_equal_each_document_computed_alone(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_BUDGET", budget)
    rows = _packed(4, 24, document=7)
    expected = _by_hand(student, teacher, rows, 7)
    report = _run(student, teacher, tokenizer, rows, _config())
    quality = report.quality_of("student")
    assert quality.kl is not None
    assert quality.agreement is not None
    assert quality.ppl_ratio is not None
    assert report.num_tokens == expected["count"]
    assert expected["kl"] > 0.01, "the perturbation must show"
    assert quality.kl.value == pytest.approx(expected["kl"], rel=1e-4)
    assert 0 < expected["agree"] < 1
    assert quality.agreement.value == pytest.approx(expected["agree"])
    assert quality.ppl.value == pytest.approx(math.exp(expected["nll"]), rel=1e-5)
    assert quality.ppl_ratio.value == pytest.approx(math.exp(expected["nll"] - expected["teacher"]), rel=1e-5)


def test_a_model_that_caps_its_logits_is_measured_with_the_cap(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.2,
    )
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config).eval()
    rows = _packed(2, 24)
    with torch.no_grad():
        loss = model(input_ids=rows.input_ids.long(), labels=rows.input_ids.long()).loss.item()
    assert not head_is_separate(model, CPU)
    assert _run(model, None, tokenizer, rows, _config()).quality_of("student").nll.value == pytest.approx(loss, rel=1e-5)


def test_a_plain_llama_gets_its_logits_in_chunks(teacher: LlamaForCausalLM) -> None:
    with torch.no_grad():
        assert head_is_separate(teacher, CPU)


def test_intervals_cover_the_estimate_and_shrink_with_more_rows(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    widths = []
    for num_rows in (8, 128):
        quality = _run(student, teacher, tokenizer, _packed(num_rows, 16), _config(length=16)).quality_of("student")
        for estimate in (quality.nll, quality.ppl, quality.ppl_ratio, quality.kl, quality.agreement):
            assert estimate is not None
            assert estimate.ci95 is not None
            assert estimate.se is not None
            assert estimate.ci95[0] < estimate.value < estimate.ci95[1]
            # A percentile interval of a nearly normal mean is about 2 x 1.96 standard errors wide.
            assert 3 < (estimate.ci95[1] - estimate.ci95[0]) / estimate.se < 5
        assert quality.kl is not None
        assert quality.kl.se is not None
        widths.append(quality.kl.se)
    assert widths[1] < widths[0] / 2


def test_bootstrap_error_of_a_mean_matches_the_textbook_formula(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = _packed(64, 16)
    with torch.no_grad():
        logp = F.log_softmax(teacher(input_ids=rows.input_ids.long()).logits[:, :-1].double(), dim=-1)
    per_row = -logp.gather(2, rows.input_ids.long()[:, 1:, None])[..., 0].mean(dim=1)
    se = _run(teacher, None, tokenizer, rows, _config(length=16)).quality_of("student").nll.se
    assert se == pytest.approx(per_row.std().item() / math.sqrt(64), rel=0.1)


def test_one_row_gives_no_interval(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ppl = _run(teacher, None, tokenizer, _packed(1, 24), _config()).quality_of("student").ppl
    assert ppl.se is None
    assert ppl.ci95 is None


def test_only_the_tokens_asked_for_are_used(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert _run(teacher, None, tokenizer, _packed(9, 24), _config(tokens=49)).num_rows == 3


def test_an_ablation_changes_the_student_only_while_it_is_measured(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(student)
    projection = model.model.layers[0].self_attn.o_proj.weight
    before = projection.detach().clone()

    @contextmanager
    def no_first_layer() -> Iterator[None]:
        with torch.no_grad():
            projection.zero_()
            yield
            projection.copy_(before)

    zeroed = copy.deepcopy(student)
    with torch.no_grad():
        zeroed.model.layers[0].self_attn.o_proj.weight.zero_()
    rows = _packed(3, 24, document=9)
    report = _run(model, teacher, tokenizer, rows, _config(), ablations={"no-first-layer": no_first_layer})
    plain = _run(student, teacher, tokenizer, rows, _config())
    alone = _run(zeroed, teacher, tokenizer, rows, _config()).quality_of("student")
    ablated = report.quality_of("no-first-layer")
    assert report.quality_of("student") == plain.quality_of("student")
    assert (ablated.ppl, ablated.kl, ablated.agreement) == (alone.ppl, alone.kl, alone.agreement)
    assert ablated.kind == "ablation"
    assert ablated.ppl != report.quality_of("student").ppl


def test_another_model_is_measured_against_the_teacher(student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    report = _run(teacher, teacher, tokenizer, _packed(3, 24), _config(), others={"teacher-same-data": student})
    expected = _run(student, teacher, tokenizer, _packed(3, 24), _config()).quality_of("student")
    assert report.quality_of("teacher-same-data").kl == expected.kl
    assert [row.name for row in report.quality] == ["teacher", "student", "teacher-same-data"]


def test_without_a_teacher_the_report_has_student_figures_and_says_so(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    report = _run(teacher, None, tokenizer, _packed(3, 24), _config())
    assert [row.name for row in report.quality] == ["student"]
    assert report.quality[0].kl is None
    assert all(row.teacher is None for row in report.state_bytes)
    assert "teacher could not be loaded" in report.notes[0]
    assert "teacher could not be loaded" in render_markdown(report, {})


def test_training_flags_come_back_and_dropout_is_off_while_measuring(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model = copy.deepcopy(teacher)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.norm.eval()
    report = _run(model, teacher, tokenizer, _packed(3, 24), _config())
    assert report.quality_of("student").ppl == report.quality_of("teacher").ppl
    assert model.training
    assert not model.model.norm.training


def test_rows_without_a_next_token_are_refused(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AttnConvertError) as error:
        _run(teacher, None, tokenizer, _packed(2, 24, document=1), _config())
    assert error.value.code == "no-eval-tokens"


def test_a_teacher_with_another_vocabulary_is_refused(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    config = copy.deepcopy(teacher.config)
    config.vocab_size = VOCAB + 1
    with pytest.raises(AttnConvertError) as error:
        _run(teacher, LlamaForCausalLM(config), tokenizer, _packed(2, 24), _config())
    assert error.value.code == "vocab-mismatch"
    assert str(VOCAB + 1) in error.value.message


# ---------------------------------------------------------------- by position


def test_each_position_bucket_equals_its_tokens_computed_alone(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = _packed(3, 300, document=150)
    report = _run(student, teacher, tokenizer, rows, _config(length=300), ablations={"same": nullcontext})
    found = [(row.start, row.stop, row.num_tokens) for row in report.positions if row.name == "student"]
    # a token predicts from its position p, so 149 of each document's 150 tokens do
    assert found == [(0, 64, 6 * 64), (64, 128, 6 * 64), (128, 256, 6 * 21)]
    documents = rows.input_ids.long().reshape(6, 150)
    with torch.no_grad():
        p, q = (F.log_softmax(model(input_ids=documents).logits[:, :-1].double(), dim=-1) for model in (teacher, student))
    targets = documents[:, 1:, None]
    for row in (row for row in report.positions if row.name == "student"):
        part = slice(row.start, row.stop)
        nll, teacher_nll = (-logp.gather(2, targets)[:, part].mean().item() for logp in (q, p))
        assert row.nll == pytest.approx(nll, rel=1e-5)
        assert row.ppl == pytest.approx(math.exp(nll), rel=1e-5)
        assert row.ppl_ratio == pytest.approx(math.exp(nll - teacher_nll), rel=1e-5)
        assert row.kl == pytest.approx((p.exp() * (p - q)).sum(-1)[:, part].mean().item(), rel=1e-4)
    quality = report.quality_of("student")
    total = sum(row.nll * row.num_tokens for row in report.positions if row.name == "student")
    assert total / report.num_tokens == pytest.approx(quality.nll.value)
    assert {row.name for row in report.positions} == {"teacher", "student", "same"}
    assert [row.kl for row in report.positions if row.name == "teacher"] == [None] * 3


def test_the_change_an_ablation_makes_is_resampled_in_pairs(student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    report = _run(student, teacher, tokenizer, _packed(8, 24), _config(), ablations={"nothing off": nullcontext})
    same = report.quality_of("nothing off")
    assert same.kl is not None
    assert same.kl.se is not None
    assert same.kl.se > 0
    assert same.kl_change is not None
    assert (same.kl_change.value, same.kl_change.ci95) == (0, (0, 0))
    assert report.quality_of("student").kl_change is None


# ---------------------------------------------------------------- suites


def test_quick_is_what_a_conversion_measures_and_the_others_are_more() -> None:
    quick, standard, long = (EvalConfig.suite(name) for name in ("quick", "standard", "long"))
    assert quick == EvalConfig()
    assert (quick.needle_trials, quick.mqar_trials) == (0, 0)
    for field in ("tokens", "passkey_trials", "needle_trials", "mqar_trials"):
        assert getattr(quick, field) < getattr(standard, field) < getattr(long, field)
    assert max(long.passkey_windows) > max(standard.passkey_windows)


def test_what_a_recipe_chose_wins_over_the_suite() -> None:
    recipe = EvalConfig(tokens=5000, passkey_lengths=(64,), needle_trials=0)
    config = EvalConfig.suite("standard", recipe)
    assert (config.tokens, config.passkey_lengths) == (5000, (64,))
    assert config.needle_trials == EvalConfig.suite("standard").needle_trials  # written out, but the default


def test_rows_of_a_suite_are_no_longer_than_the_model_was_built_for(teacher: LlamaForCausalLM) -> None:
    recipe = EvalConfig(passkey_trials=3)
    assert reevaluate._eval_config(recipe, None, None, teacher) == recipe
    assert reevaluate._eval_config(recipe, "long", 77, teacher) == EvalConfig.suite("long", recipe).model_copy(update={"length": 512, "tokens": 77})
    # a recipe's own length is the user's word
    chosen = EvalConfig(length=700)
    assert reevaluate._eval_config(chosen, "long", None, teacher).length == 700


def test_an_unknown_suite_names_the_known_ones(tmp_path: Any) -> None:
    with pytest.raises(AttnConvertError, match="unknown suite 'huge'") as error:
        reevaluate.evaluate_converted(tmp_path, suite="huge")  # type: ignore[arg-type]
    assert error.value.expected == "one of: quick, standard, long"


# ---------------------------------------------------------------- lengths


def test_lengths_that_cannot_be_run_are_skipped_and_said(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    report = _run(teacher, teacher, tokenizer, _packed(2, 24), _config(lengths=(32, 256, 4096), trials=2))
    assert [(row.name, row.length) for row in report.passkey] == [("teacher", 256), ("student", 256)]
    assert report.passkey[0].accuracy == report.passkey[1].accuracy
    assert any("4096" in note and "max_position_embeddings = 512" in note for note in report.notes)
    assert any("length 32 " in note for note in report.notes)


def test_default_lengths_are_one_four_and_sixteen_windows(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    report = _run(teacher, None, tokenizer, _packed(2, 24), _config(trials=1), window=128)
    assert {row.length for row in report.state_bytes} == {24, 128, 512}
    assert any("2048" in note for note in report.notes)


# ---------------------------------------------------------------- decode state


def test_kv_bytes_equal_a_count_by_hand(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    report = _run(teacher, teacher, tokenizer, _packed(2, 24), _config(lengths=(40,), trials=0))
    layers, kv, heads, head_dim, fp32 = 2, 2, 2, 8, 4
    assert [(row.length, row.student, row.teacher) for row in report.state_bytes] == [
        (length, layers * kv * heads * head_dim * fp32 * length, layers * kv * heads * head_dim * fp32 * length) for length in (24, 40)
    ]


def test_states_in_dicts_and_lists_are_counted_once() -> None:
    class State(CacheLayerMixin):
        is_sliding = False

        def __init__(self) -> None:
            super().__init__()
            self.state = {"S": torch.zeros(2, 3), "z": torch.zeros(5, dtype=torch.bfloat16)}
            self.blocks = [torch.zeros(4, dtype=torch.int64), self.state["S"]]
            self.owner = torch.nn.Linear(100, 100)  # a layer may know its module, whose weights are not state

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None: ...
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any: ...
        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return query_length, 0

        def get_seq_length(self) -> int:
            return 0

        def get_max_length(self) -> int:
            return -1

    cache = DynamicCache()
    cache.layers.append(State())
    assert cache_bytes(cache) == 2 * 3 * 4 + 5 * 2 + 4 * 8


# ---------------------------------------------------------------- report


def test_every_recall_test_is_measured_for_every_model(report: EvalReport) -> None:
    names = {"teacher", "student", "zero-linear-branch"}
    assert {(row.name, row.num_needles, row.length) for row in report.needles} == {(name, 1, 480) for name in names}
    assert [row.depth for row in report.needles if row.name == "student"] == [0.25, 0.75]
    assert {(row.name, row.num_pairs, row.chance) for row in report.mqar} == {(name, 4, 0.25) for name in names}
    assert any("4 needles in 480 tokens" in note for note in report.notes)


@pytest.fixture(scope="module")
def report(student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> EvalReport:
    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    more = {"needle_lengths": (480,), "needle_trials": 2, "needle_depths": 2, "mqar_pairs": (4,), "mqar_trials": 8}
    config = _config(length=96, lengths=(256, 9999), trials=2).model_copy(update=more)
    measured = _run(student, teacher, tokenizer, _packed(6, 96, document=90), config, window=16, ablations={"zero-linear-branch": nothing})
    layer = {"layer_idx": 1, "output_error": 0.75, "kl": 0.5, "entropy_teacher": 1.5, "entropy_student": 2.5, "monotonicity": None, "heads": []}
    task = {
        "task": "tiny_qa",
        "metric": "acc",
        "num_fewshot": 0,
        "num_samples": 40,
        "teacher": 0.6,
        "teacher_se": 0.05,
        "student": 0.2,
        "student_se": 0.05,
        "chance": 0.25,
    }
    sample = {"prompt": "Hello\nthere", "teacher": "a * b", "student": "| c"}
    return replace(measured, fidelity={"rows": 1, "tokens": 96, "layers": [layer], "maps": []}, tasks=(task,), generation=(sample,)).with_findings()


def _plan() -> ConversionPlan:
    config = {"window": {"kind": "block", "size": 64}, "sinks": 4, "linear": True, "feature_dim": None}
    rows = [_layer(i, "hedgehog", config, "recipe") for i in range(6)]
    rows[2] = _layer(2, None, {}, "largest layer error")
    return ConversionPlan("llama", tuple(rows))


def _layer(layer_idx: int, method: str | None, config: dict[str, Any], reason: str = "") -> LayerPlan:
    shape = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LayerPlan(layer_idx=layer_idx, path=f"model.layers.{layer_idx}.self_attn", method=method, config=config, reason=reason, **shape)


def _conversion() -> dict[str, Any]:
    return {
        "recipe_name": "hedgehog",
        "base_model": "tiny/llama",
        "base_model_type": "llama",
        "plan": _plan().to_dict(),
        "stages": [
            {"stage": "transfer", "steps": 245, "tokens": 2_007_040, "seconds": 44.2, "final_loss": 0.1234, "layer_errors": {0: 0.5, 1: 0.25}, "skipped": None},
            {"stage": "finetune", "skipped": "tokens is 0"},
        ],
        "data": {"source": "embedded", "train": {"documents": 12, "tokens": 2_007_040}, "eval": {"documents": 3, "tokens": 144}, "train_epochs": 1.5},
        "versions": {"attnconvert": "0.1.0", "torch": "2.13.0"},
        "device": "a test machine",
        "seconds": 200.0,
        "command": "attnconvert linearize tiny/llama --recipe hedgehog",
    }


def test_the_markdown_report_contains_the_figures(report: EvalReport) -> None:
    text = render_markdown(report, _conversion())
    student, teacher = report.quality_of("student"), report.quality_of("teacher")
    assert student.kl is not None
    assert student.ppl_ratio is not None
    assert student.ppl.ci95 is not None
    for figure in (
        f"{student.ppl.value:.2f} [{student.ppl.ci95[0]:.2f}, {student.ppl.ci95[1]:.2f}]",
        f"{teacher.ppl.value:.2f}",
        f"{student.ppl_ratio.value:.3f}",
        f"{student.kl.value:.4f}",
        "student, zero-linear-branch",
        format_bytes(report.state_bytes[-1].student),
        "layer 0 -> 5   hhShhh",
        "hedgehog (window.kind=block, window.size=64, sinks=4, linear=true): 5 of 6 layers, 0-1, 3-5",
        "softmax, kept as it was: 1 of 6 layers, 2. Why: largest layer error",
        "2,007,040",
        "0.1234",
        "skipped: tokens is 0",
        "layer 0 0.500",
        "documents=12",
        "torch 2.13.0",
        "a test machine",
        "3 min 20 s",
        "attnconvert linearize tiny/llama --recipe hedgehog",
        "trust_remote_code=True",
        "9999",
    ):
        assert figure in text, figure
    assert "None" not in text
    assert text.isascii()


def test_every_table_row_has_as_many_cells_as_its_head(report: EvalReport) -> None:
    lines = render_markdown(report, _conversion()).splitlines()
    tables, width = 0, 0
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables, width = tables + 1, line.count("|")
            assert line.count("|") == width, line
    assert tables == 10


def test_the_markdown_report_shows_every_part_and_marks_what_is_bad(report: EvalReport) -> None:
    text = render_markdown(report, _conversion())
    for heading in ("Findings", "By position", "Needles by depth", "Associative recall (MQAR)", "Attention", "Tasks", "Side by side"):
        assert f"\n## {heading}\n" in text, heading
    assert "| 1 **bad** | 0.750 | 0.500 | 1.50 / 2.50 | - |" in text
    assert "| tiny_qa **bad** | acc | 0 | 40 | 0.600 +- 0.050 | 0.200 +- 0.050 | 0.250 |" in text
    assert "- **bad** fidelity, layer 1: The attention output of layer 1 is off by 0.75" in text
    assert "> *Prompt*: Hello there" in text
    assert "**Student**: \\| c" in text
    first = next(row for row in report.needles if row.name == "student")
    assert f"| 480 | student | {first.accuracy:.2f}" in text


def test_the_terminal_colours_the_rows_with_findings(report: EvalReport) -> None:
    console = Console(width=160, record=True, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(render_table(report))
    lines = console.export_text(styles=True).splitlines()
    (task,) = (line for line in lines if "tiny_qa" in line and "acc " in line)
    assert "\x1b[31m" in task
    (teacher,) = (line for line in lines if line.strip().startswith("teacher ") and "[" in line.replace("\x1b[", ""))
    assert "\x1b[31m" not in teacher
    assert any("bad: tasks, tiny_qa: tiny_qa (acc): 0.200" in line for line in lines)


def test_a_report_of_schema_version_1_still_loads(report: EvalReport) -> None:
    new = ("positions", "needles", "mqar", "fidelity", "generation", "tasks", "findings", "recurrent")
    old = {key: value for key, value in report.to_dict().items() if key not in new} | {"schema_version": 1}
    old["quality"] = [{key: value for key, value in row.items() if key != "kl_change"} for row in old["quality"]]
    loaded = EvalReport.from_dict(old)
    assert loaded.passkey == report.passkey
    assert (loaded.positions, loaded.needles, loaded.fidelity, loaded.findings) == ((), (), {}, ())
    assert "## Needles" not in render_markdown(loaded, {})


def test_measuring_again_keeps_the_speed_measurements(report: EvalReport, tmp_path: Any) -> None:
    path, _ = write_report(report, {}, tmp_path)
    assert "bench" not in json.loads(path.read_text())
    row = {"model": "student", "phase": "decode", "batch_size": 2, "length": 64, "cache_bytes": 4096, "peak_memory_bytes": None, "num_repeats": 3}
    row |= {"tokens_per_second": 123.0, "tokens_per_second_min": 120.0, "tokens_per_second_max": 125.0, "seconds_per_token": 0.01, "first_token_seconds": None}
    bench = {"rows": [row], "device": "some GPU", "dtype": "bfloat16"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bench": bench}))
    write_report(report, _conversion(), tmp_path)
    assert json.loads(path.read_text())["bench"] == bench
    text = (tmp_path / "report.md").read_text()
    assert "## Speed and memory" in text
    assert "123" in text
    assert json.loads(path.read_text())["conversion"]["recipe_name"] == "hedgehog"


# ---------------------------------------------------------------- limits


def test_limits_fail_in_the_direction_that_is_worse(report: EvalReport) -> None:
    student = report.quality_of("student")
    assert student.kl is not None
    assert student.agreement is not None
    kl, agreement = student.kl.value, student.agreement.value
    recall = min(row.accuracy for row in report.passkey if row.name == "student")
    check_thresholds(report, parse_thresholds([f"kl={kl + 0.01}", f"agreement={agreement - 0.01}", f"passkey={recall}", "ppl-ratio=1000"]))
    with pytest.raises(AttnConvertError) as error:
        check_thresholds(report, parse_thresholds([f"kl={kl - 0.01}", f"agreement={agreement + 0.01}", f"passkey = {recall + 0.5}", "ppl-ratio=1000"]))
    assert error.value.code == "below-threshold"
    for part in ("kl is ", "the maximum is ", "agreement is ", "the minimum is ", "passkey is "):
        assert part in error.value.message
    assert "ppl-ratio" not in error.value.message


@pytest.mark.parametrize("text", ["speed=3", "kl", "kl=", "kl=low", "kl=nan"])
def test_a_limit_that_cannot_be_read_names_the_choices(text: str) -> None:
    with pytest.raises(AttnConvertError) as error:
        parse_thresholds([text])
    assert error.value.code == "bad-threshold"
    assert "ppl-ratio, kl, agreement, passkey" in (error.value.expected or "")


def test_what_was_not_measured_has_not_passed(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    report = _run(teacher, None, tokenizer, _packed(3, 24), _config())
    with pytest.raises(AttnConvertError, match="kl was not measured; passkey was not measured"):
        check_thresholds(report, parse_thresholds(["kl=9", "passkey=0"]))


def test_a_figure_that_is_not_finite_has_not_passed(report: EvalReport) -> None:
    rows = tuple(replace(row, kl=evaluate.Estimate(math.nan)) if row.name == "student" else row for row in report.quality)
    with pytest.raises(AttnConvertError, match="kl is nan"):
        check_thresholds(replace(report, quality=rows), parse_thresholds(["kl=9"]))


def test_missing_facts_are_left_out(report: EvalReport) -> None:
    text = render_markdown(report, {})
    assert "None" not in text
    assert "## Training" not in text
    assert "## What was converted" not in text
    assert "## Quality" in text


def test_the_terminal_table_shows_intervals_and_ablations(report: EvalReport) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_table(report))
    text = console.export_text()
    kl = report.quality_of("student").kl
    assert kl is not None
    assert kl.ci95 is not None
    assert f"{kl.value:.4f} [{kl.ci95[0]:.4f}, {kl.ci95[1]:.4f}]" in text
    assert "zero-linear-branch" in text
    assert "note: Passkey length" in text


def test_reports_are_written_whole_and_read_back_equal(report: EvalReport, tmp_path: Any) -> None:
    paths = write_report(report, _conversion(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    written = json.loads(paths[0].read_text())
    assert EvalReport.from_dict(written["evaluation"]) == report
    assert written["conversion"]["stages"][0]["layer_errors"] == {"0": 0.5, "1": 0.25}
    assert paths[1].read_text() == render_markdown(report, _conversion())


def test_a_report_that_cannot_be_written_leaves_the_old_one(report: EvalReport, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(report, {}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AttnConvertError, match="No space left on device") as error:
        write_report(report, _conversion(), tmp_path)
    assert error.value.code == "cannot-write"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_folder_is_a_clear_error(report: EvalReport, tmp_path: Any) -> None:
    with pytest.raises(AttnConvertError) as error:
        write_report(report, {}, tmp_path / "absent")
    assert error.value.code == "cannot-write"


def test_figures_that_are_not_finite_are_null_in_json_and_named_in_words(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    report = _run(broken, teacher, tokenizer, _packed(3, 24), _config(lengths=(256,), trials=2))
    json_path, markdown_path = write_report(report, {}, tmp_path)
    data = json.loads(json_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["evaluation"]["quality"][1]["kl"]["value"] is None
    assert "not finite" in markdown_path.read_text()
    kl = EvalReport.from_dict(data["evaluation"]).quality_of("student").kl
    assert kl is not None
    assert math.isnan(kl.value)


def test_a_report_of_another_schema_is_refused(report: EvalReport) -> None:
    with pytest.raises(ValueError, match="schema_version 99"):
        EvalReport.from_dict(report.to_dict() | {"schema_version": 99})


def test_json_safe_unpacks_numpy_and_tuples() -> None:
    assert json_safe({1: (np.float64(2.5), np.int64(3)), "x": [math.inf, True]}) == {"1": [2.5, 3], "x": [None, True]}


def test_text_helpers() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert compact_settings({"a": {"b": 1, "c": None}, "d": True}) == "a.b=1, d=true"
    assert [format_bytes(n) for n in (12, 1536, 47185920, 5 * 2**30)] == ["12 B", "1.5 KiB", "45 MiB", "5 GiB"]
    assert [format_seconds(s) for s in (1.25, 44.2, 200, 7500)] == ["1.2 s", "44 s", "3 min 20 s", "2 h 05 min"]


def test_kinds_of_layers_get_different_letters() -> None:
    rows = [_layer(i, "hedgehog", {"window": {"size": 64 * (i % 2)}}) for i in range(4)]
    assert "hehe" in layer_map(ConversionPlan("llama", tuple(rows)).to_dict())
