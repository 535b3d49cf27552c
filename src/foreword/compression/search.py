"""compress: try plans on held-out examples, and keep the best that is within the limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword._begun import begin, write_whole
from foreword._prefix_file import checksum_of
from foreword.compression._checks import check_limits, check_prefix
from foreword.compression.measuring import held_out_loss, token_shares
from foreword.compression.merging import merge
from foreword.compression.planning import (
    DISTILL,
    LONGEST,
    MERGE,
    PRUNE,
    QUICK,
    UNIFORM,
    Candidate,
    Limits,
    Plan,
    best,
    check_methods,
    fitting,
    least_size,
    nearest,
    noted,
    quick_plans,
    size_of,
    usual_lengths,
    ways_to_write,
)
from foreword.compression.pruning import prune
from foreword.compression.report import draw_plans
from foreword.compression.result import PLANS, Compression, digest_of, known, record_of, text_of
from foreword.compression.shortening import check_trainable, shorten
from foreword.data import EncodedDataset
from foreword.errors import ConfigError, DataError
from foreword.losses import supervised_tokens
from foreword.prefix import Prefix
from foreword.tuning import attach

BEGUN, PICTURE, FINISHED = "begun.json", "plans.png", "finished.json"


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix,
    dataset: EncodedDataset,
    valid: EncodedDataset,
    *,
    target_bytes: int | None = None,
    max_loss_increase: float | None = None,
    methods: Sequence[str] = QUICK,
    out: str | Path | None = None,
    resume: bool = False,
    arguments: dict[str, Any] | None = None,
    batch_size: int = 16,
    console: Console | None = None,
) -> Compression:
    """Make a trained prefix smaller: try plans, measure each on held-out examples, keep the best within the limits.

    Args:
        dataset: examples that shares of attention are measured on, and that ``"distill"`` trains on.
        valid: held-out examples, which plans are judged by.
        target_bytes: what ``prefix.safetensors`` may take. The plan of the least loss is chosen.
        max_loss_increase: what the loss may rise by, in nats a token. Without a target, the smallest plan is chosen.
        methods: of ``"half"``, ``"int8"``, ``"int4"``, ``"prune"``, ``"merge"``, ``"low-rank"``, ``"distill"``. The
            last trains for minutes; it is tried where none of the others is within a limit of loss.
        out: folder for the prefix, a table and a picture of what was tried; None: nothing is written.
        resume: go on with a search that was broken off in ``out``.
        arguments: fields of ``PrefixTrainingArguments``, for ``"distill"``.

    Raises:
        ConfigError: the limits make no sense or are below one token, there is nothing to do, the prefix can't be
            compressed, or ``out`` holds something else.
        DataError: no examples.
        MismatchError: the prefix is of another base model.
        AttachError: the model has something attached.
    """
    limits = checked(prefix, target_bytes, max_loss_increase, methods)
    if DISTILL in methods:
        check_trainable(prefix)
        if out is None:
            raise ConfigError('the method "distill" is a training run, which keeps checkpoints: give out=, a folder')
    folder = Path(out) if out is not None else None
    search = _Search(
        model, tokenizer, prefix, dataset, valid, limits, tuple(methods), folder, arguments or {}, batch_size,
        console or Console(stderr=True),
    )  # fmt: skip
    check_examples(model, dataset, valid)
    attach(model, prefix).detach()  # says what doesn't fit
    if folder is not None:
        _check_out(folder, resume)
        begin(folder / BEGUN, search.describe(), resume, "a search")
    return search.run()


def checked(
    prefix: Prefix, target_bytes: int | None, max_loss_increase: float | None, methods: Sequence[str]
) -> Limits:
    """The limits, where they, the methods and the prefix make sense together.

    Raises:
        ConfigError: they don't.
    """
    check_limits(target_bytes, max_loss_increase)
    check_methods(methods)
    check_prefix(prefix)
    size = prefix.stored_nbytes
    if target_bytes is not None:
        if target_bytes >= size:
            raise ConfigError(
                f"target bytes {target_bytes:,}: the prefix's file takes {size:,} already, so there is nothing to do; "
                "expected fewer"
            )
        least, how = least_size(prefix, methods)
        if target_bytes < least:
            raise ConfigError(
                f"target bytes {target_bytes:,}: with one virtual token at each of {len(prefix.keys)} sites the file "
                f"takes {least:,} ({how}), of which {_fixed(prefix):,} are not of tokens (the description, memories, "
                "weights); expected that or more"
            )
    return Limits(target_bytes, max_loss_increase, size)


def _fixed(prefix: Prefix) -> int:
    """Bytes of the file of a prefix that no method takes away."""
    empty = {n: t[:, :0] for n, t in prefix.keys.items()}, {n: t[:, :0] for n, t in prefix.values.items()}
    return replace(prefix, keys=empty[0], values=empty[1], log_weights={}).stored_nbytes


@dataclass
class _Search:
    """One search, and what it has found so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefix: Prefix
    dataset: EncodedDataset
    valid: EncodedDataset
    limits: Limits
    methods: tuple[str, ...]
    folder: Path | None
    arguments: dict[str, Any]
    batch_size: int
    console: Console

    def describe(self) -> dict[str, Any]:
        """What would change the results, for a search that goes on."""
        return {
            "prefix": checksum_of(self.prefix),
            "examples": digest_of(self.dataset),
            "held-out examples": digest_of(self.valid),
            "limits": [self.limits.target_bytes, self.limits.max_loss_increase],
            "methods": sorted(self.methods),
            "arguments": {k: repr(v) for k, v in sorted(self.arguments.items())},
            "batch size": self.batch_size,
        }

    def run(self) -> Compression:
        self.before = held_out_loss(self.model, self.tokenizer, self.prefix, self.valid, batch_size=self.batch_size)
        self.known = known(self.folder)
        self.candidates: list[Candidate] = []
        self.shares: dict[str, Tensor] | None = None
        self.distilled: dict[int, Prefix] = {}
        plans = quick_plans(self.prefix, self.methods, self.limits)
        with _Bar(self.console, len(plans)) as tried:
            for plan in plans:
                self._try(plan)
                tried(best(self.candidates, self.limits))
        interrupted = not self._distill()
        chosen = best(self.candidates, self.limits) if not interrupted else None
        made = self._made(chosen.plan, chosen.loss) if chosen is not None else None
        result = Compression(
            self.before.mean, self.limits.before_bytes, self.candidates, self.limits, chosen, made,
            nearest(self.candidates, self.limits) if chosen is None else [], interrupted,
        )  # fmt: skip
        if self.folder is not None and not interrupted:
            self._keep(result)
        return result

    # ------------------------------------------------------------ one plan

    def _try(self, plan: Plan) -> None:
        if (found := self.known.get(plan.name)) is not None:
            self.candidates.append(Candidate(plan, **found))
            return
        began = time.monotonic()
        plan, made = self._to_fit(plan)
        after = held_out_loss(self.model, self.tokenizer, made, self.valid, batch_size=self.batch_size)
        increase, error = after.above(self.before)
        size = noted(made, plan, self.before.mean, after.mean).stored_nbytes
        seconds = round(time.monotonic() - began, 3)
        self.candidates.append(Candidate(plan, size, made.nbytes, after.mean, increase, error, seconds))
        if self.folder is not None:
            write_whole(self.folder / PLANS, text_of({"plans": [record_of(c) for c in self.candidates]}))

    def _to_fit(self, plan: Plan) -> tuple[Plan, Prefix]:
        """A plan and its prefix; fewer tokens where sites of different lengths take a little more than was reckoned."""
        made, target = self._made(plan), self.limits.target_bytes
        if plan.shorter != PRUNE or target is None or size_of(self.prefix, plan) > target:
            return plan, made
        while plan.tokens and plan.tokens > 1 and noted(made, plan, LONGEST, LONGEST).stored_nbytes > target:
            plan = replace(plan, tokens=plan.tokens - 1)
            made = self._made(plan)
        return plan, made

    def _made(self, plan: Plan, loss: float | None = None) -> Prefix:
        """The prefix of a plan; with its loss, as it is saved."""
        made = plan.numbers.of(self._shorter(plan))
        return noted(made, plan, self.before.mean, loss) if loss is not None else made

    def _shorter(self, plan: Plan) -> Prefix:
        if plan.shorter is None or plan.tokens is None:
            return self.prefix
        if plan.shorter == DISTILL:
            return self.distilled[plan.tokens]
        if plan.shorter == MERGE:
            return merge(self.prefix, self._shares(), plan.tokens)
        return prune(self.prefix, self._shares(), plan.tokens, uniform=plan.shorter == UNIFORM)

    def _shares(self) -> dict[str, Tensor]:
        if self.shares is None:
            self.shares = token_shares(self.model, self.tokenizer, self.prefix, self.dataset)
        return self.shares

    # ------------------------------------------------------------ training

    def _distill(self) -> bool:
        """Distil shorter prefixes where that is asked for and called for. False: Ctrl-C came."""
        if DISTILL not in self.methods:
            return True
        if self.limits.max_loss_increase is not None and best(self.candidates, self.limits) is not None:
            self.console.print("a plan without training is within the limits, so none is distilled")
            return True
        for plan in self._plans_to_distill():
            if not self._train(plan):
                return False
            self._try(plan)
            if not self.candidates[-1].good(self.limits):  # a shorter one won't be better
                break
        return True

    def _plans_to_distill(self) -> list[Plan]:
        """The plan with fewer tokens that came nearest, distilled; without a limit of bytes, length after length."""
        small = [c for c in self.candidates if c.plan.shorter and c.small(self.limits) and c.loss == c.loss]
        whole = [c.plan.numbers for c in self.candidates if not c.plan.shorter and c.good(self.limits)]
        narrow = [n for n in ways_to_write(self.prefix, self.methods) if not n.name or n in whole][-1]
        if self.limits.target_bytes is None:
            return [Plan(narrow, DISTILL, n) for n in usual_lengths(self.prefix)]
        if small:
            return [replace(min(small, key=lambda c: c.loss).plan, shorter=DISTILL)]
        narrow = ways_to_write(self.prefix, self.methods)[-1]
        return [Plan(narrow, DISTILL, n) for n in fitting(self.prefix, narrow, self.limits)]

    def _train(self, plan: Plan) -> bool:
        """Have the shorter prefix of a plan. False: Ctrl-C came."""
        folder, tokens = self._run_folder(plan), plan.tokens or 0
        if (folder / FINISHED).is_file():
            found = Prefix.load(folder)
        else:
            start = prune(self.prefix, self._shares(), tokens, uniform=True)
            result = shorten(
                self.model, self.tokenizer, self.prefix, tokens, self.dataset, folder, self.arguments, start=start,
                resume=True, label=plan.name, console=self.console,
            )  # fmt: skip
            if result.interrupted:
                return False
            write_whole(folder / FINISHED, text_of({"steps": result.steps}))
            found = result.prefix
        self.distilled[tokens] = replace(found, metadata=self.prefix.metadata)
        return True

    def _run_folder(self, plan: Plan) -> Path:
        assert self.folder is not None
        return self.folder / f"distilled-{plan.tokens}"

    # ------------------------------------------------------------ what is left behind

    def _keep(self, result: Compression) -> None:
        assert self.folder is not None
        write_whole(self.folder / PLANS, text_of(result.to_json()))
        draw_plans(result.candidates, result.limits, result.best, self.folder / PICTURE)
        if result.prefix is not None:
            result.prefix.save(self.folder)


