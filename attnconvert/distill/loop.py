"""The training loop shared by the stages: schedule, metrics, checkpoints, resume, interruption.

A stage hands `train` a function that computes the gradients of one optimizer step; everything that must survive a `kill -9` is here.
The batch of a step is a pure function of (seed, step), so a checkpoint needs no data-loader state: parameters, optimizer, step
and RNG states are enough for the resumed run to end with the same bits (on a GPU as far as its kernels are deterministic).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from attnconvert.distill.config import OptimizerConfig
    from attnconvert.distill.data import MixedRows, PackedRows

_log = logging.getLogger(__name__)

Stage = Literal["transfer", "finetune"]
STAGES: tuple[Stage, ...] = ("transfer", "finetune")
"""In the order they run. Starting one afresh invalidates what it and the later ones left in the run directory."""

_CHECKPOINT_VERSION = 1
_TAIL_SHARE = 0.1


class Progress(Protocol):
    """Receives the log of a stage while it runs."""

    def on_step(self, stage: str, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        """Called once per optimizer step, in order, after it; in bursts of `log_every` steps. `metrics` is the line of metrics.jsonl."""


class ConvertedLayer(Protocol):
    """What training needs of a converted layer: who the teacher is, what is trained, and both outputs for one input.

    For a method that replaces the attention this is the core (an `nn.Module`), with inputs (q, k, v, inputs) after the projections. For one that
    changes the projections it is `surgery.regrouped.RegroupedLayer`, whose inputs are the call of the attention module. The last input says
    which tokens count, `valid()` bool [B, T].

    Attributes:
        teacher: True = the layer computes what it did before the conversion.
        needs_calibration: whether `calibrate.calibrate` has something to set.
        tap: None, or a function called as `tap(layer, *inputs, y)` with the teacher's output y; then the layer returns y.
    """

    teacher: bool
    needs_calibration: bool
    tap: Any

    def __call__(self, *args: Any) -> Any:
        """Inputs -> the student's output, shaped as y: [B, H, T, D] of a core, [B, 1, T, E] of a module with its output projection."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained in the layer besides adapters, fp32."""


@dataclass(frozen=True)
class RunContext:
    """Where and how a stage runs; nothing in here is a hyper-parameter.

    Attributes:
        run_dir: folder for metrics.jsonl and checkpoints; created if absent.
        seed: of the row order, the adapter initialisation and dropout.
        device: where the model already is.
        precision: bf16 = autocast; trained parameters and their optimizer state are fp32 either way.
        compile: compile decoder layers in the finetuning stage, and the cores in the transfer stage (CUDA only).
        gradient_checkpointing: recompute each decoder layer in the backward pass of the finetuning stage.
        progress: receives every step's metrics.
        resume: continue from the checkpoint in run_dir, if there is one; False starts afresh and removes it.
        checkpoint_every: optimizer steps between checkpoints; the end of a stage always writes one.
        log_every: optimizer steps between reads of the metrics from the device; None = 1 on CPU, 10 elsewhere, where each read waits for the device.
    """

    run_dir: Path
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    gradient_checkpointing: bool = False
    progress: Progress | None = None
    resume: bool = False
    checkpoint_every: int = 100
    log_every: int | None = None


