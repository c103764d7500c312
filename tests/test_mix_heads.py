"""The command `mix-heads` and what the other commands make of its checkpoints: shared units chosen once, use of the heads, the baseline, reports, cards, parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import COMMON
from test_pipeline import Log, assert_adapters_merge_into_a_whole_run, error_of, rows_of

from attnconvert import cli
from attnconvert.convert import mix_heads, pipeline
from attnconvert.convert.load import load_model
from attnconvert.convert.mix_heads import measure_importance, measure_usage, most_important, undecided_units, with_shared_units
from attnconvert.convert.pipeline import Prepared, RunOptions, load_converted, prepare, run
from attnconvert.convert.plan import describe_settings
from attnconvert.convert.report import head_usage, heads_text
from attnconvert.convert.save import check_parity
from attnconvert.distill.data import PackedRows
from attnconvert.surgery.runtime import heads
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import swap

BUDGET = ("stages.transfer.length=64", "stages.finetune.tokens=1024", "stages.finetune.length=64", "stages.finetune.batch_size=4", "stages.finetune.lora.rank=2", "evaluate.tokens=512",
          "evaluate.length=128", "evaluate.passkey_lengths=[192]", "evaluate.passkey_trials=2")  # fmt: skip
HEADS = ("layers.0.config.unit=query_head",)


def prepared(model: str, *more: str) -> Prepared:
    return prepare(model, "moh", overrides=[*BUDGET, *HEADS, *more], family="mix-heads")


@pytest.fixture(scope="module")
def mixed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log, pipeline.ConversionResult]:
    """A conversion whose shared heads come from calibration, measured beside the baseline; it was stopped in the second step of finetuning and went on."""
    out = tmp_path_factory.mktemp("mixed") / "model"

    def stop(what: str, step: int) -> None:
        if (what, step) == ("finetune", 2):
            raise KeyboardInterrupt

    ready, log = prepared(llama), Log()
    with pytest.raises(KeyboardInterrupt):
        run(ready, RunOptions(out, device="cpu"), Log(stop))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure_importance", lambda *args: pytest.fail("chosen again"))
        return out, log, run(ready, RunOptions(out, device="cpu", resume=True), log)


# ---------------------------------------------------------------- which units are shared


def text_rows(tokens: int = 40, rows: int = 3) -> PackedRows:
    ids = torch.randint(3, 200, (rows, tokens), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    return PackedRows(ids, torch.arange(tokens, dtype=torch.int32).expand_as(ids).contiguous())


@pytest.mark.parametrize("units", [2, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_importance_is_the_mean_size_of_what_a_unit_adds_to_the_output(family: str, units: int) -> None:
    torch.manual_seed(0)
    config = {
        "llama": transformers.LlamaConfig(**{**COMMON, "vocab_size": 256}),
        "gpt2": transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }[family]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    sites, rows = find_sites(model.config), text_rows()
    attention = model.get_submodule(sites[1].path)
    projection = attention.o_proj if family == "llama" else attention.c_proj
    seen: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for at in range(3):
            batch = rows.rows([at])
            model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        handle.remove()
        want = []
        for unit in range(units):
            x = torch.cat(seen, 1)[0]
            only = torch.zeros_like(x)
            width = 32 // units
            only[:, unit * width : (unit + 1) * width] = x[:, unit * width : (unit + 1) * width]
            want.append((projection(only) - projection(torch.zeros_like(x))).norm(dim=-1).mean().item())
    found = measure_importance(model, sites, {1: units}, rows, 0, lambda *args: None)
    assert list(found) == [1]
    assert found[1] == pytest.approx(want, rel=1e-5)
    assert not projection._forward_pre_hooks


def test_the_most_important_units_are_shared_and_of_equals_the_first() -> None:
    assert most_important({0: [1.0, 3.0, 2.0, 3.0], 4: [1.0, 1.0, 1.0, 1.0]}, {0: 2, 4: 3}) == {0: [1, 3], 4: [0, 1, 2]}


def test_only_what_the_recipe_leaves_open_is_calibrated(llama: str) -> None:
    def undecided(*more: str) -> Any:
        ready = prepared(llama, *more)
        return undecided_units(ready.recipe.recipe, ready.plan, ready.sites)

    assert undecided() == {0: (4, 2), 1: (4, 2)}
    assert undecided("layers.0.config.choose_shared=first") == undecided("layers.0.config.shared_units=[1]") == undecided("layers.0.config.shared=0") == {}


def test_calibration_without_text_is_refused_before_a_model_is_loaded(llama: str) -> None:
    error = error_of(lambda: prepared(llama, "stages.finetune.tokens=0"))
    assert error.code == "no-calibration"
    assert error.hint == "`--set layers.0.config.choose_shared=first`"
    assert prepared(llama, "stages.finetune.tokens=0", "layers.0.config.choose_shared=first").plan.converted


def test_kv_heads_that_are_all_used_are_refused_with_what_helps(llama: str) -> None:
    error = error_of(lambda: prepare(llama, "moh"))
    assert error.code == "site-refused"
    assert "0.75 of 2 KV heads is all of them" in error.message


# ---------------------------------------------------------------- a whole run


def test_a_resumed_run_keeps_the_units_that_it_trained_with(mixed: Any) -> None:
    out, log, result = mixed
    importance = json.loads((out / "report.json").read_text())["conversion"]["heads"]["importance"]
    for row in rows_of(out):
        assert row["config"]["shared_units"] == most_important({0: importance[str(row["layer_idx"])]}, {0: 2})[0]
    assert result.plan.to_dict()["layers"] == rows_of(out)
    assert [step for stage, step in log.steps if stage == "finetune"] == [3, 4]
    assert len([stage for stage, _ in log.steps if stage == "finetune of the baseline"]) == 4


def test_the_loss_is_measured_with_the_number_of_units_that_belongs_to_the_step(mixed: Any) -> None:
    out, *_ = mixed
    lines = [json.loads(line) for line in (out / "attnconvert" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["balance"] >= 1 for line in lines)
    assert lines[0]["kl"] < 1e-3 < lines[1]["kl"]  # all heads in the first step of four, all but one from the second on


def test_the_report_has_the_baseline_and_how_tokens_are_spread(mixed: Any) -> None:
    out, _, result = mixed
    assert [(row.name, row.kind) for row in result.report.quality] == [("teacher", "teacher"), ("student", "student"), ("teacher, same data", "other")]
    assert result.report.quality_of("teacher, same data").kl.value < result.report.quality_of("student").kl.value
    document = json.loads((out / "report.json").read_text())
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for idx, shares, shared in head_usage(document["conversion"]["plan"], document["conversion"]["heads"]):
        assert sum(shares) == pytest.approx(3)
        assert all((share == 1) == (unit in shared) or share in (0, 1) for unit, share in enumerate(shares))
        cells = " | ".join(f"{100 * share:.0f}" + ("*" if unit in shared else "") for unit, share in enumerate(shares))
        assert f"| {idx} | {cells} | 25% |" in text
    assert "Calibration chose the shared ones" in text
    assert "moh (unit=query_head, active=0.75, shared=0.5, router=norm, gates=hard, anneal=0.5): 2 of 2 layers" in text
    assert 'title="layer 1, unit 3: used by' in page
    assert "(* = shared, used by all; mean 75%, the rest is skipped)" in page
    assert "balance of the routed heads" in page


def test_usage_is_a_count_of_what_the_saved_model_chooses(mixed: Any) -> None:
    out, *_ = mixed
    model, rows = load_converted(out), text_rows()
    chosen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for idx, _, module in converted_sites(model):
        module.core._route = lambda *args, idx=idx, real=module.core._route: (found := real(*args), chosen[idx].append(found[0]))[0]
    found = measure_usage(model, rows, torch.device("cpu"), lambda *args: None)
    for idx, masks in chosen.items():
        assert found[idx] == pytest.approx(torch.cat(masks).double().mean((0, 1)).tolist())
    assert all(module.core.usage is None for _, _, module in converted_sites(model))
    assert measure_usage(load_model(prepare("demo", "moh").source).model, rows, torch.device("cpu"), lambda *args: None) == {}


def test_a_report_without_use_of_heads_says_nothing_of_it(mixed: Any) -> None:
    out, *_ = mixed
    plan = {"layers": rows_of(out)}
    assert heads_text(plan, None) == heads_text(plan, {"importance": {"0": [1.0] * 4}}) == []


def test_the_other_commands_take_such_a_model(mixed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, *_ = mixed
    assert cli.main(["card", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "softmax attention in which each token uses some of the heads, chosen by a router, in all 2 layers (`moh`)" in card
    assert "jin2024moh" in card
    assert "Routed heads: the held-out tokens that use each unit" in card
    capsys.readouterr()
    assert cli.main(["plan", str(out)]) == 0
    units = rows_of(out)[0]["config"]["shared_units"]
    assert f"3 of 4 query heads a token, 2 of them always ({units[0]}" in capsys.readouterr().out
    measure = ["bench", str(out), "--lengths", "64,256", "--new-tokens", "4", "--max-seconds", "0.1", "--device", "cpu", "--quiet"]
    assert cli.main([*measure, "--out", str(tmp_path / "bench")]) == 0
    assert cli.main(["generate", str(out), "the old captain", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert cli.main(["evaluate-converted", str(out), "--tokens", "512", "--fidelity", "--device", "cpu", "--quiet"]) == 0
    document = json.loads((out / "report.json").read_text())
    assert set(document["conversion"]["heads"]) == {"importance", "usage"}


def test_use_of_heads_is_drawn(mixed: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from attnconvert.convert.plots import draw_heads

    out, *_ = mixed
    conversion = json.loads((out / "report.json").read_text())["conversion"]
    assert draw_heads(head_usage(conversion["plan"], conversion["heads"]), tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("quick")
def test_adapters_merge_into_what_a_whole_run_saves(llama: str, tmp_path: Path) -> None:
    ready = prepared(llama)
    assert_adapters_merge_into_a_whole_run(ready, tmp_path)
    core: Any = load_converted(tmp_path / "merged").model.layers[0].self_attn.core
    assert list(core.shared) == rows_of(tmp_path / "merged")[0]["config"]["shared_units"]


# ---------------------------------------------------------------- parity


def with_heads(llama: str, *more: str) -> Any:
    ready = prepared(llama, *more)
    model = load_model(ready.source).model
    swap(model, with_shared_units(ready.plan, {0: [1], 1: [3]}))
    return model.eval()


def test_all_ways_to_run_a_model_agree(llama: str) -> None:
    model = with_heads(llama)
    found = check_parity(model)
    assert found.dtype == torch.float64
    assert max(found.errors.values()) < found.tolerance / 1000
    assert [module.core.num_active for _, _, module in converted_sites(model)] == [3, 3]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_where_fp64_does_not_fit_all_heads_are_used(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnconvert.convert import save

    seen = set()
    monkeypatch.setattr(save, "_free_memory", lambda device: 0.0)
    real = heads.routed_attention
    monkeypatch.setattr(
        heads, "routed_attention", lambda q, k, v, active, *args, **options: seen.add(bool(active.all())) or real(q, k, v, active, *args, **options)
    )
    assert check_parity(with_heads(llama)).dtype == torch.float32
    assert seen == {True}


def test_a_choice_that_differs_in_decoding_fails_the_parity_check(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = with_heads(llama), heads.span_attention_step
    monkeypatch.setattr(heads, "span_attention_step", lambda *args, active, **options: real(*args, active=active.roll(1, -1), **options))
    error = error_of(lambda: check_parity(model))
    assert error.code == "parity-failed"
    assert "prefill + decode steps" in error.message


# ---------------------------------------------------------------- the embedded model


def test_the_embedded_model_gets_a_small_budget() -> None:
    ready = prepare("demo", "moh", family="mix-heads")
    assert "small budget" in ready.notes[0]
    assert describe_settings(ready.plan.layers[0]) == "6 of 8 KV heads a token, 4 of them always, router norm, hard gates"
    assert ready.estimate.total("flops_after") == 0.75 * ready.estimate.total("flops_before")
    assert any("same-data baseline" in text for text in ready.estimate.assumptions)
    assert ready.recipe.recipe.evaluate.same_data_baseline


def test_maps_of_a_learned_router_are_counted_and_trained_in_transfer(llama: str, tmp_path: Path) -> None:
    learned = (
        "layers.0.config.router=learned",
        "layers.0.config.shared=0.25",
        "layers.0.config.gates=soft",
        "stages.transfer.tokens=2048",
        "stages.transfer.batch_size=4",
    )
    ready = prepared(llama, *learned, "stages.finetune.tokens=0", "evaluate.same_data_baseline=false")
    assert ready.estimate.new_parameters == ready.estimate.trained_parameters == 2 * 32 * (2 + 1 + 3)
    result = run(ready, RunOptions(tmp_path / "model", device="cpu", skip_evaluation=True), Log())
    lines = [json.loads(line) for line in (tmp_path / "model" / "attnconvert" / "metrics.jsonl").read_text().splitlines()]
    assert result.stages[0].tokens == 2048
    assert lines[-1]["loss"] < lines[0]["loss"]
    core: Any = load_converted(tmp_path / "model").model.layers[1].self_attn.core
    assert core.kind_map.abs().max() > 0


def test_calibration_reads_no_more_rows_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix_heads, "CALIBRATION_TOKENS", 50)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**COMMON, "vocab_size": 256}))
    seen: list[tuple[str, int, int]] = []
    measure_importance(model, find_sites(model.config), {0: 2}, text_rows(), 0, lambda *args: seen.append(args))
    assert seen == [("calibration", 1, 2), ("calibration", 2, 2)]
