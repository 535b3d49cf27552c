"""Under torchrun: PrefixTrainer; every process says which files it opened for writing below OUT."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tiny
import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, notes = Path(sys.argv[1]), Path(sys.argv[2])
    written = []

    def note(event, arguments):
        mode = str(arguments[1] or "") if event == "open" else ""
        if "w" in mode and str(arguments[0]).startswith(str(out)):
            written.append(str(arguments[0]))

    sys.addaudithook(note)
    model, tuning = tiny.tuned(gate="head")
    trainer = tiny.trainer(model, out, per_device_train_batch_size=4, ddp_backend="gloo")
    trainer.train()
    tuning.bake().save(notes / f"prefix-{os.environ['RANK']}")
    record = {"written": written, "losses": tiny.losses(trainer), "world": trainer.args.world_size}
    (notes / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)  # everything is written; gloo's threads now and then abort the interpreter's own end
