"""The command `sparsify` and what the other commands make of its checkpoints: search once, plans from files, reports, cards, parity."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import Log, assert_adapters_merge_into_a_whole_run, error_of, rows_of

from attnconvert import cli, embedded
from attnconvert.convert import pipeline
from attnconvert.convert.load import load_model
from attnconvert.convert.pipeline import Prepared, RunOptions, load_converted, prepare, run
from attnconvert.convert.plan import describe_settings, evaluation_window
from attnconvert.convert.report import describe_rules, span_rules, spans_text
from attnconvert.convert.save import check_parity
from attnconvert.distill import calibration
from attnconvert.kernels.span import decode
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.swap import swap

BUDGET = ("stages.transfer.length=64", "stages.finetune.tokens=0", "stages.finetune.length=64", "evaluate.tokens=512", "evaluate.length=128", "evaluate.passkey_lengths=[192]",
          "evaluate.passkey_trials=2")  # fmt: skip
SEARCH = (
    "layers.0.config.num_sinks=4",
    "layers.0.config.search.lengths=[192,288]",
    "layers.0.config.search.num_samples=2",
    "layers.0.config.search.response_tokens=8",
)
RULES = ("layers.0.config.alphas=[16,0]", "layers.0.config.betas=[0,0.25]", "layers.0.config.num_sinks=4")


@pytest.fixture(scope="module", autouse=True)
def assets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Calibration samples are not kept in the user's cache."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_cache_folder", lambda: folder)
        yield


def prepared(model: str, recipe: str, *more: str) -> Prepared:
    return prepare(model, recipe, overrides=[*BUDGET, *more], family="sparsify")


@pytest.fixture(scope="module")
def searched(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log, pipeline.ConversionResult]:
    """A conversion whose rules come from a search, measured; it was stopped after the search and went on."""
    out = tmp_path_factory.mktemp("searched") / "model"

    def stop(what: str, step: int) -> None:
        if what == "transfer":
            raise KeyboardInterrupt

    first, second = Log(stop), Log()
    ready = prepared(llama, "moa", *SEARCH)
    with pytest.raises(KeyboardInterrupt):
        run(ready, RunOptions(out, device="cpu"), first)
    assert error_of(lambda: run(ready, RunOptions(out, device="cpu"), Log())).code == "unfinished-run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "search_spans", lambda *args, **kwargs: pytest.fail("searched again"))
        return out, second, run(ready, RunOptions(out, device="cpu", resume=True), second)


# ---------------------------------------------------------------- the search


def test_a_resumed_run_uses_the_search_that_was_done_before(searched: Any) -> None:
    out, log, result = searched
    assert "The search for attention spans was done before." in log.notes
    assert not Path(f"{out}.run").exists()
    search = json.loads((out / "report.json").read_text())["conversion"]["search"]
    chosen = search["front"][search["chosen"]]["rules"]
    for row in rows_of(out):
        assert [list(rule) for rule in zip(row["config"]["alphas"], row["config"]["betas"], strict=True)] == chosen[str(row["layer_idx"])]
        assert (row["config"]["num_sinks"], row["config"]["min_length"]) == (4, 192)
    assert result.plan.to_dict()["layers"] == rows_of(out)


def test_a_run_without_training_changes_no_weight(searched: Any, llama: str) -> None:
    out, _, result = searched
    assert [stage.tokens for stage in result.stages] == [0, 0]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (llama, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_reports_say_what_every_head_keeps_and_how_that_was_found(searched: Any) -> None:
    out, *_ = searched
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "| layer | 192 | 288 | windows |" in text
    for row in rows_of(out):
        assert describe_rules(span_rules(row)) in text
    assert re.search(r"searched among \d+ for a density of at most 50%", text)
    assert "closest to the original at 432 tokens" in text
    assert "keys that each KV head keeps after 288 tokens" in page
    assert 'title="layer 1, KV head 1:' in page
    assert "Each KV head of a converted layer sees the first tokens and a window of its own" in page


def test_measuring_again_keeps_the_search_and_compares_the_layers_that_leave_something_out(searched: Any, tmp_path: Path) -> None:
    out, *_ = searched
    assert cli.main(["evaluate-converted", str(out), "--tokens", "512", "--fidelity", "--device", "cpu", "--quiet"]) == 0
    document = json.loads((out / "report.json").read_text())
    assert document["conversion"]["search"] is not None
    found = document["evaluation"]["fidelity"]
    assert sorted([*found["unreached"], *(layer["layer_idx"] for layer in found["layers"])]) == [0, 1]
    assert document["evaluation"]["window"] is None
    assert not [finding for finding in document["evaluation"]["findings"] if finding["section"] == "state"]
    assert cli.main(["card", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "an attention span of its own for each key-value head in all 2 layers (`moa`)" in card
    assert "| layer | 192 | 288 | windows |" in card
    assert "recurrent" not in card
    assert "exact window" not in card


def test_a_finished_plan_is_shown_and_drawn(searched: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, *_ = searched
    picture = tmp_path / "spans.png"
    assert cli.main(["plan", str(out), "--heat-map", str(picture)]) == 0
    shown = capsys.readouterr()
    assert "Plan (2 layers, llama)" in shown.out
    assert "Keys kept after 512 tokens" in shown.out
    assert "--recipe and --set change nothing" in shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plan", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["layers"] == rows_of(out)


def test_speed_and_comparison_take_such_a_model(searched: Any, llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, *_ = searched
    measure = ["bench", str(out), "--lengths", "64,256", "--new-tokens", "4", "--max-seconds", "0.1", "--device", "cpu", "--quiet"]
    assert cli.main([*measure, "--out", str(tmp_path / "bench")]) == 0
    assert cli.main(["compare", str(out)]) == 0
    assert "moa 2" in capsys.readouterr().out


def test_text_is_written_after_a_long_prompt_from_a_smaller_cache(searched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out, *_ = searched
    prompt = "the old captain looked at the sea and said nothing " * 40
    assert cli.main(["generate", str(out), prompt, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    tokens, ours, theirs = re.search(r"(\d+) \+ 4 tokens.*cache ([\d.]+) KiB \(softmax attention: ([\d.]+) KiB\)", capsys.readouterr().err).groups()  # type: ignore[union-attr]
    assert int(tokens) > 400
    assert float(ours) < 0.75 * float(theirs)


def test_plans_that_cannot_be_drawn_say_why(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    picture = ["--heat-map", str(tmp_path / "spans.png")]
    settings = [word for setting in (*SEARCH, *BUDGET) for word in ("--set", setting)]
    assert cli.main(["plan", llama, "--recipe", "moa", *settings, *picture]) == 1
    assert "error[no-spans]" in capsys.readouterr().err

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    settings = [word for setting in ("layers.0.config.alphas=16", *BUDGET) for word in ("--set", setting)]
    assert cli.main(["plan", llama, "--recipe", "streaming-llm", *settings, *picture]) == 1
    assert "attnconvert[plots]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- rules that are given


@pytest.mark.usefixtures("quick")
def test_one_window_for_all_heads_needs_no_search(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "search_spans", lambda *args, **kwargs: pytest.fail("searched"))
    ready = prepared(llama, "streaming-llm", "layers.0.config.alphas=12")
    result = run(ready, RunOptions(tmp_path / "model", device="cpu"), Log())
    assert {(row.config["alphas"], row.config["betas"]) for row in result.plan.layers} == {(12, 0.0)}
    assert result.report is not None
    assert result.report.window == 12
    assert result.report.recurrent
    assert not [finding for finding in result.report.findings if finding["section"] == "state"]  # it grows until the window is full, and then no more
    assert "| 0 | 1 | 0 | 0 | window 12 |" in (tmp_path / "model" / "report.md").read_text()


def test_the_window_of_an_evaluation_is_known_where_all_spans_are_one() -> None:
    def window(*rules: tuple[Any, Any]) -> int | None:
        rows = (LayerPlan(idx, str(idx), 4, 2, 8, "moa", {"alphas": alphas, "betas": betas, "num_sinks": 4}) for idx, (alphas, betas) in enumerate(rules))
        return evaluation_window(ConversionPlan("llama", tuple(rows)))

    assert window((12, 0.0), ([12, 12], [0.0, 0.0])) == 12
    assert window((12, 0.0), ([12, 30], [0.0, 0.0])) is None  # a key 20 back is seen by some heads only, and losing it proves nothing
    assert window((12, 0.5)) is None
    assert window((None, None)) is None


def test_a_plan_file_gives_the_rules(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"alphas": [[16, 16, 0, 0], [32] * 4], "betas": [[0, 0, 0.5, 0.5], [0.25] * 4]}))
    ready = prepared(llama, "moa", f"layers.0.config.plan={path}")
    assert [(row.config["alphas"], row.config["betas"]) for row in ready.plan.layers] == [([16, 0], [0.0, 0.5]), ([32, 32], [0.25, 0.25])]
    assert any("at the end of an input both are the same" in note for note in ready.notes)
    assert ready.estimate.total("state_bytes_after") < ready.estimate.total("state_bytes_before")


def test_a_plan_file_of_another_model_is_refused_before_a_model_is_loaded(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"alphas": [[16] * 4] * 3, "betas": [[0] * 4] * 3}))
    assert error_of(lambda: prepared(llama, "moa", f"layers.0.config.plan={path}")).code == "plan-file-shape"


@pytest.mark.parametrize("setting", ["lengths=[192,4096]", "validation_length=600"])
def test_contexts_beyond_the_model_are_refused_with_a_setting_that_fits(llama: str, setting: str) -> None:
    wrong = (*SEARCH, f"layers.0.config.search.{setting}")
    error = error_of(lambda: prepared(llama, "moa", *wrong))
    assert error.code == "length-too-long"
    found = re.fullmatch(r"`--set (.*)`", str(error.hint))
    assert found is not None
    assert prepared(llama, "moa", *wrong, found[1]).plan.converted


@pytest.mark.parametrize("recipe", ["moa", "streaming-llm", "duo-attention"])
def test_the_embedded_model_gets_spans_that_leave_something_out(recipe: str) -> None:
    ready = prepare("demo", recipe, family="sparsify")
    assert "small budget" in ready.notes[0]
    assert ready.estimate.total("state_bytes_after") <= 0.5 * ready.estimate.total("state_bytes_before")
    config: Any = ready.recipe.recipe.layers[0].config
    assert config.num_sinks == 4
    assert config.alphas == (64 if recipe == "streaming-llm" else None)
    assert config.search.candidates == (((64, 0), (0, 1)) if recipe == "duo-attention" else None)
    assert max(config.search.lengths) == (8192 if recipe == "streaming-llm" else 512)
    assert prepare("demo", recipe, overrides=["layers.0.config.num_sinks=9"]).plan.layers[0].config["num_sinks"] == 9


def test_the_demo_budget_finds_the_rule_with_spans() -> None:
    config = {"alphas": None, "search": {"candidates": ((512, 0.0), (64, 0.0), (0, 1.0))}}
    small = embedded.demo_overrides([("", {}), ("sparsify", config), ("sparsify", {"of": "another method"})])
    assert [setting for setting in small if setting.startswith("layers.")] == [
        f"layers.1.config.{setting}"
        for setting in (
            "num_sinks=4",
            "search.lengths=[256,512]",
            "search.num_samples=8",
            "search.response_tokens=32",
            "search.candidates=[[64, 0.0], [0, 1.0]]",
        )
    ]


def test_one_number_may_go_with_one_for_every_head(llama: str) -> None:
    ready = prepared(llama, "moa", "layers.0.config.alphas=16", "layers.0.config.betas=[0,0.25]")
    assert describe_settings(ready.plan.layers[0]) == "windows 1 x 16, 1 x 0.25 N + 16, 64 sinks"
    assert evaluation_window(ready.plan) is None
    assert spans_text(ready.plan.to_dict(), None)


# ---------------------------------------------------------------- blocks

BLOCKS = ("layers.0.config.block_size=32", "layers.0.config.window_size=32", "layers.0.config.topk=3", "layers.0.config.dense_len=0", "data.align=32")


@pytest.mark.usefixtures("quick")
def test_blocks_are_chosen_measured_and_reported_after_training_on_rows_of_two_lengths(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = ("stages.finetune.length=512", "stages.finetune.lengths=[256,512]", "stages.finetune.tokens=2048", "stages.finetune.batch_size=2")
    ready = prepared(llama, "infllm-v2", *BLOCKS, *training, "stages.finetune.lora.rank=2")
    assert ready.estimate.total("state_bytes_before") < ready.estimate.total("state_bytes_after") < 1.05 * ready.estimate.total("state_bytes_before")
    assert ready.estimate.total("flops_after") < 0.7 * ready.estimate.total("flops_before")
    out = tmp_path / "model"
    result = run(ready, RunOptions(out, device="cpu"), Log())
    assert [stage.tokens for stage in result.stages] == [0, 2048]
    assert result.report is not None
    assert result.report.recurrent is False
    assert result.report.window is None
    kept = {"block_size": 32, "init_blocks": 1, "window_size": 32, "topk": 3, "dense_len": 0, "scorer": "compressed"}
    assert [row["config"] for row in rows_of(out)] == [kept, kept]
    data = json.loads((out / "report.json").read_text())["conversion"]["data"]
    assert {length: (part["train"]["length"], part["train"]["rows"]) for length, part in data["lengths"].items()} == {"256": (256, 4), "512": (512, 2)}
    assert data["train"]["tokens"] == 2048
    page = (out / "report.html").read_text()
    assert "each token sees the first blocks, the nearest, and those that score best for it" in page
    assert cli.main(["card", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "softmax attention to the blocks of keys that score best for each token" in card
    assert "zhao2025infllmv2" in card
    capsys.readouterr()
    assert cli.main(["plan", str(out)]) == 0
    assert "blocks of 32: 1 first, 2 nearest, 1 chosen" in capsys.readouterr().out
    assert cli.main(["tune-switch", str(out), "--lengths", "256", "--device", "cpu", "--dry-run"]) == 0
    assert "Nothing was written." in capsys.readouterr().out
    assert cli.main(["generate", str(out), "the old captain looked at the sea " * 30, "--max-new-tokens", "4", "--device", "cpu"]) == 0


def test_settings_of_blocks_come_from_a_minicpm_config(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"sparse_config": {"block_size": 64, "topk": 8, "window_size": 128, "init_blocks": 1, "dense_len": -1, "kernel_size": 32}}))
    setting = f"layers.0.config.sparse_config={path}"
    row = prepared(llama, "infllm-v2", "stages.finetune.lengths=null", setting).plan.layers[0]
    assert row.config == {"block_size": 64, "init_blocks": 1, "window_size": 128, "topk": 8, "dense_len": 0, "scorer": "compressed"}
    path.write_text(json.dumps({"sparse_config": {"topk": 8, "kernel_size": 16}}))
    error = error_of(lambda: prepared(llama, "infllm-v2", "stages.finetune.lengths=null", setting))
    assert "kernel_size 16 is not supported, only 32" in error.render()


def test_documents_that_do_not_begin_where_blocks_do_are_noted(llama: str) -> None:
    settings = ("stages.finetune.tokens=1k", "stages.finetune.length=256", "stages.finetune.lengths=null", "layers.0.config.block_size=128")
    assert "`--set data.align=128`" in prepared(llama, "infllm-v2", *settings).notes[-1]
    assert prepared(llama, "infllm-v2", *settings, "data.align=128").notes == ()
    assert prepared(llama, "infllm-v2", *settings, "stages.finetune.tokens=0").notes == ()


@pytest.mark.parametrize("recipe", ["infllm-v2", "moba"])
def test_the_embedded_model_gets_blocks_that_leave_something_out(recipe: str) -> None:
    ready = prepare("demo", recipe, family="sparsify")
    assert describe_settings(ready.plan.layers[0]) == {
        "infllm-v2": "blocks of 32: 1 first, 3 nearest, 2 chosen",
        "moba": "blocks of 32: 0 first, 1 nearest, 5 chosen by mean keys",
    }[recipe]  # fmt: skip
    assert ready.recipe.recipe.stages.finetune.lengths is None


# ---------------------------------------------------------------- saving


def with_rules(llama: str, *more: str) -> Any:
    ready = prepared(llama, "moa", *(more or RULES))
    model = load_model(ready.source).model
    swap(model, ready.plan)
    return model.eval()


LONG = ("layers.0.config.alphas=[2044,-512]", "layers.0.config.betas=[0,0.75]", "layers.0.config.num_sinks=256", "layers.0.config.min_length=2048")


@pytest.mark.parametrize("rules", [RULES, LONG], ids=["short", "thousands of tokens"])
def test_all_ways_to_run_a_model_with_spans_agree(llama: str, rules: tuple[str, ...]) -> None:
    model = with_rules(llama, *rules)
    core: Any = next(module.core for _, _, module in converted_sites(model))
    before = (core.alphas, core.betas, core.leasts, core.min_length, core.num_sinks)
    found = check_parity(model)
    assert max(found.errors.values()) < found.tolerance / 10
    assert found.num_tokens < 256
    assert (core.alphas, core.betas, core.leasts, core.min_length, core.num_sinks) == before


def shifted_ring(*args: Any, real: Any = decode._slots) -> Any:
    """Positions behind the sinks lie one slot further on than where they are looked for."""
    layout, head, position = args
    return real(layout, head, torch.where(position < layout.num_sinks, position, position + 1))


@pytest.mark.parametrize("rules", [RULES, LONG], ids=["short", "thousands of tokens"])
def test_a_planted_error_of_the_ring_fails_the_parity_check(llama: str, rules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_rules(llama, *rules)
    monkeypatch.setattr(decode, "_slots", shifted_ring)
    error = error_of(lambda: check_parity(model))
    assert error.code == "parity-failed"
    assert "prefill + decode steps" in error.message


def test_a_window_that_is_one_key_short_after_the_prefill_fails_the_parity_check(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only queries whose span has left keys behind can tell: rules of thousands of tokens are shortened for the check."""
    model = with_rules(llama, *LONG)
    real = decode.attend
    monkeypatch.setattr(decode, "attend", lambda *args, **options: real(*args, **{**options, "alpha": options["alpha"] - 1, "least": options["least"] - 1}))
    assert error_of(lambda: check_parity(model)).code == "parity-failed"


@pytest.mark.usefixtures("quick")
def test_adapters_of_a_model_with_spans_merge_into_what_a_whole_run_saves(llama: str, tmp_path: Path) -> None:
    ready = prepared(llama, "moa", *RULES, "stages.finetune.tokens=512", "stages.finetune.batch_size=1", "stages.finetune.lora.rank=2")
    merged = assert_adapters_merge_into_a_whole_run(ready, tmp_path)
    core: Any = load_converted(tmp_path / "merged").model.layers[0].self_attn.core
    assert core.alphas == (16, 0)
    stock = load_file(Path(llama) / "model.safetensors")
    assert any(not torch.equal(stock[name], merged[name]) for name in stock)  # it was trained
