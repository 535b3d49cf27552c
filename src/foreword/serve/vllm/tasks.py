"""The API server's half: which tasks there are, looked up in the folder when they are asked for.

A folder that is put in place, replaced or taken away counts from the next request on; nothing is restarted.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword._prefix_file import DESCRIPTION, WEIGHTS
from foreword.errors import ForewordError, MismatchError
from foreword.serve.shelf import Shelf
from foreword.serve.vllm.checkpoint import Checkpoint
from foreword.serve.vllm.rows import Shape, check_fits, check_servable
from foreword.serve.vllm.salt import Salt

_Version = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A prefix that can be asked for.

    Attributes:
        placeholder: the token id that stands where its virtual tokens go.
    """

    salt: Salt
    placeholder: int

    @property
    def name(self) -> str:
        return self.salt.name

    @property
    def length(self) -> int:
        return self.salt.length

    def prompt(self, ids: Sequence[int], salt: str | None = None) -> dict[str, Any]:
        """A prompt for ``vllm.LLM.generate``.

        Args:
            ids: of the text, as the model's tokenizer gives them; at least one.
            salt: to part its cached blocks from those of others.
        """
        return {"prompt_token_ids": self.before(ids), "cache_salt": str(self.salt.of_client(salt))}

    def before(self, ids: Sequence[int]) -> list[int]:
        """The placeholders and a text."""
        return [self.placeholder] * self.length + list(ids)


class Tasks:
    """The prefixes of a folder that vLLM can serve with one model.

    Args:
        placeholder: see :class:`Task`.
        shape: of the model; None: it is not compared.
        checkpoint: of the model; None: its weights are not compared.
    """

    def __init__(
        self, folder: str | Path, placeholder: int, *, shape: Shape | None = None, checkpoint: Checkpoint | None = None
    ) -> None:
        self.shelf = Shelf(folder)
        self._placeholder, self._shape, self._checkpoint = placeholder, shape, checkpoint
        self._known: dict[str, tuple[_Version, Task]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """What lies in the folder. Whether it can be served is seen when it is asked for."""
        return self.shelf.names()

    def get(self, name: str) -> Task:
        """A task. Its files are read if they are new or have changed.

        Raises:
            NoPrefixError: there is no such prefix.
            MismatchError: it is of another model, or vLLM can't serve it.
            PrefixFileError: its files are damaged.
            ConfigError: the name is none, or too long for vLLM.
        """
        version = self._version(name)
        known = self._known.get(name)
        if known is not None and known[0] == version:
            return known[1]
        with self._lock:  # one reader at a time: the others find what it found
            known = self._known.get(name)
            if known is not None and known[0] == version:
                return known[1]
            task = self._read(name)
            if self._version(name) == version:  # else it was replaced meanwhile, and the next request looks again
                self._known[name] = (version, task)
            return task

    def _version(self, name: str) -> _Version:
        folder = self.shelf.path(name)
        found = ((folder / part).stat() for part in (DESCRIPTION, WEIGHTS))
        return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in found)

    def _read(self, name: str) -> Task:
        prefix, digest = self.shelf.read(name)
        try:
            length = check_servable(prefix)
            if self._shape is not None:
                check_fits(prefix, self._shape)
            if self._checkpoint is not None and (what := self._checkpoint.difference(prefix.fingerprint)):
                raise MismatchError(
                    f"it was made on other weights ({prefix.fingerprint.base_model or 'unnamed'}): {what}"
                )
        except ForewordError as exc:
            raise MismatchError(f"{name!r} can't be served here: {exc}") from exc
        return Task(Salt(name, digest, length), self._placeholder)
