"""vLLM's text of converted models is transformers' text, however requests are cut, mixed and interrupted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import CONVERSIONS, DENSE_LENGTH, write
from engines import Request, crowd, differing, engine, prompts

from attnconvert import cli, embedded

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; `make test-vllm` runs these in an environment of its own", allow_module_level=True)

__all__ = ["engine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def converted(folder: Path, conversion: str, kept: tuple[int, ...] = ()) -> Path:
    out = folder / f"{conversion}-{len(kept)}"
    return out if out.exists() else write(str(embedded.model_dir()), conversion, out, kept=kept)


@pytest.mark.parametrize("conversion", list(CONVERSIONS))
def test_requests_in_pieces_together_and_late_get_the_text_of_transformers(folder, engine, conversion):
    model, requests = converted(folder, conversion), crowd()
    found = engine(model, requests)
    assert found["rows"] == 16
    assert differing(model, requests, found["answers"]) == 0


def random_model(family: str, folder: Path) -> Path:
    """A small random model of a family, sharp enough that mistakes show in its text, with the embedded tokenizer."""
    torch.manual_seed(1)
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_dir())
    options = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **({"sliding_window": None} if family == "mistral" else {}),
    }
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **shape, **options))
    for name, parameter in model.named_parameters():  # biases and norms of queries that do something
        parameter.data.mul_(3.0).add_(0.0 if parameter.dim() > 1 else 0.1 * torch.randn_like(parameter), alpha=1.0 if "norm" not in name else 0.5)
    model.save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)
    return folder / family


@pytest.mark.parametrize(("family", "conversion"), [("mistral", "hedgehog"), ("qwen2", "hedgehog"), ("qwen3", "hedgehog"), ("qwen3", "moh")])
def test_other_families_get_the_text_of_transformers(tmp_path, engine, family, conversion):
    model, requests = write(str(random_model(family, tmp_path)), conversion, tmp_path / "converted", kept=(1,)), crowd()
    assert differing(model, requests, engine(model, requests)["answers"]) == 0


@pytest.mark.parametrize("conversion", ["hedgehog", "moa"])
def test_whole_prompts_get_the_text_of_transformers(folder, engine, conversion):
    model, requests = converted(folder, conversion), crowd()
    assert differing(model, requests, engine(model, requests, max_num_batched_tokens=4096)["answers"]) == 0


@pytest.mark.parametrize("conversion", ["hedgehog", "moa"])
def test_preempted_requests_begin_again_from_an_empty_state(folder, engine, conversion):
    # Layers that are kept make a request need more pages as it grows, so that the pages run out.
    model = converted(folder, conversion, kept=(1, 3))
    requests = [Request(prompt, 300) for prompt in prompts([100] * 12)]
    found = engine(model, requests, max_model_len=512, max_num_batched_tokens=512, num_gpu_blocks_override=40)
    assert found["preemptions"] > 0
    assert differing(model, requests, found["answers"]) == 0


@pytest.mark.parametrize("fault", ["state not reset", "state of a chunk lost", "rows swapped"])
def test_a_planted_fault_changes_the_text(folder, engine, fault):
    model, requests = converted(folder, "hedgehog"), crowd()
    assert differing(model, requests, engine(model, requests, fault)["answers"]) > 20


def test_a_stock_export_needs_nothing_of_ours(folder, engine):
    model, requests = folder / "stock", crowd()
    assert cli.main(["regroup", "demo", "--kv-heads", "4", "--tokens", "1k", "--device", "cpu", "--out", str(model)]) == 0
    found = engine(model, requests)
    assert differing(model, requests, found["answers"]) == 0
    assert not list(model.glob("*.py"))


def test_contexts_in_which_blocks_would_be_chosen_are_refused_before_weights_are_read(folder, engine):
    found = engine(converted(folder, "infllm"), [], refuses=True, max_model_len=DENSE_LENGTH + 1)
    assert "error[not-served]" in found["log"]
    assert f"--max-model-len {DENSE_LENGTH}" in found["log"]
    assert "Loading weights" not in found["log"]
