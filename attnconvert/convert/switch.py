"""Measure from which context on block-sparse attention is faster than dense attention on this machine, and write it into a converted checkpoint.

What the figures mean: seconds of one layer's attention, projections excluded, of the shapes, data type and rule that the checkpoint has. Dense is what its layers
run below `dense_len`, sparse what they run from there on. A prefill is one pass over the whole prompt. A decode step is one token on a cache of that length, on a GPU
replayed from a CUDA graph as `generate()` does. Queries and keys are random numbers that drift slowly, so that tokens that lie side by side choose similar blocks, as
those of language models do: with 16 dynamic blocks of 32 in a context of 8,192, 16 neighbours together see 2.1 times as many dynamic blocks as one of them
(SmolLM2-135M: 1.5 to 2.7, with its layers).
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attnconvert.convert.evaluate import EvalProgress, device_name
from attnconvert.convert.pipeline import torch_device, versions
from attnconvert.convert.report import format_seconds, ranges
from attnconvert.distill.loop import write_atomic
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.blocks.api import block_sparse_attention, refusal
from attnconvert.kernels.blocks.decode import block_sparse_step, fill
from attnconvert.kernels.blocks.rule import BlockRule, block_rule, capacity_for
from attnconvert.surgery.runtime.graph import capture_stream

if TYPE_CHECKING:
    from rich.console import RenderableType

Goal = Literal["prefill", "decode", "both"]
METHOD = "infllm_v2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALWAYS_DENSE = 2**30
_LONGEST = {"cpu": 8192, "cuda": 131_072}  # measured unless lengths are given
_STEPS = 32  # decode steps that are timed together; each adds a token to its cache, which has room for four times as many
_DRIFT, _SHARED, _SHARPNESS = 256, 0.98, 3.0  # tokens, share of the variance that drifts, factor on queries; see the head of this file


@dataclass(frozen=True)
class SwitchPoint:
    """Seconds of one layer's attention at one length; medians."""

    length: int
    dense_prefill: float
    sparse_prefill: float
    dense_decode: float
    sparse_decode: float

    def wins(self, goal: Goal) -> bool:
        """Whether sparse attention is not slower."""
        prefill, decode = self.sparse_prefill <= self.dense_prefill, self.sparse_decode <= self.dense_decode
        return (prefill or goal == "decode") and (decode or goal == "prefill")


@dataclass(frozen=True)
class SwitchKind:
    """Layers of one shape and rule, and what was measured for them.

    Attributes:
        layers: their indices.
        num_heads, num_key_value_heads, head_dim: H, G, D.
        rule: with `dense_len` 0.
        before: their `dense_len`.
        points: by ascending length.
        runs: `Triton kernels`, or `PyTorch` and why.
        dense_len: what was found; None = sparse attention is slower at the longest length.
    """

    layers: tuple[int, ...]
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rule: BlockRule
    before: tuple[int, ...]
    points: tuple[SwitchPoint, ...] = ()
    runs: str = ""
    dense_len: int | None = None


@dataclass(frozen=True)
class SwitchReport:
    """What `tune_switch` measured.

    Attributes:
        path: the checkpoint's folder.
        device, dtype, batch_size, goal: what was measured.
        kinds: one entry per shape and rule.
        notes: what else to know.
        written: whether config.json has been changed.
        date: UTC, ISO 8601.
        versions: of what the figures depend on.
    """

    path: str
    device: str
    dtype: str
    batch_size: int
    goal: Goal
    kinds: tuple[SwitchKind, ...]
    notes: tuple[str, ...]
    written: bool
    date: str
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return asdict(self) | {"kinds": [asdict(kind) | {"rule": kind.rule._asdict()} for kind in self.kinds], "versions": dict(self.versions)}


