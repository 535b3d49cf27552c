"""Before anything is trained: what is wrong with data and methods, what the model is, how long a step takes."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foreword.compare.budget import Budget
from foreword.compare.examples import encoded, first_references, given, tasks_of
from foreword.compare.plan import Plan
from foreword.compare.rows import Row
from foreword.compare.settings import Settings
from foreword.compare.tasks import TaskData
from foreword.compare.training import Tell, subset, train
from foreword.data import Collator
from foreword.errors import ConfigError, PrecisionWarning
from foreword.evaluate.examples import Task
from foreword.evaluate.metrics import check
from foreword.evaluate.predict import predict
from foreword.tuning import attach


def probe(settings: Settings, task: TaskData, plan: Plan, tell: Tell) -> dict[str, Any]:
    """Find what is wrong with data, metrics and methods; say what the model is.

    Returns:
        ``model``: a digest, its name and dtype; ``parameters``; ``layers``: attention sites; ``machine``.

    Raises:
        ConfigError, DataError, MissingPartError: what cannot be compared, and why.
    """
    from foreword.train._same import model_digest

    model, tokenizer = settings.load()
    for name, records in task.tests.items():
        tasks = tasks_of(records)
        check_metrics(task.metrics, tasks, settings.model)
        encoded(first_references(name, tasks), tokenizer, model, task)
    for records in (task.train, first_references("valid", tasks_of(task.valid))):
        encoded(records, tokenizer, model, task)
    for row in plan.rows:
        if row.examples is not None and row.examples > len(task.train):
            raise ConfigError(
                f"{row.label}: {row.examples} examples are to be drawn, and task {task.name} has {len(task.train)}"
            )
        tell({"checking": row.label})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PrecisionWarning)  # it would not be a fair comparison
                attach(model, row.at(1.0, plan.seeds[0]), tokenizer=tokenizer).detach()
        except (ConfigError, PrecisionWarning) as exc:
            raise ConfigError(f"{row.label}: {exc}") from exc
    return {
        "model": {"name": model_name(model), "weights": model_digest(model), "dtype": str(model.dtype)},
        "parameters": sum(p.numel() for p in model.parameters()), "machine": machine(),
    }  # fmt: skip


def layers(settings: Settings, tell: Tell) -> int:
    """How many attention sites the model has, of the kind that it has most of."""
    from collections import Counter

    from foreword.sites import sites

    model, _ = settings.load()
    return max(Counter(site.kind for site in sites(model)).values())


def check_metrics(metrics: Sequence[str], tasks: Sequence[Task], model: str) -> None:
    """Whether they can be computed for these examples; raises as ``foreword.evaluate.score``."""
    if metrics:
        check(metrics, size=len(tasks), **given(tasks), model=model, tokenizer=model)


def model_name(model: PreTrainedModel) -> str:
    from foreword.fingerprint import Fingerprint

    return Fingerprint.of(model).base_model


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import transformers

    import foreword

    return {
        "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__, "transformers": transformers.__version__, "foreword": foreword.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def time_steps(settings: Settings, task: TaskData, rows: Sequence[Row], seed: int, tell: Tell) -> dict[str, float]:
    """Seconds of a step of each line, once it is warm, and of writing for one test example (``""``)."""
    from tempfile import TemporaryDirectory

    model, tokenizer = settings.load()
    found: dict[str, float] = {}
    data = encoded(subset(task.train, settings.batch_size * 2, seed), tokenizer, model, task)
    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    for row in rows:
        tell({"checking": row.label})
        tuning = attach(model, row.at(1.0, seed), tokenizer=tokenizer)
        seconds: list[float] = []
        try:
            with TemporaryDirectory() as work:
                for steps in (1, 2):
                    watch, _, _ = train(
                        model, data, data, collator, Path(work), budget=Budget(steps=steps), seed=seed, looks=1,
                        batch_size=settings.batch_size, tell=lambda told: None,
                    )  # fmt: skip
                    seconds.append(watch.seconds)
        finally:
            tuning.detach()
        found[row.label] = seconds[1] / 2
    if task.metrics:
        tasks = tasks_of(next(iter(task.tests.values())))[: settings.batch_size]
        began = time.perf_counter()
        predict(model, tokenizer, [t.prompt for t in tasks], settings=task.decoding, batch_size=settings.batch_size)
        found[""] = (time.perf_counter() - began) / len(tasks)
    return found
