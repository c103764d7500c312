"""InfLLM-V2: each token sees the blocks of keys that score best for it (https://arxiv.org/abs/2509.24663), and everything while the context is short.

The keys are cut into blocks. A query sees the first blocks, its own and those just before it, and of the others those whose compressed keys (means of
neighbouring keys) get most of its attention; the query heads of a KV head choose together. Below `dense_len` tokens of context it sees everything.
With scorer `mean` a block is scored by the mean of its keys, as in MoBA (https://arxiv.org/abs/2502.13189). Nothing is forgotten: the cache keeps all
keys, and some compressed ones besides. No parameters are added, so the same weights run dense, and training adapts the old ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from attnconvert.kernels.blocks.rule import BlockRule, Scorer, block_rule, score_pairs, state_bytes, visible_pairs
from attnconvert.surgery.method import LayerCost, Method, MethodConfig
from attnconvert.surgery.sites import Site

MAX_GROUP = 16
MAX_BLOCKS = 16384  # of a row, in the kernels
MAX_TOKENS = 2**30  # positions stay far inside of 32 bits
_NUMBERS = ("block_size", "init_blocks", "window_size", "topk", "dense_len")
_PUBLISHED = {"kernel_size": 32, "kernel_stride": 16, "use_nope": False}  # what our scorer `compressed` does, and nothing else


class InfLLMV2Config(MethodConfig):
    """Settings of a layer with block-sparse attention, named as in MiniCPM4's `sparse_config`."""

    block_size: Literal[32, 64, 128] = Field(default=64, description="tokens of a block of keys, which is seen as a whole or not at all")
    init_blocks: int = Field(default=1, ge=0, le=MAX_TOKENS, description="first blocks of a document, which every query sees")
    window_size: int = Field(default=2048, ge=0, le=MAX_TOKENS, description="tokens before a query's own block that it always sees, a multiple of block_size")
    topk: int = Field(
        default=64, ge=1, le=MAX_BLOCKS,
        description="blocks that a query sees besides those of the window: the first ones, its own, and those with the best scores",
    )  # fmt: skip
    dense_len: int = Field(
        default=8192, ge=0, le=MAX_TOKENS,
        description="tokens of context below which a query sees everything; 0 = always sparse; `attnconvert tune-switch` finds where sparse attention is faster",
    )  # fmt: skip
    scorer: Scorer = Field(
        default="compressed",
        description="compressed: blocks are scored by means of 32 keys, 16 apart (InfLLM-V2); mean: by the mean of the block's keys (MoBA)",
    )
    sparse_config: str | None = Field(
        default=None,
        description="a JSON file with MiniCPM4's `sparse_config`, or a config.json that has it, in place of the numbers; read when the recipe is, which then has the numbers",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("sparse_config"), str):
            return data
        own = [name for name in (*_NUMBERS, "scorer") if name in data]
        if own:
            raise ValueError(f"sparse_config names a file with these numbers: leave out {', '.join(own)}, or sparse_config")
        return {**{name: value for name, value in data.items() if name != "sparse_config"}, **read_sparse_config(Path(data["sparse_config"]).expanduser())}

    @model_validator(mode="after")
    def _blocks_suffice(self) -> InfLLMV2Config:
        if self.window_size % self.block_size:
            near = self.window_size // self.block_size * self.block_size
            raise ValueError(f"window_size {self.window_size} is not a multiple of block_size {self.block_size}, such as {near} or {near + self.block_size}")
        if self.topk < self.init_blocks + 1:
            raise ValueError(
                f"topk {self.topk} has no room for the blocks that are always seen besides the window: {self.init_blocks} first ones and the query's own; "
                f"{self.init_blocks + 1} at least, and more for blocks to be chosen"
            )
        return self


