"""Prompt tuning of encoder-decoder models (Lester et al. 2021, arXiv 2104.08691): virtual tokens before the input.

In an encoder virtual tokens see the text, so what they become depends on it, and they can't be kept as keys and
values. They are a part that goes onto the model: trained embeddings put in front of the encoder's own, which the
decoder's cross attention sees as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword._offloaded import device_of
from foreword.errors import ConfigError, UnsupportedModelError
from foreword.methods import PromptConfig
from foreword.prompts import prompt_start
from foreword.sites import evaluating, text_inputs
from foreword.weights import WeightPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class InputPrompt(WeightPart):
    """Embeddings before an encoder's input, by forward pre-hooks.

    Args:
        embeddings: ``(P, hidden_size)`` to start from.
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__("prompt")
        self.names, self.values = ["embeddings"], nn.ParameterList([nn.Parameter(embeddings)])
        self.handles: list[Any] = []

    def put_on(self, model: PreTrainedModel) -> None:
        encoder = text_encoder(model)
        _check_embeddings(model, encoder)
        # Bound methods, so that a copied model's hooks read the copy's embeddings.
        self.handles.append(encoder.register_forward_pre_hook(self._prepend, with_kwargs=True))
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and "encoder_outputs" in _parameters(module):
                self.handles.append(module.register_forward_pre_hook(self._uncover, with_kwargs=True))

    def take_off(self, model: PreTrainedModel) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _prepend(self, encoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """An encoder's call, on P+N positions instead of N."""
        kwargs = _by_name(encoder, args, kwargs)
        ids, embedded = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if (ids is None) == (embedded is None):
            return None  # the encoder says what is wrong with that
        if embedded is None:
            embedded = encoder.get_input_embeddings()(ids)
        prompt = self.values[0].to(embedded).expand(len(embedded), -1, -1)
        kwargs["attention_mask"] = self._extended(kwargs.get("attention_mask"), embedded.shape[1])
        return (), {**kwargs, "input_ids": None, "inputs_embeds": torch.cat([prompt, embedded], dim=1)}

    def _uncover(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """A whole model's call, with a mask that lets the cross attention see the prompt.

        Generation runs the encoder by itself and then passes what it gave together with the mask of the text.
        """
        kwargs = _by_name(model, args, kwargs)
        if (outputs := kwargs.get("encoder_outputs")) is not None:
            length = outputs[0].shape[1] - len(self.values[0])
        elif (given := _first(kwargs, "input_ids", "inputs_embeds")) is not None:
            length = given.shape[1]
        else:
            return None
        return (), {**kwargs, "attention_mask": self._extended(kwargs.get("attention_mask"), length)}

    def _extended(self, mask: Any, length: int) -> Any:
        """A mask over the text's ``length`` tokens, ``(B, N)``, as one over prompt and text: ``(B, P+N)``."""
        count = len(self.values[0])
        if mask is None or mask.shape[-1] == length + count:  # nothing hidden, or extended further up
            return mask
        if mask.dim() != 2 or mask.shape[1] != length:
            raise ConfigError(
                f"the attention_mask has shape {tuple(mask.shape)}; expected (batch, {length}), one entry for each "
                f"token of the text: the prompt's {count} are added to it"
            )
        return torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def input_prompt(
    config: PromptConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[InputPrompt, dict[str, Any]]:
    """The part that a configuration asks for, at its start, and the record that :func:`saved_prompt` takes.

    Raises:
        ConfigError: options that make no sense before an encoder, a start that can't be made (see
            ``foreword.prompts.prompt_start``), or an encoder that doesn't start from token embeddings.
    """
    for name, value, usual in (("position_offset", config.position_offset, 0), ("visible", config.visible, "all")):
        if value != usual:
            raise ConfigError(
                f"{name}={value!r}, but before the encoder of {type(model).__name__} a prompt is part of the input, at "
                f"its first positions and seen by all; leave {name} at {usual!r}, or use a PrefixConfig"
            )
    start = prompt_start(config, model, tokenizer, text_encoder(model).get_input_embeddings())
    return InputPrompt(start), replace(config, length=len(start)).to_json()


def saved_prompt(model: PreTrainedModel, record: Mapping[str, Any]) -> InputPrompt:
    """The part that a saved record speaks of, with embeddings yet to be loaded."""
    embedding: Any = text_encoder(model).get_input_embeddings()
    return InputPrompt(torch.zeros(int(record["length"]), embedding.weight.shape[1], device=device_of(embedding)))


def reads_into_decoder(model: PreTrainedModel) -> bool:
    """Whether a model has an encoder for its input and a decoder that reads what it gives."""
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in _parameters(model)


def text_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder stack of an encoder-decoder model.

    Raises:
        ConfigError: there is none, or it doesn't start from token embeddings.
    """
    encoder: Any = model.get_encoder() if reads_into_decoder(model) else model
    if encoder is model:
        raise ConfigError(
            f"{type(model).__name__} has no encoder that a decoder reads, and this prompt stands before one's input; "
            "attach it to the model that it was trained on"
        )
    takes = {"input_ids", "inputs_embeds", "attention_mask"} <= set(_parameters(encoder))
    if not (takes and isinstance(encoder, PreTrainedModel)):
        raise ConfigError(
            f"the encoder of {type(model).__name__}, a {type(encoder).__name__}, doesn't start from token embeddings "
            "that it shows (inputs_embeds), so there is nothing to put a prompt in front of. Use a PrefixConfig"
        )
    return encoder


@torch.no_grad()
def _check_embeddings(model: PreTrainedModel, encoder: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if an encoder does more to its ids than look them up (scale them, say)."""
    if device_of(model).type == "meta":
        return
    ids = text_inputs(model)["input_ids"]
    ids = ids.flatten(0, -2)  # of multiple choice
    with evaluating(encoder):
        ours = encoder(inputs_embeds=encoder.get_input_embeddings()(ids))[0]
        own = encoder(input_ids=ids)[0]
    if not torch.allclose(ours, own, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise UnsupportedModelError(
            f"{type(encoder).__name__} gives something else for the embeddings of tokens than for the tokens, so a "
            "prompt can't stand beside them. Use a PrefixConfig with this model"
        )


def _parameters(module: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(module.forward).parameters


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters(module), args, strict=False)), **kwargs}


def _first(kwargs: Mapping[str, Any], *names: str) -> Any:
    return next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
