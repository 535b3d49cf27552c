"""A comparison from beginning to end: run after run until all are finished, then tables, plots and a report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreword.compare import process
from foreword.compare.folder import Folder
from foreword.compare.plan import Plan, Result, Run
from foreword.compare.settings import Settings
from foreword.compare.tasks import TaskData

Facts = dict[str, Any]


@dataclass
class Watcher:
    """What somebody who waits sees; each of these does nothing by itself."""

    def checking(self, label: str) -> None:
        """A line is looked at before anything is trained."""

    def planned(self, total: int, done: int) -> None:
        """So many runs, and so many of them finished before."""

    def begun(self, run: Run) -> None:
        """A run begins."""

    def told(self, run: Run, what: Mapping[str, Any]) -> None:
        """It is at a step, or at a test."""

    def finished(self, run: Run, result: Result) -> None:
        """It is finished, and kept."""

    def failed(self, run: Run, message: str) -> None:
        """It came to nothing; the others go on."""


@dataclass(frozen=True)
class Comparison:
    """Methods on a task, under the same budget.

    Attributes:
        preset: its name, where the lines are those of one.
    """

    settings: Settings
    task: TaskData
    plan: Plan
    preset: str | None = None

    def facts(self, about: Mapping[str, Any]) -> Facts:
        """What all runs have in common, and makes them comparable.

        Args:
            about: what :func:`foreword.compare.probing.probe` found.
        """
        plan = self.plan
        return {
            "model": {k: about["model"][k] for k in ("weights", "dtype")},  # not where it was loaded from
            "task": self.task.facts(), "budget": plan.budget.to_json(),
            "learning rates": {"of the usual": list(plan.factors), "share of the budget": plan.share},
            **self.settings.to_json(),
        }  # fmt: skip

    def probe(self, watcher: Watcher | None = None) -> dict[str, Any]:
        """What the model is. Raises what is wrong with data, metrics or methods, before anything is trained."""
        watcher = watcher or Watcher()
        found: dict[str, Any] = process.call(
            "probing:probe", self.settings, self.task, self.plan,
            tell=lambda told: watcher.checking(str(told.get("checking", ""))),
        )  # fmt: skip
        return found

    def run(self, out: Path, *, resume: bool = False, watcher: Watcher | None = None) -> Outcome:
        """Do what is not done yet; ``results.json``, the report and the plots are in ``out``.

        A kill, a full disk or Ctrl-C loses the run that was going on and nothing else. A run that ends by itself
        without a result (too little memory) is left out, and tried again the next time.

        Raises:
            ConfigError, DataError, MissingPartError: what cannot be compared, or kept in ``out``, and why.
            OSError: nothing more can be written.
            KeyboardInterrupt: Ctrl-C, after the report about what is finished.
        """
        folder, watcher = Folder(out), watcher or Watcher()
        folder.require(resume=resume)
        about = self.probe(watcher)
        facts = self.facts(about)
        with folder.locked():
            # How it was asked for may change from call to call: more lines, more seeds.
            told = {
                "preset": self.preset,
                "model": about["model"]["name"],
                "machine": about["machine"],
                "parameters": about["parameters"],
            }
            folder.begin(facts, told, resume=resume)
            failed: dict[str, str] = {}
            try:
                self._go_on(folder, facts, watcher, failed)
            except KeyboardInterrupt:
                with suppress(KeyboardInterrupt):
                    self._report(folder, facts, about, failed)
                raise
            return self._report(folder, facts, about, failed)

    def _go_on(self, folder: Folder, facts: Facts, watcher: Watcher, failed: dict[str, str]) -> None:
        finished = self.plan.known(folder.finished(), facts)
        done = sum(run.key(facts) in finished for run in self.plan.runs(finished, facts))
        watcher.planned(len(self.plan), done)
        while (run := self.plan.next(finished, facts, list(failed))) is not None:
            key = run.key(facts)
            watcher.begun(run)
            try:
                finished[key] = self._do(run, folder, key, watcher)
            except process.RunFailedError as exc:
                failed[key] = f"{run.describe()}: {exc}"
                watcher.failed(run, str(exc))
                continue
            watcher.finished(run, finished[key])

    def _do(self, run: Run, folder: Folder, key: str, watcher: Watcher) -> Result:
        def tell(what: Mapping[str, Any]) -> None:
            watcher.told(run, what)

        try:
            folder.drop(key)
            result: Result = process.call("one:execute", self.settings, self.task, run, folder.work(key), tell=tell)
            folder.finish(key)
            return result
        except BaseException:
            folder.drop(key)
            raise

    def _report(self, folder: Folder, facts: Facts, about: Mapping[str, Any], failed: Mapping[str, str]) -> Outcome:
        from foreword.compare.report import write_report
        from foreword.compare.table import tabulate

        finished = self.plan.known(folder.finished(), facts)
        wanted = {run.key(facts): run for run in self.plan.runs(finished, facts)}
        # What a line is called isn't part of what it is: another preset may have trained it under another name.
        results = {
            key: {**finished[key], "run": {**finished[key]["run"], "label": run.label}}
            for key, run in wanted.items() if key in finished
        }  # fmt: skip
        table = tabulate(self.plan, results, facts)
        missing = len(self.plan) - len(results)
        record = {
            "preset": self.preset, "facts": facts, "about": dict(about), "rows": table, "failed": list(failed.values()),
            "missing_runs": missing, "runs": results,
        }  # fmt: skip
        paths = write_report(folder.path, self.task, self.plan, record)
        return Outcome(folder.path, record, list(failed.values()), missing, paths)


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to.

    Attributes:
        record: what ``results.json`` holds.
        failed: runs that came to nothing, and why.
        missing: runs that are still to be done.
        written: the files.
    """

    out: Path
    record: dict[str, Any]
    failed: list[str]
    missing: int
    written: list[Path] = field(default_factory=list)
