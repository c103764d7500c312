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
from attnconvert.convert.mix_heads import (
    allocated,
    calibrate_units,
    measure_losses,
    measure_usage,
    most_important,
    start_routers,
    uncalibrated,
    with_active,
    with_shared_units,
)
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
HEADS = ("layers.0.config.unit=query_head", "layers.0.config.shared=0.5", "layers.0.config.allocate=even")


def prepared(model: str, *more: str) -> Prepared:
    return prepare(model, "moh", overrides=[*BUDGET, *HEADS, *more], family="mix-heads")


@pytest.fixture(scope="module")
def mixed(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log, pipeline.ConversionResult]:
    """A conversion whose shared heads and routers come from calibration, measured beside the baseline; it was stopped in the second step of finetuning and went on."""
    out = tmp_path_factory.mktemp("mixed") / "model"

    def stop(what: str, step: int) -> None:
        if (what, step) == ("finetune", 2):
            raise KeyboardInterrupt

    ready, log = prepared(llama, "layers.0.config.anneal=0.5", "stages.finetune.balance=0.01"), Log()
    with pytest.raises(KeyboardInterrupt):
        run(ready, RunOptions(out, device="cpu"), Log(stop))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "calibrate_heads", lambda *args: pytest.fail("chosen again"))
        return out, log, run(ready, RunOptions(out, device="cpu", resume=True), log)


# ---------------------------------------------------------------- calibration


