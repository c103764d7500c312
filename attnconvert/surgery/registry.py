"""Find methods by name: the files of `methods/`, plus the entry points `attnconvert.methods` of other packages."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import lru_cache
from importlib import metadata

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.method import Method


@lru_cache(maxsize=1)
def _sources() -> dict[str, str]:
    """Method name -> module path, without importing any of them."""
    from attnconvert.surgery import methods

    found = {m.name: f"{methods.__name__}.{m.name}" for m in pkgutil.iter_modules(methods.__path__)}
    for entry in metadata.entry_points(group="attnconvert.methods"):
        if entry.name in found:
            raise AttnConvertError(
                "duplicate-method",
                f"method {entry.name!r} is defined twice",
                where=f"{found[entry.name]} and entry point {entry.value}",
                hint="uninstall one of the packages",
            )
        found[entry.name] = entry.value
    return found


def available() -> list[str]:
    """Names of all methods, sorted; imports none of them."""
    return sorted(_sources())


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        AttnConvertError: `unknown-method`, naming the valid ones and the nearest match.
    """
    sources = _sources()
    if name not in sources:
        close = difflib.get_close_matches(name, sources, 1)
        raise AttnConvertError(
            "unknown-method",
            f"unknown method {name!r}",
            expected=f"one of: {', '.join(sorted(sources))}" + (f"; did you mean {close[0]!r}?" if close else ""),
            hint="`attnconvert methods` lists each method with its options",
        )
    method: Method = importlib.import_module(sources[name].split(":")[0]).METHOD
    return method
