"""Where a prefix starts: the keys and values of a text, of words, or random ones of the model's own size.

The start decides more than anything else (a text beats random numbers by a factor of two in every public
comparison), so the default is a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword._prompted import check_text
from foreword.config import DEFAULT_TEXT, PrefixConfig
from foreword.errors import ConfigError, UnsupportedModelError
from foreword.orthogonal import check_room, orthogonalised
from foreword.positions import Rotation, check_movable
from foreword.sites import Call, Site, dry_run, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

States = dict[str, tuple[Tensor, Tensor]]


def initial_states(
    config: PrefixConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    chosen: Sequence[Site],
    rotations: Mapping[str, Rotation],
    example_inputs: Mapping[str, Any] | None = None,
    everywhere: Sequence[Site] | None = None,
) -> States:
    """Keys ``(G, P, key_dim)`` and values ``(G, P, value_dim)`` of each site to start from, float32.

    With tasks, their starts stand one before the other: ``(T, G, P, dim)``. A text doesn't reach vision and audio
    towers, which start at random beside it.

    Args:
        rotations: of all of the model's sites.
        everywhere: all of the model's sites, on which a text's keys and values are tried; None: those chosen.

    Raises:
        MismatchError: a text's keys and values don't stand for it on this model.
        ConfigError: a text without a tokenizer, one that is shorter than ``length``, or one for towers alone.
    """
    if config.tasks:
        return _of_tasks(config, model, tokenizer, chosen, rotations, example_inputs, everywhere)
    assert not isinstance(config.init, Mapping)
    if config.init == "random":
        assert config.length is not None
        lengths = config.site_lengths(chosen, config.length)
        return random_states(model, chosen, lengths, config.seed, example_inputs)
    if tokenizer is None:
        raise ConfigError(
            "a prefix starts from a text, which needs the model's tokenizer: fw.attach(model, config, "
            'tokenizer=tokenizer). Without one, use PrefixConfig(init="random")'
        )
    read = [s for s in chosen if not s.tower]
    if not read:
        raise ConfigError(
            f'a text doesn\'t reach {chosen[0].name} ({chosen[0].tower}); use init="random" for a prefix there alone'
        )
    text = config.init if config.init is not None else DEFAULT_TEXT
    repeat = config.repeat or config.init is None
    longest = config.length
    if longest is not None:
        longest = max(config.site_lengths(chosen, longest).values())
    if text.startswith("words:"):
        check_movable(model, read, rotations, by=1)
        states = word_states(model, tokenizer, text[6:].split(), read, longest, config.position_offset, rotations)
    else:
        ids = ids_of_text(model, tokenizer, text, longest, repeat=repeat)
        whole = [s for s in everywhere or chosen if not s.tower]
        check_text(model, whole, rotations, ids, config.position_offset)
        states = text_states(model, ids, read, config.position_offset, rotations)
    made = next(iter(states.values()))[0].shape[1]
    lengths = config.site_lengths(chosen, config.length or made)
    if len(read) < len(chosen):
        towers = [s for s in chosen if s.tower]
        states |= random_states(model, towers, lengths, config.seed, example_inputs)
    return {n: (states[n][0][:, :p].clone(), states[n][1][:, :p].clone()) for n, p in lengths.items()}


def _of_tasks(
    config: PrefixConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    chosen: Sequence[Site],
    rotations: Mapping[str, Rotation],
    example_inputs: Mapping[str, Any] | None,
    everywhere: Sequence[Site] | None,
) -> States:
    """Every task's start, ``(T, G, P, dim)``; the common tokens are the same numbers in all of them.

    Where all tasks start from one text, the common tokens are its first. Where each has a start of its own, the common
    tokens have one too (``"*"``, or the general text), and stand before it as in ``Prefix.join``.
    """
    apart = config.common if isinstance(config.init, Mapping) or config.init == "orthogonal" else 0
    rest = (model, tokenizer, chosen, rotations, example_inputs, everywhere)
    if config.init == "orthogonal":
        assert config.length is not None
        own = _alone(config, "random", config.length - apart, lambda n: n - apart)
        lengths = own.site_lengths(chosen, config.length - apart)
        together = orthogonal_states(model, chosen, lengths, len(config.tasks), config.seed, example_inputs)
    else:
        length = config.length - apart if config.length is not None else None
        own_starts = [_alone(config, config.start_of(task), length, lambda n: n - apart) for task in config.tasks]
        together = _stacked(
            [initial_states(replace(own, seed=own.seed + i), *rest) for i, own in enumerate(own_starts)], config.tasks
        )
    if apart:
        init = "random" if config.init == "orthogonal" else config.start_of("*")
        first = initial_states(_alone(config, init, apart, lambda _: apart), *rest)
        back = -max(keys.shape[-2] for keys, _ in together.values())
        return {
            n: (_before(_moved(rotations, n, first[n][0], back), keys), _before(first[n][1], values))
            for n, (keys, values) in together.items()
        }
    for tensor in (t for states in together.values() for t in states):  # random starts differ from task to task
        tensor[..., : config.common, :] = tensor[:1, ..., : config.common, :].clone()
    return together


def _alone(config: PrefixConfig, init: str | None, length: int | None, size: Callable[[int], int]) -> PrefixConfig:
    """A start for one task, or for the common tokens; where a site has a length of its own, it is resized."""
    lengths = {pattern: n and size(n) for pattern, n in (config.lengths or {}).items()}
    return replace(config, tasks=(), common=0, share=None, init=init, length=length, lengths=lengths)


def _stacked(starts: Sequence[States], tasks: Sequence[str]) -> States:
    lengths = [next(iter(states.values()))[0].shape[1] for states in starts]
    if len(set(lengths)) > 1:
        said = ", ".join(f"{task} {n}" for task, n in zip(tasks, lengths, strict=True))
        raise ConfigError(
            f"the tasks' texts have different lengths ({said} tokens); give one for all: length={min(lengths)}"
        )
    return {
        name: (torch.stack([s[name][0] for s in starts]), torch.stack([s[name][1] for s in starts]))
        for name in starts[0]
    }


def _before(first: Tensor, rest: Tensor) -> Tensor:
    """``(G, C, dim)`` before each task's ``(T, G, P, dim)``."""
    return torch.cat([first.expand(len(rest), -1, -1, -1), rest], dim=-2)


