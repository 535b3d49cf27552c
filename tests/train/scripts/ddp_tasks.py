"""Under torchrun: several tasks with PrefixTrainer, broken off in the second epoch and gone on with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from test_tasks import Seen, mixture, tuned

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, notes, checkpoint = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
    model, tuning = tuned(common=1)
    seen = Seen(model)
    trainer = tiny.trainer(
        model, out, mixture(), valid=mixture((3, 4, 2)), per_device_train_batch_size=2, ddp_backend="gloo", max_steps=7,
        orthogonality=1.0, eval_strategy="steps", eval_steps=7, save_total_limit=None, save_steps=1,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    rank = os.environ["RANK"]
    tuning.save(notes / f"prefixes-{rank}")
    logged = {
        k: v for e in trainer.state.log_history for k, v in e.items() if k.endswith("_loss") or k == "orthogonality"
    }
    record = {"losses": tiny.losses(trainer), "rows": seen.rows, "last": logged, "world": trainer.args.world_size}
    (notes / f"rank-{rank}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)  # everything is written; gloo's threads now and then abort the interpreter's own end
