"""From the options about several tasks to their data, for the commands that train or measure them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreword.cli._data import Examples, Source
from foreword.cli._shared import pairs
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.data import EncodedDataset

Encoded = tuple["dict[str, EncodedDataset]", "dict[str, EncodedDataset]"]


@dataclass(frozen=True)
class TaskSources:
    """What the options say of each task's data."""

    sources: Mapping[str, Source]

    @classmethod
    def of(
        cls,
        tasks: Sequence[str],
        valid_tasks: Sequence[str] = (),
        *,
        column: Sequence[str] = (),
        where: Sequence[str] = (),
        **shared: Any,
    ) -> TaskSources:
        """From ``NAME=FILE`` options.

        ``--column`` and ``--where`` are for all tasks, or for one: ``NAME:label=1``.

        Args:
            shared: the fields of :class:`Source` that all tasks have alike.

        Raises:
            ConfigError: an option is malformed, names a task twice, or one that there is not.
        """
        named, valid = pairs(tasks, "--task"), pairs(valid_tasks, "--valid-task")
        if unknown := [name for name in valid if name not in named]:
            raise ConfigError(f"--valid-task names {unknown[0]!r}, and --task does not; there are: {', '.join(named)}")
        if missing := [name for name in named if valid and name not in valid]:
            raise ConfigError(
                f"--valid-task is missing for {missing[0]!r}; give every task validation examples, or none"
            )
        return cls({
            name: Source(
                data=data, valid=valid.get(name), label=name, column=own(column, name, named), where=own(where, name, named), **shared
            )
            for name, data in named.items()
        })  # fmt: skip

    def read(self) -> dict[str, Examples]:
        """Training examples by task, and validation examples where there are any."""
        return {name: source.read() for name, source in self.sources.items()}

    def encode(
        self, examples: Mapping[str, Examples], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> Encoded:
        """The same as token ids; the second is empty without validation examples."""
        train, valid = {}, {}
        for name, source in self.sources.items():
            train[name], held_out = source.encode(examples[name], tokenizer, model)
            if held_out is not None:
                valid[name] = held_out
        return train, valid


def own(options: Sequence[str], task: str, tasks: Mapping[str, str]) -> list[str]:
    """The options that are for all tasks or for this one, without its name."""
    found = []
    for option in options:
        name, colon, rest = option.partition(":")
        if not colon or name not in tasks:
            found.append(option)
        elif name == task:
            found.append(rest)
    return found