def read_sparse_config(path: Path) -> dict[str, int]:
    """The numbers of a MiniCPM4-style `sparse_config`; keys that it lacks keep their defaults, which are MiniCPM4's.

    Args:
        path: a JSON file that is one, or that has the key `sparse_config`.

    Raises:
        ValueError: there is no such file, it is not JSON or has no such settings, or one that our operator does not do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the sparse_config file {str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"the sparse_config file {str(path)!r} is not JSON: {error}") from error
    found = content.get("sparse_config", content) if isinstance(content, dict) else None
    if not isinstance(found, dict) or not set(found) & {*_NUMBERS, *_PUBLISHED}:
        raise ValueError(f"{str(path)!r} has no sparse_config: neither the key, nor one of {', '.join((*_NUMBERS, *_PUBLISHED))}")
    unknown = sorted(set(found) - {*_NUMBERS, *_PUBLISHED})
    if unknown:
        raise ValueError(f"{str(path)!r}: {', '.join(unknown)} is nothing that block-sparse attention knows, and leaving it out could change the model")
    for name, value in _PUBLISHED.items():
        if found.get(name, value) != value:
            why = "scores come from keys after rotary embedding" if name == "use_nope" else "the kernels take means of 32 keys, 16 apart"
            raise ValueError(f"{str(path)!r}: {name} {json.dumps(found[name])} is not supported, only {json.dumps(value)}: {why}")
    wrong = [name for name in _NUMBERS if name in found and (isinstance(found[name], bool) or not isinstance(found[name], int))]
    if wrong:
        raise ValueError(f"{str(path)!r}: {wrong[0]} is {json.dumps(found[wrong[0]])}, not a whole number")
    numbers = {name: found[name] for name in _NUMBERS if name in found}
    if numbers.get("dense_len") == -1:  # theirs for: never dense
        numbers["dense_len"] = 0
    return numbers


def rule_of(config: InfLLMV2Config) -> BlockRule:
    """The settings as the kernels count."""
    return block_rule(config.block_size, config.init_blocks, config.window_size, config.topk, config.dense_len, config.scorer)


def check(config: InfLLMV2Config, site: Site) -> list[str]:
    problems = [
        f"the layer has {what}, which block-sparse attention does not do"
        for what, there in (("capped logits (softcap)", site.softcap is not None), ("learned sink logits (s_aux)", site.has_sink_logits))
        if there
    ]
    if site.sliding_window is not None:
        problems.append(f"the layer is already a sliding window of {site.sliding_window} tokens; keep it, there is little to choose from")
    if site.num_heads // site.num_key_value_heads > MAX_GROUP:
        problems.append(
            f"{site.num_heads // site.num_key_value_heads} query heads share a KV head, and the kernels hold those of one token in a tile of {MAX_GROUP} rows; "
            f"{MAX_GROUP} at most"
        )
    return problems


def runtime_config(config: InfLLMV2Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"sparse_config"})


def cost(config: InfLLMV2Config, site: Site, length: int, element_size: int) -> LayerCost:
    """Keys and values of all tokens and the compressed keys; products with the keys that are seen, and with the compressed ones where blocks are chosen."""
    rule = rule_of(config)
    pairs = 2 * visible_pairs(length, rule) + score_pairs(length, rule)
    return LayerCost(
        state_bytes=state_bytes(site.num_key_value_heads, site.head_dim, element_size, length, rule),
        flops=2 * pairs * site.num_heads * site.head_dim,
        num_parameters=0,
    )


METHOD = Method(
    name="infllm_v2",
    family="sparsify",
    summary="each token sees the first, the nearest and the best-scoring blocks of keys, and everything below dense_len tokens (InfLLM-V2, MoBA)",
    paper="https://arxiv.org/abs/2509.24663",
    config=InfLLMV2Config,
    check=check,
    runtime="attnconvert.surgery.runtime.blocks:BlockSparseAttention",
    runtime_config=runtime_config,
    cost=cost,
    examples=(
        InfLLMV2Config(block_size=32, window_size=32, topk=4, dense_len=0),
        InfLLMV2Config(block_size=32, init_blocks=0, window_size=0, topk=2, dense_len=96, scorer="mean"),
        InfLLMV2Config(block_size=64, window_size=0, topk=3, dense_len=200),
    ),
    exact=InfLLMV2Config(block_size=32, window_size=0, topk=4096, dense_len=0),
)
