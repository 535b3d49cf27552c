"""Closeness in meaning to references, token by token, by the packaged encoder all-MiniLM-L6-v2.

As in BERTScore (Zhang et al. 2020, eq. 1): each token is matched with the token of the other text whose contextual
embedding is closest; recall is the mean over the reference's tokens, precision over the prediction's. Here the
embeddings are MiniLM's last layer, without the special tokens, without weighting by rarity and without rescaling: the
values are not those of the package bert-score, and unrelated texts get about 30, not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from foreword.evaluate._counts import Counts, Given, mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_TOKENS = 256
_CHUNK = 256


def similarity(given: Given) -> Counts:
    """The mean F1 of the best matching reference, in percent."""
    encoder, tokenizer = given.tools.get("encoder") or _packaged()
    values: list[float] = []
    for start in range(0, len(given.predictions), _CHUNK):  # the embeddings of a large set would fill the memory
        predictions = given.predictions[start : start + _CHUNK]
        references = given.references[start : start + _CHUNK]
        texts = list(dict.fromkeys([*predictions, *(r for refs in references for r in refs)]))
        found = dict(zip(texts, token_embeddings(encoder, tokenizer, texts), strict=True))
        values += [
            max(matched(found[p], found[r]) for r in refs) for p, refs in zip(predictions, references, strict=True)
        ]
    return mean(values, note="all-MiniLM-L6-v2, last layer; the best of several references")


def matched(prediction: torch.Tensor, reference: torch.Tensor) -> float:
    """F1 of greedy matching: ``(n, d)`` and ``(m, d)`` of length one -> a share; 0 where either has no tokens."""
    if not len(prediction) or not len(reference):
        return 0.0
    close = prediction @ reference.T  # (n, m) cosines
    precision, recall = float(close.amax(1).mean()), float(close.amax(0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def token_embeddings(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 32
) -> list[torch.Tensor]:
    """For each text the embeddings ``(tokens, d)`` of its tokens but the special ones, of length one."""
    import torch

    encoded = [tokenizer(t, truncation=True, max_length=_MAX_TOKENS, return_special_tokens_mask=True) for t in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]["input_ids"]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = [{k: encoded[i][k] for k in names if k in encoded[i]} for i in rows]
        padded = tokenizer.pad(batch, return_tensors="pt").to(encoder.device)
        with torch.inference_mode():
            states = encoder(**padded).last_hidden_state
        for state, i in zip(states, rows, strict=True):
            special = encoded[i]["special_tokens_mask"]
            plain = [place for place, mark in enumerate(special) if not mark]
            found[i] = torch.nn.functional.normalize(state[plain].float(), dim=-1).cpu()
    return found


def _packaged() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from foreword.models import load_model, packaged_encoder

    return load_model(packaged_encoder(), kind="encoder")
