"""`attnconvert serve`: which engine a checkpoint gets and why, what is refused before anything starts, and transformers' server for real."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from attnconvert import cli, embedded
from attnconvert.convert import pipeline
from attnconvert.convert.generate import generate_text
from attnconvert.convert.load import load_model, resolve
from attnconvert.convert.reevaluate import load_saved
from attnconvert.errors import AttnConvertError
from attnconvert.serving import engine as module
from attnconvert.serving.engine import prepare
from attnconvert.surgery.swap import swap

ROOT = Path(__file__).parents[1]
SERVER = {"fastapi", "uvicorn", "openai"}
Make = Callable[..., Path]
Installed = Callable[..., None]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Sets what seems to be installed: packages, vLLM's version, our plug-in."""

    def install(*packages: str, vllm: str = "0.32.1", plugin: bool = True) -> None:
        monkeypatch.setattr(module, "_has_package", lambda name: name in packages)
        monkeypatch.setattr(module, "_vllm_version", lambda: vllm)
        monkeypatch.setattr(module, "_has_plugin", lambda: plugin)

    install(*SERVER, "vllm")
    return install


@pytest.fixture(scope="session")
def plans() -> Callable[[str], dict[str, Any]]:
    """The plan of a recipe for the embedded model, each computed once."""
    made: dict[str, dict[str, Any]] = {}

    def plan(recipe: str) -> dict[str, Any]:
        if recipe not in made:
            made[recipe] = pipeline.prepare("demo", recipe).plan.to_dict()
        return made[recipe]

    return plan


@pytest.fixture
def checkpoint(tmp_path: Path, plans: Callable[[str], dict[str, Any]]) -> Make:
    """Makes a folder that looks like a converted checkpoint: what a server is chosen by; recipe None = a stock one."""

    def make(recipe: str | None, *, template: bool = False, dense_len: int | None = None, name: str = "model", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in embedded.model_dir().iterdir():
            (folder / file.name).symlink_to(file)
        facts = json.loads((folder / "config.json").read_text())
        if recipe is not None:
            plan = json.loads(json.dumps(plans(recipe)))
            for row in plan["layers"]:
                if dense_len is not None:
                    row["config"]["dense_len"] = dense_len
            facts |= {"model_type": "attnconvert", "base_model_type": "llama", "architectures": ["AttnConvertLlamaForCausalLM"], "attn_plan": plan}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(facts | config))
        if template:
            (folder / "chat_template.jinja").write_text("{{ messages }}")
        return Path(name)

    return make


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("recipe", ["hedgehog", "moa", "moh"])
def test_a_converted_model_that_vllm_knows_is_served_by_vllm(recipe: str, checkpoint: Make, installed: Installed) -> None:
    launch = prepare(str(checkpoint(recipe)), port=0)
    assert launch.engine == "vllm"
    assert launch.command == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "model", "--host", "127.0.0.1", "--port", "0")
    assert "with the plug-in of attnconvert" in launch.why


def test_a_stock_model_is_served_by_any_vllm_without_the_plug_in(checkpoint: Make, installed: Installed) -> None:
    installed("vllm", vllm="0.99", plugin=False)
    launch = prepare(str(checkpoint(None)), port=0, extra=["--max-model-len", "64"])
    assert launch.engine == "vllm"
    assert launch.command[-2:] == ("--max-model-len", "64")


