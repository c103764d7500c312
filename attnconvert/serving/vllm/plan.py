"""What of a converted checkpoint vLLM can serve, and how: the checks, and what has to be said to vLLM before it builds a model. Imports no vLLM."""

from __future__ import annotations

import logging
from typing import Any, Literal

from attnconvert.errors import AttnConvertError

# vLLM prints what goes to its own logger and nothing below a warning of others.
logger = logging.getLogger("vllm.attnconvert")

SUPPORTED = (0, 32)
"""The vLLM release whose layers and metadata the plug-in is written for, any patch of it."""

FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
"""`base_model_type` -> the module below `vllm.model_executor.models` and the class that are extended."""

Kind = Literal["stock", "dense", "routed", "state"]

KINDS: dict[str | None, Kind] = {None: "stock", "exact": "stock", "infllm_v2": "dense", "moh": "routed", "hedgehog": "state", "moa": "state"}
"""Method of a layer -> what serves it: vLLM's attention as it is; the same while contexts are short; the same, with outputs weighed by a router; our core,
with a state for each request."""


def architecture(family: str) -> str:
    """The name that a converted checkpoint's config.json gives its class."""
    return f"AttnConvert{FAMILIES[family][1]}"


def check_version(version: str) -> None:
    """Refuse a vLLM that the plug-in was not written for.

    Raises:
        AttnConvertError: `vllm-version`.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers != SUPPORTED:
        wanted = ".".join(map(str, SUPPORTED))
        raise AttnConvertError(
            "vllm-version",
            f"this is vLLM {version}; converted models are served by vLLM {wanted}",
            expected=f"vLLM {wanted}.*",
            hint=f"`pip install 'vllm=={wanted}.*'` in an environment of its own",
        )


def layer_kinds(plan: dict[str, Any]) -> dict[str, Kind]:
    """Path of each layer's attention module -> what serves it.

    Args:
        plan: `attn_plan` of config.json.

    Raises:
        AttnConvertError: `not-served`, a method that is not served.
    """
    refused = {row["method"] for row in plan["layers"]} - set(KINDS)
    if refused:
        raise AttnConvertError(
            "not-served",
            f"vLLM cannot serve layers of the method {', '.join(map(repr, sorted(refused)))}",
            where="attn_plan of config.json",
            expected=f"layers of {', '.join(sorted(name for name in KINDS if name))}, or kept as they were",
            hint="`attnconvert generate`, `attnconvert chat` and transformers run it",
        )
    return {row["path"]: KINDS[row["method"]] for row in plan["layers"]}


def check_checkpoint(config: Any) -> None:
    """Refuse a checkpoint that cannot be served, whatever the settings.

    Args:
        config: the transformers config of a converted model, or config.json as an object.

    Raises:
        AttnConvertError: `not-served`.
    """
    family = config.base_model_type
    if family not in FAMILIES:
        raise AttnConvertError(
            "not-served",
            f"vLLM cannot serve converted models of the family {family!r}",
            where="base_model_type of config.json",
            expected=f"one of: {', '.join(FAMILIES)}",
            hint="`attnconvert generate`, `attnconvert chat` and transformers run it",
        )
    layer_kinds(config.attn_plan)
    if getattr(config, "quantization_config", None):
        raise AttnConvertError(
            "not-served",
            "vLLM cannot serve a converted model with quantised weights: which layers were converted was decided, and trained, with full ones",
            where="quantization_config of config.json",
            hint="serve the checkpoint that was quantised",
        )


def dense_length(plan: dict[str, Any]) -> int | None:
    """Tokens of context up to which layers of InfLLM-V2 see everything; None = there are no such layers."""
    # The query at position p sees everything while p + 1 < dense_len, so a context of dense_len - 1 tokens is the longest in which all do.
    lengths = [row["config"]["dense_len"] - 1 for row in plan["layers"] if KINDS.get(row["method"]) == "dense"]
    return min(lengths, default=None)


def check_settings(
    config: Any, *, max_model_len: int, tensor_parallel: int = 1, pipeline_parallel: int = 1, speculative: bool = False, lora: bool = False,
) -> None:  # fmt: skip
    """Refuse settings of the engine under which the checkpoint would be served wrongly.

    Args:
        config: as in `check_checkpoint`, which has passed it.
        max_model_len: tokens of a request, prompt and answer together.
        tensor_parallel, pipeline_parallel: number of parts.
        speculative: drafts are verified.
        lora: adapters are added to requests.

    Raises:
        AttnConvertError: `not-served`, naming the argument of `vllm serve` to change.
    """
    longest = dense_length(config.attn_plan)
    if longest is not None and max_model_len > longest:
        raise AttnConvertError(
            "not-served",
            f"layers of infllm_v2 choose blocks of keys in contexts of more than {longest} tokens, which vLLM's attention cannot; requests may have {max_model_len}",
            where="--max-model-len",
            expected=f"at most {longest}, where the layers see everything",
            hint=f"`--max-model-len {longest}`; longer contexts run with `attnconvert generate` and transformers",
        )
    for argument, refused, why in (
        ("--tensor-parallel-size", tensor_parallel > 1, "the state of a converted layer is not split over devices"),
        ("--pipeline-parallel-size", pipeline_parallel > 1, "converted layers are looked for in one process"),
        ("--speculative-config", speculative, "a state cannot be rolled back when a draft is rejected"),
        ("--enable-lora", lora, "adapters were not made for converted layers"),
    ):
        if refused:
            raise AttnConvertError("not-served", f"converted models cannot be served with {argument}: {why}", where=argument, hint="leave it out")


class ConvertedModelConfig:
    """What vLLM asks of a model before it fixes its settings: an entry of its `MODELS_CONFIG_MAP`."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Checks the checkpoint; says whether layers have a state, and that the model is not compiled."""
        config = model_config.hf_config
        check_checkpoint(config)
        # vLLM makes room for states unless `layer_types` says full_attention of every layer. Which layers have one it learns from the layers; the list says
        # the same of all where no layer slides, since some families want that.
        types = getattr(config, "layer_types", None) or ["full_attention"]
        if set(types) == {"full_attention"}:
            has_state = "state" in layer_kinds(config.attn_plan).values()
            config.layer_types = ["linear_attention" if has_state else "full_attention"] * config.num_hidden_layers
        if not model_config.enforce_eager:
            logger.info("Converted models run without torch.compile and CUDA graphs (--enforce-eager).")
            model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Checks the settings; a state is not a function of a prefix that could be looked up, so there is no prefix caching beside one."""
        config, parallel, cache = vllm_config.model_config.hf_config, vllm_config.parallel_config, vllm_config.cache_config
        check_settings(
            config,
            max_model_len=vllm_config.model_config.max_model_len,
            tensor_parallel=parallel.tensor_parallel_size,
            pipeline_parallel=parallel.pipeline_parallel_size,
            speculative=vllm_config.speculative_config is not None,
            lora=vllm_config.lora_config is not None,
        )
        if "state" in layer_kinds(config.attn_plan).values() and cache.enable_prefix_caching:
            logger.info("Prefix caching is off: converted layers keep a state of all that a request has read, not of its prefixes.")
            cache.enable_prefix_caching = False
