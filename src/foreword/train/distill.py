"""Distillation into a prefix: a short one learns to answer as the model does with a long text before it.

The teacher is the same model with something on it that is to be made smaller: a text in its context (the student is
then a *cartridge* of it, Eyuboglu et al. 2025, arXiv 2506.06266), a longer prefix, a LoRA. It reads every example
once, and its k likeliest tokens at each answer token are kept. The student is trained on

    KL(P || Q) = sum over the k tokens of P log(P / Q)  +  P_rest log(P_rest / Q_rest)

at the answer tokens, P the teacher's probabilities and Q the student's, each with all other tokens as one. That is the
divergence of two distributions over k + 1 outcomes, so it is 0 where they agree, positive elsewhere, and at most that
over the whole vocabulary (data processing). The sum over the k tokens alone is neither: a student could go below 0 by
moving probability to them. With k the whole vocabulary it is the plain divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback

from foreword._begun import begin
from foreword._boundary import told
from foreword._prefix_file import checksum_of
from foreword.conditional import part_of
from foreword.data import Collator, EncodedDataset
from foreword.errors import ConfigError, DataError
from foreword.fingerprint import Fingerprint
from foreword.methods import Config
from foreword.prefix import Prefix
from foreword.train._teacher import (
    COLUMN,
    IDS,
    LOG_PROBS,
    NOTE,
    SHARD,
    Answers,
    Asking,
    TeacherCollator,
    answer_inputs,
    answered,
    answers_in,
    ask,
    coarse_log_probs,
    digest_of,
    missing,
    replaced_bytes,
    text_teacher,
    text_tokens,
)
from foreword.train.arguments import PrefixTrainingArguments
from foreword.train.progress import Counting
from foreword.train.run import RunResult, check_out, run_arguments, train_prefix
from foreword.train.trainer import PrefixTrainer, last_checkpoint
from foreword.tuning import attach, require_detached

FOLDER = "teacher"


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: str | Prefix,
    what: Config | Prefix | Sequence[Config | Prefix],
    dataset: EncodedDataset,
    out: Path,
    arguments: dict[str, Any],
    *,
    top: int = 20,
    valid: EncodedDataset | None = None,
    resume: bool = False,
    label: str = "distilling",
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Train a prefix to answer as the teacher does, and save it into ``out``; the model is detached again at the end.

    The teacher is asked first, and what it says is kept in ``out/teacher``: 8 * top + 4 bytes an answer token.

    Args:
        teacher: a text that the same model reads before each example, or a prefix of it (longer, with a memory, a
            LoRA in one, …).
        what: the student: a configuration for a new prefix (or another method), or a prefix to go on training. For a
            text, ``PrefixConfig(length=n, init=text, freeze_first=True)`` starts from its first tokens.
        dataset: examples whose labels mark the answer tokens; the answers say where the teacher is asked and what it
            has read until then, and are no targets themselves.
        arguments: fields of :class:`PrefixTrainingArguments`.
        top: likeliest tokens of the teacher that are kept of each position.
        valid: examples to watch the same loss on.
        resume: go on with what was begun in ``out``: the teacher's answers or the training.
        callbacks: as for ``train_prefix``.

    Raises:
        ConfigError: ``top`` is no number of tokens, the text doesn't fit the model's context, the student can't be
            made, or ``out`` holds something else; all before anything is computed.
        DataError: no example has an answer token.
        MismatchError: the teacher or the student is of another base model.
        DivergedError: as for ``train_prefix``.
    """
    console = console or Console(stderr=True)
    trained = check_folder(out, resume)
    sets = {"train": dataset} | ({"valid": valid} if valid is not None else {})
    longest = max(_check_answers(model, name, part) for name, part in sets.items())
    tokens = check(model, tokenizer, teacher, what, longest, top)

    args = run_arguments(out, arguments, valid is not None)
    note = _note(model, teacher, sets, top, args.per_device_eval_batch_size)
    folder = out / FOLDER
    if args.process_index == 0:
        begin(folder / NOTE, note, resume, "answers of a teacher")
        for left in folder.glob("*/.*"):  # by a process that was killed
            left.unlink()
    _wait(args)
    _place(model, args)
    seq2seq = model.config.is_encoder_decoder
    plain = Collator.for_tokenizer(tokenizer, seq2seq=seq2seq)
    how = Asking(plain, top, args.per_device_eval_batch_size, *_place_among(model, args))
    _ask_about_all(model, tokenizer, teacher, sets, folder, how, console)
    _wait(args)

    told = {name: part.with_column(COLUMN, Answers(folder / name, part, seq2seq)) for name, part in sets.items()}
    collator = TeacherCollator.for_tokenizer(tokenizer, seq2seq=seq2seq)
    about = {"teacher": note["teacher"], "top": top, "text_tokens": tokens}
    about["replaced_bytes"] = replaced_bytes(model, teacher, tokens)
    return train_prefix(
        model, tokenizer, what, told["train"], out, arguments, valid=told.get("valid"), resume=trained, label=label,
        console=console, callbacks=callbacks, trainer=partial(DistillTrainer, about=about), collator=collator,
    )  # fmt: skip


