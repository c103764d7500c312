"""Which implementation of an operator runs: asked for by the caller, or for the whole process."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

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


def use_triton(impl: Impl, x: Tensor, refusal: Callable[[], str | None], what: str) -> bool:
    """Whether the Triton form of an operator runs, rather than the PyTorch form.

    Args:
        impl: `reference`, `triton`, which never falls back, or `auto`: triton for bf16 and fp16 on CUDA wherever it can, else PyTorch, with the reason logged once.
        x: an input.
        refusal: why the kernels cannot take the inputs, or None.
        what: the operator's name in the log.

    Raises:
        ValueError: `triton` was asked for and cannot take the inputs; or impl is none of the three.
    """
    impl = in_this_process(impl)
    if impl == "reference" or (impl == "auto" and not x.is_cuda):
        return False
    exact = impl == "auto" and x.dtype not in (torch.bfloat16, torch.float16)
    why = f"{x.dtype} inputs ask for exact products" if exact else refusal()
    if impl == "triton" and why is not None:
        raise ValueError(f"impl='triton' cannot run here: {why}; use impl='auto' or 'reference'")
    if why is not None and not torch.compiler.is_compiling():
        log_once(f"{what} runs in PyTorch, not in Triton: {why}")
    return why is None