def text_rows(tokens: int = 40, rows: int = 3) -> PackedRows:
    ids = torch.randint(3, 200, (rows, tokens), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    return PackedRows(ids, torch.arange(tokens, dtype=torch.int32).expand_as(ids).contiguous())


@pytest.mark.parametrize("units", [2, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_calibration_measures_what_a_unit_adds_to_the_output_and_estimates_it_from_the_input(family: str, units: int) -> None:
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
    inputs: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    other = attention.register_forward_pre_hook(
        lambda module, args, options: inputs.append(options.get("hidden_states", args[0] if args else None)), with_kwargs=True
    )
    with torch.no_grad():
        for at in range(3):
            batch = rows.rows([at])
            model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        handle.remove()
        other.remove()
        want = []
        for unit in range(units):
            x = torch.cat(seen, 1)[0]
            only = torch.zeros_like(x)
            width = 32 // units
            only[:, unit * width : (unit + 1) * width] = x[:, unit * width : (unit + 1) * width]
            want.append((projection(only) - projection(torch.zeros_like(x))).norm(dim=-1))
    norms, x = torch.stack(want, 1).double(), torch.cat(inputs, 1)[0].double()
    found = calibrate_units(model, sites, {1: units}, rows, 0, lambda *args: None)
    assert list(found) == [1]
    assert found[1].importance == pytest.approx(norms.mean(0).tolist(), rel=1e-5)
    # Ridge regression as least squares with rows for the penalty.
    centred, y = x - x.mean(0), norms.log()
    penalty = (mix_heads.RIDGE * centred.square().sum(0).mean()).sqrt()
    weight = torch.linalg.lstsq(torch.cat([centred, penalty * torch.eye(32)]).double(), torch.cat([y - y.mean(0), torch.zeros(32, units)]).double()).solution
    estimate = y.mean(0) + centred @ weight
    torch.testing.assert_close(x @ found[1].weight.double().T + found[1].bias.double(), estimate, rtol=1e-3, atol=1e-3)
    assert found[1].explained == pytest.approx((1 - (y - estimate).square().sum(0) / (y - y.mean(0)).square().sum(0)).mean().item(), abs=1e-3)
    assert 0.1 < found[1].explained < 1
    assert not projection._forward_pre_hooks
    assert not attention._forward_pre_hooks
    again = calibrate_units(model, sites, {1: units}, rows, 0, lambda *args: None)[1]
    assert torch.equal(again.weight, found[1].weight)
    assert torch.equal(again.bias, found[1].bias)


def test_one_token_that_adds_nothing_does_not_decide_what_routers_estimate() -> None:
    """As the first token of many models, whose value is all but zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**COMMON, "vocab_size": 256})).eval()
    rows, sites = text_rows(), find_sites(model.config)
    want = calibrate_units(model, sites, {0: 4}, rows, 0, lambda *args: None)[0]
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * (torch.arange(40) > 0)[None, :, None],), prepend=True)
    found = calibrate_units(model, sites, {0: 4}, rows, 0, lambda *args: None)[0]
    assert found.weight.isfinite().all()
    assert (found.bias - want.bias).abs().max() < 1


def test_the_most_important_units_are_shared_and_of_equals_the_first() -> None:
    assert most_important({0: [1.0, 3.0, 2.0, 3.0], 4: [1.0, 1.0, 1.0, 1.0]}, {0: 2, 4: 3}) == {0: [1, 3], 4: [0, 1, 2]}


def test_units_are_allocated_with_the_least_sum_of_losses() -> None:
    g = torch.Generator().manual_seed(3)
    losses = {idx: dict(enumerate(torch.rand(4, generator=g).tolist(), start=1)) for idx in (0, 2, 5)}
    for total in (3, 7, 12):
        found = allocated(losses, total)
        assert sum(found.values()) == total
        every = [(a, b, c) for a in range(1, 5) for b in range(1, 5) for c in range(1, 5) if a + b + c == total]
        assert sum(losses[idx][used] for idx, used in found.items()) == pytest.approx(min(losses[0][a] + losses[2][b] + losses[5][c] for a, b, c in every))


def test_the_loss_of_a_layer_is_that_of_the_converted_model_with_all_others_as_they_were(llama: str) -> None:
    from attnconvert.surgery.runtime.modeling import teacher_mode

    ready = prepared(llama, "layers.0.config.allocate=calibration", "layers.0.config.shared=0.25")
    wanted, facts, rows = uncalibrated(ready.recipe.recipe, ready.plan, ready.sites), calibrated(ready), text_rows()
    assert {idx: own.used for idx, own in wanted.items()} == {0: 3, 1: 3}
    plan = with_shared_units(ready.plan, {0: [2], 1: [0]})
    dense = load_model(ready.source).model.eval()
    found = measure_losses(dense, ready.sites, plan, wanted, facts, rows, 0, lambda *args: None)
    assert {idx: sorted(own) for idx, own in found.items()} == {0: [2, 3, 4], 1: [2, 3, 4]}
    batch = rows.rows(range(3))
    model = load_model(ready.source).model.eval()
    swap(model, with_active(plan, {0: 2, 1: 3}))
    start_routers(model, {idx: (own.weight, own.bias) for idx, own in facts.items()})
    for idx, used in ((0, 2), (1, 3)):
        with torch.no_grad(), teacher_mode(model, [1 - idx]):
            ours, theirs = (m(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.log_softmax(-1) for m in (model, dense))
        kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
        assert found[idx][used] == pytest.approx(kl, rel=1e-3)
        assert kl > 1e-6
    assert found[0][4] == found[1][4] == 0


def test_units_by_layer_are_those_of_the_plan_and_as_many_on_average(llama: str, tmp_path: Path) -> None:
    ready = prepared(
        llama, "layers.0.config.allocate=calibration", "layers.0.config.shared=0", "layers.0.config.active=0.5", "evaluate.same_data_baseline=false"
    )
    run(ready, RunOptions(tmp_path / "model", device="cpu", skip_evaluation=True), Log())
    facts = json.loads((tmp_path / "model" / "attnconvert" / "run.json").read_text())["heads"]
    assert facts["used"] == {
        str(idx): used for idx, used in allocated({int(i): {int(k): v for k, v in own.items()} for i, own in facts["losses"].items()}, 4).items()
    }
    cores = {str(idx): module.core.target for idx, _, module in converted_sites(load_converted(tmp_path / "model"))}
    assert cores == facts["used"]


def test_only_what_the_recipe_leaves_open_is_calibrated(llama: str) -> None:
    def wanted(*settings: str) -> Any:
        ready = prepared(llama, *(f"layers.0.config.{setting}" for setting in settings))
        return uncalibrated(ready.recipe.recipe, ready.plan, ready.sites)

    assert wanted() == {0: (4, 2, True, None), 1: (4, 2, True, None)}
    assert wanted("router=norm") == {0: (4, 2, False, None), 1: (4, 2, False, None)}
    assert wanted("choose_shared=first") == wanted("shared_units=[1]") == wanted("shared=0") == {0: (4, 0, True, None), 1: (4, 0, True, None)}
    assert wanted("choose_shared=first", "router=norm") == wanted("shared=0", "router=learned") == wanted("shared=0", "active=1") == {}


def test_calibration_without_text_is_refused_before_a_model_is_loaded(llama: str) -> None:
    none, norm, first = "stages.finetune.tokens=0", "layers.0.config.router=norm", "layers.0.config.choose_shared=first"
    error = error_of(lambda: prepared(llama, none))
    assert error.code == "no-calibration"
    assert "the routers of layers 0-1 are fitted and the shared units of layers 0-1 are chosen by their outputs on training text" in error.message
    assert error.hint == f"`--set {norm} --set {first}`"
    assert error_of(lambda: prepared(llama, none, first)).hint == f"`--set {norm}`"
    assert error_of(lambda: prepared(llama, none, norm)).hint == f"`--set {first}`"
    assert prepared(llama, none, norm, first).plan.converted
    hint = error_of(lambda: prepared(llama, none, first, "layers.0.config.allocate=calibration")).hint
    assert hint == f"`--set {norm} --set layers.0.config.allocate=even`"
    assert (
        "measures what layers lose by the router output_norm, not norm"
        in error_of(lambda: prepared(llama, norm, "layers.0.config.allocate=calibration")).message
    )


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
    explained = document["conversion"]["heads"]["explained"]
    assert f"the routers explain {min(explained.values()):.0%} to {max(explained.values()):.0%} of the variance" in text
    assert "moh (unit=query_head, active=0.75, shared=0.5, router=output_norm, gates=hard, anneal=0.5): 2 of 2 layers" in text
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
    assert set(document["conversion"]["heads"]) == {"importance", "explained", "usage"}


def test_use_of_heads_is_drawn(mixed: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from attnconvert.convert.plots import draw_heads

    out, *_ = mixed
    conversion = json.loads((out / "report.json").read_text())["conversion"]
    assert draw_heads(head_usage(conversion["plan"], conversion["heads"]), tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_routers_start_with_what_calibration_found_when_they_are_not_trained_and_a_run_is_resumed(llama: str, tmp_path: Path) -> None:
    """Then no training state has them."""
    ready = prepared(llama, "stages.finetune.train_cores=false", "evaluate.same_data_baseline=false")

    def stop(what: str, step: int) -> None:
        if (what, step) == ("finetune", 1):
            raise KeyboardInterrupt

    options = RunOptions(tmp_path / "model", device="cpu", dtype="bf16", resume=True, skip_evaluation=True)
    with pytest.raises(KeyboardInterrupt):
        run(ready, options, Log(stop))
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "calibrate_heads", lambda *args: pytest.fail("calibrated again"))
        real = pipeline.start_routers
        patch.setattr(pipeline, "start_routers", lambda model, maps: (found.append(maps), real(model, maps)))
        run(ready, options, Log())
    model = load_converted(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    for idx, _, module in converted_sites(model):
        weight, bias = found[0][idx]
        routed = list(module.core.routed)
        assert module.core.routed_map.dtype == torch.float32
        assert torch.equal(module.core.routed_map, weight[routed])
        assert torch.equal(module.core.routed_bias, bias[routed])


@pytest.mark.usefixtures("quick")
def test_adapters_merge_into_what_a_whole_run_saves(llama: str, tmp_path: Path) -> None:
    ready = prepared(llama)
    assert_adapters_merge_into_a_whole_run(ready, tmp_path)
    core: Any = load_converted(tmp_path / "merged").model.layers[0].self_attn.core
    assert list(core.shared) == rows_of(tmp_path / "merged")[0]["config"]["shared_units"]


# ---------------------------------------------------------------- parity


def calibrated(ready: Prepared) -> Any:
    return calibrate_units(load_model(ready.source).model, ready.sites, {0: 4, 1: 4}, text_rows(), 0, lambda *args: None)


def with_heads(llama: str, *more: str) -> Any:
    ready = prepared(llama, *more)
    model = load_model(ready.source).model
    swap(model, with_shared_units(ready.plan, {0: [1, 2], 1: [0, 3]}))
    start_routers(model, {idx: (facts.weight, facts.bias) for idx, facts in calibrated(ready).items()})
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
    assert describe_settings(ready.plan.layers[0]) == "6 of 8 KV heads a token, none of them always, router output_norm, hard gates"
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
    calibrate_units(model, find_sites(model.config), {0: 2}, text_rows(), 0, lambda *args: seen.append(args))
    assert seen == [("calibration", 1, 2), ("calibration", 2, 2)]
