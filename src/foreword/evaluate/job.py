"""One evaluation from examples to scores: what `foreword eval` does.

What can be wrong is looked for first: metrics, packages, the data's columns, the other run, the folder, the prefixes.
Only then is a model loaded.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.errors import ConfigError, DataError
from foreword.evaluate import run as runs
from foreword.evaluate.examples import Task, difference, read_predictions
from foreword.evaluate.metrics import check, compare, count, known, scored
from foreword.evaluate.predict import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.evaluate._counts import Counts
    from foreword.prefix import Prefix

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

Progress = Callable[[], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Writer:
    """A model that writes (with prefixes), and that judges perplexity (without).

    Attributes:
        model: what ``fw.load_model`` takes.
        prefixes: folders of prefixes, attached together.
        how: decoding.
        strength, force: as for ``fw.attach``.
        dtype: of the base model.
    """

    model: str
    prefixes: Sequence[Path] = ()
    how: Decoding = field(default_factory=Decoding)
    batch_size: int = 8
    strength: float = 1.0
    dtype: str | None = None
    force: bool = False

    def load(self) -> Loaded:
        from foreword.models import load_model

        return load_model(self.model, dtype=self.dtype)


@dataclass(frozen=True)
class Evaluation:
    """Predictions, or a model that writes them, to be scored on examples.

    Attributes:
        tasks: the examples.
        metrics: names.
        data: what the examples are called in reports.
        predictions: a file of predictions; None: ``writer`` writes them.
        writer: the model; with ``predictions`` it is only asked for perplexities.
        intervals: bootstrap resamples, 0: none.
        seed: of the resamples.
    """

    tasks: Sequence[Task]
    metrics: Sequence[str]
    data: str = "examples"
    predictions: Path | None = None
    writer: Writer | None = None
    intervals: int = 1000
    seed: int = 0

    def run(
        self,
        out: Path | None = None,
        *,
        resume: bool = False,
        against: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Write where needed, score, compare with the run in ``against``.

        Args:
            out: folder for ``predictions.jsonl`` and ``metrics.json``; None: nothing is kept.
            resume: go on with a killed run in ``out``, or score a finished one again.
            progress: gives, as a context manager, what is called with how many are written, and of how many.

        Returns:
            What ``metrics.json`` holds.

        Raises:
            ConfigError, DataError, MissingPartError: what cannot be scored, compared or kept, and why.
        """
        texts, others, prefixes = self._prepare(out, resume, against)
        began = time.perf_counter()
        judged = any("model" in known(name).needs for name in self.metrics)
        loaded = self.writer.load() if self.writer is not None and (texts is None or judged) else None
        about = self._about(loaded, texts)
        folder = runs.Folder(out) if out is not None else None
        if folder is not None:
            folder.begin(about, resume=resume)
        if texts is None:
            assert loaded is not None
            texts = self._write(loaded, prefixes, folder, progress)
        elif folder is not None:
            folder.finish(self.tasks, texts)
        written = time.perf_counter()
        counts = self._count(texts, loaded)
        differences = None
        if others is not None:
            differences = compare(counts, self._count(others, loaded), resamples=self.intervals, seed=self.seed)
        scores = {name: scored(c, self.intervals, self.seed) for name, c in counts.items()}
        record = runs.finite({
            "examples": len(self.tasks), "data": self.data, "against": str(against) if against else None,
            "run": about, "intervals": self.intervals, "seed": self.seed,
            "metrics": runs.record_of(scores, differences),
            "seconds": {"writing": written - began, "scoring": time.perf_counter() - written},
        })  # fmt: skip
        if folder is not None:
            folder.score(record)
        return dict(record)

    def _prepare(
        self, out: Path | None, resume: bool, against: Path | None
    ) -> tuple[list[str] | None, list[str] | None, list[Prefix]]:
        """Everything that can be refused without the model: predictions, the other run's, prefixes."""
        if self.predictions is None and self.writer is None:
            raise ConfigError("there are no predictions, and no model to write them; give one of them")
        if resume and out is None:
            raise ConfigError("--resume goes on with the evaluation in --out; name it")
        if against is not None and self.intervals < 1:
            raise ConfigError("--against compares by resampling; give --intervals 1 or more (1000 is usual)")
        # The check asks only whether there is a model: its name stands for it.
        tools = {"model": self.writer.model, "tokenizer": self.writer.model} if self.writer is not None else {}
        check(self.metrics, size=len(self.tasks), **self._given(), **tools)
        texts = self._read() if self.predictions is not None else None
        others = runs.against(against, self.tasks) if against is not None else None
        if out is not None:
            runs.Folder(out).require(resume=resume)
        if self.writer is None or not self.writer.prefixes:
            return texts, others, []
        from foreword.conditional import plain_prefixes

        return texts, others, plain_prefixes(self.writer.prefixes)

    def _read(self) -> list[str]:
        assert self.predictions is not None
        texts, keys = read_predictions(self.predictions)
        if len(texts) != len(self.tasks):
            raise DataError(
                f"{self.predictions} has {len(texts)} predictions and {self.data} {len(self.tasks)} examples; expected "
                "one each (is there a --limit, or does --group apply?)"
            )
        if keys is not None and (how := difference([t.key for t in self.tasks], keys)):
            raise DataError(f"{self.predictions} is about other examples than {self.data}: {how}")
        return texts

    def _given(self) -> dict[str, Any]:
        """References, inputs and labels, each where all examples have one."""
        missing = [t for t in self.tasks if not t.references]
        needed = any("references" in known(name).needs for name in self.metrics)
        if needed and 0 < len(missing) < len(self.tasks):
            raise DataError(
                f"{missing[0].source}: no references, and other examples have some; give all of them, or none"
            )
        return {
            "references": None if missing else [t.references for t in self.tasks],
            "inputs": [t.input for t in self.tasks] if all(t.input for t in self.tasks) else None,
            "labels": [t.label for t in self.tasks] if all(t.label is not None for t in self.tasks) else None,
        }

    def _about(self, loaded: Loaded | None, texts: Sequence[str] | None) -> dict[str, Any]:
        """What the run is: its folder takes no other."""
        about: dict[str, Any] = {"examples": {"number": len(self.tasks), "sha256": _digest(t.key for t in self.tasks)}}
        if texts is not None:
            return about | {"predictions": {"sha256": _digest(texts)}}
        from foreword._prefix_file import DESCRIPTION, WEIGHTS
        from foreword.fingerprint import Fingerprint
        from foreword.hub import located

        assert loaded is not None and self.writer is not None
        base = Fingerprint.of(loaded[0]).to_json()
        folders = [located(folder) for folder in self.writer.prefixes]
        files = [b"".join((folder / n).read_bytes() for n in (WEIGHTS, DESCRIPTION)) for folder in folders]
        return about | {
            "base": base | {"weights": _digest([json.dumps(base["weights"])])}, "dtype": str(loaded[0].dtype),
            "prefixes": [hashlib.sha256(content).hexdigest() for content in files], "strength": self.writer.strength,
            "decoding": self.writer.how.to_json(), "batch_size": self.writer.batch_size,
        }  # fmt: skip

    def _write(
        self, loaded: Loaded, prefixes: Sequence[Prefix], folder: runs.Folder | None, progress: Progress | None
    ) -> list[str]:
        assert self.writer is not None
        if folder is not None and (there := folder.written(self.tasks)) is not None:
            return there
        from foreword._attached import attached

        strength = None if self.writer.strength == 1.0 else self.writer.strength
        on = attached(loaded[0], prefixes, strength=strength, force=self.writer.force)
        with on, (progress or _silent)() as told:
            return runs.write_all(
                *loaded, self.tasks, self.writer.how, batch_size=self.writer.batch_size, folder=folder, progress=told
            )

    def _count(self, texts: Sequence[str], loaded: Loaded | None) -> dict[str, Counts]:
        tools: dict[str, Any] = {}
        if loaded is not None and self.writer is not None:
            tools = {"model": loaded[0], "tokenizer": loaded[1], "batch_size": self.writer.batch_size}
        return count(texts, metrics=self.metrics, **self._given(), **tools)


def _silent() -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, total: None)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