def ids_of_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int | None,
    *,
    repeat: bool = False,
) -> list[int]:
    """The tokens that a prefix of a text is made of.

    Raises:
        ConfigError: the text has no token, or fewer than ``length`` and is not to be repeated.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    if model.config.is_encoder_decoder and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids:
        raise ConfigError(f"the text {text!r} has no token in this tokenizer")
    if length is not None:
        if len(ids) < length and not repeat:
            raise ConfigError(
                f"the init text has {len(ids)} tokens and the prefix {length}; write a longer text, set "
                "repeat=True to repeat it, or length=None to take its own length"
            )
        ids = (ids * (length // len(ids) + 1))[:length]
    return ids


def text_states(
    model: PreTrainedModel,
    ids: Sequence[int],
    chosen: Sequence[Site],
    position_offset: int,
    rotations: Mapping[str, Rotation],
) -> States:
    """What the model computes for a text at each site, rotated so that it stands right before position_offset.

    Encoder-decoder models read the text on both sides.

    Raises:
        ConfigError: the text is longer than what the model reads.
    """
    states = _read(model, ids, chosen)
    return {n: (_moved(rotations, n, k[0], position_offset - len(ids)), v[0]) for n, (k, v) in states.items()}


def _read(model: PreTrainedModel, ids: Sequence[int], chosen: Sequence[Site]) -> States:
    """Raise ConfigError for a text that is longer than the model reads."""
    try:
        return states_of(model, torch.tensor([list(ids)]), chosen)
    except UnsupportedModelError as exc:
        most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if most is None or len(ids) <= most:
            raise
        raise ConfigError(
            f"the text that the prefix starts from has {len(ids)} tokens, and {type(model).__name__} has {most} "
            f'positions; take a length of at most {most}, or start without a text (init="random")'
        ) from exc


def word_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    chosen: Sequence[Site],
    length: int | None,
    position_offset: int,
    rotations: Mapping[str, Rotation],
) -> States:
    """What the model computes for words each read on its own (Li & Liang 2021, section 7.4), one after another.

    Words are repeated until ``length`` is full; None: once each.
    """
    pieces = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in words]
    if not any(pieces):
        raise ConfigError(f"the words {' '.join(words)!r} have no token in this tokenizer")
    made: dict[str, tuple[list[Tensor], list[Tensor]]] = {s.name: ([], []) for s in chosen}
    total, target = 0, length if length is not None else sum(map(len, pieces))
    each = [states_of(model, torch.tensor([ids]), chosen) for ids in pieces if ids]
    while total < target:
        for states in each:
            for name, (keys, values) in states.items():
                made[name][0].append(_moved(rotations, name, keys[0], total))
                made[name][1].append(values[0])
            total += next(iter(states.values()))[0].shape[2]
            if total >= target:
                break
    joined = {n: (torch.cat(k, 1)[:, :target], torch.cat(v, 1)[:, :target]) for n, (k, v) in made.items()}
    return {n: (_moved(rotations, n, k, position_offset - target), v) for n, (k, v) in joined.items()}


def random_states(
    model: PreTrainedModel,
    chosen: Sequence[Site],
    lengths: Mapping[str, int],
    seed: int,
    example_inputs: Mapping[str, Any] | None = None,
) -> States:
    """Normal numbers with the mean and spread of the model's own keys and values, by head and dimension."""
    seen = _own_states(model, example_inputs)
    generator = torch.Generator().manual_seed(seed)

    def draw(states: Tensor, length: int) -> Tensor:  # (B, G, N, dim) -> (G, length, dim)
        rows = states.transpose(0, 1).flatten(1, 2)
        mean, std = rows.mean(1, keepdim=True), rows.std(1, keepdim=True, correction=0)
        return mean + std * torch.randn(rows.shape[0], length, rows.shape[2], generator=generator)

    return {
        s.name: (draw(seen[s.name][0], lengths[s.name]), draw(seen[s.name][1], lengths[s.name]))
        for s in chosen
        if s.name in lengths
    }


