"""Load a teacher: a Hub id, a local directory, a GGUF file, or `demo`; every known way to fail has its own error."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnconvert import embedded
from attnconvert.errors import AttnConvertError

PICKLE_PATTERNS = ("pytorch_model", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, resolved once.

    Attributes:
        name: what the user typed.
        path: local directory (or the GGUF's directory), or a Hub id.
        gguf_file: file name of a GGUF inside `path`, else None.
        revision: Hub revision, else None.
        trust_remote_code: run code found in the model's repository.
        is_local: path is a directory on this machine.
    """

    name: str
    path: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    is_local: bool = False

    def hub_arguments(self) -> dict[str, Any]:
        """Keyword arguments common to config, model and tokenizer loading."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        if self.revision is not None:
            arguments["revision"] = self.revision
        return arguments


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer. `model` is in eval mode with gradients off."""

    model: Any
    tokenizer: Any
    source: Source


def resolve(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find out what `name` is, without loading anything.

    Raises:
        AttnConvertError: `model-not-found`, `no-weights`, `pickle-weights`, `shard-missing`, `tokenizer-missing` for local paths.
    """
    if name == "demo" and not os.path.exists(name):
        return Source(name, str(embedded.model_dir()), is_local=True)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise AttnConvertError("model-not-found", f"{name!r} is a file, not a model directory", expected="a directory with config.json, or a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise AttnConvertError("corrupt-weights", f"{name!r} is not a GGUF file", where=str(path), hint="download it again")
        return Source(name, str(path.parent), gguf_file=path.name, is_local=True)
    if path.is_dir():
        _check_directory(path)
        return Source(name, str(path), trust_remote_code=trust_remote_code, is_local=True)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise AttnConvertError(
            "model-not-found", f"there is no model at {name!r}", hint="give a directory with config.json, a .gguf file, a Hub id such as user/name, or `demo`"
        )
    return Source(name, name, revision=revision, trust_remote_code=trust_remote_code)


def _check_directory(path: Path) -> None:
    """Complain about what is missing in a local checkpoint before anything is loaded."""
    if not (path / "config.json").exists():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = (
            f"for GGUF weights name the file: {path / ggufs[0]}"
            if ggufs
            else "save the model with save_pretrained, or point to the directory that holds config.json"
        )
        raise AttnConvertError("model-not-found", f"{str(path)!r} has no config.json", where=str(path), hint=hint)
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise AttnConvertError("corrupt-weights", "the list of weight shards cannot be read", where=str(index), hint="download the model again") from error
        missing = [shard for shard in shards if not (path / shard).exists()]
        if missing:
            raise AttnConvertError(
                "shard-missing",
                f"{len(missing)} of {len(shards)} weight shards are missing: {', '.join(missing[:4])}",
                where=str(index),
                hint="download the missing files again",
            )
    elif not (path / "model.safetensors").exists():
        pickles = sorted(p.name for p in path.iterdir() if p.name.startswith(PICKLE_PATTERNS[0]) or p.suffix in PICKLE_PATTERNS[1:])
        if pickles:
            raise AttnConvertError(
                "pickle-weights",
                f"the weights are pickle files ({pickles[0]}), which can run code when they are opened",
                where=str(path),
                expected="safetensors weights",
                hint="convert them in a sandbox: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)",
            )
        raise AttnConvertError(
            "no-weights",
            "there are no weights here",
            where=str(path),
            expected="model.safetensors, or model.safetensors.index.json with its shards",
            hint="download the model again, or point to the folder that holds its weights",
        )


def load_config(source: Source) -> Any:
    """The model's transformers config; no weights."""
    from transformers import AutoConfig

    with explained(source, "config"):
        return AutoConfig.from_pretrained(source.path, **source.hub_arguments())


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer. Raises AttnConvertError `tokenizer-missing`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.hub_arguments())
    except (ValueError, OSError, TypeError, AttributeError, KeyError) as error:
        if not source.is_local:
            with explained(source, "tokenizer"):
                raise
        raise AttnConvertError(
            "tokenizer-missing",
            f"no usable tokenizer in {source.name!r}: {_first_line(error)}",
            where=source.path,
            expected="tokenizer.json (with tokenizer_config.json)",
            hint="copy the tokenizer files of the original model there",
        ) from error
    return tokenizer


