"""Training on tiny random models: data, trainers, and the losses that a run logs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import foreword as fw
import zoo
from foreword.data import Collator

STEPS = 6
HERE = Path(__file__).parent
# For processes that tests start: one thread, no network, this folder's modules, the foreword tested.
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": os.pathsep.join(map(str, [HERE, HERE.parent, Path(fw.__file__).parents[1]])),
}  # fmt: skip
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}


def rows(n=16, length=7, seed=0):
    """Examples with the loss on all but the first token, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids = torch.randint(3, 99, (length - i % 3,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return found


def tuned(name="llama", **config):
    """A fresh random model with a prefix to be trained."""
    model = zoo.build(name)
    tuning = fw.attach(model, fw.PrefixConfig(**{"length": 4, "init": "random", **config}), tokenizer=zoo.tokenizer())
    return model, tuning


def trainer(model, out, data=None, *, callbacks=None, valid=None, **arguments):
    """A PrefixTrainer that logs every step, saves every second, and shuffles by a seed."""
    settings = {"output_dir": str(out), "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1,
                "save_steps": 2, "seed": 5, **QUIET}  # fmt: skip
    made = fw.PrefixTrainer(
        model,
        fw.PrefixTrainingArguments(**{**settings, **arguments}),
        train_dataset=rows() if data is None else data,
        eval_dataset=valid,
        data_collator=Collator(0),
        callbacks=callbacks,
    )
    for callback in list(made.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            made.remove_callback(callback)
    return made


def losses(made):
    """The logged training losses by step."""
    return {e["step"]: e["loss"] for e in made.state.log_history if "loss" in e}


def base_weights(model):
    """A copy of everything that is not the prefix's."""
    return {n: p.detach().clone() for n, p in model.state_dict().items() if not n.startswith("foreword.")}


def assert_base_unchanged(model, before):
    after = base_weights(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("foreword."))
