"""Benchmark tasks through lm-evaluation-harness, for a converted model and its teacher on the same samples.

A task is a name the harness knows (its data then comes from the Hub) or the path of a task file in YAML (its data is what the file says, usually
local). Task files may name Python functions next to them, and those run: a task file is code.

How a batch is padded: scores of given text (`loglikelihood`, `multiple_choice`, `loglikelihood_rolling`) come from right-padded rows WITHOUT a mask. That is
exact for converted and stock models alike, because causal attention shows no real token the padding behind it; it needs `use_cache=False`, since a
recurrent state would take the padding in. Generation uses left padding with a mask, which converted models support.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnconvert.convert.evaluate import json_safe
from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 1234
"""Of few-shot examples and sampled generation; both models get the same."""
BOOTSTRAP_ITERS = 1000
"""Resamples for metrics without a closed-form standard error (perplexity); accuracies have one."""
HARNESS = "lm-eval>=0.4.13"


def run_tasks(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: torch.device | str,
) -> list[dict[str, Any]]:
    """Scores of both models on benchmark tasks.

    Args:
        student: the converted causal LM, on `device`.
        teacher: the model it was converted from, on `device`, or None.
        tokenizer: the student's tokenizer; it stays as it is.
        tasks: names of tasks, groups or tags, and paths of task files; relative `data_files` in a task file are looked for next to it first.
        include_path: a folder with more task files, found by the name they give themselves. Those win over tasks of the harness.
        limit: samples per task: the first so many, or below 1 that share of them; None = all.
        num_fewshot: examples in the prompt, None = as the task says. A task that says 0 keeps 0.
        batch_size: rows per forward pass.
        device: where both models are.

    Returns:
        One entry per task (or group) and metric, in the order of `tasks`: `task`, `metric` (with the filter in parentheses where there is one), `num_fewshot`,
        `num_samples`, `limit` as given, `teacher`, `teacher_se`, `student`, `student_se` (standard errors over samples, None where the metric has none), `chance`
        (accuracy of guessing, None when it is not multiple choice), `higher_is_better`.

    Raises:
        AttnConvertError: `missing-extra`, `unknown-task`, `task-file` (missing or broken), `task-offline`, `task-data`, `task-unsafe`, `task-failed`, `bad-limit`.
    """
    models = {"teacher": teacher, "student": student}
    assert all(next(model.parameters()).device.type == torch.device(device).type for model in models.values() if model is not None), "models on `device`"
    if limit is not None and (limit <= 0 or (limit >= 1 and int(limit) != limit)):
        raise AttnConvertError("bad-limit", f"a limit of {limit} samples makes no sense", expected="a whole number of samples, or a share between 0 and 1")
    if limit is not None and limit >= 1:
        limit = int(limit)
    if not tasks:
        return []
    _check_harness()
    outcomes = {}
    with _quiet(), torch.random.fork_rng():
        loaded = _load_tasks(tasks, include_path)
        for name, model in models.items():
            if model is not None:
                outcomes[name] = _evaluate(model, tokenizer, loaded, limit, num_fewshot, batch_size)
    if "teacher" in outcomes:
        assert _prompts(outcomes["teacher"]) == _prompts(outcomes["student"]), "both models must see the same prompts"
    return _rows(outcomes["student"], outcomes.get("teacher"), limit)


def _check_harness() -> None:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AttnConvertError(
            "missing-extra", f"tasks need lm-evaluation-harness, which cannot be imported: {error}", hint="pip install 'attnconvert[evaluation]'"
        ) from error
    if not hasattr(TaskManager, "load"):
        raise AttnConvertError("missing-extra", "the installed lm-evaluation-harness is too old", expected=HARNESS, hint=f"pip install '{HARNESS}'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints to stdout, which is ours for results, logs at will, and starts one process per core to resample."""
    logger = logging.getLogger("lm_eval")
    level, multiprocessing = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if multiprocessing is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing


# ---------------------------------------------------------------- tasks


