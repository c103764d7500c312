"""Write docs/results.md, and the tables in README.md, docs/kernels.md and the pages of methods, from benchmarks/results/*.json. No figure there is typed by hand.

python benchmarks/make_results.py
"""

from __future__ import annotations

import json
from itertools import pairwise
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
        header, curves = ["finetuning tokens"], dict[str, list[str]]()
        for _, row in sorted(long, key=lambda x: ORDER.index(x[1]["variant"])):
            header.append(row["variant"])
            points = [p for p in row["curve"] if "kl" in p]
            for start in range(0, len(points), 10):
                chunk = points[start : start + 10]
                curves.setdefault(f"{chunk[-1]['tokens'] / 1e6:.1f} M", []).append(number(sum(p["kl"] for p in chunk) / len(chunk), 3))
        text += table(header, [[name, *values, *["-"] * (len(header) - 1 - len(values))] for name, values in curves.items()]) + "\n"
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
        [
            source(loss.get((*case, "contiguous"), {})),
            str(case[1]),
            case[2],
            *(number(loss.get((*case, g), {}).get("loss"), 3) for g in ("contiguous", "similar")),
        ]
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


MOA_PPL_GOAL, MOA_KL_GOAL, MOA_RECALL_GOAL = 1.02, 0.5, 3.0
"""Perplexity over the dense model's at 50 %, at most; share of the uniform window's KL that is gone at 50 %, at least; times its pass-key recall at 25 %, at least."""


