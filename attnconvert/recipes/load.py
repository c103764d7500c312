"""YAML -> Recipe. Every mistake of a recipe is reported at once, each with its file, line and YAML path.

The YAML is first read into a tree of `Item`s that remember where they were written. `extends` and `--set` are merges of such trees, so a
value still knows its file (or its `--set` text) when pydantic refuses it.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from attnconvert.errors import AttnConvertError, ErrorGroup
from attnconvert.recipes.schema import Recipe
from attnconvert.surgery import registry
from attnconvert.surgery.method import MethodConfig

_FOLDER = Path(__file__).parent
_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1 << 20
"""A recipe is a page of text; a larger file is a model or data file given by mistake, and is not read."""

_TAG = "tag:yaml.org,2002:"
_COMMON = "put the common part in a file and name it with `extends`"
_SHOW = "`attnconvert recipes show hedgehog` prints a complete one"


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and what it was made from.

    Attributes:
        recipe: the settings, every default filled in.
        source_path: absolute path of the file it was read from.
        text: that file's text, as written (a base named by `extends` and the overrides are not in it).
        resolved: `recipe` as plain JSON data, with `extends`, overrides and defaults applied.
    """

    recipe: Recipe
    source_path: Path
    text: str
    resolved: dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A YAML value and the place it was written: a file and its 1-based line, or (line 0) the text of a `--set`."""

    value: str | int | float | bool | dict[str, Item] | list[Item] | None
    source: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


Location = tuple[str | int, ...]
"""Keys and list indices from the top of a recipe, as pydantic's `loc`."""


def list_recipes() -> list[str]:
    """Names of the recipes that ship with attnconvert, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def shipped_text(name: str) -> str:
    """The YAML of a shipped recipe, comments included.

    Raises:
        AttnConvertError: `unknown-recipe`.
    """
    if name not in list_recipes():
        raise _unknown_recipe(name, None)
    return _read_text(_FOLDER / f"{name}.yaml", f"{name}.yaml")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, merge and validate a recipe.

    Args:
        name_or_path: name of a shipped recipe (these win over a file of the same name), or a YAML file.
        overrides: `--set` texts such as `stages.transfer.tokens=2M` or `layers.0.config.sinks=0`, applied in order. The value is YAML.

    Raises:
        AttnConvertError: the file cannot be found or read, or is not YAML.
        ErrorGroup: all mistakes in its content and in the overrides, in the order of the file.
    """
    path, label = _find(str(name_or_path), None, None)
    problems: list[tuple[Item, AttnConvertError]] = []
    root, text = _read_tree(path, label, (), problems)
    for override in overrides:
        root = _override(root, override, problems)
    recipe = _validate(root, problems)
    if problems or recipe is None:
        # The recipe's own file first, then its bases, then --set; inside each by line.
        files = [item.source for item, _ in problems if item.line]
        sources = list(dict.fromkeys([label, *files, *(f"--set {override}" for override in overrides)]))
        problems.sort(key=lambda problem: (sources.index(problem[0].source), problem[0].line))
        raise ErrorGroup([error for _, error in problems])
    return LoadedRecipe(recipe=recipe, source_path=path.resolve(), text=text, resolved=recipe.model_dump(mode="json"))


def dump_resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; loads back to an equal Recipe."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=160, allow_unicode=True)
    return text


# Finding and reading files


def _find(name: str, beside: tuple[Path, str] | None, where: str | None) -> tuple[Path, str]:
    """The file meant by a recipe name or path, and how messages call it.

    Args:
        name: what the user wrote.
        beside: (path, label) of the file that says `extends: name`; a relative path starts there.
        where: location of that `extends`.
    """
    if name in list_recipes():
        return _FOLDER / f"{name}.yaml", f"attnconvert/recipes/{name}.yaml"
    path, label = (Path(name), name) if beside is None else (beside[0].parent / name, str(Path(beside[1]).parent / name))
    is_path = "/" in name or "\\" in name or path.suffix in _SUFFIXES
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a name too long for the file system, a parent folder that may not be read
        raise AttnConvertError("recipe-unreadable", f"cannot read {_short(label)}: {error.strerror or error}", where=where, hint=_SHOW) from error
    if not is_path and (is_folder or not exists):
        raise _unknown_recipe(name, where)
    if is_folder:
        raise AttnConvertError("recipe-unreadable", f"{label!r} is a folder", where=where, expected="a YAML file or the name of a shipped recipe", hint=_SHOW)
    if not exists:
        files = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, files, 1)
        shipped = path.stem in list_recipes()
        hint = f"a shipped recipe is called by its name alone: `{path.stem}`" if shipped else "`attnconvert recipes list` names the shipped ones"
        raise AttnConvertError(
            "recipe-not-found",
            f"there is no file {label!r}",
            where=where,
            expected=f"an existing file; did you mean {str(path.parent / close[0])!r}?" if close else None,
            hint=hint,
        )
    return path, label