@pytest.mark.parametrize(
    ("given", "recipe", "config", "said"),
    [
        ({"packages": SERVER}, "hedgehog", {}, "not by vLLM: vllm is not installed"),
        ({"packages": {*SERVER, "vllm"}, "vllm": "0.31.2"}, "hedgehog", {}, "not by vLLM: this is vLLM 0.31.2"),
        ({"packages": {*SERVER, "vllm"}, "plugin": False}, "hedgehog", {}, "not by vLLM: vLLM will not find the plug-in"),
        ({"packages": {*SERVER, "vllm"}}, "kdgqa", {}, "not by vLLM: vLLM cannot serve layers of the method 'kdgqa'"),
        ({"packages": {*SERVER, "vllm"}}, "hedgehog", {"base_model_type": "olmo2"}, "not by vLLM: vLLM cannot serve converted models of the family 'olmo2'"),
        ({"packages": SERVER}, None, {}, "a stock llama model: served by transformers"),
        ({"packages": {*SERVER, "vllm"}}, None, {"model_type": "phi", "num_key_value_heads": 1}, "not by vLLM: vLLM's class for phi takes as many KV heads"),
    ],
)
def test_what_vllm_cannot_serve_here_is_served_by_transformers_with_the_reason(
    given: dict[str, Any], recipe: str | None, config: dict[str, Any], said: str, checkpoint: Make, installed: Installed
) -> None:
    installed(*given.pop("packages"), **given)
    launch = prepare(str(checkpoint(recipe, **config)), port=0, device="cpu")
    assert launch.engine == "transformers"
    assert said in launch.why
    assert "one request at a time" in launch.why
    start = ["transformers.cli.transformers", "serve"] if recipe is None else ["attnconvert.serving.transformers_server"]
    assert list(launch.command[2:]) == [*start, "model", "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]


def test_a_sparse_model_goes_to_vllm_only_where_nothing_of_its_context_is_lost_or_when_asked(checkpoint: Make, installed: Installed) -> None:
    folder = str(checkpoint("infllm-v2", dense_len=1001))  # the model was built for 2,048 tokens
    launch = prepare(folder, port=0)
    assert launch.engine == "transformers"
    assert "vLLM can serve up to 1000 tokens only" in launch.why
    assert prepare(folder, port=0, engine="vllm").command[-2:] == ("--max-model-len", "1000")
    assert prepare(folder, port=0, extra=["--max-model-len=512"]).engine == "vllm"
    with pytest.raises(AttnConvertError, match=r"error\[not-served\](.|\n)*`--max-model-len 1000`"):
        prepare(folder, port=0, engine="vllm", extra=["--max_model_len", "1001"])
    whole = prepare(str(checkpoint("infllm-v2", dense_len=4096, name="whole")), port=0)
    assert whole.engine == "vllm"
    assert "--max-model-len" not in whole.command
    with pytest.raises(AttnConvertError, match=r"error\[not-served\](.|\n)*--engine transformers"):
        prepare(str(checkpoint("infllm-v2", dense_len=0, name="never")), port=0, engine="vllm")


@pytest.mark.parametrize(("template", "path", "key"), [(True, "/v1/chat/completions", "messages"), (False, "/v1/completions", "prompt")])
def test_the_curl_line_asks_what_the_model_can_answer(template: bool, path: str, key: str, checkpoint: Make, installed: Installed) -> None:
    launch = prepare(str(checkpoint(None, template=template)), host="0.0.0.0", port=0)
    words = shlex.split(launch.curl)
    assert words[1] == "http://127.0.0.1:0" + path
    body = json.loads(words[-1])
    assert key in body
    assert body["model"] == "model"  # what the engine was given, by which it knows the model
    assert words[1].removesuffix(path) + "/v1" in module.render(launch)


def test_a_dry_run_prints_the_command_alone_on_stdout(checkpoint: Make, installed: Installed, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint("hedgehog")
    code, out, err = run(capsys, "serve", "model", "--dry-run", "--port", "47123", "--engine", "transformers", "--", "--log-level", "info", "--device", "cpu")
    assert code == 0
    command = ["-m", "attnconvert.serving.transformers_server", "model", "--host", "127.0.0.1", "--port", "47123", "--log-level", "info", "--device", "cpu"]
    assert shlex.split(out) == [sys.executable, *command]
    assert "served by transformers" in err


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "option",
    [["--continuous-batching"], ["--compile"], ["--attn-implementation", "sdpa"], ["--quantization=bnb-4bit"], ["--trust-remote-code"]],
)
def test_converted_models_refuse_what_transformers_would_do_wrong_to_them(option: list[str], checkpoint: Make, installed: Installed) -> None:
    installed(*SERVER)
    folder = str(checkpoint("hedgehog"))
    with pytest.raises(AttnConvertError, match=r"error\[engine-option\]: converted models cannot be served with " + option[0].split("=")[0]):
        prepare(folder, port=0, extra=option)
    assert prepare(str(checkpoint(None, name="stock")), port=0, extra=option).command[-len(option) :] == tuple(option)


@pytest.mark.parametrize(
    ("packages", "engine", "said"),
    [
        ({"vllm"}, "transformers", r"fastapi, uvicorn, openai are not installed(.|\n)*attnconvert\[serve\]"),
        ({"fastapi", "uvicorn"}, "auto", r"openai is not installed, which(.|\n)*attnconvert\[serve\]"),
        (SERVER, "vllm", r"vllm is not installed(.|\n)*attnconvert\[vllm\]"),
    ],
)
def test_a_missing_engine_says_what_to_install(packages: set[str], engine: str, said: str, checkpoint: Make, installed: Installed) -> None:
    installed(*packages)
    with pytest.raises(AttnConvertError, match=r"error\[engine-missing\]: " + said):
        prepare(str(checkpoint(None)), port=0, engine=engine)


@pytest.mark.parametrize("extra", [["--port", "1"], ["--host=x"]])
def test_what_is_ours_is_not_given_to_the_engine(extra: list[str], checkpoint: Make, installed: Installed) -> None:
    with pytest.raises(AttnConvertError, match="before `--`"):
        prepare(str(checkpoint(None)), extra=extra)


def test_folders_that_are_no_checkpoint_say_what_to_do(checkpoint: Make, installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    for name in ("out", "out.run"):
        with pytest.raises(AttnConvertError, match=r"error\[not-finished\]: the conversion of 'out'(.|\n)*--resume"):
            prepare(name)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "attnconvert.json").write_text("{}")
    with pytest.raises(AttnConvertError, match=r"error\[adapters-only\](.|\n)*`attnconvert merge adapters --out adapters-merged`"):
        prepare("adapters")
    with pytest.raises(AttnConvertError, match=r"error\[not-a-folder\]"):
        prepare("user/name")
    cut = checkpoint("hedgehog")
    (cut / "model.safetensors").unlink()
    with pytest.raises(AttnConvertError, match=r"error\[no-weights\]"):
        prepare(str(cut))
    unknown = checkpoint("hedgehog", name="unknown", attn_plan={"schema_version": 99})
    with pytest.raises(AttnConvertError, match="attn_plan has schema version 99"):
        prepare(str(unknown))
    revision = checkpoint(None, name="a@b")
    with pytest.raises(AttnConvertError, match="rename the folder"):
        prepare(str(revision), engine="transformers")


def test_a_port_in_use_is_found_before_the_engine_starts(checkpoint: Make, installed: Installed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AttnConvertError, match=rf"error\[port-taken\]: cannot listen on 127.0.0.1:{port}"):
            prepare(str(checkpoint(None)), port=port)
    assert prepare("model", port=port).address == f"http://127.0.0.1:{port}"


# ---------------------------------------------------------------- for real


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of `attnconvert serve`, run in a process of its own and ended with Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "attnconvert", "serve", folder.name, "--engine", "transformers", "--device", "cpu", "--port", str(port)]
    log = folder.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert "Traceback" not in log.read_text()
        assert "Finished server process" in log.read_text()
    finally:
        process.kill()
        process.wait()


