"""A checkpoint is complete and proven, or not there: parity, reload in a bare process, full disks, replacing, adapters and merging."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconvert import embedded
from attnconvert.convert import save
from attnconvert.convert.load import load_model, resolve
from attnconvert.convert.merge import Adapters, load_merged, merge
from attnconvert.convert.pipeline import load_converted, prepare
from attnconvert.convert.save import (
    cast_weights,
    check_output,
    check_parity,
    check_reload,
    discard_leftovers,
    fingerprint,
    new_folder,
    save_adapters,
    save_checkpoint,
)
from attnconvert.distill.config import LoraConfig
from attnconvert.distill.lora import add_lora, lora_layers, merge_lora
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.linear import reference
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.swap import swap

SMALL = ["layers.0.config.window.size=16"]


def converted(recipe: str = "hedgehog", overrides: list[str] | None = None) -> tuple[Any, Any]:
    """The embedded model in bf16, converted and shaken a little so that no parameter is at its start, with its tokenizer."""
    prepared = prepare("demo", recipe, overrides=SMALL if overrides is None else overrides)
    loaded = load_model(prepared.source)
    swap(loaded.model, prepared.plan)
    generator = torch.Generator().manual_seed(3)
    for _, _, module in converted_sites(loaded.model):
        for parameter in module.core.parameters():  # type: ignore[union-attr]
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    model, tokenizer = converted()
    save_checkpoint(model, tokenizer, out, dtype=torch.bfloat16, extra_files={"attnconvert/note.txt": "hello\n"})
    return out


def no_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the fresh process, seconds each, where another test covers it."""
    monkeypatch.setattr(save, "check_reload", lambda model, folder: None)


def error_of(call: Any) -> AttnConvertError:
    with pytest.raises(AttnConvertError) as caught:
        call()
    return caught.value


# ---------------------------------------------------------------- what a checkpoint is


def test_a_saved_checkpoint_loads_with_attnconvert_and_no_trust_to_equal_logits(saved: Path) -> None:
    model, _ = converted()
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=False).eval()
    ids = torch.randint(0, 4096, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(saved, trust_remote_code=False)("one two")["input_ids"]


def test_weights_are_bf16_cores_fp32_and_every_file_is_readable_by_others(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if ".core." in name} == {torch.float32}
    assert {t.dtype for name, t in tensors.items() if ".core." not in name} == {torch.bfloat16}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 for path in saved.rglob("*"))
    assert (saved / "attnconvert" / "note.txt").read_text() == "hello\n"
    assert (saved / "generation_config.json").exists()
    assert list(saved.parent.iterdir()) == [saved]


