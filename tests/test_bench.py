"""Speed is measured in turns, written beside the report, drawn, and said in words; memory that ends and Ctrl-C keep what there is."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers.cache_utils import DynamicCache

from attnconvert.convert import bench as module
from attnconvert.convert.bench import (
    bench,
    bench_markdown,
    crossover,
    crossover_words,
    output_folder,
    predict_seconds,
    recorded_teacher,
    render_bench,
    usable_lengths,
    write_bench,
)
from attnconvert.convert.evaluate import cache_bytes
from attnconvert.convert.load import load_model
from attnconvert.convert.pipeline import load_converted, prepare
from attnconvert.convert.plots import draw_bench, draw_needles, draw_positions, draw_report, draw_training
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.swap import swap

LENGTHS, NEW_TOKENS = (24, 48), 2
REPORT = {"schema_version": 1, "conversion": {"base_model": "demo"}, "evaluation": {"quality": [0.1, 1e-7, None]}, "later": "kept"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with new attention, untrained, in a folder with the record of a run."""
    folder = tmp_path_factory.mktemp("bench") / "model"
    prepared = prepare("demo", "hedgehog", overrides=["layers.0.config.window.size=16"])
    loaded = load_model(prepared.source)
    swap(loaded.model, prepared.plan)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "attnconvert").mkdir()
    (folder / "attnconvert" / "run.json").write_text(json.dumps({"settings": {"model": {"name": "demo", "revision": None}}}))
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


