"""One run of a comparison, in a process of its own: train, bake, test as saved, write down what came of it.

What is tested is the baked prefix, attached as anybody would attach the saved one.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from foreword.compare.budget import Budget
from foreword.compare.measure import forget_peak, resident, speed
from foreword.compare.plan import Plan, Run
from foreword.compare.rows import Row
from foreword.compare.tasks import Records, TaskData
from foreword.compare.training import Tell, subset, train
from foreword.data import Collator, EncodedDataset, encode, read_examples
from foreword.errors import ConfigError, DataError
from foreword.evaluate._counts import Counts, Numbers
from foreword.evaluate.bootstrap import interval
from foreword.evaluate.examples import Task, read_tasks
from foreword.evaluate.metrics import check, count
from foreword.evaluate.predict import predict
from foreword.evaluate.run import finite
from foreword.losses import example_losses, supervised_tokens
from foreword.models import load_model
from foreword.prefix import Prefix
from foreword.tuning import attach

RESULT, PREDICTIONS, PREFIX = "result.json", "predictions.jsonl", "prefix"
KEPT_BYTES = 64 * 2**20  # a larger prefix (full fine-tuning) is not kept
_SPEED_PROMPTS = 4


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        model, dtype, attn: as for ``fw.load_model``.
        looks: validations of a run.
        intervals: bootstrap resamples.
    """

    model: str
    dtype: str | None = None
    attn: str | None = None
    batch_size: int = 8
    looks: int = 8
    intervals: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("looks", 1), ("intervals", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value}; expected {least} or more")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(self.model, dtype=self.dtype, attn=self.attn)

    def to_json(self) -> dict[str, Any]:
        """What the results depend on; the model goes by its weights."""
        return {"batch_size": self.batch_size, "looks": self.looks, "intervals": self.intervals}


# ---------------------------------------------------------------- before anything is trained


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
        tasks = _tasks(records)
        check_metrics(task.metrics, tasks, settings.model)
        _encoded(_first_references(name, tasks), tokenizer, model, task.max_length)
    for records in (task.train, task.valid):
        _encoded(records, tokenizer, model, task.max_length)
    for row in plan.rows:
        if row.examples is not None and row.examples > len(task.train):
            raise ConfigError(
                f"{row.label}: {row.examples} examples are to be drawn, and task {task.name} has {len(task.train)}"
            )
        tell({"checking": row.label})
        try:
            attach(model, row.at(1.0, plan.seeds[0]), tokenizer=tokenizer).detach()
        except ConfigError as exc:
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
        check(metrics, size=len(tasks), **_given(tasks), model=model, tokenizer=model)


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
    data = _encoded(subset(task.train, settings.batch_size * 2, seed), tokenizer, model, task.max_length)
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
        tasks = _tasks(next(iter(task.tests.values())))[: settings.batch_size]
        began = time.perf_counter()
        predict(model, tokenizer, [t.prompt for t in tasks], settings=task.decoding, batch_size=settings.batch_size)
        found[""] = (time.perf_counter() - began) / len(tasks)
    return found


# ---------------------------------------------------------------- a run


