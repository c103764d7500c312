"""Measure how fast a converted model is, and what it holds in memory, beside its teacher: prefill and decode against length and batch.

What the figures mean:

- Both models run in one process on the same random token ids, and take turns within a cell (one length at one batch size), so that a clock
  that drifts hits both alike. A cell is warmed up first; its figure is the median of the repeats, with the smallest and the largest beside it.
- Prefill is one forward pass over the whole prompt, up to the choice of the first new token: its time is the time to first token.
- Decode is the model's own forward called once per token on the cache that a prefill of the same prompt left, each step fed the most likely
  token of the one before. No serving engine, no compilation, no CUDA graph: teacher and student as transformers runs them.
- Peak memory is the model's own weights plus what the pass allocated above everything that was there before; CUDA only.
- Cache bytes are counted, not estimated: the tensors of the cache after the prefill, or after the last decode step.
- The largest batch is a batch of decoding sequences: one prompt is prefilled, its cache is copied for every row. A prefill of all rows at once
  would be bounded by activations, which neither attention decides.

Shapes: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnconvert.convert.evaluate import EvalProgress, cache_bytes, device_name, json_safe
from attnconvert.convert.load import load_model, resolve
from attnconvert.convert.pipeline import FOLDER, torch_device, versions
from attnconvert.convert.reevaluate import NO_TEACHER, load_saved
from attnconvert.convert.report import format_bytes, format_seconds, markdown_table, refresh_markdown
from attnconvert.convert.save import FACTS_FILE
from attnconvert.distill.loop import write_atomic
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.runtime.graph import DecodeGraph

BENCH_SCHEMA_VERSION = 1
BENCH_FILE, REPORT_FILE, PLOTS_FOLDER = "bench.json", "report.json", "plots"
CPU_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
CUDA_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
CPU_BATCH_SIZES, CUDA_BATCH_SIZES = (1,), (1, 8)
MIN_REPEATS, MAX_REPEATS = 3, 7
# A small model on a big GPU would double for minutes; beyond this the figure says nothing about a real server.
MAX_BATCH_SIZE = 4096
UNTIMED_STEPS = 2  # the first decode steps on a cache: a converted model runs one plainly and records its CUDA graph in the next
MEASURES = ("prefill", "decode", "cache")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Contestant:
    """A model on the device: `teacher` or `student`, and the bytes of its weights."""

    name: str
    model: Any
    weight_bytes: int


@dataclass(frozen=True)
class _Pass:
    """One prefill and the decode steps after it. Peaks are bytes above everything allocated before the pass; None on a CPU."""

    prefill_seconds: float
    decode_seconds: float
    prefill_cache_bytes: int
    decode_cache_bytes: int
    prefill_peak: int | None
    decode_peak: int | None

    @property
    def seconds(self) -> float:
        """Both parts."""
        return self.prefill_seconds + self.decode_seconds


@dataclass(frozen=True)
class _Timed:
    """Medians of a cell that is done, from which longer ones are predicted."""

    length: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class _Settings:
    """What every cell has in common. `limit` is the models' max_position_embeddings, None = none."""

    device: torch.device
    new_tokens: int
    max_seconds: float
    limit: int | None
    num_ids: int

    @property
    def num_warmups(self) -> int:
        """On a GPU the first pass compiles and tunes kernels, which can take a minute; the second says how long a pass takes."""
        return 2 if self.device.type == "cuda" else 1

    def context(self, length: int) -> int:
        """Tokens prefilled before decoding, so that the last step still has a position: `length`, or less at the limit."""
        return length if self.limit is None else min(length, self.limit - self.new_tokens - UNTIMED_STEPS)


# ---------------------------------------------------------------- the whole benchmark


