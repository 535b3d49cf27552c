"""The memory estimate against a real run: estimate by measured, each run in a process of its own.

Measured is how far the process's resident memory rises above what it was before the model was loaded, at its highest
moment of a few training steps (Linux: the high-water mark that the kernel keeps). That counts what an estimate by
tensors leaves out: buffers of the matrix library, and gaps between tensors. Python's own modules are loaded before,
by training a model of a few numbers.

    python benchmarks/memory.py [--model demo] [--batch 8] [--tokens 64] [--length 20] [--steps 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import keep

RUNS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16 autocast": {"bf16": True},
}


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most so far)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Begin the high-water mark anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # inside the process that is measured
    parser.add_argument("--only", choices=("estimate", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    rows = {}
    for name in RUNS:
        estimate, run = (own_process(name, part) for part in ("estimate", "run"))
        rows[name] = {
            "total": estimate["total"] / run["total"],
            "measured bytes": run["total"],
            "seconds by step": estimate["seconds"] / run["seconds"],
        }
        print(f"{name:16}" + "".join(f"  {what} {value:.4g}" for what, value in rows[name].items()), flush=True)
    keep("memory", {"options": {k: v for k, v in vars(options).items() if k not in ("one", "only")}, "rows": rows})


def own_process(name: str, part: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--one", name, "--only", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def one(options: argparse.Namespace) -> dict[str, float]:
    """Estimated, or measured: bytes in all, and seconds (of a step, or of the estimate)."""
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import foreword as fw
    from foreword.data import Collator
    from foreword.train.memory_estimate import estimate_memory

    def training(model: torch.nn.Module, rows: list) -> fw.PrefixTrainer:
        args = fw.PrefixTrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, report_to="none",
            disable_tqdm=True, save_strategy="no", use_cpu=True, remove_unused_columns=False, **RUNS[options.one],
        )  # fmt: skip
        return fw.PrefixTrainer(model, args, train_dataset=rows, data_collator=Collator(0))

    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        tiny = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2))
        fw.attach(tiny, fw.PrefixConfig(length=2, init="random"))
        training(tiny, [{"input_ids": [5] * 8, "labels": [5] * 8}] * options.batch * options.steps).train()
        fw.load_model(options.model)
        forget_peak()
        before = resident("VmRSS")
        model, _ = fw.load_model(options.model)
        forget_peak()
        fw.attach(model, fw.PrefixConfig(length=options.length, init="random"))
        ids = torch.randint(9, model.config.vocab_size, (options.batch * options.steps, options.tokens)).tolist()
        trainer = training(model, [{"input_ids": r, "labels": r} for r in ids])
        began = time.perf_counter()
        if options.only == "estimate":
            total = estimate_memory(trainer).total
        else:
            trainer.train()
            total = resident("VmHWM") - before
        seconds = (time.perf_counter() - began) / (1 if options.only == "estimate" else options.steps)
    return {"total": total, "seconds": seconds}


if __name__ == "__main__":
    main()
