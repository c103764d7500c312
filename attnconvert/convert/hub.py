"""Push a conversion to the Hub: only what belongs there, proven to load, in one commit.

How it is uploaded. Large files go first, one `preupload_lfs_files` each: the Hub stores them by content, so what arrived before a connection broke is
not sent again, within this push or in the next. One `create_commit` then makes all files appear together. `upload_folder` and
`upload_large_folder` are not used: with Xet they commit in batches, so that a reader could get new weights with old code, and they read a folder
from disk, while paths of this machine are taken out of the records here without touching the user's files.

The token is given to huggingface_hub and kept nowhere else: not in results, files, logs or texts of errors.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import attnconvert
from attnconvert.convert import card
from attnconvert.convert.report import format_bytes
from attnconvert.convert.save import CORES_FILE, FACTS_FILE
from attnconvert.errors import AttnConvertError

T = TypeVar("T")

PushProgress = Callable[[str, int, int], None]
"""Called with (what, done, total); for what = `upload` these are bytes."""

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try after 429, 5xx or a lost connection; huggingface_hub itself has then tried six times for most requests."""

_LONGEST_WAIT = 60.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_IN_MEMORY = 10 * 2**20  # smaller files are read, so that they can be searched for secrets and paths

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_INDEX = "model.safetensors.index.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", CORES_FILE, FACTS_FILE)
_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_REPORTS = re.compile(
    r"report\.(json|md|html)|bench[\w.-]*\.(json|md)|(plots/|figures/)?[\w.-]+\.(png|svg)|(plots|figures)/[\w.-]+\.json|LICEN[CS]E[\w.-]*|NOTICE[\w.-]*"
)
_RECORDS = re.compile(r"attnconvert/([\w-]+\.(json|jsonl|yaml|png|svg))")
_TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja|[\w.-]+\.tiktoken")
_SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_PATH_FIELDS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file")

_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|modeling_attnconvert\.py|attnconvert_\w+\.py")
"""Files of an earlier push that would be loaded instead of new ones, or beside them: removed when the new push has none of that name."""

_FOREIGN = re.compile(r"config\.json|.*\.(safetensors|bin|gguf|pt|pth|ckpt|onnx|h5|msgpack)")


@dataclass(frozen=True)
class PushFile:
    """A file of the repository.

    Attributes:
        path: inside the repository.
        size: bytes.
        status: `new`, `changed` or `unchanged` against the repository; `listed` in a dry run.
    """

    path: str
    size: int
    status: str = "listed"


