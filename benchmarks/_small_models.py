"""Any class of transformers as a small model with random weights, where its configuration can be made small.

Nothing is known of an architecture: sizes are found in a configuration by their names.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto

VOCABULARY, LARGEST = 160, 8_000_000  # tokens; parameters

# What a size is called, and what it becomes. The first that fits the name of an attribute holds.
_SIZES: tuple[tuple[tuple[str, ...], int], ...] = (
    (("vocab_size", "entity_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    (("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "encoder_num_key_value_heads",
      "decoder_num_key_value_heads", "num_global_key_value_heads"), 2),
    (("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
      "encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    (("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
      "num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    (("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "out_hidden_size", "emb_dim", "text_hidden_size",
      "word_embed_proj_dim", "embedding_size", "hidden_size_per_layer_input"), 32),
    (("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "hidden_dim",
      "shared_expert_intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "dim_ff",
      "intermediate_size_mlp", "shared_intermediate_size", "projection_dim", "expert_ffn_hidden_size"), 32),
    (("head_dim", "d_kv", "kv_channels", "global_head_dim", "attention_head_dim", "swa_head_dim"), 8),
    (("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    (("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"), 8),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    (("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    (("n_group", "topk_group", "n_shared_experts", "o_groups"), 1),
    (("index_n_heads",), 2), (("index_head_dim",), 16), (("index_topk",), 4),
    (("sliding_window", "attention_window", "local_attention", "window_size"), 16),
    (("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions"), 128),
    (("rotary_dim",), 8), (("attn_layer_offset",), 1), (("attn_layer_period",), 2),
    (("image_size", "input_size"), 16), (("patch_size",), 8), (("num_mel_bins",), 8),
    (("linear_num_value_heads",), 4), (("linear_num_key_heads",), 2),
    (("linear_key_head_dim", "linear_value_head_dim"), 8),
    (("mamba_n_heads", "mamba_num_heads"), 8), (("mamba_d_head", "mamba_head_dim"), 8), (("mamba_n_groups",), 1),
    (("mamba_d_state", "ssm_state_size", "state_size"), 8), (("lru_width",), 32),
    (("first_k_dense_replace", "num_kv_shared_layers"), 1),
)  # fmt: skip
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
_KINDS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT")


class NotBuiltError(Exception):
    """A class can't be made small here; the message says why."""


def classes() -> dict[str, str]:
    """Every text, encoder-decoder and vision-language class, with the kind that it is listed under."""
    found: dict[str, str] = {}
    for kind in _KINDS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return dict(sorted(found.items()))


def build(name: str) -> Any:
    """A small model of a class that reads text, in eval mode, attention far from uniform; in float64 where it runs so.

    Raises:
        NotBuiltError: its configuration can't be made small, it needs what isn't installed, or it reads no text.
    """
    first: Exception | None = None
    # Latent attention has keys for every head; pictures have positions on three axes.
    for every_head, axes in ((False, False), (True, False), (False, True), (True, True)):
        try:
            model = _built(name, every_head, axes)
            for dtype in (torch.float64, torch.float32):
                try:
                    with torch.no_grad():
                        model.to(dtype)(**text(model, 2, 12))
                    return model
                except Exception as exc:
                    first = first or exc
        except Exception as exc:
            first = first or exc
    assert first is not None
    if isinstance(first, NotBuiltError):
        raise first
    raise NotBuiltError(f"{type(first).__name__}: {(str(first).splitlines() or [''])[0][:120]}") from first


def _built(name: str, every_head: bool, axes: bool) -> Any:
    cls = getattr(tf, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(shrunk(cls.config_class, every_head=every_head, axes=axes)).parameters())
    if size > LARGEST:
        raise NotBuiltError(f"{size / 1e6:.0f} M parameters at the least")
    torch.manual_seed(0)
    model = cls(shrunk(cls.config_class, every_head=every_head, axes=axes))
    model.set_experts_implementation("eager")  # the others don't know float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point() and parameter.numel():
                fan = parameter[0].numel()
                spread = 1.5 * min(0.3, fan**-0.5)
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    if getattr(model, "generation_config", None) is not None:
        settings = model.generation_config
        settings.eos_token_id, settings.forced_eos_token_id, settings.pad_token_id = None, None, 0
        settings.forced_bos_token_id = None
        if model.config.is_encoder_decoder and settings.decoder_start_token_id is None:
            settings.decoder_start_token_id = _IDS["decoder_start_token_id"]
    return model.eval()


def shrunk(config_class: Any, part: Any = None, *, every_head: bool = False, axes: bool = False) -> Any:
    """A configuration with all its sizes small, those of its parts too.

    Args:
        part: one of this class as a larger configuration has it by default; None: its own defaults.
        every_head: as many key/value heads as query heads.
        axes: positions on three axes, where they rotate.
    """
    default = part if part is not None else config_class()
    parts = {}
    for key in getattr(config_class, "sub_configs", None) or {}:
        if isinstance(inner := getattr(default, key, None), tf.PreTrainedConfig):
            parts[key] = shrunk(type(inner), inner, every_head=every_head, axes=axes)
    changes = _changes(default, axes)
    if every_head:
        changes |= {n: 4 for n in changes if "key_value" in n or "kv_heads" in n}
    last: Exception = NotBuiltError("no sizes")
    for kept in (changes, changes | {"head_dim": 8}, {k: v for k, v in changes.items() if k != "layer_types"}):
        try:
            made = config_class(**parts, **kept)
            if not parts:  # of several parts, each was tried
                _small_enough(made)
            return made
        except Exception as exc:  # some check their sizes against each other
            last = exc
    raise last


def _small_enough(config: Any) -> None:
    """Raise where a configuration is not one that a model can be made of."""
    cls = _class_of(config)
    if cls is not None:
        with torch.device("meta"):
            cls(config)


def _class_of(config: Any) -> Any:
    """A model class that a configuration is for, if transformers lists one."""
    for mapping in (tf.MODEL_FOR_CAUSAL_LM_MAPPING, tf.MODEL_MAPPING):
        try:
            found = mapping[type(config)]
        except KeyError:
            continue
        return found[0] if isinstance(found, tuple | list) else found
    return None


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # an attribute that each layer has for itself
        return None


def _changes(config: Any, axes: bool) -> dict[str, Any]:
    known = set(inspect.signature(type(config)).parameters)
    changes: dict[str, Any] = {}
    for names, size in _SIZES:
        for name in names:
            value = _value(config, name) if name in known else None
            if isinstance(value, int) and not isinstance(value, bool) and value:
                changes[name] = min(value, size)
            elif isinstance(value, list) and value and all(isinstance(v, int) for v in value):
                changes[name] = [min(v, size) for v in value]
    changes |= {n: v for n, v in _IDS.items() if n in known and not isinstance(_value(config, n), list)}
    layers = next((changes[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in changes), None)
    kinds = _value(config, "layer_types")
    if isinstance(kinds, list) and kinds and layers and "layer_types" in known:
        different = list(dict.fromkeys(kinds))
        changes["layer_types"] = different + [different[-1]] * max(0, layers - len(different))
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in changes:
                changes[name] = len(changes["layer_types"])
    rope = _value(config, "rope_parameters")
    if isinstance(rope, dict) and (axes or "mrope_section" in rope):
        changes["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    marks = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index")
    return changes | {
        n: VOCABULARY - 3 - len(n) % 5 for n in known if n.endswith(marks) and isinstance(_value(config, n), int)
    }


def text(model: Any, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One pass's token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(8, 120, (rows, length), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(8, 120, (rows, length - 3), generator=generator)
    return inputs
