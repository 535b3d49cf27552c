"""Under torchrun: a distillation; each process says which of the teacher's files it wrote."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import torch
from distilling import ARGUMENTS, CONFIG, TEXT, examples
from rich.console import Console

import zoo
from foreword.train import _teacher
from foreword.train.distill import distill

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, notes, rank = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
    _teacher.SHARD = 4
    written = []
    save_file = _teacher.save_file

    def noted(tensors, path):
        written.append(Path(path).name.lstrip(".").rsplit(".", 1)[0])
        save_file(tensors, path)

    _teacher.save_file = noted
    arguments = {**ARGUMENTS, "ddp_backend": "gloo"}
    result = distill(
        zoo.build("llama"), zoo.tokenizer(), TEXT, CONFIG, examples(18), out, arguments, valid=examples(5),
        console=Console(file=io.StringIO()),
    )  # fmt: skip
    result.prefix.save(notes / f"prefix-{rank}")
    losses = [e["loss"] for e in result.history if "loss" in e]
    (notes / f"rank-{rank}.json").write_text(json.dumps({"written": written, "losses": losses}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)  # everything is written; gloo's threads now and then abort the interpreter's own end