@dataclass(frozen=True)
class PushResult:
    """What a push did, or would do.

    Attributes:
        repo_id: `user/name`.
        url: where to look at it.
        files: every file of the conversion that is, or would be, in the repository.
        skipped: (name, reason) of what stays on this machine.
        deleted: files of an earlier push that were removed.
        revision: branch that was pushed to.
        commit: hash of the commit; None in a dry run.
        pull_request: its address, with `create_pr`.
        notes: what the user should know.
        snippet: text that says how to use it.
        dry_run: nothing was sent.
    """

    repo_id: str
    url: str
    files: tuple[PushFile, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    deleted: tuple[str, ...] = ()
    revision: str = "main"
    commit: str | None = None
    pull_request: str | None = None
    notes: tuple[str, ...] = ()
    snippet: str = ""
    dry_run: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "num_bytes": self.num_bytes}

    def render(self) -> str:
        """What the command line prints."""
        if self.dry_run:
            width = max(len(format_bytes(file.size)) for file in self.files)
            lines = [f"Would push to {self.repo_id}:", ""]
            lines += [f"  {format_bytes(file.size):>{width}}  {file.path}" for file in self.files]
            lines += ["", f"{len(self.files)} files, {format_bytes(self.num_bytes)}; nothing was sent"]
            lines += ["", "Stays here:", "", *(f"  {name}: {reason}" for name, reason in self.skipped)] if self.skipped else []
            return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
        sent = [file for file in self.files if file.status != "unchanged"]
        what = f"{len(sent)} of {len(self.files)} files sent" if sent else f"all {len(self.files)} files were there already"
        removed = f", {len(self.deleted)} of an earlier push removed" if self.deleted else ""
        lines = [f"{self.pull_request or self.url}", f"{what}{removed}; commit {self.commit}", "", self.snippet]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Contents:
    """Files to push: path in the repository -> bytes, or a file too large to hold."""

    files: dict[str, bytes | Path]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def push(
    directory: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    adapters_only: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    progress: PushProgress | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
    note: Callable[[str], None] | None = None,
) -> PushResult:
    """Put a conversion on the Hub, with a model card from its report.

    Before anything is sent the very files that would be sent are loaded in a fresh process without attnconvert, compared bit for bit with this
    process, and run in every way that generation may (`save.check_reload`, `save.check_parity`).

    Args:
        directory: a checkpoint, or with `adapters_only` an adapters folder.
        repo_id: `user/name`, or `name` for the token's user.
        private: create the repository private. One that exists stays as it is; if it is public, the push is refused.
        adapters_only: the folder was written with `--adapters-only`.
        dry_run: only list the files; needs no network and no token, and does not load the model.
        revision: branch to push to, created if need be; None = main.
        token: Hub token with write access; None = that of `hf auth login` or HF_TOKEN.
        commit_message: None = a line that names the method.
        progress: told about each part.
        create_pr: open a pull request instead of committing to main.
        endpoint: address of the Hub; None = huggingface_hub's (HF_ENDPOINT).
        note: told about retries.

    Raises:
        AttnConvertError: `bad-repo-id`, `not-converted`, `not-adapters`, `adapters-only-folder`; `push-refused` with what is wrong with the model;
            `hub-login`, `hub-forbidden`, `gated-model`, `hub-repo-not-found`, `hub-revision-not-found`, `hub-conflict`, `repo-taken`, `repo-public`,
            `hub-rejected`, `hub-unavailable`, `hub-unreachable`, `offline`, `push-incomplete`.
    """
    folder = Path(directory)
    _check_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise AttnConvertError("bad-revision", "a pull request is opened against main", where=f"revision {revision!r}", hint="leave one of the two out")
    document = card.read_document(folder)
    _check_kind(folder, adapters_only)
    check_complete(folder)
    url = (endpoint or _default_endpoint()).rstrip("/")
    if dry_run:
        contents = _gather(folder, document, repo_id, adapters_only, card.base_facts(document["conversion"].get("base_model")))
        _check_secrets(contents.files, None)
        listed = tuple(PushFile(name, _size(content)) for name, content in contents.files.items())
        return PushResult(repo_id, f"{url}/{repo_id}", listed, contents.skipped, revision=revision or "main", notes=contents.notes, dry_run=True)

    import huggingface_hub

    secret = token or huggingface_hub.get_token()
    if not secret:
        raise AttnConvertError("hub-login", "there is no Hub token on this machine", hint=_LOGIN)
    api = huggingface_hub.HfApi(endpoint=url, token=secret, library_name="attnconvert", library_version=attnconvert.__version__)
    session = _Session(api, secret, repo_id, progress or (lambda what, done, total: None), note or (lambda text: None))
    with _quiet_library():
        repo_id = session.repo_id = _full_name(session)
        base = document["conversion"]
        facts = card.base_facts(base.get("base_model"), revision=base.get("base_model_revision"), endpoint=url, token=secret, offline=False)
        contents = _gather(folder, document, repo_id, adapters_only, facts)
        _check_secrets(contents.files, secret)
        session.progress("check that it loads", 0, 1)
        check_loads(contents.files, adapters_only=adapters_only, base=_local_base(folder) if adapters_only else None)
        session.progress("check that it loads", 1, 1)
        _create(session, private=private, revision=None if create_pr else revision)
        branch = revision or "main"
        message = commit_message or _message(document, adapters_only)
        return _send(session, contents, branch=branch, message=message, create_pr=create_pr, adapters_only=adapters_only)


def _default_endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _message(document: Mapping[str, Any], adapters_only: bool) -> str:
    conversion = document["conversion"]
    what = "Adapters" if adapters_only else "Conversion"
    methods = ", ".join(card.methods_of(conversion)) or "another attention"
    base = card.hide_paths(str(conversion.get("base_model") or ""), card.local_paths({"base_model": conversion.get("base_model")}))
    return f"{what} to {methods}" + (f" of {base}" if base else "") + f" by attnconvert {attnconvert.__version__}"


# ---------------------------------------------------------------- checks on this machine


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise AttnConvertError(
            "bad-repo-id",
            f"{repo_id!r} cannot be the name of a repository",
            expected="user/name; letters, digits, - _ . and at most 96 characters",
            hint="e.g. `attnconvert push DIR my-name/SmolLM2-hedgehog`",
        ) from error


