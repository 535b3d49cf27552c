"""Continue texts with a model as it stands: one left-padded batch, only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.errors import ConfigError
from foreword.sites import input_device


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any
) -> list[str]:
    """What the model writes after each text, ``num_return_sequences`` answers a text, in order.

    Args:
        options: as for ``generate`` (``max_new_tokens``, ``do_sample``, …). The tokenizer is left as it was.
    """
    return write_on(model, tokenizer, [tokenizer(text)["input_ids"] for text in texts], **options)


def write_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], **options: Any
) -> list[str]:
    """The same, from token ids.

    Raises:
        ConfigError: the tokenizer has nothing to pad with.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ConfigError(
            "texts are padded to one batch, and the tokenizer has neither a padding nor an end token; set "
            "tokenizer.pad_token to one of its tokens"
        )
    longest = max(map(len, rows))
    device = input_device(model)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    if options.get("stop_strings"):
        options["tokenizer"] = tokenizer  # generate asks for it, to know which tokens the strings may be part of
    with torch.no_grad():
        output = cast(Any, model).generate(ids, attention_mask=mask, pad_token_id=pad, **options)
    start = 0 if model.config.is_encoder_decoder else longest
    return [str(t) for t in tokenizer.batch_decode(cast(torch.Tensor, output)[:, start:], skip_special_tokens=True)]