class DistillTrainer(PrefixTrainer):
    """A :class:`PrefixTrainer` whose loss is the divergence from what a teacher said (nats an answer token).

    Its batches are those of ``TeacherCollator``.

    Args:
        about: what the prefix's metadata says of the distillation.
    """

    def __init__(self, *args: Any, about: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        # Given as a loss function, it is scaled for accumulation and several processes where Trainer scales its own.
        super().__init__(*args, compute_loss_func=self._mean, **kwargs)
        self.tuning.metadata["distillation"] = dict(about or {})
        self._now: tuple[Tensor, Tensor, Tensor] | None = None  # of this pass: places, ids, log-probabilities

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        base, labels = self.tuning.model, inputs["labels"]
        where = answered(labels, base.config.is_encoder_decoder)
        length = labels.shape[1]  # the estimate of memory shortens the labels and not the rest
        ids, log_probs = (inputs[name][:, :length][where] for name in (IDS, LOG_PROBS))
        called, predicts = answer_inputs(base, {k: v for k, v in inputs.items() if k not in (IDS, LOG_PROBS)})
        self._now = predicts, ids.long(), log_probs
        try:
            with told(labels=labels):
                return super().compute_loss(model, {**called, "labels": labels}, *args, **kwargs)
        finally:
            self._now = None

    def _mean(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert self._now is not None
        predicts, ids, log_probs = self._now
        each = divergence(outputs["logits"][predicts], ids, log_probs)
        return each.sum() / (num_items_in_batch if num_items_in_batch is not None else max(1, len(each)))


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL(teacher || student) over the teacher's k tokens and all others as one, of each position: ``(n,)``, nats.

    Args:
        logits: the student's, ``(n, vocabulary)``.
        ids: the teacher's likeliest tokens, ``(n, k)``.
        log_probs: of these and of all others together, ``(n, k + 1)``; ``(n, k)`` where k is the vocabulary.
    """
    own = coarse_log_probs(logits, ids)
    log_probs = log_probs.to(own.dtype)
    share = log_probs.exp()
    return torch.where(share > 0, share * (log_probs - own), 0.0).sum(-1)


def check_folder(out: Path, resume: bool) -> bool:
    """Whether training is to go on from a checkpoint in ``out``.

    Raises:
        ConfigError: ``out`` holds something else, or nothing to go on with.
    """
    trained = resume and last_checkpoint(out) is not None
    if resume and not trained and not begun(out):
        raise ConfigError(f"--resume: {out} holds no distillation that was begun; leave --resume out to begin one")
    check_out(out, trained)
    return trained


def begun(out: Path) -> bool:
    """Whether a distillation was begun in a folder."""
    return (out / FOLDER / NOTE).is_file()


# ---------------------------------------------------------------- before anything is computed


def check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: str | Prefix,
    what: Config | Prefix | Sequence[Config | Prefix],
    longest: int,
    top: int,
) -> int | None:
    """Refuse what :func:`distill` would, before its examples are there. Returns how many tokens a text has.

    Args:
        longest: tokens of the longest example.
    """
    require_detached(model)
    if not model.can_generate():
        raise ConfigError(
            f"a teacher is asked for the next token, and {type(model).__name__} predicts none; load a model with a "
            "language-model head"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= vocabulary:
        raise ConfigError(f"top={top!r}; expected a number of tokens from 1 to {vocabulary:,}, the vocabulary's size")
    tokens = None
    if isinstance(teacher, Prefix):
        if part_of(teacher) is not None:
            raise ConfigError(
                "the teacher depends on a condition vector; make a plain one of it: teacher.given(vector)"
            )
        attach(model, teacher).detach()  # says what doesn't fit
    elif isinstance(teacher, str):
        if model.config.is_encoder_decoder:
            raise ConfigError(
                f"a text as teacher stands before the question in one sequence, and {type(model).__name__} has two; "
                "give a Prefix as teacher"
            )
        tokens = text_tokens(model, tokenizer, teacher, longest)
    else:
        raise ConfigError(f"the teacher is a text or a Prefix, not {type(teacher).__name__}")
    _check_student(model, tokenizer, what)
    return tokens


def _check_answers(model: PreTrainedModel, name: str, dataset: EncodedDataset) -> int:
    """The length of the longest example."""
    seq2seq = model.config.is_encoder_decoder
    examples = [dataset[i] for i in range(len(dataset))]
    if not any(answers_in(e["labels"], seq2seq) for e in examples):
        raise DataError(
            f"none of the {len(dataset)} examples ({name}) has an answer token: their labels are -100 (and before the "
            "first token of a text nothing predicts it). Encode examples with an input and an output"
        )
    return max(len(e["input_ids"]) for e in examples)


def _check_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: Any) -> None:
    if any(getattr(c, "tasks", ()) for c in (what if isinstance(what, Sequence) else [what])):
        raise ConfigError("a distillation has one student; distil each task's prefix in a run of its own")
    tuning = attach(model, what, tokenizer=tokenizer, trainable=True)
    try:
        if not tuning.num_parameters:
            raise ConfigError(
                "the student has nothing that can be trained; give a PrefixConfig, or a prefix with virtual tokens"
            )
    finally:
        tuning.detach()


# ---------------------------------------------------------------- asking


def _note(
    model: PreTrainedModel, teacher: str | Prefix, sets: Mapping[str, EncodedDataset], top: int, rows: int
) -> dict[str, Any]:
    """What the answers are of: anything that would change them."""
    whose = sha256(teacher.encode()).hexdigest()[:32] if isinstance(teacher, str) else checksum_of(teacher)
    base = Fingerprint.of(model)
    return {
        "teacher": whose,
        "base model": [base.model_class, str(model.dtype), sha256(repr(base.weights).encode()).hexdigest()[:16]],
        "top": top,
        **{f"examples ({name})": digest_of(part) for name, part in sets.items()},
        "examples a file": SHARD,
        "eval batch size": rows,
    }


def _ask_about_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: str | Prefix,
    sets: Mapping[str, EncodedDataset],
    folder: Path,
    how: Asking,
    console: Console,
) -> None:
    for name in sets:
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not any(missing(folder / name, part) for name, part in sets.items()):
        return
    if isinstance(teacher, str):
        with console.status("the teacher reads its text …"):
            teacher = text_teacher(model, tokenizer, teacher)
    shown = console if how.rank == 0 else Console(quiet=True)
    for name, part in sets.items():
        with Counting(f"teacher, {name}", shown, len(part)) as bar:
            ask(model, teacher, part, folder / name, how, bar)


def _place_among(model: PreTrainedModel, args: PrefixTrainingArguments) -> tuple[int, int]:
    """This process's number, and how many share the examples; a base in shards takes all processes for each pass."""
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    return (0, 1) if sharded else (args.process_index, args.world_size)


def _wait(args: PrefixTrainingArguments) -> None:
    """For the other processes, where there are any."""
    if args.world_size > 1 and args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()


def _place(model: PreTrainedModel, args: PrefixTrainingArguments) -> None:
    """Where Trainer will put the model, so that the teacher is asked there."""
    placed = hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)
    if not placed and model.device.type == "cpu" and args.device.type != "cpu":
        cast(Any, model).to(args.device)
