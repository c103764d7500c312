"""Bad models: each has its own error with the next step, through the command line, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import errors as hub

from attnconvert import embedded
from attnconvert.cli import main
from attnconvert.convert.load import load_model, resolve
from attnconvert.errors import AttnConvertError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A private copy of the embedded model."""
    return Path(shutil.copytree(embedded.model_dir(), tmp_path / "model"))


def fails(capsys: pytest.CaptureFixture[str], model: object, tmp_path: Path, *more: str) -> str:
    """What a failing `linearize` prints; asserts exit 1, no traceback, and no trace on the disk."""
    out = tmp_path / "out"
    before = sorted(p for p in tmp_path.rglob("*") if "model" not in p.parts)
    assert (
        main(
            [
                "linearize",
                str(model),
                "--recipe",
                "hedgehog",
                "--out",
                str(out),
                "--device",
                "cpu",
                "--set",
                "stages.transfer.tokens=1k",
                "--set",
                "stages.finetune.tokens=0",
                *more,
            ]
        )
        == 1
    )
    assert sorted(p for p in tmp_path.rglob("*") if "model" not in p.parts) == before
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert "hint:" in text
    return text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1_000_000])


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


def without_shard(folder: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="5MB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(iter(sorted(folder.glob("model-00002-of-*.safetensors")))).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated weights": (truncate, "corrupt-weights", "download"),
    "git lfs pointer": (lfs_pointer, "corrupt-weights", "download"),
    "a shard is missing": (without_shard, "shard-missing", "model-00002-of-"),
    "pickle weights": (pickled, "pickle-weights", "safetensors"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no-weights", "model.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "model-not-found", "config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "bad-config", "config.json"),
    "unknown architecture": (lambda d: edit_config(d, model_type="llamma"), "unknown-architecture", "llamma"),
    "a tensor is missing": (without_a_tensor, "missing-tensors", "model.layers.3.mlp.up_proj.weight"),
    "other shapes than config.json": (lambda d: edit_config(d, intermediate_size=512), "shape-mismatch", "config.json"),
    "tokenizer missing": (without_tokenizer, "tokenizer-missing", "tokenizer.json"),
    "attention outside the interface": (
        lambda d: edit_config(d, model_type="bloom", architectures=["BloomForCausalLM"], n_layer=2, n_head=4),
        "attention-not-reachable",
        "bloom",
    ),
    "an encoder": (lambda d: edit_config(d, model_type="bert", architectures=["BertForMaskedLM"]), "not-a-causal-lm", "bert"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_is_refused_with_the_reason(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, code, said = DAMAGE[what]
    damage(model)
    text = fails(capsys, model, tmp_path)
    assert f"error[{code}]" in text
    assert said in text


def raising(error: Exception, cause: Exception) -> Callable[..., Any]:
    def raise_it(*args: object, **kwargs: object) -> Any:
        raise error from cause

    return raise_it


def response() -> Any:
    """What huggingface_hub's HTTP errors want to hold; httpx in 1.x, httpx2 in 2.x."""
    try:
        import httpx2 as http
    except ImportError:
        import httpx as http
    return http.Response(404, request=http.Request("GET", "https://localhost/x"))


HUB = {
    "unknown id": (lambda: hub.RepositoryNotFoundError("404", response=response()), "model-not-found"),
    "gated": (lambda: hub.GatedRepoError("403", response=response()), "gated-model"),
    "offline": (lambda: hub.LocalEntryNotFoundError("not cached"), "offline"),
    "no such revision": (lambda: hub.RevisionNotFoundError("404", response=response()), "model-not-found"),
}


@pytest.mark.parametrize("what", HUB)
def test_what_the_hub_refuses_is_explained(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make, code = HUB[what]
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", raising(OSError("cannot load"), make()))
    assert f"error[{code}]" in fails(capsys, "user/name", tmp_path)


def test_a_hub_id_without_a_network_says_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error[offline]" in fails(capsys, "nobody/nothing-of-the-kind", tmp_path)


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error[model-not-found]" in fails(capsys, tmp_path / "nowhere", tmp_path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"nonsense")
    with pytest.raises(AttnConvertError, match="not a GGUF file"):
        resolve(str(path))


def test_the_embedded_model_loads_frozen_in_its_own_dtype() -> None:
    loaded = load_model(resolve("demo"))
    assert loaded.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
