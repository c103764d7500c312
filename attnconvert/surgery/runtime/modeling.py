"""Converted models as transformers classes, generated for any causal-LM family: `AttnConvertLlamaForCausalLM` from `LlamaForCausalLM`.

A converted config has `model_type: attnconvert`, remembers the family in `base_model_type`, and holds the plan in `attn_plan`. Its own
model_type keeps a stock loader from silently building the softmax model and dropping our parameters.
"""

import functools
import inspect
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from attnconvert.surgery.runtime.cache import CoreCacheLayer
from attnconvert.surgery.runtime.cores import core_class
from attnconvert.surgery.runtime.export import write_code
from attnconvert.surgery.runtime.graph import DecodeGraph, graph_refusal, log_once
from attnconvert.surgery.runtime.seam import IMPLEMENTATION, STARTS_KWARG, AttentionCore, Starts, document_starts

MODEL_TYPE = "attnconvert"
PLAN_SCHEMA_VERSION = 1
PREFIX = "AttnConvert"


@functools.cache
def config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The converted config class of a family, e.g. AttnConvertLlamaConfig from LlamaConfig."""

    class ConvertedConfig(base):  # type: ignore[misc, valid-type]
        model_type = MODEL_TYPE
        base_model_type: str = base.model_type
        attn_plan: dict[str, Any] | None = None

    ConvertedConfig.__name__ = ConvertedConfig.__qualname__ = PREFIX + base.__name__
    return ConvertedConfig


class AttnConvertConfig(PretrainedConfig):
    """Entry point of AutoConfig: reads `base_model_type` and returns the config of that family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. Raises ValueError when the plan is missing or of an unknown schema version, or the family is unknown."""
        base_type, plan = config_dict.get("base_model_type"), config_dict.get("attn_plan")
        if base_type is None or plan is None:
            raise ValueError("this config.json has no base_model_type or attn_plan: it was not written by attnconvert, or was cut")
        if plan.get("schema_version") != PLAN_SCHEMA_VERSION:
            raise ValueError(
                f"attn_plan has schema version {plan.get('schema_version')!r}; this code reads {PLAN_SCHEMA_VERSION}. Use the attnconvert version that wrote it, or a newer one"
            )
        if base_type not in CONFIG_MAPPING:
            raise ValueError(f"this transformers does not know the model family {base_type!r} that was converted; use a newer one")
        base = CONFIG_MAPPING[base_type]
        if __name__.startswith("attnconvert."):
            base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base]
            AutoModelForCausalLM.register(config_class(base), model_class(base_model), exist_ok=True)
        return config_class(base).from_dict({k: v for k, v in config_dict.items() if k != "model_type"}, **kwargs)


@functools.cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The converted model class of a family, e.g. AttnConvertLlamaForCausalLM from LlamaForCausalLM."""
    parameters = list(inspect.signature(base.forward).parameters.values())
    names = [p.name for p in parameters[1:]]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @functools.wraps(base.forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        return base.forward(self, **self._seam_arguments(kwargs, open_ended))

    namespace = {
        "forward": forward,
        "config_class": config_class(base.config_class),
        "__module__": __name__,
        "__doc__": f"{base.__name__} with converted attention.",
    }
    return type(PREFIX + base.__name__, (AttnConvertMixin, base), namespace)


def __getattr__(name: str) -> Any:
    """`AttnConvertLlamaForCausalLM` on request, so that auto_map can name generated classes; configs too, so that they can be pickled."""
    if name.startswith(PREFIX) and name != PREFIX:
        import transformers

        base = getattr(transformers, name[len(PREFIX) :], None)
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return model_class(base)
        if isinstance(base, type) and issubclass(base, PretrainedConfig):
            return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AttnConvertMixin:
    """What every converted model adds to its family's class."""

    _is_stateful = True  # refuses assisted and prompt-lookup decoding: a state cannot be rolled back
    _supports_attention_backend = False  # serving engines must not replace the attention function
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"core"}
    # True = hand document starts to the layers even when every row is one document, so that compiled layers see one kind of input
    static_starts = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach_cores(self, config.attn_plan)
        use_seam(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but a checkpoint that lacks tensors is an error, not a random initialisation."""
        wanted = kwargs.get("attn_implementation")
        if wanted not in (None, "sdpa", "eager", IMPLEMENTATION):
            raise ValueError(f"attn_implementation={wanted!r} cannot be used with converted attention; leave it out")
        kwargs.pop("attn_implementation", None)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of the converted model, e.g. {missing[0]}: it is incomplete, or its attn_plan was edited"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', plus the code files, so the folder loads with trust_remote_code and no attnconvert installed."""
        config: Any = self.config  # type: ignore[attr-defined]
        config.auto_map = {"AutoConfig": "modeling_attnconvert.AttnConvertConfig", "AutoModelForCausalLM": f"modeling_attnconvert.{type(self).__name__}"}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_code(os.fspath(save_directory), sorted({row["method"] for row in config.attn_plan["layers"] if row["method"]}))

    def build_cache(self, max_length: int | None = None) -> Cache:
        """An empty cache: the state of converted layers, what the family uses for kept ones.

        Args:
            max_length: tokens, padding included, to make room for, where a state grows with the context; more tokens are no error. None = grow.
        """
        return build_cache(self.config, max_length)  # type: ignore[attr-defined]

    def _seam_arguments(self, kwargs: dict[str, Any], open_ended: bool) -> dict[str, Any]:
        config: Any = self.config  # type: ignore[attr-defined]
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None:
            return kwargs
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = bool(getattr(config, "use_cache", True)) and not self.training  # type: ignore[attr-defined]
            kwargs["use_cache"] = use_cache
        past = kwargs.get("past_key_values")
        if use_cache and past is None:
            past = kwargs["past_key_values"] = build_cache(config)
        mask, (batch_size, num_tokens) = kwargs.get("attention_mask"), ids.shape[:2]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            _check_mask(mask[:, -num_tokens:], cached=past is not None)
        elif mask is not None:
            raise ValueError("converted models take a 2D attention mask [batch, tokens]; pass packed documents as position_ids")
        if open_ended:
            position_ids = kwargs.get("position_ids")
            start = document_starts(mask, position_ids, batch_size, num_tokens, has_past=past is not None)
            aligned_to: tuple[int, ...] = ()
            if start is not None and num_tokens > 1:  # one device sync per forward pass
                windows = {row["config"].get("window", {}).get("size", 0) for row in config.attn_plan["layers"]} - {0}
                blocks = {module.core.alignment for _, _, module in converted_sites(self)} - {1}  # type: ignore[arg-type]
                sizes = sorted(windows | blocks)
                padded = (start[:, 0] > 0).any()
                some, padded, *aligned = torch.stack([(start > 0).any(), padded, *((start % size == 0).all() for size in sizes)]).tolist()
                start = start if some or self.static_starts else None  # None: no padding, no packing
                # kernels of windows skip padding at the start of a row, those that want documents aligned have no place for it
                aligned_to = tuple(size for size, holds in zip(sizes, aligned, strict=True) if holds and not (padded and size in blocks))
            kwargs[STARTS_KWARG] = Starts(start, aligned_to)
        return kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:  # fmt: skip
        past = model_kwargs.get("past_key_values")
        if past is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not available for converted attention, which has a cache of its own; leave it out"
                )
            model_kwargs["past_key_values"] = self.build_cache(max_cache_length)
            return None
        for layer in getattr(past, "layers", ()):
            if isinstance(layer, CoreCacheLayer):
                layer.planned_length = max(max_cache_length, layer.planned_length or 0)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)  # type: ignore[misc]

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Asked by transformers: whether decoding may use `get_compiled_call`: on CUDA, where a step can be captured in a CUDA graph."""
        if self.device.type != "cuda":  # type: ignore[attr-defined]
            return False
        why = graph_refusal(self, model_kwargs.get("past_key_values"))
        if generation_config.disable_compile:
            why = "disable_compile is set"
        elif generation_config.output_attentions or generation_config.output_hidden_states:
            why = "outputs of every step are kept, and a graph writes them to one place"
        if why is not None:
            log_once(f"generate() runs without a CUDA graph: {why}")
        return why is None

    def get_compiled_call(self, compile_config: Any) -> Any:
        """The forward pass, whose single-token steps are replayed from a CUDA graph. A new one for each call of generate(), since it belongs to one cache."""
        if self.device.type != "cuda":  # type: ignore[attr-defined]
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        return DecodeGraph(self)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("the attention implementation of a converted model is fixed by its plan")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "continuous batching packs requests into one row and bypasses the cache of converted attention: it would return wrong text. Use generate() on a left-padded batch"
        )

    generate_batch = init_continuous_batching
    continuous_batching_context_manager = init_continuous_batching


def _check_mask(mask: Tensor, *, cached: bool) -> None:
    """Refuse padding between real tokens, and right padding of cached tokens: a recurrent state cannot skip them later. mask: [B, T]."""
    real = mask.bool()
    if mask.shape[1] == 1:
        return
    falls = (real[:, :-1] & ~real[:, 1:]).sum(1)
    rises = (~real[:, :-1] & real[:, 1:]).sum(1)
    holes, right_padded = torch.stack([((falls + rises) > 1).any() | ((falls > 0) & (rises > 0)).any(), (falls > 0).any()]).tolist()
    if holes:
        raise ValueError("attention_mask has zeros between real tokens; converted attention supports left padding (and right padding without a cache)")
    if right_padded and cached:
        raise ValueError("right-padded input with a cache is not supported by converted attention: set tokenizer.padding_side = 'left'")


def attach_cores(model: Any, plan: dict[str, Any]) -> None:
    """Give every converted attention module of a plan its core (fresh parameters). All paths are looked up before anything changes."""
    found = [(model.get_submodule(row["path"]), row) for row in plan["layers"] if row["method"] is not None]
    device = next(iter(model.parameters())).device
    for module, row in found:
        build: Any = core_class(row["method"])
        core = build(row["num_heads"], row["num_key_value_heads"], row["head_dim"], **row["config"])
        core.fit(module)
        module.core = core if device.type == "meta" else core.to(device)


def use_seam(model: Any) -> None:
    """Route every attention module of the model through the seam."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation = IMPLEMENTATION