def moa() -> str:
    """Attention spans on whole models: every variant beside the uniform window of the same share, and what was aimed at."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("moa-*.json"))]
    text = ""
    for model in dict.fromkeys(row["model"] for data in files for row in data["rows"]):
        mine = [data for data in files if data["rows"] and data["rows"][0]["model"] == model]
        rows = [row for data in mine for row in data["rows"]]
        text += f"### {model}\n{moa_table(rows)}\n{moa_goals(rows)}"
        for data in sorted(mine, key=lambda data: -data.get("search", {}).get("density", 0)):
            if "search" in data:
                text += moa_search(data["rows"][0]["variant"], data["search"])
        for line in dict.fromkeys(where(data["meta"]) for data in mine):
            text += f"{line}\n\n"
    return "## Figures\n" + text if text else ""


def moa_names(row: dict[str, Any]) -> str:
    kind, _, share = row["variant"].rpartition("-")
    if row["variant"] == "source":
        return "the source, same tokens"
    return f"uniform window, {share} %" if kind == "uniform" else f"MoA, {share} %"


def thirds(shares: list[float | None] | None) -> str:
    return "-" if shares is None else " / ".join(number(share, 2) for share in shares)


def moa_table(rows: list[dict[str, Any]]) -> str:
    """Every variant, length after length."""
    sources = {(row["length"], f"{row['tokens'] / 1e6:.1f}"): row for row in rows if row["variant"] == "source"}
    body = []
    for length in sorted({row["length"] for row in rows}):
        here = [row for row in rows if row["length"] == length]
        first = here[0]
        body.append(
            [
                f"{length:,}", "the source", "0", "1", number(first["teacher_ppl"], 3), "1", "-", "0", "1", number(first["teacher_passkey"], 2), thirds(first["teacher_passkey_by_third"]),
                "-" if first["teacher_kv_bytes"] is None else f"{first['teacher_kv_bytes'] / 2**20:.1f}",
            ]
        )  # fmt: skip
        for row in sorted(here, key=lambda r: (r["variant"] != "source", -r["density"], "uniform" not in r["variant"], r["tokens"])):
            other = sources.get((length, f"{row['tokens'] / 1e6:.1f}"))
            body.append(
                [
                    f"{length:,}", moa_names(row), f"{row['tokens'] / 1e6:.1f} M" if row["tokens"] else "0", number(row["density"], 3), number(row["ppl"], 3), number(row["ppl_ratio"], 4),
                    "-" if other is None or other is row else number(row["ppl"] / other["ppl"], 4), number(row["kl"], 4), number(row["agreement"], 3), number(row["passkey"], 2),
                    thirds(row["passkey_by_third"]), "-" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 2**20:.1f}, {row['kv_bytes'] / row['teacher_kv_bytes']:.3f}",
                ]
            )  # fmt: skip
    header = [
        "tokens",
        "attention",
        "trained on",
        "density",
        "ppl",
        "ratio",
        "over source, same tokens",
        "KL",
        "agreement",
        "pass-key",
        "by third",
        "KV MiB, share",
    ]
    first = rows[0]
    text = f"Perplexity, KL and agreement: the first tokens of the same {first['eval_tokens'] // first['length']} held-out documents, against the source. `uniform window`: one fixed window of that share for all heads at each length, sinks\n"
    text += f"included, untrained. Pass-key: {first['passkey_trials']} prompts a length, right key first of ten (chance .10), keys at all depths; by third: those that lie early, in the middle, late. KV: bytes held\n"
    return text + "after a prefill of that length, measured, and their share of the source's.\n\n" + table(header, body)


def moa_goals(rows: list[dict[str, Any]]) -> str:
    """What was aimed at and what came out, before and after training."""
    uniform = {(row["length"], row["variant"].rpartition("-")[2]): row for row in rows if row["variant"].startswith("uniform-")}
    body = []
    for row in sorted((row for row in rows if row["variant"] in ("50", "25")), key=lambda r: (-int(r["variant"]), r["tokens"], r["length"])):
        base = uniform.get((row["length"], row["variant"]))
        line = [moa_names(row), "untrained" if row["tokens"] == 0 else f"{row['tokens'] / 1e6:.1f} M tokens", f"{row['length']:,}"]
        if row["variant"] == "50":
            body.append(
                [
                    *line,
                    "perplexity over the source's",
                    number(row["ppl_ratio"], 4),
                    f"{MOA_PPL_GOAL:.2f} at most",
                    "met" if row["ppl_ratio"] <= MOA_PPL_GOAL else "missed",
                ]
            )
            if base is not None:
                closed = 1 - row["kl"] / base["kl"]
                body.append(
                    [
                        *line,
                        "share of the uniform window's KL that is gone",
                        number(closed, 2),
                        f"{MOA_KL_GOAL} at least",
                        "met" if closed >= MOA_KL_GOAL else "missed",
                    ]
                )
        elif base is not None and row["passkey"] is not None and base["passkey"]:
            times = row["passkey"] / base["passkey"]
            reached = "met" if times >= MOA_RECALL_GOAL else "missed"
            if MOA_RECALL_GOAL * base["passkey"] > row["teacher_passkey"]:
                reached += f" (the source itself has {row['teacher_passkey'] / base['passkey']:.2f} times)"
            body.append([*line, "pass-key recall over the uniform window's", number(times, 2), f"{MOA_RECALL_GOAL:g} at least", reached])
    return "" if not body else "What was aimed at:\n\n" + table(["", "", "tokens", "figure", "value", "goal", ""], body) + "\n"


def moa_search(variant: str, search: dict[str, Any]) -> str:
    """One paragraph about how a plan was found."""
    chosen = search["front"][search["chosen"]]
    kept = ", ".join(f"{share:.1%} at {int(length):,}" for length, share in chosen["densities"].items())
    length = search["validation_length"]
    return (
        f"Search for {variant} %: {search['num_rules']} rules, {search['num_samples']} contexts a length; of {len(search['front'])} plans the one that keeps {kept} did best at {length:,} tokens:\n"
        f"{chosen['validation_loss'] - search['dense_losses'][str(length)]:+.4f} nats a scored token over the model with all keys, before any training. Seconds: {', '.join(f'{name} {took:.0f}' for name, took in search['seconds'].items())}.\n\n"
    )


MOH_PPL_GOAL = 1.01


def moh() -> str:
    """Routed heads on whole models, beside the same model with all heads, trained on the same tokens."""
    found = [(meta, row) for meta, row in load("moh-*.json") if row["name"] == "moh"]
    text = ""
    for model in dict.fromkeys(row["model"] for _, row in found):
        mine = [(meta, row) for meta, row in found if row["model"] == model]
        body = []
        for _, row in sorted(mine, key=lambda x: (-int(x[1]["variant"].partition("-")[0]), x[1]["variant"], x[1]["tokens"])):
            reached = "-" if (row["model"], row["variant"]) != ("demo", "75") else "met" if row["ppl_over_baseline"] <= MOH_PPL_GOAL else "missed"
            body.append(
                [
                    moh_name(row["variant"]), f"{row['tokens'] / 1e6:.2f} M" if row["tokens"] else "0", number(row["ppl"], 3), number(row["ppl_ratio"], 4), number(row["baseline_ppl"], 3),
                    number(row["ppl_over_baseline"], 4), number(row["kl"], 4), number(row["baseline_kl"], 4), number(row["agreement"], 3), f"{row['skipped']:.0%}",
                    f"{row['routed_least']:.0%} to {row['routed_most']:.0%}", reached,
                ]
            )  # fmt: skip
        header = [
            "units",
            "trained on",
            "ppl",
            "over source",
            "all heads, same data",
            "ppl over it",
            "KL",
            "its KL",
            "agreement",
            "skipped",
            "use of a unit",
            "goal",
        ]
        first = mine[0][1]
        text += f"### {model}\nPerplexity of the source: {number(first['teacher_ppl'], 3)}, on {first['eval_tokens']:,} held-out tokens. `use of a unit`: the least and the most used one of all layers.\n"
        if model == "demo":
            text += f"Goal: with 75 % of the units at most {MOH_PPL_GOAL} x the perplexity of the model with all heads, trained on the same data.\n"
        text += f"\n{table(header, body)}\n"
        for line in dict.fromkeys(where(meta) for meta, _ in mine):
            text += f"{line}\n\n"
    return "## Figures\n" + text if text else ""


def moh_name(variant: str) -> str:
    percent, kind, router = [*variant.split("-"), "", ""][:3]
    return f"{percent} % of the {'query' if kind == 'head' else 'KV'} heads{', router ' + router if router else ''}"


def moh_routers() -> str:
    """What each way to choose the units is worth before any training."""
    found = load("moh-routers-*.json")
    text = ""
    for model, variant in dict.fromkeys((row["model"], row["variant"]) for _, row in found):
        mine = [(meta, row) for meta, row in found if (row["model"], row["variant"]) == (model, variant)]
        body = [[row["choice"], number(row["ppl_ratio"], 3), number(row["kl"], 3), number(row["agreement"], 3)] for _, row in mine]
        explained = [share for _, row in mine for share in row["explained"].values()]
        text += f"{model}, {moh_name(variant)}, {mine[0][1]['eval_tokens']:,} held-out tokens; the fitted maps explain {min(explained):.0%} to {max(explained):.0%} of the variance, by layer:\n\n"
        text += table(["which heads a token uses", "perplexity ratio", "KL, nats/token", "agreement"], body)
        text += f"\n{where(mine[0][0])}\n\n"
    return text


def infllm() -> str:
    """Block-sparse attention on whole models, beside a uniform window with as many visible keys."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("infllm-*.json"))]
    text = ""
    for model in dict.fromkeys(row["model"] for data in files for row in data["rows"]):
        mine = [data for data in files if data["rows"] and data["rows"][0]["model"] == model]
        rows = [row for data in mine for row in data["rows"]]
        trained_sources = [*(r for _, r in load(f"moa-{model}-source.json")), *(r for r in rows if r["variant"] == "source")]
        sources = {(r["length"], trained_on(r)): r for r in trained_sources}
        body = []
        for length in sorted({row["length"] for row in rows}):
            here = [row for row in rows if row["length"] == length]
            body.append([f"{length:,}", "the source", "0", "1", number(here[0]["teacher_ppl"], 3), "1", "-", "0", "1", number(here[0]["teacher_passkey"], 2), thirds(here[0]["teacher_passkey_by_third"])])  # fmt: skip
            for row in sorted(here, key=lambda r: (r["variant"] != "source", not r["variant"].startswith("window"), r["tokens"])):
                other = None if row["variant"] == "source" else sources.get((length, trained_on(row)))
                name = (
                    f"window of {int(row['variant'].rpartition('-')[2]):,}"
                    if row["variant"].startswith("window")
                    else "the source"
                    if row["variant"] == "source"
                    else "blocks, scored by their mean key"
                    if "mean" in row["variant"]
                    else "blocks"
                )
                body.append(
                    [
                        f"{length:,}", name, trained_on(row), number(row["density"], 3), number(row["ppl"], 3), number(row["ppl_ratio"], 4),
                        "-" if other is None else number(row["ppl"] / other["ppl"], 4), number(row["kl"], 4), number(row["agreement"], 3), number(row["passkey"], 2), thirds(row["passkey_by_third"]),
                    ]
                )  # fmt: skip
        header = ["tokens", "attention", "trained on", "keys seen", "ppl", "ratio", "over source, same tokens", "KL", "agreement", "pass-key", "by third"]
        first = rows[0]
        text += f"### {model}\nThe first tokens of the same {first['eval_tokens'] // first['length']} held-out documents, against the source. `keys seen`: share of them at the end of such a context. `window`: one fixed window for all heads with as\n"
        text += f"many keys, sinks included. Pass-key: {first['passkey_trials']} prompts a length, right key first of ten (chance .10); by third: keys that lie early, in the middle, late.\n\n{table(header, body)}\n"
        for line in dict.fromkeys(where(data["meta"]) for data in mine):
            text += f"{line}\n\n"
    return "## Figures\n" + text if text else ""