class _Bar:
    """How many plans are tried, and the best so far."""

    def __init__(self, console: Console, total: int) -> None:
        said = TextColumn("{task.fields[said]}")
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self.bar = Progress(
            TextColumn("plans"), BarColumn(), MofNCompleteColumn(), said, *times, console=console
        )  # fmt: skip
        self.task = self.bar.add_task("plans", total=total, said="")

    def __enter__(self) -> Callable[[Candidate | None], None]:
        self.bar.start()
        return self.tried

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def tried(self, found: Candidate | None) -> None:
        said = f"best: {found.plan.name}, {found.increase:+.4f}" if found is not None else "none within the limits yet"
        self.bar.update(self.task, advance=1, said=said)


def check_examples(model: PreTrainedModel, dataset: EncodedDataset, valid: EncodedDataset) -> None:
    """Raise DataError unless there are examples to measure shares on, and tokens to measure a loss on."""
    if not len(dataset):
        raise DataError("there is no example to measure the shares of attention on; give some")
    if not sum(supervised_tokens(valid, seq2seq=model.config.is_encoder_decoder)):
        raise DataError(
            f"none of the {len(valid)} held-out examples has a token to compute a loss on; give examples with outputs"
        )


def _check_out(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the name of a folder for the prefix")
    if (folder / "foreword.json").exists():
        raise ConfigError(f"{folder} holds a prefix already; choose another folder")
    if (folder / "README.md").exists():
        raise ConfigError(f"{folder} holds a README.md of something else, which a prefix would replace")
    if resume and not (folder / BEGUN).is_file():
        raise ConfigError(f"--resume: {folder} holds no search that was begun; leave --resume out to begin one")