def _check_kind(folder: Path, adapters_only: bool) -> None:
    has_adapters = (folder / FACTS_FILE).is_file()
    if adapters_only and not has_adapters:
        raise AttnConvertError(
            "not-adapters",
            f"{str(folder)!r} is a full checkpoint, not adapters",
            expected="a folder written with `--adapters-only`",
            hint="leave --adapters-only out to push the checkpoint, or convert again with --adapters-only",
        )
    if has_adapters and not adapters_only:
        raise AttnConvertError(
            "adapters-only-folder",
            f"{str(folder)!r} holds adapters, not a full checkpoint",
            hint="add --adapters-only, or make the checkpoint first: `attnconvert merge`",
        )


def _refused(reason: str, where: str, hint: str) -> AttnConvertError:
    return AttnConvertError("push-refused", f"not pushed: {reason}", where=where, hint=hint)


def check_complete(folder: Path) -> None:
    """Compare the weight files with their index and with their own headers; reads headers only.

    Raises:
        AttnConvertError: `push-refused`.
    """
    again = "copy or convert the model again; nothing was sent"
    adapters = (folder / FACTS_FILE).is_file()
    needed = _ADAPTER_FILES if adapters else ("config.json", "tokenizer_config.json", *_code_files(folder))
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise _refused(f"{', '.join(missing)} missing", str(folder), again)
    if adapters:
        for name in ("adapter_model.safetensors", CORES_FILE):
            _tensor_names(folder / name, again)
        return
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise _refused("there are no weights", str(folder), again)
        _tensor_names(folder / "model.safetensors", again)
        return
    try:
        weight_map = {str(tensor): str(shard) for tensor, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise _refused("the list of weight shards cannot be read", str(index), again) from error
    for shard in sorted(set(weight_map.values())):
        if _WEIGHTS.fullmatch(shard) is None or not (folder / shard).is_file():
            raise _refused(f"weight shard {shard} is missing", str(index), again)
        listed = {tensor for tensor, file in weight_map.items() if file == shard}
        if _tensor_names(folder / shard, again) != listed:
            raise _refused(f"{shard} does not hold the tensors that the index lists", str(index), again)


def _tensor_names(path: Path, hint: str) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:  # compares the size of the file with its header
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise _refused(f"{path.name} is cut off or no safetensors file ({str(error).splitlines()[0][:120]})", str(path), hint) from error


def check_loads(files: Mapping[str, bytes | Path], *, adapters_only: bool = False, base: str | None = None) -> None:
    """Load exactly these files, here and in a fresh process without attnconvert, and compare; run the model in every way that generation may.

    Args:
        files: path -> content, or the file that holds it.
        adapters_only: adapters are merged into their base model in memory; there is nothing to reload.
        base: the base model of adapters, where it is not as the files say.

    Raises:
        AttnConvertError: `push-refused`.
    """
    from attnconvert.convert.reevaluate import load_saved
    from attnconvert.convert.save import check_parity, check_reload

    with tempfile.TemporaryDirectory(prefix="attnconvert-push-") as temporary:
        staging = Path(temporary) / "model"
        for name, content in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                try:
                    path.symlink_to(content.resolve())
                except OSError:  # Windows without the right to make links
                    shutil.copyfile(content, path)
        try:
            loaded = load_saved(str(staging), base=base)
            check_parity(loaded.model)
            if not adapters_only:
                check_reload(loaded.model, staging)
        except AttnConvertError as error:
            raise _refused(error.message, error.code, error.hint or "convert the model again") from error
        except Exception as error:  # whatever transformers says of a folder that it cannot load
            first = next(iter(str(error).splitlines()), "")[:300]
            raise _refused(f"the model does not load: {type(error).__name__}: {first}", "files to push", "copy or convert the model again") from error


def _local_base(folder: Path) -> str | None:
    """The base model of adapters by the name that works here only, which is taken out of what is pushed; None for one that others know too."""
    name = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["base_model"]["name"]
    return None if name == "demo" or card.is_hub_id(name) else str(name)


def _check_secrets(files: Mapping[str, bytes | Path], token: str | None) -> None:
    for name, content in files.items():
        if isinstance(content, bytes) and ((token and token.encode() in content) or _SECRET.search(content)):
            raise _refused(
                f"{name} contains an access token of the Hub", name, "remove it from the file, and revoke that token in your settings: others may have seen it"
            )


# ---------------------------------------------------------------- which files


def _code_files(folder: Path) -> list[str]:
    """The Python files that `auto_map` of config.json names, and those they import from beside them."""
    try:
        auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):
        return []
    references = [ref for value in auto_map.values() for ref in (value if isinstance(value, list) else [value]) if isinstance(ref, str)]
    waiting = [ref.rpartition("--")[2].partition(".")[0] + ".py" for ref in references]
    found: list[str] = []
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.append(name)
        if (folder / name).is_file():
            tree = ast.parse((folder / name).read_text(encoding="utf-8"))
            waiting += [
                f"{node.module.partition('.')[0]}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
            ]
    return sorted(found)