def test_a_bare_process_without_attnconvert_runs_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    code = (
        "import sys, json; sys.path[:] = json.loads(sys.argv[1]); sys.modules['attnconvert'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()\n"
        "with torch.no_grad(): print(json.dumps([type(m).__module__, m(torch.arange(40)[None]).logits[0, -1, :5].tolist()]))\n"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps([p for p in sys.path if p]), str(saved)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    module, logits = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    with torch.no_grad():
        assert logits == load_converted(saved)(torch.arange(40)[None]).logits[0, -1, :5].tolist()


def test_reload_check_sees_a_model_that_differs_from_the_files(saved: Path) -> None:
    model = load_converted(saved)
    core: Any = next(module.core for _, _, module in converted_sites(model))
    core.query_gate.data += 0.5
    error = error_of(lambda: check_reload(model, saved))
    assert error.code == "reload-failed"
    assert "logits differ" in error.message


def test_reload_check_says_what_the_other_process_said(saved: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    (broken / "attnconvert_linear_reference.py").unlink()
    error = error_of(lambda: check_reload(load_converted(saved), broken))
    assert error.code == "reload-failed"
    assert "attnconvert_linear_reference" in error.message


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("recipe", ["hedgehog", "hedgehog-pure", "window-sinks", "lolcats"])
def test_all_ways_to_run_a_converted_model_agree_far_inside_the_tolerance(recipe: str) -> None:
    found = check_parity(converted(recipe, [] if recipe == "hedgehog-pure" else SMALL)[0])
    assert found.dtype == torch.float32  # widened: bf16 rounding would hide mistakes
    assert max(found.errors.values()) < found.tolerance / 10
    assert len(found.errors) == 4


def forget_what_left_the_window(*arguments: Any) -> None:
    """Keys leave the window and never reach the state."""


def shift_sinks(state: Any, k: Any, v: Any, doc: Any, kv: Any, z: Any, *, real: Any = reference._next_state) -> Any:
    after = real(state, k, v, doc, kv, z)
    return after._replace(sink_k=after.sink_k.roll(1, 2))


@pytest.mark.parametrize(("function", "planted"), [("decode._fold", forget_what_left_the_window), ("reference._next_state", shift_sinks)])
def test_a_planted_decode_bug_fails_the_parity_check_and_nothing_is_written(
    function: str, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"attnconvert.kernels.linear.{function}", planted)
    model, tokenizer = converted()
    error = error_of(lambda: save_checkpoint(model, tokenizer, tmp_path / "model", dtype=torch.bfloat16, extra_files={}))
    assert error.code == "parity-failed"
    assert "prefill + decode steps" in error.message
    assert list(tmp_path.iterdir()) == []


def test_a_mask_that_is_ignored_fails_the_parity_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnconvert.surgery.runtime import modeling

    monkeypatch.setattr(modeling, "document_starts", lambda *args, **kwargs: None)
    error = error_of(lambda: check_parity(converted()[0]))
    assert "left-padded batch by" in error.message
    assert "chunked prefill" not in error.message


def test_parity_leaves_weights_and_settings_as_they_were() -> None:
    model, _ = converted()
    core: Any = next(module.core for _, _, module in converted_sites(model))
    core.compile_kernel = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_parity(model)
    assert core.compile_kernel
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())


def test_casting_keeps_rotary_frequencies_and_cores_in_fp32() -> None:
    model, _ = converted()
    model.float()
    cast_weights(model, torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for name, p in model.named_parameters() if ".core." in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if ".core." not in name} == {torch.bfloat16}


# ---------------------------------------------------------------- disks and folders


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [full_disk, full_disk_in_rust])
def test_a_full_disk_leaves_nothing_and_says_so(failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = converted()
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", failure)
    error = error_of(lambda: save_checkpoint(model, tokenizer, tmp_path / "model", dtype=torch.bfloat16, extra_files={}))
    assert error.code == "disk-full"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_replacing_keeps_the_old_checkpoint(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    shutil.copytree(saved, out)
    model, tokenizer = converted()
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full_disk)
    with pytest.raises(AttnConvertError, match="disk-full"):
        save_checkpoint(model, tokenizer, out, dtype=torch.bfloat16, extra_files={}, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_checkpoint_is_replaced_whole(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_reload(monkeypatch)
    out = tmp_path / "model"
    shutil.copytree(saved, out)
    (out / "stray.txt").write_text("old")
    model, tokenizer = converted("window-sinks")
    save_checkpoint(model, tokenizer, out, dtype=torch.bfloat16, extra_files={}, overwrite=True)
    assert not (out / "stray.txt").exists()
    assert not any(".core." in name for name in load_file(out / "model.safetensors"))
    assert list(tmp_path.iterdir()) == [out]


def test_an_output_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)
    check_output(tmp_path / "new", overwrite=False)
    assert error_of(lambda: check_output(tmp_path / "file", overwrite=True)).code == "output-not-a-folder"
    assert error_of(lambda: check_output(tmp_path / "home", overwrite=False)).code == "output-not-empty"
    # --overwrite replaces checkpoints, not whatever somebody points it at
    assert error_of(lambda: check_output(tmp_path / "home", overwrite=True)).code == "output-not-ours"


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"m.tmp-{dead.pid}-abc", f"m.tmp-{os.getpid()}-abc", f"m.old-{dead.pid}", "m.tmp-mine", "m2.tmp-1-x"):
        (tmp_path / name).mkdir()
    (tmp_path / f"m.old-{dead.pid}" / "config.json").write_text("{}")
    discard_leftovers(tmp_path / "m")
    # the old checkpoint of a replacement that was killed halfway is back in its place
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", f"m.tmp-{os.getpid()}-abc", "m.tmp-mine", "m2.tmp-1-x"]
    assert (tmp_path / "m" / "config.json").exists()


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out", overwrite=False) as folder:
            (folder / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


# ---------------------------------------------------------------- adapters


def with_adapters() -> tuple[Any, Any, Adapters]:
    """A converted model with adapters that do something, and the facts about it."""
    prepared = prepare("demo", "hedgehog", overrides=SMALL)
    loaded = load_model(prepared.source)
    base_hash = fingerprint(loaded.model)
    swap(loaded.model, prepared.plan)
    wrapped = add_lora(loaded.model, [row.path for row in prepared.plan.converted], LoraConfig(), seed=0)
    generator = torch.Generator().manual_seed(4)
    for layer in lora_layers(wrapped).values():
        layer.lora_B["default"].weight.data.copy_(0.05 * torch.randn(layer.lora_B["default"].weight.shape, generator=generator))
    for _, _, module in converted_sites(loaded.model):
        module.core.key_map.data += 0.02  # type: ignore[union-attr,operator]
    return wrapped, loaded.tokenizer, Adapters(prepared.plan, "demo", None, base_hash, "auto", "bfloat16", prepared.recipe.resolved, {})


def test_merged_adapters_equal_the_full_save_tensor_for_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_reload(monkeypatch)
    wrapped, tokenizer, facts = with_adapters()
    save_adapters(wrapped, tmp_path / "adapters", base_name="demo", revision=None, facts=facts.to_dict(), extra_files={"attnconvert/recipe.yaml": "name: x\n"})
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "demo"
    assert sum(p.stat().st_size for p in (tmp_path / "adapters").rglob("*")) < 2**21

    save_checkpoint(merge_lora(wrapped), tokenizer, tmp_path / "full", dtype=torch.bfloat16, extra_files={})
    merge(tmp_path / "adapters", tmp_path / "merged", base=None, device="cpu")
    full, merged = load_file(tmp_path / "full" / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert full.keys() == merged.keys()
    assert all(torch.equal(full[name], merged[name]) for name in full)
    stock = load_file(embedded.model_dir() / "model.safetensors")
    assert any(not torch.equal(full[name], stock[name]) for name in stock)
    assert (tmp_path / "merged" / "attnconvert" / "recipe.yaml").read_text() == "name: x\n"


def test_adapters_refuse_another_base_model_and_damaged_files(tmp_path: Path) -> None:
    wrapped, _, facts = with_adapters()
    folder = tmp_path / "adapters"
    save_adapters(wrapped, folder, base_name="demo", revision=None, facts=facts.to_dict(), extra_files={})
    other = tmp_path / "other"
    shutil.copytree(embedded.model_dir(), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"] * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert error_of(lambda: load_merged(folder, base=str(other))).code == "base-mismatch"

    assert error_of(lambda: load_merged(tmp_path)).code == "not-adapters"
    weights = folder / "adapter_model.safetensors"
    adapters = load_file(weights)
    adapters.pop(next(iter(adapters)))
    save_file(adapters, weights)
    assert error_of(lambda: load_merged(folder)).code == "corrupt-weights"
    (folder / "cores.safetensors").write_bytes((folder / "cores.safetensors").read_bytes()[:1000])
    assert error_of(lambda: load_merged(folder)).code == "corrupt-weights"
    (folder / "attnconvert.json").write_text('{"schema_version": 99}')
    error = error_of(lambda: load_merged(folder))
    assert error.code == "not-adapters"
    assert "99" in error.message


def test_fingerprint_is_stable_and_changes_with_a_finetune() -> None:
    model = load_model(resolve("demo")).model
    first = fingerprint(model)
    assert fingerprint(load_model(resolve("demo")).model) == first
    model.model.layers[5].self_attn.v_proj.weight.data *= 1.02
    assert fingerprint(model) != first