@pytest.fixture(scope="module")
def measured(converted: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_REPEATS", 3)
        return bench(converted, device="cpu", lengths=LENGTHS, batch_sizes=[1, 2], new_tokens=NEW_TOKENS, max_seconds=60.0, command="attnconvert bench model")


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection takes most of a second in a process with torch and transformers, and is needed for real memory only."""
    monkeypatch.setattr(module.gc, "collect", lambda: 0)


def settings(**changes: Any) -> module._Settings:
    return module._Settings(**{"device": torch.device("cpu"), "new_tokens": 2, "max_seconds": 60.0, "limit": None, "num_ids": 8, **changes})


class Fake:
    """A causal LM that keeps every token in a cache of keys, and has memory for `capacity` tokens in all; `on_call` sees each forward pass."""

    def __init__(self, capacity: float = math.inf, on_call: Callable[[torch.Size], None] = lambda shape: None):
        self.capacity, self.on_call, self.shapes = capacity, on_call, []

    def to(self, device: Any) -> Fake:
        return self

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int, past_key_values: Any = None) -> Any:
        self.on_call(input_ids.shape)
        self.shapes.append(tuple(input_ids.shape))
        cache = DynamicCache() if past_key_values is None else past_key_values
        new = torch.zeros(input_ids.shape[0], 1, input_ids.shape[1], 4)
        keys, _ = cache.update(new, new, 0)
        if keys.shape[0] * keys.shape[2] > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return SimpleNamespace(logits=torch.zeros(input_ids.shape[0], 1, 8), past_key_values=cache)


def contestant(name: str, model: Fake) -> module._Contestant:
    return module._Contestant(name, model, 0)


def sweep(models: Mapping[str, Fake], lengths: Sequence[int], batch_sizes: Sequence[int] = (1,), **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"rows": [], "stopped": [], "notes": []}
    module._sweep([contestant(*item) for item in models.items()], lengths, batch_sizes, settings(**changes), result, None)
    return result


def lengths_of(result: Mapping[str, Any], model: str, batch_size: int = 1) -> list[int]:
    return [row["length"] for row in result["rows"] if (row["model"], row["batch_size"], row["phase"]) == (model, batch_size, "decode")]


# ---------------------------------------------------------------- a real run


def test_both_models_are_measured_in_every_cell(measured: dict[str, Any]) -> None:
    found = {(row["model"], row["phase"], row["batch_size"], row["length"]) for row in measured["rows"]}
    assert found == {
        (model, phase, size, length) for model in ("teacher", "student") for phase in ("prefill", "decode") for size in (1, 2) for length in LENGTHS
    }
    assert measured["attention"] == {"teacher": "sdpa", "student": "hedgehog in 6 of 6 layers"}
    assert measured["dtype"] == "bfloat16"  # as the checkpoint is stored
    assert measured["models"] == {"student": "model", "teacher": "demo"}
    for row in measured["rows"]:
        assert 0 < row["tokens_per_second_min"] <= row["tokens_per_second"] <= row["tokens_per_second_max"]
        assert row["num_repeats"] >= 3
        assert row["peak_memory_bytes"] is None
        prefill = row["phase"] == "prefill"
        assert (row["first_token_seconds"] is not None, row["seconds_per_token"] is not None) == (prefill, not prefill)
        tokens, seconds = (row["length"], row["first_token_seconds"]) if prefill else (1, row["seconds_per_token"])
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * tokens / seconds)


def test_cache_bytes_are_those_of_a_real_cache(measured: dict[str, Any], converted: Path) -> None:
    bytes_of = {(row["model"], row["phase"], row["batch_size"], row["length"]): row["cache_bytes"] for row in measured["rows"]}
    per_token = 2 * 6 * 8 * 32 * 2  # keys and values, layers, heads, head_dim, bf16
    assert bytes_of["teacher", "prefill", 2, 48] == 2 * 48 * per_token
    assert bytes_of["teacher", "decode", 1, 24] == (24 + NEW_TOKENS) * per_token
    cache = load_converted(converted)(input_ids=torch.zeros(2, 48, dtype=torch.int64), use_cache=True).past_key_values
    assert bytes_of["student", "prefill", 2, 48] == cache_bytes(cache)


def test_the_report_keeps_everything_but_bench(measured: dict[str, Any], converted: Path) -> None:
    document = json.loads((converted / "report.json").read_text())
    assert document.pop("bench") == json.loads(json.dumps(measured))
    assert document == REPORT
    assert not (converted / "bench.json").exists()
    assert [(converted / path).is_file() for path in measured["plots"]] == [True] * 3


def test_the_terminal_shows_every_figure_and_the_crossover_in_words(measured: dict[str, Any]) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_bench(measured))
    text = console.export_text()
    for title in ("Prefill, batch 1", "Decode, batch 1", "Prefill, batch 2", "Decode, batch 2", "Cache: the student's is"):
        assert title in text
    assert "note: Peak memory and the largest batch are measured on a GPU only." in text


def test_markdown_has_every_cell_with_both_models_and_says_how_it_was_measured(measured: dict[str, Any]) -> None:
    text = bench_markdown(measured)
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert [(cell[0].strip("| "), cell[1]) for cell in cells] == [(str(size), str(length)) for size in (1, 2) for length in LENGTHS]
    assert all(" / " in figure and "-" not in figure for cell in cells for figure in cell[2:])
    assert "peak memory" not in text  # a CPU has none to show
    for fact in ("`attnconvert bench model`", f"torch {measured['versions']['torch']}", *measured["crossover_text"].values()):
        assert fact in text


def test_without_a_loadable_teacher_the_student_stands_alone(converted: Path, tmp_path: Path) -> None:
    record = converted / "attnconvert" / "run.json"
    before = record.read_text()
    record.write_text(before.replace('"demo"', '"/nowhere/gone"'))
    try:
        result = bench(converted, device="cpu", lengths=[16], new_tokens=2, out=tmp_path / "out")
    finally:
        record.write_text(before)
    assert {row["model"] for row in result["rows"]} == {"student"}
    assert result["crossover"] == {"prefill": None, "decode": None, "cache": None}
    assert any("'/nowhere/gone' could not be loaded" in text for text in result["notes"])
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == result["rows"]  # there is no report.json


def test_a_named_teacher_that_is_not_there_is_an_error(converted: Path) -> None:
    with pytest.raises(AttnConvertError, match="model-not-found"):
        bench(converted, against="/nowhere/gone", device="cpu", lengths=[16], new_tokens=2)


def test_a_teacher_that_is_converted_itself_is_named_as_such(converted: Path, tmp_path: Path) -> None:
    result = bench(converted, against=str(converted), device="cpu", lengths=[16], new_tokens=2, out=tmp_path)
    assert any("has converted attention itself: hedgehog in 6 of 6 layers" in text for text in result["notes"])


def test_an_unconverted_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttnConvertError, match="not-converted"):
        bench("demo", device="cpu", lengths=[16], out=tmp_path)


@pytest.mark.parametrize(("changes", "text"), [({"lengths": [0, 8]}, "--lengths"), ({"batch_sizes": []}, "--batch-sizes"), ({"new_tokens": 0}, "--new-tokens")])
def test_a_size_below_one_is_refused_by_its_option(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(AttnConvertError, match=text):
        bench("demo", out=tmp_path, **changes)


def test_ctrl_c_keeps_the_complete_cells(converted: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "32 tokens x 1":
            raise KeyboardInterrupt

    result = bench(converted, against="none", device="cpu", lengths=[16, 32], new_tokens=2, out=tmp_path, progress=stop)
    assert result["interrupted"]
    assert lengths_of(result, "student") == [16]
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == result["rows"]


def test_ctrl_c_before_the_first_cell_leaves_an_earlier_result_alone(converted: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "bench.json").write_text("earlier")
    assert bench(converted, against="none", device="cpu", lengths=[16], new_tokens=2, out=tmp_path, progress=stop)["interrupted"]
    assert (tmp_path / "bench.json").read_text() == "earlier"


def test_a_fault_in_the_middle_keeps_the_complete_cells_too(converted: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "32 tokens x 1":
            raise RuntimeError("illegal instruction")

    with pytest.raises(RuntimeError, match="illegal instruction"):
        bench(converted, against="none", device="cpu", lengths=[16, 32], new_tokens=2, out=tmp_path, progress=stop)
    assert lengths_of(json.loads((tmp_path / "bench.json").read_text()), "student") == [16]


# ---------------------------------------------------------------- how a cell is measured


def test_the_models_take_turns_and_every_repeat_prefills_anew() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    models = {name: Fake(on_call=lambda shape, name=name: calls.append((name, tuple(shape)))) for name in ("teacher", "student")}  # type: ignore[misc]
    sweep(models, [16], [2])
    one_pass = [(2, 16), (2, 1), (2, 1)]
    order = ["teacher", "student"] + ["teacher", "student", "student", "teacher"] * 3 + ["teacher", "student"]  # a warm-up, seven repeats
    assert calls == [(name, shape) for name in order for shape in one_pass]


def test_decoding_at_the_limit_starts_early_enough_to_stay_inside_it() -> None:
    model = Fake()
    result = sweep({"student": model}, [16, 30, 32], limit=32, new_tokens=4)
    assert max(length for _, length in model.shapes) == 32
    notes = {row["length"]: row["note"] for row in result["rows"] if row["phase"] == "decode"}
    assert notes == {16: None, **dict.fromkeys((30, 32), "decoded after 26 tokens, so that the last step still has a position")}


def test_lengths_beyond_the_limit_become_the_limit_and_are_named() -> None:
    notes: list[str] = []
    assert usable_lengths([512, 4096, 8192], (), 2048, notes) == [512, 2048]
    assert notes == ["The models go up to max_position_embeddings = 2048: measured up to it, not at 4096, 8192."]
    assert usable_lengths(None, (256, 4096), 2000, notes) == [256, 2000]
    assert usable_lengths([4096, 64], (), None, notes) == [64, 4096]
    assert len(notes) == 1


def test_a_series_stops_before_a_cell_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def slow(shape: torch.Size) -> None:
        clock[0] += (shape[1] / 64) ** 2  # a pass of 64 tokens takes a second

    result = sweep({"teacher": Fake(on_call=slow), "student": Fake()}, [32, 64, 128, 256], max_seconds=20.0)
    assert lengths_of(result, "teacher") == [32, 64, 128]  # 256 would take 16 s a pass
    assert lengths_of(result, "student") == [32, 64, 128, 256]
    assert [(stop["model"], stop["length"]) for stop in result["stopped"]] == [("teacher", 256)]
    assert result["stopped"][0]["reason"] == "would take about 1 min 04 s, more than 20 s"
    last = [row for row in result["rows"] if (row["model"], row["length"]) == ("teacher", 128)]
    assert [row["note"] for row in last] == ["the series ends here: 256 tokens would take about 1 min 04 s, more than 20 s"] * 2


@pytest.mark.parametrize(
    ("series", "powers", "expected"),
    [
        ([(100, 2.0)], (1.0, 2.0), 8.0),
        ([(100, 2.0)], (0.0, 1.0), 2.0),
        ([(100, 2.0), (200, 8.0)], (1.0, 2.0), 32.0),
        ([(100, 8.0), (200, 2.0)], (1.0, 2.0), 4.0),  # noise does not make longer prompts cheaper
        ([(100, 1.0), (200, 64.0)], (1.0, 2.0), 256.0),  # nor dearer than attention can
    ],
)
def test_the_prediction_is_a_power_law_within_bounds(series: list[tuple[int, float]], powers: tuple[float, float], expected: float) -> None:
    assert predict_seconds(series, 400, powers) == pytest.approx(expected)


@pytest.mark.parametrize(("device", "too_much"), [("cpu", True), ("cuda", False)])
def test_a_larger_batch_costs_its_rows_on_a_cpu_and_on_a_gpu_what_smaller_ones_showed(device: str, too_much: bool) -> None:
    of = settings(device=torch.device(device), max_seconds=10.0)
    history = {("teacher", 1): [module._Timed(64, 0.5, 0.5)]}
    assert (module._too_much("teacher", 8, 64, history, {}, of) is not None) is too_much
    history[("teacher", 8)] = [module._Timed(64, 2.0, 2.0)]
    assert module._too_much("teacher", 32, 64, history, {}, of) is not None


# ---------------------------------------------------------------- memory that ends


def test_a_model_that_runs_out_of_memory_stops_and_the_other_goes_on() -> None:
    result = sweep({"teacher": Fake(capacity=70), "student": Fake()}, [32, 64, 128, 256], [1, 2])
    assert (lengths_of(result, "teacher", 1), lengths_of(result, "teacher", 2)) == ([32, 64], [32])
    assert lengths_of(result, "student", 2) == [32, 64, 128, 256]
    assert [(stop["batch_size"], stop["length"], stop["reason"]) for stop in result["stopped"]] == [(1, 128, "out of memory"), (2, 64, "out of memory")]
    assert "Teacher, batch 1: not measured from 128 tokens on (out of memory)." in result["notes"]


def test_a_larger_batch_is_not_tried_where_a_smaller_one_did_not_fit() -> None:
    tried: list[tuple[int, ...]] = []
    sweep({"teacher": Fake(capacity=70, on_call=lambda shape: tried.append(tuple(shape)))}, [128], [1, 2])
    assert tried == [(1, 128)]


def test_only_lack_of_memory_counts_as_lack_of_memory() -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    cpu = torch.device("cpu")
    for lack in (
        torch.OutOfMemoryError("x"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        assert module._attempt(fail(lack), cpu) is None
    for other in (RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")):
        with pytest.raises(type(other)):
            module._attempt(fail(other), cpu)


def test_memory_of_a_failed_attempt_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[weakref.ref[Any]] = []
    seen_at_free: list[bool] = []

    def call() -> None:
        tensor = torch.zeros(8)
        alive.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(module, "_free", lambda device: seen_at_free.append(alive[0]() is not None))
    assert module._attempt(call, torch.device("cpu")) is None
    assert seen_at_free == [False]


def test_the_largest_batch_doubles_until_memory_ends() -> None:
    model = Fake(capacity=5 * 12)
    row = module._largest_batch(contestant("teacher", model), 10, settings())
    assert row is not None
    assert (row["batch_size"], row["length"], row["note"]) == (4, 10, "8 rows ran out of memory")
    assert row["tokens_per_second"] > 0
    assert [shape for shape in model.shapes if shape[1] > 1] == [(1, 10)]  # one prompt, copied


def test_the_largest_batch_ends_at_the_time_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def slow(shape: torch.Size) -> None:
        clock[0] += shape[0]

    row = module._largest_batch(contestant("teacher", Fake(on_call=slow)), 10, settings(max_seconds=20.0))
    assert row is not None
    assert (row["batch_size"], row["note"]) == (8, "16 rows would take longer than 20 s")
    assert row["tokens_per_second"] == 1.0  # each step takes a second a row


def test_there_is_no_largest_batch_when_one_row_does_not_fit() -> None:
    assert module._largest_batch(contestant("teacher", Fake(capacity=3)), 10, settings()) is None
    assert module._largest_batch(contestant("teacher", Fake(capacity=10)), 10, settings()) is None


def test_the_largest_batches_are_taken_at_the_longest_common_length() -> None:
    models = {"teacher": Fake(capacity=70), "student": Fake(capacity=500)}
    result = {**sweep(models, [32, 64, 128]), "largest_batch": []}
    module._largest_batches([contestant(*item) for item in models.items()], settings(), result, None)
    assert [(row["model"], row["length"], row["batch_size"]) for row in result["largest_batch"]] == [("teacher", 64, 1), ("student", 64, 4)]


# ---------------------------------------------------------------- crossover


def rows_of(gains: Mapping[int, float], measure: str = "decode") -> list[dict[str, Any]]:
    """Rows in which the student is `gains[length]` times better."""
    rows = []
    for length, gain in gains.items():
        for model, value in (("teacher", 100.0), ("student", 100.0 / gain if measure == "cache" else 100.0 * gain)):
            figures = {"tokens_per_second": 1.0, "cache_bytes": 1.0, "cache_bytes" if measure == "cache" else "tokens_per_second": value}
            rows.append({"model": model, "phase": "prefill" if measure == "cache" else measure, "batch_size": 1, "length": length, **figures})
    return rows


@pytest.mark.parametrize("measure", ["prefill", "decode", "cache"])
@pytest.mark.parametrize(
    ("gains", "expected", "words"),
    [
        ({64: 0.5, 128: 0.8, 256: 1.5, 512: 2.0}, 256, "from 256 tokens on (1.50 x there, 2.00 x at 512)."),
        ({64: 1.5, 128: 2.0}, 64, "at every measured length (1.50 x at 64, 2.00 x at 128)."),
        ({64: 0.5, 128: 0.8}, None, "at 128 tokens, the longest that both were measured at (0.80 x at 128)."),
        ({64: 0.5, 128: 2.0, 256: 0.8, 512: 2.0}, 512, "from 512 tokens on (2.00 x there)."),
        ({64: 0.5, 128: 2.0, 256: 0.5}, None, "at 256 tokens, the longest that both were measured at (0.50 x at 256), though it is at 128."),
        ({64: 1.0}, None, "at 64 tokens, the longest that both were measured at (1.00 x at 64)."),
        ({64: 2.0}, 64, "at 64 tokens, the only length measured (2.00 x at 64)."),
    ],
)
def test_the_crossover_is_where_the_student_gets_better_and_stays_so(gains: dict[int, float], expected: int | None, words: str, measure: str) -> None:
    rows = rows_of(gains, measure)
    assert crossover(rows, 1)[measure] == expected
    assert crossover(rows, 8) == {"prefill": None, "decode": None, "cache": None}
    who = "the student's is" if measure == "cache" else "the student is"
    better = "smaller" if measure == "cache" else "faster"
    assert crossover_words(rows, 1, measure) == f"{measure.capitalize()}: {who} {'' if expected else 'not '}{better} {words}"


def test_only_lengths_that_both_reached_count_for_the_crossover() -> None:
    rows = [row for row in rows_of({64: 0.5, 128: 1.5, 256: 0.1}) if not (row["model"] == "teacher" and row["length"] == 256)]
    assert crossover(rows, 1)["decode"] == 128
    assert "no length" in crossover_words([row for row in rows if row["model"] == "student"], 1, "decode")


# ---------------------------------------------------------------- files


def test_a_broken_report_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{cut")
    assert write_bench({"rows": []}, tmp_path) == tmp_path / "bench.json"
    assert (tmp_path / "report.json").read_text() == "{cut"


def test_a_model_of_the_hub_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert output_folder("someone/model-hedgehog") == Path("model-hedgehog-bench")
    assert output_folder(tmp_path) == tmp_path
    assert output_folder("someone/model", tmp_path) == tmp_path


def test_the_teacher_of_a_hub_model_is_read_from_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "run.json").write_text(json.dumps({"settings": {"model": {"name": "base/model", "revision": "abc"}}}))

    def download(repo: str, name: str) -> str:
        assert repo == "someone/converted"
        if name != "attnconvert/run.json":
            raise LocalEntryNotFoundError("no")
        return str(tmp_path / "run.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert recorded_teacher("someone/converted") == ("base/model", "abc")
    (tmp_path / "run.json").write_text("{}")
    assert recorded_teacher("someone/converted") is None


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnConvertError, match="cannot-write"):
        bench("/nowhere/model", out=tmp_path / "file" / "out")


# ---------------------------------------------------------------- plots


def pixels(path: Path) -> tuple[int, int]:
    """Width and height from the header of a PNG, which must end as one does."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


NEEDLES = [
    {"name": name, "num_needles": count, "length": length, "depth": depth, "num_trials": 8, "accuracy": 0.5, "ci95": [0.2, 0.8], "beyond_window": length > 100}
    for name in ("teacher", "student") for count in (1, 4) for length in (64, 256) for depth in (0.25, 0.75)
]  # fmt: skip
POSITIONS = [
    {"name": name, "start": start, "stop": stop, "num_tokens": 10, "nll": 3.0, "ppl": 20.1, "ppl_ratio": ratio, "kl": None}
    for name, ratio in (("teacher", 1.0), ("student", 1.1)) for start, stop in ((0, 32), (32, 128))
]  # fmt: skip


def test_every_plot_is_a_whole_png_of_twice_800_pixels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"stage": stage, "step": step, "loss": 3.0 / step, "tokens": 64 * step}) for stage in ("transfer", "finetune") for step in range(1, 30)]
    metrics.write_text("\n".join([*lines, '{"stage": "fine']))  # killed while writing
    stopped = [{"model": "teacher", "batch_size": 1, "length": 512, "reason": "out of memory"}]

    folder = tmp_path / "one"
    rows = [*rows_of({128: 0.5, 256: 1.5}), *rows_of({128: 1.5}, "cache")]
    paths = [
        *draw_bench({"rows": rows, "stopped": stopped, "crossover": {"decode": 256}}, folder),
        draw_training(metrics, folder / "training.png"),
        draw_needles(NEEDLES, folder / "needles.png"),
        draw_positions(POSITIONS, folder / "positions.png"),
    ]
    rows.append({**rows[0], "phase": "prefill", "peak_memory_bytes": 2**30})
    assert [path.name for path in draw_bench({"rows": rows}, folder)] == [f"bench-{what}.png" for what in ("decode", "prefill", "memory", "cache")]
    (folder / "bench-memory.png").unlink()
    assert [path.name for path in paths] == ["bench-decode.png", "bench-prefill.png", "bench-cache.png", "training.png", "needles.png", "positions.png"]
    assert draw_needles(NEEDLES, tmp_path / "again.png").read_bytes() == (folder / "needles.png").read_bytes()
    assert {pixels(path)[0] for path in paths} == {1600}
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)  # no temporary file is left


