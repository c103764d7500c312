"""Which implementation of an operator runs: asked for by the caller, or for the whole process."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal

logger = logging.getLogger(__name__)
Impl = Literal["auto", "reference", "triton"]
IMPLS: tuple[Impl, ...] = ("auto", "reference", "triton")
IMPL_VARIABLE = "ATTNCONVERT_IMPL"  # what `auto` means in this process: to compare, or to work around a kernel that fails on some GPU
_AUTO = os.environ.get(IMPL_VARIABLE) or "auto"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def log_once(message: str) -> None:
    """Says why something runs as it does, once, at level info."""
    logger.info(message)


def in_this_process(impl: Impl) -> Impl:
    """`impl`, with `auto` replaced by the environment variable's value.

    Raises:
        ValueError: none of the three.
    """
    found = _AUTO if impl == "auto" else impl
    for known in IMPLS:
        if found == known:
            return known
    raise ValueError(f"impl is {found!r}, not one of {', '.join(IMPLS)} (argument impl, or the environment variable {IMPL_VARIABLE})")