def bench(
    source: str | Path,
    *,
    against: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    lengths: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    new_tokens: int = 32,
    max_seconds: float = 20.0,
    out: Path | None = None,
    progress: EvalProgress | None = None,
    note: Callable[[str], None] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Measure a converted model against its teacher and write the figures and plots down.

    Ctrl-C ends the measurement and keeps the cells that are complete (`interrupted` is true then).

    Args:
        source: a checkpoint or adapters folder, or a Hub id.
        against: the teacher, None = the one that was converted, `none` = no teacher.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: of both models: `auto` (as each is stored), `fp32`, `bf16` or `fp16`.
        lengths: prompt lengths in tokens, None = powers of two as far as the models go.
        batch_sizes: rows, None = 1 on a CPU, 1 and 8 on a GPU.
        new_tokens: decode steps per repeat.
        max_seconds: a model's series of lengths stops before a cell that would take longer than this.
        out: folder for the results, None = see `output_folder`.
        progress: told about each cell.
        note: told which part begins.
        command: the command line, for the record.

    Returns:
        The key `bench` of report.json: schema_version, device, dtype, versions, date, command, rows, largest_batch, crossover; also
        crossover_text (the same in words), crossover_by_batch, stopped (where a series ended early, and why), notes, models, attention,
        new_tokens, max_seconds, interrupted, and plots (paths relative to the output folder).

    Raises:
        AttnConvertError: `bad-option`, `not-converted`, `unknown-device`, `cannot-write`, and those of loading models.
    """
    say = note or (lambda text: None)
    _check_options(lengths, batch_sizes, new_tokens, max_seconds)
    on_device = torch_device(device)
    folder = output_folder(source, out)
    _check_writable(folder)
    notes: list[str] = []
    say("load model")
    student = load_saved(str(source), dtype=dtype, base=None if against in (None, NO_TEACHER) else against).model
    if getattr(student.config, "attn_plan", None) is None and _record_file(str(source), f"{FOLDER}/run.json") is None:
        raise AttnConvertError("not-converted", f"the model in {str(source)!r} has no converted attention", hint="give the folder that a conversion wrote")
    teacher_name, teacher = _load_teacher(str(source), against, dtype, notes, say)
    if teacher is not None and getattr(teacher.config, "attn_plan", None) is not None:
        notes.append(f"The teacher {teacher_name!r} has converted attention itself: {_attention(teacher)}.")
    models = {name: _placed(model, name, on_device) for name, model in (("teacher", teacher), ("student", student)) if model is not None}
    contestants = [_Contestant(name, model, _weight_bytes(model)) for name, model in models.items()]

    limit = _limit(list(models.values()))
    if limit is not None and new_tokens >= limit:
        raise AttnConvertError("bad-option", f"{new_tokens} new tokens do not fit: the models go up to {limit} positions", hint="give a smaller --new-tokens")
    settings = _Settings(on_device, new_tokens, max_seconds, limit, min(int(model.config.get_text_config().vocab_size) for model in models.values()))
    on_cuda = on_device.type == "cuda"
    usable = usable_lengths(lengths, CUDA_LENGTHS if on_cuda else CPU_LENGTHS, limit, notes)
    rows_per_batch = sorted(set(batch_sizes or (CUDA_BATCH_SIZES if on_cuda else CPU_BATCH_SIZES)))
    if not on_cuda:
        notes.append("Peak memory and the largest batch are measured on a GPU only.")
    if on_cuda and teacher is not None:
        notes.append("Peak memory of a model is its own weights plus what the pass allocated; the other model's weights are not counted.")

    result: dict[str, Any] = {
        "schema_version": BENCH_SCHEMA_VERSION,
        "device": _device_text(on_device),
        "dtype": str(student.dtype).removeprefix("torch."),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "models": {
            "student": Path(source).expanduser().resolve().name if Path(source).expanduser().is_dir() else str(source),
            "teacher": teacher_name if teacher is not None else None,
        },
        "attention": {name: _attention(model) + _heads(model, student) for name, model in models.items()},
        "dtypes": {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()},
        "weight_bytes": {c.name: c.weight_bytes for c in contestants},
        "new_tokens": new_tokens,
        "max_seconds": max_seconds,
        "interrupted": False,
        "rows": [],
        "stopped": [],
        "largest_batch": [],
        "notes": notes,
    }
    say("measure speed")
    try:
        with _measuring(on_device):
            _sweep(contestants, usable, rows_per_batch, settings, result, progress, lambda: _conclude(result, folder))
            if on_cuda:
                _largest_batches(contestants, settings, result, progress)
    except KeyboardInterrupt:
        result["interrupted"] = True
        notes.append("The measurement was interrupted; the figures are of the part that was complete.")
    except BaseException:
        # hours of measurements are worth more than a tidy end; the error itself goes on
        if result["rows"]:
            _finish(result, folder)
        raise
    _finish(result, folder)
    return result


def output_folder(source: str | Path, out: Path | None = None) -> Path:
    """Where `bench` writes: `out`, the checkpoint's own folder, or `<name>-bench` here for a model on the Hub."""
    if out is not None:
        return out
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else Path(f"{folder.name}-bench")


def _check_options(lengths: Sequence[int] | None, batch_sizes: Sequence[int] | None, new_tokens: int, max_seconds: float) -> None:
    for option, values in (("lengths", lengths), ("batch-sizes", batch_sizes), ("new-tokens", [new_tokens])):
        if values is not None and (not values or min(values) < 1):
            raise AttnConvertError("bad-option", f"--{option} needs whole numbers of 1 or more, got {list(values)}")
    if not max_seconds > 0:
        raise AttnConvertError("bad-option", f"--max-seconds must be more than 0, got {max_seconds}")


def _check_writable(folder: Path) -> None:
    """Better said before the measurement than after it."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AttnConvertError("cannot-write", f"cannot write into '{folder}'", where=str(existing), hint="give another folder with --out")


def usable_lengths(asked: Sequence[int] | None, default: Sequence[int], limit: int | None, notes: list[str]) -> list[int]:
    """The lengths to measure: those asked for, as far as the models go, and the limit itself in place of what lies beyond it.

    Args:
        asked: lengths in tokens, None = `default`.
        default: used when none were asked for; what lies beyond the limit is then dropped without a word.
        limit: max_position_embeddings, None = none.
        notes: told about lengths that were asked for and are beyond the limit.
    """
    wanted = sorted(set(default if asked is None else asked))
    beyond = [] if limit is None else [length for length in wanted if length > limit]
    if not beyond:
        return wanted
    assert limit is not None
    if asked is not None:
        notes.append(f"The models go up to max_position_embeddings = {limit}: measured up to it, not at {', '.join(map(str, beyond))}.")
    return sorted({*(length for length in wanted if length <= limit), limit})


def _conclude(result: dict[str, Any], folder: Path) -> None:
    """Draw conclusions from the rows so far and write everything down but the plots."""
    by_batch = [{"batch_size": size, **crossover(result["rows"], size)} for size in sorted({row["batch_size"] for row in result["rows"]})]
    # a single stream is what most readers mean by speed, so the headline is the smallest batch
    result["crossover"] = {key: by_batch[0][key] if by_batch else None for key in MEASURES}
    result["crossover_by_batch"] = by_batch
    result["crossover_text"] = {key: crossover_words(result["rows"], by_batch[0]["batch_size"] if by_batch else 1, key) for key in MEASURES}
    result["notes"] = list(dict.fromkeys(result["notes"]))
    result["plots"] = []
    if result["rows"] or not result["interrupted"]:  # an earlier result is worth more than an empty one
        write_bench(result, folder)


def _finish(result: dict[str, Any], folder: Path) -> None:
    """Conclusions, plots, and everything written down."""
    _conclude(result, folder)
    if result["rows"]:
        from attnconvert.convert.plots import draw_bench

        try:
            result["plots"] = [path.relative_to(folder).as_posix() for path in draw_bench(result, folder / PLOTS_FOLDER)]
        except AttnConvertError as error:  # the figures matter more than the pictures of them
            result["notes"].append(f"No plots: {error.message}{f'; {error.hint}' if error.hint else ''}.")
        write_bench(result, folder)


def result_file(folder: Path) -> Path:
    """Where the figures go: report.json where there is a readable one, else bench.json."""
    return folder / (BENCH_FILE if _report(folder) is None else REPORT_FILE)


def _report(folder: Path) -> dict[str, Any] | None:
    try:
        document = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def write_bench(result: Mapping[str, Any], folder: Path) -> Path:
    """Put the result under `bench` in the folder's report.json, whose other keys stay; into bench.json where there is no readable report.

    Returns:
        The file that was written.

    Raises:
        AttnConvertError: `cannot-write`.
    """
    document = _report(folder)
    path = result_file(folder)
    if document is None:
        document = json_safe(result)
    else:
        document["bench"] = json_safe(result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AttnConvertError("cannot-write", f"cannot create '{folder}': {error.strerror or error}", where=str(folder)) from error
    write_atomic(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    if "evaluation" in document:
        refresh_markdown(document, folder)
    return path


# ---------------------------------------------------------------- the teacher


def _load_teacher(source: str, against: str | None, dtype: str, notes: list[str], say: Callable[[str], None]) -> tuple[str | None, Any]:
    """Name and model of the teacher; (None, None), with a note, when there is none to be had and none was asked for."""
    if against == NO_TEACHER:
        return None, None
    if against is not None:
        say("load teacher")
        return against, load_model(resolve(against), dtype=dtype).model
    recorded = recorded_teacher(source)
    if recorded is None:
        notes.append("The result does not say which model was converted, so the student stands alone; name the teacher with --against.")
        return None, None
    say("load teacher")
    name, revision = recorded
    try:
        return name, load_model(resolve(name, revision=revision), dtype=dtype).model
    except AttnConvertError as error:
        notes.append(f"The teacher {name!r} could not be loaded, so the student stands alone: {error.message}.")
        return None, None


def recorded_teacher(source: str) -> tuple[str, str | None] | None:
    """Name and Hub revision of the model that was converted, from the records of a folder or Hub model; None when they do not say."""
    readers: tuple[tuple[str, Callable[[Any], tuple[str, str | None]]], ...] = (
        (f"{FOLDER}/run.json", lambda facts: (facts["settings"]["model"]["name"], facts["settings"]["model"]["revision"])),
        (FACTS_FILE, lambda facts: (facts["base_model"]["name"], facts["base_model"]["revision"])),
        (REPORT_FILE, lambda facts: (facts["conversion"]["base_model"], None)),
    )
    for name, read in readers:
        path = _record_file(source, name)
        if path is None:
            continue
        try:
            teacher, revision = read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(teacher, str) and teacher:
            return teacher, revision
    return None


def _record_file(source: str, name: str) -> Path | None:
    """A file of the folder, or of the Hub model through its cache; None when it is not there or the Hub cannot be reached."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def _placed(model: Any, name: str, device: torch.device) -> Any:
    placed = _attempt(lambda: model.to(device).eval(), device)
    if placed is None:
        hint = "use a larger GPU, `--device cpu`, or `--against none` to measure the student alone"
        raise AttnConvertError("out-of-memory", f"the weights of the {name} do not fit on {device_name(device)}", hint=hint)
    return placed


# ---------------------------------------------------------------- facts about models and the machine


def _limit(models: Sequence[Any]) -> int | None:
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min((int(limit) for limit in limits if limit), default=None)


def _weight_bytes(model: Any) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # tied weights count once
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _attention(model: Any) -> str:
    """`sdpa` for a teacher, the methods of the plan for a student."""
    plan = getattr(model.config, "attn_plan", None)
    if plan is None:
        return str(model.config._attn_implementation)
    names = [str(row["method"] or "softmax") for row in plan["layers"]]
    return ", ".join(f"{name} in {names.count(name)} of {len(names)} layers" for name in dict.fromkeys(names))


def _heads(model: Any, student: Any) -> str:
    """The number of KV heads, where it is what the conversion changed."""
    heads = getattr(model.config.get_text_config(), "num_key_value_heads", None)
    return f", {heads} KV heads" if getattr(student.config, "attn_plan", None) is None and heads else ""


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return str(device_name(device))
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("model name")]
        model = f" ({names[0]})" if names else ""
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}{model}"


