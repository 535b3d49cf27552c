"""One training run from data to a saved prefix: what `foreword train` and the demo both do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from foreword.config import PrefixConfig
from foreword.data import Collator, EncodedDataset, TaskMixture
from foreword.data.encoded import form_of
from foreword.errors import ConfigError
from foreword.methods import Config
from foreword.prefix import Prefix
from foreword.train.arguments import PrefixTrainingArguments
from foreword.train.checkpoints import last_checkpoint, written_checkpoints
from foreword.train.memory_estimate import MemoryEstimate, estimate_memory
from foreword.train.progress import RichProgress, StopOnSignal
from foreword.train.trainer import PrefixTrainer
from foreword.tuning import Tuning, attach

Examples = EncodedDataset | TaskMixture
_OURS = re.compile(r"checkpoint-\d+|runs|last-good")  # folders that a run makes


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        prefixes: the trained prefixes, baked, by task; of a run without tasks, the only one under ``""``.
        history: the Trainer's log.
        steps: optimizer steps done.
        interrupted: whether Ctrl-C ended it early.
        parameters: how many numbers were trained.
    """

    prefixes: Mapping[str, Prefix]
    history: list[dict[str, Any]]
    steps: int
    interrupted: bool
    parameters: int

    @property
    def prefix(self) -> Prefix:
        """The trained prefix.

        Raises:
            ConfigError: the run had several tasks.
        """
        if "" not in self.prefixes:
            first = next(iter(self.prefixes))
            raise ConfigError(f"this run has a prefix for each task; take one of them: prefixes[{first!r}]")
        return self.prefixes[""]


def train_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    what: Config | Prefix | Sequence[Config | Prefix],
    dataset: Examples,
    out: Path,
    arguments: dict[str, Any],
    *,
    valid: Examples | None = None,
    resume: bool = False,
    label: str = "training",
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    trainer: Callable[..., PrefixTrainer] = PrefixTrainer,
    collator: Collator | None = None,
) -> RunResult:
    """Train a prefix and save it into ``out``; the model is detached again at the end.

    With ``PrefixConfig(tasks=...)`` the data are a ``TaskMixture``, and each task's prefix goes into a folder of its
    name in ``out``.

    Args:
        what: a configuration for a new prefix (or several methods), or a prefix to go on training.
        arguments: fields of :class:`PrefixTrainingArguments`.
        resume: go on from the last whole checkpoint in ``out``.
        callbacks: strategies (``Growth``, ``LayerByLayer``, ``RollBack``, ``Monitor``), or any of transformers'.
        trainer: makes the trainer, for a loss of its own.
        collator: makes its batches; None: padded ids and labels.

    Raises:
        ConfigError: ``out`` holds a run already and ``resume`` was not asked for, or the reverse; the tasks of data
            and configuration differ.
        DivergedError: the loss or gradient left the finite; the last good prefix is in ``out/last-good``.
    """
    console = console or Console(stderr=True)
    check_out(out, resume, _tasks(what, dataset, valid))
    args = run_arguments(out, arguments, valid is not None)
    set_seed(args.seed)
    training = model.training
    tuning = attach(model, what, tokenizer=tokenizer, trainable=True)
    progress, stop = RichProgress(label, console), StopOnSignal(console)
    try:
        collate = collator or _collator(model, tokenizer)
        made = trainer(
            model, args, train_dataset=dataset, eval_dataset=valid, data_collator=collate,
            callbacks=[progress, stop, *callbacks],
        )  # fmt: skip
        for noisy in (ProgressCallback, PrinterCallback):
            made.remove_callback(noisy)
        with stop:
            sharded = made.is_distributed_loading_by_transformers or made.is_deepspeed_enabled
            if made.args.should_save and not sharded:  # one process alone can't run a step of a sharded model
                console.print(f"memory: {estimate_memory(made).describe()}", highlight=False)
            made.train(resume_from_checkpoint=resume or None)
        done = made.state.global_step
        evaluated = any("eval_loss" in e and e.get("step") == done for e in made.state.log_history)
        if valid is not None and not stop.asked and not evaluated:
            made.evaluate()
        progress.close()
        history = list(made.state.log_history)
        tuning.metadata["training"] = made._record()
        prefixes = _baked(tuning, history, dataset)
        if made.args.should_save:
            for task, prefix in prefixes.items():
                prefix.save(out / task)
        return RunResult(prefixes, history, made.state.global_step, stop.asked, tuning.num_parameters)
    finally:
        progress.close()
        if tuning.attached:
            tuning.detach()
        model.train(training)  # the Trainer leaves it as in its last step: with dropout


