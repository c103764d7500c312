"""attnconvert: swap a pretrained transformer's attention for a cheaper kind, give the quality back, save an ordinary checkpoint.

`import attnconvert` is enough for `AutoModelForCausalLM.from_pretrained(converted_dir)` to work without trust_remote_code, before or
after transformers is imported. It costs nothing by itself: torch and transformers are not imported here, because the command line
must answer `--help` at once; registration waits until transformers' auto classes are.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"

_AUTO_MODULE = "transformers.models.auto.modeling_auto"


_MODELING = "attnconvert.surgery.runtime.modeling"


def register() -> None:
    """Make transformers' auto classes know converted models. Called by itself; calling it again is harmless."""
    importlib.import_module(_MODELING)  # registers itself at its end


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then registers."""

    def __init__(self, real: importlib.abc.Loader):
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        if _MODELING not in sys.modules:  # else it is being imported right now, and asked for this module
            register()


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Waits for the import of transformers' auto classes, once."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _AUTO_MODULE in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