@contextmanager
def _measuring(device: torch.device) -> Iterator[None]:
    """Inside: no gradients, and on a GPU the same TF32 setting for every fp32 matrix product, whoever calls it."""
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        with torch.no_grad():
            yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _parked(models: Sequence[_Contestant], device: torch.device) -> Iterator[None]:
    """Inside, these models are off the device."""
    try:
        for contestant in models:
            contestant.model.to("cpu")
        _free(device)
        yield
    finally:
        _free(device)
        for contestant in models:
            contestant.model.to(device)


# ---------------------------------------------------------------- running out of memory


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch says it as its own class on a GPU, as a RuntimeError from the CUDA driver, and as another from the CPU's allocator."""
    text = str(error).lower()
    said = isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or said


def _attempt(call: Callable[[], _Result], device: torch.device) -> _Result | None:
    """What the call returns, or None after it ran out of memory; by then what it had allocated is free again."""
    try:
        return call()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    # outside of the except clause: the traceback holds the frames, and they hold the tensors
    _free(device)
    return None


# ---------------------------------------------------------------- one pass


def _prefill(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """First new token [B, 1] and cache of a prompt [B, T]."""
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _decode(model: Any, token: torch.Tensor, cache: Any, new_tokens: int, device: torch.device) -> float:
    """Seconds of `new_tokens` single-token steps on a cache, which grows; as `generate()` takes them, so a converted model on a GPU replays a CUDA graph."""
    run = DecodeGraph(model) if device.type == "cuda" else model  # it leaves alone what it cannot record, such as the teacher's growing cache
    start = 0.0
    for step in range(-UNTIMED_STEPS if device.type == "cuda" else 0, new_tokens):
        if step == 0:
            _synchronize(device)
            start = time.perf_counter()
        logits = run(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)  # stays on the device: nothing waits for it but the next step
    _synchronize(device)
    return time.perf_counter() - start


def _run_pass(model: Any, prompt: torch.Tensor, settings: _Settings) -> _Pass:
    """Prefill a prompt [B, T], then decode."""
    device = settings.device
    on_cuda = device.type == "cuda"
    _synchronize(device)
    before = torch.cuda.memory_allocated(device) if on_cuda else 0

    def peak() -> int | None:
        if not on_cuda:
            return None
        highest = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        return int(highest)

    peak()
    start = time.perf_counter()
    token, cache = _prefill(model, prompt)
    _synchronize(device)
    prefill_seconds = time.perf_counter() - start
    prefill_peak, prefill_bytes = peak(), cache_bytes(cache)
    context = settings.context(prompt.shape[1])
    if context < prompt.shape[1]:
        del cache
        token, cache = _prefill(model, prompt[:, :context])
        peak()
    decode_seconds = _decode(model, token, cache, settings.new_tokens, device)
    return _Pass(prefill_seconds, decode_seconds, prefill_bytes, cache_bytes(cache), prefill_peak, peak())


def _run_cell(contestants: Sequence[_Contestant], prompt: torch.Tensor, settings: _Settings) -> dict[str, list[_Pass]]:
    """The repeats of each model that did not run out of memory, taken in turns: A B, B A, A B."""
    for _ in range(settings.num_warmups):
        warm: dict[str, _Pass] = {}
        for contestant in contestants:
            done = _attempt(lambda model=contestant.model: _run_pass(model, prompt, settings), settings.device)  # type: ignore[misc]
            if done is not None:
                warm[contestant.name] = done
        contestants = [c for c in contestants if c.name in warm]
    passes: dict[str, list[_Pass]] = {c.name: [] for c in contestants}
    slowest = max((done.seconds for done in warm.values()), default=0.0)
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(settings.max_seconds / max(slowest, 1e-9)) - settings.num_warmups))
    for repeat in range(repeats):
        for contestant in contestants if repeat % 2 == 0 else contestants[::-1]:
            done = _attempt(lambda model=contestant.model: _run_pass(model, prompt, settings), settings.device)  # type: ignore[misc]
            if done is not None:
                passes[contestant.name].append(done)
    # a model that fits only sometimes does not fit
    return {name: found for name, found in passes.items() if len(found) == repeats}


