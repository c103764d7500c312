"""Low-rank adapters (peft) on the projections of given attention modules, and nowhere else.

peft injects the adapters into the model in place. The attention cores are no part of it: their parameters are trained and saved directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from attnconvert.distill.config import LoraConfig

_ADAPTER = "default"
_FUSED = ("qkv_proj", "query_key_value", "c_attn")
_NAMES = {
    "q": ("q_proj", "query", *_FUSED),
    "k": ("k_proj", "key", *_FUSED),
    "v": ("v_proj", "value", *_FUSED),
    "o": ("o_proj", "dense", "out_proj", "c_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h", "c_fc", "c_proj", "fc1", "fc2"),
}
"""Recipe target -> the names transformers gives that projection."""


def lora_targets(model: nn.Module, attention_paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Full names of the projections that get adapters, in model order.

    `q`, `k`, `v`, `o` are looked for among the direct children of each attention module, `mlp` anywhere else in the layer around it.

    Args:
        model: a transformers model.
        attention_paths: module paths such as `model.layers.3.self_attn`.
        targets: of `q`, `k`, `v`, `o`, `mlp`.

    Raises:
        AttnConvertError: `lora-target`, a target matches nothing in one of the layers.
    """
    assert attention_paths, "adapters need attention modules to sit on"
    found: set[str] = set()
    for path in attention_paths:
        attention = model.get_submodule(path)
        layer_path = path.rpartition(".")[0]
        for target in targets:
            if target == "mlp":
                named = [(f"{layer_path}.{name}", module) for name, module in model.get_submodule(layer_path).named_modules()]
                named = [(name, module) for name, module in named if not name.startswith(f"{path}.")]
            else:
                named = [(f"{path}.{name}", module) for name, module in attention.named_children()]
            candidates = [name for name, module in named if isinstance(module, nn.Linear | Conv1D)]
            matching = [name for name in candidates if name.rpartition(".")[2] in _NAMES[target]]
            if not matching:
                present = ", ".join(name.rpartition(".")[2] for name in candidates) or "none"
                raise AttnConvertError(
                    "lora-target",
                    f"adapter target '{target}' matches nothing in this layer",
                    where=f"stages.finetune.lora.targets, {path}",
                    expected=f"a linear layer named {', '.join(_NAMES[target])}; the module has {present}",
                    hint="leave the target out with `--set stages.finetune.lora.targets=[...]`",
                )
            found.update(matching)
    return [name for name, _ in model.named_modules() if name in found]


def add_lora(model: nn.Module, attention_paths: Sequence[str], config: LoraConfig, *, seed: int) -> peft.PeftModel:
    """Injects fresh adapters (which compute nothing yet) into `model` in place, fp32 whatever the model's dtype.

    Args:
        model: a transformers causal LM.
        attention_paths: module paths of the attention modules that get adapters.
        config: the recipe's `stages.finetune.lora`.
        seed: of the adapters' initialisation; the global RNG is left as it was.

    Returns:
        peft's wrapper; `model` itself now contains the adapters.
    """
    names = lora_targets(model, attention_paths, config.targets)
    settings = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank; fractions work
        lora_dropout=config.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        bias="none",
    )
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, settings, adapter_name=_ADAPTER)
    assert isinstance(wrapped, peft.PeftModel)
    # peft compresses a long list to suffixes before matching; this proves that it still names the same modules.
    assert sorted(lora_layers(wrapped)) == sorted(names), "peft put adapters on other modules than asked"
    return wrapped


def lora_layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    """Module path in the base model -> the layer that carries an adapter there."""
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def adapters_off(model: peft.PeftModel) -> Iterator[None]:
    """Inside, the model computes what it did before `add_lora`.

    peft's own `disable_adapter` re-examines the whole model on every entry; this runs twice per training step.
    """
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_lora(model: peft.PeftModel) -> nn.Module:
    """Adds the adapters to the weights they sit on and removes peft's modules; returns the plain model, same dtype as before.

    Each sum is formed in fp32 and rounded once: adding a rounded update to a bf16 weight would lose most of it.
    """
    for layer in lora_layers(model).values():
        base: Any = layer.get_base_layer()
        dtype = base.weight.dtype
        base.weight.data = base.weight.data.float()
        layer.merge(safe_merge=True)
        base.weight.data = base.weight.data.to(dtype)
    merged: nn.Module = model.unload()  # takes the wrappers off; the merged weights stay
    return merged


def adapter_state(model: peft.PeftModel) -> dict[str, Tensor]:
    """The adapters alone, on the CPU: `<module path>.lora_A.weight` [rank, in] and `<module path>.lora_B.weight` [out, rank]."""
    return {name: weight.detach().cpu().clone() for name, weight in _adapter_weights(model).items()}


def load_adapter_state(model: peft.PeftModel, state: Mapping[str, Tensor]) -> None:
    """Fills the adapters of `add_lora` with what `adapter_state` returned.

    Raises:
        AttnConvertError: `adapter-mismatch`, names or shapes differ; nothing was changed.
    """
    weights = _adapter_weights(model)
    ours, theirs = {n: tuple(w.shape) for n, w in weights.items()}, {n: tuple(w.shape) for n, w in state.items()}
    if ours != theirs:
        name = next(n for n in (*ours, *theirs) if ours.get(n) != theirs.get(n))
        raise AttnConvertError(
            "adapter-mismatch",
            "the saved adapters do not fit this model",
            where=f"{name}: saved {theirs.get(name, 'absent')}, model {ours.get(name, 'absent')}",
            expected="the base model, plan and lora settings the adapters were trained with",
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state[name])


def _adapter_weights(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    return {f"{path}.{part}.weight": getattr(layer, part)[_ADAPTER].weight for path, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}
