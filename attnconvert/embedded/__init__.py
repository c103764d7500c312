"""The model and the text inside the package: `attnconvert linearize demo` needs no download.

`model/` is an ordinary Hugging Face checkpoint (Llama architecture, 6 M parameters; its README.md is the model card), `text/` holds
excerpts in gzip JSON lines with the keys `text` and `source`. Sources and licences: NOTICE. Built by tools/build_demo_corpus.py and
tools/train_demo_model.py.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Literal

_DEMO_ROWS = (
    "stages.transfer.length=512",
    "stages.transfer.batch_size=4",
    "stages.finetune.length=512",
    "stages.finetune.batch_size=4",
    "evaluate.tokens=16k",
    "evaluate.length=512",
)


def demo_overrides(families: Collection[str]) -> tuple[str, ...]:
    """Recipe overrides (`key=value`, as for `--set`) that make a conversion of the embedded model end in under 3 minutes on 2 CPU cores.

    An override given by the user comes after these and wins.

    Args:
        families: of the recipe's methods.
    """
    if set(families) == {"sparsify"}:  # no stage before finetuning; contexts that fit into 512 positions
        spans = ("num_sinks=4", "search.lengths=[256,512]", "search.num_samples=8", "search.response_tokens=32")
        return (*(f"layers.0.config.{setting}" for setting in spans), "stages.finetune.tokens=100k", "evaluate.passkey_lengths=[128,256,512]", *_DEMO_ROWS)
    # Fewer heads learn most in transfer.
    transfer, finetune = ("200k", "50k") if set(families) == {"regroup"} else ("100k", "60k")
    return (f"stages.transfer.tokens={transfer}", f"stages.finetune.tokens={finetune}", *_DEMO_ROWS)


def model_dir() -> Path:
    """The folder of the embedded model, for `from_pretrained`."""
    return Path(str(files(__name__) / "model"))


def text_path(split: Literal["train", "heldout"]) -> Path:
    """The embedded text of one split (.jsonl.gz, objects with `text` and `source`). The model never saw a held-out document."""
    return Path(str(files(__name__) / "text" / f"{split}.jsonl.gz"))