def trained_on(row: dict[str, Any]) -> str:
    """Tokens of training and of its rows."""
    return f"{row['tokens'] / 1e6:.1f} M, rows of {row['data']['train']['length']:,}" if row["tokens"] else "0"


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
    "flex": "FlexAttention, same mask",
}


def milliseconds(value: float) -> str:
    """About three digits, whatever the size."""
    return (
        f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    )


def kernel_speed() -> str:
    """Every row of our kernels beside its floor, its goal and the best rival."""
    found = [*load("kernels_linear_h100.json"), *load("kernels_linear_decode_h100.json")]
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
    sources = {meta["command"]: meta for meta, _ in found}
    return text + kernel_rivals(found) + "".join(f"{where(meta)}\n\n" for meta in sources.values())


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
    """Whole models, a section for each recipe they were converted by, changes to it included."""
    recipes: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for meta, row in load("generate*.json"):
        words = meta["command"].split()
        given = {option: [value for word, value in pairwise(words) if word == option] for option in ("--recipe", "--set")}
        recipe = f"`{(given['--recipe'] or ['hedgehog'])[-1]}`" + "".join(f", `{change}`" for change in given["--set"])
        recipes.setdefault(recipe, []).append((meta, row))
    return "".join(whole_models(recipe, found) for recipe, found in sorted(recipes.items()))


