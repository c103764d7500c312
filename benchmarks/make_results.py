"""Write docs/results.md, and the tables in README.md and docs/kernels.md, from benchmarks/results/*.json. No figure there is typed by hand.

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


def regroup() -> str:
    """Held-out loss of every way to merge KV heads, before training."""
    found = load("regroup_zero_training.json")
    if not found:
        return ""
    inits = list(dict.fromkeys(row["init"] for _, row in found if row["init"] != "source"))
    variants = [
        key
        for key in dict.fromkeys((row["model"], row["variant"]) for _, row in found)
        if any(row["init"] in inits and (row["model"], row["variant"]) == key for _, row in found)
    ]
    loss = {(row["model"], row["variant"], row["init"]): row["loss"] for _, row in found}
    source = {row["model"]: row["teacher_loss"] for _, row in found}
    body = [["the source", *(number(source[model], 3) for model, _ in variants)]]
    body += [[init, *(number(loss.get((*key, init)), 3) for key in variants)] for init in inits]
    header = ["init", *(f"{model}, {variant.replace('-', ' -> ')}" for model, variant in variants)]
    text = "## Fewer KV heads, before any training\nHeld-out loss in nats per token, fp32. `svd` is best everywhere; `aligned` rotates heads onto each other, averages them and restores the norm.\n"
    text += "Neighbouring heads are merged here. An independent audit of a 983M model at 2:1 found 8.24 for the mean and 3.19 for alignment with norm restore: the order is the\nsame here, the gain smaller, and `svd` is better still.\n\n"
    return text + table(header, body) + f"\n{where(found[0][0])}\n\n"


GQA_GOALS = {("demo", "8-4"): 1.02, ("demo", "8-2"): 1.05}
"""Perplexity over the source's, at most."""


def recovery() -> str:
    """Models with fewer KV heads after training, each beside the source trained on the same tokens."""
    found = load("gqa-*.json")
    if not found:
        return ""
    same = {(row["model"], row["budget"]): row for _, row in found if row["variant"] == "source"}
    text = "## Fewer KV heads, after training\nThe recipe `gqa`: 80 % of the tokens for transfer, 20 % for finetuning. Ratios are held-out perplexity over the source's own, before training, between the stages and at\n"
    text += "the end; `source, same tokens` is the source finetuned on all of them, and the ratio beside it what the heads cost once both know the text. KL and agreement are against the source.\n\n"
    for model in dict.fromkeys(row["model"] for _, row in found):
        rows = sorted((row for _, row in found if row["model"] == model and row["variant"] != "source"), key=lambda r: (r["start"]["ppl_ratio"], r["budget"]))
        body = []
        for row in rows:
            other = same.get((model, row["budget"]))
            goal = GQA_GOALS.get((model, row["variant"]))
            body.append(
                [
                    row["variant"].replace("-", " -> "),
                    f"{row['budget'] / 1e6:g} M",
                    *(number(at["ppl_ratio"], 3) for at in (row["start"], row["transfer"], row)),
                    "-" if other is None else number(other["ppl_ratio"], 3),
                    "-" if other is None else number(row["ppl_ratio"] / other["ppl_ratio"], 3),
                    number(row["kl"], 3),
                    number(row["agreement"], 3),
                    "-" if goal is None else f"{goal:.2f}, {'met' if row['ppl_ratio'] <= goal else 'missed'}",
                ]
            )
        header = ["KV heads", "tokens", "start", "after transfer", "end", "source, same tokens", "end over that", "KL", "agreement", "goal"]
        metas = [meta for meta, row in found if row["model"] == model]
        seconds = [row["seconds"] for _, row in found if row["model"] == model]
        text += f"### {model}, perplexity {number(rows[0]['teacher_ppl'] if rows else None, 2)}\n" + table(header, body)
        text += f"\n{min(seconds):.0f} to {max(seconds):.0f} s a row, {found[0][1]['jobs']} rows at a time on one device. {where(metas[0])}\n\n"
    return text


