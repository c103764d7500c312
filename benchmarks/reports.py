"""Full reports of one model converted by several recipes, from the model to the pages, in one command.

    python benchmarks/reports.py --model SmolLM2-135M-Instruct --text text --heldout heldout.jsonl
    python benchmarks/reports.py --model SmolLM2-135M-Instruct --text text --heldout heldout.jsonl --from-adapters adapters
    python benchmarks/reports.py --model demo --text embedded --device cpu --prefix demo --set stages.transfer.tokens=20k --set stages.finetune.tokens=10k

Each recipe goes through the steps `train` (adapters and cores), `merge` (the full checkpoint), `bench`, `evaluate` and `publish` (into OUT/PREFIX-RECIPE),
all by the command line of attnconvert, in the folder WORK. A step whose result is there is left out, so a run that broke off goes on, and
`--steps` runs some of them: speed wants a GPU for itself, the rest does not. `--from-adapters DIR` takes DIR/PREFIX-RECIPE, a folder that `train` wrote,
in place of training. Model and text get links in WORK and go by their last names, so that no report names a path of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnconvert.convert.bench import BENCH_FILE, REPORT_FILE, bench_markdown, write_bench
from attnconvert.convert.html import write_html
from attnconvert.convert.plots import draw_bench, draw_report

ROOT = Path(__file__).parents[1]
STEPS = ("train", "merge", "bench", "evaluate", "publish")
# Tokens of transfer and finetuning. Twice the tokens take .01 off the KL of all layers, and next to nothing off that of the mixed model.
BUDGETS = {"hedgehog": ("4.8M", "7.2M"), "hedgehog-mixed": ("1.6M", "2.4M")}
OTHER_BUDGET = ("2M", "3M")
# What gave the lowest KL per second on an H100: large batches and steps, and no loss but the teacher's distribution.
SETTINGS = (
    "data.recall=0.1", "stages.transfer.batch_size=16", "stages.finetune.batch_size=16", "stages.finetune.lr=2e-3", "stages.finetune.kl=1.0", "stages.finetune.ce=0.0",
)  # fmt: skip


def attnconvert(args: argparse.Namespace, *words: str, log: str, timeout: float | None = None) -> int:
    """Run the command line in the work folder; its output goes to WORK/LOG. Returns the exit status."""
    print("attnconvert", shlex.join(words), flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-c", "from attnconvert.cli import main; raise SystemExit(main())", *words]
    with (args.work / log).open("w") as file:
        process = subprocess.Popen(command, cwd=args.work, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(2)  # as Ctrl-C: what is measured is kept
            return process.wait(60)


def link(work: Path, name: str) -> str:
    """The last part of a path, which is then a link in the work folder; what is no path (a Hub id, `demo`) as it is."""
    path = Path(name)
    if not path.exists():
        return name
    inside = work / path.resolve().name
    if not inside.exists():
        inside.symlink_to(path.resolve())
    return inside.name


def run(args: argparse.Namespace, recipe: str) -> list[str]:
    """The steps of one recipe; returns those that failed."""
    name = f"{args.prefix}-{recipe}"
    adapters, converted = Path("adapters") / name, Path("converted") / name
    model, machine = link(args.work, args.model), ["--device", args.device]
    if args.from_adapters is not None and not (args.work / adapters).exists():
        shutil.copytree(args.from_adapters / name, args.work / adapters)
    folder = args.work / converted
    for directory in (args.work / adapters, folder):
        directory.parent.mkdir(parents=True, exist_ok=True)
    transfer, finetune = BUDGETS.get(recipe, OTHER_BUDGET)
    settings = [f"data.source={link(args.work, args.text)}", *([f"data.eval_source={link(args.work, args.heldout)}"] if args.heldout else [])]
    settings += [*SETTINGS, f"stages.transfer.tokens={transfer}", f"stages.finetune.tokens={finetune}", *args.set]
    flags = [word for setting in settings for word in ("--set", setting)]
    lengths = ["--lengths", args.lengths] if args.lengths else []
    failed = []
    for step in args.steps:
        done = True
        if step == "train" and not (args.work / adapters / "attnconvert.json").exists():
            words = ["linearize", model, "--recipe", recipe, "--out", str(adapters), "--adapters-only", "--skip-evaluation", *machine, *flags]
            done = attnconvert(args, *words, log=f"{name}.train.log") == 0
        elif step == "merge" and not (folder / "config.json").exists():
            done = attnconvert(args, "merge", str(adapters), "--out", str(converted), "--base", model, *machine, log=f"{name}.merge.log") == 0
        elif step == "bench" and not has_bench(folder):
            limits = ["--new-tokens", str(args.new_tokens), "--max-seconds", str(args.max_seconds), *lengths]
            attnconvert(args, "bench", str(converted), "--against", model, *machine, *limits, log=f"{name}.bench.log", timeout=args.timeout)
            done = has_bench(folder)
        elif step == "evaluate" and "evaluation" not in read(folder / REPORT_FILE):
            words = ["evaluate-converted", str(converted), "--suite", args.suite, "--against", model, *machine]
            done = attnconvert(args, *words, log=f"{name}.evaluate.log") == 0
        elif step == "publish":
            publish(args, folder, args.out / name, recipe)
        print(f"{name} {step}: {'done' if done else f'FAILED, see {name}.{step}.log'}", flush=True)
        if not done:
            failed.append(f"{name} {step}")
            if step in ("train", "merge"):
                break
    return failed


def read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def has_bench(folder: Path) -> bool:
    """Whether this checkpoint's speed was measured, before or after its quality."""
    return bool(read(folder / BENCH_FILE).get("rows") or (read(folder / REPORT_FILE).get("bench") or {}).get("rows"))


