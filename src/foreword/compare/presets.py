"""Comparisons that the literature shows, as lines to run: what is varied, and what is held."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foreword.compare.rows import USUAL, Row, make_rows
from foreword.compare.tasks import TaskData
from foreword.config import PrefixConfig
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.compare.settings import Keep

Lines = Callable[[TaskData, Sequence[str], Sequence[int], int], list[Row]]


@dataclass(frozen=True)
class Preset:
    """A comparison by name.

    Attributes:
        what: in a line.
        make: the lines, from the task, the methods and lengths asked for, and the number of layers.
        task: where none is given.
        methods, lengths: where none are given; empty: the preset does not ask for them.
        keep: which state of a run is tested, as for :class:`Settings`.
    """

    what: str
    make: Lines
    task: str = "reviews"
    methods: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (20,)
    keep: Keep = "last"


def _own(method: str, task: TaskData, size: int, lengths: Sequence[int], **config: object) -> Row:
    """A prefix with other options, as a method of its own; the line says its length where there are several."""
    made = PrefixConfig(**{"length": size, "init": task.init, "repeat": True, **config})  # type: ignore[arg-type]
    return Row(method if len(lengths) == 1 else f"{method}, {size}", (made,), method, size)


def _length(task: TaskData, methods: Sequence[str], lengths: Sequence[int], layers: int) -> list[Row]:
    return make_rows(methods, lengths, task)


def _reparameterisation(task: TaskData, methods: Sequence[str], lengths: Sequence[int], layers: int) -> list[Row]:
    found = []
    for n in lengths:
        found += [_own("direct, from text", task, n, lengths)]
        found += [_own("direct, random", task, n, lengths, init="random")]
        for depth in (1, 2, 3):
            method = f"MLP of {depth} layer{'s' if depth > 1 else ''}, random"
            found.append(_own(method, task, n, lengths, init="random", reparam="mlp", depth=depth))
    return found


def _placement(task: TaskData, methods: Sequence[str], lengths: Sequence[int], layers: int) -> list[Row]:
    return make_rows(("prefix", "infix", "prompt"), lengths, task)


def _layers(task: TaskData, methods: Sequence[str], lengths: Sequence[int], layers: int) -> list[Row]:
    quarter, half = max(1, layers // 4), max(1, layers // 2)
    places: dict[str, str | list[str | int] | None] = {
        "all layers": None,
        f"first {half}": f"first:{half}",
        f"last {half}": f"last:{half}",
        f"first {quarter}": f"first:{quarter}",
        f"last {quarter}": f"last:{quarter}",
        "every second": "every:2",
    }
    return [_own(label, task, n, lengths, sites=sites) for n in lengths for label, sites in places.items()]


def _initialisation(task: TaskData, methods: Sequence[str], lengths: Sequence[int], layers: int) -> list[Row]:
    if not task.words:
        raise ConfigError(
            f"preset initialisation compares words about the task with others, and task {task.name} names none; add "
            "words: to its file"
        )
    starts = {
        "random": "random",
        "unrelated words": f"words:{task.unrelated}",
        "task words": f"words:{task.words}",
        "text": task.init,
    }
    return [_own(label, task, n, lengths, init=init) for n in lengths for label, init in starts.items()]


def _low_data(task: TaskData, methods: Sequence[str], lengths: Sequence[int], layers: int) -> list[Row]:
    sizes = [n for n in (50, 100, 200, 500) if n <= len(task.train)]
    if not sizes:
        raise ConfigError(f"preset low-data trains on 50 examples and more, and task {task.name} has {len(task.train)}")
    rows = make_rows(methods, lengths, task)
    return [replace(row, label=f"{row.label}, {n} examples", examples=n) for n in sizes for row in rows]


PRESETS: Mapping[str, Preset] = {
    "length": Preset(
        "10, 20, 50 and 100 virtual tokens against full fine-tuning", _length, "sentiment", ("prefix", "full"),
        (10, 20, 50, 100),
    ),
    "reparameterisation": Preset("no MLP, and MLPs of 1, 2 and 3 layers", _reparameterisation),
    "placement": Preset("before the input, between input and output, at the embeddings only", _placement),
    "layers": Preset("which layers carry it", _layers),
    "initialisation": Preset("random, unrelated words, words about the task, a text", _initialisation),
    "low-data": Preset(
        "50, 100, 200 and 500 examples, drawn anew for each seed", _low_data, methods=("prefix", "lora", "full"),
        keep="best",
    ),
    "extrapolation": Preset(
        "tested on what was not trained on: another source of reviews, or tables with a slot that was left out",
        _length, methods=("prefix", "memory", "lora", "full"),
    ),
    "methods": Preset("all methods", _length, methods=USUAL),
}  # fmt: skip


def known_preset(name: str) -> Preset:
    """The preset of a name. Raises ConfigError with the nearest names for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
    raise ConfigError(f"no preset is called {name!r}; {hint}")


def preset_rows(
    name: str, task: TaskData, *, methods: Sequence[str] = (), lengths: Sequence[int] = (), layers: int = 12
) -> list[Row]:
    """The lines of a preset.

    Args:
        methods, lengths: instead of the preset's own.
        layers: of the model.

    Raises:
        ConfigError: the task does not have what the preset needs.
    """
    preset = known_preset(name)
    return preset.make(task, methods or preset.methods, lengths or preset.lengths, layers)
