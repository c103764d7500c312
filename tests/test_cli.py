"""The command line: exit codes, what goes to stdout and to stderr, and the texts a user sees. Calls `main`, which catches what a runner would not."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from attnconvert import cli, embedded
from attnconvert.convert import doctor, generate, pipeline
from attnconvert.convert.load import load_model, resolve
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry
from attnconvert.surgery.runtime.cache import CoreCacheLayer

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "yaml", "attnconvert.convert", "attnconvert.surgery")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], (*HEAVY, "pydantic")),
        # typer 0.29 reads the options of a command with pydantic
        (["--version"], HEAVY),
        (["recipes", "--help"], HEAVY),
        (["linearize", "--help"], HEAVY),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], absent: tuple[str, ...]) -> None:
    done = in_a_process(
        f"import sys\nfrom attnconvert.cli import main\ncode = main({arguments!r})\nprint('LOADED', [m for m in {absent!r} if m in sys.modules], code)"
    )
    assert done.stdout.splitlines()[-1] == "LOADED [] 0", done.stdout + done.stderr


def test_help_takes_under_half_a_second() -> None:
    seconds = []
    for _ in range(3):  # the fastest of three: other processes share this machine
        start = time.perf_counter()
        done = in_a_process("from attnconvert.cli import main; main(['--help'])")
        seconds.append(time.perf_counter() - start)
        assert "linearize" in done.stdout
    assert min(seconds) < 0.5, seconds


COMMANDS = (
    "linearize",
    "convert",
    "regroup",
    "sparsify",
    "mix-heads",
    "plan",
    "merge",
    "evaluate-converted",
    "bench",
    "tune-switch",
    "push",
    "card",
    "compare",
    "generate",
    "chat",
    "serve",
    "methods",
    "doctor",
    "recipes",
)


def test_help_names_every_command(capsys: Capture) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert not [command for command in COMMANDS if f" {command} " not in out]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(capsys: Capture, command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Examples:" in out
    assert f"attnconvert {command}" in out.partition("Examples:")[2]


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["linearise", "demo"], "Did you mean 'linearize'?"),
        (["linearize", "demo", "--recip", "hedgehog"], "--recipe"),
        (["linearize"], "Missing argument 'MODEL'"),
        (["convert", "demo"], "--recipe"),
        (["linearize", "demo", "--device", "tpu"], "'tpu' is not one of auto, cpu, cuda, cuda:N"),
        (["linearize", "demo", "--dtype", "int4"], "'int4' is not one of auto, fp32, bf16, fp16"),
        (["evaluate-converted", "x", "--tokens", "many"], "'many' is not a token count"),
        (["generate", "x", "y", "--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["recipes", "show", "hedgehog", "--set", "seed=1"], "--resolved"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_accepted(capsys: Capture, arguments: list[str], said: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert said in err


def test_recipe_typo_exits_1_with_the_place_the_choices_and_the_next_step(capsys: Capture) -> None:
    Path("my.yaml").write_text(
        "name: mine\nlayers:\n  - match: all\n    method: hedghog\nstages:\n  transfer: {tokens: 1M}\n  finetune: {tokens: 1M, lr: -5}\n"
    )
    code, out, err = run(capsys, "linearize", "demo", "--recipe", "my.yaml")
    assert code == 1
    assert out == ""
    assert err == (
        "error[unknown-method]: unknown method 'hedghog'\n"
        "  --> my.yaml:4  layers.0.method\n"
        f"  expected one of: {', '.join([*registry.available(), 'softmax'])}; did you mean 'hedgehog'?\n"
        "hint: `attnconvert methods` lists each method with its options\n"
        "error[invalid-value]: -5 is not accepted\n"
        "  --> my.yaml:7  stages.finetune.lr\n"
        "  expected greater than 0\n"
    )
    assert os.listdir() == ["my.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code_word"),
    [
        (["plan", "./nowhere"], "model-not-found"),
        (["plan", "demo", "--recipe", "hedgehgo"], "unknown-recipe"),
        (["plan", "demo", "--set", "stages.transfer.tokns=1"], "unknown-key"),
        (["methods", "hedgehgo"], "unknown-method"),
        (["merge", "nowhere", "--out", "x"], "not-adapters"),
        (["evaluate-converted", "nowhere"], "not-converted"),
        (["generate", "./nowhere", "hello"], "model-not-found"),
        (["generate", "demo", ""], "empty-prompt"),
        (["generate", "demo", "hello", "--chat"], "no-chat-template"),
        (["generate", "demo", "hello", "--device", "cuda:77"], "no-gpu"),
        (["recipes", "validate", "nowhere.yaml"], "recipe-not-found"),
    ],
)
def test_mistakes_exit_1_with_a_code_and_write_nothing(capsys: Capture, arguments: list[str], code_word: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert err.splitlines()[0].startswith(f"error[{code_word}]: ")
    assert "Traceback" not in err
    assert out.strip() == ""
    assert os.listdir() == []


def _break(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(pipeline, "prepare", broken)


def test_bug_exits_3_with_the_traceback_in_a_log_file(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, RuntimeError("planted"))
    code, out, err = run(capsys, "plan", "demo")
    assert code == 3
    assert out == ""
    assert err.startswith("error[internal]: RuntimeError: planted\n")
    assert "Traceback" not in err
    (log,) = Path.cwd().glob("attnconvert-error-*.log")
    assert str(log) in err
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "command: attnconvert plan demo" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_bug_is_logged_elsewhere_when_the_folder_cannot_be_written(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _break(monkeypatch, RuntimeError("planted"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(elsewhere))
    write_text = Path.write_text

    def refuse_here(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.parent == tmp_path:
            raise PermissionError("read-only")
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse_here)
    code, _, err = run(capsys, "plan", "demo")
    assert code == 3
    (log,) = elsewhere.glob("*.log")
    assert str(log) in err


def test_a_plain_value_error_is_a_bug_not_a_mistake_of_the_user(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, ValueError("planted"))
    assert run(capsys, "plan", "demo")[0] == 3


def test_debug_shows_the_traceback_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, RuntimeError("planted"))
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(RuntimeError, match="planted"):
        cli.main(["plan", "demo"])


def test_full_memory_is_a_mistake_with_a_way_out(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    code, _, err = run(capsys, "plan", "demo")
    assert code == 1
    assert err.startswith("error[out-of-memory]: memory ran out: CUDA out of memory.")
    assert "micro_batch_size=1" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["linearize", "demo", "--out", "a b"], "interrupted; continue with: attnconvert linearize demo --out 'a b' --resume\n"),
        (["linearize", "demo", "--overwrite", "--resume"], "interrupted; continue with: attnconvert linearize demo --resume\n"),
        (["plan", "demo"], "interrupted\n"),
    ],
)
def test_ctrl_c_exits_130_and_says_how_to_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    _break(monkeypatch, KeyboardInterrupt())
    code, out, err = run(capsys, *arguments)
    assert code == 130
    assert (out, err) == ("", said)


def test_main_leaves_the_process_as_it_was(capsys: Capture) -> None:
    hook = sys.excepthook
    run(capsys, "methods")
    assert sys.excepthook is hook


# ---------------------------------------------------------------- looking things up


def test_recipes_list_is_what_ships(capsys: Capture) -> None:
    shipped = sorted(path.stem for path in (ROOT / "attnconvert" / "recipes").glob("*.yaml"))
    assert len(shipped) >= 5
    code, out, _ = run(capsys, "recipes", "list", "--json")
    assert code == 0
    assert [recipe["name"] for recipe in json.loads(out)] == shipped
    code, out, _ = run(capsys, "recipes")  # alone it lists too
    assert code == 0
    assert not [name for name in shipped if name not in out]


def test_recipe_is_shown_as_written_and_resolved_loads_back(capsys: Capture) -> None:
    code, out, _ = run(capsys, "recipes", "show", "hedgehog-mixed")
    assert code == 0
    assert out == (ROOT / "attnconvert" / "recipes" / "hedgehog-mixed.yaml").read_text()
    code, out, _ = run(capsys, "recipes", "show", "hedgehog-mixed", "--resolved", "--set", "keep.fraction=0.5")
    assert code == 0
    assert "extends" not in out
    Path("resolved.yaml").write_text(out)
    code, again, _ = run(capsys, "recipes", "show", "resolved.yaml", "--resolved")
    assert (code, again) == (0, out)
    assert "fraction: 0.5" in out


def test_validate_reports_the_mistakes_of_all_files_and_names_the_good_ones(capsys: Capture) -> None:
    Path("one.yaml").write_text("extends: hedgehog\nname: one\nlayrs: 1\n")
    Path("two.yaml").write_text("extends: hedgehog\nname: two\nstages: {transfer: {lr: fast}}\n")
    code, out, err = run(capsys, "recipes", "validate", "one.yaml", "hedgehog", "two.yaml")
    assert code == 1
    assert out == "hedgehog: keys, values and methods are valid (hedgehog)\n"
    assert "one.yaml:3" in err
    assert "two.yaml:3" in err
    code, _, _ = run(capsys, "recipes", "validate", "hedgehog", "lolcats")
    assert code == 0


def test_methods_shows_every_setting_with_its_default(capsys: Capture) -> None:
    code, out, _ = run(capsys, "methods", "hedgehog", "--json")
    (method,) = json.loads(out)
    assert code == 0
    options = {option["key"]: option for option in method["options"]}
    assert options["window.size"]["default"] == "64"
    assert options["window.kind"]["values"] == "block | sliding"
    assert options["feature_dim"]["values"] == "integer 1 to 256 | null"
    assert all(option["description"] for option in options.values())
    code, out, _ = run(capsys, "methods")
    assert code == 0
    assert not [key for key in options if key not in out]


# ---------------------------------------------------------------- plan, doctor, generate


def test_methods_says_what_a_list_holds(capsys: Capture) -> None:
    options = {option["key"]: option["values"] for option in json.loads(run(capsys, "methods", "moa", "--json")[1])[0]["options"]}
    assert options["search.candidates"] == "[[integer, number], ...] | null"
    assert options["betas"] == "number | [number, ...] | null"


def test_plan_shows_layers_and_cost_and_writes_nothing(capsys: Capture) -> None:
    code, out, _ = run(capsys, "plan", "demo", "--recipe", "hedgehog")
    assert code == 0
    assert "0-5" in out
    assert "hedgehog" in out
    assert "window block 64, 4 sinks" in out
    assert "transfer:" in out
    assert "finetune:" in out
    assert os.listdir() == []


def test_plan_as_json_is_the_plan(capsys: Capture) -> None:
    code, out, _ = run(capsys, "plan", "demo", "--set", "layers.0.match=[0, 2-3]", "--json")
    assert code == 0
    assert [row["layer_idx"] for row in json.loads(out)["plan"]["layers"] if row["method"] == "hedgehog"] == [0, 2, 3]


def test_no_line_of_a_plan_or_method_table_is_cut(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert "…" not in run(capsys, "plan", "demo")[1]
    assert "…" not in run(capsys, "methods")[1]


def test_doctor_runs_and_says_what_fits(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_print_me")
    code, out, err = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == (0 if found["ok"] else 1)
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["torch"]["value"].startswith(torch.__version__.partition("+")[0])
    assert checks["self-test on cpu"]["status"] == "ok", checks["self-test on cpu"]
    assert checks["Hugging Face token"]["value"] == "present"
    assert "hf_do_not_print_me" not in out + err
    assert {capacity["stage"] for capacity in found["capacities"]} == {"transfer", "finetune"}


def test_doctor_exits_1_when_something_needed_is_missing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SUPPORTED", {"transformers": ("99.0", None), "no-such-package-of-ours": ("1.0", None)})
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "older than 99.0" in out
    assert "not installed" in out


def test_self_test_finds_a_broken_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.self_test("cpu") < doctor.SELF_TEST_TOLERANCE
    monkeypatch.setattr(CoreCacheLayer, "get_seq_length", lambda self: 0)
    assert doctor.self_test("cpu") > 100 * doctor.SELF_TEST_TOLERANCE


def test_more_memory_fits_no_smaller_model() -> None:
    order = [name for name, *_ in doctor._SIZES]
    small = doctor._capacities(8 * 2**30, "cuda")
    large = doctor._capacities(80 * 2**30, "cuda")
    pairs = [(a.model, b.model) for a, b in zip(small, large, strict=True)]
    assert all(b is not None and (a is None or order.index(a) <= order.index(b)) for a, b in pairs)
    assert any(a != b for a, b in pairs)


def test_doctor_knows_the_version_bounds_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package, (low, high) in doctor.SUPPORTED.items():
        assert f'"{package}>={low}{f",<{high}" if high else ""}"' in text, package


def test_generate_streams_the_text_that_generate_returns(capsys: Capture) -> None:
    code, out, err = run(capsys, "generate", "demo", "The whale", "--max-new-tokens", "12")
    assert code == 0
    loaded = load_model(resolve("demo"))
    ids = generate.encode_prompt(loaded.tokenizer, "The whale", chat=False)
    want = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert out.strip() == loaded.tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert "12 tokens, first after" in err
    assert "tokens/s; cache " in err


def test_generate_as_json_counts_the_cache(capsys: Capture) -> None:
    code, out, _ = run(capsys, "generate", "demo", "The whale", "--max-new-tokens", "5", "--json", "--dtype", "fp32")
    made = json.loads(out)
    assert code == 0
    config = json.loads((embedded.model_dir() / "config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    assert made["num_new_tokens"] == 5
    assert made["cache_bytes"] == per_token * (made["num_prompt_tokens"] + 4)  # the last token is never fed back


# ---------------------------------------------------------------- names, progress


@pytest.mark.parametrize(
    ("model", "recipe", "name"),
    [
        ("demo", "hedgehog", "demo-hedgehog"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hedgehog", "SmolLM2-135M-Instruct-hedgehog"),
        ("./models/llama-3.2/", "recipes/my.yaml", "llama-3.2-my"),
        ("models/tiny.Q4_1.gguf", "lolcats", "tiny.Q4_1-lolcats"),
    ],
)
def test_output_is_named_after_model_and_recipe(model: str, recipe: str, name: str) -> None:
    assert cli.default_out(model, recipe) == name


def _ui(*, terminal: bool, quiet: bool = False) -> tuple[cli.RunUi, Console]:
    console = Console(force_terminal=terminal, width=120, record=True, file=io.StringIO())
    return cli.RunUi(console, quiet=quiet), console


def test_without_a_terminal_progress_is_about_ten_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    ui, console = _ui(terminal=False)
    with ui:
        ui.on_phase("transfer")
        for step in range(1, 101):
            ui.on_step("transfer", step, 100, {"loss": 1.0 / step, "tokens_per_second": 1234.0})
    lines = console.export_text().splitlines()
    assert lines[0] == "transfer"
    assert 8 <= len(lines) <= 12
    assert lines[-1] == "transfer: 100/100, loss 0.01, 1,234 tokens/s"
    assert "left" in lines[1]


def test_quiet_shows_no_progress() -> None:
    ui, console = _ui(terminal=True, quiet=True)
    with ui:
        ui.on_phase("transfer")
        ui.note("something")
        ui.on_step("transfer", 1, 1, {"loss": 1.0})
        ui.on_eval("held-out text", 1, 1)
    assert console.export_text() == ""


def test_on_a_terminal_there_is_one_bar_per_stage_and_one_for_measuring() -> None:
    ui, console = _ui(terminal=True)
    with ui:
        for stage in ("transfer", "finetune"):
            for step in range(1, 4):
                ui.on_step(stage, step, 3, {"loss": 0.5, "tokens_per_second": 10.0})
        for what in ("held-out text", "passkey 64, teacher", "passkey 64, student"):
            for done in range(1, 3):
                ui.on_eval(what, done, 2)
        assert ui._progress is not None
        bars = [(task.description, task.completed, task.total) for task in ui._progress.tasks]
    assert bars == [("transfer", 3, 3), ("finetune", 3, 3), ("passkey 64, student", 2, 2)]
    assert "loss 0.5" in console.export_text()


# ---------------------------------------------------------------- the main job


def test_linearize_prints_the_result_on_stdout_and_generate_and_evaluate_take_it(capsys: Capture) -> None:
    small = [
        "stages.transfer.tokens=512", "stages.transfer.length=64", "stages.finetune.tokens=512", "stages.finetune.length=64", "evaluate.tokens=256", "evaluate.length=64",
        "evaluate.passkey_trials=2", "evaluate.passkey_lengths=[64]",
    ]  # fmt: skip
    sets = [text for setting in small for text in ("--set", setting)]
    code, out, err = run(capsys, "linearize", "demo", "--recipe", "hedgehog", *sets, "--out", "out")
    assert code == 0, err
    assert err.index("Plan (6 layers, llama)") < err.index("transfer: ")
    assert out.index("top-1 agreement") < out.index("Saved out\n") < out.index("AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)")
    assert "attnconvert generate out 'Once upon a time'" in out
    report = json.loads(Path("out/report.json").read_text())

    code, out, err = run(capsys, "generate", "out", "The whale", "--max-new-tokens", "8", "--json")
    assert code == 0, err
    assert json.loads(out)["softmax_cache_bytes"] > 0

    code, out, err = run(capsys, "evaluate-converted", "out", "--json")
    assert code == 0, err
    again = json.loads(out)
    assert again["evaluation"]["quality"] == report["evaluation"]["quality"]
    assert again["conversion"]["base_model"] == "demo"
    assert again["evaluation"]["notes"] == report["evaluation"]["notes"]  # so the held-out text was the same

    Path("other.jsonl").write_text("\n".join(json.dumps({"text": f"document {i} says that the ship sailed on and on. " * 20}) for i in range(20)))
    code, out, err = run(capsys, "evaluate-converted", "out", "--data", "other.jsonl", "--against", "none", "--tokens", "128")
    assert code == 0, err
    assert "given with --data" in out
    assert json.loads(Path("out/report.json").read_text())["evaluation"]["quality"][0]["name"] == "student"

    code, _, err = run(capsys, "linearize", "demo", "--recipe", "hedgehog", *sets, "--out", "out")
    assert code == 1
    assert err.splitlines()[-3].startswith("error[output-not-empty]")


def test_evaluate_needs_the_record_of_the_run(tmp_path: Path) -> None:
    from attnconvert.convert.reevaluate import evaluate_converted

    (tmp_path / "folder").mkdir()
    with pytest.raises(AttnConvertError, match="no-run-record"):
        evaluate_converted(tmp_path / "folder")
