"""From configurations and saved prefixes to a :class:`~foreword.tuning.Tuning` that stands on a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from foreword import conditional, methods
from foreword._lora import LoRA
from foreword._prompted import check_text
from foreword._renamed import fitted
from foreword.config import PrefixConfig
from foreword.encoders import Direct, Frozen, PrefixEncoder, States, make_encoder
from foreword.errors import ConfigError
from foreword.fingerprint import Fingerprint
from foreword.initializers import initial_states
from foreword.input_prompts import input_prompt, reads_into_decoder, saved_prompt
from foreword.memory import Memory, Recall
from foreword.positions import PositionFacts, check_offset, study
from foreword.prefix import Prefix
from foreword.quantized import keep_backward
from foreword.sites import Site, select, text_inputs, unreached_encoder
from foreword.sites import sites as find_sites
from foreword.tuning import Tuning
from foreword.visibility import Visibility, parse
from foreword.weights import Adapters, WeightPart, all_parameters, bias_parameters, head_names, head_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foreword.methods import Config

# The model's own parameters first: beside LoRA they have other names, and LoRA's layers are not for BitFit.
_WEIGHTS = (methods.BitFitConfig, methods.FullConfig, methods.LoRAConfig, methods.AdapterConfig)
_ORDER = (PrefixConfig, methods.PromptConfig, methods.MemoryConfig, *_WEIGHTS)  # whatever order they are given in


def build(
    model: PreTrainedModel,
    items: Sequence[Config | Prefix],
    tokenizer: PreTrainedTokenizerBase | None,
    example_inputs: Mapping[str, Any] | None,
    trainable: bool,
    strength: float | None,
    force: bool,
) -> Tuning:
    """Everything that ``attach`` does. What was begun is undone if something doesn't fit."""
    _check_items(items)
    if trainable or any(not isinstance(i, Prefix) for i in items):
        keep_backward(model)
    tuning = Tuning(model, Fingerprint.of(model))
    prefixes = [i for i in items if isinstance(i, Prefix)]
    configs = sorted((i for i in items if not isinstance(i, Prefix)), key=lambda c: _ORDER.index(type(c)))
    tuning.configs = list(configs)
    taken = _taken_by_heads(model, items)
    try:
        prefixes = [_checked(model, p, example_inputs, force) for p in prefixes]
        # The layers first: a text's keys and values are those of the model as it will stand.
        for prefix in prefixes:
            _load_weights(tuning, prefix, example_inputs, trainable, taken)
        for config in configs:
            if isinstance(config, _WEIGHTS):
                _put_on(tuning, weight_part(model, config, example_inputs, taken), config.to_json())
            elif isinstance(config, methods.PromptConfig) and reads_into_decoder(model):
                tuning.config = config
                _put_on(tuning, *input_prompt(config, model, tokenizer))
        _stand_at_sites(tuning, prefixes, configs, tokenizer, example_inputs, trainable)
        if strength is not None:
            tuning.strength = strength
        tuning.install(trainable=trainable or bool(configs))
    except BaseException:
        tuning.take_parts_off()
        raise
    return tuning


def weight_part(
    model: PreTrainedModel, config: Any, example_inputs: Mapping[str, Any] | None, taken: Collection[str] = ()
) -> WeightPart:
    """The part that a configuration asks for, not yet on the model; without what a head beside it trains."""
    if isinstance(config, methods.LoRAConfig):
        return LoRA(config)
    if isinstance(config, methods.AdapterConfig):
        return Adapters(config, example_inputs)
    if isinstance(config, methods.BitFitConfig):
        return bias_parameters(model, config, taken)
    return all_parameters(model, config, taken)


