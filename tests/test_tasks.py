"""Benchmark tasks through lm-evaluation-harness: local task files on a tiny random model and on the embedded model, converted and not."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attnconvert import embedded
from attnconvert.convert import tasks
from attnconvert.convert.tasks import harness_model, run_tasks
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import swap

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (attnconvert[evaluation])")

NOUNS = ("sea", "old house by the river", "bread", "long and narrow road to the north", "cat")
DOCUMENTS = [
    {
        "question": f"The {NOUNS[i % 5]} " + "was there and " * (i % 4) + "then came the",
        "choices": [f" {NOUNS[(i + 1) % 5]}", f" {NOUNS[(i + 3) % 5]} again", " end"][: 2 + i % 2],
        "answer": i % 2,
        "text": f"Once there was a {NOUNS[i % 5]}. " * (1 + i % 3),
    }
    for i in range(12)
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
target_delimiter: ""
doc_to_text: "{text}"
doc_to_target: "{target}"
"""
CHOICES = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
LIKELIHOOD = "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc, aggregation: mean, higher_is_better: true}]\n"
ROLLING = "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n"


def convert(model: Any) -> Any:
    student = copy.deepcopy(model)
    method = registry.get("hedgehog")
    settings = method.runtime_config(method.config.model_validate({"window": {"kind": "block", "size": 4}, "sinks": 1}))
    rows = tuple(LayerPlan(s.layer_idx, s.path, s.num_heads, s.num_key_value_heads, s.head_dim, "hedgehog", settings) for s in find_sites(model.config))
    swap(student, ConversionPlan(model.config.model_type, rows))
    return student.eval()


