"""Write a converted model so that it is either complete and proven to reload, or not there at all.

Everything is written into a folder beside the target, checked, synced to disk and renamed. Two checks stand before the rename:
`check_parity` (the ways to run the model agree with each other) and a reload in a fresh process that cannot import attnconvert.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from attnconvert.convert.report import format_bytes
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.blocks.rule import BlockRule
from attnconvert.kernels.span.reference import BETA_ONE
from attnconvert.surgery.runtime.heads import MixtureOfHeads
from attnconvert.surgery.runtime.modeling import converted_sites

if TYPE_CHECKING:
    import peft

FACTS_FILE = "attnconvert.json"
CORES_FILE = "cores.safetensors"
ADAPTERS_SCHEMA_VERSION = 1
OWN_FILES = ("config.json", FACTS_FILE)
"""A folder that holds one of these is a checkpoint or an adapters folder; nothing else is ever replaced."""

PARITY_TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3, torch.float16: 1e-1, torch.bfloat16: 6e-1}
"""Largest difference of a logit allowed between two ways to run the model, as a share of the logits' standard deviation. Measured on CPU: in fp32
7e-6 on the embedded model and 2e-5 on SmolLM2-135M (3e-4 where the conversion leaves noise only), in bf16 7e-2 and 2.5e-1. A decode step that
forgets a single key of the window differs by 0.5 or more."""

_DECODE_STEPS = 8
_MAX_PARITY_TOKENS = 4096
_GREEDY_TOKENS = 12
_RELOAD_TOKENS = 48
_SAMPLES = 1024


# ---------------------------------------------------------------- whole folders


def save_checkpoint(model: Any, tokenizer: Any, out: Path, *, dtype: torch.dtype, extra_files: Mapping[str, str], overwrite: bool = False) -> None:
    """Write a complete checkpoint: safetensors, config, generation config, tokenizer, extra files; with the plan and code where the model has cores.

    Args:
        model: a converted transformers model, adapters merged. It ends on the CPU with its weights in `dtype`.
        tokenizer: its tokenizer.
        out: the folder to create; its parent exists.
        dtype: data type of the weights on disk; the attention cores stay fp32.
        extra_files: relative path -> text of further files.
        overwrite: replace a checkpoint that is there; the old one goes only after the new one is complete.

    Raises:
        AttnConvertError: `parity-failed`, `reload-failed`, `disk-full`, `cannot-write`, `output-not-empty`, `output-not-ours`; nothing is left behind.
    """
    check_output(out, overwrite=overwrite)
    model.eval()
    cast_weights(model, dtype)
    check_parity(model)
    model.to("cpu")
    with new_folder(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_texts(folder, extra_files)
        if not _is_ours(model):
            check_stock(folder, model)
        check_reload(model, folder)


def _is_ours(model: Any) -> bool:
    """Whether the model has attention cores, and its checkpoint therefore code."""
    return getattr(model.config, "attn_plan", None) is not None


def check_stock(folder: Path, model: Any) -> None:
    """What was saved of a model without attention cores needs no code but transformers'."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config, "the checkpoint asks for remote code"
    assert config["architectures"] == [type(model).__name__], "the architecture changed"
    assert not list(folder.glob("*.py")), "the checkpoint carries code"


