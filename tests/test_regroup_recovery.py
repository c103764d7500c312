"""Fewer KV heads with training: the source teaches, the new projections learn, and a stock checkpoint comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES
from safetensors.torch import load_file

from attnconvert import cli, embedded
from attnconvert.convert import pipeline
from attnconvert.convert import regroup as regrouping
from attnconvert.convert.card import write_card
from attnconvert.convert.pipeline import RunOptions, prepare, run, run_same_data_baseline
from attnconvert.convert.reevaluate import evaluate_converted
from attnconvert.distill.config import FinetuneConfig, LoraConfig, TransferConfig
from attnconvert.distill.data import PackedRows
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext
from attnconvert.distill.lora import add_lora
from attnconvert.distill.losses import hidden_states
from attnconvert.distill.transfer import run_transfer
from attnconvert.errors import AttnConvertError
from attnconvert.recipes.load import load_recipe
from attnconvert.surgery import regroup as surgery
from attnconvert.surgery.regrouped import RegroupedLayer, remember_sources

STEPS = 8
SMALL = [
    *(f"stages.{stage}.{key}" for stage in ("transfer", "finetune") for key in (f"tokens={STEPS * 128}", "length=64", "batch_size=2", "warmup_steps=2")),
    "stages.finetune.lora.rank=2", "evaluate.tokens=256", "evaluate.length=64", "evaluate.passkey_trials=0",
]  # fmt: skip
SHAPE = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "head_dim": 8,
         "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
SOURCES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=4),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, num_key_value_heads=2),  # norms on queries and keys, grouped already
}


class Log:
    """A RunUI that remembers, and stops the run where it is told to."""

    def __init__(self, stop: Callable[[str, int], None] = lambda what, step: None):
        self.stop, self.phases, self.notes, self.losses = stop, [], [], []

    def on_phase(self, name: str) -> None:
        self.phases.append(name)

    def on_step(self, stage: str, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        self.losses.append((stage, step, metrics["loss"]))
        self.stop(stage, step)

    def on_eval(self, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    def note(self, text: str) -> None:
        self.notes.append(text)


def error_of(call: Callable[[], Any]) -> AttnConvertError:
    with pytest.raises(AttnConvertError) as caught:
        call()
    return caught.value


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models with the embedded tokenizer, as folders."""
    found = {}
    for name, config in SOURCES.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config())
        for parameter in model.parameters():
            parameter.data.mul_(1.0 if parameter.dim() < 2 else 5.0)
        found[name] = tmp_path_factory.mktemp("sources") / name
        model.save_pretrained(found[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(embedded.model_dir() / file, found[name] / file)
    return found


@pytest.fixture(scope="module")
def whole(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log, pipeline.ConversionResult]:
    """One run with nothing skipped."""
    out, log = tmp_path_factory.mktemp("whole") / "model", Log()
    prepared = prepare(str(sources["llama"]), "gqa", overrides=SMALL, family="regroup")
    return out, log, run(prepared, RunOptions(out, command="attnconvert regroup"), log)


# ---------------------------------------------------------------- the whole way


def test_training_leaves_a_stock_checkpoint_with_half_the_heads_and_a_report(whole: Any, sources: dict[str, Path]) -> None:
    out, log, result = whole
    assert log.phases == ["read text", "load model", "swap", "calibrate", "transfer", "finetune", "merge", "save", "evaluate"]
    assert list(out.parent.iterdir()) == [out]
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["num_key_value_heads"]) == ("llama", ["LlamaForCausalLM"], 2)
    assert "auto_map" not in config
    assert not list(out.glob("*.py"))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert type(model) is transformers.LlamaForCausalLM
    before, after = (load_file(folder / "model.safetensors") for folder in (sources["llama"], out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"}
    assert after["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    assert {row.config["num_key_value_heads"] for row in result.plan.layers} == {2}
    assert "4 -> 2 KV heads" in log_of_plan(result)
    assert "attnconvert regroup" in (out / "report.md").read_text()
    assert (out / "report.html").is_file()
    assert result.report.quality_of("student").kl.value > 0


def log_of_plan(result: pipeline.ConversionResult) -> str:
    from attnconvert.convert.plan import describe_settings

    return describe_settings(result.plan.layers[0])


def test_transfer_reports_the_error_of_every_layer(whole: Any) -> None:
    _, log, result = whole
    assert [(stage, step) for stage, step, _ in log.losses] == [(stage, step) for stage in ("transfer", "finetune") for step in range(1, STEPS + 1)]
    assert set(result.stages[0].layer_errors) == {0, 1}
    assert all(0 < error < 1 for error in result.stages[0].layer_errors.values())


def test_a_finished_checkpoint_is_measured_again_from_its_folder_alone(whole: Any, tmp_path: Path) -> None:
    out, _, result = whole
    copy = shutil.copytree(out, tmp_path / "copy")
    report, conversion = evaluate_converted(copy)
    assert report.quality_of("student").ppl.value == pytest.approx(result.report.quality_of("student").ppl.value, rel=1e-6)
    assert conversion["plan"] == result.plan.to_dict()
    run_record = copy / "attnconvert" / "run.json"
    facts = json.loads(run_record.read_text())
    run_record.write_text(json.dumps(facts | {"plan": None}))
    assert error_of(lambda: evaluate_converted(copy)).code == "not-converted"


@pytest.mark.usefixtures("quick")
def test_a_run_interrupted_in_both_stages_ends_with_the_same_bytes_and_losses(whole: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    straight, log, _ = whole
    prepared = prepare(str(sources["llama"]), "gqa", overrides=SMALL)
    losses = []
    for stop_at in (("transfer", 3), ("finetune", 5), None):

        def stop(stage: str, step: int, at: Any = stop_at) -> None:
            if (stage, step) == at:
                raise KeyboardInterrupt

        again = Log(stop)
        if stop_at is None:
            run(prepared, RunOptions(tmp_path / "model", resume=True, skip_evaluation=True), again)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(prepared, RunOptions(tmp_path / "model", resume=bool(losses)), again)
            assert not (tmp_path / "model").exists()
        losses += again.losses
    assert losses == log.losses
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("source", list(SOURCES))
def test_without_tokens_the_result_is_what_regrouping_without_training_writes(source: str, sources: dict[str, Path], tmp_path: Path) -> None:
    name = str(sources[source])
    nothing = [*SMALL, "stages.transfer.tokens=0", "stages.finetune.tokens=0", "layers.0.config.kv_heads=1"]
    result = run(prepare(name, "gqa", overrides=nothing), RunOptions(tmp_path / "trained", skip_evaluation=True), Log())
    assert [stage.skipped is not None for stage in result.stages] == [True, True]
    regrouping.regroup_model(name, 1, tmp_path / "plain", init="svd", calibration="none", tokens=256)
    plain, trained = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "trained"))
    assert plain.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in plain.items())


@pytest.mark.usefixtures("quick")
def test_16_bit_weights_are_trained_in_fp32_and_saved_as_they_were(sources: dict[str, Path], tmp_path: Path) -> None:
    prepared = prepare(str(sources["qwen3"]), "mqa", overrides=[*SMALL, "precision=bf16"])
    result = run(prepared, RunOptions(tmp_path / "model", dtype="bf16", skip_evaluation=True), Log())
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert after["model.layers.1.self_attn.v_proj.weight"].shape == (8, 32)
    assert all(0 < error < 1 for error in result.stages[0].layer_errors.values())


def test_the_baseline_is_the_source_trained_like_the_student(sources: dict[str, Path], tmp_path: Path) -> None:
    prepared = prepare(str(sources["llama"]), "gqa", overrides=SMALL)
    log = Log()
    quality = run_same_data_baseline(prepared, RunOptions(tmp_path / "baseline"), log)
    assert log.losses[0][2] < log.losses[-1][2] * 1.2  # it starts as the teacher, with nothing but cross-entropy to gain
    assert 0 < quality.kl.value < 0.5
    plain = prepare(str(sources["llama"]), "gqa", overrides=[*SMALL, "stages.finetune.train_cores=false"])
    assert run_same_data_baseline(plain, RunOptions(tmp_path / "plain"), Log()).kl.value < quality.kl.value


# ---------------------------------------------------------------- teacher and student


def model_of(family: str) -> Any:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.dim() < 2 else 4.0)
    return model


def regrouped(model: Any, num_key_value_heads: int | None = 1) -> dict[int, RegroupedLayer]:
    """Layers of `model` with fewer heads; None = as many as before."""
    sites = surgery.check_architecture(model.config, [] if num_key_value_heads is None else [num_key_value_heads])
    new = None
    if num_key_value_heads is not None:
        new = surgery.regroup(model, sites, {}, surgery.find_freedom(model, sites), num_key_value_heads, "mean")
    layers = remember_sources(model, sites)
    if new is not None:
        surgery.install(model, new)
    return layers


def packed(num_rows: int = 4, length: int = 32, vocab: int = 64) -> PackedRows:
    """Rows of three documents each."""
    ids = torch.randint(3, vocab, (num_rows, length), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (9, 15, length - 24)]).expand(num_rows, -1).to(torch.int32)
    return PackedRows(ids, positions)


