"""The page `report.html`: self-contained, escaped, well-formed, and complete where there is data."""

from __future__ import annotations

import base64
import itertools
import json
import math
import random
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attnconvert.convert.evaluate import EvalReport
from attnconvert.convert.html import read_report, render_html, write_html
from attnconvert.convert.report import render_markdown
from attnconvert.convert.svg import Block, Series, layer_strip, line_chart, linear_ticks, log_ticks, png_data_uri, scatter
from attnconvert.errors import AttnConvertError

EVIL = '<script>alert("x")</script>'
SECTIONS = {
    "converted": ("conversion", "plan"),
    "quality": ("evaluation", "quality"),
    "tasks": ("evaluation", "tasks"),
    "positions": ("evaluation", "positions"),
    "fidelity": ("evaluation", "fidelity"),
    "memory": ("evaluation", "state_bytes"),
    "generation": ("evaluation", "generation"),
    "speed": ("bench", "rows"),
}
VOID = {"meta", "img", "br", "hr", "input", "link"}


# ---------------------------------------------------------------- a made-up report with every key


def estimate(value: float, spread: float) -> dict[str, Any]:
    return {"value": value, "se": spread / 2, "ci95": [value - spread, value + spread]}


def full_document(num_layers: int = 30, num_heads: int = 9, name: str = "made-up/model-135m") -> dict[str, Any]:
    """Every key of the report, with figures that are made up but of the right kind."""
    rng = random.Random(0)
    settings = {"window": {"kind": "block", "size": 64}, "sinks": 4, "linear": True, "feature_dim": None}
    sliding = {"window": {"kind": "sliding", "size": 128}, "sinks": 4}
    layers = []
    for index in range(num_layers):
        kept = index % 10 == 7
        method = None if kept else "sliding_window" if index % 10 == 4 else "hedgehog"
        layers.append(
            {
                "layer_idx": index, "path": f"model.layers.{index}.self_attn", "num_heads": num_heads, "num_key_value_heads": 3, "head_dim": 64, "method": method,
                "config": {} if kept else sliding if method == "sliding_window" else settings, "reason": "largest error after transfer" if kept else "",
            }
        )  # fmt: skip
    errors = {str(row["layer_idx"]): 0.01 + 0.2 * rng.random() ** 3 for row in layers if row["method"]}
    stages = [
        {"stage": "transfer", "skipped": None, "steps": 1200, "tokens": 10_000_000, "seconds": 310.0, "tokens_per_second": 32258.0, "final_loss": 0.031, "layer_errors": errors, "peak_memory_bytes": 9_000_000_000},
        {"stage": "finetune", "skipped": None, "steps": 800, "tokens": 10_000_000, "seconds": 420.0, "tokens_per_second": 23809.0, "final_loss": 0.41, "layer_errors": {}, "peak_memory_bytes": 21_000_000_000},
    ]  # fmt: skip
    split = {
        "documents": 11000,
        "tokens": 20_000_000,
        "rows": 19531,
        "length": 1024,
        "sha256": "09de5134e6e88a90d9b99f6a9af0fed525b9170f52e891ed159dbac96e4587ef",
    }
    variants = {"teacher": 0.0, "student": 0.12, "linear branch zeroed": 0.31, "teacher, same data": 0.02}
    quality = []
    for who, kl in variants.items():
        kind = {"teacher": "teacher", "student": "student", "linear branch zeroed": "ablation"}.get(who, "other")
        ppl = 15.22 * math.exp(kl * 0.7)
        versus = who != "teacher"
        quality.append(
            {
                "name": who, "kind": kind, "nll": estimate(math.log(ppl), 0.02), "ppl": estimate(ppl, 0.5), "ppl_ratio": estimate(ppl / 15.22, 0.01) if versus else None,
                "kl": estimate(kl, 0.008) if versus else None, "agreement": estimate(0.95 - kl, 0.005) if versus else None,
            }
        )  # fmt: skip
    positions = []
    for start, stop in ((0, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096)):
        base = 26.0 - 1.6 * math.log2(stop)
        for who, kl in variants.items():
            more = kl * math.log2(stop) / 9
            positions.append(
                {"name": who, "start": start, "stop": stop, "num_tokens": 64000, "nll": math.log(base) + more, "ppl": base * math.exp(more), "ppl_ratio": None if who == "teacher" else math.exp(more), "kl": None if who == "teacher" else more}
            )  # fmt: skip
    recall = {"teacher": 1.0, "student": 0.75, "linear branch zeroed": 0.1, "teacher, same data": 1.0}

    def share(who: str, length: int, window: int = 128) -> float:
        return 1.0 if length <= window else max(0.1, recall[who] - (0.0 if recall[who] == 1.0 else 0.08 * math.log2(length / 256)))

    passkey = [
        {
            "name": who, "length": length, "num_trials": 100, "accuracy": share(who, length), "ci95": [max(0.0, share(who, length) - 0.08), min(1.0, share(who, length) + 0.06)],
            "mrr": 0.9, "by_third": [0.6, 0.7, 0.9], "distance": [min(length - 40, 128), length - 40], "beyond_window": length > 128,
        }
        for length in (64, 256, 1024, 4096) for who in variants
    ]  # fmt: skip
    needles = [
        {
            "name": who, "num_needles": count, "length": length, "depth": depth, "num_trials": 20, "accuracy": share(who, max(64, int(length * (1 - depth)))) / (1 if who == "teacher" else count**0.3),
            "ci95": [0.3, 0.9], "beyond_window": length * (1 - depth) > 128,
        }
        for count in (1, 4) for length in (256, 1024, 4096, 16384) for depth in (0.1, 0.3, 0.5, 0.7, 0.9) for who in ("teacher", "student")
    ]  # fmt: skip
    mqar = [
        {"name": who, "num_pairs": pairs, "length": 8 * pairs + 64, "num_trials": 200, "accuracy": max(0.02, 1.0 - (pairs / 128) * loss), "ci95": [max(0.0, 0.95 - (pairs / 128) * loss), min(1.0, 1.03 - (pairs / 128) * loss)], "chance": 0.02}
        for who, loss in (("teacher", 0.1), ("student", 0.5), ("linear branch zeroed", 0.95)) for pairs in (4, 8, 16, 32, 64, 128)
    ]  # fmt: skip
    fidelity_layers = []
    for row in layers:
        if row["method"] is None:
            continue
        heads = [{"head": head, "kl": 0.1 * rng.random(), "entropy_teacher": (teacher := 4 * rng.random()), "entropy_student": teacher * (0.8 + 0.5 * rng.random()), "monotonicity": 0.5 + 0.5 * rng.random()} for head in range(num_heads)]  # fmt: skip
        fidelity_layers.append({"layer_idx": row["layer_idx"], "output_error": errors[str(row["layer_idx"])], "kl": 0.05 + 0.1 * rng.random(), "entropy_teacher": 2.1, "entropy_student": 2.3, "monotonicity": 0.83, "heads": heads})  # fmt: skip

    def attention_map(noise: float) -> list[list[float]]:
        rows = []
        for query in range(64):
            weights = [math.exp(-(query - key) / 9) + (2.0 if key == 0 else 0.0) + noise * rng.random() if key <= query else 0.0 for key in range(64)]
            rows.append([round(weight / sum(weights), 4) for weight in weights])
        return rows

    maps = [{"layer_idx": 3 * index, "head": index, "kl": 0.4 - 0.07 * index, "pick": "median" if index == 4 else "largest", "teacher": attention_map(0.05), "student": attention_map(0.2)} for index in range(5)]  # fmt: skip
    bench_rows = []
    for batch_size in (1, 8):
        for length in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            for model in ("teacher", "student"):
                cost = 1 + length / 9000 if model == "teacher" else 1.7
                cache = 46_080 * length * batch_size if model == "teacher" else 21_000_000 * batch_size
                shared = {"model": model, "batch_size": batch_size, "length": length, "peak_memory_bytes": 600_000_000 + cache, "cache_bytes": cache}
                no_memory = model == "teacher" and length == 32768 and batch_size == 8
                note = "out of memory" if no_memory else None
                bench_rows.append({**shared, "phase": "prefill", "tokens_per_second": None if no_memory else 180_000 / cost, "seconds_per_token": None, "first_token_seconds": None if no_memory else length * cost / 180_000, "note": note})  # fmt: skip
                bench_rows.append({**shared, "phase": "decode", "tokens_per_second": None if no_memory else 42 * batch_size / cost, "seconds_per_token": cost / 42 / batch_size, "first_token_seconds": None, "note": note})  # fmt: skip
    return {
        "schema_version": 1,
        "conversion": {
            "recipe_name": "hedgehog-mixed", "base_model": name, "base_model_type": "llama",
            "plan": {"schema_version": 1, "base_model_type": "llama", "layers": layers, "num_kept_later": 3, "keep_by": "layer_error"},
            "stages": stages, "data": {"source": "text/books.jsonl", "eval_source": "text/held-out.jsonl", "seed": 0, "train": split, "eval": {**split, "documents": 200, "tokens": 262144, "rows": 256, "sha256": "0a5b80ee44cae52389ee95d84a95a61533ba76a9eef8193805f3b1085ec901ab"}},
            "versions": {"attnconvert": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "triton": "3.9.0"},
            "device": "NVIDIA H100 80GB HBM3", "seconds": 812.0, "phase_seconds": {"read text": 21.0, "transfer": 310.0, "finetune": 420.0, "evaluate": 61.0},
            "command": f"attnconvert linearize {name} --recipe hedgehog-mixed --set stages.transfer.tokens=10M --set stages.finetune.tokens=10M --out converted",
            "recipe": {"name": "hedgehog-mixed", "description": "Window, sinks and a linear branch; the layers that convert worst keep softmax", "reference": "https://arxiv.org/abs/2402.04347"},
            "seed": 0,
        },
        "evaluation": {
            "schema_version": 2, "num_rows": 256, "row_length": 1024, "num_tokens": 261_000, "quality": quality, "passkey": passkey,
            "state_bytes": [{"length": length, "student": 21_000_000, "teacher": 46_080 * length} for length in (64, 256, 1024, 4096, 16384)],
            "notes": ["Passkey length 16384 was skipped: the models go up to max_position_embeddings = 8192."], "window": 64, "device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16",
            "seconds": {"quality": 20.0, "passkey": 41.0}, "seed": 0, "config": {}, "positions": positions, "needles": needles, "mqar": mqar,
            "fidelity": {"rows": 4, "tokens": 1024, "layers": fidelity_layers, "maps": maps},
            "generation": [
                {"prompt": "Once upon a time, in a small village by the sea,", "teacher": " there lived a fisherman who had three sons.\n\nThe eldest was strong, the second was clever.", "student": " there lived a fisherman and his wife. They were poor, but they had a boat."},
                {"prompt": "Water boils at a lower temperature on a mountain because", "teacher": " the air pressure is lower there.", "student": " the air pressure is lower."},
            ],
            "tasks": [
                {"task": "arc_easy", "metric": "acc_norm", "num_fewshot": 0, "num_samples": 2376, "teacher": 0.5812, "teacher_se": 0.0101, "student": 0.5711, "student_se": 0.0102, "chance": 0.25},
                {"task": "lambada", "metric": "acc", "num_fewshot": 0, "num_samples": 5153, "teacher": 0.4012, "teacher_se": 0.0068, "student": 0.3311, "student_se": 0.0066, "chance": None},
            ],
            "findings": [
                {"level": "bad", "section": "fidelity", "row": "layer 4", "text": "The attention output of layer 4 is off by 0.61 of its power (zeros would be off by 1)."},
                {"level": "warn", "section": "passkey", "row": "4096 tokens", "text": "Passkey recall at 4096 tokens is 0.43, the teacher's 1.00."},
                {"level": "warn", "section": "needles", "row": "4 needles, 4096 tokens", "text": "Recall of 4 needles, 4096 tokens is 0.21, the teacher's 1.00."},
                {"level": "warn", "section": "tasks", "row": "lambada", "text": "lambada (acc): 0.331, the teacher has 0.401."},
            ],
        },
        "bench": {
            "schema_version": 1, "device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "versions": {"torch": "2.13.0", "attnconvert": "0.1.0"}, "date": "2026-11-22", "command": "attnconvert bench converted",
            "rows": bench_rows, "largest_batch": [{"model": model, "length": 8192, "batch_size": size, "tokens_per_second": speed} for model, size, speed in (("teacher", 96, 1100.0), ("student", 512, 5200.0))],
            "crossover": {"prefill": 8192, "decode": 6300, "cache": 512},
        },
    }  # fmt: skip


