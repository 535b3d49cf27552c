"""One run of a comparison, in a process of its own: train, bake, test as saved, write down what came of it.

What is tested is the baked prefix, attached as anybody would attach the saved one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from foreword._attached import attached
from foreword.compare.examples import encoded, first_references, given, tasks_of
from foreword.compare.measure import forget_peak, resident, speed
from foreword.compare.plan import Run
from foreword.compare.settings import Settings
from foreword.compare.tasks import Records, TaskData, has_prompt
from foreword.compare.training import Tell, subset, train
from foreword.data import Collator
from foreword.errors import DataError
from foreword.evaluate._counts import Counts, Numbers
from foreword.evaluate.bootstrap import interval
from foreword.evaluate.examples import Task
from foreword.evaluate.metrics import count
from foreword.evaluate.predict import predict
from foreword.evaluate.run import finite
from foreword.losses import example_losses, supervised_tokens
from foreword.prefix import Prefix
from foreword.train._teacher import text_teacher
from foreword.tuning import attach

RESULT, PREDICTIONS, PREFIX = "result.json", "predictions.jsonl", "prefix"
KEPT_BYTES = 64 * 2**20  # a larger prefix (full fine-tuning) is not kept
_SPEED_PROMPTS = 4


def execute(settings: Settings, task: TaskData, run: Run, work: Path, tell: Tell) -> dict[str, Any]:
    """Do one run; leaves ``result.json``, the predictions and the prefix in ``work``.

    Returns:
        What ``result.json`` holds. ``measured`` has what another machine, or hour, changes: seconds and bytes.
    """
    work.mkdir(parents=True)
    began = time.perf_counter()
    if run.kind == "final":
        _warm(work / "training")
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
        prefix = text_teacher(model, tokenizer, task.init)
        result["virtual_tokens"] = prefix.length(next(iter(prefix.keys)))
    if run.kind != "rate" and result["outcome"] == "complete":
        if run.row is None:
            result["valid_loss"] = _valid_loss(model, tokenizer, task, prefix)
        elif prefix is not None and prefix.nbytes <= KEPT_BYTES:
            prefix.save(work / PREFIX)
        for name, records in task.tests.items():
            tell({"testing": name})
            result["tests"][name] = _tested(settings, task, name, records, model, tokenizer, prefix, work)
        if run.timed and prefix is not None and all(map(has_prompt, task.valid[:_SPEED_PROMPTS])):
            tell({"testing": "speed"})
            prompts = [t.prompt for t in tasks_of(task.valid[:_SPEED_PROMPTS])]
            measured["speed"] = speed(model, tokenizer, lambda: attached(model, prefix), prompts)
    measured["seconds"] = time.perf_counter() - began
    result["measured"] = measured
    _write(work / RESULT, json.dumps(finite(result), ensure_ascii=False, indent=1) + "\n")
    return dict(finite(result))


def _warm(work: Path) -> None:
    """Train a model of a few numbers, so that what Python and the libraries load for that is there before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from foreword.compare.budget import Budget
    from foreword.config import PrefixConfig
    from foreword.data.encoded import EncodedDataset, EncodeStats

    size: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).eval()
    data = EncodedDataset([[5] * 4], [[5] * 4], EncodeStats(1, 0, 0, 4, 3, 4))
    attach(model, PrefixConfig(length=1, init="random"))
    train(
        model, data, data, Collator(0), work, budget=Budget(steps=1), batch_size=1, seed=0, looks=1,
        tell=lambda told: None,
    )  # fmt: skip
    _remove(work)


def _trained(
    settings: Settings, task: TaskData, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    work: Path, tell: Tell, result: dict[str, Any], measured: dict[str, Any], before: int | None,
) -> Prefix | None:  # fmt: skip
    """Train a line's methods and bake them; None where it diverged, or where only the loss is asked for."""
    assert run.row is not None and run.budget is not None
    base = sum(p.numel() for p in model.parameters())
    drawn = subset(task.train, run.row.examples, run.seed)
    valid_part = first_references("valid", tasks_of(task.valid))
    data, valid = (encoded(part, tokenizer, model, task) for part in (drawn, valid_part))
    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    set_seed(run.seed)
    tuning = attach(model, run.row.at(run.factor, run.seed), tokenizer=tokenizer)
    try:
        result["parameters"], result["share"] = tuning.num_parameters, tuning.num_parameters / base
        watch, seen, message = train(
            model, data, valid, collator, work / "training", budget=run.budget, batch_size=settings.batch_size,
            seed=run.seed, looks=1 if run.kind == "rate" else settings.looks, tell=tell, keep=settings.keep,
        )  # fmt: skip
        losses = [p for p in watch.curve if math.isfinite(p["loss"])]
        best = min(losses, key=lambda p: p["loss"]) if losses else None
        tested = best if settings.keep == "best" else losses[-1] if losses else None
        result |= {
            "outcome": "diverged" if message else "complete", "message": message, **seen,
            "valid_loss": tested["loss"] if tested is not None and not message else None,
            "best": best,
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
    data = encoded(first_references("valid", tasks_of(task.valid)), tokenizer, model, task)
    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    with attached(model, prefix):
        losses = example_losses(model, data, collator)
    return math.fsum(losses) / max(1, sum(supervised_tokens(data, seq2seq=collator.seq2seq)))


def _tested(
    settings: Settings, task: TaskData, name: str, records: Records, model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase, prefix: Prefix | None, work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Likelihood of the first references, and the metrics of what is written, each with its interval."""
    tasks = tasks_of(records)
    data = encoded(first_references(name, tasks), tokenizer, model, task)
    collator = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
    texts: list[str] | None = None
    with attached(model, prefix):
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
            found |= count(texts, metrics=[metric], **given(tasks), **tools)
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


# ---------------------------------------------------------------- files


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