def load_model(source: Source, *, dtype: str = "auto", device: str = "cpu") -> Loaded:
    """The teacher, complete or not at all.

    Args:
        dtype: `auto` (the checkpoint's), `fp32`, `bf16` or `fp16`.
        device: a torch device.

    Raises:
        AttnConvertError: see `explained`; also `missing-tensors`, because transformers fills missing tensors with random numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtypes = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    tokenizer = load_tokenizer(source)
    with explained(source, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=torch.float32 if source.gguf_file and dtype == "auto" else dtypes[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **source.hub_arguments(),
        )
    for what in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(k) for k in info[what])
        if keys:
            raise AttnConvertError(
                "missing-tensors" if what == "missing_keys" else "shape-mismatch",
                f"the checkpoint {'lacks' if what == 'missing_keys' else 'has the wrong shape for'} {len(keys)} tensors of a {type(model).__name__}: {', '.join(keys[:3])}",
                where=source.name,
                hint="the weights belong to another architecture than config.json says, or the download is incomplete",
            )
    if source.gguf_file is not None:
        _forget_gguf(model)
    model.eval().requires_grad_(False)
    return Loaded(model.to(device), tokenizer, source)


def _forget_gguf(model: Any) -> None:
    """A model read from GGUF counts as quantized and refuses to be saved, although its weights are plain by now."""
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    epsilon = getattr(model.config, "rms_norm_eps", None)
    if epsilon is not None:  # GGUF stores 1e-5 as the nearest fp32, 9.99999974e-06
        model.config.rms_norm_eps = float(f"{epsilon:.6g}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


class explained:
    """Context manager: turn what transformers and huggingface_hub raise into AttnConvertError with the next step."""

    def __init__(self, source: Source, what: str):
        self.source, self.what = source, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, AttnConvertError) or not isinstance(error, Exception):
            return
        explained = _explain(error, self.source, self.what)
        if explained is not None:
            raise explained from error


def _explain(error: Exception, source: Source, what: str) -> AttnConvertError | None:
    """The user's version of an exception, or None when it looks like a bug."""
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(e) for e in chain)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    name = source.name
    if has(hub.GatedRepoError):
        return AttnConvertError(
            "gated-model",
            f"{name!r} is gated: its owner must grant you access",
            hint=f"accept the conditions on the model's page, then `hf auth login` and run again ({what})",
        )
    if has(hub.RepositoryNotFoundError, hub.HFValidationError):
        return AttnConvertError(
            "model-not-found",
            f"there is no model {name!r}, here or on the Hub (or it is private)",
            hint="check the spelling; for a private model run `hf auth login`; for a local model give its path",
        )
    if has(hub.RevisionNotFoundError):
        return AttnConvertError(
            "model-not-found", f"{name!r} has no revision {source.revision!r}", hint="leave --revision out, or copy it from the model's page"
        )
    if has(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) or "couldn't connect" in text.lower() or "offline mode" in text.lower():
        return AttnConvertError(
            "offline",
            f"cannot reach the Hub for {name!r}, and it is not in the local cache",
            hint="check the network and HF_HUB_OFFLINE, or give a local directory",
        )
    if has(SafetensorError):
        return AttnConvertError(
            "corrupt-weights",
            f"the weights cannot be read: {_first_line(error)}",
            where=name,
            expected="complete safetensors files",
            hint="the download was cut or is a Git LFS pointer: download the model again",
        )
    if "does not appear to have a file named" in text or "no file named" in text.lower() or has(FileNotFoundError):
        return AttnConvertError(
            "no-weights",
            f"{name!r} has no safetensors weights: {_first_line(error)}",
            hint="attnconvert reads safetensors only; convert other formats with transformers first",
        )
    if "trust_remote_code" in text:
        return AttnConvertError("remote-code", f"{name!r} needs code from its repository", hint="read that code, then run again with --trust-remote-code")
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return AttnConvertError(
            "unknown-architecture",
            f"this transformers does not know the architecture of {name!r}: {_first_line(error)}",
            hint="upgrade transformers, or check that config.json is the model's own",
        )
    if "Unrecognized configuration class" in text:
        return AttnConvertError(
            "not-a-causal-lm", f"{name!r} is not a causal language model", expected="a decoder-only model", hint="give a model with a ForCausalLM architecture"
        )
    if "size mismatch" in text or "ignore_mismatched_sizes" in text:
        return AttnConvertError(
            "shape-mismatch",
            f"the weights do not fit config.json: {_first_line(error)}",
            where=name,
            hint="the weights belong to another model than config.json says",
        )
    if what == "config" and (isinstance(error, (OSError, ValueError)) or "Validation" in type(error).__name__):
        return AttnConvertError(
            "bad-config", f"the configuration of {name!r} cannot be read: {_first_line(error)}", where=source.path, hint="check config.json"
        )
    if isinstance(error, OSError):
        return AttnConvertError("cannot-load", f"cannot load {name!r}: {_first_line(error)}", where=source.path)
    return None
