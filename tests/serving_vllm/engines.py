"""Requests for vLLM, an engine that answers them, and whether transformers would have."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_engine import ENVIRONMENT

from attnconvert import embedded

MARGIN = 1e-3
"""Difference of two logits in fp32 below which either of the two may be the larger one in another program."""

MAX_LENGTH = 256


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens are to follow; `arrives` is the engine's step before which it comes."""

    prompt: list[int]
    tokens: int
    arrives: int = 0


def prompts(lengths: list[int]) -> list[list[int]]:
    """Pieces of held-out text with these numbers of tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_dir())
    with gzip.open(embedded.text_path("heldout"), "rt") as file:
        text = " ".join(json.loads(line)["text"] for line in file)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[137 * i : 137 * i + length] for i, length in enumerate(lengths)]


def crowd() -> list[Request]:
    """16 requests at once, of unequal length, among them those that end with a piece or one token after it, and 4 that arrive in the middle."""
    lengths = [1, 2, 17, 40, 63, 64, 65, 90, 130, 180, 200, 5, 33, 77, 120, 150, 8, 100, 30, 190]
    return [Request(prompt, 40, 0 if i < 16 else 10 + 5 * (i - 16)) for i, prompt in enumerate(prompts(lengths))]


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs an engine on requests: (model folder, requests, fault, whether it refuses, options of vllm.LLM) -> what `run_engine` writes; the log where it refuses."""

    def run(model: Path, requests: list[Request], fault: str | None = None, refuses: bool = False, **options: Any) -> dict[str, Any]:
        options = {"dtype": "float32", "max_model_len": MAX_LENGTH, "max_num_batched_tokens": 64, "max_num_seqs": 16, **options}
        task = {"model": str(model), "options": options, "requests": [vars(request) for request in requests], "fault": fault}
        source, target = tmp_path / "task.json", tmp_path / "found.json"
        source.write_text(json.dumps(task))
        target.unlink(missing_ok=True)
        script = Path(__file__).with_name("run_engine.py")
        done = subprocess.run(
            [sys.executable, str(script), str(source), str(target)], capture_output=True, text=True, timeout=500, env={**os.environ, **ENVIRONMENT}
        )
        log = done.stdout + done.stderr
        if refuses:
            assert done.returncode
            return {"log": log}
        assert not done.returncode, log[-4000:]
        return dict(json.loads(target.read_text()))

    return run


def differing(model: Path, requests: list[Request], answers: list[list[int]]) -> int:
    """How many tokens transformers would not have chosen after the same text, by more than MARGIN."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wrong = 0
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer) == request.tokens
        with torch.no_grad():
            logits = reference(torch.tensor([request.prompt + answer]), use_cache=False).logits[0, len(request.prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])
        wrong += int((logits.amax(1, keepdim=True) - chosen > MARGIN).sum())
    return wrong