def _gather(folder: Path, document: Mapping[str, Any], repo_id: str, adapters_only: bool, facts: card.BaseFacts) -> _Contents:
    """What goes into the repository. Records lose the paths of this machine; weights, code and tokenizer go as they are."""
    if adapters_only:
        named: set[str] = {*_ADAPTER_FILES}
        shards: set[str] = set()
    else:
        named = {*_CONFIG_FILES, *_code_files(folder)}
        index = folder / _INDEX
        shards = {_INDEX, *json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} if index.is_file() else {"model.safetensors"}
    named |= {*_TOKENIZER_FILES, *shards}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = _paths_to_hide(folder, document)
    files: dict[str, bytes | Path] = {}
    skipped: dict[str, str] = {}
    for name in names:
        path = folder / name
        record = _REPORTS.fullmatch(name) or _RECORDS.fullmatch(name)
        if name == card.CARD_FILE:
            continue
        if not (name in named or record or _TEMPLATES.fullmatch(name)):
            top = name.partition("/")[0] + "/" if "/" in name and not name.startswith("attnconvert/") else name
            skipped[top] = _why_not(name)
            continue
        files[name] = _published(name, path, paths, is_record=record is not None)
    readme = folder / card.CARD_FILE
    old = readme.read_text(encoding="utf-8") if readme.is_file() else None
    licensed = facts.license is not None or (old is not None and "license" in card.hand_fields(old))
    text = card.make_card(document, old=old, repo_id=repo_id, adapters_only=adapters_only, facts=facts)
    files[card.CARD_FILE] = card.hide_paths(text, paths).encode()
    return _Contents({name: files[name] for name in sorted(files)}, tuple(sorted(skipped.items())), tuple(_notes(document, adapters_only, licensed)))


def _why_not(name: str) -> str:
    if name.endswith((".tmp", ".lock", ".log")) or Path(name).name.startswith("."):
        return "temporary or hidden"
    if re.search(r"(optimizer|checkpoint|state|rng|\.run/)", name) or name.endswith((".pt", ".pth", ".bin")):
        return "training state"
    return "not part of the model or its report"


def _notes(document: Mapping[str, Any], adapters_only: bool, licensed: bool) -> Iterator[str]:
    base = document["conversion"].get("base_model")
    if adapters_only and base != "demo" and not card.is_hub_id(base):
        yield "the base model is a local folder: whoever merges these adapters has to give it with --base"
    if not licensed:
        yield "the licence of the base model was not found, so the card says `license: other`; `attnconvert card DIR --license ID` sets it"
    if not document.get("evaluation"):
        yield "nothing was measured after this conversion; `attnconvert evaluate-converted` adds figures to the card"


def _paths_to_hide(folder: Path, document: Mapping[str, Any]) -> set[str]:
    paths = card.local_paths(document)
    for record in [folder / FACTS_FILE, *sorted((folder / "attnconvert").glob("*.json"))]:
        with contextlib.suppress(OSError, ValueError):
            paths |= card.local_paths(json.loads(record.read_text(encoding="utf-8")))
    here = {str(folder.absolute()), str(folder.resolve()), str(Path.cwd()), str(Path.home()), tempfile.gettempdir()}
    # The root of a file system is no name that could be hidden.
    return {path for path in paths | here if path.strip("/\\.~") and not re.fullmatch(r"[A-Za-z]:[\\/]*", path)}


