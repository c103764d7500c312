"""Write a model card, the README.md of a model repository, from the report of a conversion.

What is generated stands between two pairs of marks, one in the metadata and one in the text. It is replaced by the next run; what people write
outside the marks stays, and a metadata key written by hand outside them wins over the generated one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from attnconvert import embedded
from attnconvert.convert.report import compact_settings, format_bytes, format_seconds, heads_text, layer_map, markdown_table, spans_text
from attnconvert.convert.save import FACTS_FILE
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry

CARD_FILE = "README.md"
BEGIN = "<!-- attnconvert: generated text begins. `attnconvert card` replaces it; what you write outside these two marks stays. -->"
END = "<!-- attnconvert: generated text ends. -->"
YAML_BEGIN = "# attnconvert: generated metadata begins; keys outside these two marks stay and win"
YAML_END = "# attnconvert: generated metadata ends"

LOCAL_PATH = re.compile(r"(?<![\w.:/<+,~\\-])(?:(?:~|\.\.|[A-Za-z]:)[\\/][\w.@%+~-]+|/[\w.@%+~-]+[\\/])(?:[\\/]?[\w.@%+~-]+)*")
"""A path on somebody's disk inside a text: absolute with two parts or more, or beginning with ~ or .. . URLs, Hub ids and links to
files of the repository are none."""

_PATH_KEYS = ("base_model", "name", "source", "eval_source", "source_path", "against")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OWN_KEYS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "model-index")
"""Metadata keys that are generated whatever the card says, where an editor has removed the marks from the metadata."""

_BIBTEX = {
    "2402.04347": (
        "zhang2024hedgehog",
        "The Hedgehog \\& the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        "Zhang, Michael and Bhatia, Kush and Kumbong, Hermann and R{\\'e}, Christopher",
        2024,
    ),
    "2410.10254": (
        "zhang2024lolcats",
        "LoLCATs: On Low-Rank Linearizing of Large Language Models",
        "Zhang, Michael and Arora, Simran and Chalamala, Rahul and Wu, Alan and Spector, Benjamin and Singhal, Aaryan and Ramesh, Krithik and R{\\'e}, Christopher",
        2024,
    ),
    "2309.17453": (
        "xiao2023streamingllm",
        "Efficient Streaming Language Models with Attention Sinks",
        "Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and Lewis, Mike",
        2023,
    ),
    "2406.14909": (
        "fu2024moa",
        "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        "Fu, Tianyu and Huang, Haofeng and Ning, Xuefei and Zhang, Genghan and Chen, Boju and Wu, Tianqi and Wang, Hongyi and Huang, Zixiao and Li, Shiyao and Yan, Shengen "
        "and Dai, Guohao and Yang, Huazhong and Wang, Yu",
        2024,
    ),
    "2509.24663": (
        "zhao2025infllmv2",
        "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",
        "Zhao, Weilin and Zhou, Zihan and Su, Zhou and Xiao, Chaojun and Li, Yuxuan and Li, Yanghao and Zhang, Yudi and Zhao, Weilun and Li, Zhen and Huang, Yuxiang "
        "and Sun, Ao and Han, Xu and Liu, Zhiyuan",
        2025,
    ),
    "2502.13189": (
        "lu2025moba",
        "MoBA: Mixture of Block Attention for Long-Context LLMs",
        "Lu, Enzhe and Jiang, Zhejun and Liu, Jingyuan and Du, Yulun and Jiang, Tao and Hong, Chao and Liu, Shaowei and He, Weiran and Yuan, Enming and Wang, Yuzhi and "
        "Huang, Zhiqi and Yuan, Huan and Xu, Suting and Xu, Xinran and Lai, Guokun and Chen, Yanru and Zheng, Huabin and Yan, Junjie and Su, Jianlin and Wu, Yuxin and "
        "Zhang, Neo Y. and Yang, Zhilin and Zhou, Xinyu and Zhang, Mingxing and Qiu, Jiezhong",
        2025,
    ),
    "2410.11842": (
        "jin2024moh",
        "MoH: Multi-Head Attention as Mixture-of-Head Attention",
        "Jin, Peng and Zhu, Bo and Yuan, Li and Yan, Shuicheng",
        2024,
    ),
}


@dataclass(frozen=True)
class BaseFacts:
    """What the base model's own card says, as far as it is known.

    Attributes:
        license: a licence id of the Hub such as `apache-2.0`.
        license_name: its name, where the id is `other`.
        license_link: where it can be read, where the id is `other`.
        language: ISO codes.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()


# ---------------------------------------------------------------- what is known