def metrics_lines(steps: int = 1000) -> list[dict[str, Any]]:
    rng = random.Random(1)
    rows: list[dict[str, Any]] = []
    for stage in ("transfer", "finetune"):
        for step in range(1, steps + 1):
            loss = (0.03 + 0.5 * math.exp(-step / 80)) * math.exp(rng.gauss(0, 0.12))
            rows.append(
                {
                    "stage": stage,
                    "step": step,
                    "loss": loss,
                    "tokens": step * 8192,
                    "lr": 1e-3,
                    **({"kl": loss * 0.8, "ce": 2.5} if stage == "finetune" else {}),
                }
            )
    return rows


# ---------------------------------------------------------------- reading the page


class Page(HTMLParser):
    """Checks that tags are balanced and collects what the tests ask for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attrs.get("id") for attrs in self.all("section")]


@pytest.fixture(scope="module")
def page_text() -> str:
    return render_html(full_document(), metrics=metrics_lines(), recipe_text="name: hedgehog-mixed\n")


# ---------------------------------------------------------------- the whole page


def test_the_page_is_well_formed_and_has_every_section(page_text: str) -> None:
    page = Page(page_text)
    expected = ["converted", "training", "quality", "tasks", "positions", "recall", "fidelity", "memory", "speed", "generation", "limits", "provenance"]
    assert page.sections == expected
    assert len(page.all("h1")) == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {f"#{ident}" for ident in expected} <= {attrs.get("href") for attrs in page.all("a")}


def test_the_page_asks_for_nothing_from_anywhere(page_text: str) -> None:
    page = Page(page_text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in page.tags:
        for key, value in attrs.items():
            assert not key.startswith("on"), f"<{tag} {key}>"
            if key in ("src", "srcset", "poster", "data", "xlink:href"):
                assert (value or "").startswith("data:image/png;base64,"), f"<{tag} {key}={value}>"
    style = re.search(r"<style>(.*?)</style>", page_text, re.S)
    assert style is not None
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)
    # A link that a reader may click asks for nothing by itself.
    links = [attrs["href"] or "" for attrs in page.all("a")]
    assert [link for link in links if not link.startswith("#")] == ["https://arxiv.org/abs/2402.04347"]


def test_a_page_of_thirty_layers_stays_below_400_kb(page_text: str) -> None:
    assert len(page_text.encode()) < 400_000


def test_size_hardly_depends_on_how_long_the_training_was() -> None:
    document = full_document()
    short, long = (len(render_html(document, metrics=metrics_lines(steps))) for steps in (300, 6000))
    assert long - short < 10_000


def test_charts_have_names_and_tables_have_headers(page_text: str) -> None:
    page = Page(page_text)
    charts = [attrs for attrs in page.all("svg") if attrs.get("aria-hidden") != "true"]
    assert len(charts) >= 12
    assert all(attrs.get("role") == "img" and len(attrs.get("aria-label") or "") > 20 for attrs in charts)
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert len(page.all("table")) == len(page.all("caption")) >= 10
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))


def test_no_coordinate_is_missing_or_not_finite(page_text: str) -> None:
    body = page_text.split("</style>")[1]
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', body)


def test_findings_are_said_in_words_and_mark_their_rows(page_text: str) -> None:
    assert page_text.count('<li class="finding bad">') == 1
    assert page_text.count('<li class="finding warn">') == 3
    assert re.search(r'<tr class="bad"><th scope="row">4 <span class="tag bad">Bad</span>', page_text)
    assert re.search(r'<tr class="warn"><th scope="row">4,096 <span class="tag warn">Warning</span>', page_text)
    assert re.search(r'<tr class="warn"><th scope="row">lambada <span class="tag warn">', page_text)
    assert re.search(r'<th scope="col">4k <span class="tag warn">', page_text)
    assert len(re.findall(r'<tr class="(bad|warn)">', page_text)) == 3


def test_without_findings_the_page_says_that_it_was_checked() -> None:
    document = full_document()
    document["evaluation"]["findings"] = []
    assert "found nothing out of order" in render_html(document)
    del document["evaluation"]["findings"]
    assert "found nothing out of order" not in render_html(document)


def test_headline_figures_are_those_of_the_report(page_text: str) -> None:
    cards = page_text.split('<dl class="cards">')[1].split("</dl>")[0]
    names = re.findall(r"<dt>(.*?)</dt>", cards)
    assert names == ["Perplexity", "KL to the original", "Same next token", "Passkey found", "Cache smaller by", "Decoding faster by", "Cost"]
    values = [re.sub(r"<.*?>", "", value) for value in re.findall(r'<span class="value">(.*?)</span><span class="detail">', cards)]
    assert values == ["\u00d7 1.088", "0.120 nats/token", "83.0 %", "0.43", "\u00d7 35.95", "\u00d7 2.73", "13 min 32 s"]
    assert "20,000,000 training tokens" in cards


def test_a_larger_cache_and_slower_decoding_are_called_that() -> None:
    document = full_document()
    for row in document["evaluation"]["state_bytes"]:
        row["student"] = 2 * row["teacher"]
    for row in document["bench"]["rows"]:
        row["tokens_per_second"] = 50.0 if row["model"] == "teacher" else 25.0
    text = render_html(document)
    assert "Cache larger by" in text
    assert "Decoding slower by" in text
    assert "smaller by</dt>" not in text


# ---------------------------------------------------------------- escaping


def test_text_from_json_stays_text() -> None:
    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {f"{name}": poison(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        keep = ("kind", "level", "phase", "model", "section", "pick")
        return value + EVIL if isinstance(value, str) and key not in keep else value

    document = poison(full_document())
    # Names that the page looks for must survive, or their parts of the page would not be there to be tested.
    for key in ("quality", "positions", "passkey", "needles", "mqar"):
        for row in document["evaluation"][key]:
            row["name"] = row["name"].replace(EVIL, "") if row["name"].startswith(("teacher<", "student<")) else row["name"]
    document["evaluation"]["findings"].append({"level": "bad", "section": EVIL, "row": EVIL, "text": EVIL})
    document["conversion"]["versions"][EVIL] = EVIL
    metrics = [{**row, "stage": row["stage"] + EVIL} for row in metrics_lines(20)]
    text = render_html(document, metrics=metrics, recipe_text=EVIL)
    page = Page(text)
    assert not page.all("script")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 100
    assert len(page.sections) == 12


def test_only_https_references_become_links() -> None:
    document = full_document()
    document["conversion"]["recipe"]["reference"] = "javascript:alert(1)"
    links = [attrs["href"] or "" for attrs in Page(render_html(document)).all("a")]
    assert links
    assert all(link.startswith("#") for link in links)


def test_attributes_cannot_be_broken_out_of() -> None:
    document = full_document()
    document["evaluation"]["needles"][0]["name"] = '" onclick="alert(1)'
    assert all("onclick" not in attrs for _, attrs in Page(render_html(document)).tags)


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_without_data_is_left_out(section: str) -> None:
    document = full_document()
    owner, key = SECTIONS[section]
    before = Page(render_html(document)).sections
    document[owner][key] = []
    after = Page(render_html(document)).sections
    assert section in before
    assert after == [ident for ident in before if ident != section]


def test_recall_is_left_out_when_none_of_its_tests_ran() -> None:
    document = full_document()
    for key in ("passkey", "needles", "mqar"):
        assert "recall" in Page(render_html(document)).sections
        del document["evaluation"][key]
    assert "recall" not in Page(render_html(document)).sections


@pytest.mark.parametrize(
    "document", [{}, {"evaluation": {}}, {"conversion": {}, "evaluation": {"quality": []}, "bench": {}}, {"conversion": None, "bench": None}]
)
def test_an_empty_document_makes_a_page_without_sections(document: dict[str, Any]) -> None:
    assert Page(render_html(document)).sections == []


def test_layers_whose_attention_could_not_be_compared_are_named() -> None:
    document = full_document(num_layers=4, num_heads=2)
    assert "Not compared" not in render_html(document)
    document["evaluation"]["fidelity"]["unreadable"] = [1, 3]
    sentence = "Not compared, because their attention is not a weighted sum of values: layers 1, 3."
    assert sentence in render_html(document)
    assert sentence in render_markdown(EvalReport.from_dict(document["evaluation"]), document["conversion"])


def document_with_spans() -> dict[str, Any]:
    document = full_document(num_layers=2, num_heads=4)
    for row in document["conversion"]["plan"]["layers"]:
        row.update(method="moa", config={"alphas": [64, 0, -32], "betas": [0.0, 1.0, 0.5], "num_sinks": 4, "min_length": 128})
    plan = {"rules": {"0": [[64, 0.0]]}, "losses": {"128": 0.1, "256": 0.1}, "densities": {"128": 0.7, "256": 0.5}, "validation_loss": 1.2}
    document["conversion"]["search"] = {
        "chosen": 0, "front": [plan], "density": 0.5, "num_rules": 40, "validation_length": 384, "dense_losses": {"384": 1.1}, "num_samples": 4,
        "notes": [], "seconds": {"samples": 3.0},
    }  # fmt: skip
    return document


def test_attention_spans_are_a_table_of_shares_at_the_longest_length_that_was_searched() -> None:
    page = render_html(document_with_spans())
    assert "keys that each KV head keeps after 256 tokens, in % (mean 55%)" in page
    assert [int(share) for share in re.findall(r'title="layer 1, KV head \d: (\d+)%', page)] == [27, 100, 39]
    assert "KV head" not in render_html(full_document(num_layers=2))


def test_any_part_of_the_attention_spans_may_be_missing() -> None:
    text = json.dumps(document_with_spans())
    for path in (("search", "front"), ("search", "front", 0, "densities"), *(("plan", "layers", 0, "config", key) for key in ("alphas", "betas", "num_sinks"))):
        for value in (None, "x"):
            document = json.loads(text)
            parent = document["conversion"]
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            assert "<h1>" in render_html(document), path


def test_any_single_key_may_be_missing_or_null() -> None:
    """Old reports and interrupted measurements lack keys, at every depth."""
    document = full_document(num_layers=4, num_heads=2)
    document["bench"]["rows"] = document["bench"]["rows"][:8]
    document["evaluation"]["needles"] = document["evaluation"]["needles"][:6]
    document["evaluation"]["fidelity"]["maps"] = [
        {"layer_idx": 0, "head": 0, "kl": 0.1, "teacher": [[1.0, 0.0], [0.5, 0.5]], "student": [[1.0, 0.0], [0.4, 0.6]]}
    ]
    paths: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                paths.append((*path, key))
                walk(item, (*path, key))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            walk(value[0], (*path, 0))

    walk(document, ())
    assert len(paths) > 180
    text = json.dumps(document)
    for path in paths:
        changed = json.loads(text)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        # Half of them go away, half become null.
        if len(path) % 2:
            parent[path[-1]] = None
        else:
            del parent[path[-1]]
        page = render_html(changed)
        assert "<h1>" in page, path
        assert not re.search(r">(nan|None|inf)<", page), path


def test_a_report_without_teacher_shows_the_student_alone() -> None:
    document = full_document()
    student = next(row for row in document["evaluation"]["quality"] if row["name"] == "student")
    student.update(ppl_ratio=None, kl=None, agreement=None)
    document["evaluation"]["quality"] = [student]
    document["evaluation"]["state_bytes"] = [{"length": 64, "student": 21, "teacher": None}]
    text = render_html(document)
    assert "the original was not measured" in text
    assert "KL to the original</dt>" not in text


def test_losses_that_are_null_or_not_finite_are_skipped() -> None:
    rows = [{"stage": "transfer", "tokens": 10 * step, "loss": None if step % 3 == 0 else math.nan if step % 3 == 1 else 1.0 + step} for step in range(30)]
    text = render_html({}, metrics=rows)
    assert Page(text).sections == ["training"]
    assert "nan" not in text.split("</style>")[1].lower()


# ---------------------------------------------------------------- files


def converted_folder(folder: Path, document: dict[str, Any]) -> Path:
    (folder / "attnconvert").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(document))
    (folder / "attnconvert" / "run.json").write_text(json.dumps({"command": "attnconvert convert it", "device": "a device", "seconds": {"finetune": 60.0}}))
    (folder / "attnconvert" / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics_lines(30))) + '\n{"stage": "finetu')
    (folder / "attnconvert" / "recipe.yaml").write_text("name: of-the-file\n")
    return folder


def test_the_page_of_a_folder_holds_report_training_and_recipe(tmp_path: Path) -> None:
    folder = converted_folder(tmp_path / "model", full_document(num_layers=4))
    path = write_html(folder)
    text = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert Page(text).sections[:2] == ["converted", "training"]
    assert "name: of-the-file" in text
    assert "attnconvert linearize made-up/model-135m" in text, "what the report says goes before what run.json says"
    assert sorted(file.name for file in folder.iterdir()) == ["attnconvert", "report.html", "report.json"], "no temporary file stays"


def test_the_record_of_the_run_fills_in_what_the_report_lacks(tmp_path: Path) -> None:
    text = write_html(converted_folder(tmp_path / "model", {"conversion": {}, "evaluation": {}})).read_text(encoding="utf-8")
    assert "attnconvert convert it" in text
    assert "1 min 00 s" in text


def test_a_report_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(full_document(num_layers=4)))
    assert "training" in Page(write_html(tmp_path).read_text(encoding="utf-8")).sections, "the stages are in the report"


def test_folders_without_a_report_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AttnConvertError, match="does not exist") as missing:
        read_report(tmp_path / "nothing")
    assert missing.value.code == "not-converted"
    with pytest.raises(AttnConvertError, match="is not the result of a conversion"):
        read_report(tmp_path)
    (tmp_path / "attnconvert").mkdir()
    (tmp_path / "attnconvert" / "run.json").write_text("{}")
    with pytest.raises(AttnConvertError, match=f"attnconvert evaluate-converted {re.escape(str(tmp_path))}") as unmeasured:
        read_report(tmp_path)
    assert unmeasured.value.code == "no-report"
    for content in ("{", "[]", '{"evaluation": 3, "conversion": {}}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(AttnConvertError, match="is not a report") as bad:
            read_report(tmp_path)
        assert bad.value.code == "bad-report"


# ---------------------------------------------------------------- charts and pictures


def decode_png(uri: str) -> tuple[int, int, list[list[tuple[int, ...]]]]:
    """Width, height and colours of an 8-bit palette PNG; checks every checksum."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + content)
        chunks[kind] = content
        place += 12 + size
    width, height, bits, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (bits, colour) == (8, 3)
    raw, palette = zlib.decompress(chunks[b"IDAT"]), chunks[b"PLTE"]
    lines = [raw[y * (width + 1) + 1 : (y + 1) * (width + 1)] for y in range(height)]
    return width, height, [[tuple(palette[3 * index : 3 * index + 3]) for index in line] for line in lines]