def tune_switch(
    folder: Path, *, device: str = "auto", dtype: str = "auto", lengths: Sequence[int] | None = None, batch_size: int = 1, goal: Goal = "both", dry_run: bool = False,
    progress: EvalProgress | None = None, note: Callable[[str], None] | None = None,
) -> SwitchReport:  # fmt: skip
    """Measure dense against sparse attention and set `dense_len` of a checkpoint to the shortest length from which on sparse attention is not slower.

    Args:
        folder: a converted checkpoint.
        device: as torch names it, or `auto`.
        dtype: `auto` (as stored), `fp32`, `bf16`, `fp16`.
        lengths: tokens; None = growing ones, up to what the model was built for.
        batch_size: rows.
        goal: what must not be slower.
        dry_run: write nothing.
        progress: told (what, done, total).
        note: told what to know at once.

    Raises:
        AttnConvertError: `model-not-found`, `not-converted`, `no-blocks-to-choose`, `unknown-device`, `unknown-dtype`, `nothing-to-measure`, `length-too-long`,
            `cannot-write`, `out-of-memory`.
    """
    config = _read(folder)
    if not dry_run and not (os.access(folder / "config.json", os.W_OK) and os.access(folder, os.W_OK)):
        raise AttnConvertError("cannot-write", f"no permission to change {str(folder / 'config.json')!r}", hint="--dry-run measures and writes nothing")
    kinds = _kinds(config, folder)
    place = torch_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise AttnConvertError("unknown-dtype", f"unknown dtype {dtype!r}", expected=f"one of: auto, {', '.join(DTYPES)}")
    kept = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    number = DTYPES[dtype] if dtype != "auto" else _NAMES.get(kept, torch.float32)
    limit = config.get("max_position_embeddings")
    if lengths is not None and limit is not None and max(lengths) > limit:
        raise AttnConvertError(
            "length-too-long", f"the model has {limit} positions, and {max(lengths)} tokens are to be measured", where="--lengths", expected=f"at most {limit}"
        )
    plans = [_lengths(kind.rule, lengths, min(limit or _LONGEST[place.type], _LONGEST[place.type])) for kind in kinds]
    for kind, chosen in zip(kinds, plans, strict=True):
        if not chosen:
            seen = kind.rule.num_blocks * kind.rule.block_size
            raise AttnConvertError(
                "nothing-to-measure",
                f"a query of layers {ranges(kind.layers)} sees {kind.rule.num_blocks} blocks of {kind.rule.block_size}, all of a context of up to {seen} tokens",
                where="--lengths" if lengths is not None else f"{folder}: max_position_embeddings {limit}",
                expected=f"lengths above {seen} tokens",
                hint="up to there dense and sparse attention are the same, so dense_len does not matter",
            )
    notes: list[str] = []
    measured = []
    for kind, chosen in zip(kinds, plans, strict=True):
        points = []
        for at, length in enumerate(chosen):
            try:
                points.append(_measure(kind, length, batch_size, number, place))
            except torch.OutOfMemoryError:
                notes.append(f"Memory ran out at {length:,} tokens: longer lengths were not measured.")
                break
            if progress is not None:
                progress(f"layers {ranges(kind.layers)}", at + 1, len(chosen))
        if not points:
            raise AttnConvertError("out-of-memory", f"{chosen[0]:,} tokens do not fit on {place}", hint="shorter --lengths, or a smaller --batch-size")
        measured.append(_concluded(kind, points, goal, number, place))
    notes += [_outcome(kind, goal) for kind in measured]
    if note is not None and place.type != "cuda":
        note("A figure holds for the device it was measured on: measure where the model will run.")
    found = any(kind.dense_len is not None for kind in measured)
    report = SwitchReport(
        str(folder), device_name(place), str(number).removeprefix("torch."), batch_size, goal, tuple(measured), tuple(notes), found and not dry_run,
        datetime.now(timezone.utc).isoformat(timespec="seconds"), versions(),
    )  # fmt: skip
    if report.written:
        _write(folder, report)
    return report


# ---------------------------------------------------------------- the checkpoint