def whole_models(recipe: str, found: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Prefill, decode, largest batch, and 1024 tokens at the best batch."""
    done = [row for _, row in found if "tokens_per_second" in row]
    if not done:
        return ""
    text = f"### Recipe {recipe}\n"
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
        text += f"{first['new_tokens']} new tokens after {first['prompt']}, tokens a second at the batch up to which they rise by 3 % or more, 2048 at most. BASED (arXiv 2402.18668) reports\n24 times FlashAttention-2 in this setting, for its own model of 1.3 B parameters.\n\n"
        text += table(["model", "softmax", "ours", "ratio"], body) + "\n"
    notes = dict.fromkeys(
        f"{r['model']}, {r['attention']}, {r['name'].partition('.')[2]}{' T=' + str(r['T']) if 'T' in r else ''}{' B=' + str(r['B']) if 'B' in r else ''}: {r['note']}"
        for _, r in found
        if r.get("note")
    )
    return text + ("Remarks:\n" + "".join(f"- {note}\n" for note in notes) + "\n" if notes else "") + f"{where(found[0][0])}\n\n"


SPAN_ROWS = {"span.forward": "forward", "span.forward_backward": "forward + backward"}
SPAN_GOAL = 1.8
"""Times the floor, at most; forward."""


def span_figures() -> str:
    """The block of docs/kernels.md about attention spans."""
    found = load("span_h100.json")
    rows = [r for _, r in found if r["B"] == 1 and r["H"] == r["G"] and r["form"] == "windows"]
    picture = plot_kernels(ROOT / "docs" / "results" / "spans.png", rows, SPAN_ROWS, "ours, windows of 512 to 4,096")
    return ("![Time against length: attention spans, their floor and the rivals](results/spans.png)\n\n" if picture else "") + span_speed(found) + span_decode()


def windows(rules: list[dict[str, float]]) -> str:
    """The windows of a benchmark's heads, N for the tokens so far."""
    return ", ".join(f"{r['alpha']:,}" if r["beta"] == 0 else f"{r['beta']:g} N" + (f" {r['alpha']:+,}" if r["alpha"] else "") for r in rules)


def span_speed(found: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Whole sequences: floor, goal, dense attention and FlexAttention with the same mask."""
    ours = [row for _, row in found if row["impl"] == "triton"]
    if not ours:
        return ""
    meta = found[0][0]
    ceilings = meta["ceilings"]
    first = ours[0]
    text = f"Measured in that run: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 matrix product {ceilings['gemm_flop_per_s'] / 1e12:.0f} TFLOP/s. The floor is the larger of what the products of the visible pairs and what inputs and\n"
    text += f"outputs take at these rates. Batch {first['B']}, head_dim {first['D']}, {first['num_sinks']} sinks, the rules spread evenly over the KV heads (N: tokens so far), times in ms. Rivals: dense causal attention (cuDNN), and\nFlexAttention with the same mask, compiled for each shape; `x` is how many times faster ours is. Goal: forward within {SPAN_GOAL} x the floor.\n\n"
    key = ("name", "B", "T", "H", "G", "D")
    for name, title in SPAN_ROWS.items():
        body = []
        for r in sorted((r for r in ours if r["name"] == name), key=lambda r: (r["form"] != "windows", r["H"] // r["G"], r["T"])):
            dense = next(
                (other["ms"] for _, other in found if other["impl"] == "cudnn" and all(other[x] == r[x] for x in key)), None
            )  # it knows of no spans: one time for all
            line = [windows(r["rules"]), f"{r['H']} / {r['G']}", f"{r['T']:,}"]
            if r["ms"] is None:
                body.append([*line, "-", milliseconds(r["floor_ms"]), r.get("note", "-"), "-", "-", "-"])
                continue
            cells = [f"{milliseconds(other)}, {other / r['ms']:.2f} x" if other is not None else "-" for other in (dense, r["rivals"].get("flex"))]
            ratio = r["ms"] / r["floor_ms"]
            goal = ["met" if ratio <= SPAN_GOAL else "missed"] if name == "span.forward" else []
            body.append([*line, milliseconds(r["ms"]), milliseconds(r["floor_ms"]), number(ratio, 2), *cells, *goal])
        if body:
            header = [
                "windows",
                "heads / KV heads",
                "tokens",
                "ms",
                "floor",
                "x floor",
                "dense, cuDNN",
                "FlexAttention",
                *(["goal"] if name == "span.forward" else []),
            ]
            text += f"### Spans, {title}\n{table(header, [line[: len(header)] for line in body])}\n"
    body = []
    for T in sorted({r["T"] for r in ours}):
        for r in (r for r in ours if r["T"] == T and r["name"] == "span.forward_backward" and r["form"] == "windows" and r["ms"] is not None):
            dense = next(
                (other["bytes_peak"] for _, other in found if other["impl"] == "cudnn" and other["ms"] is not None and all(other[x] == r[x] for x in key)), None
            )
            body.append([f"{r['H']} / {r['G']}", f"{T:,}", f"{r['bytes_peak'] / 2**20:,.0f}", "-" if dense is None else f"{dense / 2**20:,.0f}"])
    if body:
        text += f"### Spans, memory of forward + backward above its inputs, MiB\n{table(['heads / KV heads', 'tokens', 'ours', 'dense, cuDNN'], body)}\n"
    missing = dict.fromkeys(
        f"{RIVAL_NAMES.get(r['impl'], r['impl'])}, {SPAN_ROWS[r['name']]}, {r['form']}, T={r['T']} heads {r['H']}/{r['G']}: {r['note']}"
        for _, r in found
        if r["ms"] is None and r["impl"] != "triton"
    )
    return text + ("Not measured:\n" + "".join(f"- {line}\n" for line in missing) + "\n" if missing else "") + f"{where(meta)}\n\n"


def span_decode() -> str:
    """One step over a ragged cache, beside dense attention over a full one."""
    found = load("span_decode*.json")
    ours = [row for _, row in found if row["impl"] == "triton" and row["ms"] is not None]
    if not ours:
        return ""
    body = []
    for r in sorted(ours, key=lambda r: (r["H"] // r["G"], r["B"])):
        dense = [
            other
            for _, other in found
            if other["impl"] != "triton" and other["ms"] is not None and all(other[x] == r[x] for x in ("B", "H", "G", "D", "context"))
        ]
        best = min(dense, key=lambda other: other["ms"], default=None)
        body.append(
            [
                f"{r['H']} / {r['G']}", str(r["B"]), milliseconds(r["ms"]), milliseconds(r["floor_ms"]), number(r["ms"] / r["floor_ms"], 2), f"{r['cache_bytes'] / 2**20:,.0f}",
                *(("-",) * 3 if best is None else (f"{best['impl']} {milliseconds(best['ms'])}", f"{best['cache_bytes'] / 2**20:,.0f}", number(best["ms"] / r["ms"], 2))),
            ]
        )  # fmt: skip
    first = ours[0]
    sizes = ", ".join(f"{size:,}" for size in dict.fromkeys(first["windows"]))
    text = f"### Spans, decode step\nContext {first['context']:,} for everybody; windows of {sizes} and {first['num_sinks']} sinks, a quarter of the KV heads each; a CUDA graph of steps over caches that exceed the L2 cache together. Ours writes the\nnew key and value, dense attention (the faster of SDPA's `flash` and `cudnn`) only reads.\n\n"
    text += table(["heads / KV heads", "batch", "ms", "floor", "x floor", "cache MiB", "dense", "its cache MiB", "times faster"], body)
    return text + f"\n{where(found[0][0])}\n\n"


BLOCK_ROWS = {"infllm.prefill": "prefill", "infllm.forward_backward": "forward + backward"}
BLOCK_DATA = {"model": "a model's", "random": "random"}


def block_figures() -> str:
    """The block of docs/kernels.md about block-sparse attention."""
    found = load("blocks_h100.json")
    ours = [row for _, row in found if row["impl"] == "triton"]
    if not ours:
        return block_decode()
    meta = found[0][0]
    text = f"Measured in that run: bf16 matrix product {meta['ceilings']['gemm_flop_per_s'] / 1e12:.0f} TFLOP/s, at which the floor takes the products of visible pairs and of queries with compressed keys. Batch 1, head_dim {ours[0]['D']},\n{meta['rule']['num_blocks']} blocks of {meta['rule']['block_size']}, always sparse; times in ms, selection included. `x`: how many times faster ours is.\n\n"
    for name, title in BLOCK_ROWS.items():
        body = []
        for r in sorted((r for r in ours if r["name"] == name), key=lambda r: (r["data"], r["G"], r["T"])):
            line = [BLOCK_DATA[r["data"]], f"{r['H']} / {r['G']}", f"{r['T']:,}"]
            if r["ms"] is None:
                body.append([*line, "-", milliseconds(r["floor_ms"]), r.get("note", "-"), "-", "-", "-"])
                continue
            rivals = [r["rivals"].get(rival) for rival in ("cudnn", "fa3", "fla-nsa")]
            cells = [f"{milliseconds(other)}, {other / r['ms']:.2f} x" if other is not None else "-" for other in rivals]
            goal = "-"
            if r["data"] == "model" and "goal_ms" in r:
                goal = f"{r['goal_ms']:g}, {'met' if r['ms'] <= r['goal_ms'] else 'missed'}"
            elif r["data"] == "model" and name == "infllm.forward_backward" and rivals[0] is not None and r["T"] == 65536:
                goal = f"{milliseconds(rivals[0] / 2)}, {'met' if r['ms'] <= rivals[0] / 2 else 'missed'}"
            body.append([*line, milliseconds(r["ms"]), milliseconds(r["floor_ms"]), number(r["ms"] / r["floor_ms"], 2), *cells, goal])
        if body:
            header = [
                "queries and keys",
                "heads / KV heads",
                "tokens",
                "ms",
                "floor",
                "x floor",
                "dense, cuDNN",
                "dense, FlashAttention-3",
                "fla NSA, 64 blocks, no selection",
                "goal",
            ]
            text += f"### Blocks, {title}\n{table(header, body)}\n"
    parts = ("compress_kernel", "coarse_kernel", "scores_kernel", "choose_kernel", "forward_kernel", "pack_kernel", "query_grad_kernel", "key_grad_kernel")
    body = [
        [
            BLOCK_ROWS[r["name"]],
            BLOCK_DATA[r["data"]],
            f"{r['H']} / {r['G']}",
            f"{r['T']:,}",
            *(f"{r['kernel_us'][part]:,.0f}" if part in r["kernel_us"] else "-" for part in parts),
        ]
        for r in sorted((r for r in ours if "kernel_us" in r), key=lambda r: (r["name"] != "infllm.prefill", r["data"], r["G"], r["T"]))
    ]
    if body:
        text += f"### Blocks, where the time goes (microseconds per kernel)\n{table(['pass', 'queries and keys', 'heads / KV heads', 'tokens', *(part.removesuffix('_kernel') for part in parts)], body)}\n"
    return text + f"{where(meta)}\n\n" + block_earlier() + block_decode()


def block_earlier() -> str:
    """An earlier form of the kernels, for the dense times that were measured beside it."""
    found = load("blocks_earlier_h100.json")
    body = []
    for _, r in found:
        if r["impl"] == "triton" and r["data"] == "model":
            dense = next((o["ms"] for _, o in found if o["impl"] == "cudnn" and all(o[x] == r[x] for x in ("name", "T", "H", "G"))), None)
            if dense is not None:
                body.append(
                    [BLOCK_ROWS[r["name"]], f"{r['H']} / {r['G']}", f"{r['T']:,}", milliseconds(r["ms"]), milliseconds(dense), number(dense / r["ms"], 2)]
                )
    if not body:
        return ""
    header = ["pass", "heads / KV heads", "tokens", "ours, a model's queries and keys", "dense, cuDNN", "times faster"]
    return f"### Blocks, an earlier form beside dense attention in one run\n{table(header, body)}\n{where(found[0][0])}\n\n"


def block_decode() -> str:
    """One step with blocks, beside dense attention over the same cache."""
    found = load("blocks_decode*.json")
    body = []
    for _, r in sorted(
        ((m, r) for m, r in found if r["impl"] == "triton" and r["ms"] is not None),
        key=lambda pair: (pair[1]["H"] // pair[1]["G"], pair[1]["B"], pair[1]["context"]),
    ):
        dense = [o for _, o in found if o["impl"] != "triton" and o["ms"] is not None and all(o[x] == r[x] for x in ("B", "H", "G", "D", "context"))]
        best = min(dense, key=lambda other: other["ms"], default=None)
        rival = ("-", "-") if best is None else (f"{best['impl']} {milliseconds(best['ms'])}", number(best["ms"] / r["ms"], 2))
        body.append(
            [
                f"{r['H']} / {r['G']}",
                str(r["B"]),
                f"{r['context']:,}",
                milliseconds(r["ms"]),
                milliseconds(r["floor_ms"]),
                number(r["ms"] / r["floor_ms"], 2),
                *rival,
            ]
        )
    if not body:
        return ""
    text = "### Blocks, decode step\nOne token of each row, selection and compressed keys included, in a CUDA graph of steps over caches that exceed the L2 cache together. Ours writes the new key and value, dense attention\n(the fastest of SDPA's `flash` and `cudnn`, and `fa3`) only reads.\n\n"
    return text + table(["heads / KV heads", "batch", "context", "ms", "floor", "x floor", "dense", "times faster"], body) + f"\n{where(found[0][0])}\n\n"


def plot_kernels(path: Path, rows: list[dict[str, Any]], names: dict[str, str], ours_label: str) -> bool:
    """Time against length, one panel per name; False when there is nothing to draw.

    Args:
        path: of the PNG.
        rows: measured rows of one shape: ours, whose `impl` is `triton`, and the rivals'.
        names: `name` of the rows of a panel -> its title.
        ours_label: legend of ours.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r["ms"] is not None]
    names = {name: title for name, title in names.items() if len({r["T"] for r in rows if r["name"] == name}) > 1}
    if not names:
        return False
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, (name, title) in zip(axes[0], names.items(), strict=True):
        here = [r for r in rows if r["name"] == name]
        for impl in dict.fromkeys(r["impl"] for r in here):
            points = sorted((r["T"], r["ms"]) for r in here if r["impl"] == impl)
            ours = impl == "triton"
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=2.5 if ours else 1.2, label=ours_label if ours else RIVAL_NAMES.get(impl, impl), zorder=3 if ours else 2)  # fmt: skip
        floors = sorted({(r["T"], r["floor_ms"]) for r in here if r["impl"] == "triton"})
        axis.plot(*zip(*floors, strict=True), linestyle=":", color="black", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=title)
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