def states(model: Any, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return hidden_states(model, ids, positions)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_the_teacher_is_the_source_whatever_becomes_of_the_student(family: str) -> None:
    model, rows = model_of(family), packed()
    batch = rows.rows([0, 1])
    want = states(model, batch.input_ids, batch.position_ids)
    layers = regrouped(model)
    student = states(model, batch.input_ids, batch.position_ids)
    assert not torch.allclose(student, want, atol=1e-2)
    for layer in layers.values():
        layer.teacher = True
    assert torch.equal(states(model, batch.input_ids, batch.position_ids), want)
    for layer in layers.values():
        for _, parameter in layer.named_parameters():
            parameter.data.add_(1.0)
    assert torch.equal(states(model, batch.input_ids, batch.position_ids), want)
    for layer in layers.values():
        layer.teacher = False
    assert not torch.allclose(states(model, batch.input_ids, batch.position_ids), student, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packed_documents_do_not_see_each_other_in_teacher_and_student(family: str) -> None:
    model = model_of(family)
    layers = regrouped(model)
    batch = packed().rows([0])
    for teacher in (False, True):
        for layer in layers.values():
            layer.teacher = teacher
        together = states(model, batch.input_ids, batch.position_ids)
        for start, stop in ((0, 9), (9, 24), (24, 32)):
            alone = states(model, batch.input_ids[:, start:stop])
            torch.testing.assert_close(together[:, start:stop], alone, atol=1e-4, rtol=1e-4)


def test_with_as_many_heads_as_before_transfer_has_no_error_and_changes_nothing(tmp_path: Path) -> None:
    model = model_of("llama")
    layers = regrouped(model, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TransferConfig(tokens=4 * 64, length=32, batch_size=2, lr=1e-2)
    result = run_transfer(model, layers, packed(), config, RunContext(tmp_path))
    assert result.layer_errors == dict.fromkeys(range(3), 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_transfer_gives_each_layer_the_gradient_of_its_own_error_on_the_teachers_states(tmp_path: Path) -> None:
    model, rows = model_of("llama"), packed()
    layers = regrouped(model)
    batch = rows.rows([0, 1, 2, 3])
    calls = {}
    for idx, layer in layers.items():
        layer.tap = lambda layer, call, y, idx=idx: calls.update({idx: (call, y)})
    states(model, batch.input_ids, batch.position_ids)
    want = {}
    for idx, layer in layers.items():
        layer.tap = None
        call, y = calls[idx]
        with torch.no_grad():
            want[idx] = float((layer(call) - y).square().sum() / y.square().sum())
    config = TransferConfig(tokens=1, length=32, batch_size=4, micro_batch_size=1, lr=1e-4)
    result = run_transfer(model, layers, rows, config, RunContext(tmp_path))
    assert result.layer_errors == pytest.approx(want, rel=1e-5)
    assert min(want.values()) > 0.05
    assert all(model.get_submodule(f"model.layers.{idx}.self_attn") is layer.student for idx, layer in layers.items())


def test_finetuning_starts_from_no_kl_when_the_student_is_the_teacher_and_sees_a_teacher_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_loss(heads: int | None, folder: str) -> float:
        model = model_of("llama")
        layers = regrouped(model, heads)
        wrapped = add_lora(model, [f"model.layers.{i}.self_attn" for i in range(3)], LoraConfig(rank=2, targets=("q", "k", "v", "o", "mlp")), seed=0)
        config = FinetuneConfig(tokens=1, length=32, batch_size=4, kl=1.0, ce=0.0, lr=1e-3)
        return float(run_finetune(wrapped, layers, packed(), config, RunContext(tmp_path / folder)).final_loss)

    assert first_loss(None, "same") == pytest.approx(0.0, abs=1e-6)
    assert first_loss(1, "fewer") > 0.05
    monkeypatch.setattr(RegroupedLayer, "_place", lambda self: None)  # the student teaches itself
    assert first_loss(1, "planted") == pytest.approx(0.0, abs=1e-6)


def test_both_stages_learn(tmp_path: Path) -> None:
    model, log = model_of("llama"), Log()
    layers = regrouped(model)
    run_context = RunContext(tmp_path, progress=log)
    run_transfer(model, layers, packed(), TransferConfig(tokens=30 * 128, length=32, batch_size=4, lr=1e-2, warmup_steps=2), run_context)
    wrapped = add_lora(model, [f"model.layers.{i}.self_attn" for i in range(3)], LoraConfig(rank=2), seed=0)
    run_finetune(wrapped, layers, packed(), FinetuneConfig(tokens=30 * 128, length=32, batch_size=4, kl=1.0, ce=0.0, lr=3e-3, warmup_steps=2), run_context)
    for stage in ("transfer", "finetune"):
        losses = [loss for name, _, loss in log.losses if name == stage]
        assert losses[-1] < 0.6 * losses[0]


# ---------------------------------------------------------------- recipes and mistakes


def test_shipped_recipes_belong_to_the_family_and_say_how_many_heads() -> None:
    for name, heads in (("gqa", 4), ("mqa", 1)):
        plan = prepare("demo", name, family="regroup").plan
        assert regrouping.regrouped_heads(plan) == heads
        assert load_recipe(name).recipe.methods == ("gqa",)
    assert regrouping.regrouped_heads(prepare("demo", "hedgehog").plan) is None


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["layers.0.config.kv_heads=3"], "kv-heads", "one of: 1, 2, 4"),
        (["layers.0.config.kv_heads=8"], "kv-heads", "the model has 8"),
        (["layers.0.config.divide_by=3"], "site-refused", "8 KV heads cannot be divided by 3"),
        (["layers=[{match: [0], method: gqa}]"], "uneven-heads", "8 in layers 1-5, 4 in layers 0"),
        (["layers=[{match: [0], method: gqa}, {match: all, method: gqa, config: {kv_heads: 2}}]"], "uneven-heads", "4 in layers 0, 2 in layers 1-5"),
        (["layers=[{match: [0], method: hedgehog}, {match: all, method: gqa}]"], "uneven-heads", "other attention by hedgehog"),
        (["keep={fraction: 0.3}"], "uneven-heads", "puts 1 layers back"),
        (["stages.transfer.loss=weights"], "no-weight-loss", "layers 0-5"),
    ],
)
def test_what_a_stock_checkpoint_cannot_hold_is_refused_before_anything_is_loaded(overrides: list[str], code: str, says: str) -> None:
    error = error_of(lambda: prepare("demo", "gqa", overrides=overrides))
    assert error.code == code
    assert says in error.render()


def test_a_mistake_in_the_recipe_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: gqa\nname: mine\nlayers:\n  - match: all\n    method: gqa\n    config:\n      init: best\n")
    text = error_of(lambda: load_recipe(path)).render()
    assert "mine.yaml:7" in text
    assert "aligned" in text


def test_adapters_alone_are_refused(tmp_path: Path) -> None:
    prepared = prepare("demo", "gqa")
    assert error_of(lambda: run(prepared, RunOptions(tmp_path / "out", adapters_only=True), Log())).code == "no-adapters-only"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo"], "give --recipe gqa"),
        (["demo", "--kv-heads", "4", "--resume"], "needs --recipe"),
        (["demo", "--kv-heads", "4", "--set", "seed=1"], "needs --recipe"),
        (["demo", "--recipe", "gqa", "--compare-inits"], "without training"),
        (["demo", "--recipe", "gqa", "--calibration", "text"], "--set data.source=TEXT"),
        (["demo", "--recipe", "gqa", "--kv-heads", "4,2"], "one model is trained at a time"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["regroup", *arguments]) == cli.EXIT_USAGE
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_recipe_of_another_family_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["regroup", "demo", "--recipe", "hedgehog"]) == cli.EXIT_ERROR
    assert "use `attnconvert linearize`" in capsys.readouterr().err


