"""The model and the text inside the package: `attnconvert linearize demo` needs no download.

`model/` is an ordinary Hugging Face checkpoint (Llama architecture, 6 M parameters; its README.md is the model card), `text/` holds
excerpts in gzip JSON lines with the keys `text` and `source`. Sources and licences: NOTICE. Built by tools/build_demo_corpus.py and
tools/train_demo_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

_DEMO_ROWS = (
    "stages.transfer.length=512",
    "stages.transfer.batch_size=4",
    "stages.finetune.length=512",
    "stages.finetune.batch_size=4",
    "evaluate.tokens=16k",
    "evaluate.length=512",
)


_DEMO_SPAN = 64
"""Tokens of a fixed attention span at most: of rows of 512, a longer one leaves out next to nothing."""


def demo_overrides(rules: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """Recipe overrides (`key=value`, as for `--set`) that make a conversion of the embedded model end in under 3 minutes on 2 CPU cores.

    An override given by the user comes after these and wins.

    Args:
        rules: family of the method and its settings, for each rule of the recipe's `layers`; (`""`, {}) for layers that stay as they are.
    """
    families = {family for family, _ in rules} - {""}
    if families == {"sparsify"}:  # no stage before finetuning
        spans = [f"layers.{number}.config.{setting}" for number, (_, config) in enumerate(rules) if "alphas" in config for setting in _short_spans(config)]
        blocks = [f"layers.{number}.config.{setting}" for number, (_, config) in enumerate(rules) if "topk" in config for setting in _few_blocks(config)]
        lengths = ["stages.finetune.lengths=null"] if blocks else []
        tokens = "60k" if blocks else "100k"  # choosing blocks in PyTorch takes longer
        return (*spans, *blocks, *lengths, f"stages.finetune.tokens={tokens}", "evaluate.passkey_lengths=[128,256,512]", *_DEMO_ROWS)
    if families == {"mix-heads"}:  # no stage before finetuning, which the baseline goes through too
        return ("stages.finetune.tokens=80k", "stages.finetune.lr=2e-3", "evaluate.passkey_lengths=[128,256,512]", *_DEMO_ROWS)
    # Fewer heads learn most in transfer.
    transfer, finetune = ("200k", "50k") if families == {"regroup"} else ("100k", "60k")
    return (f"stages.transfer.tokens={transfer}", f"stages.finetune.tokens={finetune}", *_DEMO_ROWS)


def _short_spans(config: Mapping[str, Any]) -> list[str]:
    """Settings of attention spans for rows of 512 tokens."""
    if isinstance(config["alphas"], int):
        return ["num_sinks=4", f"alphas={min(config['alphas'], _DEMO_SPAN)}"]
    spans = ["num_sinks=4", "search.lengths=[256,512]", "search.num_samples=8", "search.response_tokens=32"]
    if config["search"]["candidates"] is not None:
        candidates = dict.fromkeys((min(alpha, _DEMO_SPAN), beta) for alpha, beta in config["search"]["candidates"])
        spans.append(f"search.candidates={[list(rule) for rule in candidates]}")
    return spans


def _few_blocks(config: Mapping[str, Any]) -> list[str]:
    """Settings of block-sparse attention for rows of 512 tokens: 6 of their 16 blocks are seen, some of them chosen."""
    nearest = min(config["window_size"] // 32, 2)
    return ["block_size=32", f"window_size={32 * nearest}", f"topk={6 - nearest}", "dense_len=0"]


def model_dir() -> Path:
    """The folder of the embedded model, for `from_pretrained`."""
    return Path(str(files(__name__) / "model"))


def text_path(split: Literal["train", "heldout"]) -> Path:
    """The embedded text of one split (.jsonl.gz, objects with `text` and `source`). The model never saw a held-out document."""
    return Path(str(files(__name__) / "text" / f"{split}.jsonl.gz"))
