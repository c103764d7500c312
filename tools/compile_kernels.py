"""Compiles every Triton kernel configuration that ships, without a GPU, and fails where a kernel would be slow or not start.

A kernel that spills registers, or asks for more shared memory than a block may have, is seen only on the GPU in question, and then as
a slow run or a launch error. ptxas knows both. For each configuration and architecture this prints registers, stack, shared memory and
tensor-core instructions; exit status 1 when a stack is above the configuration's `max_stack` (0 unless it says otherwise), when the
machine code touches local memory of a configuration whose `max_stack` is 0, when ptxas made an address from the stack pointer, when shared memory is
above the block limit, or when nothing compiled.

    python tools/compile_kernels.py --arch sm_90 --filter 'forward.*128'
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# Triton decides when a kernel is decorated, and an interpreted kernel cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it has been; 3.9 warns that another default is coming

MODULES = tuple(
    f"attnconvert.kernels.{name}"
    for name in (
        "linear.triton",
        "linear.triton_decode",
        "span.triton",
        "span.triton_decode",
        "blocks.triton_select",
        "blocks.triton_attend",
        "blocks.triton_decode",
        "heads.triton",
        "heads.triton_routing",
        "heads.triton_projection",
    )
)
# bytes a block may ask for (CUDA programming guide, compute capabilities)
# sm_86 and sm_89 run the code and the blocks of sm_80, which has their limit here in place of its own, 163 KB.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
DEFAULT = ("sm_80", "sm_90")


class Config(NamedTuple):
    """One entry of a kernel module's `aot_configs(arch)`.

    Attributes:
        name: unique within all modules.
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type, `*bf16`, `i32`; a trailing `:16` promises that an integer is a multiple of 16. Pointers
            always are, as torch's allocations are. Names in `constexprs` may be left out.
        constexprs: argument name -> value.
        options: num_warps, num_stages and other launch options.
        max_stack: bytes of stack that are accepted, for the reason given next to the entry.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    max_stack: int = 0


class Compiled(NamedTuple):
    """What ptxas made of one configuration; sizes in bytes, seconds of one core."""

    name: str
    arch: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    hgmma: int
    hmma: int
    local: int
    seconds: float
    problems: tuple[str, ...]


def configs(module: str, arch: str) -> list[Config]:
    """What one kernel module runs on an architecture."""
    return [Config(*entry) for entry in importlib.import_module(module).aot_configs(int(arch.removeprefix("sm_")))]


def compile_config(module: str, index: int, arch: str) -> Compiled:
    """Compiles entry `index` of `module` for `arch` and reads its resources out of the binary. Runs in a worker process."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attnconvert.kernels.machine_code import uses_of_stack_pointer

    config = configs(module, arch)[index]
    signature: dict[str, str] = {}
    divisible: dict[tuple[int], list[list[Any]]] = {}
    for position, argument in enumerate(config.kernel.arg_names):
        if argument in config.constexprs:
            signature[argument] = "constexpr"
            continue
        kind, _, multiple = config.signature[argument].partition(":")
        signature[argument] = kind
        if kind.startswith("*") or multiple == "16":
            divisible[(position,)] = [["tt.divisibility", 16]]
    began = time.perf_counter()
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=config.constexprs, attrs=divisible)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints thousands of lines of PTX that ptxas refuses
            kernel = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=config.options)
    except Exception as error:
        text = "\n".join(f"{type(error).__name__}: {error}".strip().splitlines()[:8])
        return Compiled(config.name, arch, 0, 0, 0, 0, 0, 0, 0, 0, time.perf_counter() - began, (f"does not compile: {text}",))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump(knobs.nvidia.cuobjdump.path, "-res-usage", binary)
        code = _cuobjdump(knobs.nvidia.cuobjdump.path, "--dump-sass", binary)
    seconds = time.perf_counter() - began
    registers, stack = (int(number) for number in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    hgmma, hmma, local = (len(re.findall(pattern, code)) for pattern in (r"\bHGMMA\b", r"\bHMMA\b", r"\b(?:LDL|STL)\b"))
    shared = int(kernel.metadata.shared)
    problems = []
    if stack > config.max_stack:
        problems.append(f"{stack} B of stack, {config.max_stack} accepted")
    if local and not config.max_stack:
        problems.append(f"{local} local-memory instructions")
    wrong = uses_of_stack_pointer(kernel.asm["cubin"])
    if wrong:
        problems.append(f"an address made from the stack pointer at {wrong[0]}: miscompiled by ptxas, see kernels/machine_code.py")
    if shared > SHARED_LIMIT[arch]:
        problems.append(f"{shared} B of shared memory, a block may have {SHARED_LIMIT[arch]}")
    if "tt.dot" in kernel.asm["ttir"] and hgmma + hmma == 0:
        problems.append("a dot product without tensor-core instructions")
    metadata = kernel.metadata
    return Compiled(config.name, arch, metadata.num_warps, metadata.num_stages, registers, stack, shared, hgmma, hmma, local, seconds, tuple(problems))


def _cuobjdump(program: str, option: str, binary: Path) -> str:
    return subprocess.run([program, option, str(binary)], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Compiles what the options select; 0 when all of it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_LIMIT), default=DEFAULT)
    parser.add_argument("--filter", default="", metavar="REGEX", help="only configurations whose name it is found in")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes")
    parser.add_argument("--module", nargs="+", default=MODULES, metavar="NAME", help="modules with aot_configs(arch)")
    options = parser.parse_args(arguments)
    import triton

    found: dict[tuple[str, str], tuple[str, int, str]] = {}
    for arch in options.arch:
        for module in options.module:
            for index, config in enumerate(configs(module, arch)):
                if (config.name, arch) in found:
                    parser.error(f"two configurations are called {config.name!r}")
                found[config.name, arch] = (module, index, arch)
    tasks = [task for (name, _), task in found.items() if re.search(options.filter, name)]
    width = max((len(name) for name, _ in found), default=0)
    print(f"Triton {triton.__version__}: {len(tasks)} of {len(found)} compilations")
    print(f"{'configuration':{width}} {'arch':5} warps stages  regs stack smem_KiB HGMMA  HMMA LDL/STL  seconds")
    began = time.perf_counter()
    failures = 0
    # The cache is fresh, so that what is measured is this compiler; processes, because Triton compiles in Python and holds the interpreter lock.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            for done in concurrent.futures.as_completed([pool.submit(compile_config, *task) for task in tasks]):
                row = done.result()
                print(
                    f"{row.name:{width}} {row.arch:5} {row.warps:5} {row.stages:6} {row.registers:5} {row.stack:5} {row.shared / 1024:8.1f}"
                    f" {row.hgmma:5} {row.hmma:5} {row.local:7} {row.seconds:8.1f}",
                    flush=True,
                )
                for problem in row.problems:
                    failures += 1
                    print(f"  FAILED {row.name} {row.arch}: {problem}", flush=True)
    print(f"{len(tasks)} compilations in {time.perf_counter() - began:.0f} s, {failures} problems")
    return 1 if failures or not tasks else 0


if __name__ == "__main__":
    sys.exit(main())