def execute(settings: Settings, task: TaskData, run: Run, work: Path, tell: Tell) -> dict[str, Any]:
    """Do one run; leaves ``result.json``, the predictions and the prefix in ``work``.

    Returns:
        What ``result.json`` holds. ``measured`` has what another machine, or hour, changes: seconds and bytes.
    """
    work.mkdir(parents=True)
    began = time.perf_counter()
    forget_peak()
    before = resident()
    model, tokenizer = settings.load()
    result: dict[str, Any] = {
        "run": run.to_json() | {"label": run.label}, "outcome": "complete", "message": "", "parameters": 0,
        "share": 0.0, "stored_bytes": 0, "valid_loss": None, "curve": [], "tests": {},
        "rates": run.row.rates(run.factor) if run.row is not None else [],
    }  # fmt: skip
    measured: dict[str, Any] = {"training_seconds": None, "peak_bytes": None, "speed": None}
    prefix: Prefix | None = None
    if run.row is not None:
        prefix = _trained(settings, task, run, model, tokenizer, work, tell, result, measured, before)
    elif run.kind == "prompted":
        prefix = Prefix.from_text(model, tokenizer, task.init)
        result["virtual_tokens"] = prefix.length(next(iter(prefix.keys)))
    if run.kind != "rate" and result["outcome"] == "complete":
        if run.row is None:
            result["valid_loss"] = _valid_loss(model, tokenizer, task, prefix)
        elif prefix is not None and prefix.nbytes <= KEPT_BYTES:
            prefix.save(work / PREFIX)
        for name, records in task.tests.items():
            tell({"testing": name})
            result["tests"][name] = _tested(settings, task, name, records, model, tokenizer, prefix, work)
        if run.timed and prefix is not None and all(r.get("input", "").strip() for r in task.valid[:_SPEED_PROMPTS]):
            tell({"testing": "speed"})
            prompts = [r["input"] for r in task.valid[:_SPEED_PROMPTS]]
            measured["speed"] = speed(model, tokenizer, lambda: _attached(model, prefix), prompts)
    measured["seconds"] = time.perf_counter() - began
    result["measured"] = measured
    _write(work / RESULT, json.dumps(finite(result), ensure_ascii=False, indent=1) + "\n")
    return dict(finite(result))


def _trained(
    settings: Settings, task: TaskData, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    work: Path, tell: Tell, result: dict[str, Any], measured: dict[str, Any], before: int | None,
) -> Prefix | None:  # fmt: skip
    """Train a line's methods and bake them; None where it diverged, or where only the loss is asked for."""
    assert run.row is not None and run.budget is not None
    base = sum(p.numel() for p in model.parameters())
    drawn = subset(task.train, run.row.examples, run.seed)
    data, valid = (_encoded(part, tokenizer, model, task.max_length) for part in (drawn, task.valid))
    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    set_seed(run.seed)
    tuning = attach(model, run.row.at(run.factor, run.seed), tokenizer=tokenizer)
    try:
        result["parameters"], result["share"] = tuning.num_parameters, tuning.num_parameters / base
        watch, seen, message = train(
            model, data, valid, collator, work / "training", budget=run.budget, batch_size=settings.batch_size,
            seed=run.seed, looks=1 if run.kind == "rate" else settings.looks, tell=tell,
        )  # fmt: skip
        losses = [p for p in watch.curve if math.isfinite(p["loss"])]
        result |= {
            "outcome": "diverged" if message else "complete", "message": message, **seen,
            "valid_loss": losses[-1]["loss"] if losses and not message else None,
            "best": min(losses, key=lambda p: p["loss"]) if losses else None,
            "curve": watch.curve, "train": watch.train,
        }  # fmt: skip
        measured["training_seconds"] = watch.seconds
        if watch.peak is not None and before is not None:
            measured["peak_bytes"] = watch.peak - before
        if run.kind == "rate" or message:
            return None
        tuning.metadata["compared"] = {"label": run.label, "seed": run.seed, "rates": run.row.rates(run.factor)}
        prefix = tuning.bake()
        result["stored_bytes"] = prefix.stored_nbytes
        return prefix
    finally:
        tuning.detach()
        _remove(work / "training")


def _valid_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: TaskData, prefix: Prefix | None
) -> float:
    data = _encoded(task.valid, tokenizer, model, task.max_length)
    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    with _attached(model, prefix):
        losses = example_losses(model, data, collator)
    return math.fsum(losses) / max(1, sum(supervised_tokens(data, seq2seq=collator.seq2seq)))


