"""The settings of the training stages, as they appear in a recipe. Importing this file imports pydantic and no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_token_count(value: Any) -> Any:
    """`500k`, `2M`, `1.5B` or a plain number -> int (decimal thousands, as token budgets are quoted)."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([kKmMbB]?)\s*", value)
        if match is None:
            raise ValueError(f"{value!r} is not a token count; write a number such as 500000, 500k, 2M or 1.5B")
        number = float(match[1]) * _SUFFIX[match[2].lower()]
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not a token count; write a number such as 500000, 500k, 2M or 1.5B")
        return round(number)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


TokenCount = Annotated[int, BeforeValidator(parse_token_count), Field(ge=0)]


class StageConfig(BaseModel):
    """Base of every settings block: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OptimizerConfig(StageConfig):
    """AdamW with linear warm-up and cosine decay to `final_lr_ratio`; shared by both stages."""

    tokens: TokenCount = Field(description="training tokens of this stage; 0 skips it. Accepts 500k, 2M, 1.5B.")
    length: int = Field(default=1024, ge=16, description="tokens per training sequence")
    batch_size: int = Field(default=8, ge=1, description="sequences per optimizer step")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="sequences per forward pass; null = batch_size. Does not change the result beyond rounding."
    )
    lr: float = Field(gt=0, description="peak learning rate")
    final_lr_ratio: float = Field(default=0.02, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    warmup_steps: int = Field(default=20, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float | None = Field(default=1.0, gt=0, description="maximum gradient norm; null = no clipping")

    @model_validator(mode="after")
    def _micro_divides_batch(self) -> OptimizerConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one is always whole, so the tokens seen are at least `tokens`."""
        return -(-self.tokens // (self.length * self.batch_size))


class TransferConfig(OptimizerConfig):
    """Attention transfer: every layer sees the teacher's input and learns the teacher's attention."""

    lr: float = Field(default=1e-2, gt=0, description="peak learning rate of the new attention parameters")
    grad_clip: float | None = Field(default=None, gt=0, description="maximum gradient norm per layer; null = no clipping")
    loss: Literal["output", "weights"] = Field(
        default="output",
        description="output: squared error of the attention output; weights: cross-entropy against the teacher's attention weights (Hedgehog paper)",
    )
    relative: bool = Field(
        default=True,
        description="divide each layer's output error by the teacher output's power, so that every layer counts alike; false = raw MSE x 1000 / layers (LoLCATs)",
    )


class LoraConfig(StageConfig):
    """Low-rank adapters on the attention projections (peft)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Literal["q", "k", "v", "o", "mlp"], ...] = Field(
        default=("q", "k", "v", "o"), min_length=1, description="which projections get adapters; a fused qkv projection is taken when any of q, k, v is named"
    )


class FinetuneConfig(OptimizerConfig):
    """LoRA finetuning of the whole converted model against the teacher's logits and the text."""

    lr: float = Field(default=5e-4, gt=0, description="peak learning rate of the adapters")
    core_lr: float | None = Field(default=None, gt=0, description="peak learning rate of the new attention parameters; null = lr")
    train_cores: bool = Field(
        default=True, description="also train the new attention parameters, of regrouped layers the projections in full (false: adapters alone, as LoLCATs)"
    )
    lengths: tuple[Annotated[int, Field(ge=16)], ...] | None = Field(
        default=None,
        min_length=1,
        description="train on rows of several lengths, one length a step in turn and as many tokens of each: ascending divisors of length, length the last; a document goes "
        "into the shortest rows that it fits into; null = rows of length",
    )
    kl: float = Field(default=0.9, ge=0, description="weight of KL(teacher || student) over the vocabulary, nats per token")
    ce: float = Field(default=0.1, ge=0, description="weight of cross-entropy against the text, nats per token")
    balance: float = Field(
        default=0.0,
        ge=0,
        description="weight of the load-balance loss of layers with a router, added up over the layers; 1 a layer when all units are chosen alike",
    )
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _lengths_divide(self) -> FinetuneConfig:
        lengths = self.lengths
        if lengths is not None and (list(lengths) != sorted(set(lengths)) or lengths[-1] != self.length or any(self.length % length for length in lengths)):
            raise ValueError(f"lengths {list(lengths)} are not ascending divisors of length {self.length} that end with it")
        return self

    @model_validator(mode="after")
    def _some_loss(self) -> FinetuneConfig:
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0: there is nothing to train on; give one of them a positive weight")
        return self


class DataConfig(StageConfig):
    """Where the text comes from. Train and eval never share a document (split by content hash)."""

    source: str = Field(
        default="embedded",
        description="`embedded` (about 1 MB of text inside the package), a .txt/.jsonl/.jsonl.gz/.parquet file or a folder of them (other files in it are ignored), or a `datasets` id such as user/name (streamed)",
    )
    subset: str | None = Field(default=None, description="configuration name of a `datasets` id")
    split: str = Field(default="train", description="split of a `datasets` id")
    revision: str | None = Field(default=None, description="revision of a `datasets` id")
    text_field: str = Field(default="text", description="the column that holds the text (.jsonl, .parquet, datasets)")
    align: int = Field(
        default=1,
        ge=1,
        description="cut training documents to a multiple of this many tokens (shorter ones are dropped): packed documents then start where window blocks and kernel tiles do, which halves the work of a layer; 1 = keep every token",
    )
    recall: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of training rows that are synthetic recall documents (facts in ordinary text, asked for later), which give long-range branches a reason to remember; 0 = none",
    )
    eval_source: str | None = Field(
        default=None, description="held-out text, same forms as source; null = documents of source whose hash falls into eval_fraction"
    )
    eval_fraction: float = Field(default=0.05, gt=0, lt=0.9, description="share of the documents of source held out when eval_source is null")


