"""The model's forward pass as the engine calls it, and the proof that rows can be written together by it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from foreword._boundary import told
from foreword.errors import ForewordError, UnsupportedModelError
from foreword.serve._mixing import Choice
from foreword.serve.cache import RowCache
from foreword.serve.library import Library
from foreword.sites import input_device, text_inputs

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


class Calls:
    """Forward passes of a library's model, on left-padded rows.

    Raises:
        UnsupportedModelError: this model's rows can't be written together; the message says why.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.model = library.model
        self.device = input_device(self.model)
        self.column_bytes = 0  # of what a cache holds of a token; known when it is proved
        self._takes = inspect.signature(self.model.forward).parameters.keys()
        self._refuse()

    def __call__(
        self,
        choice: Choice | None,
        ids: Tensor,  # (R, S)
        mask: Tensor,  # (R, past + S) bool
        positions: Tensor,  # (R, S)
        cache: Cache,
        output_from: int,
    ) -> Tensor:
        """Scores of the token after each row: ``(R, V)``.

        Args:
            choice: what the rows read.
            output_from: the column that the output begins at, for prefixes that only the output sees.
        """
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if "position_ids" in self._takes:
            arguments["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        # Not inference mode: what is made from masks is remembered by their versions, which it doesn't have.
        with torch.no_grad(), self.library.reading(choice), told(output_from):
            logits: Tensor = self.model(**arguments, use_cache=True).logits
        return logits[:, -1]

    def prompts(self, choice: Choice | None, ids: Tensor, mask: Tensor, cache: DynamicCache, read: int) -> Tensor:
        """Read columns of prompts: as :meth:`__call__`.

        Args:
            ids: ``(R, S)``, these columns.
            mask: ``(R, L)`` bool, of all columns.
            read: columns that are in the cache already.
        """
        stop = read + ids.shape[1]
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, read:stop]
        return self(choice, ids, mask[:, :stop], positions, cache, mask.shape[1])

    def step(self, choice: Choice | None, tokens: list[int], cache: RowCache, first: int) -> Tensor:
        """Write a token to the rows of a cache from ``first`` on: as :meth:`__call__`."""
        ids = torch.tensor(tokens, device=self.device)[:, None]
        with cache.passing(first, first + len(tokens)) as (mask, positions):
            return self(choice, ids, mask.to(self.device), positions.to(self.device), cache, 0)

    # ---------------------------------------------------------------- which models

    def _refuse(self) -> None:
        name, config = type(self.model).__name__, self.model.config
        if config.is_encoder_decoder or not self.model.can_generate():
            what = "reads its input with an encoder" if config.is_encoder_decoder else "has no language-model head"
            raise UnsupportedModelError(f"{name} {what}; expected a decoder that writes on from a prompt")
        kinds = {type(layer) for layer in DynamicCache(config=config.get_text_config(decoder=True)).layers}
        if odd := sorted(k.__name__ for k in kinds if k not in _LAYERS):
            raise UnsupportedModelError(
                f"{name} keeps a state besides keys and values ({odd[0]}), which can't be taken out of a batch and put "
                "into another yet. Write with fw.Library and model.generate instead"
            )

    def prove(self) -> None:
        """Make sure that rows of different lengths, written together, get the scores that they get alone.

        Raises:
            UnsupportedModelError: they don't.
        """
        ids = text_inputs(self.model, 12)["input_ids"][0].tolist()
        rows, follow = [ids[:5], ids[3:12]], [ids[6], ids[2]]
        try:
            alone = [self._trial([row], [token]) for row, token in zip(rows, follow, strict=True)]
            together = self._trial(rows, follow)
        except ForewordError:
            raise
        except Exception as exc:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} failed on two rows of different lengths ({type(exc).__name__}: {exc}), "
                "so requests can't be answered together"
            ) from exc
        wanted = torch.cat(alone)
        off = float((together - wanted).abs().max() / wanted.std().clamp(min=1e-9))
        # Rounding is a thousandth of this; a row that sees another's padding or position is off by its own size.
        if not off <= (0.02 if self.model.dtype in (torch.float32, torch.float64) else 0.3):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives a row other scores beside another row than alone (by {off:.2g} of "
                "their spread), so requests can't be answered together. Expected a model that honours attention_mask "
                "and position_ids; write with fw.Library and model.generate instead"
            )

    def _trial(self, rows: list[list[int]], follow: list[int]) -> Tensor:
        """Scores after the prompts and after one token more: ``(R, 2, V)``."""
        ids, mask = padded(rows, self.device)
        source, cache = DynamicCache(), RowCache()
        first = self.prompts(None, ids, mask, source, 0)
        cache.join(source, range(len(rows)), [len(r) for r in rows])
        self.column_bytes = cache.nbytes // (cache.places * cache.capacity)
        cache.prepare()
        return torch.stack([first, self.step(None, follow, cache, 0)], 1).float()


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``(R, L)`` with padding on the left, and the mask of what isn't padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask
