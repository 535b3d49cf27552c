"""Under torchrun: `fsdp_trainer.py MODEL OUT NOTES`, a PrefixTrainer on a base sharded over the processes by FSDP2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tiny
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import foreword as fw


class Watch(transformers.TrainerCallback):
    """Notes which parameters have a gradient when they are about to be changed."""

    def __init__(self):
        self.graded = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.graded = [n for n, p in model.named_parameters() if p.grad is not None]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out, notes = map(Path, sys.argv[1:])
    rank = os.environ["RANK"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(fsdp_size=2), device_map="cpu"
    )
    base = sum(isinstance(p, DTensor) for p in model.parameters())
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model(input_ids=ids)  # before attaching: what FSDP leaves gathered is not yet frozen
    try:
        fw.attach(model, fw.PromptConfig(length=4, init="vocabulary"))
        refused = ""
    except fw.ConfigError as exc:
        refused = str(exc)
    config = fw.PrefixConfig(length=4, init="random", gate="head", seed=int(rank))  # rank 0's start is to count
    tuning = fw.attach(model, config)
    watch = Watch()
    trainer = tiny.trainer(model, out, callbacks=[watch], per_device_train_batch_size=4, ddp_backend="gloo",
                           save_only_model=True)  # fmt: skip
    trainer.train()
    tuning.bake().save(notes / f"prefix-{rank}")
    record = {
        "graded": watch.graded,
        "losses": tiny.losses(trainer), "world": trainer.args.world_size, "sharded": base, "local": local,
        "prompt": refused,
        "known": len(tuning.fingerprint.weights),
        "plain": all(type(p.data) is torch.Tensor for p in tuning.parameters()),
    }  # fmt: skip
    tuning.detach()
    model(input_ids=ids, labels=ids).loss.backward()
    record["graded after detaching"] = sum(p.grad is not None for p in model.parameters())
    (notes / f"rank-{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()
