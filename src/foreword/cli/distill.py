"""`foreword distill`: a long text, or a larger prefix, becomes a short prefix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from foreword.cli._data import Source, Turns, encode_both, hold_out
from foreword.cli._shared import print_json, quiet
from foreword.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.config import PrefixConfig
    from foreword.prefix import Prefix
    from foreword.train.run import RunResult

_PREFIX, _QUESTIONS, _DATA, _RUN = "Prefix", "Questions about the document", "Data, for a teacher prefix", "Run"
QUESTIONS = "questions.jsonl"


def run(
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo' (the packaged SmolLM2).")],
    out: Annotated[Path, Option(help="Folder for the prefix.")],
    document: Annotated[Path | None, Option(help="A text file: the teacher has it before every question.")] = None,
    teacher_prefix: Annotated[Path | None, Option(help="A saved prefix as the teacher instead (with --data).")] = None,
    length: Annotated[int, Option(min=1, help="Virtual tokens.", rich_help_panel=_PREFIX)] = 256,
    init: Annotated[str | None, Option(help="A text to start from, or 'random'.", rich_help_panel=_PREFIX, show_default="the document's first tokens")] = None,
    freeze_first: Annotated[bool, Option(help="Keep the first token as it starts.", rich_help_panel=_PREFIX)] = True,
    start: Annotated[Path | None, Option(help="Go on training this saved prefix instead.", rich_help_panel=_PREFIX)] = None,
    questions: Annotated[Path | None, Option(help="Your own questions: JSONL with question (and answer), or examples as for train. Without it the model asks itself.", rich_help_panel=_QUESTIONS)] = None,
    count: Annotated[int, Option(min=0, help="Questions that the model makes.", rich_help_panel=_QUESTIONS)] = 128,
    passages: Annotated[int, Option(min=0, help="Pieces of the document to be continued.", rich_help_panel=_QUESTIONS)] = 128,
    kinds: Annotated[str | None, Option(help="Of the model's questions, with commas.", rich_help_panel=_QUESTIONS, show_default="all five")] = None,
    chat: Annotated[bool, Option("--chat", help="Ask in the model's chat template instead of as 'Question: … Answer:'.", rich_help_panel=_QUESTIONS)] = False,
    chunk: Annotated[int, Option(min=16, help="Tokens of the document that the model reads to ask about.", rich_help_panel=_QUESTIONS)] = 512,
    data: Annotated[list[str] | None, Option(help="Examples, as for train (several are joined).", rich_help_panel=_DATA)] = None,
    valid: Annotated[list[str] | None, Option(help="Validation examples, in the same form.", rich_help_panel=_DATA)] = None,
    column: Annotated[list[str] | None, Option(help="Map a column: input=question (several).", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1 (several).", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of a datasets name.", rich_help_panel=_DATA)] = None,
    limit: Annotated[int | None, Option(min=1, help="Use the first N examples.", rich_help_panel=_DATA)] = None,
    turns: Annotated[Turns, Option(help="Which answers of a conversation are learned: all, or the last.", rich_help_panel=_DATA)] = Turns.all,
    valid_share: Annotated[float | None, Option(help="Hold this share of the examples out for validation.", rich_help_panel=_RUN)] = None,
    max_length: Annotated[int, Option(min=2, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_RUN)] = 256,
    top: Annotated[int, Option(min=1, help="Likeliest tokens of the teacher that are kept of each position.", rich_help_panel=_RUN)] = 20,
    steps: Annotated[int | None, Option(min=1, help="Optimizer steps (instead of epochs).", rich_help_panel=_RUN)] = None,
    epochs: Annotated[float, Option(help="Passes over the examples.", rich_help_panel=_RUN)] = 4.0,
    batch_size: Annotated[int, Option(min=1, help="Examples a step and device.", rich_help_panel=_RUN)] = 8,
    accumulate: Annotated[int, Option(min=1, help="Batches a step.", rich_help_panel=_RUN)] = 1,
    learning_rate: Annotated[float | None, Option(help="Default: what suits keys and values.", rich_help_panel=_RUN)] = None,
    warmup: Annotated[float, Option(min=0, help="Warm-up: steps, or a share of them below 1.", rich_help_panel=_RUN)] = 0.1,
    clip: Annotated[float, Option(min=0, help="Gradient norm to clip at.", rich_help_panel=_RUN)] = 1.0,
    save_every: Annotated[int, Option(min=1, help="Steps between checkpoints.", rich_help_panel=_RUN)] = 100,
    eval_every: Annotated[int, Option(min=1, help="Steps between validations.", rich_help_panel=_RUN)] = 50,
    checkpointing: Annotated[bool, Option(help="Gradient checkpointing: less memory, slower.", rich_help_panel=_RUN)] = False,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …", rich_help_panel=_RUN)] = None,
    quantize: Annotated[str | None, Option(help="Load the base in int8 or int4, by an installed backend.", rich_help_panel=_RUN)] = None,
    attn: Annotated[str | None, Option(help="Attention implementation of the base model.", rich_help_panel=_RUN)] = None,
    seed: Annotated[int, Option(min=0, rich_help_panel=_RUN)] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on with what was begun in --out.", rich_help_panel=_RUN)] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Distil a document (or a larger prefix) into a short prefix that answers like the model with it before it."""
    if (document is None) == (teacher_prefix is None):
        raise ConfigError(
            "the teacher is --document FILE, or --teacher-prefix DIR with --data FILE; give one of the two"
        )
    if (teacher_prefix is None) != (not data):
        raise ConfigError("--teacher-prefix and --data go together: the prefix is asked about these examples")
    for name, value in (("--learning-rate", learning_rate), ("--epochs", epochs)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} {value}; expected a number above 0")
    quiet()
    from rich.console import Console

    from foreword.models import load_model
    from foreword.prefix import Prefix
    from foreword.train.distill import begun, check, check_folder, distill
    from foreword.train.questions import context

    console, going_on = Console(stderr=True), resume and (begun(out) or not (out / QUESTIONS).exists())
    check_folder(out, going_on)
    text = context(_read(document)) if document is not None else None
    source = None
    if data:
        source = Source(
            data, valid, valid_share, column or (), where or (), split, limit, max_length, seed, turns.value
        )
    given = source.read() if source is not None else None
    teacher: str | Prefix = Prefix.load(teacher_prefix) if teacher_prefix is not None else text or ""
    base, tokenizer = load_model(model, dtype=dtype, attn=attn, quantize=quantize)
    what = Prefix.load(start) if start is not None else _student(tokenizer, text, length, init, freeze_first, seed)
    check(base, tokenizer, teacher, what, max_length, top)
    if given is None:
        asking = Asking(text or "", questions, count, passages, kinds, chat, chunk, seed)
        examples = asking.examples(base, tokenizer, out, resume, console)
        given = hold_out(examples, valid_share, seed) if valid_share is not None else (examples, None)
    train_set, valid_set = encode_both(given, tokenizer, base, max_length, turns.value)
    console.print(f"data: {train_set.stats.describe()}")
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate, "seed": seed,
        "learning_rate": learning_rate, "warmup_steps": warmup, "max_grad_norm": clip, "save_steps": save_every,
        "eval_steps": eval_every, "gradient_checkpointing": checkpointing, "num_train_epochs": epochs,
        "max_steps": steps if steps is not None else -1,
    }  # fmt: skip
    try:
        result = distill(
            base, tokenizer, teacher, what, train_set, out, arguments, top=top, valid=valid_set,
            resume=going_on, label=out.name, console=console,
        )  # fmt: skip
    except KeyboardInterrupt:
        _interrupted(out)
    _show(result, out, as_json)
    if result.interrupted:
        _interrupted(out)