def _check_items(items: Sequence[Any]) -> None:
    if not items:
        raise ConfigError("attach was given an empty list; expected a configuration or a prefix")
    for item in items:
        if not isinstance(item, (*_ORDER, Prefix)):
            raise ConfigError(
                f"attach takes a PrefixConfig or a Prefix, not {type(item).__name__} (MemoryConfig, LoRAConfig and "
                "their like as well, or a list of them)"
            )
    kinds = [_kinds(i) for i in items]
    if {"bitfit", "full"} <= set().union(*kinds):
        raise ConfigError(
            "BitFit trains the biases and full fine-tuning trains them too; give attach one of the two (what full "
            "fine-tuning trains can be chosen: parameters=...)"
        )
    for n, own in enumerate(kinds):
        for other in kinds[n + 1 :]:
            if both := own & other:
                raise ConfigError(
                    f"two of what was given to attach are a {sorted(both)[0]}; expected one of each kind. "
                    "Two prefixes can be joined to one: first.join(second)"
                )


def _kinds(item: Any) -> set[str]:
    """What an item brings: two that bring the same can't stand on one model."""
    if isinstance(item, Prefix):
        found = {"prefix" if p["method"] == "prompt" else str(p["method"]) for p in item.parts}
        return found | ({"prefix"} if item.longest else set()) | ({"memory"} if item.memory else set())
    if isinstance(item, PrefixConfig | methods.PromptConfig):
        return {"prefix"} | ({"head"} if getattr(item, "head", None) else set())
    return {item.method}


def _checked(model: PreTrainedModel, prefix: Prefix, example_inputs: Mapping[str, Any] | None, force: bool) -> Prefix:
    """The prefix under the model's names. Raises MismatchError if it isn't the model's."""
    found = _known_sites(model, prefix, example_inputs) if prefix.sites else []
    prefix = fitted(prefix, model, found)
    prefix.check_fits(model, found, force=force)
    check_offset(model, prefix.position_offset, prefix.sites)
    return prefix


def _known_sites(model: PreTrainedModel, prefix: Prefix, example_inputs: Mapping[str, Any] | None) -> list[Site]:
    """The model's sites; a prefix for a model that needs inputs to be looked at vouches for its own by name."""
    try:
        return find_sites(model, example_inputs)
    except ConfigError:
        if example_inputs is not None:
            raise
        modules = dict(model.named_modules())
        return [s for s in prefix.sites if s.name in modules]


# ------------------------------------------------------------------------------------------ weights


def _put_on(tuning: Tuning, part: WeightPart, record: dict[str, Any], trainable: bool = True) -> None:
    tuning.holder.weights[part.method] = part
    part.put_on(tuning.model)
    tuning.parts.append(record)
    for value in part.values:
        value.requires_grad_(trainable)


def _taken_by_heads(model: PreTrainedModel, items: Sequence[Config | Prefix]) -> set[str]:
    """The parameters of the head that is given or asked for: it trains them, at its own rate, and no one else."""
    kinds = [getattr(i, "head", None) for i in items if not isinstance(i, Prefix)]
    kinds += [str(p["kind"]) for i in items if isinstance(i, Prefix) for p in i.parts if p["method"] == "head"]
    return {n for kind in kinds if kind is not None for n in head_names(model, kind)}


def _load_weights(
    tuning: Tuning,
    prefix: Prefix,
    example_inputs: Mapping[str, Any] | None,
    trainable: bool,
    taken: Collection[str],
) -> None:
    for record in prefix.parts:
        method = str(record["method"])
        if method == conditional.METHOD:  # not on the layers: it makes the keys and values
            continue
        part = _part_of(tuning.model, record, example_inputs, taken)
        _put_on(tuning, part, dict(record), trainable)
        start = f"{method}/"
        part.load({n.removeprefix(start): t for n, t in prefix.weights.items() if n.startswith(start)})


def _part_of(
    model: PreTrainedModel,
    record: Mapping[str, Any],
    example_inputs: Mapping[str, Any] | None,
    taken: Collection[str] = (),
) -> WeightPart:
    if record["method"] == "head":
        return head_parameters(model, str(record["kind"]))
    if record["method"] == "prompt":
        return saved_prompt(model, record)
    known = {c.method: c for c in _WEIGHTS}
    if record["method"] not in known:
        raise ConfigError(f"the prefix has a part {record['method']!r}, which this version of foreword doesn't know")
    fields = {k: v for k, v in record.items() if k != "method"}
    return weight_part(model, known[str(record["method"])](**fields), example_inputs, taken)