def regroup_variants() -> str:
    """Grouping, fewer query heads and uneven shares, before training."""
    found = load("regroup_variants*.json")
    if not found:
        return ""
    text = "## Which heads become one, fewer query heads, uneven shares\nHeld-out loss in nats per token before any training, fp32.\n\n"

    def rows_of(kind: str) -> list[dict[str, Any]]:
        return [row for _, row in found if row["kind"] == kind]

    def source(row: dict[str, Any]) -> str:
        return f"{row['model']}, {row['H']}/{row['G']} heads, {number(row['teacher_loss'], 3)}"

    cases = list(dict.fromkeys((row["model"], row["kv_heads"], row["init"]) for row in rows_of("grouping")))
    loss = {(row["model"], row["kv_heads"], row["init"], row["grouping"]): row for row in rows_of("grouping")}
    body = [
        [source(loss[(*case, "contiguous")]), str(case[1]), case[2], *(number(loss.get((*case, g), {}).get("loss"), 3) for g in ("contiguous", "similar"))]
        for case in cases
        if (*case, "similar") in loss
    ]
    text += "### Groups\n`similar` puts heads together that lose least together; it costs seconds. It is the default for `svd` and `aligned`.\n\n"
    text += table(["source and its loss", "KV heads", "init", "neighbours", "similar"], body) + "\n"
    names = {"even": "even", "kdgqa": "norm of the keys (KDGQA)", "dgqa_ema": "running mean of it (DGQA)", "dgqa_diff": "how much it changes (DGQA)"}
    uneven = {(row["model"], row["kv_heads"], row["allocation"]): row for row in rows_of("uneven")}
    body = [
        [source(next(r for key, r in uneven.items() if key[0] == model)), str(heads), *(number(uneven[model, heads, rule]["loss"], 3) for rule in names)]
        for model, heads in dict.fromkeys(key[:2] for key in uneven)
    ]
    if body:
        text += "### Uneven shares (`kdgqa`)\n`svd`; the shares of query heads are counted on calibration text and frozen. With four KV heads left equal shares are best, with\nfewer those counted by how much the norms change; the published rule helps little.\n\n"
        text += table(["source and its loss", "KV heads", *names.values()], body) + "\n"
    body = [[source(row), f"{row['query_heads']} / {row['kv_heads']}", number(row["loss"], 3), number(row["kl"], 3)] for row in rows_of("sqa")]
    if body:
        text += (
            "### Fewer query heads (`sqa`)\n`svd` for the KV heads; query heads are merged by what they add to the output. A start for training, no more.\n\n"
        )
        text += table(["source and its loss", "query / KV heads", "loss", "KL"], body) + "\n"
    return text + "".join(f"{line}\n\n" for line in dict.fromkeys(where(meta) for meta, _ in found))


def regroup_decode() -> str:
    """Decode speed of stock checkpoints against their KV heads."""
    found = load("gqa_decode*.json")
    if not found:
        return ""
    body = [
        [
            str(row["B"]), str(row["G"]), row["mode"] if row["mode"] == "stock" else f"{row['mode']} ({row['attention'].replace('_', ', ')})", f"{1e3 * row['seconds_per_step']:.2f}",
            f"{row['tokens_per_second']:,.0f}", number(row["speedup"], 2), number(row["of_kv_reduction"], 2), number(row["bytes_bound"], 2),
            "-" if row["kv_reduction"] == 1 else "met" if row["of_kv_reduction"] >= row["goal"] else "missed",
        ]
        for _, row in sorted(found, key=lambda x: (x[1]["B"], x[1]["mode"], -x[1]["G"]))
    ]  # fmt: skip
    first = found[0][1]
    text = f"## Decode against KV heads\n{first['H']} query heads of {first['D']}, context {first['T']:,}, {first['layers']} layers of a 7 B Llama, bf16; each model is loaded from a stock checkpoint by AutoModelForCausalLM. `stock` is transformers with its\n"
    text += "dynamic cache, which copies the cache at every step; the other mode has a full static cache and one CUDA graph. Of the reduction: speedup over the model with all heads divided by how many times\n"
    text += f"fewer KV heads there are, goal {first['goal']}; by bytes: the same for a step that takes exactly as long as its bytes, since the weights do not shrink.\n\n"
    header = ["batch", "KV heads", "mode", "ms a step", "tokens/s", "speedup", "of the reduction", "by bytes", "goal"]
    return text + table(header, body) + f"\n{where(found[0][0])}\n\n"


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


