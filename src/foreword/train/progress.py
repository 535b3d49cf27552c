"""What a person sees of a run: a progress bar with the loss, and a Ctrl-C that saves before it stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RichProgress(TrainerCallback):
    """One bar for a run, with the latest losses."""

    def __init__(self, label: str, console: Console) -> None:
        self.label = label
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[valid]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.bar.start()
        self.task = self.bar.add_task(
            self.label, total=state.max_steps, completed=state.global_step, loss="…", valid=""
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.task is None or not logs:
            return
        if "loss" in logs:
            self.bar.update(self.task, loss=f"{float(logs['loss']):.3f}")
        if "eval_loss" in logs:
            self.bar.update(self.task, valid=f"validation {float(logs['eval_loss']):.3f}")

    def close(self) -> None:
        """Stop drawing, also after an error."""
        self.bar.stop()


class Counting:
    """A bar for work that is counted: ``with Counting("teacher", console, 300) as bar: ... bar.advance(8)``."""

    def __init__(self, label: str, console: Console, total: int, unit: str = "examples") -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self.bar.add_task(label, total=total)

    def __enter__(self) -> Counting:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def skip(self, count: int) -> None:
        """So many were done before; they don't count for the speed."""
        self.bar.reset(self._task, completed=count)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.bar.advance(self._task, count)


class SearchProgress:
    """Two bars for a search: its budget, and the steps of the trial that is running."""

    def __init__(self, console: Console, total: float, unit: str) -> None:
        name, said = TextColumn("{task.description}"), TextColumn("{task.fields[said]}")
        self.bar = Progress(name, BarColumn(), said, TimeElapsedColumn(), console=console)
        self.total, self.unit = total, unit
        self._search = self.bar.add_task("search", total=total, said="")
        self._trial = self.bar.add_task("trial", total=None, said="", start=False)

    def __enter__(self) -> SearchProgress:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def searched(self, spent: float, best: float | None) -> None:
        """How much of the budget is used."""
        said = f"{spent:.0f} of {self.total:g} {self.unit}" + (f", best {best:.3f}" if best is not None else "")
        self.bar.update(self._search, completed=min(spent, self.total), said=said)

    def trial(self, number: int, steps: int) -> None:
        """A trial begins."""
        self.bar.reset(self._trial, total=steps, description=f"trial {number}", said="")

    def step(self, done: int, loss: float | None = None) -> None:
        """A step of it is done; ``loss``: it was validated."""
        said = {"said": f"step {done}, validation {loss:.3f}"} if loss is not None else {}
        self.bar.update(self._trial, completed=done, **said)  # type: ignore[arg-type]


class MetaProgress:
    """One bar for a meta-training, with the losses before and after adapting."""

    def __init__(self, label: str, console: Console, total: int, done: int) -> None:
        name, said = TextColumn("{task.description}"), TextColumn("loss {task.fields[said]}")
        columns = (name, BarColumn(), MofNCompleteColumn(), said, TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console)
        self._task = self.bar.add_task(label, total=total, completed=done, said="…")

    def __enter__(self) -> MetaProgress:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def step(self, done: int, before: float, after: float) -> None:
        """A meta-step is done."""
        self.bar.update(self._task, completed=done, said=f"{before:.3f} → {after:.3f}")


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C saves a checkpoint after the step and stops; the second stops at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False  # here, or in another process
        self._told = False
        self._previous: Any = None

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._told:
            raise KeyboardInterrupt
        self._told = self.asked = True
        self.console.print("stopping after this step (Ctrl-C again to stop at once) …")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._anywhere(args):
            self.asked = True
            control.should_save = True
            control.should_training_stop = True

    def _anywhere(self, args: TrainingArguments) -> bool:
        """Whether any process was asked: one that stopped alone, or a step later, would leave the others waiting."""
        if args.world_size == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)
