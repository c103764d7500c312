"""What this machine can do: versions, devices, disk, Hub access, the largest model each stage has memory for, and a self-test."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attnconvert.convert.report import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

SUPPORTED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.8", None),
    "transformers": ("5.17", "6"),
    "peft": ("0.19", None),
    "accelerate": ("1.10", None),
    "datasets": ("4.0", None),
    "pydantic": ("2.7", None),
    "typer": ("0.26", None),
    "safetensors": ("0.5", None),
    "scipy": ("1.11", None),
}
"""Package -> (lowest version, first version that is too new), as in pyproject.toml."""
OPTIONAL = {"gguf": "reads GGUF files", "lm_eval": "multiple-choice tasks in the evaluation", "matplotlib": "plots"}
"""Import name -> what it is for."""

LOW_DISK_BYTES = 2 * 2**30
SELF_TEST_TOLERANCE = 1e-3
"""Largest difference of a logit between one forward pass and cached decoding, relative to the logits' standard deviation, in fp32."""

Status = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: `missing` = attnconvert does not work without it; `note` = works, but worth knowing.
        value: what was found.
        hint: what to do, or None.
    """

    name: str
    status: Status
    value: str
    hint: str | None = None


@dataclass(frozen=True)
class Capacity:
    """The largest reference model that a stage of the recipe `hedgehog` has memory for.

    Attributes:
        stage: `transfer` or `finetune`.
        micro_batch_size: sequences per forward pass.
        length: tokens per sequence.
        model: name of the size, None when not even the smallest fits.
        memory_bytes: estimated peak for that model.
    """

    stage: str
    micro_batch_size: int
    length: int
    model: str | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything `diagnose` found.

    Attributes:
        checks: in the order they are shown.
        device: `cuda` or `cpu`, what `--device auto` takes.
        memory_bytes: free memory of that device, which the capacities were measured against; None when the system does not say.
        capacities: one per stage and micro batch size; empty when memory is not known.
    """

    checks: tuple[Check, ...]
    device: str
    memory_bytes: int | None
    capacities: tuple[Capacity, ...]

    @property
    def ok(self) -> bool:
        """Nothing needed is missing."""
        return all(check.status != "missing" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"ok": self.ok, **asdict(self)}


def diagnose() -> Diagnosis:
    """Look at this machine; takes a few seconds, mostly to import torch and transformers. Reads no secret and sends nothing."""
    checks = [_python(), *(_package(name, low, high) for name, (low, high) in SUPPORTED.items()), *_triton()]
    checks += [_optional(name, purpose) for name, purpose in OPTIONAL.items()]
    works = all(check.status != "missing" for check in checks)
    device, memory = "cpu", free_memory_bytes()
    if works:
        device, memory, found = _devices(memory)
        checks += found
    checks += [_disk(Path.cwd(), "free disk, current folder"), *_hub()]
    capacities: tuple[Capacity, ...] = ()
    if works:
        checks.append(_self_test("cpu"))
        if device == "cuda":
            checks.append(_self_test("cuda"))
        capacities = tuple(_capacities(memory, device)) if memory is not None else ()
    return Diagnosis(tuple(checks), device, memory, capacities)


# ---------------------------------------------------------------- software


def version_key(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0): the leading numbers, enough to compare with a lower bound."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _python() -> Check:
    supported = sys.version_info >= (3, 10)
    return Check(
        "python",
        "ok" if supported else "missing",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        None if supported else "install Python 3.10 or later",
    )


def _package(name: str, low: str, high: str | None) -> Check:
    wanted = f">={low}" + (f",<{high}" if high else "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", f"pip install '{name}{wanted}'")
    key = version_key(version)
    if key < version_key(low):
        return Check(name, "missing", f"{version}, older than {low}", f"pip install '{name}{wanted}'")
    if high is not None and key >= version_key(high):
        return Check(name, "note", f"{version}, newer than was tested (below {high})", f"pip install '{name}{wanted}' if something fails")
    return Check(name, "ok", version)


def _triton() -> list[Check]:
    if not sys.platform.startswith("linux"):
        return [Check("triton", "note", "not available on this system", "converted models run on the PyTorch kernels")]
    try:
        return [Check("triton", "ok", metadata.version("triton"))]
    except metadata.PackageNotFoundError:
        return [Check("triton", "note", "not installed", "needed for the GPU kernels: pip install triton")]