def test_a_calibration_text_that_is_not_there_is_reported_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(regrouping, "load_model", lambda *args, **kwargs: pytest.fail("loaded the model"))
    error = error_of(lambda: regrouping.compare_inits("demo", [4], calibration=str(tmp_path / "no.jsonl"), tokens=256))
    assert "no.jsonl" in error.render()


@pytest.mark.usefixtures("quick")
def test_the_command_trains_with_the_heads_and_init_it_is_given(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [word for setting in SMALL for word in ("--set", setting)]
    done = cli.main(
        ["regroup", str(sources["llama"]), "--recipe", "gqa", "--kv-heads", "1", "--init", "mean", "--device", "cpu", "--skip-evaluation", *settings]
    )
    said = capsys.readouterr()
    assert done == 0, said.err
    out = tmp_path / "llama-gqa-kv1"
    row = json.loads((out / "attnconvert" / "run.json").read_text())["plan"]["layers"][0]
    assert row["config"] == {"init": "mean", "grouping": "contiguous", "query_heads": None, "num_key_value_heads": 1}
    assert "vllm serve llama-gqa-kv1" in said.out
    assert "trust_remote_code" not in said.out
    assert cli.interrupted(["regroup", "demo", "--recipe", "gqa"]).endswith("--resume")
    assert cli.interrupted(["regroup", "demo", "--kv-heads", "4"]) == "interrupted"


def test_the_card_of_a_stock_checkpoint_asks_for_no_code(whole: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(whole[0], tmp_path / "copy")
    text = write_card(copy).read_text()
    assert "2 key-value heads in place of 4" in text
    assert "custom_code" not in text
    assert "trust_remote_code" not in text.partition("# ")[2]