# ------------------------------------------------------------------------------------------ at the attention


def _stand_at_sites(
    tuning: Tuning,
    prefixes: Sequence[Prefix],
    configs: Sequence[Config],
    tokenizer: PreTrainedTokenizerBase | None,
    example_inputs: Mapping[str, Any] | None,
    trainable: bool,
) -> None:
    model = tuning.model
    kinds = (PrefixConfig, methods.MemoryConfig, *(() if reads_into_decoder(model) else (methods.PromptConfig,)))
    at_sites = [c for c in configs if isinstance(c, kinds)]
    found: list[Site] = find_sites(model, example_inputs) if at_sites else []
    if at_sites and (unreached := unreached_encoder(model, found)):
        _say_unreached(model, unreached, at_sites)
        tuning.metadata["unreached"] = unreached
    chosen: dict[str, Site] = {}
    for prefix in prefixes:
        chosen.update({s.name: s for s in prefix.sites if prefix.length(s.name) or s.name in prefix.memory})
    wanted = {id(c): _sites_of(c, found) for c in at_sites}
    for sites in wanted.values():
        chosen.update({s.name: s for s in sites})
    order = {s.name: i for i, s in enumerate(found)} or {n: i for i, n in enumerate(chosen)}
    tuning.sites = sorted(chosen.values(), key=lambda s: order.get(s.name, 0))
    tuning.positions = study(model, found or tuning.sites) if tuning.sites else PositionFacts({})
    for prefix in prefixes:
        _load(tuning, prefix, trainable)
    for config in at_sites:
        if isinstance(config, methods.MemoryConfig):
            _new_memory(tuning, config, wanted[id(config)])
    for config in at_sites:
        if not isinstance(config, methods.MemoryConfig):
            _new_prefix(tuning, config, wanted[id(config)], found, tokenizer, example_inputs)


def _say_unreached(model: PreTrainedModel, encoder: str, configs: Sequence[Config]) -> None:
    """Warn that nothing stands in the encoder; raise ConfigError if it was to stand nowhere else."""
    why = f"{type(model).__name__} computes the attention of its encoder ({encoder}) in its own code"
    for config in configs:
        if tuple(getattr(config, "kinds", ())) == ("encoder",):
            raise ConfigError(
                f"kinds=('encoder',), but {why}, where nothing can be placed before keys and values; "
                "use kinds=('self', 'cross')"
            )
    warnings.warn(
        f"{why}, so nothing stands there: only the decoder's attention has what is attached (kinds 'self' and 'cross')",
        UserWarning,
        stacklevel=5,
    )


def _sites_of(config: Any, found: Sequence[Site]) -> list[Site]:
    if isinstance(config, methods.PromptConfig):
        return _prompted(found)
    return select(found, config.sites, config.kinds)


def _load(tuning: Tuning, prefix: Prefix, trainable: bool) -> None:
    states = {s.name: (prefix.keys[s.name], prefix.values[s.name]) for s in prefix.sites if prefix.length(s.name)}
    tuning.metadata.update(prefix.metadata)
    if states:
        tuning.holder.encoder = _loaded(prefix, states, trainable)
        tuning.position_offset = prefix.position_offset
        _set_visible(tuning, prefix.visible, states)
        tuning.load_gates(prefix, trainable)
        for i, site in enumerate(tuning.sites):
            if (weights := prefix.log_weights.get(site.name)) is not None and prefix.length(site.name):
                tuning.holder.token_weights[str(i)] = nn.Parameter(weights.float().clone(), requires_grad=False)
    if not tuning.positions.studied:  # a model that doesn't start from text: what was proved where it was made
        tuning.positions = PositionFacts({**tuning.positions.rotations, **prefix.rotations})
    if prefix.memory:
        tuning.holder.memory = Memory.of(prefix.memory, prefix.memory_up, trainable=trainable)
        tuning.recall = prefix.recall


