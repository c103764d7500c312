"""A converted model behind `vllm serve`, asked by OpenAI's client."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import write
from run_engine import ENVIRONMENT

from attnconvert import embedded

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; `make test-vllm` runs these in an environment of its own", allow_module_level=True)

PROMPT = "The captain looked at the sea and"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str, str]]:
    """(client, name of the model, address)."""
    import openai

    model = str(write(str(embedded.model_dir()), "hedgehog", tmp_path_factory.mktemp("model")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
    ]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = Path(tmp_path_factory.mktemp("log") / "server.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-4000:]
            if _answers(f"{address}/health"):
                break
            time.sleep(1)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), model, address
    finally:
        process.terminate()
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def expected(model: str, prompt: str, tokens: int) -> str:
    """Greedy text of transformers after a prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def completion(server: tuple[Any, str, str], tokens: int = 24, **options: Any) -> Any:
    client, model, _ = server
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=tokens, temperature=0, **options)


def running(address: str) -> float:
    """Requests that the engine is computing."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_a_completion_and_a_chat_are_the_text_of_transformers(server):
    client, model, _ = server
    assert completion(server).choices[0].text == expected(model, PROMPT, 24)
    chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=24, temperature=0)
    assert chat.choices[0].message.content == expected(model, f"user: {PROMPT}\nassistant:", 24)


def test_a_stream_brings_the_same_text_in_pieces(server):
    pieces = [part.choices[0].text for part in completion(server, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == completion(server).choices[0].text


def test_a_cancelled_request_ends_and_leaves_nothing_to_the_next(server):
    before = completion(server).choices[0].text
    stream = completion(server, tokens=450, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert running(server[2]) == 1
    stream.close()
    for _ in range(50):
        if running(server[2]) == 0:
            break
        time.sleep(0.2)
    assert running(server[2]) == 0
    assert completion(server).choices[0].text == before


@pytest.mark.parametrize("wrong", [{"tokens": -1}, {"tokens": 5000}, {"extra_body": {"prompt": None}}])
def test_a_malformed_request_is_refused_and_the_server_goes_on(server, wrong):
    import openai

    with pytest.raises(openai.BadRequestError):
        completion(server, **wrong)
    assert completion(server, tokens=2).choices[0].text