def _published(name: str, path: Path, paths: Iterable[str], *, is_record: bool) -> bytes | Path:
    """The content to push: a record without paths of this machine, a configuration without a path in its name, anything else as it is."""
    texts = (".json", ".jsonl", ".yaml", ".md", ".html", ".svg")
    if (is_record and name.endswith(texts)) or name in (FACTS_FILE, "adapter_config.json"):
        text = path.read_text(encoding="utf-8")
        # In HTML anything may look like a path (pictures are base64); it names none that report.json does not.
        own = set() if name.endswith((".html", ".svg")) else card.local_paths(text)
        return card.hide_paths(text, {*paths, *own}).encode()
    if path.stat().st_size > _IN_MEMORY or name.endswith(".safetensors"):
        return path
    content = path.read_bytes()
    if name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        fields = json.loads(content)
        for key in _PATH_FIELDS:
            if isinstance(fields.get(key), str) and re.match(r"(~|\.{1,2})?[\\/]|[A-Za-z]:[\\/]", fields[key]):
                fields[key] = card.hide_paths(fields[key], [fields[key]])
        if fields != json.loads(content):
            return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
    return content


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


# ---------------------------------------------------------------- talking to the Hub


class _Session:
    """A connection: the api object, the token (for nothing but taking it out of texts), the repository, and who is told what happens."""

    def __init__(self, api: Any, token: str, repo_id: str, progress: PushProgress, note: Callable[[str], None]):
        self.api, self._token, self.repo_id, self.progress, self.note = api, token, repo_id, progress, note

    def __repr__(self) -> str:
        return f"_Session({self.repo_id})"

    def scrub(self, text: str) -> str:
        return _SECRET.sub(b"***", text.replace(self._token, "***").encode()).decode()

    def call(self, what: str, function: Callable[[], T], *, retry: bool = True) -> T:
        """`function()`; again after a passing failure if `retry`, and every failure that is the user's to mend as AttnConvertError."""
        for wait in (*WAITS, None):
            try:
                return function()
            except AttnConvertError:
                raise
            except Exception as error:
                if retry and wait is not None and _passing(error):
                    pause = min(max(wait, _asked_wait(error)), _LONGEST_WAIT)
                    self.note(f"{what} failed ({self.scrub(_first_line(error))}); trying again in {pause:g} s")
                    time.sleep(pause)
                    continue
                explained = _explain(error, what, self)
                if explained is None:
                    raise
                # The chain is shown with a traceback; a server that repeats the token must not get it in there.
                raise explained from (error if self._token not in _chain_text(error) else None)
        raise AssertionError("the last try returns or raises")


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _chain_text(error: BaseException) -> str:
    return "\n".join(str(link) for link in _chain(error))