@dataclass(frozen=True)
class Asking:
    """What the options say of questions about a document; the fields are named after them."""

    text: str
    questions: Path | None
    count: int
    passages: int
    kinds: str | None
    chat: bool
    chunk: int
    seed: int

    def examples(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, resume: bool, console: Console
    ) -> list[Any]:
        """Questions and answers: the user's, or the model's in ``out`` and pieces of the document."""
        from foreword.train.questions import examples_of, passages, read_questions
        from foreword.train.self_study import KINDS, Writing, answer_questions, self_study

        how = Writing(chunk=self.chunk, seed=self.seed)
        going_on = resume and (out / QUESTIONS).exists()
        if self.questions is not None:
            examples, rows = read_questions(self.questions)
            open_ones = [r["question"] for r in rows if "answer" not in r]
            if open_ones:
                written = answer_questions(
                    model, tokenizer, self.text, open_ones, out / QUESTIONS, chat=self.chat, how=how, resume=going_on,
                    console=console,
                )  # fmt: skip
                rows = [r for r in rows if "answer" in r] + written
            return [*examples, *(examples_of(rows, tokenizer, chat=self.chat) if rows else ())]
        if not self.count + self.passages:
            raise ConfigError(
                "--count 0 --passages 0 leaves nothing to learn from; give some of either, or --questions"
            )
        rows = passages(self.text, self.passages, seed=self.seed)
        if self.count:
            kinds = [k.strip() for k in self.kinds.split(",")] if self.kinds is not None else list(KINDS)
            try:
                rows += self_study(
                    model, tokenizer, self.text, out / QUESTIONS, self.count, kinds=kinds, chat=self.chat, how=how,
                    resume=going_on, console=console,
                )  # fmt: skip
            except KeyboardInterrupt:
                _interrupted(out)
        return examples_of(rows, tokenizer, chat=self.chat)


