"""Fewer key-value heads, saved as the stock architecture: compare the ways to start, or write the model. No training.

The checkpoint is an ordinary one: same class, same tokenizer, another `num_key_value_heads`. Every engine that serves the source serves it.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attnconvert
from attnconvert.convert.load import Source, load_config, load_model, resolve
from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from attnconvert.convert.evaluate import EvalReport
    from attnconvert.distill.data import Data
    from attnconvert.surgery.regroup import Freedom, Regrouped
    from attnconvert.surgery.sites import Site

NOT_TRAINED = "No recovery training was done, and recovery by training is not part of this command yet: finetune the model before you use it."
RECORD_FILE = "regroup.json"
NO_TEXT = "none"
"""Value of `calibration` that aligns by the weights alone. Held-out text is then the embedded one."""

_ROW_TOKENS = 512
_PROBE_TOKENS = 48
_ROTATION_TOLERANCE = 1e-2  # of the logits' standard deviation; 6e-6 on the embedded model, 1.6e-5 on SmolLM2-135M, fp32

Note = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class InitQuality:
    """What an init costs before any training, on held-out text.

    Attributes:
        init: name of the init; `source` for the model itself.
        num_key_value_heads: KV heads.
        loss: nats per token.
        ppl: exp(loss).
        kl: KL(source || model) in nats per token; None for the source.
        agreement: share of positions with the source's most likely token; None for the source.
        cache_bytes_per_token: bytes of keys and values of one token over all layers.
    """

    init: str
    num_key_value_heads: int
    loss: float
    ppl: float
    kl: float | None
    agreement: float | None
    cache_bytes_per_token: int


@dataclass(frozen=True)
class RegroupReport:
    """Held-out figures of a source and of what regrouping makes of it.

    Attributes:
        model: as the user named it.
        family: model_type of its config.
        rows: the source first.
        num_heads: query heads.
        num_tokens: held-out positions scored.
        data: what was read, as `load_data` describes it.
        notes: what could not be turned, and what else to know.
        seconds: wall-clock time.
        path: the checkpoint; None for a comparison.
    """

    model: str
    family: str
    rows: tuple[InitQuality, ...]
    num_heads: int
    num_tokens: int
    data: dict[str, Any]
    notes: tuple[str, ...]
    seconds: float
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; a figure that is not finite is null."""
        from attnconvert.convert.evaluate import json_safe

        result: dict[str, Any] = json_safe({**asdict(self), "path": None if self.path is None else str(self.path)})
        return result


@dataclass(frozen=True)
class _Prepared:
    """A loaded source with everything that the inits look at."""

    source: Source
    model: Any
    tokenizer: Any
    sites: list[Site]
    moments: dict[int, torch.Tensor]
    freedoms: dict[int, Freedom]
    data: Data
    dtype: torch.dtype
    notes: tuple[str, ...]


def compare_inits(
    model: str,
    targets: Sequence[int],
    *,
    inits: Sequence[str] | None = None,
    calibration: str | None = None,
    tokens: int = 16_384,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    note: Note | None = None,
    progress: Progress | None = None,
) -> RegroupReport:
    """Held-out loss, KL and agreement of every init at every number of KV heads. Writes nothing.

    Args:
        model: a Hub id, a folder, a .gguf file, or `demo`.
        targets: numbers of KV heads.
        inits: names; None = all.
        calibration: text for calibration and for the held-out figures (a file, a folder, a `datasets` id), split by document; None = the embedded
            text; `none` = align by the weights alone, figures on the embedded text.
        tokens: of calibration and of held-out text, each.
        revision: Hub revision.
        dtype: of the weights as they would be saved: auto (as stored), fp32, bf16 or fp16. Figures are computed in fp32 from weights rounded to it.
        device: a torch device.
        seed: of the documents read and of `random`.
        note: told what is done.
        progress: told about rows read and measured.

    Raises:
        AttnConvertError: from loading, `check_architecture` and the data; `already-converted`, `quantized-model`, `unknown-init`, `rotation-changes-model`.
    """
    from attnconvert.surgery.regroup import INITS

    started = time.perf_counter()
    chosen = _check_inits(inits if inits is not None else INITS)
    prepared = _prepare(model, targets, calibration, tokens, revision, dtype, device, seed, note, progress)
    candidates = {(init, target): _candidate(prepared, target, init, seed) for target in targets for init in chosen}
    if note is not None:
        note(f"measuring {len(candidates)} starts on held-out text")
    report = _measure(prepared, candidates, device, seed, progress)
    return _report(prepared, report, list(candidates), time.perf_counter() - started, None)


