"""lm-evaluation-harness on a model with a prefix: any of its tasks, or a task file of your own.

The harness calls the model as it is, and a prefix lives at the model's attention calls, so attaching one is all that it
takes. Several stand together as ``fw.attach`` has them (a prefix and a memory, a prefix and LoRA).
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.errors import ConfigError, DataError, ForewordError, MissingPartError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.prefix import Prefix

TaskName = str | Path | Mapping[str, Any]


def harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> Any:
    """The harness's ``HFLM`` around a model as it stands; its scores are those of what is attached.

    The tokenizer is copied: the harness gives it a padding token.

    Raises:
        MissingPartError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MissingPartError(
            'the package lm_eval (lm-evaluation-harness) is not installed: pip install "foreword[harness]"'
        )
    from lm_eval.models.huggingface import HFLM

    with _quietly():
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskName | Sequence[TaskName],
    *,
    prefix: Prefix | Sequence[Prefix] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    chat: bool = False,
    trust_code: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Run tasks of the harness, with a prefix attached for the while (or with what is attached already).

    Args:
        tasks: names that the harness knows, paths of ``.yaml`` task files, or a task as a mapping.
        prefix: what to attach; None: the model as it stands.
        shots: examples before each question; None: as the task has it.
        limit: examples of each task; None: all.
        chat: put what is asked into the tokenizer's chat template.
        trust_code: let a task file name Python functions, or metrics of the package evaluate, which are then run.
            (Its Jinja templates are run in any case: use task files that you trust.)
        force: attach a prefix although the base model's weights differ.

    Returns:
        ``tasks``: by task, by metric (``acc``, ``acc_norm``, …): ``value``, ``stderr`` (None where the harness gives
        none) and ``higher_is_better``; ``samples``: by task, what the harness logged of each example.

    Raises:
        MissingPartError: lm-eval is not installed.
        ConfigError: a task is unknown, a task file names what would be run, or the prefix is an infix (the harness does
            not say where what is asked ends).
        DataError: a task's data cannot be loaded.
    """
    asked: list[TaskName] = [tasks] if isinstance(tasks, str | Path | Mapping) else list(tasks)
    if not asked:
        raise ConfigError("no task was asked for; name one, e.g. tasks='arc_easy', or a .yaml task file")
    lm = harness_model(model, tokenizer, batch_size=batch_size)
    from foreword.evaluate._task_files import check_task_file

    for task in asked:
        if not isinstance(task, Mapping) and _is_file(str(task)):
            check_task_file(Path(task), trust_code=trust_code)
    _check_infix(model, prefix)
    from lm_eval.evaluator import simple_evaluate

    from foreword._attached import attached

    with _quietly():
        manager, loaded = _load(asked)
        with attached(model, prefix, force=force):
            result = simple_evaluate(
                lm,
                tasks=list(loaded.values()),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=1000,
                apply_chat_template=chat,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    assert result is not None  # it is None in other processes than the first, and there is one
    better = result.get("higher_is_better", {})
    return {
        "tasks": {name: _metrics(values, better.get(name, {})) for name, values in result["results"].items()},
        "samples": result.get("samples", {}),
    }


def _metrics(values: Mapping[str, Any], better: Mapping[str, bool]) -> dict[str, Any]:
    """The harness's ``"acc,none": 0.5, "acc_stderr,none": 0.1`` by metric."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        shown = name if kind == "none" else f"{name} ({kind})"
        found[shown] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
            "higher_is_better": better.get(name, True),
        }
    return found


def _load(asked: Sequence[TaskName]) -> tuple[Any, dict[str, Any]]:
    """The tasks by name, with their data. The harness's own are indexed (for seconds) only where one is asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=any(isinstance(t, str) and not _is_file(t) for t in asked))
    found: dict[str, Any] = {}
    for task in asked:
        spec = str(task) if isinstance(task, Path) else dict(task) if isinstance(task, Mapping) else task
        try:
            found |= manager.load(spec)["tasks"]
        except KeyError as exc:
            if isinstance(task, str) and not _is_file(task):
                near = difflib.get_close_matches(task, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
                raise ConfigError(f"the harness has no task {task!r}; {hint}") from None
            raise ConfigError(f"{task}: not a task file: {exc} is missing") from exc
        except ForewordError:
            raise
        except Exception as exc:  # reading a task's data can fail in any way inside two libraries
            text = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            raise DataError(
                f"the task {task if isinstance(task, str | Path) else task.get('task')} cannot be loaded: {text}. "
                "Offline, a task needs its data on this machine: see dataset_path and dataset_kwargs in its file"
            ) from exc
    return manager, found


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _check_infix(model: PreTrainedModel, prefix: Prefix | Sequence[Prefix] | None) -> None:
    from foreword.prefix import Prefix
    from foreword.tuning import tuning_of

    given = [prefix] if isinstance(prefix, Prefix) else list(prefix or ())
    rules = [p.visible for p in given]
    if (tuning := tuning_of(model)) is not None:
        rules.append(tuning.visible)
    if "infix" in [rule.kind for rule in rules]:
        raise ConfigError(
            "the harness scores a question and an answer as one text and does not say where the question ends, which "
            'an infix has to know; use a prefix with visible="all", or foreword.evaluate on your own data'
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """The harness logs for its own developers."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