def _load_tasks(tasks: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The harness's tasks and groups, as `TaskManager.load` returns them."""
    if include_path is not None and not include_path.is_dir():
        raise AttnConvertError("task-file", f"there is no folder {str(include_path)!r} with task files", expected="a folder with .yaml files")
    files = {name: Path(name).expanduser() for name in tasks if Path(name).suffix in (".yaml", ".yml")}
    folders = ([include_path] if include_path is not None else []) + [path.parent for path in files.values()]
    named = [name for name in tasks if name not in files]
    manager = _manager(folders, named)
    for name in named:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.6)
            expected = f"a task of the harness or the path of a .yaml file{'; close matches: ' + ', '.join(close) if close else ''}"
            raise AttnConvertError("unknown-task", f"lm-evaluation-harness has no task {name!r}", expected=expected, hint="`lm-eval ls tasks` lists them")
    merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(tasks):
        spec = _read_task_file(name, files[name]) if name in files else name
        with _explained(name):
            loaded = manager.load([spec])
        for key, found in merged.items():
            found.update(loaded.get(key, {}))
    return merged


def _manager(folders: Sequence[Path], named: Sequence[str]) -> Any:
    """An index of the tasks in `folders`, and only if they do not hold every name, of the harness's own 14 000, which takes 10 s."""
    from lm_eval.tasks import TaskManager

    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    return manager if all(name in manager.task_index for name in named) else TaskManager(include_path=paths)


