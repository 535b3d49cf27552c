"""Learning where to start: a prefix from which a new task of a family is learned in a few steps.

The prefix of each training task is thrown away; what is kept is the start that they were adapted from, moved a little
by each (``MetaConfig`` has the formulas). It works on the parameters of whatever is attached: any method, any
reparameterisation. What comes out is an ordinary prefix, to be trained further.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword._prefix_file import checksum
from foreword.data import Collator, EncodedDataset
from foreword.errors import ConfigError, DataError, DivergedError
from foreword.methods import Config
from foreword.prefix import Prefix
from foreword.train._meta_state import check_out, check_same, load_state, read_record, save_state
from foreword.train._meta_step import MetaStep, NotFiniteError
from foreword.train._same import data_digest, mode_kept, model_digest
from foreword.train.curves import draw_meta
from foreword.train.meta_config import MetaConfig
from foreword.train.progress import MetaProgress, StopOnSignal
from foreword.train.trainer import LAST_GOOD
from foreword.tuning import Tuning, attach

__all__ = ["MetaConfig", "MetaResult", "meta_train"]

What = Config | Prefix | Sequence[Config | Prefix]
Losses = Mapping[str, float]


@dataclass(frozen=True)
class MetaResult:
    """What a meta-training left behind.

    Attributes:
        prefix: the start that was learned, baked: go on from it with ``fw.attach(model, prefix, trainable=True)``.
        history: of each meta-step, ``step`` and the losses ``before`` and ``after`` adapting, means over its tasks.
        steps: meta-steps done.
        interrupted: whether Ctrl-C ended it early.
        parameters: how many numbers were trained.
    """

    prefix: Prefix
    history: list[dict[str, float]]
    steps: int
    interrupted: bool
    parameters: int


def meta_train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    what: What,
    tasks: Mapping[str, EncodedDataset],
    out: str | Path,
    plan: MetaConfig | None = None,
    *,
    resume: bool = False,
    label: str = "meta-training",
    console: Console | None = None,
    on_step: Callable[[int, Losses], None] | None = None,
) -> MetaResult:
    """Learn a start over many tasks and save it into ``out``; the model is detached again at the end.

    Ctrl-C ends it after the meta-step, with the state and the start so far saved. A kill loses the meta-steps since the
    last saved state, and what is resumed ends to the bit as what was not.

    Args:
        what: a configuration (or several methods), or a prefix, that the start begins from.
        tasks: each task's examples, by name: two or more.
        plan: None: :class:`MetaConfig` with its defaults.
        resume: go on with the run in ``out``.
        on_step: called after each meta-step with how many are done and its losses.

    Raises:
        ConfigError: fewer than two tasks; ``what`` is for several tasks of its own; ``out`` holds something else, or a
            run and ``resume`` was not asked for, or the reverse, or one with other settings.
        DataError: a task has fewer examples than a step takes.
        DivergedError: a loss, gradient or number left the finite; the start before that step is in ``out/last-good``.
    """
    plan, out = plan or MetaConfig(), Path(out)
    console = console or Console(stderr=True)
    _check_tasks(what, tasks, plan)
    check_out(out, resume)
    settings = _settings(model, what, tasks, plan)
    new: dict[str, Any] = {"settings": settings, "step": 0, "history": []}
    record = read_record(out) if resume else new
    check_same(out, record["settings"], settings)
    with mode_kept(model):
        tuning = attach(model, what, tokenizer=tokenizer, trainable=True)
        try:
            model.train()
            collate = Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
            step = MetaStep(tuning, plan, list(tasks.items()), collate)
            if resume:
                load_state(out, tuning, step.optimizers)
            else:
                save_state(out, tuning, step.optimizers, record)
            interrupted = _loop(step, record, out, label, console, on_step)
            return _finish(tuning, record, list(tasks), out, interrupted)
        finally:
            if tuning.attached:
                tuning.detach()


def _check_tasks(what: What, tasks: Mapping[str, EncodedDataset], plan: MetaConfig) -> None:
    if any(getattr(w, "tasks", ()) for w in (what if isinstance(what, Sequence) else [what])):
        raise ConfigError(
            "meta-learning learns one start for all tasks, and this configuration has a prefix for each of several; "
            "leave its tasks= out"
        )
    if len(tasks) < 2:
        raise ConfigError(
            f"a start is learned over many tasks, and {len(tasks)} {'is' if len(tasks) == 1 else 'are'} given; give "
            "two or more, or train on the one"
        )
    for name, dataset in tasks.items():
        if len(dataset) < plan.least:
            parts = f" and {plan.query} others for its query" if plan.query else ""
            raise DataError(
                f"the task {name!r} has {len(dataset)} examples, and a step takes {plan.batch_size}{parts}; give it "
                f"{plan.least} or more, leave it out, or take smaller batches"
            )


def _settings(
    model: PreTrainedModel, what: What, tasks: Mapping[str, EncodedDataset], plan: MetaConfig
) -> dict[str, Any]:
    """What makes two runs the same one, by names that a message can use."""
    own = {k: v for k, v in plan.to_json().items() if k != "save_every"}
    items = what if isinstance(what, Sequence) else [what]
    described = {
        **own, "the tasks": list(tasks), "the data": data_digest(tasks.values()), "the model": model_digest(model),
        "what is trained": [checksum(i) if isinstance(i, Prefix) else [type(i).__name__, i.to_json()] for i in items],
    }  # fmt: skip
    return dict(json.loads(json.dumps(described)))


def _loop(
    step: MetaStep,
    record: dict[str, Any],
    out: Path,
    label: str,
    console: Console,
    on_step: Callable[[int, Losses], None] | None,
) -> bool:
    """The meta-steps that are left; whether Ctrl-C ended them."""
    plan, tuning, stop, saved = step.config, step.tuning, StopOnSignal(console), record["step"]
    with stop, MetaProgress(label, console, plan.meta_steps, record["step"]) as progress:
        while record["step"] < plan.meta_steps and not stop.asked:
            try:
                losses = step(record["step"])
            except NotFiniteError as exc:
                _stop(tuning, out, record["step"] + 1, str(exc), plan)
            record["step"] += 1
            record["history"].append({"step": record["step"], **losses})
            if record["step"] % plan.save_every == 0:
                save_state(out, tuning, step.optimizers, record)
                saved = record["step"]
            progress.step(record["step"], **losses)
            if on_step is not None:
                on_step(record["step"], losses)
        if saved < record["step"]:
            save_state(out, tuning, step.optimizers, record)
    return bool(record["step"] < plan.meta_steps)


def _stop(tuning: Tuning, out: Path, step: int, what: str, plan: MetaConfig) -> NoReturn:
    """Save the start as it was before the step, and raise."""
    folder = out / LAST_GOOD
    tuning.save(folder)
    rate = "the usual one" if plan.inner_learning_rate is None else f"{plan.inner_learning_rate:g}"
    raise DivergedError(
        f"meta-training diverged at step {step}: {what}. The start before it is in {folder}. Try a third of the inner "
        f"learning rate (it was {rate}) or of the meta learning rate, or init from a text"
    )


def _finish(tuning: Tuning, record: dict[str, Any], names: list[str], out: Path, interrupted: bool) -> MetaResult:
    """Bake and save the start."""
    history = record["history"]
    settings = {k: v for k, v in record["settings"].items() if k not in ("the data", "the model", "what is trained")}
    tuning.metadata["meta"] = {**settings, "the tasks": names, "steps done": record["step"]}
    tuning.metadata["metrics"] = {f"loss_{n}": history[-1][n] for n in ("before", "after")} if history else {}
    prefix = tuning.bake()
    prefix.save(out)
    if history:
        draw_meta(history, out / "curve.png")
    return MetaResult(prefix, history, record["step"], interrupted, tuning.num_parameters)