def _first_line(error: BaseException) -> str:
    """What the server says, or else the first line of what a library says."""
    for link in _chain(error):
        said = getattr(link, "server_message", None)
        if isinstance(said, str) and said.strip():
            return " ".join(said.split())[:200]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _status(error: BaseException) -> int | None:
    """HTTP status of the answer that caused the error."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _lost_connection(error: BaseException) -> bool:
    """A failure of the network. huggingface_hub 2 uses httpx2, 1 uses httpx: known by name, since either may be absent."""
    for link in _chain(error):
        if isinstance(link, ConnectionError | TimeoutError):
            return True
        if any(kind.__name__ == "TransportError" and kind.__module__.split(".")[0] in ("httpx", "httpx2") for kind in type(link).__mro__):
            return True
    return False


def _passing(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT
    return _lost_connection(error) or isinstance(error, json.JSONDecodeError)  # a proxy's page where an answer should be


def _asked_wait(error: BaseException) -> float:
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        text = headers.get("Retry-After", "") if headers is not None else ""
        if text.isdecimal():
            return float(text)
    return 0.0


_LOGIN = "make a token with scope `write` in the settings of your account, then `hf auth login`, or set HF_TOKEN; `hf auth whoami` shows who you are"
_AGAIN = "run the same command again later: what has arrived is not sent again"


def _explain(error: Exception, what: str, session: _Session) -> AttnConvertError | None:
    """The user's version of what huggingface_hub raised, or None for a bug."""
    from huggingface_hub import errors as hub

    chain, status, name = _chain(error), _status(error), session.repo_id
    first = session.scrub(_first_line(error))
    namespace = name.partition("/")[0] if "/" in name else "your account"

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if has(hub.OfflineModeIsEnabled):
        return AttnConvertError("offline", "offline mode is on, so nothing can be pushed", hint="unset HF_HUB_OFFLINE; --dry-run works offline")
    if has(hub.GatedRepoError):
        return AttnConvertError("gated-model", f"{name!r} is gated: its owner must grant you access", hint="accept the conditions on its page, then run again")
    if has(hub.RevisionNotFoundError):
        return AttnConvertError("hub-revision-not-found", f"{name!r} has no such branch", hint="check --revision")
    if has(hub.RepositoryNotFoundError) or status == 404:
        return AttnConvertError(
            "hub-repo-not-found",
            f"the Hub knows no repository {name!r}, or does not show it to you",
            where=what,
            hint=f"check the spelling of user and name; the token must belong to {namespace!r} or to a member of it (`hf auth whoami`)",
        )
    if status == 401:
        return AttnConvertError("hub-login", "the Hub does not accept the token: it is wrong, expired or revoked", where=what, hint=_LOGIN)
    if status in (402, 403):
        return AttnConvertError(
            "hub-forbidden",
            f"the token may not write to {name!r}" if status == 403 else f"the plan of {namespace!r} does not allow this",
            where=what,
            expected=f"a token with scope `write`, or a fine-grained one with write access to the repositories of {namespace!r}",
            hint=f"check that {namespace!r} is you or an organisation you may write to (`hf auth whoami`), then {_LOGIN.split(';')[0]}",
        )
    if status in (409, 412):
        return AttnConvertError(
            "hub-conflict",
            f"{name!r} changed meanwhile, or the name is taken",
            where=what,
            hint="wait until nobody else writes to it and run again; or choose another name if it is not yours",
        )
    if status is not None and status in _TRANSIENT:
        return AttnConvertError("hub-unavailable", f"the Hub answers {status}, after several tries", where=what, hint=_AGAIN)
    if status is not None:
        return AttnConvertError("hub-rejected", f"the Hub refused: {first}", where=what, hint="if this is not about your account, please report it")
    if _lost_connection(error):
        return AttnConvertError("hub-unreachable", f"the connection to the Hub fails: {first}", where=what, hint=f"check the network; {_AGAIN}")
    if isinstance(error, ValueError) and "README.md" in str(error):
        return AttnConvertError(
            "hub-rejected", f"the Hub refused the metadata of README.md: {session.scrub(' '.join(str(error).split()))[:300]}", hint="mend README.md"
        )
    return None


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Inside, huggingface_hub shows no bars and no warnings of retries: the caller shows its own, and an address may hold a signature."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging  # type: ignore[attr-defined]

    before, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            enable_progress_bars()


def _full_name(session: _Session) -> str:
    """`user/name`; stops early where the token can only read."""
    who = session.call("log in", session.api.whoami)
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    name = session.repo_id if "/" in session.repo_id else f"{who['name']}/{session.repo_id}"
    if role == "read":
        raise AttnConvertError(
            "hub-forbidden", f"the token of {who['name']!r} can only read", where=f"push to {name}", expected="a token with scope `write`", hint=_LOGIN
        )
    return name


def _create(session: _Session, *, private: bool, revision: str | None) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api, name = session.api, session.repo_id

    def look() -> Any:
        try:
            return api.model_info(name)
        except GatedRepoError:  # a kind of RepositoryNotFoundError
            raise
        except RepositoryNotFoundError:
            return None

    # Asked first: who may open a pull request, or write to one repository only, may not create any.
    info = session.call("look at the repository", look)
    if info is None:
        # Not `private=False`: an organisation may have its own default.
        session.call("create the repository", lambda: api.create_repo(name, private=True if private else None, exist_ok=True))
        info = session.call("look at the repository", lambda: api.model_info(name))
    if private and not info.private:
        raise AttnConvertError(
            "repo-public",
            f"{name!r} exists and is public, but --private was given",
            hint="make it private in its settings, choose another name, or leave --private out",
        )
    if revision not in (None, "main"):
        session.call("create the branch", lambda: api.create_branch(name, branch=revision, exist_ok=True))


def _tree(session: _Session, revision: str) -> dict[str, Any]:
    """Path -> RepoFile."""
    listed = session.call("list the repository", lambda: list(session.api.list_repo_tree(session.repo_id, recursive=True, revision=revision)))
    return {entry.path: entry for entry in listed if hasattr(entry, "blob_id")}