def save_adapters(
    model: peft.PeftModel, out: Path, *, base_name: str, revision: str | None, facts: Mapping[str, Any], extra_files: Mapping[str, str], overwrite: bool = False
) -> None:
    """Write what the conversion added, a few MB: LoRA in peft's format, the attention cores, and the facts `merge` needs.

    Args:
        model: the converted model with its adapters, as `add_lora` returned it.
        out: the folder to create; its parent exists.
        base_name: the name by which the base model is found again.
        revision: its Hub revision.
        facts: contents of attnconvert.json (see `merge.Adapters`).
        extra_files: relative path -> text of further files.
        overwrite: as for `save_checkpoint`.

    Raises:
        AttnConvertError: `disk-full`, `cannot-write`, `output-not-empty`, `output-not-ours`; nothing is left behind.
    """
    check_output(out, overwrite=overwrite)
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = base_name, revision
    base = model.get_base_model()
    cores = {
        f"{path}.core.{name}": parameter.detach().cpu().contiguous()
        for _, path, module in converted_sites(base)
        for name, parameter in cast(nn.Module, module.core).state_dict().items()
    }
    with new_folder(out, overwrite=overwrite) as folder:
        # Left to itself peft compares the vocabulary with the base model's config on the Hub.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's template of a model card, all of it blank
        save_file(cores, str(folder / CORES_FILE), metadata={"format": "pt"})
        _write_texts(folder, {FACTS_FILE: json.dumps(facts, indent=2, allow_nan=False) + "\n", **extra_files})


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse a target that cannot become the output folder.

    Raises:
        AttnConvertError: `output-not-a-folder`, `output-not-empty`, `output-not-ours` (would be replaced, but is no checkpoint).
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise AttnConvertError(
            "output-not-a-folder", f"{str(out)!r} is a file", expected="the name of a folder that does not exist yet", hint="choose another name"
        )
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not overwrite:
        raise AttnConvertError(
            "output-not-empty",
            f"the output folder {str(out)!r} is not empty",
            expected="a new or empty folder",
            hint="choose another name, or replace it with --overwrite",
        )
    if not names & set(OWN_FILES):
        raise AttnConvertError(
            "output-not-ours",
            f"{str(out)!r} holds no checkpoint, so it is not replaced",
            where=", ".join(sorted(names)[:4]),
            expected=f"a folder with one of {', '.join(OWN_FILES)}",
            hint="choose another name, or remove the folder yourself",
        )


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out`, synced to disk, when the block ends well, and is removed when not.

    Raises:
        AttnConvertError: `disk-full`, `cannot-write`.
    """
    with disk_errors(out):
        discard_leftovers(out)
        folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-{os.getpid()}-", dir=out.parent))
    try:
        with disk_errors(out):
            yield folder
            _settle(folder)
            _install(folder, out, overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Readable by others (mkdtemp and safetensors make private files), and on the disk rather than in its cache."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _install(folder: Path, out: Path, overwrite: bool) -> None:
    old: Path | None = None
    if out.is_dir():
        if any(out.iterdir()):
            check_output(out, overwrite=overwrite)
            # A folder cannot be replaced in one step. Between these two renames the old one is still there, under this name.
            old = out.with_name(f"{out.name}.old-{os.getpid()}")
            os.rename(out, old)
        else:
            out.rmdir()
    try:
        os.rename(folder, out)
    except OSError:
        if old is not None:
            os.rename(old, out)
        raise
    _sync(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def discard_leftovers(out: Path) -> None:
    """Remove the half-written folders that processes which no longer exist left beside `out`."""
    for path in out.parent.glob(f"{_literal(out.name)}.*-*"):
        kind, _, rest = path.name[len(out.name) + 1 :].partition("-")
        pid = rest.split("-")[0]
        if kind not in ("tmp", "old") or not pid.isdigit() or _alive(int(pid)):
            continue
        if kind == "old" and not out.exists():
            os.rename(path, out)  # killed between the two renames of a replacement
        else:
            shutil.rmtree(path, ignore_errors=True)


def _literal(name: str) -> str:
    """`name` with glob's special characters made plain."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says about the disk into AttnConvertError `disk-full` or `cannot-write`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text or "No space left" in text
        if not full and isinstance(error, SafetensorError) and "os error" not in text.lower() and "I/O" not in text:
            raise
        if full:
            free = format_bytes(shutil.disk_usage(out.parent).free) if out.parent.is_dir() else "unknown"
            raise AttnConvertError(
                "disk-full", f"the disk is full ({free} free)", where=str(out), hint="make room and run again with --resume; nothing was left half written"
            ) from error
        raise AttnConvertError("cannot-write", f"cannot write the output: {getattr(error, 'strerror', None) or text}", where=str(out)) from error


def _write_texts(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        assert path.resolve().is_relative_to(folder.resolve()), f"{name} leaves the folder"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------- weights


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights in place, each rounded once; what the model keeps in fp32 (the attention cores) and non-persistent buffers stay.

    Not `model.to(dtype)`: that also rounds the rotary frequencies, and the result would differ from a reload.
    """
    in_fp32 = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) | {"core"}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not in_fp32.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes and up to 1024 values of every tensor of an unconverted model.

    Any finetune of the model changes it, and it costs a second where hashing 16 GB would cost a minute. It depends on the data type.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        # Ends included: spread evenly from the first element to the last.
        index = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLES, flat.numel()), dtype=torch.float64).round().long().clamp_max(max(0, flat.numel() - 1))
        values = flat[index.to(flat.device)].double().cpu().contiguous()
        digest.update(f"{name}:{list(tensor.shape)}:".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _wide_weights(model: nn.Module) -> Iterator[None]:
    """Inside, 16-bit weights are held in fp32 (exact, and back exactly) when memory allows, so that rounding cannot hide a mistake.

    All in fp64 where layers choose blocks or heads: a choice between two that score alike turns with the last bits, and in fp32 one in some ten thousand does.
    """
    wide = torch.float64 if _choosing(model) or _routing(model) else torch.float32
    narrow = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dtype.itemsize < wide.itemsize]
    needed = sum(t.numel() * wide.itemsize for t in narrow)
    if not narrow or needed > 0.8 * _free_memory(narrow[0].device):
        yield
        return
    dtypes = [t.dtype for t in narrow]
    try:
        for t in narrow:
            t.data = t.data.to(wide)
        yield
    finally:
        for t, dtype in zip(narrow, dtypes, strict=True):
            t.data = t.data.to(dtype)


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not every system says
        return float("inf")


# ---------------------------------------------------------------- parity


@dataclass(frozen=True)
class Parity:
    """What `check_parity` measured.

    Attributes:
        errors: way to run the model -> largest difference of a logit from the plain forward pass, as a share of the logits' standard deviation.
        tolerance: the bound they were held to.
        dtype: data type of the computation.
        num_tokens: length of the sequence.
    """

    errors: dict[str, float]
    tolerance: float
    dtype: torch.dtype
    num_tokens: int


@torch.no_grad()
def check_parity(model: Any) -> Parity:
    """Run the model in every way that generation may, and compare: plain forward, prefill + decode steps, chunked prefill, left-padded batch.

    The sequence is three windows long, the steps cross the end of a window block, and the rows of the batch cross theirs at other steps. Attention spans of
    thousands of tokens would need a sequence of thousands to drop a key: they are checked with all fixed parts of their windows made shorter alike, and layers
    that choose blocks with blocks so few and small that there is something to choose from. Where the weights do not fit into memory in fp64, layers that choose
    use all they could choose from.

    Args:
        model: a converted causal LM in eval mode, on any device.

    Raises:
        AttnConvertError: `parity-failed`, naming the way that differs and by how much.
    """
    device = next(model.parameters()).device
    size = _probe_window(model)
    limit = int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or _MAX_PARITY_TOKENS)
    num_tokens = min(3 * size + 5, limit, _MAX_PARITY_TOKENS)
    prefill = num_tokens - _DECODE_STEPS
    assert prefill > 3, f"a model of {limit} positions is too short to check"
    pads = sorted({0, 3, min(size + 3, prefill - 1)})
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(0, vocab, (len(pads), num_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.stack([(torch.arange(num_tokens) >= pad).long() for pad in pads]).to(device)

    with _wide_weights(model), _plain_arithmetic(model), _short_spans(model, size), _few_blocks(model), _sure_heads(model):
        want = [model(**_inputs(model, ids[row : row + 1, pad:]), use_cache=False).logits[0].float() for row, pad in enumerate(pads)]
        dtype = next(p.dtype for p in model.get_output_embeddings().parameters())
        deviation = float(want[0].std())

        def error(logits: Tensor, row: int) -> float:
            return float((logits.float() - want[row]).abs().max()) / deviation

        errors = {}
        steps = _cached(model, ids[:1], None, [prefill] + [1] * _DECODE_STEPS)
        errors["prefill + decode steps"] = error(steps[0], 0)
        # Uneven pieces: shorter than a window, a window, one token, the rest.
        pieces = [n for n in (7, min(size, max(1, num_tokens - 16)), 1) if n > 0]
        pieces = [*pieces, num_tokens - sum(pieces)]
        errors["chunked prefill"] = error(_cached(model, ids[:1], None, pieces)[0], 0)
        padded = _cached(model, ids, mask, [prefill] + [1] * _DECODE_STEPS)
        errors["left-padded batch"] = max(error(padded[row, pad:], row) for row, pad in enumerate(pads))
        plain = model(**_inputs(model, ids, mask), use_cache=False).logits
        errors["left-padded batch without cache"] = max(error(plain[row, pad:], row) for row, pad in enumerate(pads))
    tolerance = PARITY_TOLERANCE[dtype]
    found = Parity(errors, tolerance, dtype, num_tokens)
    bad = {way: value for way, value in errors.items() if not value <= tolerance}
    if bad:
        ways = ", ".join(f"{way} by {value:.2g}" for way, value in bad.items())
        raise AttnConvertError(
            "parity-failed",
            f"the converted model gives other logits when it is run differently: {ways} standard deviations",
            where=f"{type(model).__name__}, {num_tokens} tokens, {str(dtype).removeprefix('torch.')}",
            expected=f"differences up to {tolerance:g} from the plain forward pass",
            hint="this is a fault of attnconvert, not of your settings: please report the model and the recipe. Nothing was saved",
        )
    return found


def _probe_window(model: Any) -> int:
    plan = getattr(model.config, "attn_plan", None) or {"layers": []}
    windows = [row["config"].get("window") for row in plan["layers"] if row["method"] is not None]
    return max([int(window["size"]) for window in windows if isinstance(window, Mapping)] + [0]) or 64


def _inputs(model: Any, ids: Tensor, mask: Tensor | None = None, past: int = 0) -> dict[str, Tensor]:
    """Forward arguments for `ids` [B, T], the tokens after `past`; `mask` [B, past + T]."""
    arguments: dict[str, Tensor] = {"input_ids": ids}
    if mask is not None:
        arguments["attention_mask"] = mask
        if "position_ids" in inspect.signature(model.forward).parameters:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, past:]
    return arguments


def _cached(model: Any, ids: Tensor, mask: Tensor | None, pieces: Sequence[int]) -> Tensor:
    """Logits [B, T, V] of `ids` fed through the cache in `pieces` tokens at a time."""
    cache, out, at = None, [], 0
    for n in pieces:
        inputs = _inputs(model, ids[:, at : at + n], None if mask is None else mask[:, : at + n], at)
        part = model(**inputs, past_key_values=cache, use_cache=True)
        cache = part.past_key_values
        out.append(part.logits)
        at += n
    assert at == ids.shape[1], "the pieces do not add up"
    return torch.cat(out, 1)


@contextlib.contextmanager
def _plain_arithmetic(model: Any) -> Iterator[None]:
    """Inside, no TF32 and no compiled kernels: every shape here is new, and rounding must not look like a mistake."""
    cores: list[Any] = [module.core for _, _, module in converted_sites(model)]
    compiled = [core.compile_kernel for core in cores]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        for core in cores:
            core.compile_kernel = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for core, value in zip(cores, compiled, strict=True):
            core.compile_kernel = value


@contextlib.contextmanager
def _short_spans(model: Any, size: int) -> Iterator[None]:
    """Inside, the fixed parts of all attention spans are at most `size` tokens, in the same proportions, and so many tokens are sinks at most."""
    cores: list[Any] = [module.core for _, _, module in converted_sites(model) if hasattr(module.core, "set_rules")]
    rules = [(core.alphas, [beta / BETA_ONE for beta in core.betas], core.min_length, core.num_sinks) for core in cores]
    longest = max((abs(tokens) for core in cores for tokens in (*core.alphas, *core.leasts)), default=0)

    def shorter(tokens: int) -> int:
        return tokens if longest <= size else tokens * size // longest

    try:
        for core, (alphas, betas, min_length, num_sinks) in zip(cores, rules, strict=True):
            core.min_length, core.num_sinks = shorter(min_length), min(num_sinks, size)
            core.set_rules([shorter(alpha) for alpha in alphas], betas)
        yield
    finally:
        for core, (alphas, betas, min_length, num_sinks) in zip(cores, rules, strict=True):
            core.min_length, core.num_sinks = min_length, num_sinks
            core.set_rules(alphas, betas)


_PROBE_BLOCK, _PROBE_DENSE = 32, 150  # of 197 tokens, in 7 blocks, the queries of the last 48 choose


def _choosing(model: nn.Module) -> list[Any]:
    """The cores that choose blocks of keys."""
    return [module.core for _, _, module in converted_sites(model) if isinstance(getattr(module.core, "rule", None), BlockRule)]


def _routing(model: nn.Module) -> list[Any]:
    """The cores that choose heads."""
    return [module.core for _, _, module in converted_sites(model) if isinstance(module.core, MixtureOfHeads)]


@contextlib.contextmanager
def _sure_heads(model: nn.Module) -> Iterator[None]:
    """Inside, layers that choose heads use all of them where the weights are not in fp64, see `_wide_weights`."""
    cores = [] if all(p.dtype == torch.float64 for p in model.parameters()) else _routing(model)
    before = [core.num_active for core in cores]
    try:
        for core in cores:
            core.num_active = core.num_units
        yield
    finally:
        for core, value in zip(cores, before, strict=True):
            core.num_active = value


@contextlib.contextmanager
def _few_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, layers that choose blocks choose one, of the smallest blocks; all of them where the weights are not in fp64, see `_wide_weights`."""
    cores = _choosing(model)
    rules = [core.rule for core in cores]
    exact = all(p.dtype == torch.float64 for p in model.parameters())
    try:
        for core, rule in zip(cores, rules, strict=True):
            first, local = min(rule.num_init, 1), min(rule.num_local, 1)
            num_blocks = first + local + 2 if exact else rule.num_blocks + _MAX_PARITY_TOKENS
            core.rule = rule._replace(
                block_size=_PROBE_BLOCK, num_init=first, num_local=local, num_blocks=num_blocks, dense_len=min(rule.dense_len, _PROBE_DENSE)
            )
        yield
    finally:
        for core, rule in zip(cores, rules, strict=True):
            core.rule = rule


# ---------------------------------------------------------------- reload

_RELOAD = """
import json, sys
facts = json.load(sys.stdin)
sys.path[:] = facts["sys_path"]


class NoAttnConvert:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnconvert":
            raise ImportError("attnconvert is not installed here")


sys.meta_path.insert(0, NoAttnConvert())
import torch

torch.set_num_threads(facts["threads"])
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

AutoTokenizer.from_pretrained(facts["folder"], trust_remote_code=facts["code"])
model = AutoModelForCausalLM.from_pretrained(facts["folder"], trust_remote_code=facts["code"], dtype="auto").eval()
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data = tensor.data.clone()
want = load_file(facts["want"])
with torch.no_grad():
    logits = model(want["ids"]).logits
    tokens = model.generate(want["ids"], **facts["generate"])
same = logits.shape == want["logits"].shape and logits.dtype == want["logits"].dtype
print(json.dumps({
    "logits": bool(same and torch.equal(logits, want["logits"])),
    "difference": float((logits.float() - want["logits"].float()).abs().max()) if same else None,
    "tokens": bool(torch.equal(tokens, want["tokens"])),
}))
"""


def check_reload(model: Any, folder: Path) -> None:
    """Load `folder` in a fresh process that cannot import attnconvert, and compare logits and greedy tokens, bit for bit.

    A model without attention cores must load without code from its folder. Both sides run on the CPU with the same number of threads and on fresh copies of the weights, so equal weights give equal bits: a BLAS may round
    differently where a matrix does not begin at a cache line, as one that is mapped from a file does.

    Args:
        model: what was saved, on the CPU, in the saved data type.
        folder: a checkpoint.

    Raises:
        AttnConvertError: `reload-failed`.
    """
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(0, vocab, (1, _RELOAD_TOKENS), generator=torch.Generator().manual_seed(1))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    # Spelled out, so that a generation config with sampling or an early end does not blur the comparison.
    options = {"max_new_tokens": _GREEDY_TOKENS, "min_new_tokens": _GREEDY_TOKENS, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        logits, tokens = model(ids).logits, model.generate(ids, **options)
    with tempfile.TemporaryDirectory(prefix="attnconvert-reload-") as temporary:
        want = Path(temporary) / "want.safetensors"
        save_file({"ids": ids, "logits": logits.contiguous(), "tokens": tokens.contiguous()}, str(want))
        sys_path = [entry for entry in sys.path if os.path.isabs(entry)]  # the same torch and transformers as here
        facts = {
            "sys_path": sys_path,
            "threads": torch.get_num_threads(),
            "folder": str(folder.resolve()),
            "want": str(want),
            "generate": options,
            "code": _is_ours(model),
        }
        # The code files of the checkpoint are copied into a cache of modules; this one must not be found there again.
        secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the process runs the checkpoint's own code
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", *secret)} | {
            "HF_MODULES_CACHE": str(Path(temporary) / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RELOAD], input=json.dumps(facts), capture_output=True, text=True, cwd=temporary, env=environment, check=False
        )
    if done.returncode == 0:
        result = json.loads(done.stdout.splitlines()[-1])
        if result["logits"] and result["tokens"]:
            return
        found = f"logits differ by {result['difference']}" if not result["logits"] else "greedy tokens differ"
    else:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        found = lines[-1][:400] if lines else f"the process ended with status {done.returncode}"
    raise AttnConvertError(
        "reload-failed",
        f"the checkpoint does not reload in a fresh process without attnconvert: {found}",
        where=type(model).__name__,
        expected="equal logits and the same greedy tokens",
        hint="if memory ran out, run again on a larger machine with --resume; otherwise please report the model and the recipe. Nothing was saved",
    )
