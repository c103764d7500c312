"""Fewer key-value heads, saved as the stock architecture: compare the ways to start, write the model untrained, or start its training.

The checkpoint is an ordinary one: same class, same tokenizer, another `num_key_value_heads`. Every engine that serves the source serves it. Training
is the life of every conversion (`pipeline.py`); what is here gives it the layers to train.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attnconvert
from attnconvert.convert.load import Source, load_config, load_model, load_tokenizer, resolve
from attnconvert.convert.report import ranges
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.plan import ConversionPlan

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from attnconvert.convert.evaluate import EvalReport
    from attnconvert.distill.data import Data, PackedRows
    from attnconvert.surgery.regroup import Freedom, Regrouped
    from attnconvert.surgery.regrouped import RegroupedLayer
    from attnconvert.surgery.sites import Site

NOT_TRAINED = "No recovery training was done: finetune the model before you use it, or start again with `--recipe gqa`, which trains."
RECORD_FILE = "regroup.json"
NO_TEXT = "none"
"""Value of `calibration` that aligns by the weights alone. Held-out text is then the embedded one."""

_ROW_TOKENS = 512
_CALIBRATION_TOKENS = 32_768  # for the start of a training: a multiple of the hidden size of any model
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
class _Heads:
    """What the inits look at, by layer index.

    Attributes:
        freedoms: what may be turned.
        moments: second moments of what the projections read; empty without calibration.
        notes: what could not be turned, as sentences.
    """

    freedoms: dict[int, Freedom]
    moments: dict[int, torch.Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    """A loaded source with everything that the inits look at."""

    source: Source
    model: Any
    tokenizer: Any
    sites: list[Site]
    heads: _Heads
    data: Data
    dtype: torch.dtype
    notes: tuple[str, ...]


def compare_inits(
    model: str,
    targets: Sequence[int],
    *,
    inits: Sequence[str] | None = None,
    grouping: str | None = None,
    query_heads: int | None = None,
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
        grouping: `contiguous`, or `similar`: heads that lose least together become one. None = `similar` for svd and aligned, else `contiguous`.
        query_heads: query heads to end with; None = as many as there are.
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
    prepared = _prepare(model, targets, calibration, tokens, revision, dtype, device, seed, note, progress, query_heads)
    candidates = {(init, target): _candidate(prepared, target, init, seed, grouping, query_heads) for target in targets for init in chosen}
    if note is not None:
        note(f"measuring {len(candidates)} starts on held-out text")
    report = _measure(prepared, candidates, device, seed, progress)
    return _report(prepared, report, list(candidates), time.perf_counter() - started, None)


def regroup_model(
    model: str,
    num_key_value_heads: int,
    out: Path,
    *,
    init: str = "svd",
    grouping: str | None = None,
    query_heads: int | None = None,
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
        model: as for `compare_inits`, like grouping, query_heads, calibration, tokens, revision, dtype, device, seed, note and progress.
        num_key_value_heads: KV heads of the result.
        out: folder to create.
        init: how to make the heads.
        overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
        AttnConvertError: as `compare_inits`; also `output-not-empty`, `output-not-ours`, `reload-failed`, `disk-full`, `cannot-write`. Nothing is left behind.
    """
    from attnconvert.convert.save import cast_weights, check_output, check_reload, check_stock, disk_errors, new_folder
    from attnconvert.surgery.regroup import install, usual_grouping

    started = time.perf_counter()
    _check_inits([init])
    check_output(out, overwrite=overwrite)
    prepared = _prepare(model, [num_key_value_heads], calibration, tokens, revision, dtype, device, seed, note, progress, query_heads)
    candidate = _candidate(prepared, num_key_value_heads, init, seed, grouping, query_heads)
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
        check_stock(folder, converted)
        check_reload(converted, folder)
        report = replace(report, seconds=round(time.perf_counter() - started, 3))
        settings = {"init": init, "grouping": grouping or usual_grouping(init), "query_heads": query_heads, "seed": seed}
        (folder / RECORD_FILE).write_text(json.dumps(_record(report, settings, prepared), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def _check_inits(inits: Sequence[str]) -> tuple[str, ...]:
    from attnconvert.surgery.regroup import INITS

    for init in inits:
        if init not in INITS:
            raise AttnConvertError(
                "unknown-init", f"unknown init {init!r}", expected=f"one of: {', '.join(INITS)}", hint="--compare-inits measures all of them"
            )
    return tuple(inits)


def _record(report: RegroupReport, settings: Mapping[str, Any], prepared: _Prepared) -> dict[str, Any]:
    """How the checkpoint came about, as strict JSON without paths of this machine."""
    from attnconvert.convert.pipeline import versions

    source = prepared.source
    data = {key: value for key, value in report.to_dict()["data"].items() if key not in ("source", "eval_source")}
    return {
        "attnconvert": attnconvert.__version__,
        "base_model": Path(source.path).name if source.is_local and source.name != "demo" else source.name,
        "revision": source.revision,
        **settings,
        "num_key_value_heads": [row.num_key_value_heads for row in report.rows],
        "trained": False,
        "versions": versions(),
        "data": data,
        **{key: value for key, value in report.to_dict().items() if key in ("rows", "num_tokens", "notes", "seconds")},
    }


# ---------------------------------------------------------------- for training


def regrouped_heads(plan: ConversionPlan) -> int | None:
    """KV heads of the stock checkpoint that a plan leads to; None when the plan leaves the projections alone.

    Raises:
        AttnConvertError: `uneven-heads`, when layers would end with different numbers.
    """
    heads = {row.layer_idx: int(row.config.get("num_key_value_heads", row.num_key_value_heads)) for row in plan.layers}
    if not any("num_key_value_heads" in row.config for row in plan.converted):
        return None
    others = sorted({str(row.method) for row in plan.converted if "num_key_value_heads" not in row.config})
    if len(set(heads.values())) == 1 and not others and not plan.num_kept_later:
        return next(iter(heads.values()))
    found = [f"{count} in layers {ranges([idx for idx, n in heads.items() if n == count])}" for count in sorted(set(heads.values()), reverse=True)]
    raise AttnConvertError(
        "uneven-heads",
        f"the recipe gives KV heads {', '.join(found)}"
        + (f", and other attention by {', '.join(others)}" if others else "")
        + (f", and puts {plan.num_kept_later} layers back after transfer" if plan.num_kept_later else ""),
        where="layers",
        expected="the same number in every layer, and no other method: config.json of a stock checkpoint holds one num_key_value_heads",
        hint="let one rule with `match: all` decide every layer, without `keep`",
    )


def regroup_for_training(
    model: Any, sites: list[Site], plan: ConversionPlan, rows: PackedRows, seed: int, note: Note, progress: Progress | None = None
) -> dict[int, RegroupedLayer]:
    """Give a loaded model fewer KV heads, in place, with its old attention modules kept as teachers.

    Heads are looked at in fp32, whatever the model's data type, for which there must be memory; the new projections stay fp32, the rest goes back.

    Args:
        model: the source, on its device.
        sites: its attention.
        plan: one for which `regrouped_heads` gives a number.
        rows: training rows, the first of which calibrate.
        seed: of the inits.
        note: told what could not be aligned.
        progress: told about calibration.

    Returns:
        Layer index -> the layer, with the student in place.

    Raises:
        AttnConvertError: `rotation-changes-model`.
    """
    from attnconvert.distill.data import epoch_indices
    from attnconvert.surgery.regroup import install, regroup
    from attnconvert.surgery.regrouped import remember_sources

    target, settings = regrouped_heads(plan), plan.converted[0].config
    assert target is not None
    layers = remember_sources(model, sites)
    count = min(rows.num_rows, -(-_CALIBRATION_TOKENS // rows.length))
    with _exact_arithmetic(model):
        heads = _look_at_heads(model, sites, rows, epoch_indices(rows.num_rows, seed, 0, count) if count else [], seed, progress)
        new = regroup(
            model, sites, heads.moments, heads.freedoms, target, settings["init"], seed, grouping=settings["grouping"], num_heads=settings["query_heads"]
        )
    for text in heads.notes:
        note(text)
    install(model, new)
    return layers


def has_uneven_heads(plan: ConversionPlan) -> bool:
    """Whether a plan gives layers KV heads of their own number or share, which takes code of ours."""
    return any("kv_heads" in row.config for row in plan.converted)


def uneven_for_training(
    model: Any, sites: list[Site], plan: ConversionPlan, settings: Mapping[int, Any], rows: PackedRows, seed: int, note: Note, progress: Progress | None = None
) -> tuple[dict[int, RegroupedLayer], ConversionPlan]:
    """Give the converted layers of a plan their KV heads, in place, with their old attention modules kept as teachers, and freeze their maps.

    Args:
        model: the source, on its device.
        sites: its attention.
        plan: one for which `has_uneven_heads`.
        settings: layer index -> the settings of the method (KdgqaConfig), for every converted layer.
        rows: training rows, the first of which calibrate.
        seed: of the inits.
        note: told what could not be aligned.
        progress: told about calibration.

    Returns:
        Layer index -> the layer, with the student in place; and the plan with the map of every layer.

    Raises:
        AttnConvertError: `rotation-changes-model`, `no-calibration`.
    """
    import torch

    from attnconvert.distill.data import epoch_indices
    from attnconvert.surgery.regroup.uneven import UnevenHeads, allocate, install_uneven, key_norms, make_uneven
    from attnconvert.surgery.regrouped import remember_sources

    converted = [site for site in sites if site.layer_idx in settings]
    counted = [idx for idx, config in settings.items() if config.query_heads is None and config.allocation != "even"]
    if counted and not rows.num_rows:
        raise AttnConvertError(
            "no-calibration",
            f"layers {ranges(counted)} share out their query heads by the keys of calibration text, and there is none",
            where="layers",
            expected="a training stage, allocation: even, or query_heads",
            hint="`--set layers.0.config.allocation=even`",
        )
    layers = remember_sources(model, converted)
    count = min(rows.num_rows, -(-_CALIBRATION_TOKENS // rows.length)) if rows.num_rows else 0
    with _exact_arithmetic(model), key_norms(model, converted) as norms:
        found = _look_at_heads(model, sites, rows, epoch_indices(rows.num_rows, seed, 0, count) if count else [], seed, progress)
        query_heads: dict[int, list[int]] = {}
        tensors: dict[str, torch.Tensor] = {}
        for site in converted:
            config = settings[site.layer_idx]
            windows = norms[site.layer_idx][-count:] if count else [torch.ones(site.num_key_value_heads)]
            shares = config.query_heads or allocate(torch.stack(windows), site.num_heads, config.kv_heads, config.allocation)
            query_heads[site.layer_idx] = list(shares)
            made = make_uneven(model, [site], found.moments, found.freedoms, {site.layer_idx: list(shares)}, config.init, seed)
            tensors.update(made.tensors)
    for text in found.notes:
        note(text)
    frozen = tuple(
        replace(row, config={**row.config, "query_heads": query_heads[row.layer_idx]}) if row.layer_idx in query_heads else row for row in plan.layers
    )
    plan = replace(plan, layers=frozen)
    install_uneven(model, UnevenHeads(query_heads, tensors), plan)
    for layer in layers.values():
        for module in layer.source.modules():
            if hasattr(module, "config"):
                module.config = model.config  # masks and documents reach the teacher as they reach the rest of the model
    return layers, plan


@contextlib.contextmanager
def _exact_arithmetic(model: Any) -> Iterator[None]:
    """Inside, weights are fp32 (16-bit ones come back exactly) and matrix products on a GPU do not use TF32."""
    import torch

    narrow = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


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
    query_heads: int | None = None,
) -> _Prepared:
    from attnconvert.distill.config import DataConfig
    from attnconvert.distill.data import load_data
    from attnconvert.surgery.regroup import as_stock, check_architecture, sqa_name, stock_config

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
    stock = stock_config(config)
    sites = check_architecture(stock, targets, query_heads)
    notes = []
    if stock is not config:
        notes.append(f"Saved as a {stock.model_type!r} model that computes the same: a {config.model_type!r} model has no number of KV heads.")
    if query_heads is not None and targets:
        names = dict.fromkeys(sqa_name(sites[0].num_heads, query_heads, target) for target in targets)
        notes.append(f"{sites[0].num_heads} -> {query_heads} query heads ({', '.join(names)}).")
    stored = _stored_dtype(config, gguf=source.gguf_file is not None)
    if calibration is None and source.name != "demo":
        notes.append("Calibrated and measured on the text inside the package; --calibration takes your own.")
    text = "embedded" if calibration in (None, NO_TEXT) else str(calibration)
    length = min(_ROW_TOKENS, int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", 0) or _ROW_TOKENS))
    data = load_data(  # before the model: it is quick to read, and most mistakes are there
        DataConfig(source=text),
        load_tokenizer(source),
        length=length,
        num_train_tokens=0 if calibration == NO_TEXT else tokens,
        num_eval_tokens=tokens,
        eval_length=length,
        seed=seed,
    )
    say(f"loading {model}")
    loaded = load_model(source, dtype="fp32", device=device)
    source_model = as_stock(loaded.model)
    if data.train.num_rows:
        say(f"calibrating on {data.train.num_rows * length:,} tokens")
    heads = _look_at_heads(source_model, sites, data.train, range(data.train.num_rows), seed, progress)
    return _Prepared(
        source,
        source_model,
        loaded.tokenizer,
        sites,
        heads,
        data,
        stored if dtype == "auto" else _dtypes()[dtype],
        tuple(dict.fromkeys((*notes, *heads.notes))),
    )


def _look_at_heads(model: Any, sites: list[Site], rows: PackedRows, indices: Sequence[int], seed: int, progress: Progress | None) -> _Heads:
    """What may be turned in each layer, tried out, and the second moments over some rows of text.

    Args:
        model: the source, in fp32.
        sites: its attention.
        rows: packed text.
        indices: the rows to calibrate on; none = align by the weights alone.
        seed: of the rotations that are tried.
        progress: told about each row.

    Raises:
        AttnConvertError: `rotation-changes-model`.
    """
    import torch

    from attnconvert.surgery.regroup import find_freedom, second_moments

    freedoms = find_freedom(model, sites)
    notes = _freedom_notes(freedoms)
    _check_rotations(model, sites, freedoms, model.config, seed)
    if not indices:
        return _Heads(freedoms, {}, (*notes, "No calibration: heads were aligned by their weights alone."))
    with torch.no_grad(), second_moments(model, sites) as moments:
        for done, index in enumerate(indices, start=1):
            batch = rows.rows([index]).to(next(model.parameters()).device)
            model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
            if progress is not None:
                progress("calibration", done, len(indices))
    return _Heads(freedoms, moments, tuple(notes))


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


def _candidate(prepared: _Prepared, target: int, init: str, seed: int, grouping: str | None, query_heads: int | None) -> Regrouped:
    """The weights an init gives, rounded as they will be saved, in fp32."""
    from attnconvert.surgery.regroup import regroup

    heads = prepared.heads
    made = regroup(prepared.model, prepared.sites, heads.moments, heads.freedoms, target, init, seed, grouping=grouping, num_heads=query_heads)
    return replace(made, tensors={name: tensor.to(prepared.dtype).to(tensor.dtype) for name, tensor in made.tensors.items()})


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


def how_to_serve(family: str, shown: str) -> list[str]:
    """Lines with the command that serves a stock checkpoint; none where an engine would read other numbers of heads than its config says.

    Args:
        family: model_type.
        shown: the folder as the user would type it.
    """
    if family == "phi":  # vLLM's class for it takes as many KV heads as query heads, whatever num_key_value_heads says
        return []
    return ["", "Serve it:", "", f"  vllm serve {shlex.quote(shown)}"]


def what_next(report: RegroupReport, shown: str) -> str:
    """What changed, and how to load and serve the result, ready to be copied.

    Args:
        report: of a conversion.
        shown: its folder as the user would type it.
    """
    before, after = report.rows
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
        *how_to_serve(report.family, shown),
    ]
    return "\n".join(lines)