# ---------------------------------------------------------------- all cells


def _sweep(
    contestants: Sequence[_Contestant],
    lengths: Sequence[int],
    batch_sizes: Sequence[int],
    settings: _Settings,
    result: dict[str, Any],
    progress: EvalProgress | None,
    keep: Callable[[], object] = lambda: None,
) -> None:
    """Fill `rows` and `stopped` of the result, and call `keep` after each cell: a machine that goes away takes one cell along. A series is one model at one batch size; it ends at the first length that is too much."""
    history: dict[tuple[str, int], list[_Timed]] = {}
    stopped: dict[tuple[str, int], tuple[int, str]] = {}
    cells = [(size, length) for size in batch_sizes for length in lengths]
    generator = torch.Generator().manual_seed(0)
    for number, (size, length) in enumerate(cells):
        if progress is not None:
            progress(f"{length} tokens x {size}", number, len(cells))
        takers = []
        for contestant in contestants:
            key = (contestant.name, size)
            if key in stopped:
                continue
            reason = _too_much(contestant.name, size, length, history, stopped, settings)
            if reason is None:
                takers.append(contestant)
            else:
                stopped[key] = (length, reason)
        prompt = torch.randint(settings.num_ids, (size, length), generator=generator).to(settings.device)
        passes = _run_cell(takers, prompt, settings)
        alone = {}
        for contestant in takers:
            if contestant.name in passes:
                continue
            others = [c for c in contestants if c is not contestant]
            if settings.device.type == "cuda" and others:  # the other model's weights may be what does not fit
                with _parked(others, settings.device):
                    alone.update(_run_cell([contestant], prompt, settings))
            if contestant.name not in alone:
                stopped[(contestant.name, size)] = (length, "out of memory")
        for contestant in takers:
            found = passes.get(contestant.name) or alone.get(contestant.name)
            if found is None:
                continue
            timed = _Timed(length, statistics.median(one.prefill_seconds for one in found), statistics.median(one.decode_seconds for one in found))
            history.setdefault((contestant.name, size), []).append(timed)
            why = "measured alone, because both models do not fit together" if contestant.name in alone else None
            result["rows"] += _rows(contestant, size, length, found, settings, why)
        for (name, at_size), (at_length, reason) in stopped.items():
            if (at_size, at_length) == (size, length):
                _record_stop(name, size, length, reason, result)
        if result["rows"]:
            keep()
    if progress is not None:
        progress(f"{cells[-1][1]} tokens x {cells[-1][0]}", len(cells), len(cells))


