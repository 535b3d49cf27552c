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

from foreword._offloaded import device_of
from foreword._sharded import is_sharded
from foreword.config import DEFAULT_TEXT
from foreword.encoders import PrefixEncoder
from foreword.errors import ConfigError, ForewordError
from foreword.methods import PromptConfig
from foreword.positions import Rotation
from foreword.sites import Call, Site, evaluating, recording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_INSTEAD = "use a PrefixConfig with this model, which needs no embeddings"


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

    def by_token(self) -> list[tuple[int, nn.Parameter]]:
        return [(0, self.embeddings)]

    def encode(self, given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        model: PreTrainedModel = self.__dict__["model"]
        backbone: Any = getattr(model, model.base_model_prefix, model)
        length = self.embeddings.shape[0]
        states: dict[str, tuple[Tensor, Tensor]] = {}

        def observe(call: Call, _: str) -> None:
            states[call.name] = (call.key[0], call.value[0])

        table: Any = model.get_input_embeddings()
        inputs = self.embeddings[None].to(table.weight.dtype)
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
        ConfigError: a text without a tokenizer, or one that is shorter than ``length``; a base that is sharded, or
            reads no embeddings.
    """
    if is_sharded(model):  # layers that are gathered for each use are gone again when a prompt's gradient wants them
        raise ConfigError(
            f"{type(model).__name__} is sharded by FSDP2, where no gradient gets through a prompt's own pass; "
            "use a PrefixConfig, or train the prompt on a base that isn't sharded"
        )
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        raise ConfigError(
            f"{type(model).__name__} doesn't say which its input embeddings are (get_input_embeddings), so there is "
            f"nothing to train a prompt at; {_INSTEAD}"
        ) from None
    start = prompt_start(config, model, tokenizer, embedding)
    prompt = Prompt(start, model, sites, rotations, config.position_offset)
    _prove(prompt)
    return prompt


@torch.no_grad()
def _prove(prompt: Prompt) -> None:
    """Raise ConfigError if the model can't read a prompt that is no longer of its tokens' embeddings."""
    model: PreTrainedModel = prompt.__dict__["model"]
    start = prompt.embeddings.detach().clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(start.shape, generator=generator).to(start.device) * start.std()
    try:
        prompt.embeddings.copy_(start + noise)
        prompt.encode(None)
    except ForewordError:
        raise
    except Exception as exc:
        reason = " ".join(str(exc).split())
        raise ConfigError(
            f"{type(model).__name__} can't read trained embeddings in the place of tokens ({type(exc).__name__}: "
            f"{reason[:200]}); {_INSTEAD}"
        ) from exc
    finally:
        prompt.embeddings.copy_(start)


@torch.no_grad()
def prompt_start(
    config: PromptConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, embedding: Any
) -> Tensor:
    """The embeddings that a prompt starts from: ``(P, hidden_size)``, float32, on the embeddings' device.

    Args:
        embedding: the layer that embeds what the prompt stands before. It is run and not its table read, because
            some models scale what they look up.

    Raises:
        ConfigError: a text without a tokenizer, or one that is shorter than ``length``.
    """
    table: Tensor = embedding.weight
    device = device_of(embedding)
    generator = torch.Generator().manual_seed(config.seed)
    if config.init in ("random", "vocabulary"):
        if config.length is None:
            raise ConfigError(f"length=None takes the length of the init text; give a length with init={config.init!r}")
        if config.init == "random":
            start = torch.randn(config.length, table.shape[1], generator=generator).to(device)
            whole = embedding(torch.arange(len(table), device=device)).float()
            start = whole.mean(0) + start * whole.std(0)
        else:  # the most frequent tokens come first in nearly every vocabulary (Lester et al., section 3.2)
            ids = torch.randint(min(5000, len(table)), (config.length,), generator=generator)
            start = embedding(ids.to(device))
    else:
        ids = torch.tensor(_ids_of_text(config, model, tokenizer))
        start = embedding(ids.to(device))
    return start.float().clone()


def _ids_of_text(config: PromptConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if tokenizer is None:
        raise ConfigError(
            "a prompt starts from a text, which needs the model's tokenizer: fw.attach(model, config, "
            'tokenizer=tokenizer). Without one, use PromptConfig(init="vocabulary")'
        )
    ids: list[int] = tokenizer(config.init or DEFAULT_TEXT)["input_ids"]
    if model.config.is_encoder_decoder and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # the text goes on
    if not ids:
        raise ConfigError(f"the text {config.init!r} has no token in this tokenizer")
    length = config.length or len(ids)
    if len(ids) < length and not (config.repeat or config.init is None):
        raise ConfigError(
            f"the init text has {len(ids)} tokens and the prompt {length}; write a longer text, set repeat=True to "
            "repeat it, or length=None to take its own length"
        )
    return (ids * (length // len(ids) + 1))[:length]
