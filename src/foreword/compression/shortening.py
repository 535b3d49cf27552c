"""Fewer tokens, trained: a short prefix learns to answer as the long one does.

The short one starts from the long one's tokens that are seen most (or merged), and is distilled from it on examples
(``foreword.train.distill``). It takes minutes where the other methods take seconds, and needs examples to train on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.compression._checks import check_prefix, check_tokens
from foreword.compression.measuring import token_shares
from foreword.compression.pruning import prune
from foreword.data import EncodedDataset
from foreword.errors import ConfigError
from foreword.prefix import Prefix

if TYPE_CHECKING:
    from foreword.train.run import RunResult


def shorten(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix,
    tokens: int,
    dataset: EncodedDataset,
    out: Path,
    arguments: dict[str, Any],
    *,
    start: Prefix | None = None,
    resume: bool = False,
    label: str = "shortening",
    console: Console | None = None,
    **options: Any,
) -> RunResult:
    """Distil a prefix into one of fewer tokens; ``.prefix`` of what is returned.

    Args:
        tokens: at each site.
        dataset: examples that it is trained on.
        out: the run's folder.
        arguments: fields of ``PrefixTrainingArguments``.
        start: the short prefix to start from; None: the tokens with the largest shares of attention on the examples.
        resume: go on with what was begun in ``out``, if anything was.
        options: of ``foreword.train.distill.distill``.

    Raises:
        ConfigError: not one token, no fewer than there are, or a prefix that brings more than tokens.
    """
    from foreword.train.distill import begun, distill  # this room stands below training

    check_trainable(prefix)
    check_tokens(prefix, tokens)
    if start is None:
        start = prune(prefix, token_shares(model, tokenizer, prefix, dataset), tokens, uniform=True)
    return distill(
        model, tokenizer, prefix, start, dataset, out, arguments, resume=resume and begun(out), label=label,
        console=console, **options,
    )  # fmt: skip


def check_trainable(prefix: Prefix) -> None:
    """Raise ConfigError for a prefix whose training would change more than its tokens."""
    check_prefix(prefix)
    others = [*(["a memory"] if prefix.memory else []), *(str(p["method"]) for p in prefix.parts)]
    if others:
        raise ConfigError(
            f"this prefix brings {' and '.join(others)}, which a distillation would train as well; leave distill out "
            "of the methods (pruning, merging and few bits leave them as they are)"
        )