def read_document(folder: Path) -> dict[str, Any]:
    """The report of a conversion: `report.json`, or what `attnconvert/run.json` says where nothing was measured.

    Raises:
        AttnConvertError: `not-converted`, `bad-report`.
    """
    folder = Path(folder)
    report, run = folder / "report.json", folder / "attnconvert" / "run.json"
    if report.is_file():
        document = _read_json(report)
        if not isinstance(document.get("conversion"), dict):
            raise AttnConvertError(
                "bad-report", "report.json does not say what was converted", where=str(report), hint="`attnconvert evaluate-converted` writes it again"
            )
        return document
    if run.is_file():
        facts = _read_json(run)
        settings = facts.get("settings") or {}
        recipe = settings.get("recipe") or {}
        plan = facts.get("plan") or {}
        conversion = {
            "recipe_name": recipe.get("name"),
            "base_model": (settings.get("model") or {}).get("name"),
            "base_model_revision": (settings.get("model") or {}).get("revision"),
            "base_model_type": plan.get("base_model_type"),
            "recipe": recipe,
            "seconds": sum((facts.get("seconds") or {}).values()) or None,
            **{key: facts.get(key) for key in ("plan", "stages", "data", "versions", "device", "command")},
        }
        return {"schema_version": 1, "conversion": conversion}
    config = folder / "config.json"
    if not (folder / FACTS_FILE).is_file() and not (config.is_file() and "attn_plan" in _read_json(config)):
        raise AttnConvertError(
            "not-converted", f"{str(folder)!r} holds no converted model", expected="a folder that `attnconvert linearize` or `convert` wrote"
        )
    facts = _read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {"plan": _read_json(config)["attn_plan"]}
    base = facts.get("base_model") or {}
    conversion = {"plan": facts["plan"], "base_model": base.get("name"), "base_model_revision": base.get("revision"), "recipe": facts.get("recipe")}
    return {"schema_version": 1, "conversion": conversion}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AttnConvertError("bad-report", f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(document, dict):
        raise AttnConvertError("bad-report", f"{path.name} is no JSON object", where=str(path))
    return document


def is_hub_id(name: str | None) -> bool:
    """Whether a model's or data set's name is `user/name` and not a folder here."""
    return (
        name is not None
        and _HUB_ID.fullmatch(name) is not None
        and not os.path.exists(name)
        and Path(name).suffix.lower() not in (".gguf", ".jsonl", ".txt", ".gz", ".parquet")
    )


def base_facts(name: str | None, *, revision: str | None = None, endpoint: str | None = None, token: str | None = None, offline: bool = True) -> BaseFacts:
    """Licence and language from the base model's card: the embedded model's, a local folder's, or that of a Hub model.

    Args:
        name: the base model as the user named it.
        revision: its Hub revision.
        endpoint: address of the Hub; None = huggingface_hub's.
        token: for gated and private models.
        offline: look for a Hub model's card in the local cache only.

    Returns:
        Empty facts where the card cannot be had: that is no error.
    """
    if name is None:
        return BaseFacts()
    path = embedded.model_dir() / CARD_FILE if name == "demo" else Path(name).expanduser() / CARD_FILE
    try:
        if not path.is_file() and is_hub_id(name):
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, CARD_FILE, revision=revision, endpoint=endpoint, token=token, local_files_only=offline))
        data = _split(path.read_text(encoding="utf-8"))[0]
        fields = yaml.safe_load(data) or {}
        language = fields.get("language") or ()
        texts = {key: fields.get(key) if isinstance(fields.get(key), str) else None for key in ("license", "license_name", "license_link")}
        return BaseFacts(**texts, language=(language,) if isinstance(language, str) else tuple(map(str, language)))
    except Exception:  # a card is text by anybody, and the network may be gone: what cannot be read is not known
        return BaseFacts()


# ---------------------------------------------------------------- paths of this machine


def local_paths(document: Any) -> set[str]:
    """The paths of this machine that the texts inside a JSON document name."""
    found: set[str] = set()
    for key, text in _strings(document):
        if key in _PATH_KEYS and _looks_local(text):
            found.add(text)
        if key == "command":
            try:
                words = shlex.split(text)
            except ValueError:
                words = text.split()
            found.update(part for word in words for part in (word, word.rpartition("=")[2]) if _looks_local(part))
        found.update(match.group() for match in LOCAL_PATH.finditer(text))
    return found


def _looks_local(text: str) -> bool:
    return "\n" not in text and len(text) < 1024 and bool(re.match(r"(~|\.{1,2})?[\\/]\S|[A-Za-z]:[\\/]", text))


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, key)


def hide_paths(text: str, paths: Iterable[str]) -> str:
    """`text` with each of `paths` replaced by its last part: `/home/me/models/smol` becomes `smol`."""
    for path in sorted(paths, key=len, reverse=True):
        last = re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "local"
        for form in {path, json.dumps(path)[1:-1], path.replace("&", "&amp;")}:
            text = text.replace(form, "local" if last in (".", "..", "~") else last)
    return text


def hide_paths_in(value: Any, paths: Iterable[str]) -> Any:
    """`hide_paths` for every text of a JSON document."""
    paths = list(paths)
    if isinstance(value, str):
        return hide_paths(value, paths)
    if isinstance(value, Mapping):
        return {key: hide_paths_in(inner, paths) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_paths_in(inner, paths) for inner in value]
    return value


# ---------------------------------------------------------------- the card