def _too_much(
    name: str,
    size: int,
    length: int,
    history: Mapping[tuple[str, int], Sequence[_Timed]],
    stopped: Mapping[tuple[str, int], tuple[int, str]],
    settings: _Settings,
) -> str | None:
    """Why a model's series ends before this cell, None when it does not."""
    for (other, smaller), (at, reason) in stopped.items():
        if other == name and smaller < size and length >= at:
            return reason
    series = history.get((name, size))
    if series:
        # prefill grows with the length at least, softmax attention with its square at most; a decode step is constant at best, linear at worst
        prefill = predict_seconds([(one.length, one.prefill_seconds) for one in series], length, (1.0, 2.0))
        pass_seconds = prefill + predict_seconds([(one.length, one.decode_seconds) for one in series], length, (0.0, 1.0))
    else:
        # on a GPU a small batch costs what a single row does, so only what two batch sizes show counts as growth; a CPU has nothing to spare
        powers = (0.0 if settings.device.type == "cuda" else 1.0, 1.0)
        known = sorted(
            (rows, one.prefill_seconds + one.decode_seconds) for (other, rows), ones in history.items() if other == name for one in ones if one.length == length
        )
        pass_seconds = predict_seconds(known, size, powers) if known else 0.0
    seconds = pass_seconds * (settings.num_warmups + MIN_REPEATS)
    if seconds > settings.max_seconds:
        return f"would take about {format_seconds(seconds)}, more than {format_seconds(settings.max_seconds)}"
    return None


def predict_seconds(series: Sequence[tuple[int, float]], length: int, powers: tuple[float, float]) -> float:
    """Seconds at a length from those at shorter ones: a power law through the last two, kept between two powers. Batch sizes go as well.

    Args:
        series: [(length, seconds), ...] in order of length, at least one.
        length: tokens, or rows.
        powers: smallest and largest exponent; the smallest is taken when one point is all there is.
    """
    last_length, last_seconds = series[-1]
    power = powers[0]
    earlier_length, earlier_seconds = series[-2] if len(series) > 1 else (0, 0.0)
    if min(earlier_seconds, last_seconds) > 0:  # a coarse clock may have seen nothing
        power = math.log(last_seconds / earlier_seconds) / math.log(last_length / earlier_length)
    return last_seconds * math.pow(length / last_length, min(powers[1], max(powers[0], power)))