def _check_taken(session: _Session, tree: Iterable[str], adapters_only: bool) -> None:
    """Refuse to write a conversion over another model, which a slip in the name would do."""
    names = set(tree)
    # A stock checkpoint with fewer KV heads has no code to know it by, but the record of its run.
    adapters = FACTS_FILE in names
    full = "modeling_attnconvert.py" in names or ("attnconvert/run.json" in names and not adapters)
    if full or adapters:
        if adapters == adapters_only:
            return
        what = "a full converted checkpoint" if full else "adapters of a conversion"
    elif any(_FOREIGN.fullmatch(name) for name in names):
        what = "another model"
    else:
        return
    raise AttnConvertError(
        "repo-taken",
        f"{session.repo_id!r} holds {what}",
        where=", ".join(sorted(name for name in names if _FOREIGN.fullmatch(name))[:4]),
        hint="choose another name; or push to a branch with --revision, or open a pull request with --create-pr",
    )


def _same(entry: Any, operation: Any) -> bool:
    """Whether the file in the repository has the content of this operation."""
    if entry is None or entry.size != operation.upload_info.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == operation.upload_info.sha256.hex())
    with operation.as_file() as file:
        content = file.read()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _send(session: _Session, contents: _Contents, *, branch: str, message: str, create_pr: bool, adapters_only: bool) -> PushResult:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, name = session.api, session.repo_id
    operations = {path: CommitOperationAdd(path, content if isinstance(content, bytes) else str(content)) for path, content in contents.files.items()}
    before = _tree(session, branch)
    if branch == "main" and not create_pr:
        _check_taken(session, before, adapters_only)
    status = {path: "unchanged" if _same(before.get(path), op) else "changed" if path in before else "new" for path, op in operations.items()}
    stale = tuple(sorted(path for path in before if _OURS.fullmatch(path) and path not in operations))

    large = [op for path, op in operations.items() if status[path] != "unchanged" and isinstance(contents.files[path], Path)]
    total, done = sum(op.upload_info.size for op in large), 0
    for operation in large:
        session.progress("upload", done, total)
        one = [operation]
        session.call(f"upload {operation.path_in_repo}", lambda one=one: api.preupload_lfs_files(name, additions=one, revision=branch, create_pr=create_pr))  # type: ignore[misc]
        done += operation.upload_info.size
    if large:
        session.progress("upload", done, total)

    def commit() -> Any:
        # A commit whose answer got lost may have been made: look before making another.
        now = _tree(session, branch)
        wanted = [op for path, op in operations.items() if not _same(now.get(path), op)]
        gone = [CommitOperationDelete(path) for path in stale if path in now]
        if not wanted and not gone:
            return None
        return api.create_commit(name, [*wanted, *gone], commit_message=message, revision=branch, create_pr=create_pr)

    # A second try of a pull request that was made all the same would open a second one.
    made = session.call("commit", commit, retry=not create_pr)
    pull_request, target = (made.pr_url, made.pr_revision) if made is not None and create_pr else (None, branch)
    after = _tree(session, target)
    wrong = [path for path, operation in operations.items() if not _same(after.get(path), operation)]
    if wrong:
        raise AttnConvertError(
            "push-incomplete",
            f"{len(wrong)} files are not in {name!r} as they were sent: {', '.join(wrong[:4])}",
            hint="somebody else may write to it; run again",
        )
    oid = made.oid if made is not None else session.call("look at the repository", lambda: api.repo_info(name, revision=branch)).sha
    files = tuple(PushFile(path, _size(content), status[path]) for path, content in contents.files.items())
    snippet = _snippet(name, str(oid), adapters_only, stock="modeling_attnconvert.py" not in contents.files)
    where = f"{api.endpoint}/{name}" + ("" if branch == "main" else f"/tree/{branch}")
    return PushResult(name, where, files, contents.skipped, stale, branch, str(oid), pull_request, contents.notes, snippet)


def _snippet(repo_id: str, commit: str, adapters_only: bool, *, stock: bool) -> str:
    if not adapters_only:
        return card.usage(repo_id, commit, stock=stock).removeprefix("```python\n").removesuffix("\n```")
    folder = repo_id.rpartition("/")[2]
    return f"hf download {repo_id} --revision {commit} --local-dir {folder}\nattnconvert merge {folder} --out {folder}-merged"
