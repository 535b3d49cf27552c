"""What each task's prefix does to the others: the loss of every task under every prefix, and under none.

One model, the prefixes in a ``Library``, each batch of held-out examples read once under each of them. Rows of a batch
share a prefix, so it is one tensor for all of them; to mix prefixes within a batch would make copies and save nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._figures import new_figure, save_figure
from ..errors import ConfigError, DataError
from .perplexity import eval_mode

if TYPE_CHECKING:
    import torch
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
    from ..serve.library import Library

    names: list[str | None] = [*prefixes, None]
    library = Library(model, example_inputs=example_inputs)
    try:
        for name, prefix in prefixes.items():
            library.add(name, prefix)
        with eval_mode(model):
            found = {
                task: _losses(model, library, names, rows, collate, batch_size, done) for task, rows in data.items()
            }
    finally:
        library.detach()
    return _summed(found, list(prefixes))


def _losses(
    model: PreTrainedModel,
    library: Any,
    names: Sequence[str | None],
    rows: Rows,
    collate: Callable[..., Mapping[str, Any]],
    batch_size: int,
    done: Callable[[int], None] | None,
) -> torch.Tensor:
    """Of each example: losses summed over its tokens under each prefix, and its tokens: ``(examples, names + 1)``."""
    import torch

    # Examples of like length share a batch, so that little is computed on padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    embedding: Any = model.get_input_embeddings().weight
    device = embedding.device
    result = torch.zeros(len(rows), len(names) + 1, dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        examples = [{k: v for k, v in rows[i].items() if k != "task"} for i in places]
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collate(examples).items()}
        for column, name in enumerate(names):
            with torch.no_grad(), library.use(name):
                logits = model(**batch).logits
            result[places, column], result[places, -1] = _summed_nll(logits, batch["labels"], model)
            if done is not None:
                done(len(places))
    return result


def _summed_nll(
    logits: torch.Tensor, labels: torch.Tensor, model: PreTrainedModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's negative log-likelihood, summed over its supervised tokens, and how many there are: ``(B,)`` twice.

    Row by row, because the 32-bit log-probabilities of a whole batch would be the largest tensor of all.
    """
    import torch

    shift = 0 if model.config.is_encoder_decoder else 1
    sums, counts = [], []
    for row, targets in zip(logits, labels, strict=True):
        row, targets = row[: len(row) - shift].float(), targets[shift:].to(row.device)
        sums.append(torch.nn.functional.cross_entropy(row, targets, ignore_index=-100, reduction="sum"))
        counts.append((targets != -100).sum())
    return torch.stack(sums).double().cpu(), torch.stack(counts).double().cpu()


def _summed(found: Mapping[str, torch.Tensor], prefixes: list[str]) -> Interference:
    losses, base, examples, tokens = [], [], [], []
    errors: list[list[float | None]] = []
    for task, each in found.items():
        sums, counts = each[:, :-1], each[:, -1]
        total = float(counts.sum())
        if not total:
            raise DataError(f"no example of the task {task!r} has a token with a loss; look at its outputs")
        means = sums.sum(0) / total
        own = sums[:, [prefixes.index(task)]] if task in prefixes else 0.0
        apart = sums[:, :-1] - own
        # A ratio of sums over examples: its error is that of the mean of what each adds to it.
        rest = apart - apart.sum(0) / total * counts[:, None]
        n = len(each)
        error = (rest.square().sum(0) * n / max(1, n - 1)).sqrt() / total
        losses.append(means[:-1].tolist())
        base.append(float(means[-1]))
        errors.append(error.tolist() if n > 1 else [None] * len(prefixes))
        examples.append(n)
        tokens.append(int(total))
    return Interference(list(found), prefixes, losses, base, errors, examples, tokens)
