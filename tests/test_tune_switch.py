"""The command `tune-switch`: what it measures, what it concludes, and what it writes into a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from test_infllm_v2 import infllm
from test_seam import HEDGEHOG, convert

from attnconvert import cli
from attnconvert.convert import switch
from attnconvert.convert.plan import finished_plan
from attnconvert.kernels.blocks.reference import compressed_keys, select_blocks
from attnconvert.kernels.blocks.rule import BlockRule
from attnconvert.surgery.methods.infllm_v2 import InfLLMV2Config

CONFIG = InfLLMV2Config(block_size=32, window_size=0, topk=2, dense_len=200)
LENGTHS = (96, 128, 192, 256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted checkpoint of 256 positions."""
    infllm(make_model("llama"), CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def measured(monkeypatch: pytest.MonkeyPatch, prefill: str, decode: str) -> None:
    """Pretend: at each of the lengths, `+` = sparse attention is faster, `-` = it is slower."""
    wins = {length: signs for length, *signs in zip(LENGTHS, prefill, decode, strict=True)}

    def pretended(kind: Any, length: int, *_: Any) -> switch.SwitchPoint:
        sparse = [0.5 if sign == "+" else 2.0 for sign in wins[length]]
        return switch.SwitchPoint(length, 1.0, sparse[0], 1.0, sparse[1])

    monkeypatch.setattr(switch, "_measure", pretended)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["tune-switch", *arguments, "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lengths_of(folder: Path) -> list[int]:
    return [row["config"]["dense_len"] for row in json.loads((folder / "config.json").read_text())["attn_plan"]["layers"]]


def test_both_kinds_of_attention_are_measured_and_a_dry_run_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "config.json").read_bytes()
    code, out, _ = run(capsys, str(folder), "--lengths", "96,256", "--dry-run", "--json")
    assert code == 0
    report = json.loads(out)
    (kind,) = report["kinds"]
    assert (kind["layers"], kind["num_heads"], kind["num_key_value_heads"], kind["head_dim"], kind["before"]) == ([0, 1, 2], 4, 2, 8, [200] * 3)
    assert [point["length"] for point in kind["points"]] == [96, 256]
    assert all(0 < point[name] < 5 for point in kind["points"] for name in ("dense_prefill", "sparse_prefill", "dense_decode", "sparse_decode"))
    assert (report["device"], report["dtype"], report["written"]) == ("cpu", "float32", False)
    assert kind["runs"] == "PyTorch, for the device is cpu"
    assert (folder / "config.json").read_bytes() == before


def test_dense_runs_everything_dense_and_sparse_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules: dict[str, list[int]] = {"prefill": [], "decode": []}
    prefill, decode = switch.block_sparse_attention, switch.block_sparse_step
    monkeypatch.setattr(switch, "block_sparse_attention", lambda *a, rule, **o: rules["prefill"].append(rule.dense_len) or prefill(*a, rule=rule, **o))
    monkeypatch.setattr(switch, "block_sparse_step", lambda *a, rule, **o: rules["decode"].append(rule.dense_len) or decode(*a, rule=rule, **o))
    switch.tune_switch(folder, device="cpu", lengths=[128], dry_run=True)
    assert {name: sorted(set(found)) for name, found in rules.items()} == {"prefill": [0, 2**30], "decode": [0, 2**30]}


@pytest.mark.parametrize(
    ("prefill", "decode", "goal", "found"),
    [
        ("--++", "-+++", "both", 192),
        ("--++", "-+++", "prefill", 192),
        ("--++", "-+++", "decode", 128),
        ("+-++", "++++", "both", 192),  # a win at one length alone is not to be trusted
        ("++++", "++++", "both", 96),
        ("++++", "+++-", "both", None),
        ("++++", "+++-", "prefill", 96),
    ],
)
def test_the_switch_is_where_sparse_attention_wins_from_there_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prefill: str, decode: str, goal: str, found: int | None
) -> None:
    measured(monkeypatch, prefill, decode)
    code, out, _ = run(capsys, str(folder), "--lengths", ",".join(map(str, LENGTHS)), "--for", goal)
    assert code == 0
    assert lengths_of(folder) == [found or 200] * 3
    out = " ".join(out.split())  # a long path moves the line breaks
    assert ("Written to" in out) == (found is not None)
    assert (f"dense_len 200 -> {found}" if found else "is slower at 256 tokens, the longest length measured; dense_len stays 200") in out
    assert ("In prefill alone it is not slower from 96 tokens on, which `--for prefill` sets." in out) == (found is None)
    assert "In decode alone" not in out