class EvalConfig(StageConfig):
    """What an evaluation measures. The defaults are the suite `quick`, which runs at the end of a conversion."""

    tokens: TokenCount = Field(default=100_000, description="held-out tokens for perplexity, KL and agreement")
    length: int = Field(default=1024, ge=16, description="tokens per evaluation sequence")
    passkey_lengths: tuple[int, ...] = Field(default=(), description="context lengths in tokens for passkey recall; empty = passkey_windows times the window")
    passkey_windows: tuple[int, ...] = Field(default=(1, 4, 16), description="context lengths for passkey recall in windows, when passkey_lengths is empty")
    passkey_trials: int = Field(default=20, ge=0, description="prompts per length; 0 skips the test")
    needle_counts: tuple[Annotated[int, Field(ge=1, le=10)], ...] = Field(default=(1, 4), description="named keys hidden in a prompt, one of them asked for")
    needle_lengths: tuple[int, ...] = Field(default=(), description="context lengths in tokens for the needles; empty = as for the pass key")
    needle_depths: int = Field(default=5, ge=1, le=20, description="depth buckets of the heat map")
    needle_trials: int = Field(default=0, ge=0, description="prompts per cell of the heat map; 0 skips the test")
    mqar_pairs: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(4, 16, 64), description="key-value pairs of the associative recall test in token space"
    )
    mqar_trials: int = Field(default=0, ge=0, description="queries per number of pairs; 0 skips the test")
    same_data_baseline: bool = Field(
        default=False,
        description="after a conversion, also finetune the unconverted model on the same tokens with the same adapters, and report it beside the result",
    )

    @classmethod
    def suite(cls, name: Suite, recipe: EvalConfig | None = None) -> EvalConfig:
        """The settings of a suite, with what a recipe says in their place.

        Args:
            name: `quick` = seconds, what a conversion ends with; `standard` = needles, MQAR, more text and trials: minutes on a CPU for a model of
                100 M parameters; `long` = rows of 4096 tokens, prompts up to 128 windows: for a GPU.
            recipe: a recipe's `evaluate`. What differs from the defaults was chosen by somebody and wins. (A recipe stored with a checkpoint has
                every default written out, so being written says nothing.)
        """
        chosen = {} if recipe is None else {key: value for key, value in recipe.model_dump().items() if value != cls.model_fields[key].default}
        return cls(**{**_SUITES[name], **chosen})


Suite = Literal["quick", "standard", "long"]
_SUITES: Mapping[Suite, Mapping[str, Any]] = MappingProxyType(
    {
        "quick": {},
        "standard": {"tokens": 200_000, "passkey_trials": 50, "needle_trials": 8, "mqar_trials": 128},
        "long": {
            "tokens": 1_000_000,
            "length": 4096,
            "passkey_windows": (1, 2, 4, 8, 16, 32, 64, 128),
            "passkey_trials": 100,
            "needle_trials": 20,
            "mqar_pairs": (4, 16, 64, 256),
            "mqar_trials": 512,
        },
    }
)


class StagesConfig(StageConfig):
    """The training stages, in order. A stage with `tokens: 0` is skipped."""

    transfer: TransferConfig
    finetune: FinetuneConfig
