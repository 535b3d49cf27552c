"""A search that is kept: Optuna's study in a journal that survives kills and that several processes may share.

A process is alive while it holds the lock on a file of its own, which the system takes away from a killed one. So the
trials of a killed process are known for what they are, also by another that is still at work on the same study.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError, MissingPartError

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as exc:
    raise MissingPartError("searching needs Optuna: pip install 'foreword[tune]'") from exc
try:
    import fcntl
except ImportError as exc:
    raise MissingPartError("a search is kept with POSIX file locks, which this system doesn't have") from exc

JOURNAL, _LOCK, _WORKER = "study.journal", ".lock", ".worker-"
_NAME = "foreword"
_RANDOM_FIRST = 5  # trials before the sampler and the pruner have seen enough to go by
_PRUNE_AFTER = 3


class FileLock:
    """An advisory lock that ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def acquire(self, *, wait: bool = True) -> bool:
        file = self.path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except BaseException:
            file.close()
            raise
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class JournalLock(FileLock):
    """The journal's own, which takes off the half line that a kill may have left at its end.

    Written after a half line, the next record would be a part of it, and the journal unreadable from there on.
    """

    def acquire(self, *, wait: bool = True) -> bool:
        super().acquire()
        with self.path.open("rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True


class Study:
    """A study in a folder.

    Attributes:
        work: a folder for what this process needs while it is at work; removed by :meth:`close`.
    """

    def __init__(self, folder: Path, search: Mapping[str, Any], resume: bool) -> None:
        check_folder(folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lock = FileLock(folder / _LOCK)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.lock:
            _clear_dead(folder)
            self.optuna = _opened(folder / JOURNAL)
            self._check_search(search, resume)
            if "search" not in self.optuna.user_attrs:
                self.optuna.set_user_attr("search", dict(search))
            self._fail_dead()
            self.work = folder / f"{_WORKER}{uuid.uuid4().hex[:8]}"
            self.work.mkdir()
            self._alive = FileLock(self.work / "lock")
            self._alive.acquire()
        prunes = optuna.pruners.MedianPruner(n_startup_trials=_PRUNE_AFTER, n_warmup_steps=0)
        self.optuna.pruner = prunes if search["prune"] else optuna.pruners.NopPruner()

    def trials(self) -> list[FrozenTrial]:
        """All that were begun, in order."""
        return [t for t in self.optuna.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def counted(self) -> list[FrozenTrial]:
        """Those that use up the budget: not the ones that were broken off."""
        return [t for t in self.trials() if t.state != TrialState.FAIL]

    def begin(self, seed: int, first: Mapping[str, Any] | None, wanted: Callable[[], bool]) -> Trial | None:
        """A new trial, nothing drawn for it yet; None where no further one is wanted.

        Each draw has a seed of its own, by how many trials there are: a search that was broken off draws what it
        would have drawn.

        Args:
            first: the parameters of the study's first trial, where they are a point of the search space.
        """
        with self.lock:
            if not wanted():
                return None
            known = len(self.counted())
            self.optuna.sampler = optuna.samplers.TPESampler(
                seed=(seed * 1_000_003 + known) % 2**32, n_startup_trials=_RANDOM_FIRST, multivariate=False
            )
            waiting = self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if known == 0 and first is not None and not waiting:
                self.optuna.enqueue_trial(dict(first))
            trial = self.optuna.ask()
            trial.set_user_attr("worker", self.work.name)
            trial.set_user_attr("default", known == 0)
            return trial

    def end(self, trial: Trial, state: str, value: float | None = None) -> None:
        """Say how a trial ended: ``"complete"`` with its value, ``"pruned"`` or ``"fail"``."""
        with self.lock:
            self.optuna.tell(trial, value, state=TrialState[state.upper()])

    def close(self) -> None:
        """This process works on the study no more."""
        self._alive.release()
        shutil.rmtree(self.work, ignore_errors=True)

    def _check_search(self, search: Mapping[str, Any], resume: bool) -> None:
        known = self.optuna.user_attrs.get("search")
        if known is None:
            return
        if not resume:
            raise ConfigError(f"{self.folder} holds a search already; go on with it (--resume), or give another --out")
        for name in search:
            if known.get(name) != search[name]:
                raise ConfigError(
                    f"{self.folder} holds another search: {name} was {_short(known.get(name))} there and is "
                    f"{_short(search[name])} here; give what it was begun with, or another --out"
                )

    def _fail_dead(self) -> None:
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if worker is None or not (self.folder / worker).exists():
                self.optuna.tell(trial.number, state=TrialState.FAIL)


def check_folder(folder: Path, resume: bool) -> None:
    """Raise ConfigError unless a search can be begun in the folder, or gone on with."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the name of a folder for the search")
    begun = (folder / JOURNAL).exists()
    if resume and not begun:
        raise ConfigError(f"--resume: {folder} holds no search; leave --resume out to begin one")
    strange = [p.name for p in folder.iterdir() if p.name != _LOCK] if folder.is_dir() and not begun else []
    if strange:
        raise ConfigError(f"{folder} holds {sorted(strange)[0]}, which is not of a search; choose another --out")


def _opened(journal: Path) -> optuna.Study:
    journal.touch()
    backend = JournalFileBackend(str(journal), lock_obj=JournalLock(journal))  # type: ignore[arg-type]
    storage = JournalStorage(backend)
    try:
        return optuna.load_study(study_name=_NAME, storage=storage)
    except KeyError:
        return optuna.create_study(study_name=_NAME, storage=storage, direction="minimize")


def _clear_dead(folder: Path) -> None:
    """Remove what killed processes left."""
    for work in folder.glob(f"{_WORKER}*"):
        lock = FileLock(work / "lock")
        if lock.acquire(wait=False):
            lock.release()
            shutil.rmtree(work, ignore_errors=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