def test_what_is_written_names_its_device_and_loads(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured(monkeypatch, "--++", "--++")
    assert run(capsys, str(folder), "--lengths", ",".join(map(str, LENGTHS)), "--batch-size", "4")[0] == 0
    plan, config = finished_plan(str(folder))
    assert plan.switch is not None
    assert (plan.switch["device"], plan.switch["batch_size"], plan.switch["goal"]) == ("cpu", 4, "both")
    assert [point["length"] for point in plan.switch["kinds"][0]["points"]] == list(LENGTHS)
    assert {"torch", "attnconvert"} <= plan.switch["versions"].keys()
    assert plan.switch["date"].startswith("20")
    assert plan.to_dict() == config.attn_plan
    capsys.readouterr()
    assert cli.main(["plan", str(folder)]) == 0
    assert "dense_len was measured on cpu in float32, 20" in capsys.readouterr().out
    from attnconvert.convert.pipeline import load_converted

    assert {layer.self_attn.core.rule.dense_len for layer in load_converted(folder).model.layers} == {192}
    assert not list(folder.glob("*.tmp*"))


def test_lengths_grow_from_where_blocks_are_left_out_to_what_the_model_takes(folder: Path) -> None:
    report = switch.tune_switch(folder, device="cpu", dry_run=True)
    assert [point.length for point in report.kinds[0].points] == [256]
    assert switch._lengths(BlockRule(), None, 32768) == [8192, 12288, 16384, 24576, 32768]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere"], "model-not-found"),
        (["{folder}", "--lengths", "32,64"], "nothing-to-measure"),
        (["{folder}", "--lengths", "128,512"], "length-too-long"),
        (["{stock}"], "not-converted"),
        (["{hedgehog}"], "no-blocks-to-choose"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    folder: Path, tmp_path: Path, arguments: list[str], code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(switch, "_measure", lambda *args: pytest.fail("measured"))
    make_model("llama").save_pretrained(tmp_path / "stock")
    convert(make_model("llama"), method="hedgehog", config=HEDGEHOG).save_pretrained(tmp_path / "hedgehog")
    names = {"folder": folder, "stock": tmp_path / "stock", "hedgehog": tmp_path / "hedgehog"}
    assert run(capsys, *(argument.format(**names) for argument in arguments))[0] == 1
    assert cli.main(["tune-switch", *(argument.format(**names) for argument in arguments), "--device", "cpu"]) == 1
    assert f"error[{code}]" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["tune-switch", str(folder), "--device", "cuda"]) == 1
    assert "error[no-gpu]" in capsys.readouterr().err


def test_neighbours_in_the_random_text_choose_alike_as_those_of_a_model() -> None:
    """Of 16 neighbours, SmolLM2's union of dynamic blocks is 1.5 to 2.7 times one's; of independent numbers it is about 10."""
    rule, generator, device = BlockRule(32, 1, 16, 33, 0), torch.Generator().manual_seed(0), torch.device("cpu")
    q, k = (switch.drifting(1, 4096, heads, 64, generator, device) for heads in (3, 1))
    assert abs(float(k.var()) - 1) < 0.1
    position = torch.arange(4096 - 256, 4096)[None]
    seen = select_blocks(switch._SHARPNESS * q[:, -256:], *compressed_keys(k, rule), position, 128, rule, 64**-0.5)
    block, own = torch.arange(128), (position // 32)[:, None, :, None]
    dynamic = seen & (block >= 1) & (block < own - 16)
    union = dynamic.unflatten(2, (-1, 16)).any(3).sum(-1).float().mean()
    assert 1.5 < union / dynamic.sum(-1).float().mean() < 2.7