def _optional(name: str, purpose: str) -> Check:
    package = name.replace("_", "-")
    try:
        return Check(package, "ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return Check(package, "note", f"not installed ({purpose})")


# ---------------------------------------------------------------- hardware


def free_memory_bytes() -> int | None:
    """Memory this process may still take, bytes: what the system calls available, or less under a control-group limit. None if unknown."""
    available: int | None = None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no such limit ("max" is not a number), or another system
        return available
    return max(0, limit - used) if available is None else min(available, max(0, limit - used))


def _devices(memory: int | None) -> tuple[str, int | None, list[Check]]:
    import torch

    cores = os.cpu_count() or 1
    checks = [
        Check(
            "CPU", "ok", f"{cores} cores, {torch.get_num_threads()} torch threads, {'unknown' if memory is None else format_bytes(memory)} of memory available"
        )
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        hint = (
            "torch was built for CUDA but finds no GPU: check the driver with nvidia-smi"
            if built
            else "small models convert on a CPU; for larger ones install a CUDA build of torch on a GPU machine"
        )
        return "cpu", memory, [*checks, Check("GPU", "note", "none", hint)]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        checks.append(
            Check(
                f"GPU {index}",
                "ok",
                f"{torch.cuda.get_device_name(index)}, {format_bytes(free)} of {format_bytes(total)} free, compute capability {major}.{minor}",
            )
        )
        if index == 0:
            memory = free
    bf16 = torch.cuda.is_bf16_supported()
    checks.append(Check("bf16", "ok" if bf16 else "note", "yes" if bf16 else "no", None if bf16 else "training runs in fp32 on this GPU"))
    return "cuda", memory, checks


def _disk(path: Path, name: str) -> Check:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    low = free < LOW_DISK_BYTES
    return Check(name, "note" if low else "ok", format_bytes(free), "a conversion writes the model twice (checkpoint and result)" if low else None)


# ---------------------------------------------------------------- Hub


def _hub() -> list[Check]:
    """Cache, offline flags, and whether there is a token; the token itself is never shown."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return []
    cache = Path(constants.HF_HUB_CACHE)
    checks = [Check("Hugging Face cache", "ok", str(cache)), _disk(cache, "free disk, cache")]
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    ]
    hint = "models and data must be in the cache or given as local paths" if offline else None
    checks.append(Check("offline mode", "note" if offline else "ok", ", ".join(f"{name}={os.environ[name]}" for name in offline) or "off", hint))
    checks.append(
        Check("Hugging Face token", "ok", "present")
        if get_token()
        else Check("Hugging Face token", "note", "none", "gated and private models need one: hf auth login")
    )
    return checks


# ---------------------------------------------------------------- capacity

# (name, layers, hidden, query heads, KV heads, head_dim, MLP width, vocabulary): public Llama-architecture shapes
_SIZES = (
    ("135M", 30, 576, 9, 3, 64, 1536, 49152),
    ("360M", 32, 960, 15, 5, 64, 2560, 49152),
    ("1.7B", 24, 2048, 32, 32, 64, 8192, 49152),
    ("3B", 28, 3072, 24, 8, 128, 8192, 128256),
    ("8B", 32, 4096, 32, 8, 128, 14336, 128256),
    ("14B", 40, 5120, 40, 8, 128, 17408, 151936),
    ("32B", 64, 5120, 40, 8, 128, 25600, 151936),
    ("70B", 80, 8192, 64, 8, 128, 28672, 128256),
)


def _capacities(memory_bytes: int, device: str) -> list[Capacity]:
    """The largest size per stage, by the same arithmetic as `attnconvert plan`."""
    from types import SimpleNamespace

    from attnconvert.convert.plan import build_plan, estimate
    from attnconvert.recipes.load import load_recipe
    from attnconvert.surgery.sites import Site

    element_size = 2 if device == "cuda" else 4  # a CPU trains in fp32
    found: list[Capacity] = []
    for micro in (None, 1):
        overrides = () if micro is None else tuple(f"stages.{stage}.micro_batch_size={micro}" for stage in ("transfer", "finetune"))
        recipe = load_recipe("hedgehog", overrides).recipe
        best: dict[str, tuple[str, int]] = {}
        for name, layers, hidden, H, G, D, width, vocab in _SIZES:
            sites = [Site(i, f"model.layers.{i}.self_attn", "LlamaAttention", H, G, D, D**-0.5) for i in range(layers)]
            parameters = vocab * hidden * (1 if hidden < 2500 else 2) + layers * (2 * hidden * (H + G) * D + 3 * hidden * width)
            plan = build_plan(recipe, SimpleNamespace(model_type="llama"), sites)
            for stage in estimate(plan, sites, recipe, parameters, recipe.stages.transfer.length, element_size).stages:
                if stage.memory_bytes <= 0.9 * memory_bytes:
                    best[stage.stage] = (name, stage.memory_bytes)
        for stage_name in ("transfer", "finetune"):
            settings = getattr(recipe.stages, stage_name)
            largest = best.get(stage_name)
            found.append(Capacity(stage_name, micro or settings.batch_size, settings.length, largest[0] if largest else None, largest[1] if largest else None))
    return found


# ---------------------------------------------------------------- self-test


def self_test(device: str) -> float:
    """Decode a converted random Llama token by token and compare with one forward pass, in fp32.

    Returns:
        The largest difference of a logit, relative to the standard deviation of the logits.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from attnconvert.surgery import registry
    from attnconvert.surgery.plan import ConversionPlan, LayerPlan
    from attnconvert.surgery.sites import find_sites
    from attnconvert.surgery.swap import swap

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )  # weights large enough that attention is sharp and mistakes show
    method = registry.get("hedgehog")
    settings = method.runtime_config(method.config.model_validate({"window": {"kind": "block", "size": 8}, "sinks": 2}))
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        rows = tuple(LayerPlan(s.layer_idx, s.path, s.num_heads, s.num_key_value_heads, s.head_dim, "hedgehog", settings) for s in find_sites(config))
        swap(model, ConversionPlan("llama", rows))
        model.to(device)
        ids = torch.randint(3, 64, (1, 40), device=device)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = model.build_cache()
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(ids.shape[1])]
    return float((full - torch.cat(steps, 1)).abs().max() / full.std())


