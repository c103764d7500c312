"""Repeated launches of Triton kernels at little cost for the host.

Triton's own launch, `kernel[grid](...)`, looks at every argument of every call to find the binary that was compiled for such arguments: 20 to 30
microseconds for a kernel with 50 of them, more than a small model's kernels run. A `Plan` is a sequence of launches in which all but the tensors'
addresses is fixed. It is run by Triton once, which compiles what is missing, and from then on it hands the addresses to the binaries found.

    layout = Layout()
    layout.add("total", (B, H), torch.float32)
    plan = Plan(x.get_device(), ("x", "y", "scratch"), [Launch(kernel, (B, H), ("x", "y", "total", T), {"BLOCK": 64}, {"num_warps": 4})], {"scratch": layout})
    plan(x, y, layout.allocate(x.device))
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
    from triton.compiler import CompiledKernel
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.machine_code import uses_of_stack_pointer

logger = logging.getLogger(__name__)
ALIGNMENT = 256  # bytes between starts of tensors in one allocation; Triton asks for 16 where torch's own allocations have 512
MAX_PLANS = 512  # kept per kind of call: the shapes, strides and options of a process that meets this many are not repeating
# The releases in which `CompiledKernel.run` takes (grid, stream, function, metadata, hooks, arguments) and an integer for a pointer. In others, and in
# the interpreter, whose launches return nothing, every launch goes through `kernel[grid]`.
_DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


class Layout:
    """Tensors that share one allocation. Sizes may be symbolic.

    Attributes:
        tensors: name -> (offset in bytes, shape, dtype).
        size: bytes in all.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self.size = 0

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Append a tensor."""
        self.tensors[name] = (self.size, shape, dtype)
        self.size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def allocate(self, device: torch.device) -> Tensor:
        """Uninitialised memory for all of them, uint8 [size]."""
        return torch.empty(self.size, dtype=torch.uint8, device=device)

    def view(self, memory: Tensor, name: str) -> Tensor:
        """The tensor `name` in what `allocate` returned."""
        offset, shape, dtype = self.tensors[name]
        return memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Launch(NamedTuple):
    """One launch: `kernel[grid](*arguments, **constants, **options)`.

    Attributes:
        arguments: what comes before the constexprs, in the kernel's order: numbers, None, and names of tensors.
        constants: constexprs by name, all of them.
        options: num_warps, num_stages, ...
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[str | float | None, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def signature(*tensors: Tensor | None) -> tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, int] | None, ...]:
    """(shape, strides, dtype, device index or -1) of each tensor: with the options of a call, what its plan depends on."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors])


# Looking through a binary takes milliseconds, and plans for other lengths run the same ones.
_uses_of_stack_pointer = functools.lru_cache(maxsize=None)(uses_of_stack_pointer)


class MiscompiledKernelError(RuntimeError):
    """No way to compile a kernel gave sound machine code."""


def sound_options(options: Mapping[str, int], compile_with: Callable[[dict[str, int]], bytes | None]) -> dict[str, int]:
    """The first of `options` and their variations with which a kernel is compiled into sound machine code.

    Other stages or warps are another program for ptxas; either was enough wherever it went wrong.

    Args:
        options: num_warps, num_stages and others.
        compile_with: options -> cubin, or None where the GPU cannot run what they ask for.

    Raises:
        MiscompiledKernelError: there is none.
    """
    stages, warps = options["num_stages"], options["num_warps"]
    other = {"num_stages": 1 if stages > 1 else 2}, {"num_warps": 4 if warps > 4 else 8}
    for change in ({}, *other, other[0] | other[1]):
        varied = {**options, **change}
        cubin = compile_with(varied)
        if cubin is not None and not _uses_of_stack_pointer(cubin):
            return varied
    raise MiscompiledKernelError(
        f"ptxas of Triton {triton.__version__} compiles this kernel to machine code with wrong addresses, with {dict(options)} and all variations;"
        " set ATTNCONVERT_IMPL=reference, or use another version of Triton"
    )


class Plan:
    """A sequence of launches on tensors that have the same shapes, strides, dtypes and devices in every call.

    Args:
        device: index of the GPU; -1 on a CPU, in Triton's interpreter.
        names: what the tensors of a call are called, in their order.
        launches: in the order in which they run, on the stream that is current at the call.
        layouts: which of the tensors are memory with tensors in it, whose names the launches know too.
    """

    def __init__(self, device: int, names: Iterable[str], launches: Iterable[Launch], layouts: Mapping[str, Layout]) -> None:
        self._device, self._launches, self._layouts = device, tuple(launches), dict(layouts)
        self._names = tuple(names)
        # A call makes one tuple: the tensors' addresses, those inside of memory, all numbers. A launch's arguments are picked from it.
        inner = [(self._names.index(memory), offset, name) for memory, layout in self._layouts.items() for name, (offset, _, _) in layout.tensors.items()]
        self._inner = [(index, offset) for index, offset, _ in inner]
        position = {name: i for i, name in enumerate([*self._names, *(name for _, _, name in inner)])}
        if len(position) != len(self._names) + len(inner):
            raise ValueError("two tensors of a plan have the same name")
        numbers: list[Any] = []
        self._picks: list[Callable[[tuple[Any, ...]], tuple[Any, ...]]] = []
        for launch in self._launches:
            picked: list[int] = []
            for argument in (*launch.arguments, *(launch.constants[name] for name in launch.kernel.arg_names[len(launch.arguments) :])):
                if isinstance(argument, str) and len(picked) < len(launch.arguments):
                    picked.append(position[argument])
                else:
                    picked.append(len(position) + len(numbers))
                    numbers.append(argument)
            self._picks.append(operator.itemgetter(*picked))
        self._numbers = tuple(numbers)
        self._checked: set[tuple[bool, ...]] = set()
        self._compiled: list[tuple[Any, ...]] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Run the launches; the tensors are those of `names`. None where no launch names it except as None."""
        if self._device >= 0 and torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(*tensors)
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        misaligned = 0
        for address in addresses:
            misaligned |= address & 15
        if misaligned or _launches_are_watched():
            self._launch(tensors)
        elif self._compiled is None:
            found = self._launch(tensors)
            if _DIRECT and all(isinstance(kernel, CompiledKernel) for kernel in found):
                grids = [(*launch.grid, 1, 1)[:3] for launch in self._launches]
                self._compiled = [
                    (kernel.run, *grid, kernel.function, kernel.packed_metadata, pick) for kernel, grid, pick in zip(found, grids, self._picks, strict=True)
                ]
        else:
            values = (*addresses, *[addresses[index] + offset for index, offset in self._inner], *self._numbers)
            stream = triton.runtime.driver.active.get_current_stream(self._device)
            for run, x, y, z, function, metadata, pick in self._compiled:
                run(x, y, z, stream, function, metadata, None, None, None, *pick(values))
        return None

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> list[Any]:
        """By Triton, which compiles what is missing and finds out what each pointer is aligned to; returns what it launched."""
        alignment = tuple(x is not None and x.data_ptr() % 16 == 0 for x in tensors)  # each combination is compiled for itself
        check = alignment not in self._checked
        named = dict(zip(self._names, tensors, strict=True))
        for memory, layout in self._layouts.items():
            whole = named[memory]
            assert whole is not None
            named |= {name: layout.view(whole, name) for name in layout.tensors}
        if check:
            self._compile_together(named)
            self._launches = tuple(launch._replace(options=self._sound_options(launch, named)) for launch in self._launches)
            self._checked.add(alignment)
        return [
            kernel[grid](*(named[x] if isinstance(x, str) else x for x in arguments), **constants, **options)
            for kernel, grid, arguments, constants, options in self._launches
        ]

    def _compile_together(self, named: Mapping[str, Any]) -> None:
        """Compile what is not compiled yet, in threads: one kernel takes seconds, a backward pass has nine, and most of that time is not Python's."""
        missing = [launch for launch in self._launches if isinstance(launch.kernel, triton.JITFunction)]
        if len(missing) < 2 or not hasattr(triton, "AsyncCompileMode"):
            return
        # A kernel that does not compile raises below, where it is compiled by itself.
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for kernel, grid, arguments, constants, options in missing:
                kernel.warmup(*(named[x] if isinstance(x, str) else x for x in arguments), grid=grid, **constants, **options)

    def _sound_options(self, launch: Launch, named: Mapping[str, Any]) -> dict[str, int]:
        """Options for a launch whose machine code is sound: its own, as a rule. Compiles, does not launch."""
        if not isinstance(launch.kernel, triton.JITFunction) or "num_stages" not in launch.options:
            return launch.options
        arguments = [named[x] if isinstance(x, str) else x for x in launch.arguments]

        def compile_with(options: dict[str, int]) -> bytes | None:
            compiled = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constants, **options)
            fits = options == launch.options or compiled.metadata.shared <= _shared_memory(self._device)
            return compiled.asm["cubin"] if fits else None

        found = sound_options(launch.options, compile_with)
        if found != launch.options:
            logger.info("%s runs with %s: with %s, ptxas gives it wrong addresses", launch.kernel.__name__, found, launch.options)
        return found


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that a block may have on a GPU."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _launches_are_watched() -> bool:
    """Whether a profiler has hooks that want to know of every launch."""
    before, after = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
