"""Models of architectures without num_key_value_heads, written as another stock architecture that has it and computes the same.

- GPT-NeoX (Pythia) -> Phi: with a parallel residual both of its norms read the same input, so one norm without weights stands in for them and
  their weights and biases go into the projections that follow.
- GPT-NeoX with a sequential residual -> Nemotron with its activation and biases; Nemotron adds 1 to the weights of its norms.
- GPT-2 and OPT -> GPT-BigCode, which knows as many KV heads as query heads, or one.

Nothing is approximated: logits stay those of the source up to rounding. What none of these can express is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.regroup.heads import Projections
from attnconvert.surgery.regroup.layout import projection_tensors, read_projections
from attnconvert.surgery.sites import Site, find_sites

EXPORTED = ("gpt_neox", "gpt2", "opt")
"""Families that are saved as another one."""


def stock_config(config: Any) -> Any:
    """The config of the architecture that a model is saved as: its own, or for EXPORTED that of an equal model which has num_key_value_heads.

    Raises:
        AttnConvertError: `no-equal-architecture`, saying what in this config no such architecture can express.
    """
    if config.model_type not in EXPORTED:
        return config
    if config.model_type == "gpt_neox":
        return _neox_config(config)
    return _gpt2_config(config) if config.model_type == "gpt2" else _opt_config(config)


@torch.no_grad()
def as_stock(model: Any) -> Any:
    """`model` itself, or for EXPORTED an equal model of the architecture `stock_config` names, on the same device and in the same data type."""
    config = stock_config(model.config)
    if config is model.config:
        return model
    from transformers import AutoModelForCausalLM

    weights: Callable[[Any, Any, dict[str, Tensor]], dict[str, Tensor]] = {"phi": _phi_weights, "nemotron": _nemotron_weights, "gpt_bigcode": _bigcode_weights}[
        config.model_type
    ]
    parameter = next(model.parameters())
    made: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=parameter.dtype).to(parameter.device).eval()
    made.load_state_dict(weights(model, made, dict(model.state_dict())))
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def _refuse(config: Any, problems: Mapping[str, bool], target: str) -> None:
    found = [text for text, there in problems.items() if there]
    if found:
        raise AttnConvertError(
            "no-equal-architecture",
            f"the config of a {config.model_type!r} model has no num_key_value_heads, and this one cannot be saved as {target!r} either: {'; '.join(found)}",
            expected="an architecture with num_key_value_heads, such as llama, mistral, qwen2, qwen3, phi, phi3, stablelm, gemma2, smollm3",
            hint="convert another checkpoint, or make this attention cheaper with `attnconvert linearize`",
        )


_SHARED = ("vocab_size", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype")


def _same(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in names if getattr(config, name, None) is not None or name.endswith("_token_id")}


def _replaced(tensors: dict[str, Tensor], layers: int, old: str, new: str, names: Mapping[str, str], top: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under their new names: `names` within layers, `top` outside, what neither names left out."""
    made = {new_name: tensors[old_name] for old_name, new_name in top.items() if old_name in tensors}
    for idx in range(layers):
        made |= {f"{new.format(idx)}.{b}": tensors[f"{old.format(idx)}.{a}"] for a, b in names.items() if f"{old.format(idx)}.{a}" in tensors}
    return made


def _by_site(model: Any, made: Any, change: Callable[[Site, Projections], Projections] | None = None) -> dict[str, Tensor]:
    """The attention projections of `model` as tensors of `made`, whose layers stand in the same order."""
    tensors: dict[str, Tensor] = {}
    for site, target in zip(find_sites(model.config), find_sites(made.config), strict=True):
        parts = read_projections(model.get_submodule(site.path), site)
        if change is not None:
            parts = change(site, parts)
        tensors |= {f"{target.path}.{name}": tensor for name, tensor in projection_tensors(parts, made.get_submodule(target.path)).items()}
    return tensors


# ---------------------------------------------------------------- GPT-NeoX