FORMS = {"published": "as published", "gates": "recipe `hedgehog`", "absolute": "without gates", "no-sinks": "without gates and sinks"}
KERNEL_ROWS = {"linear.forward": "forward", "linear.forward_backward": "forward + backward", "linear.decode": "decode step"}
RIVAL_NAMES = {
    "cudnn": "softmax, cuDNN",
    "flash": "softmax, FlashAttention-2",
    "fa3": "softmax, FlashAttention-3",
    "compiled": "the PyTorch operator, compiled",
}


def milliseconds(value: float) -> str:
    """About three digits, whatever the size."""
    return (
        f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    )


def kernel_speed() -> str:
    """Every row of our kernels beside its floor, its goal and the best rival."""
    found = load("kernels_linear*.json")
    ours = [row for _, row in found if row["impl"] == "triton"]
    if not ours:
        return ""
    meta = found[0][0]
    ceilings = meta["ceilings"]
    text = f"Measured in that run: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matrix product {ceilings['gemm_flop_per_s'] / 1e12:.0f} TFLOP/s. The floor follows from these two,\nwith every input and output moved once. Times are medians in ms; the goal belongs to the published form.\n\n"
    for name, title in KERNEL_ROWS.items():
        rows = [r for r in ours if r["name"] == name]
        if not rows:
            continue
        rows.sort(key=lambda r: (r["D"] != 128, r["H"] // r["G"], r["B"], r["T"], list(FORMS).index(r["form"])))
        body = []
        for r in rows:
            size = [FORMS[r["form"]], f"{r['H']} / {r['G']}", str(r["D"]), str(r["B"]), *([] if name == "linear.decode" else [f"{r['T']:,}"])]
            if r["ms"] is None:
                body.append([*size, "-", milliseconds(r["floor_ms"]), "-", r.get("note", "-"), "-", "-"])
                continue
            rival = f"{r['best_rival']} {milliseconds(r['best_rival_ms'])}" if "best_rival" in r else "-"
            goal = f"{milliseconds(r['goal_ms'])}, {'met' if r['goal_met'] else 'missed'}" if "goal_ms" in r else "-"
            body.append(
                [*size, milliseconds(r["ms"]), milliseconds(r["floor_ms"]), number(r["ms"] / r["floor_ms"], 2), rival, number(r.get("speedup"), 2), goal]
            )
        header = [
            "form",
            "heads / KV heads",
            "head_dim",
            "batch",
            *([] if name == "linear.decode" else ["tokens"]),
            "ms",
            "floor",
            "x floor",
            "best rival",
            "times faster",
            "goal",
        ]
        text += f"### {title.capitalize()}\n{table(header, body)}\n"
    return text + kernel_rivals(found) + f"{where(meta)}\n\n"


def kernel_profile() -> str:
    """Where the time of a call goes, kernel by kernel."""
    found = load("linear_profile*.json")
    if not found:
        return ""
    names = list(dict.fromkeys(name for _, row in found for name in row["kernel_us"]))
    body = [
        [
            row["form"],
            f"{row['H']} / {row['G']}",
            f"{row['D']} / {row['features_per_half']}",
            f"{row['B']} x {row['T']:,}",
            "f+b" if row["name"].endswith("backward") else "forward",
            f"{row['ms']:.2f}",
            *(str(row["kernel_us"].get(name, "-")) for name in names),
        ]
        for _, row in found
    ]
    header = ["form", "heads / KV heads", "head_dim / features", "batch x tokens", "pass", "ms"]
    meta = found[0][0]
    return f"### Where the time goes (microseconds per kernel)\n{table([*header, *names], body)}\n{where(meta)}\n\n"


def kernel_rivals(found: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """All rivals at B = 1 and as many KV heads as heads, and the memory of a training pass."""
    base = [
        r for _, r in found if r["B"] == 1 and r["D"] == 128 and r["H"] == r["G"] and r["form"] in (None, "published", "gates") and r["name"] != "linear.decode"
    ]
    lengths = sorted({r["T"] for r in base})
    text = ""
    for title, value in (
        ("Everybody, batch 1, 32 heads, ms (forward, then forward + backward)", "ms"),
        ("Memory of forward + backward above its inputs, MiB", "bytes_peak"),
    ):
        body = []
        for who in dict.fromkeys((r["impl"], r["form"]) for r in base):
            cells = []
            for name in ("linear.forward", "linear.forward_backward") if value == "ms" else ("linear.forward_backward",):
                for T in lengths:
                    cell = [r.get(value) for r in base if (r["impl"], r["form"], r["name"], r["T"]) == (*who, name, T)]
                    shown = "-" if not cell or cell[0] is None else milliseconds(cell[0]) if value == "ms" else f"{cell[0] / 2**20:,.0f}"
                    cells.append(shown)
            if any(cell != "-" for cell in cells):
                body.append([f"ours, {FORMS[who[1]]}" if who[1] else RIVAL_NAMES.get(who[0], who[0]), *cells])
        if body:
            header = ["", *(f"{T:,}" for T in lengths), *([f"{T:,}, f+b" for T in lengths] if value == "ms" else [])]
            text += f"### {title}\n{table(header, body)}\n"
    missing = dict.fromkeys(
        f"{RIVAL_NAMES.get(r['impl'], r['impl'])}, {KERNEL_ROWS[r['name']]}, B={r['B']} T={r['T']} heads {r['H']}/{r['G']}: {r['note']}"
        for _, r in found
        if r["ms"] is None and r["impl"] != "triton"
    )
    return text + ("Not measured:\n" + "".join(f"- {line}\n" for line in missing) + "\n" if missing else "")


def generation() -> str:
    """Whole models: prefill, decode, largest batch, and 1024 tokens at the best batch."""
    found = load("generate*.json")
    done = [row for _, row in found if "tokens_per_second" in row]
    if not done:
        return ""
    text = "## Whole models\nRandom weights, bf16, every layer converted with the recipe `hedgehog` or every layer softmax. Decode replays one CUDA graph of the model's own forward, for\nboth; the softmax model attends to a full static cache without a mask. Tokens a second; memory is the peak with one model's weights.\n\n"
    body = []
    for row in done:
        if row["attention"] != "dense" or row["name"] == "generate.based":
            continue
        other = next((r for r in done if r["attention"] == "converted" and all(r.get(x) == row.get(x) for x in ("name", "model", "T"))), None)
        pair = [row, other]
        body.append(
            [row["model"], row["name"].partition(".")[2], f"{row['T']:,}", " / ".join("-" if r is None else str(r["B"]) for r in pair), *("-" if r is None else f"{r['tokens_per_second']:,.0f}" for r in pair),
             "-" if other is None else number(other["tokens_per_second"] / row["tokens_per_second"], 2), *("-" if r is None or r["bytes_peak"] is None else f"{r['bytes_peak'] / 2**30:.1f}" for r in pair)]
        )  # fmt: skip
    if body:
        text += table(["model", "", "context", "batch, softmax / ours", "softmax", "ours", "ratio", "softmax GiB", "ours GiB"], body) + "\n"
    body = []
    for model in dict.fromkeys(r["model"] for r in done):
        best = [max((r for r in done if r["name"] == "generate.based" and r["model"] == model and r["attention"] == kind), key=lambda r: r["tokens_per_second"], default=None) for kind in ("dense", "converted")]  # fmt: skip
        dense, converted = best
        if dense is not None and converted is not None:
            # a series that was cut off while it still rose has no best batch
            cut = any(r["name"] == "generate.based" and r["model"] == model and "note" in r for _, r in found)
            ratio = "-, cut off" if cut else number(converted["tokens_per_second"] / dense["tokens_per_second"], 2)
            body.append([model, *(f"{r['tokens_per_second']:,.0f} (batch {r['B']})" for r in (dense, converted)), ratio])
    if body:
        first = next(r for r in done if r["name"] == "generate.based")
        text += f"### {first['new_tokens']} new tokens after {first['prompt']}, each at its best batch\nTokens a second. BASED (arXiv 2402.18668) reports 24 times FlashAttention-2 in this setting, for its own model of 1.3 B parameters.\n\n"
        text += table(["model", "softmax", "ours", "ratio"], body) + "\n"
    notes = dict.fromkeys(
        f"{r['model']}, {r['attention']}, {r['name'].partition('.')[2]}{' T=' + str(r['T']) if 'T' in r else ''}{' B=' + str(r['B']) if 'B' in r else ''}: {r['note']}"
        for _, r in found
        if r.get("note")
    )
    return text + ("Remarks:\n" + "".join(f"- {note}\n" for note in notes) + "\n" if notes else "") + f"{where(found[0][0])}\n"


def plot_kernels(path: Path) -> bool:
    """Time against length, batch 1; False when there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        r
        for _, r in load("kernels_linear*.json")
        if r["B"] == 1 and r["D"] == 128 and r["H"] == r["G"] and r["ms"] is not None and r["form"] in (None, "published")
    ]
    names = [name for name in ("linear.forward", "linear.forward_backward") if len({r["T"] for r in rows if r["name"] == name}) > 1]
    if not names:
        return False
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        here = [r for r in rows if r["name"] == name]
        for impl in dict.fromkeys(r["impl"] for r in here):
            points = sorted((r["T"], r["ms"]) for r in here if r["impl"] == impl)
            ours = impl == "triton"
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=2.5 if ours else 1.2, label="ours, as published" if ours else RIVAL_NAMES.get(impl, impl), zorder=3 if ours else 2)  # fmt: skip
        floors = sorted({(r["T"], r["floor_ms"]) for r in here if r["impl"] == "triton"})
        axis.plot(*zip(*floors, strict=True), linestyle=":", color="black", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=KERNEL_ROWS[name])
        lengths = sorted({r["T"] for r in here})
        axis.set_xticks(lengths, [f"{T // 1024}k" for T in lengths], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return True


def write_kernels() -> None:
    """Fill the marked block of docs/kernels.md; without results it stays as it is."""
    page = ROOT / "docs" / "kernels.md"
    figures = kernel_speed() + kernel_profile() + generation()
    if not figures:
        return
    picture = plot_kernels(ROOT / "docs" / "results" / "kernels.png")
    text = page.read_text()
    begin, end = "<!-- figures -->\n", "<!-- /figures -->"
    head, _, rest = text.partition(begin)
    assert rest, "docs/kernels.md has no figures block"
    figures = ("![Time against length: our kernels, their floor and the rivals](results/kernels.png)\n\n" if picture else "") + figures
    page.write_text(head + begin + figures.rstrip() + "\n" + end + rest.partition(end)[2])


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
        + regroup()
        + regroup_variants()
        + recovery()
        + regroup_decode()
        + memory()
    )
    (ROOT / "docs" / "results.md").write_text(page.rstrip() + "\n")
    write_kernels()


if __name__ == "__main__":
    main()
