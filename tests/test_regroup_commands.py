"""The command `regroup` with the variants: similar groups, fewer query heads, uneven heads, architectures without a number of KV heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import COMMON
from safetensors.torch import load_file

from attnconvert import cli, embedded
from attnconvert.convert import pipeline
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.regroup import GROUPINGS, INITS

BUDGET = ["--set", "stages.transfer.tokens=1k", "--set", "stages.transfer.length=64", "--set", "stages.finetune.tokens=1k", "--set", "stages.finetune.length=64", "--set", "evaluate.length=64",
          "--device", "cpu", "--skip-evaluation", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A GPT-NeoX and a Llama of 2 layers and 4 heads with the embedded tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("models")
    shape = {**COMMON, "vocab_size": 4096, "num_hidden_layers": 2, "eos_token_id": 0}
    del shape["num_key_value_heads"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_dir())
    for name, config in (("neox", transformers.GPTNeoXConfig(**shape)), ("llama", transformers.LlamaConfig(**shape))):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def no_reload(monkeypatch):
    """Without the fresh process of 4 seconds, which other tests have."""
    monkeypatch.setattr("attnconvert.convert.save.check_reload", lambda model, folder: None)


@pytest.mark.usefixtures("no_reload")
def test_a_pythia_is_saved_as_another_stock_architecture_and_says_so(models, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["regroup", str(models / "neox"), "--kv-heads", "2", "--grouping", "similar", "--tokens", "1k", "--device", "cpu", "--out", str(out)]) == 0
    assert "Saved as a 'phi' model that computes the same: a 'gpt_neox' model has no number of KV heads." in " ".join(capsys.readouterr().out.split())
    assert type(transformers.AutoModelForCausalLM.from_pretrained(out)) is transformers.PhiForCausalLM


@pytest.mark.usefixtures("no_reload")
def test_training_takes_uneven_heads_and_freezes_their_map(models, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["regroup", str(models / "llama"), "--recipe", "kdgqa", *BUDGET, "--out", str(out)]) == 0
    rows = json.loads((out / "config.json").read_text())["attn_plan"]["layers"]
    for row in rows:
        assert row["config"]["kv_heads"] == len(row["config"]["query_heads"]) == 2
        assert sum(row["config"]["query_heads"]) == 4
    assert (out / "attnconvert_uneven.py").exists()


@pytest.mark.usefixtures("no_reload")
def test_uneven_heads_of_another_architecture_are_measured_with_the_standard_suite_and_described(models, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["regroup", str(models / "neox"), "--recipe", "kdgqa", *BUDGET, "--out", str(out)]) == 0
    assert cli.main(["evaluate-converted", str(out), "--suite", "standard", "--tokens", "256", "--device", "cpu", "--quiet"]) == 0
    report = json.loads((out / "report.json").read_text())["evaluation"]
    assert not report["fidelity"]  # the layers have no softmax attention on the same projections to compare with
    assert cli.main(["card", str(out)]) == 0
    assert "with fewer key-value heads in all 2 layers (`kdgqa`)" in (out / "README.md").read_text()


@pytest.mark.usefixtures("no_reload")
def test_training_takes_fewer_query_heads(models, tmp_path):
    out = tmp_path / "out"
    arguments = ["--recipe", "gqa", "--kv-heads", "1", "--query-heads", "2", "--grouping", "similar"]
    assert cli.main(["regroup", str(models / "llama"), *arguments, *BUDGET, "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)


@pytest.mark.parametrize(
    ("override", "said"), [("keep.fraction=0.5", "put back to softmax attention after transfer"), ("layers.0.config.kv_heads=5", "fewer than the 5 asked for")]
)
def test_what_uneven_heads_cannot_do_is_refused_before_a_model_is_loaded(models, override, said):
    overrides = [override, *(["keep.by=kl"] if override.startswith("keep") else [])]
    with pytest.raises(AttnConvertError) as caught:
        pipeline.prepare(str(models / "llama"), "kdgqa", overrides=overrides)
    assert said in caught.value.message


@pytest.mark.parametrize("recipe", ["gqa", "kdgqa"])
def test_new_projections_are_not_saved_as_adapters(models, tmp_path, recipe):
    prepared = pipeline.prepare(str(models / "llama"), recipe, overrides=[word for word in BUDGET if "=" in word])
    with pytest.raises(AttnConvertError, match="its projections are new as a whole"):
        pipeline.run(prepared, pipeline.RunOptions(tmp_path / "out", adapters_only=True), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_reload")
def test_without_training_uneven_heads_are_merged_and_not_drawn_at_random(models, tmp_path):
    settings = ["kv_heads=4", "query_heads=[1,1,1,1]"]
    untrained = [
        "--set",
        "stages.transfer.tokens=0",
        "--set",
        "stages.finetune.tokens=0",
        *(word for s in settings for word in ("--set", f"layers.0.config.{s}")),
    ]
    out = tmp_path / "out"
    assert cli.main(["regroup", str(models / "llama"), "--recipe", "kdgqa", *BUDGET, *untrained, "--out", str(out)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "llama", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_that_an_engine_would_misread_comes_without_a_command_to_serve_it():
    assert "vllm serve out" in cli.next_steps(Path("out"), adapters_only=False, stock="llama")
    assert "vllm" not in cli.next_steps(Path("out"), adapters_only=False, stock="phi")


def test_the_command_line_names_the_groupings_and_inits_that_there_are():
    assert (cli._GROUPINGS, cli._INITS) == (GROUPINGS, INITS)
