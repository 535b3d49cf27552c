"""What a comparison is run on: examples to train on, to validate and to test, and how texts are judged."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from foreword.errors import ConfigError, DataError
from foreword.evaluate.predict import Decoding

Records = list[dict[str, Any]]

REVIEWS_TEXT = (
    "Here is a glowing, enthusiastic review by somebody who loved every minute of this wonderful film: the acting is "
    "superb, the story is moving, the direction is masterful, and I recommend it warmly to everybody who enjoys good "
    "cinema. It is one of the best films of the year."
)
SENTIMENT_TEXT = (
    "Read the end of a film review and decide whether its writer liked the film: the answer is positive if the writer "
    "praises the film and recommends it, and negative if the writer is disappointed, bored or annoyed by it. Answer "
    "with one word."
)
E2E_TEXT = (
    "These are facts about a restaurant: its name, type, food, price range, customer rating, area, whether it is "
    "family friendly, and what it is near. Describe the restaurant in one or two natural English sentences that say "
    "all of these facts and nothing else."
)
UNRELATED = "elephant banana keyboard mountain umbrella bicycle carpet thunder pencil harbour"
_OPENING = 4  # words of a review's end that are given


@dataclass(frozen=True)
class Limits:
    """The most examples of each part; None: all."""

    train: int | None = 5000
    valid: int | None = 128
    test: int | None = 128

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and value < 1:
                raise ConfigError(f"a limit of {value} {f.name} examples; expected 1 or more, or none for all")


@dataclass(frozen=True)
class TaskData:
    """A task with its examples.

    Attributes:
        train, valid: records as for :func:`foreword.data.read_examples`.
        tests: by name, what is tested on; usually one, ``"test"``.
        metrics: names, of :data:`foreword.evaluate.METRICS`; none: likelihood only.
        init: a text about the task, which prefixes and prompts start from.
        words: a few words about it; unrelated: and some that have nothing to do with it.
        max_length: longest example in tokens.
        note: what a reader has to know about it.
        turns: which answers of conversations are learned, and count in the loss: all, or the last.
    """

    name: str
    train: Records
    valid: Records
    tests: Mapping[str, Records]
    metrics: tuple[str, ...] = ()
    decoding: Decoding = field(default_factory=Decoding)
    init: str = E2E_TEXT
    words: str = ""
    unrelated: str = UNRELATED
    max_length: int = 128
    note: str = ""
    turns: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        for name, part in {"train": self.train, "valid": self.valid, **self.tests}.items():
            if not part:
                raise DataError(f"task {self.name}: there are no {name} examples")
        for name, part in self.tests.items():
            empty = [i for i, r in enumerate(part) if not has_prompt(r)]
            if self.metrics and empty:
                raise DataError(
                    f"task {self.name}: {name} example {empty[0]} has no input to write from; leave the metrics out to "
                    "compare by likelihood only"
                )
        from foreword.evaluate.metrics import known

        object.__setattr__(self, "metrics", tuple(known(m).name for m in dict.fromkeys(self.metrics)))

    def facts(self) -> dict[str, Any]:
        """What makes two tasks the same one."""
        parts = {"train": self.train, "valid": self.valid, **self.tests}
        return {
            "name": self.name,
            "data": {n: {"examples": len(r), "sha256": digest(r)} for n, r in parts.items()},
            "metrics": list(self.metrics), "decoding": self.decoding.to_json(), "init": self.init,
            "max_length": self.max_length, **({"turns": self.turns} if self.turns != "all" else {}),
        }  # fmt: skip


def has_prompt(record: Mapping[str, Any]) -> bool:
    """Whether a record has something to write from."""
    return "messages" in record or "prompt" in record or bool(record.get("input", "").strip())


def digest(value: Any) -> str:
    """Sixteen letters that other JSON does not have."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def load_task(
    name: str, *, data_dir: Path | None = None, limits: Limits | None = None, changes: Mapping[str, Any] | None = None
) -> TaskData:
    """A task by name (``reviews``, ``sentiment``, ``e2e``) or from a ``.yaml`` file.

    Args:
        data_dir: where the data of ``e2e`` are, which are not part of foreword.
        changes: fields of :class:`TaskData` to replace (``metrics``, ``max_length``, ``init``), and of
            :class:`Decoding` under ``decoding``.

    Raises:
        ConfigError: the name, or a key of the file, is unknown.
        DataError: the data cannot be read, or there are too few.
        MissingPartError: the packaged reviews are not installed.
    """
    limits = limits or Limits()
    if Path(name).suffix in (".yaml", ".yml"):
        task = _from_yaml(Path(name), limits)
    elif name == "e2e":
        task = _e2e(data_dir, limits)
    elif name in _PACKAGED:
        task = _PACKAGED[name](limits)
    else:
        near = difflib.get_close_matches(name, (*_PACKAGED, "e2e"), n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "there are reviews, sentiment and e2e"
        raise ConfigError(f"no task is called {name!r}; {hint}, or give a .yaml file")
    given = {k: v for k, v in (changes or {}).items() if v is not None}
    if decoding := given.pop("decoding", None):
        given["decoding"] = replace(task.decoding, **decoding)
    return replace(task, **given)


# ---------------------------------------------------------------- the packaged film reviews


def _reviews(limits: Limits, *, other_source: bool = False) -> TaskData:
    """Go on from the first words of a favourable review's end."""
    records = _opened(_endings("imdb", "1"))
    test, valid, train = _cut(records, limits)
    tests = {"test": test}
    if other_source:
        tests = {"IMDB": test, "Rotten Tomatoes": _opened(_endings("rotten_tomatoes", "1"))[: limits.test]}
    return TaskData(
        "reviews", train, valid, tests, ("sentiment", "perplexity-after-input", "distinct-2"),
        Decoding(max_new_tokens=40, stop="\n"), REVIEWS_TEXT, "glowing enthusiastic film review praise", max_length=64,
        note="How favourable IMDB reviews end, from their last sentences' first four words.",
    )  # fmt: skip


def _sentiment(limits: Limits) -> TaskData:
    """Say whether a review is favourable, from its end."""
    found: Records = []
    for label, word in (("1", "positive"), ("0", "negative")):
        ends = _endings("imdb", label)
        found += [{"input": f"Review: {t}\nSentiment:", "output": f" {word}", "label": label} for t in ends]
    random.Random(0).shuffle(found)
    test, valid, train = _cut(found, limits)
    return TaskData(
        "sentiment", train, valid, {"test": test}, ("accuracy",), Decoding(max_new_tokens=4), SENTIMENT_TEXT,
        "film review sentiment positive negative", max_length=96,
        note="Positive or negative, from the last sentences of an IMDB review; the model writes the word.",
    )  # fmt: skip


_PACKAGED: Mapping[str, Callable[[Limits], TaskData]] = {"reviews": _reviews, "sentiment": _sentiment}


def _endings(source: str, label: str) -> list[str]:
    """The last sentences of all reviews of a source and label that have some of the right length, shuffled."""
    from foreword.data.reviews import ending, plain
    from foreword.models import packaged_reviews

    with packaged_reviews().open(newline="", encoding="utf-8") as file:
        texts = [r["text"] for r in csv.DictReader(file) if r["label"] == label and r["source"] == source]
    found = list(dict.fromkeys(e for e in (ending(plain(t)) for t in texts) if e))
    random.Random(0).shuffle(found)
    return found


def _opened(texts: Iterable[str]) -> Records:
    """Each text in two: its first words, and the rest."""
    split = (t.split(" ") for t in texts)
    return [
        {"input": " ".join(w[:_OPENING]), "output": " " + " ".join(w[_OPENING:]), "label": "positive"} for w in split
    ]


def _cut(records: Records, limits: Limits) -> tuple[Records, Records, Records]:
    """Test, validation and training examples: the first two stay the same whatever is trained on."""
    share = len(records) // 10
    tested, valid = (min(n or share, share) for n in (limits.test, limits.valid))
    rest = records[2 * share :]
    return records[:tested], records[share : share + valid], rest[: limits.train]


# ---------------------------------------------------------------- E2E

_WHERE = (
    "the E2E challenge's data are not part of foreword: get trainset.csv, devset.csv and testset_w_refs.csv from "
    "https://github.com/tuetschek/e2e-dataset (CC BY-SA 4.0) and pass their folder as --data-dir"
)
_E2E_FILES = {
    "train": ("train.jsonl", "trainset.csv"),
    "valid": ("valid.jsonl", "devset.csv"),
    "test": ("test.jsonl", "testset_w_refs.csv"),
}


def _e2e(folder: Path | None, limits: Limits) -> TaskData:
    if folder is None:
        raise ConfigError(f"task e2e needs --data-dir: {_WHERE}")
    paths = {part: _first(folder, names) for part, names in _E2E_FILES.items()}
    if paths["train"] is None or paths["valid"] is None:
        raise DataError(f"{folder} has no {' or '.join(_E2E_FILES['train'])} with its validation part; {_WHERE}")
    train = _shuffled(_flat(_grouped(paths["train"])))[: limits.train]
    valid = _shuffled(_grouped(paths["valid"]))
    if paths["test"] is not None:
        test, note = _shuffled(_grouped(paths["test"])), "Tested on the test part."
    else:
        half = len(valid) // 2
        valid, test = valid[:half], valid[half:]
        note = "Validated on one half of the development part and tested on the other: our own cut."
    from foreword.evaluate.metrics import TASKS

    return TaskData(
        "e2e", train, valid[: limits.valid], {"test": test[: limits.test]}, TASKS["e2e"],
        Decoding(max_new_tokens=64, stop="\n"), E2E_TEXT, "restaurant name food price rating area description",
        max_length=160, note=note,
    )  # fmt: skip


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _grouped(path: Path | None) -> Records:
    """One record a table, with all its references; the input ends its line."""
    from foreword.evaluate.examples import read_tasks

    assert path is not None
    columns = {"input": "mr", "output": "ref"} if path.suffix == ".csv" else None
    tasks = read_tasks(path, columns=columns, group=True)
    return [{"input": t.input.rstrip() + "\n", "references": list(t.references)} for t in tasks]


def _flat(records: Records) -> Records:
    found: Records = []
    for r in records:
        found += [{"input": r["input"], "output": ref} for ref in r["references"]] if "references" in r else [r]
    return found


def _shuffled(records: Records) -> Records:
    random.Random(0).shuffle(records)
    return records


def without_slot(task: TaskData, slot: str, limits: Limits | None = None) -> TaskData:
    """Train and validate on tables that lack a slot; test on those without and with it.

    Args:
        limits: the most examples of each part, after they were parted.

    Raises:
        ConfigError: the tables have no such slot, or all have it.
    """
    mark = f"{slot}["

    def parted(records: Records) -> tuple[Records, Records]:
        there = [r for r in records if mark in r["input"]]
        return [r for r in records if mark not in r["input"]], there

    train, cut = parted(task.train)
    valid, _ = parted(task.valid)
    seen, unseen = parted(next(iter(task.tests.values())))
    if not (train and cut and valid and seen and unseen):
        raise ConfigError(
            f"leaving out the slot {slot!r} leaves {len(train)} tables to train on, {len(valid)} to validate, "
            f"{len(seen)} and {len(unseen)} to test on; expected some of each (slots are written as in the tables)"
        )
    limits = limits or Limits(None, None, None)
    tests = {f"without {slot}": seen[: limits.test], f"with {slot}": unseen[: limits.test]}
    name = f"{task.name} without {slot}"
    return replace(task, name=name, train=train[: limits.train], valid=valid[: limits.valid], tests=tests)


def other_reviews(limits: Limits) -> TaskData:
    """Trained on IMDB's reviews; tested on them and on Rotten Tomatoes'."""
    return _reviews(limits, other_source=True)


# ---------------------------------------------------------------- a file

_REQUIRED = ("name", "train", "valid", "test")
_KEYS = (
    *_REQUIRED, "metrics", "generation", "init", "words", "unrelated", "max_length", "columns", "where", "group", "end",
    "note", "chat", "turns",
)  # fmt: skip


def _from_yaml(path: Path, limits: Limits) -> TaskData:
    """A task in a file; paths in it are relative to it."""
    import yaml

    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"the task {path} cannot be read: {exc}") from exc
    if not isinstance(told, dict):
        raise ConfigError(f"{path} holds no keys; expected {', '.join(_REQUIRED)} and others, see docs/comparing.md")
    _check_keys(f"{path}", told, _KEYS)
    if missing := [k for k in _REQUIRED if not told.get(k)]:
        raise ConfigError(f"{path} lacks {missing[0]!r}; a task needs {', '.join(_REQUIRED)}")
    decoding = told.get("generation") or {}
    _check_keys(f"{path}: generation", decoding, [f.name for f in fields(Decoding)])
    parts = {name: _part(path, told, name) for name in ("train", "valid", "test")}
    given = {
        k: told[k] for k in ("init", "words", "unrelated", "max_length", "note", "turns") if told.get(k) is not None
    }
    for name, kind in {"max_length": int, "init": str, "words": str, "unrelated": str, "note": str}.items():
        if name in given and not isinstance(given[name], kind):
            raise ConfigError(f"{path}: {name} is {given[name]!r}; expected {'a number' if kind is int else 'a text'}")
    if given.get("turns", "all") not in ("all", "last"):
        raise ConfigError(f"{path}: turns is {given['turns']!r}; expected all or last")
    metrics = told.get("metrics") or ()
    if isinstance(metrics, str) or not all(isinstance(m, str) for m in metrics):
        raise ConfigError(f"{path}: metrics is {metrics!r}; expected a list of names, e.g. [bleu, rougeL]")
    try:
        how = Decoding(**decoding)
    except TypeError as exc:
        raise ConfigError(f"{path}: generation: {exc}") from exc
    return TaskData(
        str(told["name"]), _shuffled(_flat(parts["train"]))[: limits.train], _shuffled(parts["valid"])[: limits.valid],
        {"test": _shuffled(parts["test"])[: limits.test]}, tuple(metrics), how, **given,
    )  # fmt: skip