def _record_stop(name: str, size: int, length: int, reason: str, result: dict[str, Any]) -> None:
    text = f"{name}, batch {size}: not measured from {length} tokens on ({reason})"
    result["stopped"].append({"model": name, "batch_size": size, "length": length, "reason": reason})
    result["notes"].append(f"{text[0].upper()}{text[1:]}.")
    last = [row for row in result["rows"] if (row["model"], row["batch_size"]) == (name, size) and row["length"] < length]
    for row in last[-2:]:
        addition = f"the series ends here: {length} tokens {'ran ' if reason == 'out of memory' else ''}{reason}"
        row["note"] = f"{row['note']}; {addition}" if row["note"] else addition


def _rows(contestant: _Contestant, size: int, length: int, passes: Sequence[_Pass], settings: _Settings, note: str | None) -> list[dict[str, Any]]:
    """The prefill and the decode row of one cell."""
    rows = []
    context = settings.context(length)
    for phase, tokens in (("prefill", length), ("decode", settings.new_tokens)):
        prefill = phase == "prefill"
        seconds = [max(one.prefill_seconds if prefill else one.decode_seconds, 1e-9) for one in passes]
        peaks = [peak for one in passes if (peak := one.prefill_peak if prefill else one.decode_peak) is not None]
        median = statistics.median(seconds)
        shorter = f"decoded after {context} tokens, so that the last step still has a position" if not prefill and context < length else None
        notes = [text for text in (note, shorter) if text]
        rows.append(
            {
                "model": contestant.name,
                "phase": phase,
                "batch_size": size,
                "length": length,
                "tokens_per_second": size * tokens / median,
                "tokens_per_second_min": size * tokens / max(seconds),
                "tokens_per_second_max": size * tokens / min(seconds),
                "num_repeats": len(passes),
                "seconds_per_token": None if prefill else median / tokens,
                "first_token_seconds": median if prefill else None,
                "peak_memory_bytes": contestant.weight_bytes + max(peaks) if peaks else None,
                "peak_memory_above_weights_bytes": max(peaks) if peaks else None,
                "cache_bytes": passes[0].prefill_cache_bytes if prefill else passes[0].decode_cache_bytes,
                "note": "; ".join(notes) or None,
            }
        )
    return rows


# ---------------------------------------------------------------- the largest batch


def _largest_batches(contestants: Sequence[_Contestant], settings: _Settings, result: dict[str, Any], progress: EvalProgress | None) -> None:
    """Fill `largest_batch` at the longest length that every model was measured at."""
    measured = [{row["length"] for row in result["rows"] if row["model"] == c.name} for c in contestants]
    common = set.intersection(*measured)
    if not common:
        result["notes"].append("The largest batch was not measured: there is no length that every model was measured at.")
        return
    length = max(common)
    for number, contestant in enumerate(contestants):
        if progress is not None:
            progress(f"largest batch, {contestant.name}", number, len(contestants))
        others = [c for c in contestants if c is not contestant]
        with _parked(others, settings.device):
            row = _largest_batch(contestant, length, settings)
        if row is not None:
            result["largest_batch"].append(row)
    if progress is not None:
        progress("largest batch", len(contestants), len(contestants))


def _largest_batch(contestant: _Contestant, length: int, settings: _Settings) -> dict[str, Any] | None:
    """Double the rows that decode at once until memory ends; None when not even one row fits."""
    device, model = settings.device, contestant.model
    prompt = torch.randint(settings.num_ids, (1, settings.context(length)), generator=torch.Generator().manual_seed(0)).to(device)
    one_row = _attempt(lambda: _prefill(model, prompt), device)
    if one_row is None:
        return None
    token, cache = one_row

    def decode(size: int) -> float:
        copies = copy.deepcopy(cache)
        copies.batch_repeat_interleave(size)
        return _decode(model, token.repeat(size, 1), copies, settings.new_tokens, device)

    size, best, why = 1, 0, f"more than {MAX_BATCH_SIZE} rows were not tried"
    while size <= MAX_BATCH_SIZE:
        try:
            seconds = _attempt(lambda size=size: decode(size), device)  # type: ignore[misc]
        except RuntimeError as error:  # a kernel's own bound on rows: what fitted before still stands
            seconds, why = None, f"{size} rows failed: {str(error).splitlines()[0]}"
        else:
            why = f"{size} rows ran out of memory" if seconds is None else why
        if seconds is None:
            break
        best = size
        if 2 * seconds > settings.max_seconds:  # it may have been the compiler that took so long
            again = _attempt(lambda size=size: decode(size), device)  # type: ignore[misc]
            seconds = seconds if again is None else again
        if 2 * seconds > settings.max_seconds:
            why = f"{2 * size} rows would take longer than {format_seconds(settings.max_seconds)}"
            break
        size *= 2
    if best == 0:
        return None
    times: list[float] = []
    for _ in range(MIN_REPEATS):
        repeated = _attempt(lambda: decode(best), device)
        times += [] if repeated is None else [repeated]
    if not times:
        return None
    tokens = best * settings.new_tokens
    return {
        "model": contestant.name,
        "length": length,
        "batch_size": best,
        "tokens_per_second": tokens / statistics.median(times),
        "tokens_per_second_min": tokens / max(times),
        "tokens_per_second_max": tokens / min(times),
        "num_repeats": len(times),
        "note": why,
    }