def _neox_config(config: Any) -> Any:
    from transformers import NemotronConfig, PhiConfig

    heads = config.num_attention_heads
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "attention_dropout",
        *_SHARED,
    )
    values = _same(config, (*names, "rope_parameters"))
    if config.use_parallel_residual:
        return PhiConfig(
            **values, num_key_value_heads=heads, layer_norm_eps=config.layer_norm_eps, resid_pdrop=config.hidden_dropout, embd_pdrop=config.hidden_dropout
        )
    return NemotronConfig(
        **values, num_key_value_heads=heads, head_dim=config.hidden_size // heads, norm_eps=config.layer_norm_eps, attention_bias=True, mlp_bias=True
    )


_NEOX_TOP = {
    "gpt_neox.embed_in.weight": "model.embed_tokens.weight",
    "embed_out.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
}


def _phi_weights(model: Any, made: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config = model.config
    top = {**_NEOX_TOP, "gpt_neox.final_layer_norm.weight": "model.final_layernorm.weight", "gpt_neox.final_layer_norm.bias": "model.final_layernorm.bias"}
    mlp = {"mlp.dense_4h_to_h.weight": "mlp.fc2.weight", "mlp.dense_4h_to_h.bias": "mlp.fc2.bias", "attention.dense.weight": "self_attn.dense.weight"}
    new = _replaced(tensors, config.num_hidden_layers, "gpt_neox.layers.{}", "model.layers.{}", mlp, top)
    zeros = tensors["gpt_neox.final_layer_norm.bias"].new_zeros

    def folded(weight: Tensor, bias: Tensor | None, norm: str) -> tuple[Tensor, Tensor]:
        """A projection of the normalised input that computes what (weight, bias) computes after the norm's weight and bias."""
        scale, shift, wide = tensors[f"{norm}.weight"].double(), tensors[f"{norm}.bias"].double(), weight.double()
        return (wide * scale).to(weight), (wide @ shift + (0 if bias is None else bias.double())).to(weight)

    def after_norm(site: Site, parts: Projections) -> Projections:
        norm = f"gpt_neox.layers.{site.layer_idx}.input_layernorm"
        (q, q_bias), (k, k_bias), (v, v_bias) = (folded(getattr(parts, name), getattr(parts, f"{name}_bias"), norm) for name in "qkv")
        return Projections(q, k, v, parts.o, q_bias, k_bias, v_bias)

    new |= _by_site(model, made, after_norm)
    for idx in range(config.num_hidden_layers):
        old, target = f"gpt_neox.layers.{idx}", f"model.layers.{idx}"
        fc1 = folded(tensors[f"{old}.mlp.dense_h_to_4h.weight"], tensors[f"{old}.mlp.dense_h_to_4h.bias"], f"{old}.post_attention_layernorm")
        new[f"{target}.mlp.fc1.weight"], new[f"{target}.mlp.fc1.bias"] = fc1
        new[f"{target}.input_layernorm.weight"], new[f"{target}.input_layernorm.bias"] = zeros(config.hidden_size) + 1, zeros(config.hidden_size)
        new[f"{target}.self_attn.dense.bias"] = tensors.get(f"{old}.attention.dense.bias", zeros(config.hidden_size))
    new["lm_head.bias"] = zeros(config.vocab_size)
    return new


def _nemotron_weights(model: Any, made: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config = model.config
    top = {**_NEOX_TOP, "gpt_neox.final_layer_norm.weight": "model.norm.weight", "gpt_neox.final_layer_norm.bias": "model.norm.bias"}
    names = {
        f"{old}.{what}": f"{new}.{what}"
        for old, new in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("mlp.dense_h_to_4h", "mlp.up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
        )
        for what in ("weight", "bias")
    }
    new = _replaced(tensors, config.num_hidden_layers, "gpt_neox.layers.{}", "model.layers.{}", names, top)
    for name in new:
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            new[name] = new[name] - 1
    zeros = tensors["gpt_neox.final_layer_norm.bias"].new_zeros

    def with_biases(site: Site, parts: Projections) -> Projections:
        biases = {
            name: zeros(getattr(parts, name[0]).shape[:2]) if getattr(parts, name) is None else getattr(parts, name) for name in ("q_bias", "k_bias", "v_bias")
        }
        return Projections(parts.q, parts.k, parts.v, parts.o, **biases)

    new |= _by_site(model, made, with_biases)
    for idx in range(config.num_hidden_layers):
        new[f"model.layers.{idx}.self_attn.o_proj.bias"] = tensors.get(f"gpt_neox.layers.{idx}.attention.dense.bias", zeros(config.hidden_size))
    return new


# ---------------------------------------------------------------- GPT-2 and OPT


def _gpt2_config(config: Any) -> Any:
    from transformers import GPTBigCodeConfig

    _refuse(config, {"it attends to an encoder (add_cross_attention)": bool(config.add_cross_attention)}, "gpt_bigcode")
    names = (
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "layer_norm_epsilon",
        "scale_attn_weights",
    )
    return GPTBigCodeConfig(**_same(config, (*names, *_SHARED)), multi_query=False)


def _opt_config(config: Any) -> Any:
    from transformers import GPTBigCodeConfig

    problems = {
        "it normalises after the attention (do_layer_norm_before: false)": not config.do_layer_norm_before,
        "its embeddings are narrower than its layers (word_embed_proj_dim)": config.word_embed_proj_dim != config.hidden_size,
        "it has no last norm (_remove_final_layer_norm)": bool(config._remove_final_layer_norm),
    }
    _refuse(config, problems, "gpt_bigcode")
    return GPTBigCodeConfig(
        **_same(config, (*_SHARED, "attention_dropout"))
        | {"n_positions": config.max_position_embeddings, "n_embd": config.hidden_size, "n_layer": config.num_hidden_layers, "n_head": config.num_attention_heads,
           "n_inner": config.ffn_dim, "activation_function": config.activation_function, "resid_pdrop": config.dropout, "embd_pdrop": 0.0,
           "attn_pdrop": config.attention_dropout, "multi_query": False}
    )  # fmt: skip


def _bigcode_weights(model: Any, made: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, zeros = model.config, next(model.parameters()).new_zeros
    if config.model_type == "gpt2":
        top = {
            name: name for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight")
        }
        names = {f"{name}.{what}": f"{name}.{what}" for name in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for what in ("weight", "bias")}
        new = _replaced(tensors, config.n_layer, "transformer.h.{}", "transformer.h.{}", names | {"attn.c_proj.bias": "attn.c_proj.bias"}, top)
        new = {name: tensor.T.contiguous() if ".mlp." in name and name.endswith("weight") else tensor for name, tensor in new.items()}

        def scaled(site: Site, parts: Projections) -> Projections:
            by = site.layer_idx + 1 if config.scale_attn_by_inverse_layer_idx else 1
            return Projections(parts.q / by, parts.k, parts.v, parts.o, None if parts.q_bias is None else parts.q_bias / by, parts.k_bias, parts.v_bias)

        return new | _by_site(model, made, scaled)
    top = {
        "model.decoder.embed_tokens.weight": "transformer.wte.weight",
        "model.decoder.final_layer_norm.weight": "transformer.ln_f.weight",
        "model.decoder.final_layer_norm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    }
    names = {
        f"{old}.{what}": f"{new}.{what}"
        for old, new in (
            ("self_attn_layer_norm", "ln_1"),
            ("final_layer_norm", "ln_2"),
            ("fc1", "mlp.c_fc"),
            ("fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.c_proj"),
        )
        for what in ("weight", "bias")
    }
    new = _replaced(tensors, config.num_hidden_layers, "model.decoder.layers.{}", "transformer.h.{}", names, top)
    new["transformer.wpe.weight"] = tensors["model.decoder.embed_positions.weight"][2:]  # the first two rows stand for padding
    new |= _by_site(model, made)
    for name, tensor in made.state_dict().items():  # OPT may do without biases and without weights of its norms
        if name not in new:
            new[name] = zeros(tensor.shape) + float(name.endswith("weight"))
    return new