def publish(args: argparse.Namespace, folder: Path, out: Path, recipe: str) -> None:
    """Copy report.md, report.html and the plots, with a README.md that says how they came about."""
    if read(folder / BENCH_FILE):  # measured before there was a report
        write_bench(read(folder / BENCH_FILE), folder)
        (folder / BENCH_FILE).unlink()
    write_html(folder)
    document = read(folder / REPORT_FILE)
    draw_report(folder)
    draw_bench(document.get("bench") or {}, folder / "plots")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.html"):
        shutil.copyfile(folder / name, out / name)
    shutil.rmtree(out / "plots", ignore_errors=True)
    shutil.copytree(folder / "plots", out / "plots")
    if document.get("bench"):
        (out / "bench.json").write_text(json.dumps(document["bench"], indent=1) + "\n")
    (out / "README.md").write_text(readme(args, document, recipe, sorted(path.name for path in (out / "plots").iterdir())))


def readme(args: argparse.Namespace, document: Mapping[str, Any], recipe: str, plots: list[str]) -> str:
    """Provenance, speed as a table, and the plots."""
    conversion, evaluation, bench = document["conversion"], document["evaluation"], document.get("bench") or {}
    model = link(args.work, args.model)
    again = ["python", "benchmarks/reports.py", "--model", model, "--text", link(args.work, args.text)]
    again += ["--heldout", link(args.work, args.heldout)] if args.heldout else []
    again += ["--prefix", args.prefix, "--recipes", recipe]
    again += [word for setting in args.set for word in ("--set", setting)]
    versions = ", ".join(f"{name} {version}" for name, version in (bench.get("versions") or conversion.get("versions") or {}).items())
    parts = [f"# {conversion['base_model']}, recipe {recipe}", "[report.md](report.md), [report.html](report.html) (one self-contained page)"]
    parts += [args.note] if args.note else []
    parts.append(f"Made again, training included, by\n\n```sh\n{shlex.join(again)}\n```\n\nor, with the adapters and cores of an earlier run, by the same with")
    parts[-1] += " `--from-adapters DIR`."
    parts.append(
        f"Converted on {conversion.get('device')}; quality measured on {evaluation['device']}, speed on {bench.get('device', 'nothing yet')}; {versions}; "
        f"{(bench.get('date') or '')[:10]}."
    )
    parts += [bench_markdown(bench)] if bench else []
    parts += [f"![{name.removesuffix('.png')}](plots/{name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a Hub id, or demo")
    parser.add_argument("--text", required=True, help="training text: a file, a folder, or embedded")
    parser.add_argument("--heldout", help="held-out text; not given = a share of the text's own")
    parser.add_argument("--recipes", default=",".join(BUDGETS))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--from-adapters", type=Path, help="folder with PREFIX-RECIPE/, what `train` wrote")
    parser.add_argument("--work", type=Path, default=Path("build/reports"), help="adapters, checkpoints and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--prefix", default="smollm2", help="of the reports' folders")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--lengths", help="of the benchmark, in tokens; not given = powers of two as far as the model goes")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="a model's series of lengths stops before a cell that would take longer")
    parser.add_argument("--timeout", type=float, help="seconds for a whole benchmark; it keeps the cells it has then")
    parser.add_argument("--note", default="", help="a sentence for README.md")
    parser.add_argument("--set", action="append", default=[], help="recipe override, as for attnconvert")
    args = parser.parse_args()
    args.steps = args.steps.split(",")
    if unknown := [step for step in args.steps if step not in STEPS]:
        parser.error(f"unknown steps {unknown}, there are {', '.join(STEPS)}")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    failed = [what for recipe in args.recipes.split(",") for what in run(args, recipe)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
