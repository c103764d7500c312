"""Write the code a checkpoint needs beside its weights: these very files, flattened, importing each other with a single dot."""

from __future__ import annotations

import os
import re
from pathlib import Path

ENTRY = "modeling_attnconvert"
_IMPORT = re.compile(r"^([ \t]*)from (attnconvert(?:\.\w+)+) import", re.MULTILINE)  # also inside functions


def flat_name(module: str) -> str:
    """`attnconvert.kernels.linear.reference` -> `attnconvert_linear_reference`; the modeling file keeps transformers' naming."""
    parts = module.split(".")
    if parts[-1] == "modeling":
        return ENTRY
    return "attnconvert_" + ("_".join(parts[-2:]) if parts[1] == "kernels" else parts[-1])


def write_code(directory: str, methods: list[str]) -> list[str]:
    """Write the modeling file and everything it imports into `directory`.

    Args:
        methods: the methods of the plan; only their cores travel.

    Returns:
        The names of the files written.
    """
    if not __name__.startswith("attnconvert."):  # loaded from a checkpoint: the files are flat already
        here = Path(__file__).parent
        files = {path.name: path.read_text() for path in [here / f"{ENTRY}.py", *here.glob("attnconvert_*.py")]}
    else:
        files = _flatten(methods)
    for name, text in files.items():
        temporary = Path(directory) / (name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, Path(directory) / name)
    return sorted(files)


def _flatten(methods: list[str]) -> dict[str, str]:
    """File name -> text, following imports from the modeling file and the methods' cores."""
    root = Path(__file__).parents[2]
    package = __name__.rsplit(".", 1)[0]
    cores = {}
    for method in methods:
        source = (root / "surgery" / "methods" / f"{method}.py").read_text()
        match = re.search(r'runtime="([\w.]+):(\w+)"', source)
        assert match is not None, f"methods/{method}.py names no runtime"
        cores[method] = (match[1], match[2])
    files: dict[str, str] = {}
    todo = [f"{package}.modeling", *(module for module, _ in cores.values())]
    while todo:
        module = todo.pop()
        name = f"{flat_name(module)}.py"
        if name in files:
            continue
        if module == f"{package}.cores":
            imports = "".join(f"from .{flat_name(m)} import {cls}\n" for m, cls in cores.values())
            table = ", ".join(f'"{method}": {cls}' for method, (_, cls) in cores.items())
            files[name] = (
                f'"""Method name -> core class, for the methods of this checkpoint."""\n\n{imports}\nCORES = {{{table}}}\n\n\ndef core_class(method):\n    return CORES[method]\n'
            )
            continue
        text = (root.parent / Path(*module.split("."))).with_suffix(".py").read_text()
        todo += [m[2] for m in _IMPORT.finditer(text)]
        files[name] = _IMPORT.sub(lambda m: f"{m[1]}from .{flat_name(m[2])} import", text)
    return files