def test_plots_leave_the_backend_of_matplotlib_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = "matplotlib.pyplot" in sys.modules
    draw_positions(POSITIONS, tmp_path / "positions.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_positions_without_a_teacher_are_drawn_as_perplexity(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    alone = [{**row, "ppl_ratio": None} for row in POSITIONS if row["name"] == "student"]
    assert pixels(draw_positions(alone, tmp_path / "positions.png"))[0] == 1600


@pytest.mark.parametrize("draw", [lambda path: draw_needles([], path), lambda path: draw_positions([], path), lambda path: draw_training(path, path)])
def test_nothing_to_draw_is_an_error_and_no_file(draw: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(AttnConvertError, match=r"nothing-to-draw|no-metrics"):
        draw(tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra_and_costs_no_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AttnConvertError) as caught:
        draw_needles(NEEDLES, tmp_path / "needles.png")
    assert caught.value.code == "missing-extra"
    assert "pip install 'attnconvert[plots]'" in str(caught.value)
    result: dict[str, Any] = {"rows": rows_of({64: 2.0}), "notes": [], "stopped": []}
    module._finish(result, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["crossover"]["decode"] == 64
    assert "No plots: plots need matplotlib, which is not installed; `pip install 'attnconvert[plots]'`." in result["notes"]


def test_every_finished_cell_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    """A kill cannot be caught: what was measured must be there already."""
    result: dict[str, Any] = {"rows": [], "stopped": [], "notes": [], "interrupted": False}
    seen: list[int] = []

    def keep() -> None:
        module._conclude(result, tmp_path)
        seen.append(len(json.loads((tmp_path / module.BENCH_FILE).read_text())["rows"]))

    module._sweep([contestant("teacher", Fake()), contestant("student", Fake())], [32, 64], [1], settings(), result, None, keep)
    assert seen == [4, 8]


def test_a_report_is_drawn_as_far_as_it_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "attnconvert").mkdir()
    positions = [
        {"name": name, "start": 0, "stop": 64, "num_tokens": 9, "nll": 1.0, "ppl": 2.7, "ppl_ratio": None, "kl": None} for name in ("teacher", "student")
    ]
    (tmp_path / "report.json").write_text(json.dumps({"evaluation": {"positions": positions, "needles": [], "fidelity": {}}}))
    assert [path.name for path in draw_report(tmp_path)] == ["positions.png"]
    (tmp_path / "attnconvert" / "metrics.jsonl").write_text(
        "".join(json.dumps({"stage": "transfer", "step": n, "tokens": n, "loss": 1.0 / n}) + "\n" for n in (1, 2))
    )
    assert [path.name for path in draw_report(tmp_path)] == ["training.png", "positions.png"]
