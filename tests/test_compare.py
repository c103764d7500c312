"""`attnconvert compare`: one table over several conversions, the best marked, and no silent comparison of what cannot be compared."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attnconvert.convert.compare import Comparison, compare, comparison_markdown, render_comparison
from attnconvert.errors import AttnConvertError, ErrorGroup


def report(
    *,
    kl: float = 0.1,
    recall: float = 0.5,
    seconds: float = 100.0,
    methods: tuple[str | None, ...] = ("hedgehog", "hedgehog", None),
    speed: float | None = None,
) -> dict[str, Any]:
    quality = [
        {"name": "teacher", "kind": "teacher", "ppl_ratio": None, "kl": None, "agreement": None},
        {"name": "student", "kind": "student", "ppl_ratio": {"value": 1 + kl}, "kl": {"value": kl}, "agreement": {"value": 1 - kl}},
    ]
    document: dict[str, Any] = {
        "schema_version": 1,
        "conversion": {
            "recipe_name": "hedgehog", "base_model": "demo", "device": "cpu", "seconds": seconds, "stages": [{"stage": "transfer", "tokens": 1000}, {"stage": "finetune", "tokens": 500}],
            "plan": {"layers": [{"layer_idx": index, "method": method} for index, method in enumerate(methods)]}, "data": {"eval": {"sha256": "aa" * 32}},
        },
        "evaluation": {
            "num_rows": 16, "row_length": 512, "window": 64, "device": "cpu", "dtype": "float32", "quality": quality,
            "passkey": [{"name": name, "length": length, "num_trials": 20, "accuracy": share} for length in (64, 1024) for name, share in (("teacher", 1.0), ("student", 1.0 if length == 64 else recall))],
            "state_bytes": [{"length": 64, "student": 200, "teacher": 100}, {"length": 1024, "student": 200, "teacher": 1600}],
        },
    }  # fmt: skip
    if speed is not None:
        rows = [
            {"model": model, "phase": "decode", "batch_size": 1, "length": 2048, "tokens_per_second": value}
            for model, value in (("teacher", 40.0), ("student", speed))
        ]
        document["bench"] = {"device": "cpu", "rows": rows}
    return document


def folders(tmp_path: Path, **documents: dict[str, Any]) -> list[Path]:
    paths = []
    for name, document in documents.items():
        path = tmp_path / name
        (path / "attnconvert").mkdir(parents=True)
        (path / "attnconvert" / "run.json").write_text("{}")
        (path / "report.json").write_text(json.dumps(document))
        paths.append(path)
    return paths


def shown(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=220, color_system=None)
    console.print(render_comparison(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_row_holds_the_figures_of_its_report(tmp_path: Path) -> None:
    comparison = compare(folders(tmp_path, one=report(kl=0.1, recall=0.35, speed=90.0)))
    (row,) = comparison.rows
    assert (row.name, row.recipe, row.methods, row.base_model) == ("one", "hedgehog", "hedgehog 2, softmax 1", "demo")
    assert (row.tokens, row.seconds) == (1500, 100.0)
    assert (row.ppl_ratio, row.kl, row.agreement) == (1.1, 0.1, 0.9)
    assert row.passkey == {64: 1.0, 1024: 0.35}
    assert (row.cache_share, comparison.cache_length) == (0.125, 1024)
    assert (row.decode_speed, row.decode_at) == (90.0, "2,048 tokens, batch 1")
    assert comparison.warnings == ()


def test_the_best_of_each_column_is_marked_and_ties_share_it(tmp_path: Path) -> None:
    comparison = compare(folders(tmp_path, a=report(kl=0.10, recall=0.9), b=report(kl=0.05, recall=0.2, seconds=300.0), c=report(kl=0.0502, recall=0.5)))
    best = comparison.to_dict()["best"]
    assert best["kl"] == ["b"]
    assert best["agreement"] == ["b"]
    assert best["ppl_ratio"] == ["b", "c"], "printed alike, marked alike"
    assert best["passkey.1024"] == ["a"]
    assert best["seconds"] == ["a", "c"]
    assert best["passkey.64"] == best["tokens"] == best["cache_share"] == [], "no best where all are the same"


def test_a_smaller_cache_and_faster_decoding_are_better(tmp_path: Path) -> None:
    small = report(speed=30.0)
    small["evaluation"]["state_bytes"][1]["student"] = 100
    best = compare(folders(tmp_path, small=small, fast=report(speed=90.0))).to_dict()["best"]
    assert (best["cache_share"], best["decode_speed"]) == (["small"], ["fast"])


def test_a_terminal_of_160_columns_shows_every_figure_whole(tmp_path: Path) -> None:
    rows = {f"SmolLM2-135M-Instruct-{name}": report(kl=kl, speed=90.0 + 10 * kl) for name, kl in (("hedgehog", 0.1), ("hedgehog-mixed", 0.05))}
    comparison = compare(folders(tmp_path, **rows))
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(render_comparison(comparison))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Conversions of demo" in text
    for figure in ("1.100", "0.1000", "0.9000", "1.050 *", "0.0500 *", "0.9500 *", "12.5 %", "91.0 *", "1 min 40 s", "agreement", "cache share"):
        assert figure in text, figure


def test_terminal_markdown_and_json_agree(tmp_path: Path) -> None:
    comparison = compare(folders(tmp_path, a=report(kl=0.10), b=report(kl=0.05, speed=90.0)))
    text, markdown, data = shown(comparison), comparison_markdown(comparison), json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert "0.0500 *" in text
    assert "0.1000 *" not in text
    assert "**0.0500**" in markdown
    assert "**0.1000**" not in markdown
    assert data["rows"][1]["kl"] == 0.05
    header, rule, *lines = markdown.split("\n\n")[0].splitlines()
    assert len(lines) == 2
    assert {line.count("|") for line in (header, rule, *lines)} == {header.count("|")}
    assert "decode tokens/s" in header
    assert "decode tokens/s at 2,048 tokens, batch 1" in text
    assert "- decode tokens/s at 2,048 tokens, batch 1" in markdown
    assert lines[0].endswith("| - |"), "what was not benchmarked is a dash"


def test_columns_that_no_row_has_are_left_out(tmp_path: Path) -> None:
    header = comparison_markdown(compare(folders(tmp_path, a=report(), b=report()))).splitlines()[0]
    assert "decode" not in header
    assert "passkey 1,024" in header


@pytest.mark.parametrize(
    ("where", "key", "value", "says"),
    [
        ("conversion", "base_model", "other/model", "the base model differs: demo (a) against other/model (b)"),
        ("conversion", "data", {"eval": {"sha256": "bb" * 32}}, "the held-out text (SHA-256) differs: aaaaaaaaaaaa (a) against bbbbbbbbbbbb (b)"),
        ("conversion", "evaluation_data", {"eval": {"sha256": "cc" * 32}}, "the held-out text (SHA-256) differs: aaaaaaaaaaaa (a) against cccccccccccc (b)"),
        ("conversion", "data", None, "the held-out text (SHA-256) differs: aaaaaaaaaaaa (a) against unknown (b)"),
        ("evaluation", "num_rows", 8, "the number of held-out rows x tokens differs: 16 x 512 (a) against 8 x 512 (b)"),
        ("evaluation", "window", 128, "the window differs: 64 (a) against 128 (b)"),
        ("evaluation", "dtype", "bfloat16", "the data type differs: float32 (a) against bfloat16 (b)"),
        ("evaluation", "device", "a GPU", "the device of the measurement differs: cpu (a) against a GPU (b)"),
        ("conversion", "device", "a GPU", "the device of the conversion differs: cpu (a) against a GPU (b)"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, where: str, key: str, value: Any, says: str) -> None:
    other = report()
    other[where][key] = value
    comparison = compare(folders(tmp_path, a=report(), b=other))
    (warning,) = comparison.warnings
    assert warning.startswith(says)
    assert f"warning: {warning}"[:60] in shown(comparison)
    assert warning in comparison_markdown(comparison)


def test_benchmarks_of_different_devices_or_lengths_are_not_comparable(tmp_path: Path) -> None:
    other = report(speed=70.0)
    other["bench"]["device"] = "a GPU"
    for row in other["bench"]["rows"]:
        row["length"] = 4096
    comparison = compare(folders(tmp_path, a=report(speed=90.0), b=other, c=report()))
    assert [warning.split(" differs")[0] for warning in comparison.warnings] == ["the device of the benchmark", "the length and batch of decoding"]
    assert "(c" not in "".join(comparison.warnings), "a row without a benchmark is not blamed"


def test_cache_shares_are_taken_at_a_length_that_all_rows_have(tmp_path: Path) -> None:
    longer = report()
    longer["evaluation"]["state_bytes"].append({"length": 8192, "student": 200, "teacher": 12800})
    comparison = compare(folders(tmp_path, a=report(), b=longer))
    assert comparison.cache_length == 1024
    assert [row.cache_share for row in comparison.rows] == [0.125, 0.125]


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    one, two = folders(tmp_path / "x", out=report())[0], folders(tmp_path / "y", out=report())[0]
    names = [row.name for row in compare([one, two]).rows]
    assert names == [str(one), str(two)]


def test_names_with_brackets_and_bars_stay_text(tmp_path: Path) -> None:
    odd = report()
    odd["conversion"]["recipe_name"] = "[red]a|b[/red]"
    comparison = compare(folders(tmp_path, a=odd))
    assert "[red]a|b[/red]" in shown(comparison)
    assert "[red]a\\|b[/red]" in comparison_markdown(comparison)


def test_every_folder_that_cannot_be_compared_is_reported(tmp_path: Path) -> None:
    good, unmeasured = folders(tmp_path, good=report(), unmeasured=report())
    (unmeasured / "report.json").unlink()
    with pytest.raises(AttnConvertError, match="attnconvert evaluate-converted") as one:
        compare([good, unmeasured])
    assert one.value.code == "no-report"
    with pytest.raises(ErrorGroup) as both:
        compare([tmp_path / "nothing", good, unmeasured])
    assert [error.code for error in both.value.errors] == ["not-converted", "no-report"]


def test_a_report_with_hardly_anything_in_it_still_makes_a_row(tmp_path: Path) -> None:
    comparison = compare(folders(tmp_path, a={"conversion": {}, "evaluation": {}}))
    assert comparison.rows[0].kl is None
    assert comparison_markdown(comparison).startswith("| conversion |")
