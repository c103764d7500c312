"""Measure a converted model against its teacher: perplexity, KL, agreement, the same by position, branch ablations, recall, decode state.

Shapes: B rows, T tokens per row, V vocabulary, E hidden_size, M valid positions of a batch, N rows in all, P position buckets.

What the figures mean:

- Perplexity, KL and agreement are token-weighted over the positions that have a next token in the same document. Their intervals come from
  a bootstrap over rows, because tokens of one row share a document and are not independent draws.
- By position: the same figures for tokens that stand 0-64, 64-128, 128-256, ... tokens after the beginning of their document. A window is exact
  near the beginning, so what an old token costs shows here and not in the mean.
- Passkey recall (recall.py) ranks the right key among ten by log-probability. It is a test of memory beyond the window only where the key lies
  further back than the window reaches; `PasskeyResult.beyond_window` says so. A stack of L window layers can hand information on up to L
  windows deep, so read it next to the same figure with the linear branch switched off.
- Findings (verdict.py) are sentences about figures that say that something is wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from attnconvert.convert.recall import MqarResult, NeedleResult, PasskeyResult, measure_recall, tokens_per_forward
from attnconvert.convert.verdict import find_problems
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry
from attnconvert.surgery.plan import ConversionPlan
from attnconvert.surgery.sites import Site

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnconvert.distill.config import EvalConfig
    from attnconvert.distill.data import Batch, PackedRows

EVAL_SCHEMA_VERSION = 2
READS_SCHEMA_VERSIONS = (1, 2)
"""Version 1 has no positions, needles, mqar, fidelity, generation, tasks and findings; they are empty then."""
NUM_RESAMPLES = 2000
FIRST_BUCKET = 64
"""Tokens of the first position bucket; each later one ends at twice the position where it starts."""
# Elements of one fp32 [positions, V] block: 128 MiB, about four of them live at once.
LOGITS_BUDGET = 2**25

EvalProgress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""
Ablation = Callable[[], AbstractContextManager[Any]]


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: the figure over all rows.
        se: bootstrap standard error; None with fewer than two rows.
        ci95: 95 % bootstrap percentile interval; None with fewer than two rows.
    """

    value: float
    se: float | None = None
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Quality:
    """Held-out quality of one model on the rows that all models of the report share.

    Attributes:
        name: `teacher`, `student`, the name of an ablation of the student, or of another model that was passed.
        kind: `teacher`, `student`, `ablation` or `other`.
        nll: nats per token against the text.
        ppl: exp(nll).
        ppl_ratio: ppl / teacher's ppl, resampled in pairs; None for the teacher and without one.
        kl: KL(teacher || model), nats per token; None for the teacher and without one.
        agreement: share of positions where model and teacher have the same most likely token; None as for kl.
        kl_change: for an ablation, its kl minus the student's, resampled in pairs: what the part that is switched off does. None otherwise.
    """

    name: str
    kind: str
    nll: Estimate
    ppl: Estimate
    ppl_ratio: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None
    kl_change: Estimate | None = None


@dataclass(frozen=True)
class PositionQuality:
    """Held-out quality of one model on the tokens that stand [start, stop) tokens after the beginning of their document.

    Attributes:
        name: the model, as in `Quality.name`.
        start: fewest tokens of the document before the token that predicts.
        stop: end of the bucket, exclusive.
        num_tokens: positions scored.
        nll: nats per token against the text.
        ppl: exp(nll).
        ppl_ratio: ppl / teacher's ppl in this bucket; None for the teacher and without one.
        kl: KL(teacher || model), nats per token; None as for ppl_ratio.
    """

    name: str
    start: int
    stop: int
    num_tokens: int
    nll: float
    ppl: float
    ppl_ratio: float | None
    kl: float | None


@dataclass(frozen=True)
class StateBytes:
    """Bytes the decode cache of one sequence holds after a prefill of `length` tokens; `teacher` is None when it was not loaded."""

    length: int
    student: int
    teacher: int | None


