"""The lines of a comparison: which methods there are, and each one's configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from foreword.config import PrefixConfig
from foreword.errors import ConfigError
from foreword.methods import (
    AdapterConfig,
    BitFitConfig,
    Config,
    FullConfig,
    LoRAConfig,
    MemoryConfig,
    PromptConfig,
    usual_learning_rate,
)

if TYPE_CHECKING:
    from foreword.compare.tasks import TaskData

Made = Callable[[Any, "TaskData"], list[Config]]


@dataclass(frozen=True)
class Method:
    """A method that a comparison knows by name.

    Attributes:
        what: in a line.
        make: its configurations, from a size and the task.
        size: what its size is called: ``length`` (all lengths are tried), ``rank``, ``width``; None: it has none.
        usual: the size where none is given (of a method with lengths: those asked for).
    """

    what: str
    make: Made
    size: str | None = "length"
    usual: int | None = None


def _prefix(size: Any, task: TaskData, **more: Any) -> PrefixConfig:
    return PrefixConfig(**{"length": size, "init": task.init, "repeat": True, **more})


METHODS: Mapping[str, Method] = {
    "prefix": Method("keys and values at every layer, from the task's text", lambda n, t: [_prefix(n, t)]),
    "prefix-random": Method("the same from random numbers", lambda n, t: [_prefix(n, t, init="random")]),
    "prefix-mlp": Method(
        "from random numbers, made by an MLP of 2 layers and width 512, as in the paper",
        lambda n, t: [_prefix(n, t, init="random", reparam="mlp")],
    ),
    "prefix-low-rank": Method(
        "a change of rank 8 from the task's text", lambda n, t: [_prefix(n, t, reparam="low-rank")]
    ),
    "prefix-gate": Method("prefix with a learned weight per head", lambda n, t: [_prefix(n, t, gate="head")]),
    "infix": Method("seen by the output only", lambda n, t: [_prefix(n, t, visible="infix:1")]),
    "prompt": Method(
        "at the input embeddings only", lambda n, t: [PromptConfig(length=n, init=t.init, repeat=True)]
    ),
    "memory": Method(
        "PrefixMemory-Tuning beside the attention", lambda n, t: [MemoryConfig(rank=n)], "rank"
    ),
    "lora": Method("LoRA on the query and value layers", lambda n, t: [LoRAConfig(rank=n, alpha=2 * n)], "rank", 8),
    "adapter": Method("bottlenecks in every sublayer", lambda n, t: [AdapterConfig(width=n)], "width", 32),
    "bitfit": Method(
        "biases, added where the model has none", lambda n, t: [BitFitConfig(missing="add")], None
    ),
    "full": Method("full fine-tuning", lambda n, t: [FullConfig()], None),
    "prefix+memory": Method(
        "a prefix and a memory of rank 4", lambda n, t: [_prefix(n, t), MemoryConfig(rank=4)]
    ),
    "prefix+lora": Method("a prefix and LoRA of rank 8", lambda n, t: [_prefix(n, t), LoRAConfig()]),
}  # fmt: skip
USUAL = ("prefix", "prefix-mlp", "infix", "prompt", "memory", "lora", "adapter", "bitfit", "full")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: what it is called; no two lines of a comparison have the same.
        configs: what is attached, at the usual learning rates.
        method: the line's family, which plots draw as one.
        length: virtual tokens, where it has them.
        examples: train on so many examples only, drawn anew for each seed.
    """

    label: str
    configs: tuple[Config, ...]
    method: str
    length: int | None = None
    examples: int | None = None

    def at(self, factor: float, seed: int) -> list[Config]:
        """The configurations with learning rates and the seed of their start."""
        found: list[Config] = []
        for config in self.configs:
            changes: dict[str, Any] = {"learning_rate": _rounded(usual_learning_rate(config) * factor)}
            if any(f.name == "seed" for f in fields(config)):
                changes["seed"] = seed
            found.append(replace(config, **changes))
        return found

    def rates(self, factor: float) -> list[float]:
        """The learning rate of each configuration."""
        return [_rounded(usual_learning_rate(config) * factor) for config in self.configs]

    def to_json(self) -> dict[str, Any]:
        """What makes it what it is; the label does not."""
        return {"configs": [c.to_json() for c in self.configs], "examples": self.examples}


def make_rows(names: Sequence[str], lengths: Sequence[int], task: TaskData) -> list[Row]:
    """A line for each method, and for each length where a method has one.

    Args:
        names: of :data:`METHODS`; ``"lora:4"`` gives the size itself.

    Raises:
        ConfigError: a name is unknown, or a size is not one.
    """
    if not names:
        raise ConfigError(f"no method was named; there are {', '.join(METHODS)}")
    if wrong := [n for n in lengths if n < 1]:
        raise ConfigError(f"a length of {wrong[0]}; expected 1 or more virtual tokens")
    rows: list[Row] = []
    for given in names:
        name, colon, size = given.strip().partition(":")
        method = known(name)
        if colon and (method.size is None or not size.isdigit() or int(size) < 1):
            expected = f"{name}:N with N its {method.size}, 1 or more" if method.size else f"{name} has no size"
            raise ConfigError(f"the method {given!r}; expected {expected}")
        sizes: Sequence[int | None] = [int(size)] if colon else lengths if method.size == "length" else [method.usual]
        rows += [row_of(name, n, task) for n in sizes]
    return list({row.label: row for row in rows}.values())


def row_of(name: str, size: int | None, task: TaskData) -> Row:
    """The line of a method at a size."""
    method = known(name)
    label = name if size is None else f"{name} {size}"
    return Row(label, tuple(method.make(size, task)), name, size if method.size == "length" else None)


def known(name: str) -> Method:
    """The method of a name. Raises ConfigError with the nearest names for an unknown one."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(METHODS)}"
    raise ConfigError(f"no method is called {name!r}; {hint}")


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
