"""Peak memory of attention transfer against sequence length: it must grow linearly, since nothing of size T x T is ever held.

python benchmarks/transfer_memory.py --model DIR --out FILE [--lengths 2048,8192,32768]
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from attnconvert.convert.load import load_model
from attnconvert.convert.pipeline import prepare
from attnconvert.distill.config import TransferConfig
from attnconvert.distill.data import PackedRows
from attnconvert.distill.loop import RunContext
from attnconvert.distill.transfer import run_transfer
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.swap import swap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    prepared = prepare(args.model, "hedgehog")
    model = load_model(prepared.source, device=args.device).model
    swap(model, prepared.plan)
    cores: dict[int, Any] = {idx: module.core.to(torch.float32) for idx, _, module in converted_sites(model)}
    idle = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    rows = []
    for length in map(int, args.lengths.split(",")):
        ids = torch.randint(0, model.config.vocab_size, (4, length), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
        data = PackedRows(ids, torch.arange(length, dtype=torch.int32).repeat(4, 1))
        config = TransferConfig(tokens=3 * length, length=length, batch_size=1)
        with tempfile.TemporaryDirectory() as folder:
            result = run_transfer(model, cores, data, config, RunContext(Path(folder), device=device, precision="bf16" if device.type == "cuda" else "fp32"))
        rows.append(
            {
                "name": "transfer.memory",
                "T": length,
                "batch_size": 1,
                "bytes_peak": result.peak_memory_bytes,
                "bytes_idle": idle,
                "seconds_per_step": result.seconds / result.steps,
            }
        )
        print(rows[-1], flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    meta = {
        "command": f"python benchmarks/transfer_memory.py --model MODEL --out FILE --lengths {args.lengths}",
        "device": name,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }
    Path(args.out).write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