def _read(folder: Path) -> dict[str, Any]:
    """config.json of a converted checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        adapters = (folder / "attnconvert.json").is_file()
        raise AttnConvertError(
            "model-not-found", f"there is no config.json in {str(folder)!r}", expected="the folder of a converted model",
            hint=f"make the full checkpoint first: `attnconvert merge {folder} --out {folder}-merged`" if adapters else None,
        )  # fmt: skip
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AttnConvertError("model-not-found", f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(config.get("attn_plan"), dict):
        raise AttnConvertError(
            "not-converted",
            f"the model in {str(folder)!r} was not converted: its config.json has no attn_plan",
            hint="`attnconvert sparsify MODEL --recipe infllm-v2`",
        )
    return config


def _kinds(config: Mapping[str, Any], folder: Path) -> list[SwitchKind]:
    """Layers that choose blocks, those that are alike together."""
    alike: dict[tuple[int, int, int, BlockRule], list[tuple[int, int]]] = {}
    for row in config["attn_plan"]["layers"]:
        if row["method"] == METHOD:
            rule = block_rule(**row["config"])
            key = (row["num_heads"], row["num_key_value_heads"], row["head_dim"], rule._replace(dense_len=0))
            alike.setdefault(key, []).append((row["layer_idx"], rule.dense_len))
    if not alike:
        methods = sorted({row["method"] or "softmax" for row in config["attn_plan"]["layers"]})
        raise AttnConvertError(
            "no-blocks-to-choose", f"no layer of the model in {str(folder)!r} switches between dense and sparse attention: they are {', '.join(methods)}",
            expected=f"layers of the method {METHOD}, as the recipes infllm-v2 and moba make them",
        )  # fmt: skip
    return [SwitchKind(tuple(idx for idx, _ in layers), *key, tuple(before for _, before in layers)) for key, layers in alike.items()]


def _write(folder: Path, report: SwitchReport) -> None:
    """dense_len of every layer, and where it is from; the file is replaced as a whole."""
    config = _read(folder)
    found = {idx: kind.dense_len for kind in report.kinds if kind.dense_len is not None for idx in kind.layers}
    for row in config["attn_plan"]["layers"]:
        if row["layer_idx"] in found:
            row["config"]["dense_len"] = found[row["layer_idx"]]
    facts = {key: value for key, value in report.to_dict().items() if key not in ("path", "written")}
    config["attn_plan"]["switch"] = facts
    write_atomic(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


# ---------------------------------------------------------------- measuring


def _lengths(rule: BlockRule, asked: Sequence[int] | None, limit: int) -> list[int]:
    """Lengths at which sparse attention leaves something out: those asked for, or powers of two and what lies half-way, up to `limit`."""
    usual = [size for power in range(8, 21) for size in (2**power, 3 * 2 ** (power - 1))]
    return [length for length in sorted(set(usual if asked is None else asked)) if not rule.sees_all(length) and (asked is not None or length <= limit)]


def _shortest(points: Sequence[SwitchPoint], goal: Goal) -> int | None:
    """The shortest length from which on sparse attention wins at all lengths; None = it loses at the longest."""
    best = None
    for point in reversed(points):
        if not point.wins(goal):
            break
        best = point.length
    return best


def _concluded(kind: SwitchKind, points: Sequence[SwitchPoint], goal: Goal, dtype: torch.dtype, device: torch.device) -> SwitchKind:
    """The kind with its measurements, and what follows from them."""
    why = None
    if device.type != "cuda":
        why = f"the device is {device.type}"
    elif dtype == torch.float32:
        why = "float32 asks for exact products"
    else:
        q = torch.empty(1, 16, kind.num_heads, kind.head_dim, device=device, dtype=dtype)
        why = refusal(q, q[:, :, : kind.num_key_value_heads], kind.rule)
    runs = "Triton kernels" if why is None else f"PyTorch, for {why}"
    return SwitchKind(
        kind.layers, kind.num_heads, kind.num_key_value_heads, kind.head_dim, kind.rule, kind.before, tuple(points), runs, _shortest(points, goal)
    )


def drifting(num_rows: int, length: int, num_heads: int, head_dim: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random numbers of variance 1 that change slowly from token to token, fp32 [B, T, heads, D]; see the head of this file."""
    heads = []
    for _ in range(num_heads):
        noise = torch.randn(num_rows, head_dim, length + _DRIFT - 1, generator=generator, device=device)
        slow = torch.nn.functional.avg_pool1d(noise, _DRIFT, 1) * _DRIFT**0.5
        own = torch.randn(num_rows, head_dim, length, generator=generator, device=device)
        heads.append((_SHARED**0.5 * slow + (1 - _SHARED) ** 0.5 * own).transpose(1, 2))
    return torch.stack(heads, 2)


