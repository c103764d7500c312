"""Pushing to a Hub: a real HTTP server on localhost, real huggingface_hub, every fault it can have, and the way back."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from safetensors.torch import load_file, save_file
from test_card import document

from attnconvert import embedded
from attnconvert.convert import hub, save
from attnconvert.convert.hub import PushResult, push
from attnconvert.convert.load import load_model
from attnconvert.convert.pipeline import prepare
from attnconvert.convert.reevaluate import locate
from attnconvert.convert.save import save_adapters, save_checkpoint
from attnconvert.distill.config import LoraConfig
from attnconvert.distill.lora import add_lora
from attnconvert.errors import AttnConvertError
from attnconvert.recipes.load import dump_resolved, load_recipe
from attnconvert.surgery.swap import swap

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub 2 calls httpx2

ROOT = Path(__file__).parents[1]
SMALL = ["layers.0.config.window.size=16"]
RECORDS = {"attnconvert/recipe.yaml": "name: hedgehog\ndata: {source: /home/someone/private/corpus.jsonl}\n", "attnconvert/metrics.jsonl": '{"step": 1}\n',
           "attnconvert/run.json": json.dumps({"settings": {"model": {"name": "/home/someone/private/Tiny"}}, "command": "attnconvert linearize /home/someone/private/Tiny"})}  # fmt: skip


def tiny_teacher(folder: Path) -> Path:
    """A random Llama with the embedded model's tokenizer, about 1 MB."""
    config = transformers.LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(embedded.model_dir()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint with a report and records, and with files beside it that must stay at home."""
    prepared = prepare(str(teacher), "hedgehog", overrides=SMALL)
    loaded = load_model(prepared.source)
    swap(loaded.model, prepared.plan)
    out = tmp_path_factory.mktemp("made") / "tiny-hedgehog"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "check_reload", lambda model, folder: None)
        save_checkpoint(loaded.model, loaded.tokenizer, out, dtype=torch.float32, extra_files=RECORDS)
    report = document()
    report["conversion"] |= {"base_model": "/home/someone/private/Tiny", "command": "attnconvert linearize /home/someone/private/Tiny --out /home/someone/out"}
    (out / "report.json").write_text(json.dumps(report))
    (out / "report.md").write_text("# report\n\nmade from /home/someone/private/Tiny\n")
    (out / "plots").mkdir()
    (out / "plots" / "speed.png").write_bytes(b"\x89PNG picture")
    for name in ("optimizer.pt", "notes.txt", "half.tmp", "tiny.run/checkpoint.safetensors", "secret.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"stays at home")
    return out


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The library may speak HTTP to localhost, without Xet and without anybody's token; waiting takes no time and is written down."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def server(pauses: list[float]) -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh process, seconds each, where another test covers it."""
    monkeypatch.setattr(hub, "check_loads", lambda files, adapters_only, base: None)


def go(server: HubServer, folder: Path, repo_id: str = "tester/tiny", **more: Any) -> PushResult:
    return push(folder, repo_id, token=more.pop("token", server.token), endpoint=server.url, **more)


def refusal(server: HubServer, folder: Path, repo_id: str = "tester/tiny", **more: Any) -> AttnConvertError:
    with pytest.raises(AttnConvertError) as caught:
        go(server, folder, repo_id, **more)
    return caught.value


def in_a_process(server: HubServer, home: Path, *command: str) -> str:
    """Stdout of a command whose Hub is the server and whose caches are new."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=home, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------- there and back


def test_a_pushed_model_comes_back_identical_and_loads_in_a_bare_process_with_equal_logits(server: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    result = go(server, checkpoint)  # with the real check in a fresh process
    assert (result.repo_id, result.url, result.revision) == ("tester/tiny", f"{server.url}/tester/tiny", "main")
    assert result.commit == server.repos["tester/tiny"].heads["main"]
    back = Path(snapshot_download("tester/tiny", endpoint=server.url, cache_dir=tmp_path / "back"))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "modeling_attnconvert.py", "plots/speed.png", "attnconvert/metrics.jsonl"):
        assert (back / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert {f.path for f in result.files} == set(server.files("tester/tiny"))
    code = (
        "import sys, json; sys.modules['attnconvert'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained('tester/tiny', revision=sys.argv[1], trust_remote_code=True, dtype='auto').eval()\n"
        "t = AutoTokenizer.from_pretrained('tester/tiny', trust_remote_code=False)\n"
        "with torch.no_grad(): print(json.dumps([type(m).__module__, len(t('one two')['input_ids']), m(torch.arange(40)[None]).logits[0, -1, :5].tolist()]))\n"
    )
    module, num_ids, logits = json.loads(in_a_process(server, tmp_path, "-c", code, result.commit).splitlines()[-1])
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False).eval()
    assert module.startswith("transformers_modules.tester.tiny")
    assert num_ids > 0
    with torch.no_grad():
        assert torch.allclose(torch.tensor(logits), model(torch.arange(40)[None]).logits[0, -1, :5], atol=1e-5)


def test_only_what_belongs_there_is_pushed_and_the_rest_is_named(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    result = go(server, checkpoint)
    names = set(server.files("tester/tiny"))
    assert {
        "README.md",
        "report.json",
        "report.md",
        "attnconvert/run.json",
        "attnconvert/recipe.yaml",
        "generation_config.json",
        "attnconvert_cache.py",
    } <= names
    assert not {"optimizer.pt", "notes.txt", "half.tmp", "secret.py"} & names
    assert {name for name, _ in result.skipped} == {"optimizer.pt", "notes.txt", "half.tmp", "secret.py", "tiny.run/"}
    assert not any(b"stays at home" in data for data in server.files("tester/tiny").values())


def test_paths_of_this_machine_are_not_published_and_the_folder_is_left_as_it_was(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    go(server, checkpoint)
    for name, data in server.files("tester/tiny").items():
        for secret in (b"/home/someone", b"private/", str(checkpoint).encode(), str(Path.home()).encode() + b"/"):
            assert secret not in data, (name, secret)
    assert json.loads(server.files("tester/tiny")["attnconvert/run.json"])["settings"]["model"]["name"] == "Tiny"
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


def test_the_card_on_the_hub_is_valid_names_the_repository_and_keeps_what_was_written_by_hand(server: HubServer, folder: Path, unchecked: None) -> None:
    assert any("--license" in text for text in push(folder, "lab/tiny", dry_run=True).notes)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    result = go(server, folder, "lab/tiny")
    assert not any("--license" in text for text in result.notes)
    text = server.files("lab/tiny")["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert "# By hand" in text
    assert "name = 'lab/tiny'" in text
    assert len(card.data.eval_results) == 7


def test_the_result_prints_the_link_and_code_that_pins_the_commit(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    result = go(server, checkpoint, "tiny")
    text = result.render()
    assert text.splitlines()[0] == f"{server.url}/tester/tiny"
    assert f"revision='{result.commit}'" in text
    compile(result.snippet, "snippet", "exec")
    json.dumps(result.to_dict())


# ---------------------------------------------------------------- branches, pull requests, visibility, sharing a name


def test_a_private_repository_is_created_private_and_a_public_one_is_not_mistaken_for_it(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    go(server, checkpoint, private=True)
    assert server.repos["tester/tiny"].private
    server.add_repo("tester/open")
    assert refusal(server, checkpoint, "tester/open", private=True).code == "repo-public"
    assert server.files("tester/open") == {}


def test_a_branch_is_created_and_main_stays_as_it_was(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    result = go(server, checkpoint, revision="v2")
    assert result.url.endswith("/tester/tiny/tree/v2")
    assert server.files("tester/tiny") == {}
    assert "model.safetensors" in server.files("tester/tiny", "v2")


def test_a_pull_request_to_somebody_elses_repository_changes_nothing_there(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    server.add_repo("other/model", {"config.json": b"{}"})
    result = go(server, checkpoint, "other/model", create_pr=True)
    assert result.pull_request == f"{server.url}/other/model/discussions/1"
    assert server.files("other/model") == {"config.json": b"{}"}
    assert "model.safetensors" in server.files("other/model", "refs/pr/1")


def test_another_model_under_that_name_is_not_overwritten(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    server.add_repo("tester/mine", {"config.json": b"{}", "model.safetensors": b"years of work"})
    error = refusal(server, checkpoint, "tester/mine")
    assert error.code == "repo-taken"
    assert "another name" in str(error.hint)
    assert server.files("tester/mine")["model.safetensors"] == b"years of work"


def test_files_of_an_earlier_push_that_would_be_loaded_instead_are_removed(server: HubServer, checkpoint: Path, folder: Path, unchecked: None) -> None:
    go(server, checkpoint)  # one model.safetensors, which would win against the shards
    shard(folder)
    result = go(server, folder)
    assert result.deleted == ("model.safetensors",)
    names = set(server.files("tester/tiny"))
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"} <= names
    assert "model.safetensors" not in names


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


# ---------------------------------------------------------------- dry run and refusals


def test_a_dry_run_sends_no_request_needs_no_token_and_lists_every_file_with_its_size(server: HubServer, checkpoint: Path) -> None:
    result = push(checkpoint, "tester/tiny", dry_run=True, endpoint=server.url)
    assert server.requests == []
    listed = {f.path: f.size for f in result.files}
    assert listed["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert "README.md" in listed
    text = result.render()
    assert all(name in text for name in (*listed, "optimizer.pt: training state", "nothing was sent"))
    assert result.commit is None


def test_a_dry_run_lists_what_the_push_then_sends(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    dry = push(checkpoint, "tester/tiny", dry_run=True, endpoint=server.url)
    assert [(f.path, f.size) for f in dry.files] == [(f.path, f.size) for f in go(server, checkpoint).files]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_truncated_weight_file_is_refused_before_anything_is_sent(server: HubServer, folder: Path, sharded: bool) -> None:
    if sharded:
        shard(folder)
    path = folder / ("model-00002-of-00002.safetensors" if sharded else "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    error = refusal(server, folder)
    assert error.code == "push-refused"
    assert path.name in error.message
    assert server.requests == []


def test_a_missing_shard_a_shard_of_another_model_and_a_missing_code_file_are_refused(server: HubServer, folder: Path) -> None:
    (folder / "attnconvert_cache.py").rename(folder / "away")
    assert "attnconvert_cache.py missing" in refusal(server, folder).message
    (folder / "away").rename(folder / "attnconvert_cache.py")
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, str(second))
    assert "does not hold the tensors" in refusal(server, folder).message
    second.unlink()
    assert "is missing" in refusal(server, folder).message
    assert server.requests == []


def test_a_model_that_gives_other_logits_when_decoded_is_refused_and_the_repository_not_created(
    server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any) -> None:
        raise AttnConvertError("parity-failed", "the converted model gives other logits when it is run differently", hint="report it")

    monkeypatch.setattr(save, "check_parity", broken)
    error = refusal(server, checkpoint)
    assert (error.code, error.where) == ("push-refused", "parity-failed")
    assert "gives other logits" in error.message
    assert server.repos == {}


def test_weights_that_are_not_numbers_are_refused(server: HubServer, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    error = refusal(server, folder)
    assert (error.code, error.where) == ("push-refused", "parity-failed")
    assert server.repos == {}


@pytest.mark.slow  # another fresh process, 6 to 10 seconds
def test_code_that_does_not_run_without_attnconvert_is_refused(server: HubServer, folder: Path) -> None:
    path = folder / "modeling_attnconvert.py"
    path.write_text(path.read_text() + "\nimport attnconvert.cli\n")
    error = refusal(server, folder)
    assert (error.code, error.where) == ("push-refused", "reload-failed")
    assert server.repos == {}


def test_an_access_token_in_a_record_is_refused_and_not_repeated(server: HubServer, folder: Path) -> None:
    for secret, given in (("hf_" + "A" * 34, server.token), ("unusual-token", "unusual-token")):
        (folder / "report.md").write_text(f"run with {secret}")
        if given == server.token:
            error = refusal(server, folder)
        else:
            server.token = given
            error = refusal(server, folder)
        assert error.code == "push-refused"
        assert "report.md" in error.message
        assert secret not in str(error)
    assert server.repos == {}


def test_folders_that_are_no_conversion_and_names_that_are_none_are_refused(server: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    assert refusal(server, tmp_path).code == "not-converted"
    assert refusal(server, checkpoint, "a/b/c").code == "bad-repo-id"
    assert refusal(server, checkpoint, "not a name!").code == "bad-repo-id"
    assert refusal(server, checkpoint, adapters_only=True).code == "not-adapters"
    assert refusal(server, checkpoint, create_pr=True, revision="v2").code == "bad-revision"
    assert server.requests == []


# ---------------------------------------------------------------- faults


def test_without_a_token_the_user_is_told_to_log_in_before_any_request(server: HubServer, checkpoint: Path) -> None:
    with pytest.raises(AttnConvertError) as caught:
        push(checkpoint, "tester/tiny", endpoint=server.url)
    error = caught.value
    assert error.code == "hub-login"
    assert "hf auth login" in str(error.hint)
    assert server.requests == []


def test_a_wrong_token_is_a_login_error(server: HubServer, checkpoint: Path) -> None:
    error = refusal(server, checkpoint, token="hf_" + "wrong" * 8)
    assert error.code == "hub-login"
    assert "wrong" * 8 not in str(error)


def test_a_token_that_can_only_read_is_refused_before_the_model_is_loaded(server: HubServer, checkpoint: Path) -> None:
    error = refusal(server, checkpoint, token=server.read_token)
    assert error.code == "hub-forbidden"
    assert "scope `write`" in error.render()
    assert len(server.requests) == 1


def test_somebody_elses_namespace_is_forbidden_and_says_whose_it_should_be(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    error = refusal(server, checkpoint, "stranger/tiny")
    assert error.code == "hub-forbidden"
    assert "'stranger'" in error.render()


@pytest.mark.parametrize(
    ("method", "pattern", "status", "code"),
    [
        ("POST", "/api/repos/create", 404, "hub-repo-not-found"),
        ("GET", "/tree/", 404, "hub-repo-not-found"),
        ("POST", "/commit/", 409, "hub-conflict"),
        ("POST", "/commit/", 403, "hub-forbidden"),
        ("PUT", "/lfs/", 403, "hub-forbidden"),
        ("POST", "/batch", 401, "hub-login"),
        ("POST", "/preupload/", 400, "hub-rejected"),
        ("GET", "/whoami", 401, "hub-login"),
    ],
)
def test_refusals_of_the_hub_have_their_own_error_and_are_not_tried_again(
    server: HubServer, checkpoint: Path, unchecked: None, pauses: list[float], method: str, pattern: str, status: int, code: str
) -> None:
    headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    server.fail(method, pattern, status, times=100, headers=headers)
    error = refusal(server, checkpoint)
    assert error.code == code
    assert error.hint
    assert server.count(method, pattern) == 1
    assert pauses == []


def test_a_gated_repository_has_its_own_error(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    server.add_repo("tester/tiny")
    server.gated.add("tester/tiny")
    assert refusal(server, checkpoint).code == "gated-model"


@pytest.mark.parametrize("pattern", ["/api/repos/create", "/preupload/", "/batch", "/lfs/", "/commit/", "/tree/", "/whoami"])
def test_a_hub_that_is_out_of_order_twice_gets_everything_in_the_end(
    server: HubServer, checkpoint: Path, unchecked: None, pauses: list[float], pattern: str
) -> None:
    method = "GET" if pattern in ("/tree/", "/whoami") else "PUT" if pattern == "/lfs/" else "POST"
    server.fail(method, pattern, 503, times=2)
    result = go(server, checkpoint)
    assert set(server.files("tester/tiny")) == {f.path for f in result.files}
    assert server.files("tester/tiny")["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert len(server.repos["tester/tiny"].messages) == 2  # the initial commit and one
    assert pauses


def test_too_many_requests_waits_as_long_as_the_hub_asks(server: HubServer, checkpoint: Path, unchecked: None, pauses: list[float]) -> None:
    server.fail("POST", "/commit/", 429, headers={"Retry-After": "17"})
    notes: list[str] = []
    go(server, checkpoint, note=notes.append)
    assert 17.0 in pauses
    assert len(notes) == 1
    assert "trying again in 17 s" in notes[0]


def test_a_hub_that_stays_out_of_order_ends_with_an_error_after_a_bounded_number_of_tries(
    server: HubServer, checkpoint: Path, unchecked: None, pauses: list[float]
) -> None:
    server.fail("POST", "/commit/", 503, times=1000)
    error = refusal(server, checkpoint)
    assert error.code == "hub-unavailable"
    assert "not sent again" in str(error.hint)
    assert server.count("POST", "/commit/") == len(hub.WAITS) + 1
    assert max(pauses) <= 60
    assert server.files("tester/tiny") == {}


def test_a_connection_broken_in_the_middle_of_an_upload_is_taken_up_again(server: HubServer, checkpoint: Path, unchecked: None, pauses: list[float]) -> None:
    server.fail("PUT", "/lfs/", None, times=2, after_bytes=100_000)
    go(server, checkpoint)
    assert server.files("tester/tiny")["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert server.count("PUT", "/lfs/") >= 3


def test_a_commit_whose_answer_got_lost_is_not_made_twice(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    server.fail("POST", "/commit/", None, act=True)
    result = go(server, checkpoint)
    assert server.repos["tester/tiny"].messages == ["initial commit", hub._message({"conversion": document()["conversion"] | {"base_model": "Tiny"}}, False)]
    assert result.commit == server.repos["tester/tiny"].heads["main"]


def test_a_pull_request_whose_answer_got_lost_is_not_opened_twice(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    server.fail("POST", "/commit/", None, act=True)
    assert refusal(server, checkpoint, create_pr=True).code == "hub-unreachable"
    assert [branch for branch in server.repos["tester/tiny"].branches if "pr" in branch] == ["refs/pr/1"]


def test_an_unreachable_hub_is_said_so(checkpoint: Path, pauses: list[float]) -> None:
    with HubServer() as gone:
        url = gone.url
    with pytest.raises(AttnConvertError) as caught:
        push(checkpoint, "tester/tiny", token="hf_x", endpoint=url)
    assert caught.value.code == "hub-unreachable"


def test_offline_mode_is_said_so(server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(server, checkpoint).code == "offline"


# ---------------------------------------------------------------- resume


def test_after_a_push_that_failed_only_what_is_missing_is_sent(server: HubServer, folder: Path, unchecked: None) -> None:
    shard(folder)
    first, second = (sha256(folder / f"model-0000{n}-of-00002.safetensors") for n in (1, 2))
    server.fail("PUT", f"/lfs/{second}", None, times=1000, after_bytes=1000)
    assert refusal(server, folder).code == "hub-unreachable"
    assert server.files("tester/tiny") == {}
    server.faults.clear()
    server.requests.clear()
    go(server, folder)
    assert server.count("PUT", f"/lfs/{first}") == 0
    assert server.count("PUT", f"/lfs/{second}") == 1
    assert server.files("tester/tiny")["model-00001-of-00002.safetensors"] == (folder / "model-00001-of-00002.safetensors").read_bytes()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pushing_again_sends_nothing_and_makes_no_commit_and_one_changed_file_is_one_file(server: HubServer, folder: Path, unchecked: None) -> None:
    first = go(server, folder)
    server.requests.clear()
    again = go(server, folder)
    assert {f.status for f in again.files} == {"unchanged"}
    assert again.commit == first.commit
    assert (server.count("PUT", "."), server.count("POST", "/commit/"), server.count("POST", "/preupload/")) == (0, 0, 0)
    assert "were there already" in again.render()
    (folder / "report.md").write_text("another")
    assert [f.path for f in go(server, folder).files if f.status == "changed"] == ["report.md"]
    assert server.count("PUT", ".") == 0


def test_large_files_go_in_parts_where_the_hub_asks_for_parts(checkpoint: Path, unchecked: None, pauses: list[float]) -> None:
    with HubServer(part_bytes=300_000) as server:
        server.fail("PUT", "/lfs/", 500, times=1)
        go(server, checkpoint)
        assert server.files("tester/tiny")["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        assert server.count("PUT", "/lfs/") >= 4


# ---------------------------------------------------------------- the token


def test_the_token_is_in_no_output_no_log_no_file_no_result_and_no_error(
    server: HubServer, folder: Path, unchecked: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    notes: list[str] = []
    server.fail("POST", "/commit/", 503)
    result = go(server, folder, note=notes.append)
    # The HTTP library's debug log holds what a server says, and this one repeats the token.
    caplog.set_level(logging.INFO)
    (folder / "report.md").write_text("changed")
    for status in (503, 400):
        server.fail("POST", "/commit/", status, message=f"the request had Bearer {server.token}")
    error = refusal(server, folder, note=notes.append)
    captured = capfd.readouterr()
    texts = [
        captured.out,
        captured.err,
        caplog.text,
        str(result),
        result.render(),
        json.dumps(result.to_dict()),
        *notes,
        str(error),
        repr(error),
        repr(error.__cause__),
    ]
    assert [text for text in texts if server.token in text] == []
    assert "Bearer ***" in str(error)
    assert len(notes) >= 2
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and server.token.encode() in path.read_bytes()]
    assert kept == []
    assert not any(server.token.encode() in data for data in server.files("tester/tiny").values())


def test_the_token_goes_to_the_hub_and_not_to_the_storage(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    go(server, checkpoint)
    assert all(request.authorized for request in server.requests if request.path.startswith("/api/"))
    assert not any(request.authorized for request in server.requests if request.method == "PUT")


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapters(teacher: Path, tmp_path: Path) -> Path:
    from attnconvert.convert.merge import Adapters
    from attnconvert.convert.save import fingerprint

    prepared = prepare(str(teacher), "hedgehog", overrides=SMALL)
    loaded = load_model(prepared.source)
    base_hash = fingerprint(loaded.model)
    swap(loaded.model, prepared.plan)
    wrapped = add_lora(loaded.model, [row.path for row in prepared.plan.converted], LoraConfig(rank=2), seed=0)
    facts = Adapters(prepared.plan, str(teacher), None, base_hash, "auto", "float32", prepared.recipe.resolved, {"attnconvert": "0"})
    save_adapters(wrapped, tmp_path / "adapters", base_name=str(teacher), revision=None, facts=facts.to_dict(), extra_files=RECORDS)
    return tmp_path / "adapters"


def test_adapters_are_pushed_with_a_card_that_says_how_to_merge_and_without_local_paths(
    server: HubServer, adapters: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(server, adapters).code == "adapters-only-folder"
    checked: list[tuple[bool, str]] = []
    monkeypatch.setattr(hub, "check_loads", lambda files, adapters_only, base: checked.append((adapters_only, base)))
    result = go(server, adapters, "tester/tiny-lora", adapters_only=True)
    assert checked == [(True, str(teacher))]
    files = server.files("tester/tiny-lora")
    assert {"adapter_config.json", "adapter_model.safetensors", "cores.safetensors", "attnconvert.json", "README.md"} <= set(files)
    assert not any(str(teacher.parent).encode() in data for data in files.values())
    assert json.loads(files["attnconvert.json"])["base_model"]["name"] == "tiny"
    assert "attnconvert merge tiny-lora" in files["README.md"].decode()
    assert any("--base" in text for text in result.notes)
    assert "attnconvert merge tiny-lora --out" in result.snippet


def test_adapters_that_do_not_fit_their_base_model_are_refused(server: HubServer, adapters: Path, teacher: Path) -> None:
    hub.check_loads({path.name: path for path in adapters.iterdir() if path.is_file()}, adapters_only=True)  # whole, they load
    facts = json.loads((adapters / "attnconvert.json").read_text())
    facts["base_model"]["sha256"] = "0" * 64
    (adapters / "attnconvert.json").write_text(json.dumps(facts))
    error = refusal(server, adapters, adapters_only=True)
    assert (error.code, error.where) == ("push-refused", "base-mismatch")
    assert server.repos == {}


def test_a_checkpoint_is_not_pushed_over_adapters(server: HubServer, checkpoint: Path, unchecked: None) -> None:
    server.add_repo("tester/lora", {"attnconvert.json": b"{}", "adapter_model.safetensors": b"x"})
    error = refusal(server, checkpoint, "tester/lora")
    assert error.code == "repo-taken"
    assert "adapters" in error.message


# ---------------------------------------------------------------- converting what is on the Hub


HUB_IDS = """
import json, sys
import torch
torch.set_num_threads(1)
from attnconvert import cli
from attnconvert.convert import save
from attnconvert.convert.load import load_config, load_model, resolve
from attnconvert.convert.reevaluate import locate
from attnconvert.errors import AttnConvertError
found = {}
for name, revision in json.loads(sys.argv[1]):
    try:
        source = resolve(name, revision=revision)
        load_config(source)
        load_model(source)
        found[f"{name}@{revision}"] = "loaded"
    except AttnConvertError as error:
        found[f"{name}@{revision}"] = error.code
save.check_reload = lambda model, folder: None  # another fresh process, which tests of their own cover
found["exit"] = cli.main(json.loads(sys.argv[2]))
print(json.dumps(found))
"""


@pytest.mark.slow  # a fresh process that loads, converts and saves, 7 to 20 seconds
def test_a_model_on_the_hub_is_linearized_by_its_id_and_every_wrong_id_has_its_own_error(server: HubServer, teacher: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in teacher.iterdir()}
    server.add_repo("lab/fine", files)
    server.add_repo("lab/cut", files | {"model.safetensors": files["model.safetensors"][:-64]})
    server.add_repo("lab/pickled", {name: data for name, data in files.items() if name != "model.safetensors"} | {"pytorch_model.bin": b"pickle"})
    server.add_repo("lab/hidden", private=True)
    server.gated.add("lab/gated")
    commit = server.repos["lab/fine"].heads["main"]
    want = {
        "lab/fine@None": "loaded", "lab/fine@nowhere": "model-not-found", "lab/none@None": "model-not-found", "lab/gated@None": "gated-model",
        "lab/hidden@None": "model-not-found", "lab/cut@None": "corrupt-weights", "lab/pickled@None": "cannot-load", "exit": 0,
    }  # fmt: skip
    asked = [(name, None if revision == "None" else revision) for name, _, revision in (key.partition("@") for key in want if key != "exit")]
    settings = ["stages.transfer.tokens=512", "stages.transfer.length=64", "stages.transfer.batch_size=4", "stages.finetune.tokens=0", *SMALL]
    options = [part for setting in settings for part in ("--set", setting)]
    command = ["linearize", "lab/fine", "--revision", commit, "--out", "made", "--skip-evaluation", "--quiet", *options]
    found = json.loads(in_a_process(server, tmp_path, "-c", HUB_IDS, json.dumps(asked), json.dumps(command)).splitlines()[-1])
    assert found == want
    run = json.loads((tmp_path / "made" / "attnconvert" / "run.json").read_text())
    assert run["settings"]["model"] == {"name": "lab/fine", "revision": commit}
    assert run["status"] == "complete"
    assert server.count("GET", "/lab/fine/resolve/.*/model.safetensors") == 1  # the second time from the cache
    assert ModelCard(hub.card.write_card(tmp_path / "made", repo_id="me/x", offline=True).read_text()).data.base_model == "lab/fine"


def test_the_server_refuses_what_the_hub_refuses(server: HubServer) -> None:
    """The tests above mean nothing on a server that takes anything."""
    api = HfApi(endpoint=server.url, token=server.token)
    api.create_repo("tester/x")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="409"):
        api.create_repo("tester/x")
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        HfApi(endpoint=server.url, token=server.token).model_info("tester/none")
    response = huggingface_hub.get_session().request("PUT", f"{server.url}/lfs/{'0' * 64}", content=b"wrong")
    assert response.status_code == 400
    line = json.dumps({"key": "lfsFile", "value": {"path": "w", "oid": "1" * 64, "size": 3}})
    head = json.dumps({"key": "header", "value": {"summary": "s"}})
    url = f"{server.url}/api/models/tester/x/commit/main"
    response = huggingface_hub.get_session().request("POST", url, content=f"{head}\n{line}\n".encode(), headers={"Authorization": f"Bearer {server.token}"})
    assert response.status_code == 400
    assert server.files("tester/x") == {}


LOCATE = """
import json
from attnconvert.convert.reevaluate import locate, read_record
from attnconvert.convert.reevaluate import locate
from attnconvert.errors import AttnConvertError
checkpoint, out = locate("tester/tiny")
found = [read_record(checkpoint).recipe.recipe.name, str(out), sorted(path.name for path in (out / "attnconvert").iterdir())]
try:
    locate("tester/none")
except AttnConvertError as error:
    found.append(error.code)
print(json.dumps(found))
"""


def test_a_converted_model_on_the_hub_is_measured_by_its_id_and_its_report_goes_here(server: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    files = {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    files["attnconvert/recipe.yaml"] = dump_resolved(load_recipe("hedgehog").recipe).encode()
    server.add_repo("tester/tiny", files)
    found = json.loads(in_a_process(server, tmp_path, "-c", LOCATE).splitlines()[-1])
    assert found == ["hedgehog", "tiny-evaluation", ["metrics.jsonl", "recipe.yaml", "run.json"], "model-not-found"]


def test_a_local_folder_is_its_own_place_for_the_report(checkpoint: Path) -> None:
    assert locate(str(checkpoint)) == (checkpoint, checkpoint)
    assert locate("./no/such/folder") == (Path("no/such/folder"), Path("no/such/folder"))
