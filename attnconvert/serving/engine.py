"""Find the program that can serve a checkpoint, and start it.

Stock exports are served by vLLM, or by `transformers serve` where vLLM is not installed. Converted checkpoints are served by vLLM with our plug-in where it
knows the family and the methods (`vllm/plan.py`), else by transformers' server through `transformers_server.py`, one request at a time. Everything
that can be checked is checked before anything starts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnconvert.convert.load import Source, load_config, load_tokenizer, resolve
from attnconvert.convert.save import FACTS_FILE
from attnconvert.errors import AttnConvertError
from attnconvert.serving.vllm import plan as vllm_plan

ENGINES = ("auto", "vllm", "transformers")
_NEEDS = {"vllm": ("vllm",), "transformers": ("fastapi", "uvicorn", "openai")}
_EXTRA = {"vllm": "vllm", "transformers": "serve"}
_OURS = ("--host", "--port")
_REFUSED = {
    "--continuous-batching": "requests would be packed into one row, past the cache of converted attention, and the text would be wrong",
    "--compile": "it asks for a static cache, and converted attention has a cache of its own; on a GPU its decode steps run from a CUDA graph already",
    "--attn-implementation": "the attention of a converted model is fixed by its plan",
    "--quantization": "which layers were converted was decided, and trained, with full weights",
    "--trust-remote-code": "no code from the folder is needed, and two copies of a class would meet",
}
"""Options of `transformers serve` that converted models do not have, and why."""


@dataclass(frozen=True)
class Launch:
    """A server that is ready to be started.

    Attributes:
        engine: `vllm` or `transformers`.
        command: its command line.
        why: the choice in a sentence.
        address: where it will answer.
        curl: a command that asks it something.
    """

    engine: str
    command: tuple[str, ...]
    why: str
    address: str
    curl: str


def prepare(
    name: str, *, engine: str = "auto", host: str = "127.0.0.1", port: int = 8000, device: str = "auto", extra: Sequence[str] = (),
) -> Launch:  # fmt: skip
    """Choose the engine for a checkpoint, and check everything that can be checked.

    Args:
        name: a folder, or `demo`.
        engine: one of ENGINES.
        host: address to listen on.
        port: TCP port.
        device: for transformers: `auto`, `cpu`, `cuda` or `cuda:N`; vLLM has the device that it was built for.
        extra: arguments for the engine.

    Raises:
        AttnConvertError: `not-finished`, `adapters-only`, `not-a-folder`, those of `load.resolve`, `load_config` and `load_tokenizer`;
            `engine-missing`, `not-served`, `vllm-version`, `plugin-missing`, `engine-option`, `port-taken`.
    """
    source = _checkpoint(name)
    config, tokenizer = load_config(source), load_tokenizer(source)
    for option in _OURS:
        if _given(extra, option) is not None:
            raise AttnConvertError(
                "engine-option", f"{option} was given to the engine", where=option, hint=f"give it before `--`: `attnconvert serve {name} {option} ...`"
            )
    chosen, why = _choose(config, engine, extra)
    command = [sys.executable, "-m", *_module(chosen, config), source.path, "--host", host, "--port", str(port)]
    if chosen == "vllm":
        if device != "auto":
            raise AttnConvertError(
                "engine-option", f"vLLM cannot be told the device {device!r}: it has the one it was built for", where="--device", hint="leave it out"
            )
        longest = _vllm_limit(config)
        if longest is not None and _given(extra, "--max-model-len") is None:
            command += ["--max-model-len", str(longest)]
    else:
        if "@" in source.path:
            raise AttnConvertError("engine-option", "transformers' server takes what follows an @ for a revision", where=source.path, hint="rename the folder")
        if _given(extra, "--device") is None:
            command += ["--device", ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device]
    _check_port(host, port)
    address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '') else f'[{host}]' if ':' in host else host}:{port}"
    return Launch(chosen, (*command, *extra), why, address, _curl(address, source.path, chat=bool(getattr(tokenizer, "chat_template", None))))


def start(launch: Launch) -> int:
    """Run the engine until it ends; its exit code. Where the system can, this process becomes the engine, so that signals reach it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(launch.command[0], launch.command)
    return subprocess.call(launch.command)


def render(launch: Launch) -> str:
    """What is started, why, and how to ask it."""
    return "\n".join([f"{launch.why}", f"it will answer at {launch.address}/v1 (the API of OpenAI); Ctrl-C ends it", f"  {launch.curl}"])


def _checkpoint(name: str) -> Source:
    folder = Path(name).expanduser()
    run = folder if folder.name.endswith(".run") else folder.with_name(folder.name + ".run")
    if run.is_dir() and (folder == run or not folder.exists()):
        raise AttnConvertError(
            "not-finished", f"the conversion of {str(run)[: -len('.run')]!r} is not finished", where=str(run), hint="run its command again with --resume"
        )
    if (folder / FACTS_FILE).is_file() and not (folder / "config.json").exists():
        raise AttnConvertError(
            "adapters-only",
            f"{name!r} holds what a conversion adds, not a model",
            where=str(folder / FACTS_FILE),
            hint=f"make the checkpoint of it: `attnconvert merge {name} --out {folder.name}-merged`",
        )
    source = resolve(name)
    if not source.is_local or source.gguf_file is not None:
        raise AttnConvertError(
            "not-a-folder",
            f"{name!r} is no folder",
            expected="a folder with config.json and safetensors weights",
            hint="for a model on the Hub, download it first: `hf download`",
        )
    return source


