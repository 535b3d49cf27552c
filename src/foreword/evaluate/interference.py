"""What each task's prefix does to the others: the loss of every task under every prefix, and under none.

One model, the prefixes in a ``Library``, each task's held-out examples read once under each of them. Rows of a batch
share a prefix, so it is one tensor for all of them; to mix prefixes within a batch would make copies and save nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._figures import new_figure, save_figure
from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from ..data.mixture import Rows
    from ..prefix import Prefix

BASE = "none"  # what the base model's column is called


@dataclass(frozen=True)
class Interference:
    """Losses of T tasks (rows) under P prefixes and under none (columns), in nats a token.

    Attributes:
        tasks: the names of the rows.
        prefixes: the names of the columns; a task's own prefix has its name.
        losses: ``(T, P)``: the mean negative log-likelihood of a task's supervised tokens under a prefix.
        base: ``(T,)``, the same under none: the base model.
        errors: ``(T, P)``: of a loss minus the loss under the task's own prefix, the standard error over examples; of
            the loss itself where the task has no prefix. None of a single example.
        examples, tokens: ``(T,)``, what was read of each task.
    """

    tasks: list[str]
    prefixes: list[str]
    losses: list[list[float]]
    base: list[float]
    errors: list[list[float | None]]
    examples: list[int]
    tokens: list[int]

    def own(self, task: str) -> float | None:
        """A task's loss under its own prefix; None: it has none."""
        row = self._row(task)
        return row[self.prefixes.index(task)] if task in self.prefixes else None

    def harm(self, task: str) -> dict[str, float]:
        """How much a task loses under each other prefix, over its own (over the base model where it has none)."""
        own = self.own(task)
        reference = own if own is not None else self.base[self.tasks.index(task)]
        return {p: loss - reference for p, loss in zip(self.prefixes, self._row(task), strict=True) if p != task}

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)

    def table(self) -> Table:
        """The matrix, for ``rich.console.Console.print``."""
        from rich.table import Column, Table

        columns = [Column(name, justify="right") for name in (*self.prefixes, f"({BASE})", "examples")]
        table = Table("held-out loss of \\ under", *columns)
        for t, task in enumerate(self.tasks):
            cells = [
                f"[bold]{loss:.3f}[/bold]" if name == task else f"{loss:.3f} ({self._apart(t, p)})"
                for p, (name, loss) in enumerate(zip(self.prefixes, self.losses[t], strict=True))
            ]
            table.add_row(task, *cells, f"{self.base[t]:.3f}", str(self.examples[t]))
        return table

    def draw(self, path: Path, *, title: str = "") -> Path:
        """A heat map: losses in the cells, coloured by how far they are above (red) or below (blue) the task's own.

        Args:
            path: ``.svg``, or anything else for a PNG.
        """
        import numpy as np
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.patches import Rectangle

        values = np.array([[*row, base] for row, base in zip(self.losses, self.base, strict=True)])
        own = [self.own(task) for task in self.tasks]
        above = values - np.array([o if o is not None else b for o, b in zip(own, self.base, strict=True)])[:, None]
        most = max(float(np.abs(above).max()), 1e-6)
        rows, columns = values.shape
        figure = new_figure(2.6 + 1.15 * columns, 1.7 + 0.75 * rows)
        axes = figure.subplots()
        image = axes.imshow(above, cmap="RdBu_r", norm=TwoSlopeNorm(0, -most, most), aspect="auto")
        for t in range(rows):
            for p in range(columns):
                dark = abs(above[t, p]) > 0.6 * most
                own_cell = p < columns - 1 and self.prefixes[p] == self.tasks[t]
                axes.text(
                    p, t, f"{values[t, p]:.2f}", ha="center", va="center", color="white" if dark else "black",
                    fontweight="bold" if own_cell else "normal",
                )  # fmt: skip
                if own_cell:
                    frame = Rectangle((p - 0.47, t - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=2)
                    axes.add_patch(frame)
        axes.axvline(columns - 1.5, color="white", linewidth=4)
        axes.set_xticks(range(columns), [*self.prefixes, f"{BASE}\n(base model)"])
        axes.set_yticks(range(rows), self.tasks)
        axes.set_xlabel("under the prefix of")
        axes.set_ylabel("held-out examples of")
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label="nats a token over the own prefix")
        return save_figure(figure, path)

    def _row(self, task: str) -> list[float]:
        if task not in self.tasks:
            raise ConfigError(f"no task is named {task!r}; there are: {', '.join(self.tasks)}")
        return self.losses[self.tasks.index(task)]

    def _apart(self, t: int, p: int) -> str:
        """How far a loss is from the task's own, and the standard error of that."""
        own, error = self.own(self.tasks[t]), self.errors[t][p]
        said = f"±{error:.3f}" if error is not None else "±?"
        return said if own is None else f"{self.losses[t][p] - own:+.3f} {said}"