def write_card(
    directory: Path | str,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    offline: bool = False,
) -> Path:
    """Write or refresh README.md in the folder of a conversion; what stands outside the generated marks stays.

    Args:
        directory: a checkpoint or an adapters folder.
        repo_id: the name it will have on the Hub, `user/name`, for the code to copy; None = the folder's name.
        license: licence id; None = the base model's.
        language: ISO codes; None = the base model's.
        offline: do not ask the Hub for the base model's card.

    Returns:
        The path of README.md.

    Raises:
        AttnConvertError: `not-converted`, `bad-report`, `cannot-write`.
    """
    folder = Path(directory)
    document = read_document(folder)
    conversion = document["conversion"]
    facts = base_facts(conversion.get("base_model"), revision=conversion.get("base_model_revision"), offline=offline)
    path = folder / CARD_FILE
    old = path.read_text(encoding="utf-8") if path.is_file() else None
    card = make_card(document, old=old, repo_id=repo_id, adapters_only=(folder / FACTS_FILE).is_file(), facts=facts, license=license, language=language)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(card, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AttnConvertError("cannot-write", f"cannot write '{CARD_FILE}': {error.strerror or error}", where=str(folder)) from error
    return path


def make_card(
    document: Mapping[str, Any],
    *,
    old: str | None,
    repo_id: str | None,
    adapters_only: bool = False,
    facts: BaseFacts | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
) -> str:
    """`render_card` with what the base model's card says, paths of this machine hidden, inside what `old`, the card so far, has by hand."""
    facts = facts or BaseFacts()
    chosen: dict[str, Any] = {} if license is None else {"license": license}
    if language:
        chosen["language"] = [language] if isinstance(language, str) else list(language)
    if chosen:  # kept like what is written by hand, so that the next run does not forget it
        old = _with_fields(old or "", chosen)
    by_hand = {} if old is None else hand_fields(old)
    if isinstance(by_hand.get("license"), str):
        name, link = (by_hand[key] if isinstance(by_hand.get(key), str) else None for key in ("license_name", "license_link"))
        facts = replace(facts, license=by_hand["license"], license_name=name, license_link=link)
    named = document["conversion"].get("base_model")
    hidden = hide_paths_in(document, local_paths(document))
    card = render_card(
        hidden, repo_id=repo_id, license=facts.license, language=list(facts.language) or None, license_name=facts.license_name,
        license_link=facts.license_link, adapters_only=adapters_only, base_on_hub=is_hub_id(named),
    )  # fmt: skip
    return card if old is None else merge_cards(card, old)


def render_card(
    document: Mapping[str, Any],
    *,
    repo_id: str | None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    adapters_only: bool = False,
    base_on_hub: bool | None = None,
) -> str:
    """A model card: YAML metadata as huggingface_hub writes it, and the text.

    Args:
        document: contents of report.json; everything but `conversion` may be missing.
        repo_id: `user/name` on the Hub, for the code to copy; None = a folder.
        license: licence id of the base model; None = not known, which the card says.
        language: ISO codes of the text it was trained on.
        license_name: the licence's name, where `license` is `other`.
        license_link: where it can be read, where `license` is `other`.
        adapters_only: the repository holds adapters, which have to be merged into the base model.
        base_on_hub: the base model's name is a Hub id; None = if it looks like one.

    Returns:
        The whole text of README.md.
    """
    conversion: Mapping[str, Any] = document["conversion"]
    evaluation: Mapping[str, Any] = document.get("evaluation") or {}
    if base_on_hub is None:
        base_on_hub = is_hub_id(conversion.get("base_model"))
    metadata = _metadata(
        conversion, evaluation, repo_id=repo_id, license=license, language=language, license_name=license_name, license_link=license_link,
        adapters_only=adapters_only, base_on_hub=base_on_hub,
    )  # fmt: skip
    sections = [
        _title(conversion, repo_id),
        _introduction(conversion, adapters_only),
        _use(conversion, repo_id, adapters_only),
        _figures(evaluation),
        _tasks(evaluation),
        _lost(document),
        _what(conversion),
        _speed(document.get("bench") or {}),
        _limits(conversion),
        _made(conversion),
        _license_text(conversion, license, license_name, license_link, base_on_hub),
        _citation(conversion),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{YAML_BEGIN}\n{metadata}\n{YAML_END}\n---\n\n{BEGIN}\n\n{body}\n\n{END}\n"


def _split(card: str) -> tuple[str, str]:
    """(metadata without its fences, text) of a card; without metadata the first is empty."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?\n)?---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    return (match.group(1) or "", card[match.end() :]) if match else ("", card)


def merge_cards(new: str, old: str) -> str:
    """The generated parts of `new` in the place of those of `old`; where `old` has no marks its text stays and the generated text follows."""
    new_text, old_text = _split(new)[1], _split(old)[1]
    start, stop = new_text.index(BEGIN), new_text.index(END) + len(END)
    block = new_text[start:stop]
    if BEGIN in old_text and END in old_text and old_text.index(BEGIN) < old_text.index(END):
        text = old_text[: old_text.index(BEGIN)] + block + old_text[old_text.index(END) + len(END) :]
    else:
        text = f"{old_text.strip()}\n\n{block}\n" if old_text.strip() else f"\n{block}\n"
    return f"---\n{_merge_metadata(new, old)}---\n{text if text.startswith(chr(10)) else chr(10) + text}"


def hand_fields(card: str) -> dict[str, Any]:
    """The metadata of a card that people wrote: what stands outside the marks, or what is not ours where an editor has removed the marks.

    Raises:
        AttnConvertError: `bad-card`.
    """
    data = _split(card)[0]
    marked = YAML_BEGIN in data and YAML_END in data
    rest = data[: data.index(YAML_BEGIN)] + data[data.index(YAML_END) + len(YAML_END) :].removeprefix("\n") if marked else data
    try:
        fields = yaml.safe_load(rest) or {}
        assert isinstance(fields, dict)
    except (yaml.YAMLError, AssertionError) as error:
        raise AttnConvertError(
            "bad-card",
            f"the metadata at the top of {CARD_FILE} is no YAML mapping",
            hint=f"mend or remove the lines between the --- of {CARD_FILE}",
        ) from error
    return fields if marked else {key: value for key, value in fields.items() if key not in _OWN_KEYS}


def _with_fields(card: str, fields: Mapping[str, Any]) -> str:
    """`card` with these fields among those written by hand, and nothing generated in its metadata."""
    text = _split(card)[1]
    return f"---\n{_yaml({**hand_fields(card), **fields})}\n{YAML_BEGIN}\n{YAML_END}\n---\n{text}"


def _merge_metadata(new: str, old: str) -> str:
    generated = yaml.safe_load(_split(new)[0]) or {}
    by_hand = hand_fields(old)
    if isinstance(by_hand.get("tags"), list):
        by_hand["tags"] = list(dict.fromkeys([*by_hand["tags"], *generated.pop("tags")]))
    left = {key: value for key, value in generated.items() if key not in by_hand}
    if "license" in by_hand:
        left = {key: value for key, value in left.items() if key not in ("license_name", "license_link")}
    own = f"{YAML_BEGIN}\n{_yaml(left)}\n{YAML_END}\n"
    return (_yaml(by_hand) + "\n" if by_hand else "") + own


def _yaml(fields: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000).strip() if fields else ""


# ---------------------------------------------------------------- metadata


def methods_of(conversion: Mapping[str, Any]) -> list[str]:
    """Methods of the converted layers, each once, in order."""
    layers = (conversion.get("plan") or {}).get("layers") or []
    return list(dict.fromkeys(row["method"] for row in layers if row.get("method")))


def stock_heads(conversion: Mapping[str, Any]) -> tuple[int, int] | None:
    """KV heads before and after, of a conversion to a stock checkpoint with fewer of them; None for any other."""
    for row in (conversion.get("plan") or {}).get("layers") or []:
        after = (row.get("config") or {}).get("num_key_value_heads")
        if row.get("method") and after is not None:
            return int(row["num_key_value_heads"]), int(after)
    return None


def _has_linear_branch(conversion: Mapping[str, Any]) -> bool:
    for row in (conversion.get("plan") or {}).get("layers") or []:
        if row.get("method") and (row.get("config") or {}).get("linear", True):
            try:
                if registry.get(row["method"]).family == "linearize":
                    return True
            except AttnConvertError:  # a method of a package that is not installed here
                continue
    return False


def _metadata(
    conversion: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    *,
    repo_id: str | None,
    license: str | None,
    language: str | Sequence[str] | None,
    license_name: str | None,
    license_link: str | None,
    adapters_only: bool,
    base_on_hub: bool,
) -> str:
    from huggingface_hub import ModelCardData

    source = (conversion.get("data") or {}).get("source")
    tags = ["attnconvert", *(["linear-attention"] if _has_linear_branch(conversion) else []), *methods_of(conversion)]
    results = eval_results(evaluation, conversion)
    name = (repo_id or "").rpartition("/")[2] or _short_name(conversion)
    data = ModelCardData(
        license=license or "other",
        license_name=license_name,
        license_link=license_link,
        language=[language] if isinstance(language, str) else list(language) if language else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=conversion["base_model"] if base_on_hub else None,
        tags=[*tags, *(["lora"] if adapters_only else [] if stock_heads(conversion) is not None else ["custom_code"])],
        datasets=[str(source)] if is_hub_id(source) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    if base_on_hub:
        data["base_model_relation"] = "adapter" if adapters_only else "finetune"
    return str(data.to_yaml())


def _short_name(conversion: Mapping[str, Any]) -> str:
    base = str(conversion.get("base_model") or "model").rstrip("/").rpartition("/")[2]
    return f"{base}-{conversion['recipe_name']}" if conversion.get("recipe_name") else f"{base}-converted"


def eval_results(evaluation: Mapping[str, Any], conversion: Mapping[str, Any]) -> list[Any]:
    """The figures of the converted model as huggingface_hub's EvalResult, for the Hub's `model-index`; those that are not finite are left out."""
    from huggingface_hub import EvalResult

    results = []
    source = str((conversion.get("data") or {}).get("eval_source") or (conversion.get("data") or {}).get("source") or "")
    student = _quality(evaluation, "student")
    text = source if is_hub_id(source) else "text"
    name = f"held-out text, {evaluation.get('num_tokens', 0):,} tokens in rows of {evaluation.get('row_length', 0)}"
    for key, metric, label in (
        ("ppl", "perplexity", "Perplexity"),
        ("ppl_ratio", "perplexity_ratio", "Perplexity / the base model's"),
        ("kl", "kl_divergence", "KL from the base model, nats per token"),
        ("agreement", "agreement", "Same most likely next token as the base model"),
    ):
        value = _value(student.get(key))
        if value is not None:
            results.append(EvalResult("text-generation", text, name, metric, value, dataset_split="held-out", metric_name=label))
    for row in evaluation.get("passkey") or []:
        if row.get("name") == "student" and _finite(row.get("accuracy")):
            results.append(
                EvalResult("text-generation", "passkey", f"passkey retrieval at {row['length']} tokens", "accuracy", _rounded(row["accuracy"]),
                           dataset_config=f"{row['length']} tokens", metric_name="Right key first of ten (chance 0.1)")
            )  # fmt: skip
    for row in evaluation.get("tasks") or []:
        if _finite(row.get("student")):
            shots = f"{row['num_fewshot']}-shot" if row.get("num_fewshot") is not None else None
            results.append(
                EvalResult(
                    "text-generation", row["task"], row["task"], row["metric"], _rounded(row["student"]), dataset_config=shots, metric_name=row["metric"]
                )
            )
    return results


# ---------------------------------------------------------------- text


def _quality(evaluation: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((row for row in evaluation.get("quality") or [] if row.get("name") == name), {})


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _value(estimate: Any) -> float | None:
    value = estimate.get("value") if isinstance(estimate, Mapping) else None
    return _rounded(float(value)) if value is not None and _finite(value) else None


def _shown(estimate: Any, digits: int) -> str:
    value = _value(estimate)
    if value is None:
        return "-"
    interval = estimate.get("ci95")
    text = f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"
    return text if not interval or not all(map(_finite, interval)) else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _title(conversion: Mapping[str, Any], repo_id: str | None) -> str:
    return f"# {(repo_id or '').rpartition('/')[2] or _short_name(conversion)}"


def _introduction(conversion: Mapping[str, Any], adapters_only: bool) -> str:
    base = f"`{conversion['base_model']}`" if conversion.get("base_model") else "its base model"
    if conversion.get("base_model") == "demo":
        base = "`demo`, the small model inside the attnconvert package,"
    layers = (conversion.get("plan") or {}).get("layers") or []
    num_converted = sum(row.get("method") is not None for row in layers)
    methods = ", ".join(f"`{name}`" for name in methods_of(conversion)) or "another kind of attention"
    heads = stock_heads(conversion)
    if heads is not None:
        return (
            f"{base} with {heads[1]} key-value heads in place of {heads[0]} in each of its {len(layers)} layers ({methods}), and trained to behave as before, by "
            f"attnconvert. Its architecture is the stock `{conversion['plan']['base_model_type']}` of transformers, and it needs no other code."
        )
    share = "all" if num_converted == len(layers) else f"{num_converted} of the"
    what = f"the softmax attention of {share} {len(layers)} layers replaced by {methods}"
    if methods_of(conversion) == ["kdgqa"]:  # still softmax attention
        what = f"fewer key-value heads in {share} {len(layers)} layers ({methods})"
    if methods_of(conversion) == ["moa"]:  # likewise
        what = f"an attention span of its own for each key-value head in {share} {len(layers)} layers ({methods})"
    if methods_of(conversion) == ["infllm_v2"]:
        what = f"softmax attention to the blocks of keys that score best for each token, and to everything while the context is short, in {share} {len(layers)} layers ({methods})"
    if methods_of(conversion) == ["moh"]:
        what = f"softmax attention in which each token uses some of the heads, chosen by a router, in {share} {len(layers)} layers ({methods})"
    first = f"{base} with {what} and the model trained to behave as before, by attnconvert."
    if adapters_only:
        first += f" This repository holds only what the conversion added: low-rank adapters and the new attention's parameters. {base} is needed beside it."
    return first


def _use(conversion: Mapping[str, Any], repo_id: str | None, adapters_only: bool) -> str:
    if adapters_only:
        name = (repo_id or "adapters").rpartition("/")[2]
        lines = [f"hf download {repo_id} --local-dir {name}"] if repo_id else []
        base = conversion.get("base_model")
        option = "" if base == "demo" or is_hub_id(base) else f" --base PATH-OF-{str(base or 'the-base-model').rpartition('/')[2]}"
        lines += [f"attnconvert merge {name} --out {name}-merged{option}", f"attnconvert generate {name}-merged 'Once upon a time'"]
        return (
            "## Use it\n\nThe adapters have to be merged into the base model once; the result is an ordinary checkpoint. peft alone cannot load them: the "
            "new attention is not part of its format.\n\n```sh\npip install attnconvert\n" + "\n".join(lines) + "\n```"
        )
    if stock_heads(conversion) is not None:
        return "## Use it\n\n" + usage(repo_id, stock=True) + "\n\nNo code of this repository runs, and attnconvert is not needed."
    return "## Use it\n\n" + usage(repo_id) + (
        "\n\nThe first form runs the Python files of this repository (`trust_remote_code=True`): read them first. With attnconvert installed they are not needed:"
        f"\n\n```python\nimport attnconvert  # registers the model classes\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({(repo_id or '.')!r}, dtype=\"auto\")\n```"
        "\n\nPin a revision in what you build on it: `revision=\"<commit>\"`, the commit's full hash, in every `from_pretrained`. Code and weights then cannot change under you."
    )  # fmt: skip


def usage(repo_id: str | None, revision: str | None = None, *, stock: bool = False) -> str:
    """Code that loads a converted model (`stock`: one without code of its own) and writes with it, as a Markdown block."""
    pin = f", revision={revision!r}" if revision else ""
    trust, distrust = ("", "") if stock else (", trust_remote_code=True", ", trust_remote_code=False")
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {(repo_id or '.')!r}" + ("" if repo_id else "  # the folder of this file"),
        f'model = AutoModelForCausalLM.from_pretrained(name{pin}{trust}, dtype="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained(name{pin}{distrust})",
        "",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))",
        "```",
    ]
    return "\n".join(lines)


def _figures(evaluation: Mapping[str, Any]) -> str:
    student, teacher = _quality(evaluation, "student"), _quality(evaluation, "teacher")
    if not student:
        return "## Quality\n\nNothing was measured after this conversion. `attnconvert evaluate-converted` measures it."
    rows = [("perplexity of held-out text", _shown(teacher.get("ppl"), 2), _shown(student.get("ppl"), 2))]
    for key, label, digits in (
        ("ppl_ratio", "perplexity, times the original's", 3),
        ("kl", "KL from the original, nats per token", 4),
        ("agreement", "same most likely next token", 4),
    ):
        if student.get(key):
            rows.append((label, "", _shown(student[key], digits)))
    for label, kind in (("passkey", "passkey"), ("needles", "needles")):
        for row in _recall_rows(evaluation, kind):
            rows.append((f"{label} recall, {row['what']} (chance 0.10)", _accuracy(row["teacher"]), _accuracy(row["student"])))
    for row in evaluation.get("state_bytes") or []:
        rows.append(
            (f"decode cache after {row['length']:,} tokens", "-" if row.get("teacher") is None else format_bytes(row["teacher"]), format_bytes(row["student"]))
        )
    text = (
        f"{evaluation.get('num_tokens', 0):,} held-out tokens in {evaluation.get('num_rows', 0)} rows of {evaluation.get('row_length', 0)}; in brackets the 95 % interval. "
        "All figures, ablations and the recall tests in full: `report.md`, `report.json`."
    )
    return "## Quality\n\n" + text + "\n\n" + markdown_table(("", "original", "converted"), rows)


def _recall_rows(evaluation: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """One row per length (passkey), or per number of needles and length with depths pooled (needles), models side by side."""
    groups: dict[tuple[int, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in evaluation.get(kind) or []:
        groups.setdefault((int(row.get("num_needles") or 1), int(row["length"])), {}).setdefault(str(row["name"]), []).append(row)
    found = []
    for (num_needles, length), by_name in sorted(groups.items()):
        beyond = [row.get("beyond_window") for row in by_name.get("student", [])]
        where = ", beyond the window" if beyond and all(beyond) else ", within the window" if beyond and all(value is False for value in beyond) else ""
        what = (f"{num_needles} keys, " if kind == "needles" else "") + f"{length:,} tokens{where}"
        found.append(
            {
                "what": what,
                "beyond": bool(beyond) and all(beyond),
                "teacher": _pooled(by_name.get("teacher", [])),
                "student": _pooled(by_name.get("student", [])),
            }
        )
    return found


def _pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Accuracy over all trials of `rows`; the interval only where there is one row, or recomputed (Wilson) over several."""
    from attnconvert.convert.recall import wilson_interval

    trials = sum(int(row.get("num_trials") or 0) for row in rows)
    if not rows or not trials or not all(_finite(row.get("accuracy")) for row in rows):
        return None
    share = sum(float(row["accuracy"]) * int(row["num_trials"]) for row in rows) / trials
    if len(rows) == 1 and rows[0].get("ci95"):
        return {"accuracy": share, "ci95": rows[0]["ci95"], "num_trials": trials}
    return {"accuracy": share, "ci95": list(wilson_interval(share * trials, trials)), "num_trials": trials}


def _accuracy(pooled: Mapping[str, Any] | None) -> str:
    return "-" if pooled is None else f"{pooled['accuracy']:.2f} [{pooled['ci95'][0]:.2f}, {pooled['ci95'][1]:.2f}]"


def _tasks(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for row in evaluation.get("tasks") or []:
        cells = [
            "-" if not _finite(row.get(key)) else f"{row[key]:.4f}" + (f" +- {row[f'{key}_se']:.4f}" if _finite(row.get(f"{key}_se")) else "")
            for key in ("teacher", "student")
        ]
        shots = "" if row.get("num_fewshot") is None else f", {row['num_fewshot']}-shot"
        rows.append(
            (
                f"{row['task']}{shots}",
                str(row["metric"]),
                str(row.get("num_samples", "-")),
                *cells,
                "-" if not _finite(row.get("chance")) else f"{row['chance']:.2f}",
            )
        )
    if not rows:
        return ""
    return "### Tasks\n\nBy lm-evaluation-harness, with standard errors.\n\n" + markdown_table(
        ("task", "metric", "samples", "original", "converted", "chance"), rows
    )


def losses(document: Mapping[str, Any]) -> list[str]:
    """What the conversion cost in quality, as sentences, worst first where the report ranks them; also what was not measured."""
    evaluation: Mapping[str, Any] = document.get("evaluation") or {}
    student = _quality(evaluation, "student")
    if not student:
        return ["Unknown: nothing was measured."]
    found = []
    for level, label in (("bad", "**Bad**"), ("warn", "Warning")):
        for finding in evaluation.get("findings") or []:
            if finding.get("level") == level:
                found.append(f"{label}, {finding.get('section', '')} ({finding.get('row', '')}): {finding.get('text', '')}")
    ratio: Any = student.get("ppl_ratio")
    if _value(ratio) is not None:
        value, interval = float(ratio["value"]), ratio.get("ci95")
        if interval and interval[0] <= 1 <= interval[1]:
            found.append(
                f"Perplexity: x {_shown(ratio, 3)}. The interval holds 1: a difference is not shown by this amount of text, which does not prove that there is none."
            )
        elif value > 1:
            found.append(f"Perplexity is {100 * (value - 1):.2g} % higher than the original's: x {_shown(ratio, 3)}.")
        else:
            found.append(f"Perplexity is not higher than the original's (x {_shown(ratio, 3)}); training on the same text may lower it by itself.")
    else:
        found.append("The original was not measured beside it, so the loss in perplexity is unknown.")
    agreement = _value(student.get("agreement"))
    if agreement is not None:
        found.append(f"At {100 * (1 - agreement):.1f} % of positions its first choice of next token is not the original's.")
    positions = [row for row in evaluation.get("positions") or [] if row.get("name") == "student" and _finite(row.get("ppl_ratio"))]
    if len(positions) > 1:
        worst = max(positions, key=lambda row: row["ppl_ratio"])
        found.append(f"By position in the document it is worst at tokens {worst['start']:,} to {worst['stop']:,}: perplexity x {worst['ppl_ratio']:.3f}.")
    found += _recall_losses(evaluation)
    for row in evaluation.get("tasks") or []:
        if _finite(row.get("teacher")) and _finite(row.get("student")):
            error = math.hypot(row.get("teacher_se") or 0.0, row.get("student_se") or 0.0)
            if row["student"] < row["teacher"] - 2 * error:
                found.append(f"{row['task']} ({row['metric']}) falls from {row['teacher']:.3f} to {row['student']:.3f}.")
    larger = [row for row in evaluation.get("state_bytes") or [] if row.get("teacher") is not None and row["student"] > row["teacher"]]
    if larger:
        row = max(larger, key=lambda row: row["length"])
        found.append(
            f"Short texts gain nothing: after {row['length']:,} tokens its decode cache is {format_bytes(row['student'])}, the original's {format_bytes(row['teacher'])}."
        )
    return found


def _recall_losses(evaluation: Mapping[str, Any]) -> list[str]:
    rows = [(kind, row) for kind in ("passkey", "needles") for row in _recall_rows(evaluation, kind) if row["student"]]
    if not rows:
        return ["Recall of details in long texts was not measured; it is what cheaper attention tends to lose first."]
    found = []
    for kind, row in rows:
        if row["teacher"] and row["student"]["ci95"][1] < row["teacher"]["ci95"][0]:
            found.append(
                f"Recall is lost: {kind}, {row['what']}: {_accuracy(row['student'])} against the original's {_accuracy(row['teacher'])} (chance 0.10)."
            )
    beyond = [row for _, row in rows if row["beyond"]]
    if all(row.get("beyond_window") is None for kind in ("passkey", "needles") for row in evaluation.get(kind) or []):
        return found  # there is no one window to be beyond of
    if not beyond:
        found.append("Recall was measured within the exact window only; how much is remembered beyond it is unknown.")
    elif not found:
        worst = min(beyond, key=lambda row: row["student"]["accuracy"])
        found.append(
            f"Recall beyond the window, at its lowest ({worst['what']}): {_accuracy(worst['student'])}, the original {_accuracy(worst['teacher'])} (chance 0.10)."
        )
    return found


def _lost(document: Mapping[str, Any]) -> str:
    return "## What was lost\n\n" + "\n".join(f"- {line}" for line in losses(document))


def _what(conversion: Mapping[str, Any]) -> str:
    plan = conversion.get("plan")
    return (
        "\n\n".join(["## What was converted", layer_map(plan), *spans_text(plan, conversion.get("search")), *heads_text(plan, conversion.get("heads"))])
        if plan
        else ""
    )


def _speed(bench: Mapping[str, Any]) -> str:
    lines = []
    for phase in ("prefill", "decode"):
        rows = [row for row in bench.get("rows") or [] if row.get("phase") == phase and _finite(row.get("tokens_per_second"))]
        pairs = {(row["length"], row["batch_size"]) for row in rows if row["model"] == "teacher"} & {
            (row["length"], row["batch_size"]) for row in rows if row["model"] == "student"
        }
        if pairs:
            length, batch = max(pairs)
            speed = {row["model"]: row["tokens_per_second"] for row in rows if (row["length"], row["batch_size"]) == (length, batch)}
            lines.append(f"{phase}, {length:,} tokens, batch {batch}: {speed['student']:,.0f} tokens/s, the original {speed['teacher']:,.0f}")
        crossover = (bench.get("crossover") or {}).get(phase)
        if pairs and phase in (bench.get("crossover") or {}):
            lines.append(
                f"{phase} is faster than the original's from {crossover:,} tokens on"
                if crossover
                else f"{phase} was not faster than the original's at any length measured"
            )
    if not lines:
        return ""
    on = ", ".join(str(bench[key]) for key in ("device", "dtype") if bench.get(key))
    return "## Speed\n\n" + (f"Measured on {on}.\n\n" if on else "") + "\n".join(f"- {line}" for line in lines)


def _limits(conversion: Mapping[str, Any]) -> str:
    lines = [
        "No assisted, speculative or prompt-lookup decoding: converted attention forgets, so its cache cannot be rolled back. transformers says so instead of running it.",
        "No continuous batching (`generate_batch`) and no serving engine that replaces the attention function (vLLM, SGLang, TGI): use `generate()`; pad batches on the left.",
        "No static, offloaded or quantized cache; leave `attn_implementation` out when loading.",
        "What the base model does wrong it still does: biases, errors and the limits of its training data and context length are unchanged or worse.",
    ]
    length = max(
        (int(stage.get("length") or 0) for stage in ((conversion.get("recipe") or {}).get("stages") or {}).values() if isinstance(stage, Mapping)), default=0
    )
    if length:
        lines.insert(
            0, f"The conversion was trained on rows of {length:,} tokens. Longer texts run, but only the recall and position figures above say how well."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _made(conversion: Mapping[str, Any]) -> str:
    lines = []
    if conversion.get("recipe_name"):
        lines.append(
            f"- recipe `{conversion['recipe_name']}`, in full in `attnconvert/recipe.yaml`"
            + (f", seed {conversion['seed']}" if conversion.get("seed") is not None else "")
        )
    for stage in conversion.get("stages") or []:
        if stage.get("skipped"):
            lines.append(f"- {stage.get('stage')}: skipped ({stage['skipped']})")
        elif stage.get("tokens"):
            took = f" in {format_seconds(stage['seconds'])}" if _finite(stage.get("seconds")) else ""
            lines.append(f"- {stage.get('stage')}: {stage['tokens']:,} tokens{took}")
    if _finite(conversion.get("seconds")):
        lines.append(f"- in all {format_seconds(float(conversion['seconds']))}" + (f" on {conversion['device']}" if conversion.get("device") else ""))
    elif conversion.get("device"):
        lines.append(f"- on {conversion['device']}")
    data = conversion.get("data") or {}
    if data.get("source"):
        lines.append(
            f"- text: `{data['source']}`" + (f", held-out text from `{data['eval_source']}`" if data.get("eval_source") not in (None, data["source"]) else "")
        )
    for split in ("train", "eval"):
        if isinstance(data.get(split), Mapping):
            lines.append(f"- {split} rows: " + compact_settings({key: data[split].get(key) for key in ("documents", "rows", "length", "tokens", "sha256")}))
    if conversion.get("versions"):
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in conversion["versions"].items()))
    if conversion.get("command"):
        lines += ["", "```sh", str(conversion["command"]), "```"]
    return "## How it was made\n\n" + "\n".join(lines) if lines else ""


def _license_text(conversion: Mapping[str, Any], license: str | None, name: str | None, link: str | None, base_on_hub: bool) -> str:
    base = f"`{conversion['base_model']}`" if conversion.get("base_model") else "the base model"
    if license is None or (license == "other" and name is None):
        text = f"The weights derive from {base}, whose licence was not found when this card was written: its terms apply, look them up before you use or share this model."
    else:
        shown = f"[{name or license}]({link})" if link else f"`{name or license}`"
        text = f"The weights derive from {base} and stay under its licence, {shown}."
    return f"## Licence\n\n{text} The Python files in this repository are attnconvert's, Apache-2.0."


def _citation(conversion: Mapping[str, Any]) -> str:
    urls = []
    for name in methods_of(conversion):
        try:
            urls.append(registry.get(name).paper)
        except AttnConvertError:
            continue
    urls.append(str((conversion.get("recipe") or {}).get("reference") or ""))
    entries: list[str] = []
    for url in dict.fromkeys(url for url in urls if url.startswith("http")):
        match = re.search(r"(\d{4}\.\d{4,5})", url)
        known = _BIBTEX.get(match.group(1)) if match else None
        if known is not None and match is not None:
            key, title, authors, year = known
            fields = [
                f"title = {{{title}}}",
                f"author = {{{authors}}}",
                f"year = {{{year}}}",
                f"eprint = {{{match.group(1)}}}",
                "archivePrefix = {arXiv}",
                f"url = {{{url}}}",
            ]
        else:
            key = "method" + (match.group(1).replace(".", "") if match else str(len(entries)))
            fields = [f"howpublished = {{\\url{{{url}}}}}"]
        entries.append(f"@misc{{{key},\n  " + ",\n  ".join(fields) + "\n}")
    if not entries:
        return ""
    return "## Citation\n\nThe method's paper:\n\n```bibtex\n" + "\n\n".join(entries) + "\n```"