def bytes_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=256, max_position_embeddings=512, initializer_range=0.2, **sizes)
    teacher = transformers.LlamaForCausalLM(config).eval()
    return SimpleNamespace(teacher=teacher, student=convert(teacher), tokenizer=bytes_tokenizer())


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    teacher = transformers.AutoModelForCausalLM.from_pretrained(embedded.model_dir(), dtype=torch.float32).eval()
    return SimpleNamespace(teacher=teacher, student=convert(teacher), tokenizer=transformers.AutoTokenizer.from_pretrained(embedded.model_dir()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their data, as a user would keep them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n")
    cache = folder / "cache"
    choice = TASK.format(name="local_choice", cache=cache, kind="multiple_choice", text="{{question}}", target="{{answer}}") + CHOICES
    likelihood = TASK.format(name="local_likelihood", cache=cache, kind="loglikelihood", text="{{question}}", target="{{choices[0]}}") + LIKELIHOOD
    rolling = TASK.format(name="local_rolling", cache=cache, kind="loglikelihood_rolling", text="", target="{{text}}") + ROLLING
    for name, text in (("choice", choice), ("likelihood", likelihood), ("rolling", rolling)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


def run(models: SimpleNamespace, *wanted: Any, **options: Any) -> list[dict[str, Any]]:
    return run_tasks(models.student, models.teacher, models.tokenizer, [str(task) for task in wanted], device="cpu", **options)


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """By hand, one row, no padding, no cache."""
    start, ids = len(tokenizer(context).input_ids), torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
    places = range(start, ids.shape[1])
    return sum(float(logp[i - 1, ids[0, i]]) for i in places), all(int(logp[i - 1].argmax()) == int(ids[0, i]) for i in places)


# ---------------------------------------------------------------- figures


@harness
def test_accuracies_of_both_models_equal_those_computed_by_hand(tiny: SimpleNamespace, folder: Path) -> None:
    rows = {row["metric"]: row for row in run(tiny, folder / "choice.yaml")}
    assert list(rows) == ["acc", "acc_norm"]
    for name in ("teacher", "student"):
        right, right_norm = [], []
        for document in DOCUMENTS:
            scores = [log_likelihood(getattr(tiny, name), tiny.tokenizer, document["question"], choice)[0] for choice in document["choices"]]
            right.append(int(np.argmax(scores)) == document["answer"])
            right_norm.append(int(np.argmax([score / len(choice) for score, choice in zip(scores, document["choices"], strict=True)])) == document["answer"])
        for metric, hits in (("acc", right), ("acc_norm", right_norm)):
            assert rows[metric][name] == pytest.approx(np.mean(hits))
            assert rows[metric][f"{name}_se"] == pytest.approx(np.std(hits, ddof=1) / 12**0.5)
    for row in rows.values():
        assert {key: row[key] for key in ("task", "num_fewshot", "num_samples", "limit", "higher_is_better")} == {
            "task": "local_choice", "num_fewshot": 0, "num_samples": 12, "limit": None, "higher_is_better": True,
        }  # fmt: skip
        assert row["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


@harness
def test_perplexity_of_continuations_equals_that_computed_by_hand(demo: SimpleNamespace, folder: Path) -> None:
    rows = {(row["task"], row["metric"]): row for row in run(demo, folder / "likelihood.yaml", limit=5.0)}
    perplexity, accuracy = rows["local_likelihood", "perplexity"], rows["local_likelihood", "acc"]
    for name in ("teacher", "student"):
        scores = [log_likelihood(getattr(demo, name), demo.tokenizer, d["question"], d["choices"][0]) for d in DOCUMENTS[:5]]
        assert perplexity[name] == pytest.approx(np.exp(-np.mean([score for score, _ in scores])), rel=1e-3)
        assert perplexity[f"{name}_se"] > 0
        assert accuracy[name] == pytest.approx(np.mean([greedy for _, greedy in scores]))
    assert perplexity["teacher"] != perplexity["student"]
    assert (perplexity["num_samples"], perplexity["limit"], perplexity["chance"], perplexity["higher_is_better"]) == (5, 5, None, False)


@harness
@pytest.mark.parametrize("models", ["tiny", "demo"])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_scores_do_not_depend_on_the_batch(models: str, which: str, request: pytest.FixtureRequest) -> None:
    given = request.getfixturevalue(models)
    model = getattr(given, which)
    requests = [SimpleNamespace(args=(d["question"], choice)) for d in DOCUMENTS for choice in d["choices"]]
    texts = [SimpleNamespace(args=(d["text"],)) for d in DOCUMENTS]
    alone, together = (harness_model(model, given.tokenizer, batch_size) for batch_size in (1, 7))
    for got, one, ask in zip(together.loglikelihood(requests), alone.loglikelihood(requests), requests, strict=True):
        assert got[0] == pytest.approx(one[0], abs=2e-4)
        assert got[1] == one[1]
        assert got[0] == pytest.approx(log_likelihood(model, given.tokenizer, *ask.args)[0], abs=2e-4)
    rolled = [lm.loglikelihood_rolling(texts) for lm in (together, alone)]
    assert rolled[0] == pytest.approx(rolled[1], abs=1e-3)
    assert np.std(rolled[0]) > 1


@harness
def test_generated_text_does_not_depend_on_the_batch(demo: SimpleNamespace) -> None:
    requests = [SimpleNamespace(args=(d["question"], {"until": ["\n"], "max_gen_toks": 8})) for d in DOCUMENTS[:5]]
    texts = [harness_model(demo.student, demo.tokenizer, batch_size).generate_until(requests) for batch_size in (1, 5)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


@harness
def test_rolling_likelihood_without_a_standard_error_has_none(tiny: SimpleNamespace, folder: Path) -> None:
    (row,) = run(tiny, folder / "rolling.yaml", limit=3)
    assert (row["metric"], row["student_se"], row["teacher_se"], row["chance"]) == ("bits_per_byte", None, None, None)
    assert row["student"] > 1
    json.dumps(row, allow_nan=False)


@harness
def test_a_bad_conversion_is_seen_on_the_same_samples(demo: SimpleNamespace, folder: Path) -> None:
    broken = copy.deepcopy(demo.student)
    with torch.no_grad():
        for layer in broken.model.layers:
            layer.self_attn.o_proj.weight.neg_()
    rows = run_tasks(broken, demo.teacher, demo.tokenizer, [str(folder / "likelihood.yaml")], device="cpu")
    assert rows[0]["student"] > 3 * rows[0]["teacher"]


# ---------------------------------------------------------------- tasks are found


@harness
def test_tasks_are_found_by_name_in_a_folder_and_without_a_teacher(tiny: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # a task that is known by name looks for its data where the harness does
    rows = run_tasks(tiny.student, None, tiny.tokenizer, ["local_choice", "rolling.yaml"], include_path=folder, limit=0.5, device="cpu")
    assert [(row["task"], row["metric"], row["num_samples"], row["teacher"], row["teacher_se"]) for row in rows] == [
        ("local_choice", "acc", 6, None, None),
        ("local_choice", "acc_norm", 6, None, None),
        ("local_rolling", "bits_per_byte", 6, None, None),
    ]


@harness
def test_examples_in_the_prompt_are_the_same_for_both_models_and_change_scores(tiny: SimpleNamespace, folder: Path) -> None:
    text = (folder / "likelihood.yaml").read_text().replace("local_likelihood", "local_shots") + "fewshot_split: test\n"
    (folder / "shots.yaml").write_text(text)
    none, two = (run(tiny, folder / "shots.yaml", limit=4, num_fewshot=shots)[0] for shots in (0, 2))
    assert (none["num_fewshot"], two["num_fewshot"]) == (0, 2)
    assert none["student"] != two["student"]
    assert two == run(tiny, folder / "shots.yaml", limit=4, num_fewshot=2)[0], "the same examples every time"


@harness
def test_a_group_counts_the_samples_of_its_tasks(tiny: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "group.yaml").write_text("group: local_group\ntask: [local_choice]\naggregate_metric_list: [{metric: acc}]\n")
    rows = run(tiny, folder / "group.yaml", limit=4)
    assert ("local_group", "acc", 4) in [(row["task"], row["metric"], row["num_samples"]) for row in rows]


@harness
def test_nothing_of_the_process_is_changed(tiny: SimpleNamespace, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (logging.getLogger("lm_eval").level, dict(__import__("os").environ), torch.get_rng_state())
    run(tiny, folder / "likelihood.yaml", limit=2)
    assert capsys.readouterr().out == "", "stdout is for results"
    assert (logging.getLogger("lm_eval").level, dict(__import__("os").environ)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert tiny.tokenizer.pad_token is None


# ---------------------------------------------------------------- mistakes


@harness
@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, "task-file", "there is no task file"),
        ("task: [", "task-file", "cannot be read"),
        ("dataset_path: json\n", "task-file", "does not name its task"),
        ("task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\noutput_type: multiple_choice\n", "task-data", "nowhere.jsonl"),
        ("task: x\ndataset_path: nobody/nothing-of-the-kind\ntest_split: test\noutput_type: multiple_choice\n", "task-offline", "nobody/nothing-of-the-kind"),
    ],
)  # fmt: skip
def test_mistakes_in_a_task_file_are_explained(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, code: str, words: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AttnConvertError) as caught:
        run(tiny, path)
    assert caught.value.code == code
    assert words in caught.value.render()


@harness
def test_an_unknown_task_is_answered_with_close_matches(tiny: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    # the index of all tasks of the harness takes 10 s to build
    monkeypatch.setattr("attnconvert.convert.tasks._manager", lambda folders, named: TaskManager(include_path=[*map(str, folders)], include_defaults=False))
    with pytest.raises(AttnConvertError) as caught:
        run(tiny, "local_choise", include_path=folder)
    assert caught.value.code == "unknown-task"
    assert "close matches: local_choice" in caught.value.render()
    with pytest.raises(AttnConvertError, match="no folder"):
        run(tiny, "local_choice", include_path=folder / "nowhere")


@harness
def test_the_index_of_the_harness_is_built_only_for_names_that_a_folder_does_not_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def index(include_path: list[str], include_defaults: bool = True) -> Any:
        asked.append(include_defaults)
        return SimpleNamespace(task_index={"local_choice": None})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", index)
    tasks._manager([folder], ["local_choice"])
    assert asked == [False]
    tasks._manager([folder], ["local_choice", "arc_easy"])
    assert asked == [False, False, True]


@pytest.mark.parametrize("limit", [0, -3, 2.5])
def test_a_senseless_limit_is_refused(tiny: SimpleNamespace, limit: float) -> None:
    with pytest.raises(AttnConvertError) as caught:
        run(tiny, "anything", limit=limit)
    assert caught.value.code == "bad-limit"


def test_without_the_harness_the_extra_is_named(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AttnConvertError) as caught:
        run(tiny, "arc_easy")
    assert caught.value.code == "missing-extra"
    assert "attnconvert[evaluation]" in caught.value.render()


@harness
def test_a_harness_that_is_too_old_is_named(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("lm_eval.tasks.TaskManager.load")
    with pytest.raises(AttnConvertError, match="too old") as caught:
        run(tiny, "arc_easy")
    assert caught.value.code == "missing-extra"


def test_no_tasks_need_no_harness(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    check: Callable[[], None] = lambda: pytest.fail("not needed")  # noqa: E731
    monkeypatch.setattr("attnconvert.convert.tasks._check_harness", check)
    assert run(tiny) == []