HEAD_ROWS = {"moh.prefill": "prefill", "moh.forward_backward": "forward + backward"}
HEAD_STEPS = {"heads.decode": "attention", "heads.route": "choosing the units", "heads.output": "output projection", "heads.layer": "all three"}
HEAD_GOALS = {"moh.prefill": 1.22, "heads.decode": 1.2}  # times faster than with all units


def head_figures() -> str:
    """The block of docs/kernels.md about routed heads."""
    found = load("heads_h100.json")
    ours = [row for _, row in found if row["impl"] == "triton" and row["active"] < 1]
    text = ""
    if ours:
        body = []
        for r in ours:
            alike = [o for _, o in found if o["ms"] is not None and all(o[x] == r[x] for x in ("name", "T", "H", "G"))]
            whole = next(o["ms"] for o in alike if o["impl"] == "triton" and o["active"] == 1)
            dense = [next((o["ms"] for o in alike if o["impl"] == rival), None) for rival in ("cudnn", "fa3")]
            goal = HEAD_GOALS.get(r["name"])
            body.append(
                [
                    HEAD_ROWS[r["name"]], f"{r['H']} / {r['G']}", f"{r['T']:,}", milliseconds(r["ms"]), number(r["ms"] / r["floor_ms"], 2), milliseconds(whole), number(whole / r["ms"], 2),
                    *("-" if other is None else milliseconds(other) for other in dense), "-" if goal is None else f"{goal}, {'met' if whole / r['ms'] >= goal else 'missed'}",
                ]
            )  # fmt: skip
        header = ["pass", "heads / KV heads", "tokens", "75 %, ms", "x floor", "all units", "times faster", "dense, cuDNN", "dense, FlashAttention-3", "goal"]
        text += f"### Routed heads, whole sequences\nBatch 1, head_dim {ours[0]['D']}, bf16, three quarters of the KV heads active.\n\n{table(header, body)}\n{where(found[0][0])}\n\n"
    steps = [(meta, row) for meta, row in load("heads_decode_h100.json") if row["active"] < 1]
    if steps:
        body = []
        for _, r in steps:
            goal = HEAD_GOALS.get(r["name"])
            context = f"{r['context']:,}" if r["context"] else "-"
            against = f"{r['torch_ms'] * 1e3:.1f}, in PyTorch" if "torch_ms" in r else f"{r['ms'] * r['speedup'] * 1e3:.1f}, all units"
            verdict = "-" if goal is None else f"{goal}, {'met' if r['speedup'] >= goal else 'missed'}"
            body.append(
                [HEAD_STEPS[r["name"]], str(r["B"]), f"{r['H']} / {r['G']}", context, f"{r['ms'] * 1e3:.1f}", against, number(r["speedup"], 2), verdict]
            )
        header = ["part of a step", "batch", "heads / KV heads", "context", "us", "against", "times faster", "goal"]
        text += "### Routed heads, one decode step\nA layer's step in a CUDA graph over several caches; head_dim 128, bf16, three quarters of the KV heads active in each row; the output projection is 4,096 x 4,096.\n\n"
        text += f"{table(header, body)}\n{where(steps[0][0])}\n\n"
    return text