@dataclass(frozen=True)
class StageResult:
    """What a stage did, over all its runs if it was interrupted and resumed.

    Attributes:
        stage: `transfer` or `finetune`.
        skipped: why nothing was trained; None = it was.
        steps: optimizer steps.
        tokens: training tokens seen.
        seconds: wall-clock time spent training.
        tokens_per_second: tokens / seconds.
        final_loss: mean loss of the last 10 % of the steps (one batch alone is noise).
        layer_errors: layer index -> relative error of the attention output, mean over the same steps; empty after finetuning.
        peak_memory_bytes: of this process; allocated on the GPU, else resident. None where the system does not say.
    """

    stage: Stage
    skipped: str | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    final_loss: float | None = None
    layer_errors: dict[int, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate. Names are the keys in the checkpoint."""

    params: Mapping[str, nn.Parameter]
    peak_lr: float
    weight_decay: float


@dataclass
class _Totals:
    """What the loop has counted so far; part of the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tail_steps: int = 0
    tail_loss: float = 0.0
    tail_layer_errors: list[float] = field(default_factory=list)


def lr_factor(step: int, num_steps: int, warmup_steps: int, final_lr_ratio: float) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0): linear warm-up, then cosine to `final_lr_ratio` at the last step.

    A stage shorter than two warm-ups warms up over its first half, so that even a short one reaches the peak.
    """
    warmup = min(warmup_steps, num_steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    return final_lr_ratio + (1 - final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def autocast(run: RunContext) -> torch.autocast:
    """The autocast context of one forward pass."""
    return torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16")


def skip_stage(stage: Stage, reason: str, run: RunContext) -> StageResult:
    """The result of a stage that has nothing to train; leaves run_dir as a fresh start of the stage would."""
    _log.info("%s skipped: %s", stage, reason)
    if not run.resume:
        _forget(run.run_dir, stage)
    return StageResult(stage, skipped=reason)


def checkpoint_path(run_dir: Path, stage: Stage) -> Path:
    """Where `stage` keeps its one checkpoint."""
    return run_dir / "checkpoints" / f"{stage}.pt"


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a run after a crash, sees the old content or the new, never a part.

    Raises:
        AttnConvertError: `cannot-write`; the old content is still there.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        if os.name == "posix":  # the rename itself is durable only once its directory is
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def train(
    stage: Stage,
    groups: Sequence[ParamGroup],
    compute: Callable[[int], dict[str, Tensor]],
    *,
    layers: Sequence[int],
    config: OptimizerConfig,
    rows: PackedRows | MixedRows,
    run: RunContext,
) -> StageResult:
    """Runs the optimizer steps of a stage that its checkpoint has not seen yet.

    Args:
        stage: names the checkpoint and the lines of metrics.jsonl.
        groups: what is trained, fp32, on `run.device`.
        compute: optimizer step (from 0) -> metrics, 0-d tensors left on the device; leaves the (clipped) gradients in `.grad`. Must give `loss` and
            `grad_norm`, and when `layers` is not empty `layer_errors` [len(layers)].
        layers: the layer indices of `layer_errors`.
        config: schedule and batch size.
        rows: the training rows, for the facts a resumed run is checked against.
        run: where and how.

    Raises:
        AttnConvertError: `non-finite-loss` (the checkpoint stays the last good one), `out-of-memory`, `resume-mismatch`, `bad-checkpoint`, `cannot-write`.
        KeyboardInterrupt: after Ctrl-C, once the step under way is finished and saved; a second Ctrl-C is immediate and resumes from the last checkpoint.
    """
    params = {name: p for group in groups for name, p in group.params.items()}
    assert params, "a stage without parameters is skipped by its caller"
    assert all(p.dtype in (torch.float32, torch.float64) for p in params.values()), "trained parameters must be fp32"
    assert all(p.device.type == run.device.type for p in params.values()), "the model must already be on run.device"
    num_steps, tokens_per_step = config.steps, config.batch_size * config.length
    assert num_steps > 0, "a stage without steps is skipped by its caller"
    on_cuda = run.device.type == "cuda"
    log_every = run.log_every or (1 if run.device.type == "cpu" else 10)
    optimizer = torch.optim.AdamW([{"params": list(g.params.values()), "lr": g.peak_lr, "weight_decay": g.weight_decay} for g in groups], fused=on_cuda)
    facts = {
        # micro_batch_size may change: it alters rounding only, and lowering it is the cure for out-of-memory.
        "config": config.model_dump(mode="json", exclude={"micro_batch_size"}),
        "seed": run.seed,
        "precision": run.precision,
        "data": rows.sha256(),
        "parameters": {name: list(p.shape) for name, p in params.items()},
    }
    path = checkpoint_path(run.run_dir, stage)
    totals = _Totals(tail_layer_errors=[0.0] * len(layers))
    torch.manual_seed(run.seed)
    if not run.resume:
        _forget(run.run_dir, stage)
    elif path.exists():
        totals = _load_checkpoint(path, params, optimizer, facts, run.device)
        _log.info("%s resumes after step %d of %d", stage, totals.step, num_steps)
    metrics_path = run.run_dir / "metrics.jsonl"
    truncate_metrics(metrics_path, stage, totals.step)
    if totals.step == num_steps:
        return _result(stage, totals, tokens_per_step, layers, run)

    tail_start = num_steps - max(1, round(num_steps * _TAIL_SHARE))
    pending: list[tuple[int, float, dict[str, Tensor]]] = []
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    earlier, began = totals.seconds, time.perf_counter()

    def flush() -> None:
        """Reads the pending metrics from the device (the one wait of the loop), checks them, writes and reports them."""
        if not pending:
            return
        values = torch.stack([torch.cat([v.detach().float().reshape(-1) for v in metrics.values()]) for _, _, metrics in pending]).tolist()
        seconds = earlier + time.perf_counter() - began
        rate = len(pending) * tokens_per_step / max(seconds - totals.seconds, 1e-9)
        totals.seconds = seconds
        lines, failure = [], None
        for (step, lr, metrics), flat in zip(pending, values, strict=True):
            line: dict[str, Any] = {"stage": stage, "step": step, "loss": None, "lr": lr, "tokens": step * tokens_per_step}
            numbers = iter(flat)
            for name, value in metrics.items():
                several = [next(numbers) for _ in range(value.numel())]
                line[name] = dict(zip(map(str, layers), several, strict=True)) if name == "layer_errors" else several[0]
            if not all(map(math.isfinite, flat)):
                failure = _non_finite(stage, line, num_steps)
                break
            if step > tail_start:
                totals.tail_steps += 1
                totals.tail_loss += line["loss"]
                totals.tail_layer_errors = [a + b for a, b in zip(totals.tail_layer_errors, line.get("layer_errors", {}).values(), strict=True)]
            lines.append(line | {"seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)})
        pending.clear()
        _append_lines(metrics_path, lines)
        if run.progress is not None:
            for line in lines:
                run.progress.on_step(stage, line["step"], num_steps, line)
        if failure is not None:
            raise failure

    def save() -> None:
        flush()  # first: a non-finite step must not reach the checkpoint, and no checkpoint may be ahead of its metrics
        _save_checkpoint(path, params, optimizer, facts, totals, run.device)

    with _deferred_interrupt() as interrupted:
        while totals.step < num_steps:
            step = totals.step
            factor = lr_factor(step, num_steps, config.warmup_steps, config.final_lr_ratio)
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = settings.peak_lr * factor
            optimizer.zero_grad(set_to_none=True)
            try:
                metrics = compute(step)
                optimizer.step()
            except torch.OutOfMemoryError as error:
                raise _out_of_memory(stage, step + 1, config) from error
            totals.step = step + 1
            pending.append((totals.step, groups[0].peak_lr * factor, metrics))
            # From here to the next iteration the state is whole, so an interruption (by the handler or by the progress callback) saves it.
            try:
                if totals.step % log_every == 0:
                    flush()
                if totals.step % run.checkpoint_every == 0 or totals.step == num_steps:
                    save()
                if interrupted():
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                save()
                raise
    return _result(stage, totals, tokens_per_step, layers, run)


def truncate_metrics(path: Path, stage: Stage, step: int) -> None:
    """Removes the lines of `stage` past `step`, the lines of later stages, and a last line cut short by a crash."""
    if not path.exists():
        return
    text = path.read_bytes()
    later = STAGES[STAGES.index(stage) + 1 :]
    kept = []
    for raw in text.splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if raw.endswith(b"\n") and line["stage"] not in later and not (line["stage"] == stage and line["step"] > step):
            kept.append(raw)
    if b"".join(kept) != text:
        write_atomic(path, b"".join(kept))


def _forget(run_dir: Path, stage: Stage) -> None:
    """Removes what an earlier run left of `stage` and of the stages that build on it."""
    for name in STAGES[STAGES.index(stage) :]:
        checkpoint_path(run_dir, name).unlink(missing_ok=True)
    truncate_metrics(run_dir / "metrics.jsonl", stage, 0)


def _append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    if not lines:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _save_checkpoint(
    path: Path, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, facts: dict[str, Any], totals: _Totals, device: torch.device
) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "version": _CHECKPOINT_VERSION,
            "facts": facts,
            "totals": vars(totals),
            "params": {name: p.detach().cpu() for name, p in params.items()},
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
        buffer,
    )
    write_atomic(path, buffer.getvalue())


def _load_checkpoint(path: Path, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, facts: dict[str, Any], device: torch.device) -> _Totals:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        version = saved["version"]
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise AttnConvertError(
            "bad-checkpoint", f"cannot read the checkpoint: {error}", where=str(path), hint="delete it to train this stage again from its start"
        ) from error
    if version != _CHECKPOINT_VERSION:
        raise AttnConvertError(
            "bad-checkpoint",
            f"the checkpoint has format {version}",
            where=str(path),
            expected=f"format {_CHECKPOINT_VERSION}",
            hint="delete it to train this stage again from its start, or finish it with the attnconvert that wrote it",
        )
    changed = [f"{name}: {_brief(before)} -> {_brief(now)}" for name, before, now in _differences(saved["facts"], facts)]
    if changed:
        raise AttnConvertError(
            "resume-mismatch",
            "the checkpoint belongs to a run with other settings",
            where=f"{path}  " + "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else ""),
            expected="the recipe, model, data and seed of the interrupted run (micro_batch_size alone may differ)",
            hint="restore the settings, or start afresh without --resume",
        )
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved["params"][name])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    if device.type == "cuda" and saved["cuda_rng"] is not None:
        torch.cuda.set_rng_state(saved["cuda_rng"], device)
    return _Totals(**saved["totals"])


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield name, before, now


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:21] + "..."


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only remembered, so that no step is left half done; the second one raises at once.

    Where Ctrl-C is not Python's default (another handler, ignored in the background, not the main thread) nothing is changed.
    """
    pressed = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        _log.warning("interrupted: stopping after this step (press Ctrl-C again to stop at once)")

    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _result(stage: Stage, totals: _Totals, tokens_per_step: int, layers: Sequence[int], run: RunContext) -> StageResult:
    tokens = totals.step * tokens_per_step
    return StageResult(
        stage,
        steps=totals.step,
        tokens=tokens,
        seconds=totals.seconds,
        tokens_per_second=tokens / max(totals.seconds, 1e-9),
        final_loss=totals.tail_loss / totals.tail_steps,
        layer_errors={layer: error / totals.tail_steps for layer, error in zip(layers, totals.tail_layer_errors, strict=True)},
        peak_memory_bytes=_peak_memory(run.device),
    )


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _non_finite(stage: Stage, line: dict[str, Any], num_steps: int) -> AttnConvertError:
    layers = [layer for layer, error in line.get("layer_errors", {}).items() if not math.isfinite(error)]
    what = "loss" if not math.isfinite(line["loss"]) else "gradient"
    where = f"stage {stage}, step {line['step']} of {num_steps}, lr {line['lr']:.3g}" + (f", layer {', '.join(layers)}" if layers else "")
    if line["step"] == 1:
        hint = "the very first step failed, so the model or the precision is at fault: try fp32 precision, and check that the model itself gives finite logits"
    else:
        hint = f"lower the learning rate (`--set stages.{stage}.lr=...`), clip gradients (`--set stages.{stage}.grad_clip=1.0`) or lengthen the warm-up"
    return AttnConvertError("non-finite-loss", f"the {what} is not finite", where=where, expected="finite numbers; the last checkpoint is untouched", hint=hint)


def _out_of_memory(stage: Stage, step: int, config: OptimizerConfig) -> AttnConvertError:
    micro = config.micro_batch_size or config.batch_size
    if micro > 1:
        smaller = next(m for m in range(micro // 2, 0, -1) if config.batch_size % m == 0)
        hint = f"`--set stages.{stage}.micro_batch_size={smaller}` gives the same result in less memory; a run can be resumed with it"
    else:
        hint = f"lower `stages.{stage}.length` (now {config.length} tokens)" + (" or turn gradient checkpointing on" if stage == "finetune" else "")
    where = f"stage {stage}, step {step}, {micro} sequence(s) of {config.length} tokens per pass"
    return AttnConvertError("out-of-memory", "the device has no memory left", where=where, hint=hint)


def _cannot_write(path: Path, error: OSError) -> AttnConvertError:
    hint = "free space or choose another directory, then continue with --resume"
    return AttnConvertError("cannot-write", f"cannot write: {error.strerror or error}", where=str(path), hint=hint)
