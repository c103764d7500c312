"""Find the attention modules of a model and the facts a method needs, by running the model once on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from attnconvert.errors import AttnConvertError


@dataclass(frozen=True)
class Site:
    """One attention module, as seen at the seam (after projections, q/k norm and RoPE).

    Attributes:
        layer_idx: transformers' layer index.
        path: module path, e.g. `model.layers.0.self_attn`.
        class_name: e.g. `LlamaAttention`.
        num_heads: query heads H.
        num_key_value_heads: key-value heads G.
        head_dim: D of q and k.
        scaling: factor on q.k before the softmax.
        sliding_window: window of a sliding-window layer in tokens, None for full attention.
        softcap: tanh cap on the logits, None when there is none.
        has_sink_logits: the layer adds learned sink logits (gpt-oss).
    """

    layer_idx: int
    path: str
    class_name: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    has_sink_logits: bool = False


def find_sites(config: Any) -> list[Site]:
    """The attention sites of a causal LM, from its config alone.

    The model is built on the meta device (no weights, no memory) and run once on a short sequence with a recording attention
    function, so what is returned is what the seam will see, for any family.

    Args:
        config: a transformers config.

    Raises:
        AttnConvertError: `not-a-causal-lm`, `attention-not-reachable` when attention modules do not go through the interface.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type in _ENCODERS:
        raise AttnConvertError(
            "not-a-causal-lm",
            f"a {config.model_type!r} model is not a causal language model",
            expected="a decoder-only model such as llama, mistral, qwen3, gemma3_text, phi3, olmo2, gpt2",
            hint="`attnconvert methods` says which kinds of model each method takes",
        )
    records: dict[int, dict[str, Any]] = {}
    value_dims: dict[int, int] = {}

    def record(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[Any, None]:
        records[id(module)] = {
            "num_heads": q.shape[1], "num_key_value_heads": k.shape[1], "head_dim": q.shape[3], "scaling": q.shape[3] ** -0.5 if scaling is None else float(scaling),
            "sliding_window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap"), "has_sink_logits": kwargs.get("s_aux") is not None,
        }  # fmt: skip
        value_dims[id(module)] = v.shape[3]
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None

    AttentionInterface.register(_PROBE, record)
    AttentionMaskInterface.register(_PROBE, _no_mask)
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):  # bf16: the grouped matmul of mixture-of-experts layers takes nothing else
            model = AutoModelForCausalLM.from_config(config, attn_implementation=_PROBE, dtype=torch.bfloat16)
        model.eval()
        model.config.pad_token_id = None  # some families look into the input for it, and there is nothing to look into here
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long, device="meta"), attention_mask=torch.ones(1, 4, dtype=torch.long, device="meta"), use_cache=False)
    except Exception as error:  # whatever a family does that the interface does not foresee
        raise AttnConvertError(
            "attention-not-reachable",
            f"a {config.model_type!r} model cannot be run through transformers' attention interface ({type(error).__name__}: {str(error)[:160]})",
            expected="attention that goes through ALL_ATTENTION_FUNCTIONS, and a config.json that describes a working model",
            hint=f"check config.json; if the model itself works, {config.model_type} computes attention in its own way and cannot be converted",
        ) from error
    sites = [
        Site(layer_idx=module.layer_idx, path=path, class_name=type(module).__name__, **records[id(module)])
        for path, module in model.named_modules()
        if id(module) in records and getattr(module, "layer_idx", None) is not None
    ]
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    if len({site.layer_idx for site in sites}) != num_layers or len(sites) != num_layers:
        raise AttnConvertError(
            "attention-not-reachable",
            f"only {len(sites)} of {num_layers} layers of a {config.model_type!r} model call transformers' attention interface",
            expected="one attention module per layer that goes through ALL_ATTENTION_FUNCTIONS",
            hint=f"{config.model_type} computes attention in its own way and cannot be converted",
        )
    odd = [path for path, module in model.named_modules() if id(module) in value_dims and value_dims[id(module)] != records[id(module)]["head_dim"]]
    if odd:
        raise AttnConvertError(
            "attention-not-reachable",
            f"values have another head size than queries and keys in a {config.model_type!r} model",
            where=odd[0],
            hint=f"{config.model_type} compresses its keys and values and cannot be converted",
        )
    _check_cache(model, sites)
    return sorted(sites, key=lambda site: site.layer_idx)


def _check_cache(model: Any, sites: list[Site]) -> None:
    """Refuse families that touch keys or values between the cache and the attention function.

    The model runs once, on the meta device, with a cache whose layers return no tensors.

    Raises:
        AttnConvertError: `attention-touches-cache`.
    """
    import torch

    from attnconvert.surgery.plan import ConversionPlan, LayerPlan
    from attnconvert.surgery.swap import swap

    rows = tuple(LayerPlan(s.layer_idx, s.path, s.num_heads, s.num_key_value_heads, s.head_dim, "exact") for s in sites)
    family = model.config.model_type
    try:
        swap(model, ConversionPlan(family, rows))
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long, device="meta"), use_cache=True)
    except Exception as error:
        raise AttnConvertError(
            "attention-touches-cache",
            f"the attention of a {family!r} model works on keys or values after they went through the cache ({type(error).__name__}: {str(error)[:120]})",
            where=sites[0].path,
            hint=f"{family} cannot be converted: its cache must hold every key",
        ) from error


_PROBE = "attnconvert_probe"
# families with a CausalLM head that are encoders all the same: they load with a random head and no causal mask
_ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "convbert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "mobilebert",
        "modernbert",
        "roberta",
        "roberta-prelayernorm",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
