"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): virtual tokens at the input embeddings.

In a causal model, what such tokens become at each layer doesn't depend on the text after them. So they are one more
way to make a prefix: the frozen model itself maps ``length`` trained embeddings to every site's keys and values, once
a pass and not once a row, and after training the prefix is kept and the embeddings are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword.config import DEFAULT_TEXT
from foreword.encoders import PrefixEncoder
from foreword.errors import ConfigError
from foreword.methods import PromptConfig
from foreword.positions import Rotation
from foreword.sites import Call, Site, evaluating, input_device, recording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt(PrefixEncoder):
    """``length * hidden_size`` numbers; ``encode`` runs them through the frozen model.

    Args:
        embeddings: ``(P, hidden_size)`` to start from.
        position_offset: position that the text starts at; the prompt stands right before it.
    """

    def __init__(
        self,
        embeddings: Tensor,
        model: PreTrainedModel,
        sites: Sequence[Site],
        rotations: Mapping[str, Rotation],
        position_offset: int,
    ) -> None:
        super().__init__({}, freeze_first=False, dropout=0.0)
        self.names = [s.name for s in sites]
        self.longest = len(embeddings)
        self.embeddings = nn.Parameter(embeddings)
        # Not as a submodule: the model holds this encoder, and would hold itself.
        self.__dict__["model"] = model
        self.rotations = dict(rotations)
        self.position_offset = position_offset

    def encode(self, given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        model: PreTrainedModel = self.__dict__["model"]
        backbone: Any = getattr(model, model.base_model_prefix, model)
        length = self.embeddings.shape[0]
        states: dict[str, tuple[Tensor, Tensor]] = {}

        def observe(call: Call, _: str) -> None:
            states[call.name] = (call.key[0], call.value[0])

        inputs = self.embeddings[None].to(backbone.get_input_embeddings().weight.dtype)
        with recording(model, observe), evaluating(model):
            backbone.forward(inputs_embeds=inputs, use_cache=False)
        moved = []
        for name in self.names:
            keys, values = states[name]
            rotation = self.rotations.get(name)
            back = self.position_offset - length
            moved.append((keys if rotation is None else rotation(keys, back), values))
        return moved


def prompt_encoder(
    config: PromptConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    sites: Sequence[Site],
    rotations: Mapping[str, Rotation],
) -> Prompt:
    """The encoder that a configuration asks for, at its start.

    Raises:
        ConfigError: a text without a tokenizer, or one that is shorter than ``length``.
    """
    embedding: Any = model.get_input_embeddings()
    table: Tensor = embedding.weight.detach()
    generator = torch.Generator().manual_seed(config.seed)
    if config.init in ("random", "vocabulary"):
        if config.length is None:
            raise ConfigError(f"length=None takes the length of the init text; give a length with init={config.init!r}")
        if config.init == "random":
            start = torch.randn(config.length, table.shape[1], generator=generator).to(table.device)
            start = table.float().mean(0) + start * table.float().std(0)
        else:  # the most frequent tokens come first in nearly every vocabulary (Lester et al., section 3.2)
            ids = torch.randint(min(5000, len(table)), (config.length,), generator=generator)
            start = table[ids.to(table.device)]
    else:
        start = _of_text(config, model, tokenizer, table)
    return Prompt(start.float().clone(), model, sites, rotations, config.position_offset)


def _of_text(
    config: PromptConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, table: Tensor
) -> Tensor:
    if tokenizer is None:
        raise ConfigError(
            "a prompt starts from a text, which needs the model's tokenizer: fw.attach(model, config, "
            'tokenizer=tokenizer). Without one, use PromptConfig(init="vocabulary")'
        )
    ids = tokenizer(config.init or DEFAULT_TEXT)["input_ids"]
    if not ids:
        raise ConfigError(f"the text {config.init!r} has no token in this tokenizer")
    length = config.length or len(ids)
    if len(ids) < length and not (config.repeat or config.init is None):
        raise ConfigError(
            f"the init text has {len(ids)} tokens and the prompt {length}; write a longer text, set repeat=True to "
            "repeat it, or length=None to take its own length"
        )
    chosen = (ids * (length // len(ids) + 1))[:length]
    layer: Any = model.get_input_embeddings()
    with torch.no_grad():  # the layer, not its table: some models scale what they look up
        looked_up: Tensor = layer(torch.tensor(chosen, device=input_device(model)))
    return looked_up