def _self_test(device: str) -> Check:
    start = time.perf_counter()
    name = f"self-test on {device}"
    try:
        difference = self_test(device)
    except Exception as error:  # whatever is broken on this machine, the report must come out
        return Check(name, "missing", f"failed: {type(error).__name__}: {error}", "run again with ATTNCONVERT_DEBUG=1, or report it")
    seconds = time.perf_counter() - start
    good = difference <= SELF_TEST_TOLERANCE  # False for NaN
    value = f"cached decoding {'equals' if good else 'DIFFERS FROM'} a full forward pass (relative difference {difference:.1e}, {seconds:.1f} s)"
    return Check(name, "ok" if good else "missing", value, None if good else "converted models would write wrong text here; please report it")


# ---------------------------------------------------------------- shown to people


def render_diagnosis(diagnosis: Diagnosis) -> RenderableType:
    """The diagnosis as a rich table, hints below the lines they belong to."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title="This machine", title_justify="left", title_style="bold")
    table.add_column("what", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    styles = {"ok": "green", "note": "yellow", "missing": "bold red"}
    for check in diagnosis.checks:
        table.add_row(Text(check.name), Text(check.status, style=styles[check.status]), Text(check.value + (f"\n{check.hint}" if check.hint else "")))
    return Group(table, *(Text(line) for line in _capacity_lines(diagnosis)))


def _capacity_lines(diagnosis: Diagnosis) -> Iterable[str]:
    if not diagnosis.capacities or diagnosis.memory_bytes is None:
        return
    where = "GPU 0" if diagnosis.device == "cuda" else "the CPU"
    yield f"Largest Llama-shaped model for the recipe hedgehog in {format_bytes(diagnosis.memory_bytes)} on {where} (rough; `attnconvert plan MODEL` says more):"
    for capacity in diagnosis.capacities:
        rows = f"{capacity.micro_batch_size} x {capacity.length} tokens at a time"
        if capacity.model is None or capacity.memory_bytes is None:
            yield f"  {capacity.stage}, {rows}: none"
        else:
            yield f"  {capacity.stage}, {rows}: {capacity.model} (about {format_bytes(capacity.memory_bytes)})"
    if any(capacity.micro_batch_size == 1 for capacity in diagnosis.capacities):
        yield "  fewer rows at a time: --set stages.finetune.micro_batch_size=1 (the result is the same up to rounding)"
