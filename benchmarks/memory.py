"""Memory of training, measured: against the estimate, by the prefix's length, and with weights kept on disk.

Each run is in a process of its own; by length it stands beside PEFT's prefix tuning of the same shape and batch.
Measured is how far the process's resident memory rises above what it was before the model was loaded, at its highest
moment of a few training steps (Linux: the high-water mark that the kernel keeps). That counts what an estimate by
tensors leaves out: buffers of the matrix library, and gaps between tensors. Python's own modules are loaded before,
by training a model of a few numbers.

    python benchmarks/memory.py [--model demo] [--batch 8] [--tokens 64] [--steps 3] [--only "length 100" ...]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _measure import RESULTS, keep


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes:
        arguments: of the trainer.
        length: virtual tokens.
        peer: PEFT's prefix tuning instead of ours.
        load: how the base is loaded: the most of it to hold in memory, or the width of its weights.
        mapped: whether the C library maps each larger tensor by itself, so that it leaves no gap when it is freed.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    length: int = 20
    peer: bool = False
    load: dict[str, str] = field(default_factory=dict)
    mapped: bool = False


CHECKPOINTING = {"gradient_checkpointing": True}
RUNS = {
    "plain": Run(),
    "checkpointing": Run(CHECKPOINTING),
    "bf16 autocast": Run({"bf16": True}),
    "length 400": Run(length=400),
    **{f"PEFT, length {n}": Run(length=n, peer=True) for n in (20, 400)},
    "int8": Run(load={"quantize": "int8:quanto"}),
    "300MB held": Run(load={"offload": "300MB"}),
    "300MB held, checkpointing": Run(CHECKPOINTING, load={"offload": "300MB"}),
    "plain, mapped": Run(mapped=True),
    "int8, mapped": Run(load={"quantize": "int8:quanto"}, mapped=True),
    "300MB held, checkpointing, mapped": Run(CHECKPOINTING, load={"offload": "300MB"}, mapped=True),
}


def resident(line: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most so far)."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Begin the high-water mark anew, without the pages of the model's file that were read and are not in use."""
    gc.collect()
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):  # nothing is written there: what is needed again is read again
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of runs; the others stay in the results as they were")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # inside the process that is measured
    parser.add_argument("--part", choices=("estimate", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    before = RESULTS / "memory.json"
    rows = json.loads(before.read_text())["rows"] if options.only and before.is_file() else {}
    for name, what in RUNS.items():
        if options.only and name not in options.only:
            continue
        run = own_process(name, "run", options)
        rows[name] = {"measured bytes": run["total"], "seconds a step": run["seconds"]}
        if not what.peer:
            estimate = own_process(name, "estimate", options)
            rows[name]["total"] = estimate["total"] / run["total"]
            rows[name]["seconds by step"] = estimate["seconds"] / run["seconds"]
        print(f"{name:34}" + "".join(f"  {what} {value:.4g}" for what, value in rows[name].items()), flush=True)
    kept = {k: v for k, v in vars(options).items() if k not in ("one", "part", "only")}
    keep("memory", {"options": kept, "rows": rows})


def own_process(name: str, part: str, options: argparse.Namespace) -> dict[str, float]:
    sizes = [f"--{n}={getattr(options, n)}" for n in ("model", "batch", "tokens", "steps")]
    command = [sys.executable, sys.argv[0], *sizes, "--one", name, "--part", part]
    mapped = {"MALLOC_MMAP_THRESHOLD_": "262144"} if RUNS[name].mapped else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **mapped})
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def one(options: argparse.Namespace) -> dict[str, float]:
    """Estimated, or measured: bytes in all, and seconds (of a step, or of the estimate)."""
    import time

    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    import foreword as fw
    from foreword.data import Collator
    from foreword.train.memory_estimate import estimate_memory

    what = RUNS[options.one]

    def training(model: torch.nn.Module, rows: list) -> Trainer:
        args = fw.PrefixTrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, report_to="none",
            disable_tqdm=True, save_strategy="no", use_cpu=True, remove_unused_columns=False, **what.arguments,
        )  # fmt: skip
        if what.peer and not hasattr(model, "foreword"):
            args.learning_rate = 1e-3
            return Trainer(model, args, train_dataset=rows, data_collator=Collator(0))
        return fw.PrefixTrainer(model, args, train_dataset=rows, data_collator=Collator(0))

    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        tiny = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2))
        fw.attach(tiny, fw.PrefixConfig(length=2, init="random"))
        training(tiny, [{"input_ids": [5] * 8, "labels": [5] * 8}] * options.batch * options.steps).train()
        fw.load_model(options.model)
        forget_peak()
        before = resident("VmRSS")
        model, _ = fw.load_model(options.model, **what.load)
        forget_peak()
        if what.peer:
            shape = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=what.length)
            model = peft.get_peft_model(model, shape)
        else:
            fw.attach(model, fw.PrefixConfig(length=what.length, init="random"))
        ids = torch.randint(9, model.config.vocab_size, (options.batch * options.steps, options.tokens)).tolist()
        trainer = training(model, [{"input_ids": r, "labels": r} for r in ids])
        began = time.perf_counter()
        if options.part == "estimate":
            total = estimate_memory(trainer).total
        else:
            trainer.train()
            total = resident("VmHWM") - before
        seconds = (time.perf_counter() - began) / (1 if options.part == "estimate" else options.steps)
    return {"total": total, "seconds": seconds}


if __name__ == "__main__":
    main()