def _student(
    tokenizer: PreTrainedTokenizerBase, text: str | None, length: int, init: str | None, freeze_first: bool, seed: int
) -> PrefixConfig:
    """A new prefix, from the document's first tokens unless another start is asked for."""
    from foreword.config import PrefixConfig

    if init is None and text is not None:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < length:
            raise ConfigError(
                f"the document has {len(ids):,} tokens and the prefix {length:,}, which should be shorter: give a smaller "
                "--length, or a --start"
            )
        init = _beginning(tokenizer, text, ids, length)
    return PrefixConfig(length=length, init=init, freeze_first=freeze_first and length > 1, seed=seed)


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], length: int) -> str:
    """As much of a text as its first tokens need: the configuration is saved with the prefix."""
    for more in (8, 64):
        start = str(tokenizer.decode(ids[: length + more], skip_special_tokens=True))
        if text.startswith(start) and tokenizer(start, verbose=False)["input_ids"][:length] == ids[:length]:
            return start
    return text


def _read(document: Path) -> str:
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"--document {document}: {exc}; expected a UTF-8 text file") from exc
    if not text.strip():
        raise DataError(f"--document {document} is empty; expected a text")
    return text


def _show(result: RunResult, out: Path, as_json: bool) -> None:
    about, metrics = result.prefix.metadata["distillation"], result.prefix.metadata.get("metrics", {})
    record = {
        "out": str(out), "steps": result.steps, "interrupted": result.interrupted, "parameters": result.parameters,
        "bytes": result.prefix.nbytes, **about, **dict(metrics),
    }  # fmt: skip
    if as_json:
        print_json(record)
        return
    losses = ", ".join(f"{k} {record[k]:.4f}" for k in ("loss", "eval_loss") if k in record)
    instead = f"{record['replaced_bytes']:,} bytes"
    if about["text_tokens"] is not None:
        instead = f"the text's {about['text_tokens']:,} tokens, whose keys and values are {instead}"
    typer.echo(f"{out}: {result.prefix!r}; {result.steps} steps, {losses} (nats from the teacher)")
    typer.echo(f"{result.prefix.nbytes:,} bytes instead of {instead}")


def _interrupted(out: Path) -> None:
    typer.echo(f"interrupted; go on with --resume --out {out}", err=True)
    raise typer.Exit(130)