@dataclass(frozen=True)
class EvalReport:
    """Everything `evaluate_models` measured. `to_dict` is strict JSON (a figure that is not finite becomes null).

    Attributes:
        num_rows: evaluation rows.
        row_length: tokens per row.
        num_tokens: positions scored, the same for every model.
        quality: teacher first (when there is one), then the student, its ablations, other models.
        passkey: one entry per model and length.
        state_bytes: one entry per length.
        notes: what was left out, and why, as sentences.
        window: window in tokens the passkey distances are set by, None when not given.
        device: where the models ran.
        dtype: data type of the student's first parameter.
        seconds: wall-clock seconds of each part.
        seed: seed of the bootstrap and of the passkey prompts.
        config: the EvalConfig as JSON.
        recurrent: no layer's cache grows with the context, so the student's must not; None when the student has no plan.
        positions: one entry per model and bucket of positions that holds a token.
        needles: one entry per model and cell of the heat map.
        mqar: one entry per model and number of pairs.
        fidelity: what `fidelity.attention_fidelity` returned, {} when not measured.
        generation: what `fidelity.side_by_side` returned.
        tasks: what `tasks.run_tasks` returned.
        findings: what `verdict.find_problems` makes of all the others.
    """

    num_rows: int
    row_length: int
    num_tokens: int
    quality: tuple[Quality, ...]
    passkey: tuple[PasskeyResult, ...]
    state_bytes: tuple[StateBytes, ...]
    notes: tuple[str, ...]
    window: int | None
    device: str
    dtype: str
    seconds: dict[str, float]
    seed: int
    config: dict[str, Any]
    recurrent: bool | None = None
    positions: tuple[PositionQuality, ...] = ()
    needles: tuple[NeedleResult, ...] = ()
    mqar: tuple[MqarResult, ...] = ()
    fidelity: dict[str, Any] = field(default_factory=dict)
    generation: tuple[dict[str, Any], ...] = ()
    tasks: tuple[dict[str, Any], ...] = ()
    findings: tuple[dict[str, Any], ...] = ()

    def quality_of(self, name: str) -> Quality:
        """The quality entry called `name`; KeyError when there is none."""
        for row in self.quality:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` is the inverse up to non-finite figures."""
        return {"schema_version": EVAL_SCHEMA_VERSION, **json_safe(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalReport:
        """Inverse of `to_dict`. Raises ValueError for a schema version this attnconvert does not know."""
        if data.get("schema_version") not in READS_SCHEMA_VERSIONS:
            known = ", ".join(map(str, READS_SCHEMA_VERSIONS))
            raise ValueError(f"evaluation has schema_version {data.get('schema_version')!r}, this attnconvert reads {known}")
        own = ("schema_version", "quality", "passkey", "state_bytes", "positions", "needles", "mqar")
        rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key not in own}
        return cls(
            quality=tuple(_quality_from_dict(row) for row in data["quality"]),
            passkey=tuple(PasskeyResult(**{**row, **{key: tuple(row[key]) for key in ("ci95", "by_third", "distance")}}) for row in data["passkey"]),
            state_bytes=tuple(StateBytes(**row) for row in data["state_bytes"]),
            positions=tuple(PositionQuality(**{**row, **{key: _number(row[key]) for key in ("nll", "ppl")}}) for row in data.get("positions", ())),
            needles=tuple(NeedleResult(**{**row, "ci95": tuple(row["ci95"])}) for row in data.get("needles", ())),
            mqar=tuple(MqarResult(**{**row, "ci95": tuple(row["ci95"])}) for row in data.get("mqar", ())),
            **rest,
        )

    def with_findings(self) -> EvalReport:
        """The same report with the findings that its figures give now."""
        return replace(self, findings=tuple(find_problems(self.to_dict())))


def json_safe(value: Any) -> Any:
    """Copy of a JSON-like value with tuples as lists, numpy scalars as Python's, and non-finite floats as None."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float | None) -> float:
    """The inverse of what `json_safe` does to a figure that must be there."""
    return math.nan if value is None else float(value)


def _estimate_from_dict(data: Mapping[str, Any]) -> Estimate:
    ci95 = None if data["ci95"] is None else (_number(data["ci95"][0]), _number(data["ci95"][1]))
    return Estimate(value=_number(data["value"]), se=data["se"], ci95=ci95)


def _quality_from_dict(data: Mapping[str, Any]) -> Quality:
    optional = {key: None if data.get(key) is None else _estimate_from_dict(data[key]) for key in ("ppl_ratio", "kl", "agreement", "kl_change")}
    return Quality(name=data["name"], kind=data["kind"], nll=_estimate_from_dict(data["nll"]), ppl=_estimate_from_dict(data["ppl"]), **optional)


# ---------------------------------------------------------------- the whole evaluation


def evaluate_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: PackedRows,
    config: EvalConfig,
    *,
    device: torch.device | str,
    window: int | None,
    ablations: Mapping[str, Ablation],
    progress: EvalProgress | None = None,
    others: Mapping[str, PreTrainedModel] | None = None,
    seed: int = 0,
) -> EvalReport:
    """Measure the student, its ablations and other models against the teacher.

    The models must already be on `device`; they are put into eval mode for the time of the call and get no gradients.

    Args:
        student: the converted causal LM.
        teacher: the model it was converted from, or None when it cannot be loaded: then there are student figures only.
        tokenizer: the student's tokenizer, for the passkey prompts.
        rows: held-out packed rows [N, T]; the first ceil(config.tokens / T) of them are used.
        config: how many tokens, which tests, lengths and trials.
        device: where inputs are sent.
        window: `window.size` of the recipe in tokens, None when there is no single one. Sets default passkey lengths and key distances.
        ablations: name -> function giving a context manager that changes the student while it is open. It is entered once per batch and
            must leave the output embeddings alone.
        progress: told about each batch.
        others: name -> further models measured the same way, such as the softmax teacher finetuned on the same data.
        seed: seed of the bootstrap and of the passkey prompts.

    Raises:
        AttnConvertError: `no-eval-tokens` when the rows hold nothing to predict, `vocab-mismatch` when models have different vocabularies.
    """
    device = torch.device(device)
    others = dict(others or {})
    variants = _variants(student, teacher, ablations, others)
    notes: list[str] = []
    if teacher is None:
        notes.append("The teacher could not be loaded: KL, agreement and ratios are missing, and the student's figures stand alone.")
    seconds: dict[str, float] = {}
    models = [student, *([teacher] if teacher is not None else []), *others.values()]
    with eval_mode(models), torch.no_grad():
        start = time.perf_counter()
        measured = _measure_rows(variants, rows, config, device, progress)
        quality = _quality(variants, measured, seed)
        positions = _positions(variants, measured)
        seconds["quality"] = time.perf_counter() - start

        start = time.perf_counter()
        lengths = _usable_lengths(config, window, models, notes)
        passkey, needles, mqar = measure_recall(
            variants,
            tokenizer,
            lengths,
            config,
            window=window,
            max_length=_max_length(models),
            device=device,
            seed=seed,
            progress=progress,
            notes=notes,
        )
        seconds["recall"] = time.perf_counter() - start

        start = time.perf_counter()
        state_bytes = _state_bytes(student, teacher, rows.input_ids.flatten(), _state_lengths(lengths, config, models), device, progress)
        seconds["state_bytes"] = time.perf_counter() - start
    report = EvalReport(
        num_rows=len(measured.num_targets),
        row_length=int(rows.input_ids.shape[1]),
        num_tokens=int(measured.num_targets.sum()),
        quality=quality,
        passkey=passkey,
        state_bytes=state_bytes,
        notes=tuple(notes),
        window=window,
        device=device_name(device),
        dtype=str(next(student.parameters()).dtype).removeprefix("torch."),
        seconds={key: round(value, 3) for key, value in seconds.items()},
        seed=seed,
        config=config.model_dump(mode="json"),
        recurrent=_is_recurrent(student, window),
        positions=positions,
        needles=needles,
        mqar=mqar,
    )
    return report.with_findings()


def _is_recurrent(student: PreTrainedModel, window: int | None) -> bool | None:
    """Whether the plan promises a cache that stops growing after a few windows; None without a plan, or where it cannot be told."""
    plan = getattr(student.config, "attn_plan", None)
    if plan is None:
        return None
    for row in ConversionPlan.from_dict(plan).layers:
        if row.method is None:
            return False
        if "alphas" in row.config and window is None:  # spans of several lengths: each head stops elsewhere, if at all
            return None
        method = registry.get(row.method)
        site = Site(row.layer_idx, row.path, "", row.num_heads, row.num_key_value_heads, row.head_dim, scaling=1.0)
        try:
            config = method.config.model_validate(row.config)
        except ValidationError:  # the plan holds the core's settings, which need not be those of the method
            return None
        # Far beyond any window, so that only what grows for ever still grows.
        before, after = (method.cost(config, site, length, 2).state_bytes for length in (2**24, 2**25))
        if after > before:
            return False
    return True


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the accelerator."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class Variant:
    """A model as it is measured: its name and kind (see `Quality`), the model, and the context it runs in."""

    name: str
    kind: str
    model: PreTrainedModel
    context: Ablation


def _variants(
    student: PreTrainedModel, teacher: PreTrainedModel | None, ablations: Mapping[str, Ablation], others: Mapping[str, PreTrainedModel]
) -> list[Variant]:
    variants = [Variant("teacher", "teacher", teacher, nullcontext)] if teacher is not None else []
    variants.append(Variant("student", "student", student, nullcontext))
    variants += [Variant(name, "ablation", student, context) for name, context in ablations.items()]
    variants += [Variant(name, "other", model, nullcontext) for name, model in others.items()]
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names), f"two variants share a name: {names}"
    vocabularies = {variant.name: _vocab_size(variant.model) for variant in variants}
    if len(set(vocabularies.values())) > 1:
        raise AttnConvertError(
            "vocab-mismatch",
            f"the models to compare have different vocabularies: {vocabularies}",
            expected="the teacher the student was converted from",
            hint="KL and agreement compare next-token distributions, so both models must use the same tokenizer.",
        )
    return variants


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


@contextmanager
def eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode inside, every module's own training flag back afterwards (a finetuned model may mix both)."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


# ---------------------------------------------------------------- perplexity, KL, agreement


@dataclass(frozen=True)
class _Measured:
    """Sums per row and position bucket. `num_targets` [N, P]; per variant `nll`, `kl`, `agree` [N, P], kl and agree empty without a teacher."""

    num_targets: NDArray[np.float64]
    nll: dict[str, NDArray[np.float64]]
    kl: dict[str, NDArray[np.float64]]
    agree: dict[str, NDArray[np.float64]]


def _measure_rows(variants: Sequence[Variant], rows: PackedRows, config: EvalConfig, device: torch.device, progress: EvalProgress | None) -> _Measured:
    """One pass over the rows with every variant, batch by batch, so that the teacher runs once however many ablations there are."""
    available, length = rows.input_ids.shape
    num_rows = min(available, -(-config.tokens // length))
    heads_split = {}
    for variant in variants:
        with variant.context():
            heads_split[variant.name] = head_is_separate(variant.model, device)
    # Without a separate head, whole rows of logits are held, so one row at a time.
    batch_size = max(1, tokens_per_forward(device) // length) if all(heads_split.values()) else 1
    parts: list[dict[str, NDArray[np.float64]]] = []
    for first in range(0, num_rows, batch_size):
        batch = rows.rows(range(first, min(first + batch_size, num_rows)))
        parts.append(_measure_batch(variants, heads_split, batch, device))
        if progress is not None:
            progress("held-out text", min(first + batch_size, num_rows), num_rows)
    sums = {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}
    if not parts or sums["num_targets"].sum() == 0:
        raise AttnConvertError(
            "no-eval-tokens",
            f"the held-out data holds no token to predict ({num_rows} rows of {length})",
            expected="at least one row with two tokens of one document",
            hint="Give more held-out text (data.eval_source or data.eval_fraction) or a larger evaluation.tokens.",
        )

    def pick(what: str) -> dict[str, NDArray[np.float64]]:
        return {variant.name: sums[f"{what}/{variant.name}"] for variant in variants if f"{what}/{variant.name}" in sums}

    return _Measured(num_targets=sums["num_targets"], nll=pick("nll"), kl=pick("kl"), agree=pick("agree"))


def head_is_separate(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether logits = output_embeddings(base_model(x)), bit for bit, with nothing in between or after (softcap, logit scale).

    Then logits can be computed for a few positions at a time. Found by trying, so that no family needs naming; a no costs memory, not truth.
    """
    head, base = _head(model), model.base_model
    if head is None or base is model:
        return False
    input_ids = torch.arange(8, device=device)[None] % _vocab_size(model)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=device)
    hidden = getattr(base(input_ids=input_ids, position_ids=position_ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return False
    return torch.equal(head(hidden), model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits)


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _measure_batch(variants: Sequence[Variant], heads_split: Mapping[str, bool], batch: Batch, device: torch.device) -> dict[str, NDArray[np.float64]]:
    targets_BT = batch.targets()
    valid_BT = targets_BT != -100
    num_rows, length = targets_BT.shape
    num_buckets = _bucket_of(np.array([length]))[0] + 1
    cell_of_M = valid_BT.nonzero()[:, 0].numpy() * num_buckets + _bucket_of(batch.position_ids[valid_BT].numpy())
    targets_M = targets_BT[valid_BT].to(device)
    input_ids, position_ids, valid = batch.input_ids.to(device), batch.position_ids.to(device), valid_BT.to(device)

    outputs: dict[str, torch.Tensor] = {}  # [M, E] before the head, or [M, V] logits
    for variant in variants:
        with variant.context():
            # No attention_mask: stock models then build the block-diagonal mask from position_ids, converted ones do the same.
            if heads_split[variant.name]:
                out = variant.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            else:
                out = variant.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        outputs[variant.name] = out[valid]

    pieces: dict[str, list[torch.Tensor]] = {}
    step = max(1, LOGITS_BUDGET // _vocab_size(variants[0].model))
    for start in range(0, len(targets_M), step):
        teacher_logp = None
        for variant in variants:
            out = outputs[variant.name][start : start + step]
            logits = _head(variant.model)(out) if heads_split[variant.name] else out
            logp = F.log_softmax(logits.float(), dim=-1)
            pieces.setdefault(f"nll/{variant.name}", []).append(-logp.gather(1, targets_M[start : start + step, None])[:, 0])
            if variant.kind == "teacher":
                teacher_logp, teacher_top, teacher_p = logp, logp.argmax(dim=-1), logp.exp()
            elif teacher_logp is not None:
                # p (log p - log q), with 0 where p underflows to 0, whatever log q is.
                kl = torch.where(teacher_p > 0, teacher_p * (teacher_logp - logp), 0.0).sum(dim=-1)
                pieces.setdefault(f"kl/{variant.name}", []).append(kl)
                pieces.setdefault(f"agree/{variant.name}", []).append(logp.argmax(dim=-1) == teacher_top)
    values = {key: torch.cat(piece).cpu().double().numpy() for key, piece in pieces.items()}
    values["num_targets"] = np.ones(len(cell_of_M))
    size = num_rows * num_buckets
    return {key: np.bincount(cell_of_M, weights=value, minlength=size).astype(np.float64).reshape(num_rows, num_buckets) for key, value in values.items()}


def _bucket_of(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 for positions below 64, 1 below 128, 2 below 256, ..."""
    return np.searchsorted(FIRST_BUCKET * 2 ** np.arange(40), positions, side="right")


def _positions(variants: Sequence[Variant], measured: _Measured) -> tuple[PositionQuality, ...]:
    num_targets = measured.num_targets.sum(axis=0)
    results = []
    for variant in variants:
        # A model that is off enough overflows exp; the figure is then inf and says so.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            nll = measured.nll[variant.name].sum(axis=0) / num_targets
            ratio = np.exp(nll - measured.nll["teacher"].sum(axis=0) / num_targets) if variant.name in measured.kl else None
            kl = measured.kl[variant.name].sum(axis=0) / num_targets if variant.name in measured.kl else None
            ppl = np.exp(nll)
        for bucket in np.flatnonzero(num_targets):
            results.append(
                PositionQuality(
                    name=variant.name,
                    start=FIRST_BUCKET * 2 ** int(bucket - 1) if bucket else 0,
                    stop=FIRST_BUCKET * 2 ** int(bucket),
                    num_tokens=int(num_targets[bucket]),
                    nll=float(nll[bucket]),
                    ppl=float(ppl[bucket]),
                    ppl_ratio=None if ratio is None else float(ratio[bucket]),
                    kl=None if kl is None else float(kl[bucket]),
                )
            )
    return tuple(results)


def _quality(variants: Sequence[Variant], measured: _Measured, seed: int) -> tuple[Quality, ...]:
    num_targets_N = measured.num_targets.sum(axis=1)
    num_rows = len(num_targets_N)
    # The same resamples for every figure and model: ratios are of paired rows.
    weights = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES) if num_rows > 1 else None

    def estimate(sums_NP: NDArray[np.float64], transform: Callable[[Any], Any]) -> Estimate:
        # A model that is off enough overflows exp; the figure is then inf and says so.
        with np.errstate(over="ignore", invalid="ignore"):
            sums_N = sums_NP.sum(axis=1)
            value = float(transform(sums_N.sum() / num_targets_N.sum()))
            if weights is None:
                return Estimate(value)
            samples = transform((weights @ sums_N) / np.maximum(weights @ num_targets_N, 1))
            low, high = np.percentile(samples, [2.5, 97.5])
            return Estimate(value, se=float(np.std(samples, ddof=1)), ci95=(float(low), float(high)))

    def identity(x: Any) -> Any:
        return x

    rows = []
    for variant in variants:
        nll = measured.nll[variant.name]
        against = variant.name in measured.kl
        rows.append(
            Quality(
                name=variant.name,
                kind=variant.kind,
                nll=estimate(nll, identity),
                ppl=estimate(nll, np.exp),
                ppl_ratio=estimate(nll - measured.nll["teacher"], np.exp) if against else None,
                kl=estimate(measured.kl[variant.name], identity) if against else None,
                agreement=estimate(measured.agree[variant.name], identity) if against else None,
                kl_change=estimate(measured.kl[variant.name] - measured.kl["student"], identity) if against and variant.kind == "ablation" else None,
            )
        )
    return tuple(rows)


# ---------------------------------------------------------------- lengths


def _max_length(models: Sequence[PreTrainedModel]) -> int | None:
    """The smallest max_position_embeddings of the models, None when none of them has a limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min((int(limit) for limit in limits if limit), default=None)


def _usable_lengths(config: EvalConfig, window: int | None, models: Sequence[PreTrainedModel], notes: list[str]) -> list[int]:
    """The passkey lengths of the config (by default multiples of the window), less those beyond what the models were built for."""
    base = window or max(16, config.length // 4)
    lengths = sorted(set(config.passkey_lengths or (base * windows for windows in config.passkey_windows)))
    limit = _max_length(models)
    too_long = [length for length in lengths if limit is not None and length > limit]
    if too_long and config.passkey_trials + config.needle_trials > 0:
        notes.append(f"Passkey lengths {', '.join(map(str, too_long))} were skipped: the models go up to max_position_embeddings = {limit}.")
    return [length for length in lengths if length not in too_long]


# ---------------------------------------------------------------- decode state


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors a cache holds: keys and values, states in attributes, dicts or lists, of every layer. Each tensor counts once."""
    tensors = {id(tensor): tensor for tensor in _tensors(cache)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, (Cache, CacheLayerMixin)):
        yield from _tensors(vars(value))


def _state_lengths(lengths: Sequence[int], config: EvalConfig, models: Sequence[PreTrainedModel]) -> list[int]:
    """The passkey lengths and the evaluation length, as far as the models go."""
    limit = _max_length(models)
    return sorted({*lengths, config.length if limit is None else min(config.length, limit)})


def _state_bytes(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    token_ids: torch.Tensor,
    lengths: Sequence[int],
    device: torch.device,
    progress: EvalProgress | None,
) -> tuple[StateBytes, ...]:
    """Prefill one sequence of each length and weigh the caches. Bytes do not depend on the text, so held-out tokens are repeated to fill up."""
    results = []
    for done, length in enumerate(lengths, start=1):
        input_ids = token_ids.repeat(-(-length // len(token_ids)))[:length].to(device=device, dtype=torch.int64)[None]

        def held(model: PreTrainedModel, input_ids: torch.Tensor = input_ids) -> int:
            return cache_bytes(model(input_ids=input_ids, use_cache=True, logits_to_keep=1).past_key_values)

        results.append(StateBytes(length=length, student=held(student), teacher=held(teacher) if teacher is not None else None))
        if progress is not None:
            progress("decode state", done, len(lengths))
    return tuple(results)