def _loaded(prefix: Prefix, states: States, trainable: bool) -> PrefixEncoder:
    if conditional.part_of(prefix) is not None:
        return conditional.encoder_of(prefix).requires_grad_(trainable)
    return Direct({n: (k.float(), v.float()) for n, (k, v) in states.items()}) if trainable else Frozen(states)


def _new_memory(tuning: Tuning, config: methods.MemoryConfig, sites: Sequence[Site]) -> None:
    tuning.recall = Recall(config.activation, config.queries)
    if config.queries == "plain":
        still = [s.name for s in sites if s.kind != "cross" and s.name not in tuning.rotations]
        if still:
            raise ConfigError(
                f'queries="plain" undoes the rotation of queries, and those of {still[0]} are not known to be rotated; '
                'use queries="rotated" (as the model uses them)'
            )
    tuning.holder.memory = Memory(sites, rank=config.rank, seed=config.seed)


def _new_prefix(
    tuning: Tuning,
    config: PrefixConfig | methods.PromptConfig,
    sites: Sequence[Site],
    found: Sequence[Site],
    tokenizer: PreTrainedTokenizerBase | None,
    example_inputs: Mapping[str, Any] | None,
) -> None:
    model = tuning.model
    check_offset(model, config.position_offset, sites)
    tuning.config = config
    tuning.position_offset = config.position_offset
    if isinstance(config, methods.PromptConfig):
        from foreword.prompts import prompt_encoder

        # A prompt is a text of its own: what holds for a text holds for it.
        ids = text_inputs(model)["input_ids"][0].tolist()
        check_text(model, sites, tuning.rotations, ids, config.position_offset and len(ids))
        tuning.holder.encoder = prompt_encoder(config, model, tokenizer, sites, tuning.rotations)
        _set_visible(tuning, parse(config.visible), [s.name for s in sites])
        return
    start = initial_states(config, model, tokenizer, sites, tuning.rotations, example_inputs, found)
    kept = [s for s in sites if s.name in start]
    tuning.holder.encoder = make_encoder(config, start, kept)
    used = start.keys() | set(tuning.holder.memory.names if tuning.holder.memory is not None else ())
    tuning.sites = [s for s in tuning.sites if s.name in used]  # not those that `lengths` leaves out
    tuning.strength = config.strength
    _set_visible(tuning, parse(config.visible), start)
    if config.gate is not None:
        tuning.add_gates(config.gate, kept)
    if config.head is not None:
        _put_on(tuning, head_parameters(model, config.head), {"method": "head", "kind": config.head})


def _set_visible(tuning: Tuning, rule: Visibility, names: Any) -> None:
    """Raise ConfigError where an infix makes no sense."""
    if rule.kind == "infix":
        odd = [s for s in tuning.sites if s.name in names and s.kind != "self"]
        if odd or tuning.model.config.is_encoder_decoder:
            what = f"{odd[0].name} is {odd[0].kind} attention" if odd else "the input is in the encoder"
            raise ConfigError(
                f'visible="infix" needs input and output in one causal sequence, and {what}; use a decoder-only model, '
                'or visible="all" (sites of the decoder alone: kinds=("self",))'
            )
    tuning.visible = rule


def _prompted(found: Sequence[Site]) -> list[Site]:
    """All sites of the text, where a prompt's keys and values don't depend on what follows.

    Raises:
        ConfigError: the model reads in both directions.
    """
    chosen = select(found)
    both = next((s for s in chosen if not s.causal), None)
    if both is not None:
        raise ConfigError(
            f"prompt tuning is for models with a decoder: at {both.name} ({both.kind} attention) virtual tokens see "
            "the text, so they would have to stay among its tokens and would move what is read off by position (the "
            "pooled token, token labels). Use a PrefixConfig with this model: its keys and values take no position"
        )
    return chosen
