"""From examples to the batches that a model of any kind reads, with labels where it has a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.data import Collator, Example, encode
from foreword.errors import DataError
from foreword.losses import IGNORED, to_device
from foreword.sites import sites

LEAST = 8  # tokens in all, to see anything at all
_MASKED = 0.15  # of the tokens, for masked language models (as BERT was trained)


def batches_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int = 256,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Batches for the diagnostics: as in training for decoders and encoder-decoders.

    A masked language model gets some of its tokens masked (the same ones each time), and a loss on these. An encoder
    without a vocabulary gets no labels.

    Raises:
        DataError: there is no example, or all of them together have fewer than 8 tokens.
    """
    if not examples:
        raise DataError("there is no text to look at a prefix with; give one or more")
    seq2seq = model.config.is_encoder_decoder
    if seq2seq or any(s.kind == "self" for s in sites(model)):
        dataset = encode(examples, tokenizer, max_length=max_length, seq2seq=seq2seq)
        collator = Collator.for_tokenizer(tokenizer, seq2seq=seq2seq)
        items = [dataset[i] for i in range(len(dataset))]
        found: list[dict[str, Any]] = [
            dict(collator(items[i : i + batch_size])) for i in range(0, len(items), batch_size)
        ]
    else:
        texts = [f"{e.input} {e.output}".strip() for e in examples]
        options: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": True}
        found = [
            _encoded(model, tokenizer, texts[i : i + batch_size], options) for i in range(0, len(texts), batch_size)
        ]
    tokens = sum(int(b["attention_mask"].sum()) for b in found)
    if tokens < LEAST:
        raise DataError(f"the texts have {tokens} tokens in all; expected {LEAST} or more, so give longer texts")
    return [to_device(batch, model) for batch in found]


def _encoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], options: dict[str, Any]
) -> dict[str, Any]:
    batch = dict(tokenizer(list(texts), return_tensors="pt", return_special_tokens_mask=True, **options))
    special = batch.pop("special_tokens_mask").bool()
    mask_token = tokenizer.mask_token_id
    if model.get_output_embeddings() is None or mask_token is None:
        return batch
    ids = batch["input_ids"]
    usable = ~special & batch["attention_mask"].bool()
    chances = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~usable, 2.0)
    chosen = usable & ((chances < _MASKED) | (chances == chances.min(1, keepdim=True).values))  # one a text at least
    batch["labels"] = ids.masked_fill(~chosen, IGNORED)
    batch["input_ids"] = ids.masked_fill(chosen, mask_token)
    return batch
