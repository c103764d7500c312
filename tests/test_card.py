"""The model card: metadata that huggingface_hub reads back, honest text, hand-written parts that survive, no paths of this machine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from attnconvert.convert import card
from attnconvert.convert.card import BEGIN, END, YAML_BEGIN, YAML_END, hide_paths_in, local_paths, losses, make_card, merge_cards, render_card, write_card
from attnconvert.errors import AttnConvertError

SITE = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
HEDGEHOG = {"window": {"kind": "block", "size": 64}, "sinks": 4, "linear": True}


def estimate(value: float, spread: float = 0.01) -> dict[str, Any]:
    return {"value": value, "se": spread / 2, "ci95": [value - spread, value + spread]}


def passkey(name: str, length: int, accuracy: float, beyond: bool, spread: float = 0.05) -> dict[str, Any]:
    ci95 = [max(0.0, accuracy - spread), min(1.0, accuracy + spread)]
    return {"name": name, "length": length, "num_trials": 50, "accuracy": accuracy, "ci95": ci95, "mrr": accuracy, "by_third": [None] * 3, "distance": [9, 9],
            "beyond_window": beyond}  # fmt: skip


def document() -> dict[str, Any]:
    """A report as a conversion of a Hub model writes it."""
    layers = [{"layer_idx": i, "path": f"model.layers.{i}.self_attn", **SITE, "method": "hedgehog", "config": HEDGEHOG, "reason": ""} for i in range(3)]
    layers.append({"layer_idx": 3, "path": "model.layers.3.self_attn", **SITE, "method": None, "config": {}, "reason": "kept by the recipe"})
    return {
        "schema_version": 1,
        "conversion": {
            "recipe_name": "hedgehog",
            "base_model": "someone/Tiny-1M",
            "base_model_type": "llama",
            "plan": {"schema_version": 1, "base_model_type": "llama", "layers": layers, "num_kept_later": 0, "keep_by": "layer_error"},
            "stages": [{"stage": "transfer", "skipped": None, "steps": 4, "tokens": 100352, "seconds": 98.3, "tokens_per_second": 1020.0, "final_loss": 0.01}],
            "data": {"source": "someone/corpus", "eval_source": "someone/corpus", "train": {"documents": 9, "rows": 8, "length": 512, "sha256": "5005ca87"}},
            "versions": {"attnconvert": "0.1.0", "torch": "2.13.0"},
            "device": "cpu, 2 threads",
            "seconds": 382.7,
            "command": "attnconvert linearize someone/Tiny-1M --recipe hedgehog",
            "recipe": {"name": "hedgehog", "reference": "https://arxiv.org/abs/2402.04347", "stages": {"transfer": {"length": 512}}},
            "seed": 0,
        },
        "evaluation": {
            "num_rows": 32, "row_length": 512, "num_tokens": 16338,
            "quality": [
                {"name": "teacher", "kind": "teacher", "ppl": estimate(17.0), "ppl_ratio": None, "kl": None, "agreement": None},
                {"name": "student", "kind": "student", "ppl": estimate(17.394), "ppl_ratio": estimate(1.0233), "kl": estimate(0.0404), "agreement": estimate(0.9263)},
            ],
            "passkey": [passkey("teacher", 64, 1.0, False), passkey("student", 64, 1.0, False), passkey("teacher", 1024, 0.98, True), passkey("student", 1024, 0.2, True)],
            "state_bytes": [{"length": 64, "student": 2027568, "teacher": 786432}, {"length": 4096, "student": 2027568, "teacher": 50331648}],
            "tasks": [{"task": "arc_easy", "metric": "acc", "num_fewshot": 0, "num_samples": 200, "teacher": 0.6, "teacher_se": 0.02, "student": 0.5, "student_se": 0.02,
                       "chance": 0.25}],
            "findings": [{"level": "bad", "section": "passkey", "row": "1024 tokens", "text": "recall is near chance"}],
        },
    }  # fmt: skip


def metadata(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return loaded


# ---------------------------------------------------------------- metadata


def test_huggingface_hub_reads_the_card_back_with_every_figure() -> None:
    parsed = ModelCard(render_card(document(), repo_id="me/tiny-hedgehog", license="apache-2.0", language="en"))
    data = parsed.data
    assert (data.base_model, data.base_model_relation) == ("someone/Tiny-1M", "finetune")
    assert (data.license, data.language, data.library_name, data.pipeline_tag) == ("apache-2.0", ["en"], "transformers", "text-generation")
    assert data.tags == ["attnconvert", "linear-attention", "hedgehog", "custom_code"]
    assert data.datasets == ["someone/corpus"]
    found = {(r.dataset_type, r.dataset_config, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("someone/corpus", None, "perplexity"): 17.394,
        ("someone/corpus", None, "perplexity_ratio"): 1.0233,
        ("someone/corpus", None, "kl_divergence"): 0.0404,
        ("someone/corpus", None, "agreement"): 0.9263,
        ("passkey", "64 tokens", "accuracy"): 1.0,
        ("passkey", "1024 tokens", "accuracy"): 0.2,
        ("arc_easy", "0-shot", "acc"): 0.5,
    }
    name, again = model_index_to_eval_results(parsed.data.to_dict()["model-index"])
    assert name == "tiny-hedgehog"
    assert len(again) == len(found)


def test_a_window_without_linear_branch_is_not_tagged_linear_attention() -> None:
    report = document()
    for row in report["conversion"]["plan"]["layers"]:
        row["config"] = {**row["config"], "linear": False}
    assert metadata(render_card(report, repo_id=None))["tags"] == ["attnconvert", "hedgehog", "custom_code"]


def test_a_local_base_model_and_local_text_stay_out_of_the_metadata() -> None:
    report = document()
    report["conversion"] |= {"base_model": "demo", "data": {"source": "embedded"}}
    data = metadata(render_card(report, repo_id="me/x"))
    assert not {"base_model", "base_model_relation", "datasets"} & set(data)
    assert data["license"] == "other"


def test_an_unknown_licence_is_said_and_a_known_one_is_linked() -> None:
    assert "was not found" in render_card(document(), repo_id=None)
    text = render_card(document(), repo_id=None, license="other", license_name="llama3", license_link="https://example.org/terms")
    assert "[llama3](https://example.org/terms)" in text
    assert metadata(text)["license_name"] == "llama3"


def test_the_embedded_models_licence_is_found_without_a_network() -> None:
    facts = card.base_facts("demo")
    assert (facts.license, facts.language) == ("apache-2.0", ("en",))
    assert card.base_facts("someone/not-in-the-cache") == card.BaseFacts()


def test_figures_that_are_not_finite_or_missing_leave_the_card_valid() -> None:
    report = document()
    report["evaluation"]["quality"][1] |= {"ppl": {"value": None, "se": None, "ci95": None}, "kl": {"value": float("inf"), "se": None, "ci95": None}}
    data = ModelCard(render_card(report, repo_id="me/x")).data
    assert {"perplexity", "kl_divergence"}.isdisjoint(r.metric_type for r in data.eval_results)
    bare = ModelCard(render_card({"conversion": {"base_model": "someone/Tiny-1M"}}, repo_id=None))
    assert bare.data.eval_results is None
    assert "Nothing was measured" in bare.text


# ---------------------------------------------------------------- text


def test_the_text_has_code_for_both_ways_to_load_figures_with_intervals_and_the_paper() -> None:
    text = render_card(document(), repo_id="me/tiny-hedgehog")
    assert "name = 'me/tiny-hedgehog'" in text
    assert "trust_remote_code=True" in text
    assert "import attnconvert" in text
    assert 'revision="<commit>"' in text
    assert "17.39 [17.38, 17.40]" in text
    assert "0.20 [0.15, 0.25]" in text
    assert "eprint = {2402.04347}" in text
    assert text.count("@misc") == 1
    assert "5005ca87" in text
    assert "attnconvert linearize someone/Tiny-1M --recipe hedgehog" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_what_was_lost_names_findings_lost_recall_fallen_tasks_and_short_texts() -> None:
    lines = losses(document())
    assert lines[0] == "**Bad**, passkey (1024 tokens): recall is near chance"
    text = "\n".join(lines)
    assert "Recall is lost: passkey, 1,024 tokens, beyond the window: 0.20 [0.15, 0.25] against the original's 0.98" in text
    assert "2.3 % higher" in text
    assert "arc_easy (acc) falls from 0.600 to 0.500" in text
    assert "after 64 tokens its decode cache is 1.93 MiB" in text
    assert "At 7.4 % of positions" in text


def test_an_interval_that_holds_one_is_not_called_no_loss() -> None:
    report = document()
    report["evaluation"]["quality"][1]["ppl_ratio"] = estimate(1.002)
    assert any("does not prove" in line for line in losses(report))


def test_recall_that_was_only_measured_inside_the_window_is_called_unknown() -> None:
    report = document()
    report["evaluation"]["passkey"] = report["evaluation"]["passkey"][:2]
    assert any("beyond it is unknown" in line for line in losses(report))
    report["evaluation"]["passkey"] = []
    assert any("was not measured" in line for line in losses(report))


def test_adapters_say_how_to_merge_and_are_tagged_as_adapters() -> None:
    text = render_card(document(), repo_id="me/tiny-adapters", adapters_only=True)
    assert metadata(text)["base_model_relation"] == "adapter"
    assert "attnconvert merge tiny-adapters --out tiny-adapters-merged\n" in text
    assert "from_pretrained" not in text


def test_speed_comes_from_the_bench_with_the_crossover() -> None:
    report = document()
    rows = [{"model": m, "phase": "decode", "batch_size": 1, "length": n, "tokens_per_second": s} for m, n, s in
            [("teacher", 512, 50.0), ("student", 512, 40.0), ("teacher", 8192, 20.0), ("student", 8192, 41.0)]]  # fmt: skip
    report["bench"] = {"device": "cpu", "dtype": "fp32", "rows": rows, "crossover": {"decode": 4096, "prefill": None}}
    text = render_card(report, repo_id=None)
    assert "decode, 8,192 tokens, batch 1: 41 tokens/s, the original 20" in text
    assert "from 4,096 tokens on" in text
    assert "prefill" not in text.split("## Speed")[1].split("##")[0]


# ---------------------------------------------------------------- hand-written parts


def test_text_and_metadata_by_hand_survive_and_the_generated_part_is_renewed() -> None:
    old = render_card(document(), repo_id="me/x")
    old = old.replace(YAML_END + "\n", YAML_END + "\nlicense: mit\nthumbnail: pic.png\n").replace(BEGIN, "My own words.\n\n" + BEGIN) + "\nA last word.\n"
    report = document()
    report["evaluation"]["quality"][1]["ppl"] = estimate(33.5)
    text = merge_cards(render_card(report, repo_id="me/x", license="apache-2.0"), old)
    data = metadata(text)
    assert (data["license"], data["thumbnail"]) == ("mit", "pic.png")
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 33.5
    assert text.index("My own words.") < text.index(BEGIN)
    assert text.rstrip().endswith("A last word.")
    assert "33.50 [" in text
    assert "17.39 [" not in text
    assert (text.count(BEGIN), text.count(END), text.count(YAML_BEGIN)) == (1, 1, 1)
    assert merge_cards(render_card(report, repo_id="me/x", license="apache-2.0"), text) == text
    assert ModelCard(text).data.license == "mit"


def test_a_card_without_marks_is_kept_and_the_generated_text_follows() -> None:
    text = merge_cards(render_card(document(), repo_id="me/x"), "---\ntags: [mine]\nlicense: mit\nbase_model: wrong/one\n---\n# Written by hand\n")
    assert text.index("# Written by hand") < text.index(BEGIN)
    data = metadata(text)
    assert data["tags"][:2] == ["mine", "attnconvert"]
    assert (data["license"], data["base_model"]) == ("mit", "someone/Tiny-1M")
    assert merge_cards(render_card(document(), repo_id="me/x"), "Just words.").count("Just words.") == 1


def test_broken_metadata_by_hand_is_an_error_and_not_overwritten() -> None:
    with pytest.raises(AttnConvertError) as caught:
        merge_cards(render_card(document(), repo_id="me/x"), "---\n- a list\n---\nwords\n")
    assert caught.value.code == "bad-card"


# ---------------------------------------------------------------- files and paths


def test_write_card_is_idempotent_and_keeps_the_edited_file(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(document()))
    path = write_card(tmp_path, repo_id="me/x", offline=True)
    first = path.read_text()
    path.write_text(first + "\nmine\n")
    write_card(tmp_path, repo_id="me/x", offline=True)
    assert path.read_text() == first + "\nmine\n"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_licence_given_once_is_not_forgotten_by_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(document()))
    write_card(tmp_path, license="mit", language=["en", "de"], offline=True)
    text = write_card(tmp_path, repo_id="me/x", offline=True).read_text()
    data = ModelCard(text).data
    assert (data.license, data.language, data.base_model) == ("mit", ["en", "de"], "someone/Tiny-1M")
    assert "stay under its licence, `mit`" in text
    assert ModelCard(write_card(tmp_path, license="apache-2.0", offline=True).read_text()).data.license == "apache-2.0"


def test_without_a_report_the_card_comes_from_the_run_record(tmp_path: Path) -> None:
    conversion = document()["conversion"]
    facts = {"settings": {"model": {"name": "someone/Tiny-1M", "revision": None}, "recipe": conversion["recipe"]}, "seconds": {"transfer": 10.0}}
    (tmp_path / "attnconvert").mkdir()
    (tmp_path / "attnconvert" / "run.json").write_text(
        json.dumps({**facts, **{k: conversion[k] for k in ("plan", "stages", "data", "versions", "device", "command")}})
    )
    text = write_card(tmp_path, offline=True).read_text()
    assert metadata(text)["base_model"] == "someone/Tiny-1M"
    assert "`H`" in text or "`h` = hedgehog" in text
    assert "in all 10 s on cpu" in text


def test_a_folder_that_is_no_conversion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttnConvertError) as caught:
        write_card(tmp_path)
    assert caught.value.code == "not-converted"


def test_paths_of_this_machine_are_hidden_and_nothing_else_is() -> None:
    report = copy.deepcopy(document())
    report["conversion"] |= {
        "base_model": "/home/me/secret project/Tiny",
        "command": "attnconvert linearize '/home/me/secret project/Tiny' --recipe ~/recipes/my.yaml --out=../../elsewhere/out --set data.source=/data/corpus.jsonl",
        "data": {"source": "/data/corpus.jsonl", "note": "see https://example.org/a/b and 12 tokens/s, and/or user/name"},
        "windows": "C:\\Users\\me\\model",
    }
    hidden = json.dumps(hide_paths_in(report, local_paths(report)))
    for secret in ("/home", "secret project", "~/", "../", "/data/", "Users"):
        assert secret not in hidden, secret
    for kept in (
        "https://example.org/a/b",
        "tokens/s",
        "and/or",
        "user/name",
        "https://arxiv.org/abs/2402.04347",
        "model.layers.0.self_attn",
        "corpus.jsonl",
        "my.yaml",
    ):
        assert kept in hidden, kept
    text = make_card(report, old=None, repo_id="me/x")
    assert "/home/me" not in text
    assert "base_model" not in metadata(text)
