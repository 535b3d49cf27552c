"""Where a comparison is kept: what it compares, and a folder for each finished run.

A run's folder gets its name when the run is finished, so what is there is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword._begun import require, write_whole
from foreword._locked import locked
from foreword.errors import ConfigError, DataError
from foreword.evaluate.run import changed

COMPARISON, RUNS, LOCK, RESULT = "comparison.json", "runs", ".lock", "result.json"
_WORK = ".work-"


@dataclass(frozen=True)
class Folder:
    """A comparison's folder."""

    path: Path

    def require(self, *, resume: bool) -> bool:
        """Whether it holds a comparison already, to be gone on with.

        Raises:
            ConfigError: it holds one and ``resume`` was not asked for, or none and it was; or it holds other things.
        """
        more = "go on with it, or add lines to it (--resume)"
        return require(self.path, COMPARISON, "a comparison", resume=resume, more=more, besides=LOCK)

    def begin(self, facts: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool) -> None:
        """Write down what is compared, or make sure that it is what was compared before.

        Args:
            facts: what all its runs have in common.
            about: what may be another the next time.

        Raises:
            ConfigError: the folder holds a comparison of something else; the message says how it differs.
        """
        if self.require(resume=resume):
            earlier = self._read(self.path / COMPARISON).get("facts")
            if how := changed(earlier, json.loads(json.dumps(facts))):
                raise ConfigError(
                    f"--resume: {self.path} compares under other conditions: {how}; only runs under the same can be "
                    "compared: give what it was begun with, or another --out"
                )
        write_whole(self.path / COMPARISON, json.dumps({"facts": facts, **about}, ensure_ascii=False, indent=1) + "\n")
        for left in self.path.glob(f"{_WORK}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process works on a folder at a time.

        Raises:
            ConfigError: another one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        taken = f"another process is at work on {self.path}; wait for it, or give another --out"
        with locked(self.path / LOCK, taken):
            yield

    def finished(self) -> dict[str, dict[str, Any]]:
        """The results of finished runs by key.

        Raises:
            DataError: one cannot be read.
        """
        folders = sorted((self.path / RUNS).glob("*")) if (self.path / RUNS).is_dir() else []
        return {f.name: self._read(f / RESULT) for f in folders if (f / RESULT).is_file()}

    def work(self, key: str) -> Path:
        """Where a run may write until it is finished."""
        return self.path / f"{_WORK}{key}"

    def finish(self, key: str) -> None:
        """A run is finished: what it wrote gets its name."""
        (self.path / RUNS).mkdir(exist_ok=True)
        self.work(key).rename(self.path / RUNS / key)

    def drop(self, key: str) -> None:
        """A run came to nothing."""
        shutil.rmtree(self.work(key), ignore_errors=True)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise DataError(
                f"{path} cannot be read: {exc}; remove its folder and --resume, or give another --out"
            ) from exc
        if not isinstance(found, dict):
            raise DataError(f"{path} holds no record; remove its folder and --resume, or give another --out")
        return found