def linear_figures() -> str:
    """The block of docs/kernels.md about the linear operator."""
    rows = [r for _, r in load("kernels_linear*.json") if r["B"] == 1 and r["D"] == 128 and r["H"] == r["G"] and r["form"] in (None, "published")]
    names = {name: title for name, title in KERNEL_ROWS.items() if name != "linear.decode"}
    picture = plot_kernels(ROOT / "docs" / "results" / "kernels.png", rows, names, "ours, as published")
    text = "![Time against length: our kernels, their floor and the rivals](results/kernels.png)\n\n" if picture else ""
    return text + kernel_speed() + kernel_profile()


def fill(page: Path, block: str, figures: str) -> None:
    """Replace what stands between `<!-- BLOCK -->` and `<!-- /BLOCK -->`; without figures it stays as it is."""
    text = page.read_text()
    begin, end = f"<!-- {block} -->\n", f"<!-- /{block} -->"
    head, _, rest = text.partition(begin)
    assert end in rest, f"{page.name} has no block {block}"
    if figures:
        page.write_text(head + begin + figures.rstrip() + "\n" + end + rest.partition(end)[2])


def main() -> None:
    page = (
        "# Measured results\n\nGenerated by `python benchmarks/make_results.py` from `benchmarks/results/*.json`; negative results stay. Attention spans (MoA): [moa.md](moa.md);\nkernels and whole models: [kernels.md](kernels.md).\n\n"
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
    fill(ROOT / "README.md", "results", readme_table())
    kernels = ROOT / "docs" / "kernels.md"
    fill(kernels, "linear", linear_figures())
    fill(kernels, "span", span_figures())
    fill(kernels, "blocks", block_figures())
    fill(kernels, "heads", head_figures())
    fill(kernels, "models", generation())
    fill(ROOT / "docs" / "moa.md", "figures", moa())
    fill(ROOT / "docs" / "infllm-v2.md", "figures", infllm())
    fill(ROOT / "docs" / "moh.md", "routers", moh_routers())
    fill(ROOT / "docs" / "moh.md", "figures", moh())


if __name__ == "__main__":
    main()