def _tested(
    settings: Settings, task: TaskData, name: str, records: Records, model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase, prefix: Prefix | None, work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Likelihood of the first references, and the metrics of what is written, each with its interval."""
    tasks = _tasks(records)
    data = _encoded(_first_references(name, tasks), tokenizer, model, task.max_length)
    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    texts: list[str] | None = None
    with _attached(model, prefix):
        losses = example_losses(model, data, collator, batch_size=16)
        if task.metrics:
            prompts = [t.prompt for t in tasks]
            texts = predict(model, tokenizer, prompts, settings=task.decoding, batch_size=settings.batch_size)
    tokens = supervised_tokens(data, seq2seq=collator.seq2seq)
    found = {
        "loss": _loss(losses, tokens, lambda mean: mean), "perplexity": _loss(losses, tokens, _exp)
    }  # fmt: skip
    units = {"loss": "nats a token", "perplexity": ""}
    higher = dict.fromkeys(found, False)
    if texts is not None:
        _write_texts(work / PREDICTIONS, name, tasks, texts)
        tools = {"model": model, "tokenizer": tokenizer, "batch_size": settings.batch_size}
        found |= _counted(task.metrics, texts, tasks, tools)
        from foreword.evaluate.metrics import METRICS

        units |= {m: METRICS[m].unit for m in task.metrics}
        higher |= {m: METRICS[m].higher for m in task.metrics}
    scores = {}
    for metric, counts in found.items():
        low, high = interval(counts, settings.intervals, 0) or (None, None)
        scores[metric] = {"value": counts.total, "low": low, "high": high, "unit": units[metric],
                          "higher_is_better": higher[metric], "note": counts.note}  # fmt: skip
    return scores


def _counted(
    metrics: Sequence[str], texts: list[str], tasks: Sequence[Task], tools: dict[str, Any]
) -> dict[str, Counts]:
    """Each metric by itself: one that these texts don't allow (all of them empty) is not a number, with a note."""
    found: dict[str, Counts] = {}
    for metric in metrics:
        try:
            found |= count(texts, metrics=[metric], **_given(tasks), **tools)
        except DataError as exc:
            found[metric] = Counts(np.zeros((len(texts), 1)), lambda _: math.nan, note=str(exc), resamples=False)
    return found


def _loss(losses: Sequence[float], tokens: Sequence[int], of: Any) -> Counts:
    rows = np.stack([np.asarray(losses, dtype=float), np.asarray(tokens, dtype=float)], axis=1)

    def value(sums: Numbers) -> float:
        return float(of(sums[0] / sums[1])) if sums[1] else math.nan

    return Counts(rows, value)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


# ---------------------------------------------------------------- examples and files


def _tasks(records: Records) -> list[Task]:
    return read_tasks(records)


def _given(tasks: Sequence[Task]) -> dict[str, Any]:
    """What metrics take: each where all examples have it."""
    return {
        "references": [t.references for t in tasks] if all(t.references for t in tasks) else None,
        "inputs": [t.input for t in tasks] if all(t.input for t in tasks) else None,
        "labels": [t.label or "" for t in tasks] if all(t.label is not None for t in tasks) else None,
    }


def _first_references(name: str, tasks: Sequence[Task]) -> Records:
    """Each test example with the first of its references, whose likelihood is asked for."""
    for place, task in enumerate(tasks):
        if not task.references:
            raise DataError(f"{name} example {place} has no references (or output); a comparison needs one")
    return [{"input": t.input, "output": t.references[0]} for t in tasks]


def _encoded(
    records: Records, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> EncodedDataset:
    return encode(
        read_examples(records), tokenizer, max_length=max_length, seq2seq=bool(model.config.is_encoder_decoder)
    )


@contextmanager
def _attached(model: PreTrainedModel, prefix: Prefix | None) -> Iterator[None]:
    if prefix is None:
        yield
        return
    tuning = attach(model, prefix)
    try:
        yield
    finally:
        tuning.detach()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)


def _write_texts(path: Path, name: str, tasks: Sequence[Task], texts: Sequence[str]) -> None:
    lines: list[Mapping[str, Any]] = [
        {"test": name, "key": t.key, "input": t.input, "prediction": p} for t, p in zip(tasks, texts, strict=True)
    ]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
