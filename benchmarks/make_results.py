"""Write docs/results.md, and the table in README.md, from benchmarks/results/*.json. No figure there is typed by hand.

python benchmarks/make_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ORDER = ("teacher-same-data", "lolcats", "window-sinks", "all-layers", "kept-25")


def load(pattern: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(meta, row) of every row in the files that match."""
    found = []
    for path in sorted(RESULTS.glob(pattern)):
        data = json.loads(path.read_text())
        found += [(data["meta"], row) for row in data["rows"]]
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def where(meta: dict[str, Any]) -> str:
    """One line of provenance."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    note = f" {meta['note']}" if "note" in meta else ""
    return f"`{meta['command']}`; {meta['device']}; {versions}; {meta['date']}.{note}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def recall(passkey: dict[str, float], lengths: list[str]) -> list[str]:
    return [number(passkey.get(length), 2) for length in lengths]


def label(row: dict[str, Any]) -> str:
    """The variant, and the settings that differ from its recipe (lengths and budgets apart)."""
    extra = [
        o
        for o in row["overrides"]
        if not o.startswith(("stages.transfer.tokens", "stages.finetune.tokens", "stages.transfer.length", "stages.finetune.length"))
    ]
    return ", ".join([row["variant"], *(o.rpartition("stages.")[2] for o in extra)])


def smollm2() -> str:
    """The table of conversions of SmolLM2-135M-Instruct."""
    found = load("smollm2_*.json")
    if not found:
        return ""
    short = [x for x in found if x[1]["tokens"] < 8e6]
    long = [x for x in found if x[1]["tokens"] >= 8e6]
    lengths = sorted({length for _, row in found for length in row["teacher_passkey"]}, key=int)
    text = "## SmolLM2-135M-Instruct\nAll rows: 1024-token rows, block window 64 (65 to 128 exact keys), the same training and held-out rows. `teacher-same-data` is the softmax model\n"
    text += "with the same LoRA on the same tokens; `window-sinks` sees the same exact keys as `all-layers` and has no linear branch. KL in nats per token and top-1\nagreement are against the original model. Passkey: share of prompts whose right key ranks first of ten (chance .10), by context length in tokens.\n\n"
    for title, group in (("### One token budget", short), ("### Longer runs", long)):
        if not group:
            continue
        group.sort(key=lambda x: (ORDER.index(x[1]["variant"]), len(x[1]["overrides"])))
        rows = [["teacher", "0", "-", number(group[0][1]["teacher_ppl"], 2), "0", "1", *recall(group[0][1]["teacher_passkey"], lengths)]]
        for _, row in group:
            rows.append(
                [
                    label(row),
                    f"{row['tokens'] / 1e6:.1f} M",
                    f"{row['gpu_seconds']:.0f}",
                    number(row["ppl"], 2),
                    number(row["kl"], 3),
                    number(row["agreement"], 3),
                    *recall(row["passkey"], lengths),
                ]
            )
            for name, q in row["ablations"].items():
                rows.append([f"... {name}", "", "", number(q["ppl"], 2), number(q["kl"], 3), number(q["agreement"], 3), *recall(q["passkey"], lengths)])
        text += f"{title}\n" + table(["variant", "tokens", "seconds", "ppl", "KL", "agreement", *(f"passkey {n}" for n in lengths)], rows) + "\n"
        for _, row in group:
            if row["kept_layers"]:
                text += f"Layers kept softmax in {row['variant']} (largest error after transfer): {', '.join(map(str, row['kept_layers']))} of {len(row['layer_errors'])}.\n"
        jobs = sorted({row["jobs_on_gpu"] for _, row in group})
        text += f"\nSeconds are wall-clock of training while {' or '.join(map(str, jobs))} rows shared the GPU. {where(group[0][0])}\n\n"
    if long:
        text += "### KL against tokens (training batches, mean of 10 reported steps)\n"
        header, rows = ["finetuning tokens"], {}
        for _, row in sorted(long, key=lambda x: ORDER.index(x[1]["variant"])):
            header.append(row["variant"])
            points = [p for p in row["curve"] if "kl" in p]
            for start in range(0, len(points), 10):
                chunk = points[start : start + 10]
                rows.setdefault(f"{chunk[-1]['tokens'] / 1e6:.1f} M", []).append(number(sum(p["kl"] for p in chunk) / len(chunk), 3))
        text += table(header, [[name, *values, *["-"] * (len(header) - 1 - len(values))] for name, values in rows.items()]) + "\n"
    return text


def limits() -> str:
    """Held-out KL against tokens, and where the error sits."""
    rows = [r for _, r in load("hedgehog_start_h100.json") + load("smollm2_*.json") if r["variant"] == "all-layers" and "log 10" not in r.get("start", "")]
    rows.sort(key=lambda r: r["tokens"])
    long = max(rows, key=lambda r: r["tokens"])
    body = [[f"{r['tokens'] / 1e6:.1f} M", r.get("start", label(r)), number(r["kl"], 4), number(r["agreement"], 3)] for r in rows]
    worst = sorted(long["layer_errors"].items(), key=lambda x: -x[1])[:7]
    share = sum(x for _, x in worst) / sum(long["layer_errors"].values())
    kept = [r for _, r in load("smollm2_long_h100.json") if r["variant"] == "kept-25"]
    text = f"### Held-out KL of all layers against tokens\nThe goal was .12; the longest run measured ends at {number(long['kl'], 3)}. The curve is flat: twice the tokens take off about .01.\n\n"
    text += table(["tokens", "run", "KL", "agreement"], body)
    text += f"\nWhat limits it is a few layers: {', '.join(f'{n} ({number(x, 3)})' for n, x in worst)} hold {share:.0%} of the relative error left after transfer. With\n"
    text += f"layers {', '.join(map(str, kept[0]['kept_layers']))} back on softmax the same budget ends at KL {number(kept[0]['kl'], 3)}.\n\n" if kept else ""
    return text


def one_command() -> str:
    """A conversion by the command that users type."""
    found = load("linearize_cli_h100.json")
    if not found:
        return ""
    meta, row = found[0]
    body = [
        [
            s["stage"],
            f"{s['tokens'] / 1e6:.1f} M",
            f"{s['seconds']:.0f}",
            f"{s['tokens_per_second']:,.0f}",
            f"{s['peak_memory_bytes'] / 2**30:.1f} GiB",
            number(s["final_loss"], 4),
        ]
        for s in row["stages"]
    ]
    other = "; ".join(f"{name} {seconds:.0f} s" for name, seconds in row["seconds"].items() if name not in ("transfer", "finetune"))
    return (
        f"## One command, SmolLM2-135M, {row['batch_size']} rows a step\nSeconds include compiling. The final loss of finetuning is the KL on training batches. Rest of the run: {other}.\n\n"
        + table(["stage", "tokens", "seconds", "tokens/s", "peak memory", "final loss"], body)
        + f"\n{where(meta)}\n\n"
    )


def memory() -> str:
    """Peak memory of transfer."""
    found = load("transfer_memory*.json")
    if not found:
        return ""
    rows = [
        [str(r["T"]), f"{r['bytes_peak'] / 2**20:.0f} MiB", f"{(r['bytes_peak'] - r['bytes_idle']) / r['T'] / 1024:.0f} KiB", f"{r['seconds_per_step']:.2f}"]
        for _, r in found
    ]
    return (
        "## Peak memory of attention transfer\nOne row, hedgehog recipe, SmolLM2-135M. Above the idle model it is linear in T: nothing of size T x T exists. Uncompiled; the first length pays for the start-up.\n\n"
        + table(["T", "peak", "per token above idle", "seconds a step"], rows)
        + f"\n{where(found[0][0])}\n\n"
    )


def designs() -> str:
    """The design choices of the linear branch."""
    found = load("linear_branch*.json")
    if not found:
        return ""
    rows = [
        [
            r["variant"],
            number(r["error"], 4),
            number(r["swap_kl"], 3),
            number(r["kl"], 3),
            number(r["agreement"], 3),
            number(r["ppl"], 2),
            number(r["zeroed_kl"], 3),
        ]
        for _, r in found
    ]
    text = "## What makes the linear branch useful\nAll 30 layers of SmolLM2-135M after attention transfer alone, no finetuning; one seed. `window_max` weighs the linear branch against the row's largest logit in the window\n"
    text += "(LoLCATs), `absolute` lets phi.phi stand for exp(logit) itself. Zeroing the branch gives the same window and sinks untrained.\n\n"
    return (
        text
        + table(["linear branch", "mean layer error", "KL at swap", "KL", "agreement", "ppl", "KL, branch zeroed"], rows)
        + f"\n{where(found[0][0])} {found[0][1]['note']}\n\n"
    )


def starts() -> str:
    """Start values of the linear branch."""
    text = "## Where the linear branch starts\nAll layers, transfer and finetuning. `calibrated`: the weight of the linear branch against the softmax branch is set per head so that the two balance as in\nsoftmax attention, on 16 rows. `log 10`: LoLCATs' value for every head. Chance is .10.\n\n"
    found = False
    for pattern in ("hedgehog_start_h100.json", "hedgehog_start_demo_cpu.json"):
        rows = load(pattern)
        if not rows:
            continue
        found = True
        lengths = sorted({n for _, r in rows for n in r["passkey"]}, key=int)
        header = ["start", "tokens", "ppl", "KL", "KL, branch zeroed", "agreement", *(f"passkey {n}" for n in lengths)]
        body = [
            [
                r["start"], f"{r['tokens'] / 1e6:.1f} M", number(r["ppl"], 2), number(r["kl"], 4), number(r["ablations"]["linear branch zeroed"]["kl"], 3),
                number(r["agreement"], 3), *recall(r["passkey"], lengths),
            ]
            for _, r in rows
        ]  # fmt: skip
        text += f"### {rows[0][1]['model']}\n" + table(header, body) + f"\n{where(rows[0][0])}\n\n"
    return text if found else ""


def demo() -> str:
    """The bet on recall, on the embedded model."""
    found = load("bet_*.json")
    if not found:
        return ""
    lengths = sorted({n for _, r in found for n in r["passkey"]}, key=int)
    rows = [
        [r["variant"], f"{r['tokens'] / 1e3:.0f} k", number(r["ppl"], 2), number(r["kl"], 4), number(r["agreement"], 3), *recall(r["passkey"], lengths)]
        for _, r in found
    ]
    text = "## Does the linear branch add recall over window and sinks? (embedded model, CPU)\nSame keys, same tokens, same LoRA; the only difference between the two recipes is the linear branch. Chance is .10.\n\n"
    return text + table(["variant", "tokens", "ppl", "KL", "agreement", *(f"passkey {n}" for n in lengths)], rows) + f"\n{where(found[0][0])}\n\n"


def readme_table() -> str:
    """The short table of README.md."""
    rows = list(load("smollm2_h100.json"))
    rows.sort(key=lambda x: ORDER.index(x[1]["variant"]))
    names = {
        "teacher-same-data": "the original, finetuned on the same text",
        "lolcats": "`lolcats`, as published",
        "window-sinks": "`window-sinks`: no linear branch",
        "all-layers": "`hedgehog`: all 30 layers",
        "kept-25": "`hedgehog-mixed`: 23 of 30 layers",
    }
    first = rows[0][1]
    recalled = ("256", "1024")
    body = [["the original", number(first["teacher_ppl"], 2), "0", "1", *(number(first["teacher_passkey"][n], 2) for n in recalled)]]
    body += [
        [names[r["variant"]], number(r["ppl"], 2), number(r["kl"], 3), number(r["agreement"], 3), *(number(r["passkey"][n], 2) for n in recalled)]
        for _, r in rows
    ]
    seconds = [r["gpu_seconds"] for _, r in rows]
    return (
        table(["SmolLM2-135M-Instruct, 5 M tokens each", "perplexity", "KL", "top-1 agreement", *(f"passkey at {n}" for n in recalled)], body)
        + f"\n{rows[0][0]['device']}, {min(seconds) / 60:.0f} to {max(seconds) / 60:.0f} minutes a row with five rows sharing it. A window of 64-token blocks; passkey by chance: 0.10.\n"
    )


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    begin, end = "<!-- results -->\n", "<!-- /results -->"
    head, _, rest = text.partition(begin)
    assert rest, "README.md has no results block"
    readme.write_text(head + begin + readme_table() + end + rest.partition(end)[2])
    page = (
        "# Measured results\n\nGenerated by `python benchmarks/make_results.py` from `benchmarks/results/*.json`; negative results stay.\n\n"
        + smollm2()
        + limits()
        + one_command()
        + designs()
        + starts()
        + demo()
        + memory()
    )
    (ROOT / "docs" / "results.md").write_text(page.rstrip() + "\n")


if __name__ == "__main__":
    main()