def measure_interference(
    model: PreTrainedModel,
    data: Mapping[str, Rows],
    prefixes: Mapping[str, Prefix],
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    *,
    batch_size: int = 16,
    example_inputs: Mapping[str, Any] | None = None,
    done: Callable[[int], None] | None = None,
) -> Interference:
    """Read each task's held-out examples under each prefix and under none.

    Args:
        model: the base model with nothing attached; it is left as it was.
        data: by task, encoded examples (``foreword.data.encode``) that no prefix was trained on.
        prefixes: by name; that of a task is the one of its name.
        collate: makes a batch of examples (``foreword.data.Collator``), with ``labels``.
        batch_size: examples in a forward pass.
        done: told after each pass how many examples it had (there are ``(prefixes + 1) * examples`` in all).

    Raises:
        ConfigError: there is no task or no prefix, or a prefix can't be held beside others.
        DataError: a task has no example, or none with a supervised token.
        MismatchError: a prefix belongs to another model.
        AttachError: something is attached to the model.
    """
    if not data or not prefixes:
        raise ConfigError("interference is measured between tasks; give one or more with held-out data, and a prefix")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; expected 1 or more")
    if empty := [task for task, rows in data.items() if not len(rows)]:
        raise DataError(f"the task {empty[0]!r} has no examples to measure on; give it some, or leave it out")
    from ..losses import example_losses, supervised_tokens
    from ..serve.library import Library

    tokens = {t: supervised_tokens(rows, seq2seq=bool(model.config.is_encoder_decoder)) for t, rows in data.items()}
    if silent := [task for task, counts in tokens.items() if not sum(counts)]:
        raise DataError(f"no example of the task {silent[0]!r} has a token with a loss; look at its outputs")

    def plain(examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return collate([{k: v for k, v in e.items() if k != "task"} for e in examples])  # the library has the prefixes

    library = Library(model, example_inputs=example_inputs)
    found: dict[str, list[list[float]]] = {task: [] for task in data}
    try:
        for name, prefix in prefixes.items():
            library.add(name, prefix)
        for task, rows in data.items():
            for under in (*prefixes, None):
                with library.use(under):
                    found[task].append(example_losses(model, rows, plain, batch_size=batch_size, done=done))
    finally:
        library.detach()
    return _compared(found, tokens, list(prefixes))


def _compared(
    found: Mapping[str, list[list[float]]], tokens: Mapping[str, list[int]], prefixes: list[str]
) -> Interference:
    """From each task's losses by example, under each prefix and under none, to the matrix."""
    from ..losses import difference

    losses, base, errors = [], [], []
    for task, columns in found.items():
        *means, none = (math.fsum(c) / sum(tokens[task]) for c in columns)
        own = columns[prefixes.index(task)] if task in prefixes else [0.0] * len(tokens[task])
        apart = [difference(column, own, tokens[task])[1] for column in columns[:-1]]
        losses.append(means)
        base.append(none)
        errors.append([error if math.isfinite(error) else None for error in apart])
    examples = [len(counts) for counts in tokens.values()]
    return Interference(list(found), prefixes, losses, base, errors, examples, [sum(t) for t in tokens.values()])