def ask(address: str, body: dict[str, Any]) -> tuple[int, str]:
    """(status, answer) of a completion."""
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow  # starts a server each: two imports of torch and transformers
@pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in SERVER), reason="needs attnconvert[serve]")
@pytest.mark.parametrize("kind", ["gqa", "hedgehog", "moa", "infllm-v2", "moh"])
def test_transformers_serves_the_text_of_generate(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if kind == "gqa":
        assert cli.main(["regroup", "demo", "--kv-heads", "1", "--out", str(folder), "--quiet"]) == 0
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    else:
        loaded = load_model(resolve("demo"), dtype="fp32")
        swap(loaded.model, pipeline.prepare("demo", kind).plan)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    again = load_saved(str(folder))
    prompts = ["The whale", "The captain looked at the sea and", "It was " * 60]
    want = [generate_text(again.model, again.tokenizer, prompt, max_new_tokens=16).text for prompt in prompts]
    with served(folder) as address:
        bodies = [{"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0} for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:  # at once; the server takes one after another
            answers = list(pool.map(lambda body: ask(address, body), bodies))
        assert [status for status, _ in answers] == [200] * 3
        assert [json.loads(text)["choices"][0]["text"] for _, text in answers] == want
        chunks = [json.loads(line.removeprefix("data: ")) for line in ask(address, bodies[1] | {"stream": True})[1].splitlines() if line.startswith("data: {")]
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == want[1]
        assert ask(address, {"prompt": "x", "nonsense": 1})[0] == 422
        # one that goes away in the middle does not hold up or spoil the next
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as gone:
            body = json.dumps(bodies[0] | {"max_tokens": 1500, "stream": True})
            gone.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert gone.recv(64).startswith(b"HTTP/1.1 200")
        assert json.loads(ask(address, bodies[1])[1])["choices"][0]["text"] == want[1]