def build_cache(config: Any, max_length: int | None = None) -> Cache:
    """See AttnConvertMixin.build_cache."""
    stock = DynamicCache(config=config.get_text_config(decoder=True))
    converted = {row["layer_idx"] for row in config.attn_plan["layers"] if row["method"] is not None}
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[CoreCacheLayer(max_length) if i in converted else stock.layers[i] for i in range(num_layers)])


def converted_sites(model: nn.Module) -> list[tuple[int, str, Any]]:
    """(layer_idx, path, attention module) of every module that has a core, in model order."""
    return [(int(m.layer_idx), path, m) for path, m in model.named_modules() if isinstance(getattr(m, "core", None), AttentionCore)]


@contextmanager
def teacher_mode(model: nn.Module, layer_idxs: Collection[int] | None = None) -> Iterator[None]:
    """Inside, converted layers (all, or those given) compute the original softmax attention; call the model with use_cache=False."""
    cores = [module.core for idx, _, module in converted_sites(model) if layer_idxs is None or idx in layer_idxs]
    before = [core.teacher for core in cores]
    for core in cores:
        core.teacher = True
    try:
        yield
    finally:
        for core, value in zip(cores, before, strict=True):
            core.teacher = value


if __name__.startswith("attnconvert."):  # installed; a checkpoint's own copy is found through auto_map instead
    AutoConfig.register(MODEL_TYPE, AttnConvertConfig, exist_ok=True)
