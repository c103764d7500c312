"""What all Triton operators need to know of the machine, and how PyTorch gets to know them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

# Read once, here: torch.compile traces who asks, and can ask neither a device nor the environment.
INTERPRETED = triton.knobs.runtime.interpret
_ARCHITECTURES = tuple(10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))


def architecture(device: int) -> int:
    """10 * major + minor of a GPU's compute capability; of -1, the interpreter on a CPU, an H100's."""
    return _ARCHITECTURES[device] if device >= 0 else 90


def namespace(module: str) -> str:
    """Where a module registers its operators: a copy that travels with a checkpoint must not meet the package's, or another checkpoint's.

    Args:
        module: its `__name__`.
    """
    return "attnconvert" if module.startswith("attnconvert.") else "attnconvert_" + hashlib.sha256(module.encode()).hexdigest()[:12]


def register(space: str, operators: Mapping[str, tuple[Callable[..., object], Callable[..., object]]]) -> torch.library.Library:
    """Registers operators for CPU and CUDA. Plainly, not by torch.library.custom_op: its checks cost more host time a call than the kernels take on a small model.

    A module that is executed again (a checkpoint's code, reloaded) has to drop the library of the first time before.

    Args:
        space: from `namespace`.
        operators: name -> (the function, which changes none of its arguments; what makes empty outputs of its shapes).

    Returns:
        What holds the registrations: they end with it.
    """
    library = torch.library.Library(space, "FRAGMENT")
    for name, (function, shapes) in operators.items():
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        for device in ("CUDA", "CPU"):
            library.impl(name, function, device)
        torch.library.register_fake(f"{space}::{name}", shapes, lib=library)
    return library


def runs_here(x: Tensor) -> bool:
    """Whether to call an operator's function itself: the dispatcher's way to it costs as much as the launches, and only those who trace or transform need it."""
    return not (torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())