def _unknown_recipe(name: str, where: str | None) -> AttnConvertError:
    return AttnConvertError(
        "unknown-recipe",
        f"unknown recipe {_short(name)}",
        where=where,
        expected=_one_of(name, list_recipes()) + " (or a file, such as my.yaml)",
        hint="`attnconvert recipes list` says what each one does",
    )


def _read_text(path: Path, label: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise AttnConvertError("recipe-unreadable", f"cannot read {label!r}: {error.strerror or error}", where=label) from error
    if len(raw) > _MAX_BYTES:
        raise AttnConvertError(
            "recipe-not-text", f"{label!r} is larger than {_MAX_BYTES} bytes", where=label, expected="a YAML recipe of about a page", hint=_SHOW
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text, problem = "", f"byte {error.start} is not UTF-8"
    else:
        problem = "it holds NUL bytes" if "\0" in text else ""
    if problem:
        raise AttnConvertError("recipe-not-text", f"{label!r} is not a text file: {problem}", where=label, expected="a YAML recipe in UTF-8", hint=_SHOW)
    return text


def _read_tree(path: Path, label: str, chain: tuple[Path, ...], problems: list[tuple[Item, AttnConvertError]]) -> tuple[Item, str]:
    """The tree of one file merged over the files it extends, and the file's own text.

    Args:
        path: the file.
        label: how messages call it.
        chain: the files that led here through `extends`, for finding cycles.
        problems: mistakes that leave the rest of the file readable are added here.
    """
    text = _read_text(path, label)
    node = _compose(text, label)
    if node is None:
        raise AttnConvertError("recipe-empty", f"{label!r} holds no settings", where=label, expected="a mapping with name, layers, stages", hint=_SHOW)
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else f"the value {_short(node.value)}"
        raise AttnConvertError(
            "recipe-not-mapping", f"the top level is {kind}", where=f"{label}:{_line(node)}", expected="a mapping with name, layers, stages", hint=_SHOW
        )
    root = _convert(node, label, (), None, problems, set())
    assert isinstance(root.value, dict)
    if "extends" not in root.value:
        return root, text
    extends = root.value["extends"]
    own = Item({key: item for key, item in root.value.items() if key != "extends"}, root.source, root.line)
    where = f"{extends.place}  extends"
    if not isinstance(extends.value, str):
        raise AttnConvertError(
            "invalid-value", f"{_short(extends.value)} is no recipe", where=where, expected="the name of a shipped recipe, or a file beside this one"
        )
    base_path, base_label = _find(extends.value, (path, label), where)
    chain = (*chain, path.resolve())
    if base_path.resolve() in chain:
        names = [file.name for file in chain[chain.index(base_path.resolve()) :]]
        circle = " -> ".join([*names, names[0]])
        raise AttnConvertError("extends-cycle", f"recipes extend each other in a circle: {circle}", where=where, hint="remove one of the `extends` lines")
    base, _ = _read_tree(base_path, base_label, chain, problems)
    assert isinstance(base.value, dict)
    # A name and its description belong to the file they stand in: a changed recipe must not call itself by its base's name.
    inherited = {key: item for key, item in base.value.items() if key not in ("name", "description")}
    return _merge(replace(base, value=inherited), own), text


def _compose(text: str, source: str) -> yaml.Node | None:
    """YAML text -> node tree (None when it holds nothing). Raises AttnConvertError `invalid-yaml` with the line."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        where = source if mark is None else f"{source}:{mark.line + 1}"
        raise AttnConvertError("invalid-yaml", f"not valid YAML: {message}", where=where) from None
    except yaml.reader.ReaderError as error:
        where = f"{source}:{text.count(chr(10), 0, error.position) + 1}"
        raise AttnConvertError("invalid-yaml", f"not valid YAML: the character U+{error.character:04X} is not allowed", where=where) from None
    except RecursionError:
        raise AttnConvertError("invalid-yaml", "not a recipe: lists or mappings are nested too deeply", where=source) from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _convert(node: yaml.Node, source: str, path: Location, line: int | None, problems: list[tuple[Item, AttnConvertError]], seen: set[int]) -> Item:
    """YAML node -> Item. What cannot be kept (a duplicate key, an alias, a foreign tag) is added to `problems` and left out.

    Args:
        node: the YAML node.
        source: file label, or the text of a `--set`.
        path: where the node stands in the recipe.
        line: line of the key the node belongs to; None = the node's own. 0 for a `--set`.
        problems: receives the mistakes.
        seen: ids of the nodes met so far, which finds aliases.
    """
    line = _line(node) if line is None else line
    here = Item(None, source, line)

    def complain(code: str, message: str, at: Item, at_path: Location, *, expected: str | None = None, hint: str | None = None) -> None:
        problems.append((at, AttnConvertError(code, message, where=_place(at, at_path), expected=expected, hint=hint)))

    if id(node) in seen:
        complain("invalid-yaml", "recipes do not use YAML aliases (*name)", here, path, hint=f"repeat the value, or {_COMMON}")
        return here
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        items: dict[str, Item] = {}
        for key, value in node.value:
            at = Item(None, source, _line(key) if line else 0)
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                hint = _COMMON if key.tag == f"{_TAG}merge" else None
                complain("unknown-key", f"{shown} is not a key of a recipe", at, path, expected="a word", hint=hint)
            elif key.value in items:
                first = items[key.value]
                complain("duplicate-key", f"the key {key.value!r} is given twice", at, (*path, key.value), expected=f"one value; the first is at {first.place}")
            else:
                items[key.value] = _convert(value, source, (*path, key.value), at.line, problems, seen)
        return replace(here, value=items)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return replace(here, value=[_convert(child, source, (*path, i), None if line else 0, problems, seen) for i, child in enumerate(node.value)])
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind in ("null", "bool", "int", "float"):
        try:
            return replace(here, value=yaml.SafeLoader("").construct_object(node))
        except ValueError:  # `!!int x`
            complain("invalid-yaml", f"{node.value!r} is not of type {kind}", here, path)
            return here
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp", "value", "merge"):
        return replace(here, value=node.value)  # an unquoted date is text here: no setting is a date
    complain("invalid-yaml", f"recipes do not use YAML tags ({node.tag.replace(_TAG, '!!')})", here, path)
    return here


# Merging: `extends` and `--set`


def _merge(base: Item, over: Item) -> Item:
    """`over` on top of `base`: mappings are merged key by key, everything else (lists too) is replaced whole."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    merged = dict(base.value)
    for key, item in over.value.items():
        merged[key] = _merge(merged[key], item) if key in merged else item
    return replace(over, value=merged)


def _override(root: Item, text: str, problems: list[tuple[Item, AttnConvertError]]) -> Item:
    """The tree with one `--set path=value` applied. A mistake in its form is added to `problems` and the tree stays as it was."""
    source = f"--set {text}"
    keys, equals, value_text = text.partition("=")
    parts = [part.strip() for part in keys.split(".")]
    try:
        if not equals or not all(parts):
            expected = "for example stages.transfer.tokens=2M or layers.0.config.sinks=0"
            raise AttnConvertError("invalid-override", f"{text!r} is not of the form path=value", where=source, expected=expected)
        if parts[0] == "extends":
            raise AttnConvertError("invalid-override", "`extends` cannot be overridden", where=source, hint="give the other recipe with --recipe")
        node = _compose(value_text, source)
        value = Item(None, source, 0) if node is None else _convert(node, source, tuple(parts), 0, problems, set())
        return _put(root, parts, value, source)
    except AttnConvertError as error:
        if error.code == "invalid-yaml":  # the line inside a one-line value says nothing
            hint = "quote the value for the shell and for YAML: --set 'key=\"value\"'"
            error = AttnConvertError("invalid-override", f"the value is {error.message}", where=source, hint=hint)
        problems.append((Item(None, source, 0), error))
        return root


def _put(item: Item, parts: Sequence[str], value: Item, source: str, done: Location = ()) -> Item:
    """`item` with `value` at `parts`; blocks on the way that the file leaves out (or sets to null) are created."""
    if not parts:
        return value
    key, path = parts[0], ".".join(map(str, done))
    if isinstance(item.value, list):
        length = len(item.value)
        if not key.isdecimal() or int(key) >= length:
            expected = f"an index from 0 to {length - 1}" if length else "a list with at least one item"
            raise AttnConvertError("invalid-override", f"{path!r} is a list of {length}; it has no item {key!r}", where=source, expected=expected)
        index = int(key)
        items = list(item.value)
        items[index] = _put(items[index], parts[1:], value, source, (*done, index))
        return replace(item, value=items)
    if item.value is not None and not isinstance(item.value, dict):
        message = f"{path!r} holds the value {_short(item.value)}, so it has no key {key!r}"
        raise AttnConvertError("invalid-override", message, where=source, expected=f"{path}=VALUE")
    children = item.value or {}
    child = children.get(key, Item(None, source, 0))
    merged = {**children, key: _put(child, parts[1:], value, source, (*done, key))}
    return replace(item, value=merged) if isinstance(item.value, dict) else Item(merged, source, 0)


# Validation


def _plain(item: Item) -> Any:
    if isinstance(item.value, dict):
        return {key: _plain(child) for key, child in item.value.items()}
    return [_plain(child) for child in item.value] if isinstance(item.value, list) else item.value


def _validate(root: Item, problems: list[tuple[Item, AttnConvertError]]) -> Recipe | None:
    """The recipe, or None with every mistake added to `problems`."""
    data = _plain(root)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        unread = {problem.where for _, problem in problems if problem.code == "invalid-yaml"}
        for details in error.errors(include_url=False):
            # pydantic also calls a list too short when its items are wrong; the items are reported.
            if details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]:
                continue
            item, problem = _translate(details, root, data)
            if problem.where not in unread:  # a value that could not be read is null here, which is not the user's mistake
                problems.append((item, problem))
        return None
    for path, given, became in _leaves(data, recipe.model_dump(mode="json"), ()):
        if isinstance(given, bool) and not isinstance(became, bool):  # pydantic reads `batch_size: yes` as 1
            problems.append(_at(root, path, "invalid-value", f"{_short(given)} is not a number", expected="a number"))
        elif isinstance(became, float) and not math.isfinite(became):
            problems.append(_at(root, path, "invalid-value", f"{_short(given)} is not a finite number", expected="a finite number"))
    return recipe


def _leaves(given: Any, became: Any, path: Location) -> Iterable[tuple[Location, Any, Any]]:
    """(path, value in the YAML, value after validation) of every scalar the recipe sets."""
    if isinstance(given, dict) and isinstance(became, dict):
        for key in [key for key in given if key in became]:
            yield from _leaves(given[key], became[key], (*path, key))
    elif isinstance(given, list) and isinstance(became, list):
        for index, (old, new) in enumerate(zip(given, became, strict=False)):
            yield from _leaves(old, new, (*path, index))
    else:
        yield path, given, became


def _translate(details: ErrorDetails, root: Item, data: Any) -> tuple[Item, AttnConvertError]:
    """One pydantic error -> ours: what is wrong with the value, what would be accepted, what was probably meant."""
    path, kind, value, context = details["loc"], details["type"], details["input"], details.get("ctx", {})
    name = str(path[-1]) if path else ""
    message = details["msg"].removeprefix("Value error, ")
    if kind == "missing":
        described = _fields_at(path[:-1], data).get(name) or f"a mapping with keys of: {', '.join(_fields_at(path, data))}"
        return _at(root, path[:-1], "missing-key", f"missing key {name!r}", expected=f"{name}: {described}")
    if kind == "extra_forbidden":
        return _at(root, path, "unknown-key", f"unknown key {name!r}", expected=_one_of(name, _fields_at(path[:-1], data)))
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return _at(root, path, "invalid-value", f"{_short(value)} is not a value of {name}", expected=_one_of(value, choices))
    if kind == "model_type":
        fields = ", ".join(_fields_at(path, data))
        return _at(root, path, "invalid-value", f"{_short(value)} is not a block of settings", expected=f"a mapping with keys of: {fields}")
    if kind == "tuple_type":
        return _at(root, path, "invalid-value", f"{_short(value)} is not a list", expected="a list")
    if kind == "too_short":
        return _at(root, path, "invalid-value", f"{name} is empty", expected=f"at least {context['min_length']} item(s)")
    if kind == "string_pattern_mismatch":
        return _at(root, path, "invalid-value", f"{_short(value)} is not accepted", expected=_fields_at(path[:-1], data).get(name))
    if "choices" in context:
        return _at(root, path, kind, context["message"], expected=_one_of(value, context["choices"]), hint=context.get("hint"))
    if "message" in context:
        return _at(root, path, kind, context["message"], expected=context.get("expected"))
    if kind == "string_type" and isinstance(value, int | float):
        return _at(root, path, "invalid-value", f"YAML reads this as {_short(value)}, not as text", expected="text", hint="put the value in quotes")
    if message.startswith("Input should be "):
        return _at(root, path, "invalid-value", f"{_short(value)} is not accepted", expected=message.removeprefix("Input should be "))
    return _at(root, path, "invalid-value", message)


def _at(root: Item, path: Location, code: str, message: str, *, expected: str | None = None, hint: str | None = None) -> tuple[Item, AttnConvertError]:
    """An error located at `path`, or at the nearest block above it that the recipe wrote."""
    item = root
    for key in path:
        if isinstance(item.value, dict) and key in item.value:
            item = item.value[str(key)]
        elif isinstance(item.value, list) and isinstance(key, int) and key < len(item.value):
            item = item.value[key]
        else:
            break
    where = _place(item, path)
    if item.line and (changed := list(dict.fromkeys(_sets_in(item)))):  # a rule over several keys, one of them overridden
        where += f"  (changed by {', '.join(changed)})"
    return item, AttnConvertError(code, message, where=where, expected=expected, hint=hint)


def _place(item: Item, path: Location) -> str:
    """`file:line  yaml.path`; a `--set` whose own text names the path is enough by itself."""
    dotted = ".".join(map(str, path))
    return item.place if not dotted or item.source.startswith(f"--set {dotted}=") else f"{item.place}  {dotted}"


def _sets_in(item: Item) -> Iterable[str]:
    if not item.line:
        yield item.source
    elif isinstance(item.value, dict | list):
        for child in item.value.values() if isinstance(item.value, dict) else item.value:
            yield from _sets_in(child)


def _fields_at(path: Location, data: Any) -> dict[str, str]:
    """Field names and descriptions of the block at `path`; empty when `path` leads to no block."""
    model: type[BaseModel] | None = Recipe
    for key in path:
        method = data.get("method") if isinstance(data, dict) else None
        data = data.get(key) if isinstance(data, dict) else data[key] if isinstance(data, list) and isinstance(key, int) else None
        if isinstance(key, int):
            continue  # an item of a list has the type found for the list
        field = None if model is None else model.model_fields.get(key)
        model = None if field is None else _model_in(field.annotation)
        if model is MethodConfig:  # the settings of the rule's own method
            model = registry.get(method).config if isinstance(method, str) and method in registry.available() else None
    fields = {} if model is None else {name: field.description or "" for name, field in model.model_fields.items()}
    return {"extends": "", **fields} if not path else fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as `tuple[LayerRule, ...]` or `KeepConfig | None`."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((model for arg in typing.get_args(annotation) if (model := _model_in(arg)) is not None), None)


def _one_of(value: Any, choices: Iterable[str]) -> str:
    """The text "one of: a, b; did you mean 'a'?"."""
    choices = list(choices)
    close = difflib.get_close_matches(str(value).lower(), choices, 1)
    return f"one of: {', '.join(choices)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _short(value: Any) -> str:
    """The value as the user would recognise it in YAML, cut to one line."""
    if isinstance(value, dict | list | tuple):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