def _read_task_file(name: str, path: Path) -> Any:
    """What the harness loads for a task file: a dict with data files found, or the name when it describes a group of tasks (its folder is in the index)."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise AttnConvertError("task-file", f"there is no task file {name!r}", expected="the path of a .yaml file, or the name of a task")
    try:
        config = load_yaml(path, resolve_func=True)
    except (yaml.YAMLError, ValueError, OSError, ImportError, AttributeError) as error:
        raise AttnConvertError("task-file", f"the task file cannot be read: {_first_line(error)}", where=str(path), expected="a task in YAML") from error
    if isinstance(config.get("group"), str):
        return config["group"]
    if not isinstance(config.get("task"), str):
        raise AttnConvertError("task-file", "the task file does not name its task", where=str(path), expected="a line `task: name`")
    arguments = config.get("dataset_kwargs")
    if isinstance(arguments, dict) and "data_files" in arguments:
        config["dataset_kwargs"] = {**arguments, "data_files": _next_to(arguments["data_files"], path.resolve().parent)}
    return config


def _next_to(files: Any, folder: Path) -> Any:
    """`files` (a path, or lists and dicts of them) with those that exist in `folder` made absolute."""
    if isinstance(files, dict):
        return {key: _next_to(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_next_to(value, folder) for value in files]
    return str(folder / files) if isinstance(files, str) and (folder / files).is_file() else files


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the harness and `datasets` raise while they load a task into errors for the user. Only their code runs inside, so everything is caught."""
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and link not in chain:
            chain.append(link)
            link = link.__cause__ or link.__context__
        kinds = {kind.__name__ for part in chain for kind in type(part).__mro__}
        text = " ".join(str(part) for part in chain)
        if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "TimeoutError"}:
            raise AttnConvertError(
                "task-offline",
                f"the data of task {name!r} comes from the Hub, which cannot be reached: {_first_line(error)}",
                hint="check the network and HF_HUB_OFFLINE, or give the path of a task file (.yaml) with local data",
            ) from error
        if kinds & {"DatasetNotFoundError", "GatedRepoError", "RepositoryNotFoundError", "FileNotFoundError", "DataFilesNotFoundError"}:
            gated = "gated" in text.lower() or "GatedRepoError" in kinds
            hint = "accept its terms on its page, then `hf auth login`" if gated else "check `dataset_path` and `dataset_kwargs.data_files` of the task"
            raise AttnConvertError("task-data", f"the data of task {name!r} cannot be found: {_first_line(error)}", where=name, hint=hint) from error
        raise AttnConvertError(
            "task-failed", f"lm-evaluation-harness cannot load task {name!r}: {type(error).__name__}: {_first_line(error)}", where=name
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


# ---------------------------------------------------------------- models


def harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """A loaded causal LM as the harness's `HFLM`, on the device it is on. The tokenizer is copied, because the harness may give it a padding token."""
    from lm_eval.models.huggingface import HFLM

    hidden = not sys.stderr.isatty()

    class LoadedModel(HFLM):  # type: ignore[misc]
        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            assert attn_mask is None, "rows are right-padded, see the top of this file"
            with torch.no_grad():
                return self.model(inps, use_cache=False).logits

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm or hidden, override_bs=override_bs)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or hidden)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or hidden)

    # backend: the harness does not know the model type of converted models. softmax_dtype: bf16 log-probabilities are worth two digits.
    return LoadedModel(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size, softmax_dtype="float32")


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: Mapping[str, Any], limit: int | float | None, num_fewshot: int | None, batch_size: int
) -> dict[str, Any]:
    """One model on loaded tasks: the harness's result, samples included."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        result = evaluate(harness_model(model, tokenizer, batch_size), loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=True)
    except ValueError as error:
        if "marked as unsafe" in str(error):
            raise AttnConvertError(
                "task-unsafe", f"the task runs code that the model writes: {_first_line(error)}", hint="run it with `lm-eval` in a sandbox"
            ) from error
        raise
    assert isinstance(result, dict), "one process gets a result"
    return result


# ---------------------------------------------------------------- results


def _prompts(outcome: Mapping[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    return {task: [(sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]) for sample in samples] for task, samples in outcome["samples"].items()}


def _rows(student: Mapping[str, Any], teacher: Mapping[str, Any] | None, limit: int | float | None) -> list[dict[str, Any]]:
    """The entries of `run_tasks` from the harness's results."""
    rows = []
    better = student.get("higher_is_better", {})
    for task, figures in {**student["results"], **student.get("groups", {})}.items():
        theirs = {} if teacher is None else {**teacher["results"], **teacher.get("groups", {})}[task]
        samples = student["samples"].get(task)
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            error_key = f"{metric}_stderr,{filtered}"
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "num_fewshot": student.get("n-shot", {}).get(task),
                    "num_samples": _num_samples(student, task),
                    "limit": limit,
                    "teacher": _number(theirs.get(key)),
                    "teacher_se": _number(theirs.get(error_key)),
                    "student": _number(value),
                    "student_se": _number(figures.get(error_key)),
                    "chance": _chance(samples, metric, student["configs"].get(task, {})),
                    "higher_is_better": better.get(task, {}).get(metric),
                }
            )
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.generic)) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """A finite float; None for the harness's `N/A`, for nothing, and for what is not finite."""
    if not _is_number(value):
        return None
    safe = json_safe(float(value))
    return None if safe is None else float(safe)


def _num_samples(outcome: Mapping[str, Any], task: str) -> int:
    """Samples of a task; of a group, those of all tasks under it."""
    if task in outcome["n-samples"]:
        return int(outcome["n-samples"][task]["effective"])
    return sum(_num_samples(outcome, member) for member in outcome.get("group_subtasks", {}).get(task, ()))


def _chance(samples: Sequence[Mapping[str, Any]] | None, metric: str, config: Mapping[str, Any]) -> float | None:
    """Accuracy of guessing among the choices, mean over samples; None when the task is not multiple choice or the metric is not an accuracy."""
    if not samples or config.get("output_type") != "multiple_choice" or not metric.startswith("acc"):
        return None
    # with acc_mutual_info every choice is scored twice, with and without the question
    scored_twice = "acc_mutual_info" in samples[0]
    shares = []
    for sample in samples:
        num_choices = len(sample["arguments"]) // (2 if scored_twice else 1)
        right = len(set(sample["target"])) if isinstance(sample["target"], (list, tuple)) else 1
        shares.append(right / num_choices)
    return float(np.mean(shares))