def test_pictures_hold_their_matrix() -> None:
    width, height, pixels = decode_png(png_data_uri([[0.0, 0.25, 1.0], [None, 2.0, math.nan]], 1.0))
    assert (width, height) == (3, 2)
    white, dark = (255, 255, 255), (7, 25, 56)
    assert pixels[0][0] == pixels[1][0] == pixels[1][2] == white
    assert pixels[0][2] == pixels[1][1] == dark
    assert white > pixels[0][1] > dark


def test_a_map_of_64_by_64_takes_few_bytes() -> None:
    rng = random.Random(0)
    noise = [[rng.random() for _ in range(64)] for _ in range(64)]
    assert len(png_data_uri(noise, 1.0)) < 6000, "noise is the worst case"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.98, 1.37), (-2.0, 3.0), (0.0, 1e-5), (5.0, 250_000.0)])
def test_linear_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 8
    steps = {round((b - a) / (high - low), 6) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


@pytest.mark.parametrize(("low", "high"), [(1.0, 1e6), (0.02, 0.09), (3.0, 4.0), (50.0, 900.0)])
def test_log_ticks_lie_inside_the_range(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_a_point_is_drawn_where_its_value_is() -> None:
    def heights(y_range: tuple[float, float]) -> list[float]:
        chart = line_chart("a chart of two points", [Series("one", 1, [(1.0, 0.0), (2.0, 1.0)])], x_label="x", y_label="y", y_range=y_range)
        return [float(value) for value in re.findall(r'<circle class="dot s1" cx="[\d.]+" cy="([\d.]+)"', chart)]

    low, high = heights((0.0, 1.0))
    assert low > high, "larger is higher up"
    middle = heights((0.0, 2.0))[1]
    assert middle == pytest.approx((low + high) / 2, abs=0.1)


def test_constant_values_still_make_a_chart() -> None:
    for scale in ("linear", "log"):
        chart = line_chart("constant", [Series("one", 1, [(5.0, 2.0), (6.0, 2.0)])], x_label="x", y_label="y", y_scale=scale)  # type: ignore[arg-type]
        assert "nan" not in chart
        assert chart.count("<circle") == 2
    assert "<circle" in line_chart("one point", [Series("one", 1, [(5.0, 2.0)])], x_label="x", y_label="y", x_scale="log")


def test_every_layer_has_a_block_and_kept_layers_are_hollow() -> None:
    blocks = [Block("S" if index == 2 else "h", None if index == 2 else 1, f"layer {index}", None if index == 2 else 0.1 * index) for index in range(6)]
    strip = layer_strip("six layers", blocks, y_label="error")
    assert strip.count('class="block s1"') == 5
    assert strip.count('class="kept"') == 1
    assert strip.count('class="bar s1"') == 5
    assert "<title>layer 2</title>" in strip


def test_many_heads_are_drawn_in_few_bytes() -> None:
    points = [(index % 40 / 10, index % 37 / 10, f"head {index}") for index in range(4096)]
    assert len(scatter("very many heads", points, x_label="x", y_label="y")) < 80_000


def test_a_chart_of_a_single_point_or_of_equal_values_is_drawn() -> None:
    for points in ([(5.0, 2.0)], [(5.0, 2.0), (5.0, 2.0)], [(1.0, 2.0), (3.0, 2.0)]):
        for scale in ("linear", "log"):
            text = line_chart("loss", [Series("a", 0, points)], x_label="tokens", y_label="loss", x_scale=scale, y_scale=scale)
            assert "nan" not in text
            assert "inf" not in text