def _check_keys(where: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is {given!r}; expected keys with values")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{where}: no key is called {key!r}; {hint}")


def _part(path: Path, told: Mapping[str, Any], name: str) -> Records:
    """Records with ``input``, ``references`` and, where there is one, a ``label``; conversations as ``messages``."""
    from foreword.data._say import speaking
    from foreword.evaluate.examples import read_tasks, record_of

    source = Path(str(told[name]))
    source = source if source.is_absolute() else path.parent / source
    for option in ("columns", "where"):
        if told.get(option) is not None and not isinstance(told[option], dict):
            raise ConfigError(f"{path}: {option} is {told[option]!r}; expected keys with values")
    where = {str(k): str(v) for k, v in (told.get("where") or {}).items()} or None
    found: Records = []
    chat, group = bool(told.get("chat")), bool(told.get("group"))
    with speaking("yaml"):
        tasks = read_tasks(source, columns=told.get("columns"), where=where, group=group, chat=chat)
    for task in tasks:
        if not task.references:
            raise DataError(f"{task.source}: no references (or output); a comparison trains and tests on them")
        record: dict[str, Any] = {"input": task.input + str(told.get("end", "")), "references": list(task.references)}
        if task.example is not None:
            if "end" in told or group:
                raise DataError(f"{task.source}: a conversation; keys end and group are for inputs and outputs")
            record = record_of(task.example)
        found.append(record if task.label is None else {**record, "label": task.label})
    return found
