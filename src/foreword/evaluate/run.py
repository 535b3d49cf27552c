"""A folder for an evaluation: what was written for each example, and what it scored.

``run.json`` says what is being run; ``writing.jsonl`` grows by a line a batch and goes to ``predictions.jsonl`` at the
end; ``metrics.json`` comes last. A killed run goes on with the batches that are missing: which inputs share a batch,
and the seed that it draws from, depend on the run alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword._begun import require
from foreword.errors import ConfigError, DataError
from foreword.evaluate.examples import Task, difference, read_predictions
from foreword.evaluate.metrics import METRICS, Score
from foreword.evaluate.predict import Batch, Decoding, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.evaluate.bootstrap import Difference

RUN, WRITING, PREDICTIONS, METRICS_FILE = "run.json", "writing.jsonl", "predictions.jsonl", "metrics.json"


@dataclass(frozen=True)
class Folder:
    """Where a run is kept."""

    path: Path

    def require(self, *, resume: bool) -> bool:
        """Whether it holds a run already, to be gone on with.

        Raises:
            ConfigError: it holds one and ``resume`` was not asked for, or none and it was; or it holds other things.
        """
        more = "pass --resume to go on with it (or to score it again)"
        return require(self.path, RUN, "an evaluation", resume=resume, more=more)

    def begin(self, run: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, or go on in it.

        Raises:
            ConfigError: as :meth:`require`; or it holds another run than this one.
        """
        if not self.require(resume=resume):
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(RUN, _line(run, indent=1) + "\n")
            return
        earlier = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        if how := changed(earlier, json.loads(_line(run))):
            raise ConfigError(f"--resume: {self.path} holds another evaluation: {how}; give another --out")

    def written(self, tasks: Sequence[Task]) -> list[str] | None:
        """The predictions of a run that has written all of them, else None."""
        if not (self.path / PREDICTIONS).exists():
            return None
        texts, keys = read_predictions(self.path / PREDICTIONS)
        if keys is None or (how := difference([t.key for t in tasks], keys)) is not None:
            raise DataError(f"{self.path / PREDICTIONS} was changed: {how or 'keys are missing'}; give another --out")
        return texts

    def done(self) -> dict[int, Batch]:
        """The batches that were written so far."""
        path, found = self.path / WRITING, {}
        for line in filter(None, path.read_bytes().split(b"\n") if path.exists() else []):
            try:
                record = json.loads(line)
            except ValueError:  # also where it ends within a character
                break  # the line that was being written when the run was killed
            found[record["batch"]] = Batch(record["batch"], tuple(record["rows"]), tuple(record["texts"]))
        return found

    def keep(self, done: Iterable[Batch]) -> Callable[[Batch], None]:
        """Start the file of batches again from those that are whole; gives what adds one to it, onto the disk."""
        path = self.path / WRITING
        self._write(WRITING, "".join(_line(_batch(b)) + "\n" for b in done))

        def add(batch: Batch) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(_batch(batch)) + "\n")
                file.flush()
                os.fsync(file.fileno())

        return add

    def finish(self, tasks: Sequence[Task], texts: Sequence[str]) -> None:
        """Write the predictions in the examples' order."""
        lines = (
            _line({"index": i, "key": task.key, "input": task.input, "prediction": text})
            for i, (task, text) in enumerate(zip(tasks, texts, strict=True))
        )
        self._write(PREDICTIONS, "".join(line + "\n" for line in lines))
        (self.path / WRITING).unlink(missing_ok=True)

    def score(self, record: Mapping[str, Any]) -> None:
        """Write the scores."""
        self._write(METRICS_FILE, _line(record, indent=1) + "\n")

    def _write(self, name: str, content: str) -> None:
        temporary = self.path / f".{name}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    settings: Decoding,
    *,
    batch_size: int = 8,
    folder: Folder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's output for each example, each batch kept in the folder as it is done; what is there is not redone."""
    done = folder.done() if folder is not None else {}
    add = folder.keep(done.values()) if folder is not None else None
    texts = [""] * len(tasks)
    count = 0

    def take(batch: Batch) -> None:
        nonlocal count
        for row, text in zip(batch.rows, batch.texts, strict=True):
            texts[row] = text
        count += len(batch.rows)
        if progress is not None:
            progress(count, len(tasks))

    for batch in done.values():
        take(batch)
    prompts = [t.prompt for t in tasks]
    for batch in batches(model, tokenizer, prompts, settings=settings, batch_size=batch_size, skip=done):
        if add is not None:
            add(batch)
        take(batch)
    if folder is not None:
        folder.finish(tasks, texts)
    return texts


def against(other: Path, tasks: Sequence[Task]) -> list[str]:
    """The predictions of another run on the same examples.

    Raises:
        ConfigError: the folder holds no finished evaluation, or one on other examples; the message says how they
            differ.
    """
    path = other / PREDICTIONS
    if not path.exists():
        raise ConfigError(f"--against {other}: it has no {PREDICTIONS}; give the --out of a finished evaluation")
    texts, keys = read_predictions(path)
    if keys is None:
        raise ConfigError(f"--against {other}: {PREDICTIONS} does not say which examples it is about")
    how = difference([t.key for t in tasks], keys)
    if how is not None:
        raise ConfigError(f"--against {other}: the two runs saw different data: {how}. Score both on the same examples")
    return texts


def record_of(scores: Mapping[str, Score], differences: Mapping[str, Difference] | None = None) -> dict[str, Any]:
    """Scores for JSON: with units, which way is better, and the differences to another run."""
    found: dict[str, Any] = {}
    for name, score in scores.items():
        metric = METRICS[name]
        found[name] = {"value": score.value, "low": score.low, "high": score.high, "unit": metric.unit,
                       "higher_is_better": metric.higher, "note": score.note}  # fmt: skip
        if differences and name in differences:
            found[name]["against"] = asdict(differences[name])
    return found


def finite(value: Any) -> Any:
    """The same without numbers that JSON does not have: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def _line(record: Any, indent: int | None = None) -> str:
    return json.dumps(finite(record), ensure_ascii=False, indent=indent)


def _batch(batch: Batch) -> dict[str, Any]:
    return {"batch": batch.number, "rows": batch.rows, "texts": batch.texts}


def changed(there: Any, here: Any, name: str = "") -> str | None:
    """The first thing that two runs' records have otherwise, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            if found := changed(there.get(key), here.get(key), f"{name}.{key}" if name else key):
                return found
        return None
    return None if there == here else f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
