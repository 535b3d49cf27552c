"""Under torchrun: the gradients of an attached model in DDP, each process with its part of one batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import zoo

if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    part = zoo.ids(8, 7)[4 * rank : 4 * rank + 4]
    for reparam in sys.argv[2:]:
        model, tuning = tiny.tuned(reparam=reparam, hidden=16, gate="head")
        wrapped = DistributedDataParallel(model.train())
        for _ in range(2):  # the second time the reducer has its buckets
            tuning.holder.zero_grad()
            wrapped(input_ids=part, labels=part).loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("foreword."))
        torch.save({n: p.grad for n, p in tuning.named_parameters()}, out / f"{reparam}-{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # everything is written; gloo's threads now and then abort the interpreter's own end
