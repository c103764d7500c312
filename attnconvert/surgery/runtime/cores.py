"""Method name -> core class. In a checkpoint this file is replaced by one that imports just the cores its plan uses."""

from __future__ import annotations

import importlib

from attnconvert.surgery import registry
from attnconvert.surgery.runtime.seam import AttentionCore


def core_class(method: str) -> type[AttentionCore]:
    """The core of a method.

    Raises:
        AttnConvertError: `unknown-method`.
    """
    runtime = registry.get(method).runtime
    assert runtime is not None, f"{method} has no core: it changes projections"
    module, name = runtime.split(":")
    core: type[AttentionCore] = getattr(importlib.import_module(module), name)
    return core
