"""One training run from data to a saved prefix: what `foreword train` and the demo both do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from foreword.data import Collator, EncodedDataset
from foreword.errors import ConfigError
from foreword.methods import Config
from foreword.prefix import Prefix
from foreword.train.arguments import PrefixTrainingArguments
from foreword.train.checkpoints import last_checkpoint, written_checkpoints
from foreword.train.memory_estimate import MemoryEstimate, estimate_memory
from foreword.train.progress import RichProgress, StopOnSignal
from foreword.train.trainer import PrefixTrainer
from foreword.tuning import attach


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        prefix: the trained prefix, baked.
        history: the Trainer's log.
        steps: optimizer steps done.
        interrupted: whether Ctrl-C ended it early.
        parameters: how many numbers were trained.
    """

    prefix: Prefix
    history: list[dict[str, Any]]
    steps: int
    interrupted: bool
    parameters: int


def train_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    what: Config | Prefix | Sequence[Config | Prefix],
    dataset: EncodedDataset,
    out: Path,
    arguments: dict[str, Any],
    *,
    valid: EncodedDataset | None = None,
    resume: bool = False,
    label: str = "training",
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    trainer: Callable[..., PrefixTrainer] = PrefixTrainer,
    collator: Collator | None = None,
) -> RunResult:
    """Train a prefix and save it into ``out``; the model is detached again at the end.

    Args:
        what: a configuration for a new prefix (or several methods), or a prefix to go on training.
        arguments: fields of :class:`PrefixTrainingArguments`.
        resume: go on from the last whole checkpoint in ``out``.
        callbacks: strategies (``Growth``, ``LayerByLayer``, ``RollBack``, ``Monitor``), or any of transformers'.
        trainer: makes the trainer, for a loss of its own.
        collator: makes its batches; None: padded ids and labels.

    Raises:
        ConfigError: ``out`` holds a run already and ``resume`` was not asked for, or the reverse.
        DivergedError: the loss or gradient left the finite; the last good prefix is in ``out/last-good``.
    """
    console = console or Console(stderr=True)
    check_out(out, resume)
    args = run_arguments(out, arguments, valid is not None)
    set_seed(args.seed)
    if any(getattr(c, "tasks", ()) for c in (what if isinstance(what, Sequence) else [what])):
        raise ConfigError(
            "a run here has one task; attach the tasks and train them with PrefixTrainer, then tuning.save()"
        )
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
        tuning.metadata["metrics"] = _metrics(history)
        prefix = tuning.bake()
        if made.args.should_save:
            prefix.save(out)
        return RunResult(prefix, history, made.state.global_step, stop.asked, tuning.num_parameters)
    finally:
        progress.close()
        if tuning.attached:
            tuning.detach()


def memory_of_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    what: Config | Prefix | Sequence[Config | Prefix],
    dataset: EncodedDataset,
    arguments: dict[str, Any],
) -> MemoryEstimate:
    """What :func:`train_prefix` with the same arguments would need in memory; nothing is trained or written."""
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


def check_out(out: Path, resume: bool) -> None:
    """Raise ConfigError unless a run can be begun in the folder, or gone on with."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give the name of a folder for the prefix")
    if (out / "README.md").exists() and not (out / "foreword.json").exists():
        raise ConfigError(
            f"{out} holds a README.md of something else, which a prefix would replace; give another folder"
        )
    found = last_checkpoint(out) if out.is_dir() else None
    if resume and found is None:
        raise ConfigError(f"--resume: {out} holds no whole checkpoint; leave --resume out to start anew")
    if not resume and (out / "foreword.json").exists():
        raise ConfigError(f"{out} holds a prefix already; choose another --out, or go on with it (--resume, --start)")
    if not resume and (begun := written_checkpoints(out)):
        raise ConfigError(f"{out} holds an unfinished run ({begun[0].name}); pass --resume to go on, or another --out")


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


def _metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last losses of a run."""
    found: dict[str, float] = {}
    for entry in reversed(history):
        for name in ("loss", "eval_loss"):
            if name in entry:
                found.setdefault(name, float(entry[name]))
    return found
