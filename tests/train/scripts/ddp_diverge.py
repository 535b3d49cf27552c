"""Under torchrun: `ddp_diverge.py OUT NOTES CASE`: one process of two meets numbers that are not finite, or a Ctrl-C.

Batches of four are dealt to the two in turn and in order, so row 37 is in the fifth batch of process 1. Each process
notes how its run ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import tiny
import torch
import transformers
from rich.console import Console

import foreword as fw
from foreword.data import Collator
from foreword.train.progress import StopOnSignal

BAD = {"input_ids": [99, 5, 6], "labels": [-100, 5, 6]}
# With accumulation, the batch is the first of its step: gradients are not shared then. Unclipped, nobody looks at them.
ARGUMENTS = {"accumulate": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 3}}


class InOrder(fw.PrefixTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Interrupt(transformers.TrainerCallback):
    """Ctrl-C in process 1 alone, in its third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)


def trained(case, out):
    """How the run ended, and what was attached."""
    data = tiny.rows(48)
    model, tuning = tiny.tuned()
    stop = StopOnSignal(Console(stderr=True))
    callbacks = {"roll back": [fw.RollBack(times=2, every=1)], "ctrl-c": [Interrupt(), stop]}.get(case, [])
    if case != "ctrl-c":
        data[37] = BAD
        with torch.no_grad():
            model.get_input_embeddings().weight[99] = float("nan")
    settings = {"max_steps": tiny.STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "ddp_backend": "gloo",
                "save_strategy": "no", "warmup_steps": 0, **tiny.QUIET, **ARGUMENTS.get(case, {})}  # fmt: skip
    args = fw.PrefixTrainingArguments(output_dir=str(out), **settings)
    made = InOrder(model, args, train_dataset=data, data_collator=Collator(0), callbacks=callbacks)
    ended = "well"
    with stop:
        try:
            made.train()
        except fw.DivergedError as exc:
            ended = str(exc)
    events = [e for e in made.state.log_history if "rolled_back" in e]
    return {"ended": ended, "step": made.state.global_step, "events": events, "asked": stop.asked}, tuning


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record, tuning = trained(sys.argv[3], Path(sys.argv[1]))
    rank, notes = os.environ["RANK"], Path(sys.argv[2])
    tuning.bake().save(notes / f"prefix-{rank}")
    (notes / f"rank-{rank}.json").write_text(json.dumps(record))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # everything is written; gloo's threads now and then abort the interpreter's own end
