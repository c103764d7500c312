"""Make the full checkpoint of a conversion that was saved with `--adapters-only`, on this machine or another."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnconvert.convert.load import Source, load_model, resolve
from attnconvert.convert.save import ADAPTERS_SCHEMA_VERSION, CORES_FILE, FACTS_FILE, check_output, fingerprint, save_checkpoint
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.plan import ConversionPlan

EXTRA_FOLDER = "attnconvert"
_TEXTS = (".json", ".jsonl", ".yaml")


@dataclass(frozen=True)
class Adapters:
    """What attnconvert.json says.

    Attributes:
        plan: the conversion, kept layers included.
        base_name: the base model as the user named it.
        revision: its Hub revision, or None.
        fingerprint: `save.fingerprint` of its weights as loaded.
        load_dtype: how they were loaded: `auto`, `fp32`, `bf16` or `fp16`.
        dtype: data type of the merged weights, e.g. `bfloat16`.
        recipe: the resolved recipe.
        versions: package -> version at the time.
    """

    plan: ConversionPlan
    base_name: str
    revision: str | None
    fingerprint: str
    load_dtype: str
    dtype: str
    recipe: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` is the inverse."""
        return {
            "schema_version": ADAPTERS_SCHEMA_VERSION,
            "base_model": {"name": self.base_name, "revision": self.revision, "sha256": self.fingerprint, "loaded_as": self.load_dtype},
            "dtype": self.dtype,
            "plan": self.plan.to_dict(),
            "recipe": self.recipe,
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Adapters:
        """Inverse of `to_dict`. Raises ValueError for a schema version this attnconvert does not know."""
        if data.get("schema_version") != ADAPTERS_SCHEMA_VERSION:
            raise ValueError(f"it has schema_version {data.get('schema_version')!r}, this attnconvert reads {ADAPTERS_SCHEMA_VERSION}")
        base = data["base_model"]
        plan = ConversionPlan.from_dict(data["plan"])
        return cls(plan, base["name"], base["revision"], base["sha256"], base["loaded_as"], data["dtype"], dict(data["recipe"]), dict(data["versions"]))


@dataclass(frozen=True)
class Merged:
    """A converted model in memory.

    Attributes:
        model: on the CPU, adapters merged, weights in the base's loaded data type.
        tokenizer: the base's.
        source: where the base came from.
        adapters: what attnconvert.json says.
    """

    model: Any
    tokenizer: Any
    source: Source
    adapters: Adapters


def merge(adapters: Path, out: Path, *, base: str | None = None, device: str = "cpu") -> Path:
    """Write the checkpoint that the same run would have written without `--adapters-only`, tensor for tensor.

    Args:
        adapters: a folder written with `--adapters-only`.
        out: the folder to create.
        base: the base model, where it is called otherwise here than on the machine that trained; None = as recorded.
        device: where the parity check runs; merging itself is on the CPU, so that every machine rounds alike.

    Returns:
        `out`.

    Raises:
        AttnConvertError: `not-adapters`, `base-mismatch`, those of `load.load_model` and of `save.save_checkpoint`.
    """
    import torch

    out = Path(os.path.abspath(out))
    check_output(out, overwrite=False)
    if not out.parent.is_dir():
        raise AttnConvertError("cannot-write", f"there is no folder {str(out.parent)!r}", hint="create it first")
    merged = load_merged(adapters, base=base)
    folder = Path(adapters) / EXTRA_FOLDER
    extra = {f"{EXTRA_FOLDER}/{path.name}": path.read_text(encoding="utf-8") for path in sorted(folder.glob("*")) if path.suffix in _TEXTS}
    merged.model.to(device)
    save_checkpoint(merged.model, merged.tokenizer, out, dtype=getattr(torch, merged.adapters.dtype), extra_files=extra)
    return out


def read_adapters(folder: Path) -> Adapters:
    """What attnconvert.json of an adapters folder says.

    Raises:
        AttnConvertError: `not-adapters`.
    """
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        raise AttnConvertError(
            "not-adapters",
            f"{str(folder)!r} has no {FACTS_FILE}",
            expected="a folder written with `--adapters-only`",
            hint="a full checkpoint needs no merging",
        )
    try:
        return Adapters.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise AttnConvertError(
            "not-adapters",
            f"{FACTS_FILE} cannot be read: {error}",
            where=str(path),
            hint="write the adapters again, or use the attnconvert version that wrote them",
        ) from error


def load_merged(folder: Path, *, base: str | None = None) -> Merged:
    """Load the base model, convert it by the recorded plan, and put cores and adapters in.

    Args:
        folder: a folder written with `--adapters-only`.
        base: see `merge`.

    Raises:
        AttnConvertError: `not-adapters`, `base-mismatch`, `corrupt-weights`, and those of `load.load_model`.
    """
    import peft
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from attnconvert.distill.lora import adapter_state, merge_lora
    from attnconvert.surgery.swap import swap

    folder = Path(folder)
    adapters = read_adapters(folder)
    source = resolve(base or adapters.base_name, revision=None if base else adapters.revision)
    loaded = load_model(source, dtype=adapters.load_dtype)
    if fingerprint(loaded.model) != adapters.fingerprint:
        raise AttnConvertError(
            "base-mismatch",
            f"{source.name!r} is not the model these adapters were trained on",
            where=str(folder / FACTS_FILE),
            expected=f"the weights of {adapters.base_name!r}" + (f" at revision {adapters.revision}" if adapters.revision else ""),
            hint="give that model with --base",
        )
    swap(loaded.model, adapters.plan)
    try:
        cores = load_file(folder / CORES_FILE)
    except (OSError, SafetensorError) as error:
        raise AttnConvertError("corrupt-weights", f"{CORES_FILE} cannot be read: {error}", where=str(folder)) from error
    ours = {name: parameter for name, parameter in loaded.model.state_dict(keep_vars=True).items() if ".core." in name}
    if {name: p.shape for name, p in ours.items()} != {name: t.shape for name, t in cores.items()}:
        raise AttnConvertError("corrupt-weights", f"{CORES_FILE} does not fit the plan", where=str(folder), hint="copy the whole folder again")
    for name, parameter in ours.items():
        parameter.data.copy_(cores[name])
    try:
        # On the CPU and in fp32 by name: peft would pick the GPU.
        wrapped = peft.PeftModel.from_pretrained(loaded.model, str(folder), torch_device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AttnConvertError(
            "corrupt-weights", f"the adapters cannot be read: {str(error).splitlines()[0]}", where=str(folder), hint="copy the whole folder again"
        ) from error
    # peft only warns about adapters that are missing from the file.
    saved = load_file(folder / "adapter_model.safetensors")
    if any(not torch.equal(saved.get(f"base_model.model.{name}", torch.empty(0)), weight) for name, weight in adapter_state(wrapped).items()):
        raise AttnConvertError("corrupt-weights", "adapter_model.safetensors lacks some of the adapters", where=str(folder), hint="copy the whole folder again")
    model = merge_lora(wrapped)
    model.eval().requires_grad_(False)
    return Merged(model, loaded.tokenizer, source, adapters)
