"""The layers hold: imports point down, every module imports, and reloading a saved model needs little."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnconvert

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(attnconvert.__path__, "attnconvert."))


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)


def loaded_after(imports: str, modules: tuple[str, ...]) -> list[str]:
    """Which of `modules` are loaded in a fresh process after `imports`."""
    done = in_a_process(f"import sys\n{imports}\nprint('LOADED', *[m for m in {modules!r} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_imports_point_down() -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 7 kept, 0 broken." in done.stdout


def test_every_module_imports_on_its_own() -> None:
    assert len(MODULES) > 30
    inside_vllm = {"attnconvert.serving.vllm.models", "attnconvert.serving.vllm.layers"}  # vLLM imports them; tests/serving_vllm does it
    importable = [name for name in MODULES if not name.endswith(".__main__") and name not in inside_vllm]
    # one process, but each module with attnconvert's others forgotten, so that a missing import cannot hide behind an earlier one
    code = f"""
import importlib, sys, traceback
failed = []
for name in {importable!r}:
    for other in [m for m in sys.modules if m.partition('.')[0] == 'attnconvert']:
        del sys.modules[other]
    try:
        importlib.import_module(name)
    except Exception:
        failed.append(name + '\\n' + traceback.format_exc())
print(''.join(failed))
sys.exit(bool(failed))
"""
    done = in_a_process(code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_itself_imports_nothing() -> None:
    assert loaded_after("import attnconvert, attnconvert.errors", ("torch", "transformers", "pydantic", "typer", "rich", "numpy")) == []


def test_recipes_and_methods_load_without_torch() -> None:
    imports = "from attnconvert.recipes.load import load_recipe, list_recipes\nassert [load_recipe(name) for name in list_recipes()]"
    assert loaded_after(imports, ("torch", "transformers", "typer", "rich")) == []


TRAINING = ("typer", "rich", "peft", "datasets", "accelerate", "attnconvert.distill", "attnconvert.recipes", "attnconvert.convert", "attnconvert.cli")


@pytest.fixture(scope="module")
def loaded_by_transformers() -> set[str]:
    """What transformers loads by itself, such as accelerate and peft where they are installed; only the rest says something about us."""
    return set(loaded_after("import torch, transformers, transformers.modeling_utils, transformers.cache_utils", TRAINING))


@pytest.mark.parametrize(
    "imports",
    [
        "import attnconvert.surgery.runtime.modeling",
        "from attnconvert.surgery.runtime.cores import core_class\ncore_class('hedgehog')",
        "import attnconvert.kernels.linear.reference",
    ],
)
def test_reloading_needs_surgery_and_kernels_alone(imports: str, loaded_by_transformers: set[str]) -> None:
    assert set(loaded_after(imports, TRAINING)) <= loaded_by_transformers


def test_kernels_load_without_transformers() -> None:
    assert loaded_after("import attnconvert.kernels.linear.reference", ("transformers", "pydantic")) == []


def test_the_wheel_takes_recipes_model_and_text_along() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    taken = {path for package, patterns in settings.items() for pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    data = {path for path in (ROOT / "attnconvert").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(data) > 10
    assert sorted(data - taken) == []