def orthogonal_states(
    model: PreTrainedModel,
    chosen: Sequence[Site],
    lengths: Mapping[str, int],
    tasks: int,
    seed: int,
    example_inputs: Mapping[str, Any] | None = None,
) -> States:
    """Random tokens of T tasks in mutually orthogonal subspaces, ``(T, G, P, dim)`` (``foreword.orthogonal``).

    They are as large as those of ``random_states`` on average, in each head and dimension, but around 0: a mean that
    all had would not be orthogonal.

    Raises:
        ConfigError: a site has no room for so many.
    """
    check_room({s.name: s for s in chosen}, lengths, tasks)
    seen = _own_states(model, example_inputs)
    generator = torch.Generator().manual_seed(seed)

    def draw(states: Tensor, length: int) -> Tensor:  # (B, G, N, dim) -> (T, G, length, dim)
        rows = states.transpose(0, 1).flatten(1, 2)
        size = rows.square().mean(1, keepdim=True).sqrt()
        return orthogonalised(size * torch.randn(tasks, rows.shape[0], length, rows.shape[2], generator=generator))

    return {name: (draw(seen[name][0], length), draw(seen[name][1], length)) for name, length in lengths.items()}


def _own_states(model: PreTrainedModel, example_inputs: Mapping[str, Any] | None) -> States:
    """Keys and values ``(B, G, N, dim)`` of each site in a dry run, float32 on the CPU."""
    seen: States = {}

    def observe(call: Call, _: str) -> None:
        seen.setdefault(call.name, (call.key.detach().float().cpu(), call.value.detach().float().cpu()))

    dry_run(model, observe, example_inputs)
    return seen


def states_of(model: PreTrainedModel, ids: Tensor, chosen: Sequence[Site]) -> States:
    """Keys and values ``(1, G, P, dim)`` of each chosen site for token ids ``(1, P)``, float32 on the CPU."""
    wanted = {s.name: s for s in chosen}
    if shared := [s for s in chosen if s.calls > 1]:
        raise UnsupportedModelError(
            f"{shared[0].name} is called {shared[0].calls} times in a pass (layers share it), so a text gives it no "
            'single set of keys and values; use init="random"'
        )
    inputs: dict[str, Any] = {"input_ids": ids.to(input_device(model))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    parameters = inspect.signature(model.forward).parameters
    if "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "logits_to_keep" in parameters:  # nobody reads them, and a long text's are larger than the model
        inputs["logits_to_keep"] = 1
    states: States = {}

    def observe(call: Call, _: str) -> None:
        if call.name in wanted:
            states[call.name] = (call.key.detach().float().cpu(), call.value.detach().float().cpu())

    dry_run(model, observe, inputs)
    return {s.name: states[s.name] for s in chosen}


def _moved(rotations: Mapping[str, Rotation], name: str, keys: Tensor, positions: int) -> Tensor:
    rotation = rotations.get(name)
    return keys if rotation is None else rotation(keys, positions)