def regroup_model(
    model: str,
    num_key_value_heads: int,
    out: Path,
    *,
    init: str = "aligned",
    calibration: str | None = None,
    tokens: int = 16_384,
    overwrite: bool = False,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    note: Note | None = None,
    progress: Progress | None = None,
) -> RegroupReport:
    """Write the model with fewer KV heads as its stock architecture: measured, reloaded in a fresh process without attnconvert, then put in place.

    Args:
        model: as for `compare_inits`, like calibration, tokens, revision, dtype, device, seed, note and progress.
        num_key_value_heads: KV heads of the result.
        out: folder to create.
        init: how to make the heads.
        overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
        AttnConvertError: as `compare_inits`; also `output-not-empty`, `output-not-ours`, `reload-failed`, `disk-full`, `cannot-write`. Nothing is left behind.
    """
    from attnconvert.convert.save import cast_weights, check_output, check_reload, disk_errors, new_folder
    from attnconvert.surgery.regroup import install

    started = time.perf_counter()
    _check_inits([init])
    check_output(out, overwrite=overwrite)
    prepared = _prepare(model, [num_key_value_heads], calibration, tokens, revision, dtype, device, seed, note, progress)
    candidate = _candidate(prepared, num_key_value_heads, init, seed)
    if note is not None:
        note("measuring on held-out text")
    measured = _measure(prepared, {(init, num_key_value_heads): candidate}, device, seed, progress)
    if note is not None:
        note("saving, and reloading in a fresh process")
    converted = prepared.model
    install(converted, candidate)
    converted.to("cpu")
    cast_weights(converted, prepared.dtype)
    report = _report(prepared, measured, [(init, num_key_value_heads)], 0.0, out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out, overwrite=overwrite) as folder:
        converted.save_pretrained(folder)
        prepared.tokenizer.save_pretrained(folder)
        _check_stock(folder, converted)
        check_reload(converted, folder)
        report = replace(report, seconds=round(time.perf_counter() - started, 3))
        (folder / RECORD_FILE).write_text(json.dumps(_record(report, init, prepared, seed), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def _check_inits(inits: Sequence[str]) -> tuple[str, ...]:
    from attnconvert.surgery.regroup import INITS

    for init in inits:
        if init not in INITS:
            raise AttnConvertError(
                "unknown-init", f"unknown init {init!r}", expected=f"one of: {', '.join(INITS)}", hint="--compare-inits measures all of them"
            )
    return tuple(inits)


def _check_stock(folder: Path, model: Any) -> None:
    """What was saved needs no code but transformers'."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config, "the checkpoint asks for remote code"
    assert config["architectures"] == [type(model).__name__], "the architecture changed"
    assert not list(folder.glob("*.py")), "the checkpoint carries code"


def _record(report: RegroupReport, init: str, prepared: _Prepared, seed: int) -> dict[str, Any]:
    """How the checkpoint came about, as strict JSON without paths of this machine."""
    from attnconvert.convert.pipeline import versions

    source = prepared.source
    data = {key: value for key, value in report.to_dict()["data"].items() if key not in ("source", "eval_source")}
    return {
        "attnconvert": attnconvert.__version__,
        "base_model": Path(source.path).name if source.is_local and source.name != "demo" else source.name,
        "revision": source.revision,
        "init": init,
        "num_key_value_heads": [row.num_key_value_heads for row in report.rows],
        "trained": False,
        "seed": seed,
        "versions": versions(),
        "data": data,
        **{key: value for key, value in report.to_dict().items() if key in ("rows", "num_tokens", "notes", "seconds")},
    }


# ---------------------------------------------------------------- steps


def _prepare(
    model: str,
    targets: Sequence[int],
    calibration: str | None,
    tokens: int,
    revision: str | None,
    dtype: str,
    device: str,
    seed: int,
    note: Note | None,
    progress: Progress | None,
) -> _Prepared:
    import torch

    from attnconvert.distill.config import DataConfig
    from attnconvert.distill.data import load_data
    from attnconvert.surgery.regroup import check_architecture, find_freedom, second_moments

    def say(text: str) -> None:
        if note is not None:
            note(text)

    source = resolve(model, revision=revision)
    attnconvert.register()  # a folder that was converted before is then recognised as such
    config = load_config(source)
    if config.model_type == "attnconvert" or getattr(config, "attn_plan", None) is not None:
        raise AttnConvertError("already-converted", f"{model!r} was converted before", hint="regroup the original model")
    if source.gguf_file is None and getattr(config, "quantization_config", None) is not None:
        raise AttnConvertError(
            "quantized-model",
            f"the weights of {model!r} are quantized, and heads cannot be pooled in them",
            expected="fp32, bf16 or fp16 weights",
            hint="regroup the original model, then quantize",
        )
    sites = check_architecture(config, targets)
    notes = []
    say(f"loading {model}")
    stored = _stored_dtype(config, gguf=source.gguf_file is not None)
    loaded = load_model(source, dtype="fp32", device=device)
    if calibration is None and source.name != "demo":
        notes.append("Calibrated and measured on the text inside the package; --calibration takes your own.")
    text = "embedded" if calibration in (None, NO_TEXT) else str(calibration)
    length = min(_ROW_TOKENS, int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", 0) or _ROW_TOKENS))
    data = load_data(
        DataConfig(source=text),
        loaded.tokenizer,
        length=length,
        num_train_tokens=0 if calibration == NO_TEXT else tokens,
        num_eval_tokens=tokens,
        eval_length=length,
        seed=seed,
    )
    freedoms = find_freedom(loaded.model, sites)
    notes += _freedom_notes(freedoms)
    _check_rotations(loaded.model, sites, freedoms, config, seed)
    moments: dict[int, torch.Tensor] = {}
    if data.train.num_rows:
        say(f"calibrating on {data.train.num_rows * length:,} tokens")
        with torch.no_grad(), second_moments(loaded.model, sites) as moments:
            for row in range(data.train.num_rows):
                batch = data.train.rows([row]).to(device)
                loaded.model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
                if progress is not None:
                    progress("calibration", row + 1, data.train.num_rows)
    else:
        notes.append("No calibration: heads were aligned by their weights alone.")
    return _Prepared(
        source, loaded.model, loaded.tokenizer, sites, moments, freedoms, data, stored if dtype == "auto" else _dtypes()[dtype], tuple(dict.fromkeys(notes))
    )


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _stored_dtype(config: Any, *, gguf: bool) -> torch.dtype:
    """The checkpoint's data type; fp32 for GGUF and where the config does not say."""
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in _dtypes().values()}
    return _dtypes()["fp32"] if gguf else by_name.get(name, _dtypes()["fp32"])


def _freedom_notes(freedoms: dict[int, Freedom]) -> list[str]:
    """One sentence per reason why something stays as it is."""
    notes = []
    for what in ("keys", "values"):
        reasons: dict[str, list[int]] = {}
        for idx, freedom in freedoms.items():
            reason = getattr(freedom, f"{what}_fixed")
            if reason is not None:
                reasons.setdefault(reason, []).append(idx)
        for reason, layers in reasons.items():
            where = "every layer" if len(layers) == len(freedoms) else f"{len(layers)} of {len(freedoms)} layers"
            notes.append(f"{what.capitalize()} are pooled without alignment in {where}: {reason}.")
    return notes


def _check_rotations(model: Any, sites: list[Site], freedoms: dict[int, Freedom], config: Any, seed: int) -> None:
    """Turn every head at random and compare logits: what `find_freedom` claims is tried before anything rests on it.

    Raises:
        AttnConvertError: `rotation-changes-model`.
    """
    import torch

    from attnconvert.surgery.regroup import installed, random_turns, turned

    device = next(model.parameters()).device
    vocab = int(config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(0, vocab, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with installed(model, turned(model, sites, random_turns(sites, freedoms, seed))):
            got = model(ids, use_cache=False).logits
    difference = float((got - want).abs().max() / want.std())
    if not difference <= _ROTATION_TOLERANCE:
        raise AttnConvertError(
            "rotation-changes-model",
            f"turning the heads of this {config.model_type!r} model changes its logits by {difference:.2g} standard deviations",
            expected=f"up to {_ROTATION_TOLERANCE:g}",
            hint="this is a fault of attnconvert: please report the model. Nothing was written",
        )


def _candidate(prepared: _Prepared, target: int, init: str, seed: int) -> Regrouped:
    """The weights an init gives, rounded as they will be saved, in fp32."""
    from attnconvert.surgery.regroup import Regrouped, regroup

    made = regroup(prepared.model, prepared.sites, prepared.moments, prepared.freedoms, target, init, seed)
    return Regrouped(target, {name: tensor.to(prepared.dtype).to(tensor.dtype) for name, tensor in made.tensors.items()})


def _measure(prepared: _Prepared, candidates: dict[tuple[str, int], Regrouped], device: str, seed: int, progress: Progress | None) -> EvalReport:
    from attnconvert.convert.evaluate import evaluate_models
    from attnconvert.distill.config import EvalConfig
    from attnconvert.surgery.regroup import installed

    rows = prepared.data.eval
    config = EvalConfig(tokens=max(1, rows.num_rows * rows.length), length=max(16, rows.length), passkey_trials=0)
    ablations = {_name(init, target): partial(installed, prepared.model, candidate) for (init, target), candidate in candidates.items()}
    return evaluate_models(
        prepared.model, prepared.model, prepared.tokenizer, rows, config, device=device, window=None, ablations=ablations, progress=progress, seed=seed
    )


def _name(init: str, target: int) -> str:
    return f"{init} {target}"


def _report(prepared: _Prepared, measured: EvalReport, candidates: Sequence[tuple[str, int]], seconds: float, path: Path | None) -> RegroupReport:
    site = prepared.sites[0]
    per_head = 2 * site.head_dim * len(prepared.sites) * prepared.dtype.itemsize
    rows = []
    for init, target in [("source", site.num_key_value_heads), *candidates]:
        quality = measured.quality_of("teacher" if init == "source" else _name(init, target))
        kl, agreement = (None if estimate is None else estimate.value for estimate in (quality.kl, quality.agreement))
        rows.append(InitQuality(init, target, quality.nll.value, quality.ppl.value, kl, agreement, per_head * target))
    return RegroupReport(
        model=prepared.source.name,
        family=prepared.model.config.model_type,
        rows=tuple(rows),
        num_heads=site.num_heads,
        num_tokens=measured.num_tokens,
        data=prepared.data.description,
        notes=prepared.notes,
        seconds=round(seconds, 3),
        path=path,
    )


# ---------------------------------------------------------------- showing


def render_report(report: RegroupReport) -> RenderableType:
    """The figures as a rich table, best loss of each number of heads bold with a star, and the notes."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = f"{report.model}: {report.num_tokens:,} held-out tokens, before any training"
    table = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", title_style="bold")
    table.add_column("init", no_wrap=True)
    for heading in ("KV heads", "loss", "ppl", "KL", "agreement", "cache bytes\nper token"):
        table.add_column(heading, justify="right", no_wrap=True)
    losses: dict[int, list[float]] = {}
    for row in report.rows[1:]:
        losses.setdefault(row.num_key_value_heads, []).append(row.loss)
    for row in report.rows:
        others = losses.get(row.num_key_value_heads, [])
        best = row.init != "source" and len(others) > 1 and row.loss == min(others)
        cells = (
            row.init,
            str(row.num_key_value_heads),
            f"{row.loss:.3f}" + (" *" if best else "  "),
            _figure(row.ppl, ",.2f"),
            _figure(row.kl, ".3f"),
            _figure(row.agreement, ".3f"),
            f"{row.cache_bytes_per_token:,}",
        )
        table.add_row(*(Text(cell, style="bold" if best else "") for cell in cells))
    parts: list[RenderableType] = [table]
    if any(len(group) > 1 for group in losses.values()):
        parts.append(Text("* lowest loss of its number of KV heads"))
    parts += [Text(f"note: {note}") for note in report.notes]
    return Group(*parts)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def what_next(report: RegroupReport, shown: str) -> str:
    """What changed, and how to load and serve the result, ready to be copied.

    Args:
        report: of a conversion.
        shown: its folder as the user would type it.
    """
    before, after = report.rows
    folder = shlex.quote(shown)
    lines = [
        f"Saved {shown}: {before.num_key_value_heads} -> {after.num_key_value_heads} KV heads, init {after.init}, stock {report.family} architecture",
        f"  k_proj, v_proj, q_proj and o_proj of every layer are new; cache {before.cache_bytes_per_token:,} -> {after.cache_bytes_per_token:,} bytes per token",
        f"  held-out loss {before.loss:.3f} -> {after.loss:.3f}",
        f"  {NOT_TRAINED}",
        f"  Other starts: attnconvert regroup {shlex.quote(report.model)} --kv-heads {after.num_key_value_heads} --compare-inits",
        "",
        "Load it with plain transformers, no code of attnconvert:",
        "",
        "  from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"  model = AutoModelForCausalLM.from_pretrained({shown!r})",
        f"  tokenizer = AutoTokenizer.from_pretrained({shown!r})",
        "",
        "Serve it:",
        "",
        f"  vllm serve {folder}",
    ]
    return "\n".join(lines)