@torch.no_grad()
def _measure(kind: SwitchKind, length: int, batch_size: int, dtype: torch.dtype, device: torch.device) -> SwitchPoint:
    generator = torch.Generator(device).manual_seed(0)

    def numbers(heads: int, factor: float = 1.0) -> Tensor:
        return (factor * drifting(batch_size, length, heads, kind.head_dim, generator, device)).to(dtype)

    q, k, v = numbers(kind.num_heads, _SHARPNESS), numbers(kind.num_key_value_heads), numbers(kind.num_key_value_heads)
    scale = kind.head_dim**-0.5
    rules = [kind.rule._replace(dense_len=dense_len) for dense_len in (_ALWAYS_DENSE, 0)]
    prefill = _times([functools.partial(block_sparse_attention, q, k, v, rule=rule, scale=scale) for rule in rules], device)
    capacity = capacity_for(length + 4 * _STEPS)
    new_q, new_k, new_v = (x[:, -1:].contiguous() for x in (q, k, v))
    decode = []
    for rule in rules:
        state = fill(k, v, rule, capacity)
        decode.append(_step_seconds(functools.partial(block_sparse_step, new_q, new_k, new_v, state, rule=rule, scale=scale), device))
    return SwitchPoint(length, *prefill, *decode)


def _times(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each call, in turns; one untimed call each comes first (kernels are compiled)."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(2 if device.type == "cuda" else 1):
        for call in calls:
            call()
    began = time.perf_counter()
    while len(seconds[0]) < 3 or (len(seconds[0]) < 15 and time.perf_counter() - began < 0.5):
        for call, found in zip(calls, seconds, strict=True):
            found.append(_seconds(call, device))
    return [statistics.median(found) for found in seconds]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()  # type: ignore[no-untyped-call]
        call()
        after.record()  # type: ignore[no-untyped-call]
        after.synchronize()  # type: ignore[no-untyped-call]
        return before.elapsed_time(after) / 1e3  # type: ignore[no-any-return,no-untyped-call]
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _step_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a decode step, each of which adds a token to its cache."""
    if device.type != "cuda":
        step()
        return statistics.median(_seconds(step, device) for _ in range(5))
    stream = capture_stream(torch.cuda.current_device() if device.index is None else device.index)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
        step()
        graph.capture_begin()
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph.replay()

    def several() -> None:
        for _ in range(_STEPS):
            graph.replay()

    return min(_seconds(several, device) for _ in range(3)) / _STEPS


# ---------------------------------------------------------------- shown to people


def _outcome(kind: SwitchKind, goal: Goal) -> str:
    where = "" if goal == "both" else f" in {goal}"
    layers, longest = f"layer{'s' if len(kind.layers) > 1 else ''} {ranges(kind.layers)}", kind.points[-1].length
    before = ", ".join(map(str, sorted(set(kind.before))))
    if kind.dense_len is None:
        text = f"{layers}: sparse attention is slower at {longest:,} tokens, the longest length measured{where}; dense_len stays {before}."
        other: Goal
        for other in ("prefill", "decode"):
            length = _shortest(kind.points, other)
            if goal == "both" and length is not None:
                text += f" In {other} alone it is not slower from {length:,} tokens on, which `--for {other}` sets."
        return text
    if kind.dense_len == kind.points[0].length:
        return f"{layers}: sparse attention is not slower{where} at any length measured; dense_len {before} -> {kind.dense_len}."
    return f"{layers}: sparse attention is not slower{where} from {kind.dense_len:,} tokens on; dense_len {before} -> {kind.dense_len}."


def render_switch(report: SwitchReport) -> RenderableType:
    """The measurements as tables, and what follows."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Table | Text] = []
    for kind in report.kinds:
        title = (
            f"Attention of one layer (layers {ranges(kind.layers)}: {kind.num_heads} heads, {kind.num_key_value_heads} KV heads of {kind.head_dim}; "
            f"{kind.rule.num_blocks} blocks of {kind.rule.block_size}), batch {report.batch_size}, {report.dtype}, {report.device}, {kind.runs}"
        )
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for column in ("tokens", "prefill, dense", "sparse", "gain", "decode step, dense", "sparse", "gain", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for point in kind.points:
            table.add_row(*_cells(point), "<- dense_len" if point.length == kind.dense_len else "")
        parts.append(table)
    return Group(*parts, *(Text(note) for note in report.notes), Text(_next(report)))


def _cells(point: SwitchPoint) -> Iterator[str]:
    yield f"{point.length:,}"
    for dense, sparse in ((point.dense_prefill, point.sparse_prefill), (point.dense_decode, point.sparse_decode)):
        yield from (_short(dense), _short(sparse), f"{dense / sparse:.2f} x")


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms" if seconds < 1 else format_seconds(seconds)


def _next(report: SwitchReport) -> str:
    if report.written:
        return f"Written to {Path(report.path) / 'config.json'}. Quality was measured with the dense_len from before: `attnconvert evaluate-converted {report.path}` measures again."
    return "Nothing was written."
