"""Questions about a text, and answers to them, made with the model itself: what a cartridge is trained on.

As in the self-study of Eyuboglu et al. 2025 (arXiv 2506.06266, section 4): the model reads a chunk of the text and is
asked for a question of one of five kinds; then it answers with the same chunk before it. Small models write few
questions of use, so there are *passages* as well: pieces of the text to be continued, which need no writing.

What is made is written down batch by batch, in a file that is whole at any moment. Each batch has random numbers of
its own, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword._begun import begin, write_whole
from foreword.errors import ConfigError, DataError
from foreword.fingerprint import Fingerprint
from foreword.generation import write
from foreword.train._teacher import text_teacher
from foreword.train.progress import Counting
from foreword.train.questions import Row, asked, chunks, context, wished
from foreword.tuning import attach

# Under which heading the model is asked for a question, and how what it writes begins: small models need both.
KINDS: Mapping[str, tuple[str, Sequence[str]]] = {
    "question": (
        "Questions about details of the text above, and answers",
        ("What", "Who", "When", "Which", "How", "Why", "Where", "Does", "Is", "What happens if"),
    ),
    "summarisation": (
        "Requests to summarise one part of the text above, and summaries",
        (
            "Summarise what the text says about",
            "In a few sentences, what does the text say about",
            "Sum up the part on",
        ),
    ),
    "structuring": (
        "Requests for lists of facts of the text above, and the lists",
        ("List the", "Make a list of the", "Name all"),
    ),
    "use case": (
        "Questions of people who need the text above for their work, and answers",
        ("Can I", "Do I have to", "What should I do if", "Am I allowed to", "How do I"),
    ),
    "creative": (
        "Unusual tasks about the text above, and what came of them",
        ("Explain to a child what", "Imagine that", "Write a short dialogue about", "Compare the"),
    ),
}


@dataclass(frozen=True)
class Writing:
    """How the model writes.

    Attributes:
        rows: texts at a time, all with the same part of the text before them.
        chunk: tokens of a part of the text that is read at a time.
        question, answer: the most tokens of one.
        temperature, top_p: of sampling questions.
        answer_temperature: of sampling answers, which should keep to the text.
        seed: of what is drawn.
    """

    rows: int = 16
    chunk: int = 512
    question: int = 40
    answer: int = 64
    temperature: float = 0.7
    answer_temperature: float = 0.3
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "chunk", "question", "answer"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"Writing({name}={value}); expected 1 or more")
        for name in ("temperature", "answer_temperature"):
            if not 0 < (heat := getattr(self, name)) < float("inf"):
                raise ConfigError(f"Writing({name}={heat}); expected a number above 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"Writing(top_p={self.top_p}); expected a share above 0, at most 1")


def self_study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    path: Path,
    count: int,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    chat: bool = False,
    how: Writing = Writing(),
    resume: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Have the model ask and answer ``count`` questions about a text, no two alike, and write them to ``path``.

    Args:
        path: a JSONL file of ``question``, ``answer`` and ``kind``, whole at any moment; a note stands beside it.
        kinds: some of ``KINDS``; they take turns.
        chat: ask in the model's chat template instead of as ``Question: … Answer:``.
        resume: go on with the file.

    Raises:
        ConfigError: an empty text, no kind or an unknown one, or the file is of another text or model, or was begun.
        DataError: the model writes nothing of use.
    """
    if not text.strip():
        raise ConfigError("there is no text to ask about; give one")
    if not kinds or set(kinds) - set(KINDS):
        raise ConfigError(f"kinds={list(kinds)}; expected some of {', '.join(KINDS)}")
    asked(tokenizer, "", chat)  # says that there is no template
    parts = chunks(tokenizer, text, how.chunk)
    order = random.Random(how.seed).sample(range(len(parts)), len(parts))

    def batch(number: int, known: set[str]) -> list[Row]:
        part = order[number % len(parts)]
        chosen = [kinds[(number * how.rows + i) % len(kinds)] for i in range(how.rows)]
        draw = random.Random(f"{how.seed}/{number}")
        openings = [draw.choice(KINDS[kind][1]) for kind in chosen]
        with in_context(model, tokenizer, parts[part]):
            prompts = [wished(tokenizer, KINDS[k][0], chat) + o for k, o in zip(chosen, openings, strict=True)]
            written = _write(model, tokenizer, prompts, how.question, how.temperature, how, f"{number}/questions")
            questions = _usable([o + w for o, w in zip(openings, written, strict=True)], chosen, known)
            answers = _answers(model, tokenizer, [q for q, _ in questions], chat, how, number)
        return [
            {"question": q, "answer": a, "kind": kind, "chunk": part, "batch": number}
            for (q, kind), a in zip(questions, answers, strict=True)
            if a
        ]

    record = _record(model, text, how) | {"kinds": list(kinds), "chat": chat}
    most = 4 * -(-count // how.rows) + 4 * len(parts)  # a model that writes nothing of use doesn't do so for ever
    rows = _gather(path, record, count, most, batch, resume, console or Console(stderr=True))
    if count and not rows:
        raise DataError(
            f"the model wrote no usable question in {most} batches; give questions of your own, or passages alone"
        )
    return rows


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    questions: Sequence[str],
    path: Path,
    *,
    chat: bool = False,
    how: Writing = Writing(),
    resume: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Have the model answer questions about a text with all of it before them; rows and file as for ``self_study``.

    A question that gets an empty answer is left out.
    """

    asked(tokenizer, "", chat)

    def batch(number: int, known: set[str]) -> list[Row]:
        asking = list(questions[number * how.rows : (number + 1) * how.rows])
        answers = _answers(model, tokenizer, asking, chat, how, number)
        return [
            {"question": q, "answer": a, "kind": "given", "batch": number}
            for q, a in zip(asking, answers, strict=True)
            if a
        ]

    asked_for = sha256(repr(list(questions)).encode()).hexdigest()[:16]
    record = _record(model, text, how) | {"questions": asked_for, "chat": chat}
    with in_context(model, tokenizer, text):
        return _gather(
            path, record, len(questions), -(-len(questions) // how.rows), batch, resume, console or Console(stderr=True)
        )


# ---------------------------------------------------------------- asking the model


@contextmanager
def in_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[None]:
    """Inside the block the model has read a text; all rows of a batch share it."""
    tuning = attach(model, text_teacher(model, tokenizer, context(text)))
    try:
        yield
    finally:
        tuning.detach()


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    chat: bool,
    how: Writing,
    number: int,
) -> list[str]:
    """Each up to where the model goes on with something else; empty ones among them."""
    if not questions:
        return []
    prompts = [asked(tokenizer, q, chat) for q in questions]
    written = _write(model, tokenizer, prompts, how.answer, how.answer_temperature, how, f"{number}/answers")
    return [(a if chat else re.split(r"\n\s*\n|\n(?:Question|Answer)\b", a.lstrip())[0]).strip() for a in written]


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    most: int,
    temperature: float,
    how: Writing,
    what: str,
) -> list[str]:
    """What the model writes; the same for the same seed, and the random state outside stays."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(sha256(f"{how.seed}/{what}".encode()).digest()[:7]))
        return write(
            model, tokenizer, prompts, max_new_tokens=most, do_sample=True, temperature=temperature,
            top_p=how.top_p, top_k=0,
        )  # fmt: skip


def _usable(written: Sequence[str], kinds: Sequence[str], known: set[str]) -> list[tuple[str, str]]:
    """Questions of four words or more that aren't known yet, each up to its question mark or the end of its line."""
    found = []
    for text, kind in zip(written, kinds, strict=True):
        line = next((x.strip() for x in text.splitlines() if x.strip()), "")
        question = line[: line.index("?") + 1] if "?" in line else line
        if len(question.split()) >= 4 and (key := _key(question)) not in known:
            known.add(key)
            found.append((question, kind))
    return found


def _key(question: str) -> str:
    """Two questions that differ in case and punctuation only are one."""
    return " ".join(re.findall(r"\w+", question.casefold()))


# ---------------------------------------------------------------- writing down


def _record(model: PreTrainedModel, text: str, how: Writing) -> dict[str, Any]:
    """What the rows are of: anything that would change them."""
    base = Fingerprint.of(model)
    return {
        "text": sha256(text.encode()).hexdigest()[:32],
        "base model": [base.model_class, str(model.dtype), sha256(repr(base.weights).encode()).hexdigest()[:16]],
        **asdict(how),
    }


def _gather(
    path: Path,
    record: Mapping[str, Any],
    count: int,
    most: int,
    batch: Callable[[int, set[str]], list[Row]],
    resume: bool,
    console: Console,
) -> list[Row]:
    """Ask for batch after batch until there are ``count`` rows or ``most`` batches, and write them down each time."""
    begin(path.with_name(f"{path.name}.json"), record, resume, "questions")
    rows = _read(path) if path.exists() else []
    with Counting("questions", console, count, "") as bar:
        bar.skip(min(count, len(rows)))
        for number in range(rows[-1]["batch"] + 1 if rows else 0, most):
            if len(rows) >= count:
                break
            new = batch(number, {_key(r["question"]) for r in rows})
            rows += new
            write_whole(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            bar.advance(len(new))
    return rows[:count]


def _read(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as exc:
        raise DataError(f"{path} can't be read: {exc}; delete it to begin anew") from exc