def _plan(config: Any) -> dict[str, Any] | None:
    plan: dict[str, Any] | None = getattr(config, "attn_plan", None)
    return plan


def _choose(config: Any, engine: str, extra: Sequence[str]) -> tuple[str, str]:
    """(engine, why). Raises what stands against the one that was asked for, or against the last that is left."""
    plan = _plan(config)
    methods = [] if plan is None else [row["method"] for row in plan["layers"] if row["method"] is not None]
    what = f"a stock {config.model_type} model" if plan is None else f"a {config.base_model_type} model with {', '.join(dict.fromkeys(methods))}"
    if engine != "transformers":
        try:
            _check_vllm(config, extra, whole=engine == "auto")
            return "vllm", f"{what}: served by vLLM{'' if plan is None else ' with the plug-in of attnconvert'}"
        except AttnConvertError as error:
            if engine == "vllm":
                raise
            instead = f" (not by vLLM: {error.message})"
    else:
        instead = ""
    _check_transformers(plan, extra)
    how = "one request at a time" if _given(extra, "--continuous-batching") is None else "requests batched together"
    return "transformers", f"{what}: served by transformers, {how}{instead}"


def _check_vllm(config: Any, extra: Sequence[str], *, whole: bool) -> None:
    """Raise AttnConvertError where vLLM cannot serve the checkpoint; with `whole`, also where not up to the length that the model was built for."""
    plan = _plan(config)
    if plan is not None:
        vllm_plan.check_checkpoint(config)
        wanted = _given(extra, "--max-model-len")
        longest = _vllm_limit(config)
        if wanted is not None and wanted.isdecimal():
            vllm_plan.check_settings(config, max_model_len=int(wanted))
        elif longest is not None and (whole or longest < 1):
            raise AttnConvertError(
                "not-served",
                f"it has layers of infllm_v2, which vLLM can serve up to {max(longest, 0)} tokens only",
                where="dense_len in attn_plan of config.json",
                hint=f"`--engine vllm` serves it up to {longest} tokens" if longest >= 1 else "--engine transformers serves it, one request at a time",
            )
    elif config.model_type == "phi" and config.num_key_value_heads not in (None, config.num_attention_heads):
        raise AttnConvertError(
            "not-served",
            "vLLM's class for phi takes as many KV heads as query heads, whatever config.json says",
            where="num_key_value_heads of config.json",
            hint="--engine transformers serves it, one request at a time",
        )
    _check_installed("vllm")
    if plan is not None:
        vllm_plan.check_version(_vllm_version())
        if not _has_plugin():
            raise AttnConvertError(
                "plugin-missing",
                "vLLM will not find the plug-in of attnconvert here, which is not installed as a package, or was before it had one",
                hint="install attnconvert again in this environment",
            )


def _check_transformers(plan: dict[str, Any] | None, extra: Sequence[str]) -> None:
    for option, why in _REFUSED.items() if plan is not None else ():
        if _given(extra, option) is not None:
            raise AttnConvertError("engine-option", f"converted models cannot be served with {option}: {why}", where=option, hint="leave it out")
    _check_installed("transformers")


def _check_installed(engine: str) -> None:
    missing = [package for package in _NEEDS[engine] if not _has_package(package)]
    if missing:
        raise AttnConvertError(
            "engine-missing",
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed" + ("" if engine == "vllm" else ", which transformers' server needs"),
            hint=f"`pip install 'attnconvert[{_EXTRA[engine]}]'`",
        )


def _has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_plugin() -> bool:
    return bool(importlib.metadata.entry_points(group="vllm.general_plugins", name="attnconvert"))


def _vllm_version() -> str:
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])  # the CPU build has another name
    return importlib.metadata.version(names[0])


def _vllm_limit(config: Any) -> int | None:
    """Tokens up to which vLLM serves the model where that is less than it was built for, else None."""
    plan = _plan(config)
    longest = None if plan is None else vllm_plan.dense_length(plan)
    built_for = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if longest is None or (built_for is not None and built_for <= longest) else longest


def _module(engine: str, config: Any) -> tuple[str, ...]:
    if engine == "vllm":
        return ("vllm.entrypoints.cli.main", "serve")
    return ("transformers.cli.transformers", "serve") if _plan(config) is None else ("attnconvert.serving.transformers_server",)


def _given(extra: Sequence[str], option: str) -> str | None:
    """The value of an option among the engine's arguments, "" when it has none, None when it is not there."""
    for at, argument in enumerate(extra):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else next((after for after in extra[at + 1 : at + 2] if not after.startswith("-")), "")
    return None


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise AttnConvertError(
            "port-taken", f"cannot listen on {host}:{port}: {error.strerror or error}", where="--host, --port", hint=f"another port: `--port {port + 1}`"
        ) from error


def _curl(address: str, model: str, *, chat: bool) -> str:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the capital of France?"}]} if chat else {"prompt": "Once upon a time"}
    body = json.dumps({"model": model, **asked, "max_tokens": 64})
    return shlex.join(["curl", f"{address}/v1/{'chat/' if chat else ''}completions", "-H", "Content-Type: application/json", "-d", body])