# ---------------------------------------------------------------- crossover


def _pairs(rows: Sequence[Mapping[str, Any]], batch_size: int, measure: str) -> list[tuple[int, float, float]]:
    """(length, teacher, student) at the lengths that both were measured at, in order. Cache bytes are those after the prefill."""
    phase, key = ("prefill", "cache_bytes") if measure == "cache" else (measure, "tokens_per_second")
    found: dict[str, dict[int, float]] = {"teacher": {}, "student": {}}
    for row in rows:
        if row["phase"] == phase and row["batch_size"] == batch_size and row["model"] in found and row.get(key) is not None:
            found[row["model"]][int(row["length"])] = float(row[key])
    return [(length, found["teacher"][length], found["student"][length]) for length in sorted(found["teacher"].keys() & found["student"].keys())]


def _gain(measure: str, teacher: float, student: float) -> float:
    """How many times better the student is: faster, or with a smaller cache."""
    better, worse = (teacher, student) if measure == "cache" else (student, teacher)
    return better / worse if worse else float("inf")


def crossover(rows: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, int | None]:
    """The shortest measured length from which the student is better at it, and better at every longer one; None = never.

    Args:
        rows: `rows` of a bench.
        batch_size: only rows of this batch size count.

    Returns:
        `prefill` and `decode` (more tokens per second), `cache` (fewer bytes) -> length in tokens.
    """
    result: dict[str, int | None] = {}
    for measure in MEASURES:
        since = None
        for length, teacher, student in _pairs(rows, batch_size, measure):
            if _gain(measure, teacher, student) <= 1.0:
                since = None
            elif since is None:
                since = length
        result[measure] = since
    return result


def crossover_words(rows: Sequence[Mapping[str, Any]], batch_size: int, measure: str) -> str:
    """One sentence on where the student gets better than the teacher at `prefill`, `decode` or `cache`."""
    pairs = _pairs(rows, batch_size, measure)
    what, who, better = {
        "prefill": ("Prefill", "the student", "faster"),
        "decode": ("Decode", "the student", "faster"),
        "cache": ("Cache", "the student's", "smaller"),
    }[measure]
    if not pairs:
        return f"{what}: no length at which both teacher and student were measured."
    gains = {length: _gain(measure, teacher, student) for length, teacher, student in pairs}
    longest, shortest = pairs[-1][0], pairs[0][0]
    at_end = f"{gains[longest]:.2f} x at {longest}"
    since = crossover(rows, batch_size)[measure]
    if since is None:
        earlier = [str(length) for length, gain in gains.items() if gain > 1.0]
        but = f", though it is at {', '.join(earlier)}" if earlier else ""
        return f"{what}: {who} is not {better} at {longest} tokens, the longest that both were measured at ({at_end}){but}."
    if since == shortest:
        where = "at every measured length" if len(pairs) > 1 else f"at {since} tokens, the only length measured"
        return f"{what}: {who} is {better} {where} ({gains[since]:.2f} x at {since}{f', {at_end}' if longest != since else ''})."
    return f"{what}: {who} is {better} from {since} tokens on ({gains[since]:.2f} x there{f', {at_end}' if longest != since else ''})."


# ---------------------------------------------------------------- Markdown


def bench_markdown(result: Mapping[str, Any]) -> str:
    """The section `Speed and memory` of a Markdown report: teacher / student in each cell, the largest batch, where the student wins, notes."""
    rows = result["rows"]
    names = [name for name in ("teacher", "student") if any(row["model"] == name for row in rows)]
    found = {(row["batch_size"], row["length"], row["phase"], row["model"]): row for row in rows}

    def pair(size: int, length: int, phase: str, key: str, text: Callable[[float], str]) -> str:
        cells = [found.get((size, length, phase, name)) for name in names]
        return " / ".join("-" if row is None or row.get(key) is None else text(row[key]) for row in cells)

    what: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
        ("prefill, tokens/s", "prefill", "tokens_per_second", _rate),
        ("first token", "prefill", "first_token_seconds", _latency),
        ("decode, tokens/s", "decode", "tokens_per_second", _rate),
        ("per token", "decode", "seconds_per_token", _latency),
        ("peak memory, prefill", "prefill", "peak_memory_bytes", format_bytes),
        ("peak memory, decode", "decode", "peak_memory_bytes", format_bytes),
        ("cache", "decode", "cache_bytes", format_bytes),
    )
    shown = [column for column in what if any(row.get(column[2]) is not None for row in rows if row["phase"] == column[1])]
    cells = [
        [str(size), f"{length:,}", *(pair(size, length, phase, key, text) for _, phase, key, text in shown)]
        for size, length in sorted({(row["batch_size"], row["length"]) for row in rows})
    ]
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    facts = [str(result.get(key)) for key in ("device", "dtype") if result.get(key)] + [versions, str(result.get("date") or "")[:10]]
    parts = [f"## Speed and memory\n\n{' / '.join(names).capitalize()}; {', '.join(facts[:2])}; {_spread_words(rows)}."]
    parts.append(markdown_table(("batch", "tokens", *(column[0] for column in shown)), cells))
    if result.get("largest_batch"):
        largest = [
            (row["model"], f"{row['length']:,}", str(row["batch_size"]), _rate(row["tokens_per_second"]), row.get("note") or "")
            for row in result["largest_batch"]
        ]
        parts.append("Largest batch that decodes:\n\n" + markdown_table(("model", "tokens", "batch", "tokens/s", "why not more"), largest))
    parts.append("\n".join(f"- {text}" for text in (*result.get("crossover_text", {}).values(), *result.get("notes", ()))))
    made = f"`{result['command']}`; " if result.get("command") else ""
    parts.append(f"{made}{'; '.join(text for text in facts[2:] if text)}.")
    return "\n\n".join(part for part in parts if part)