def memory_of_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    what: Config | Prefix | Sequence[Config | Prefix],
    dataset: Examples,
    arguments: dict[str, Any],
) -> MemoryEstimate:
    """What :func:`train_prefix` with the same arguments would need in memory; nothing is trained or written."""
    _tasks(what, dataset)
    tuning = attach(model, what, tokenizer=tokenizer, trainable=True)
    try:
        with TemporaryDirectory() as out:
            args = run_arguments(Path(out), {**arguments, "report_to": "none"}, False)
            collator = _collator(model, tokenizer)
            return estimate_memory(PrefixTrainer(model, args, train_dataset=dataset, data_collator=collator))
    finally:
        tuning.detach()


def _collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
    return Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)


def _tasks(what: Config | Prefix | Sequence[Config | Prefix], *data: Examples | None) -> Sequence[str]:
    """The tasks that are to be trained.

    Raises:
        ConfigError: there are some, and the data don't say which example belongs to which.
    """
    items = what if isinstance(what, Sequence) else [what]
    tasks = next((c.tasks for c in items if isinstance(c, PrefixConfig)), ())
    if tasks and not all(isinstance(d, TaskMixture | None) for d in data):
        raise ConfigError(
            f"PrefixConfig(tasks={tuple(tasks)!r}) trains several prefixes, and the data are one set; give each task "
            "its own: TaskMixture({" + f"{tasks[0]!r}: ...}})"
        )
    return tasks


def check_out(out: Path, resume: bool, tasks: Sequence[str] = ()) -> None:
    """Raise ConfigError unless a run can be begun in the folder, or gone on with."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give the name of a folder for the prefix")
    if ours := next((task for task in tasks if _OURS.fullmatch(task)), None):
        raise ConfigError(f"a task can't be named {ours!r}: a run has a folder of that name; choose another")
    for folder in [out / task for task in tasks] or [out]:
        if (folder / "README.md").exists() and not (folder / "foreword.json").exists():
            raise ConfigError(
                f"{folder} holds a README.md of something else, which a prefix would replace; give another folder"
            )
    found = last_checkpoint(out) if out.is_dir() else None
    if resume and found is None:
        raise ConfigError(f"--resume: {out} holds no whole checkpoint; leave --resume out to start anew")
    held = next((f for f in (out, *(out / task for task in tasks)) if (f / "foreword.json").exists()), None)
    if not resume and held is not None:
        raise ConfigError(f"{held} holds a prefix already; choose another --out, or go on with it (--resume, --start)")
    if not resume and (begun := written_checkpoints(out)):
        raise ConfigError(f"{out} holds an unfinished run ({begun[0].name}); pass --resume to go on, or another --out")


def _baked(tuning: Tuning, history: list[dict[str, Any]], data: Examples) -> dict[str, Prefix]:
    """Each task's prefix with its own losses, or the only one under the empty name."""
    if not tuning.tasks:
        tuning.metadata["metrics"] = _metrics(history)
        return {"": tuning.bake()}
    prefixes = {}
    for task in tuning.tasks:
        metrics = _metrics(history, f"eval_{task}_loss")
        tuning.metadata["metrics"] = {"eval_loss" if k.startswith("eval_") else k: v for k, v in metrics.items()}
        tuning.metadata |= form_of(data.parts[task].rows if isinstance(data, TaskMixture) else data)
        prefixes[task] = tuning.bake(task=task)
    return prefixes


def run_arguments(out: Path, arguments: dict[str, Any], evaluates: bool) -> PrefixTrainingArguments:
    """Those of a run in a folder: ours where none are given."""
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "disable_tqdm": True,
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    if evaluates:
        defaults |= {"eval_strategy": "steps", "per_device_eval_batch_size": 16}
    return PrefixTrainingArguments(**{**defaults, **arguments})


def _metrics(history: list[dict[str, Any]], valid: str = "eval_loss") -> dict[str, float]:
    """The last losses of a run."""
    found: dict[str, float] = {}
    for entry in reversed(history):
        for name in ("loss", valid):
            if name in entry:
                found.setdefault(name, float(entry[name]))
    return found