# ---------------------------------------------------------------- terminal


def render_bench(result: Mapping[str, Any]) -> RenderableType:
    """The benchmark as rich tables: prefill and decode for each batch size, the largest batch, where the student wins, notes."""
    rows = result["rows"]
    parts: list[RenderableType] = [Text(f"{result['device']}, {result['dtype']}; {_spread_words(rows)}")]
    names = [name for name in ("teacher", "student") if any(row["model"] == name for row in rows)]
    stopped = {(stop["model"], stop["batch_size"], stop["length"]): stop["reason"] for stop in result.get("stopped", [])}
    for size in sorted({row["batch_size"] for row in rows}):
        for phase in ("prefill", "decode"):
            parts.append(_phase_table(rows, phase, size, names, stopped))
    if result["largest_batch"]:
        cells = [
            (row["model"], str(row["length"]), str(row["batch_size"]), _rate(row["tokens_per_second"]), row.get("note") or "")
            for row in result["largest_batch"]
        ]
        parts.append(_table("Largest batch that decodes", ("model", "tokens", "batch", "tokens/s", "why not more"), cells))
    parts += [Text(text) for text in result.get("crossover_text", {}).values()]
    parts += [Text(f"note: {text}") for text in result.get("notes", [])]
    return Group(*parts)


def _spread_words(rows: Sequence[Mapping[str, Any]]) -> str:
    spreads = [(row["tokens_per_second_max"] - row["tokens_per_second_min"]) / row["tokens_per_second"] for row in rows]
    if not spreads:
        return "nothing was measured"
    counts = sorted({row["num_repeats"] for row in rows})
    repeats = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"medians of {repeats} repeats, which differ by {statistics.median(spreads):.0%} in a typical cell and {max(spreads):.0%} in the worst"


def _phase_table(rows: Sequence[Mapping[str, Any]], phase: str, size: int, names: Sequence[str], stopped: Mapping[tuple[str, int, int], str]) -> Table:
    here = {(row["model"], row["length"]): row for row in rows if row["phase"] == phase and row["batch_size"] == size}
    lengths = sorted({length for _, length in here} | {length for _, at, length in stopped if at == size})
    has_peak = any(row["peak_memory_bytes"] is not None for row in here.values())
    both = len(names) == 2
    latency = "first token" if phase == "prefill" else "per token"
    columns = ["tokens"]
    for what, ratio in (("tokens/s", "faster by"), (latency, None), ("cache", "smaller by"), *((("peak memory", None),) if has_peak else ())):
        columns += [f"{name} {what}" if number == 0 else name for number, name in enumerate(names)]
        columns += [ratio] if both and ratio else []
    cells = []
    for length in lengths:
        found = [here.get((name, length)) for name in names]
        line = [str(length)]
        reasons = [stopped.get((name, size, length)) for name in names]
        short = ["" if reason is None else reason if reason == "out of memory" else "too slow" for reason in reasons]
        line += [_rate(row["tokens_per_second"]) if row else why or "-" for row, why in zip(found, short, strict=True)]
        pair = found if both and all(found) else None
        line += [_times(_gain(phase, *(row["tokens_per_second"] for row in pair if row)))] if pair else ["-"] if both else []
        line += [_latency(row["first_token_seconds"] if phase == "prefill" else row["seconds_per_token"]) if row else "-" for row in found]
        line += [format_bytes(row["cache_bytes"]) if row else "-" for row in found]
        line += [_times(_gain("cache", *(row["cache_bytes"] for row in pair if row)))] if pair else ["-"] if both else []
        line += [format_bytes(row["peak_memory_bytes"]) if row and row["peak_memory_bytes"] is not None else "-" for row in found] if has_peak else []
        cells.append(line)
    return _table(f"{phase.capitalize()}, batch {size}", columns, cells)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "why not more") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _times(value: float) -> str:
    return f"{value:.2f} x"


def _latency(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
